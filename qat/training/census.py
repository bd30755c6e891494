"""What a compiled program does: its matrix products and its collectives.

XLA's own cost analysis counts the body of a loop once; this one counts it as often as it runs. A
TPU compiler turns matrix products into convolutions, with the batch of a batched product as
dilated window dimensions, so that a product's cost is the number of window positions that meet an
element of the input. Collectives may be spread over several fusions that run while something else
is computed; the pieces of such a chain are one collective. What a custom kernel does is not seen.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from qat.training.hlo import Computation, Instruction, bits, count_runs, nbytes, parse, shape_of

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_WINDOW_DEFAULTS = {"size": 1, "stride": 1, "lhs_dilate": 1, "rhs_dilate": 1}


@dataclasses.dataclass(frozen=True)
class Dots:
    """Matrix products whose operands have these dtypes.

    Attributes:
        lhs: HLO dtype of the first operand, such as "bf16", "s8" or "f8e4m3fn".
        rhs: of the second.
        count: how many run in one run of the program, on each device.
        flops: of all of them, one multiply-add counted as two.
    """

    lhs: str
    rhs: str
    count: int
    flops: float

    @property
    def low_precision(self) -> bool:
        """Whether both operands have at most 8 bits."""
        return max(bits(self.lhs), bits(self.rhs)) <= 8


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Exchanges of one kind among groups of one size.

    Attributes:
        kind: HLO opcode, such as "all-gather".
        group: devices that exchange with one another.
        count: how many run in one run of the program.
        payload: bytes a device holds of all of them where they are whole: before a reduction,
            after a gathering.
    """

    kind: str
    group: int
    count: int
    payload: int


@dataclasses.dataclass(frozen=True)
class Census:
    """What runs in one run of a program, on each device.

    Attributes:
        dots: by dtypes, the most FLOPs first.
        collectives: by kind and group, the most bytes first.
        unknown_loops: loops whose number of turns is not in the text; counted once.
    """

    dots: tuple[Dots, ...]
    collectives: tuple[Collectives, ...]
    unknown_loops: tuple[str, ...]

    @property
    def flops(self) -> float:
        """Of all matrix products."""
        return sum(dots.flops for dots in self.dots)

    @property
    def low_precision_share(self) -> float:
        """Share of the FLOPs in products of at most 8 bits; 0 where there are no products."""
        low = sum(dots.flops for dots in self.dots if dots.low_precision)
        return low / self.flops if self.flops else 0.0


def census(text: str) -> Census:
    """Counts products and collectives.

    Args:
        text: of an optimized HLO module, as `jax.stages.Compiled.as_text` gives it.

    Raises:
        ValueError: the text is not that of an HLO module.
    """
    module = parse(text)
    runs, unknown = count_runs(module)
    dots = _count_dots(module.computations, runs)
    return Census(dots, _count_collectives(module.computations, runs, module.partitions), unknown)


def _count_dots(
    computations: Mapping[str, Computation], runs: Mapping[str, int]
) -> tuple[Dots, ...]:
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    flops: collections.Counter[tuple[str, str]] = collections.Counter()
    for name, computation in computations.items():
        for instruction in computation.values():
            if not runs.get(name) or instruction.opcode not in ("dot", "convolution"):
                continue
            lhs, rhs = (computation[operand].type for operand in instruction.operands[:2])
            kind = shape_of(lhs)[0], shape_of(rhs)[0]
            counts[kind] += runs[name]
            cost = _dot_flops if instruction.opcode == "dot" else _convolution_flops
            flops[kind] += runs[name] * cost(instruction, lhs, rhs)
    return tuple(Dots(*kind, counts[kind], total) for kind, total in flops.most_common())


def _dot_flops(dot: Instruction, lhs: str, rhs: str) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    depth = math.prod(shape_of(lhs)[1][axis] for axis in axes)
    return 2 * depth * math.prod(shape_of(dot.type)[1])


def _convolution_flops(convolution: Instruction, lhs: str, rhs: str) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels is not None, convolution
    lhs_sizes, rhs_sizes, out_sizes = (
        dict(zip(letters, shape_of(type)[1], strict=True))
        for letters, type in zip(labels.groups(), (lhs, rhs, convolution.type), strict=True)
    )
    spatial = sorted(letter for letter in labels[1] if letter.isdigit())
    flops: int = 2 * out_sizes["b"] * out_sizes["f"] * rhs_sizes["i"]
    for axis, dims in zip(spatial, _window(convolution.attributes, len(spatial)), strict=True):
        flops *= _positions(lhs_sizes[axis], out_sizes[axis], *dims)
    return flops


def _window(attributes: str, axes: int) -> list[tuple[int, int, int, int, int]]:
    """Size, stride, padding before, dilation of input and of window, for each spatial axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    columns = [
        [int(x) for x in fields[name].split("x")] if name in fields else [default] * axes
        for name, default in _WINDOW_DEFAULTS.items()
    ]
    padding = fields["pad"].split("x") if "pad" in fields else ["0_0"] * axes
    before = [int(pair.split("_")[0]) for pair in padding]
    size, stride, lhs_dilate, rhs_dilate = columns
    return list(zip(size, stride, before, lhs_dilate, rhs_dilate, strict=True))


@functools.cache
def _positions(
    inputs: int, outputs: int, size: int, stride: int, before: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """How often, along one axis, a window position meets an element of the input."""
    output, position = np.arange(outputs)[:, None], np.arange(size)[None, :]
    reached = output * stride - before + position * rhs_dilate
    met = (reached >= 0) & (reached <= (inputs - 1) * lhs_dilate) & (reached % lhs_dilate == 0)
    return int(met.sum())


def _count_collectives(
    computations: Mapping[str, Computation], runs: Mapping[str, int], devices: int
) -> tuple[Collectives, ...]:
    found: dict[str, tuple[str, int, int, int]] = {}
    for name, computation in computations.items():
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if not runs.get(name) or kind not in _COLLECTIVES:
                continue
            group = _group_size(instruction.attributes, devices)
            payload = sum(nbytes(computation[each].type) for each in instruction.operands)
            payload *= group if kind == "all-gather" else 1
            if name.startswith("all-reduce-scatter"):  # a fusion that keeps one share of the sum
                kind = "reduce-scatter"
            found[_chain(instruction)] = (kind, group, runs[name], payload)
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    payloads: collections.Counter[tuple[str, int]] = collections.Counter()
    for kind, group, times, payload in found.values():
        counts[kind, group] += times
        payloads[kind, group] += times * payload
    return tuple(Collectives(*key, counts[key], total) for key, total in payloads.most_common())


def _chain(collective: Instruction) -> str:
    """What the pieces of one collective have in common; of a whole one, its name."""
    channel = re.search(r"channel_id=(\d+)", collective.attributes)
    in_pieces = "chain_id=" in collective.attributes and channel is not None
    return f"channel {channel[1]}" if in_pieces and channel else collective.name


def _group_size(attributes: str, devices: int) -> int:
    """Devices of one replica group, in any of HLO's notations."""
    if "source_target_pairs=" in attributes:
        return 2
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return int(tiled[1].split(",")[-1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed[1].split(",")) if listed else devices
