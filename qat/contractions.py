"""Which contractions a function runs, read from its jaxpr: what conversion reports are made of.

A layer that was converted may claim to be quantized; what counts is which products the program
runs. So the list comes from the traced program: every `dot_general`, convolution and ragged
product, in scans, branches, rematerialized blocks and nested jits, whoever wrote it. Nothing can
be skipped silently, since a contraction that no layer knows of is in the list as well.

Two marks tie a contraction to what the doors know, both scopes on the name stack, which JAX keeps
through differentiation, batching and control flow: `layer_scope` says whose it is, and
`quantized_scope`, around the product itself, says how its operands were quantized. The scopes are
metadata: they cost nothing at run time, and profilers show them.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

_CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")
_LOOKUP = "gather"  # listed where it is marked as quantized: a row of a quantized table
_DOORS = {
    "dot_general": "qat.dot_general or qat.einsum",
    "conv_general_dilated": "qat.conv_general_dilated",
}
_LAYER, _QUANTIZED = "qat.layer", "qat"
_MARK = re.compile(r"(qat\.layer|qat)\[([^\]]*)\]")
# Whose frames are not the source of a contraction; the last two wrap functions that they check.
_NEVER_SOURCES = ("jax", "qat", "jaxtyping", "beartype")
_IN_LAYER = "layer "
_LIBRARIES = ("flax", *_NEVER_SOURCES)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One contraction of a program.

    Attributes:
        operation: the primitive, such as "dot_general".
        equation: its axes as an einsum, such as "ab,bc->ac"; a convolution's in XLA's letters
            (b batch, f features, i and o of the kernel, digits for space), "b01f,01io->b01f"; ""
            of a layer that was not traced, whose class is the operation.
        lhs_shape: of the left-hand operand; inside `shard_map`, of one device's part.
        rhs_shape: of the right-hand operand.
        count: how often it runs, scan lengths multiplied; None inside a while loop, whose length
            no trace tells. Of branches each is listed as if it ran.
        scope: the name stack.
        source: the user's line, "model.py:12 (Mlp.__call__)", else Flax's; "" where neither is.
        layer: path of the innermost `layer_scope`, or None.
        quantized: description of the `quantized_scope` it ran in, or None.
        in_flax: whether it is Flax that contracts, called from the user's line.
    """

    operation: str
    equation: str
    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    count: int | None
    scope: str
    source: str
    layer: str | None
    quantized: str | None
    in_flax: bool = False

    def __str__(self) -> str:
        """Operation, equation, shapes and count in a line, so far as they are known."""
        if not self.equation:
            return " ".join([self.operation, *("×".join(map(str, s)) for s in self._shapes if s)])
        shapes = ", ".join("×".join(map(str, s)) or "scalar" for s in self._shapes)
        count = "" if self.count == 1 else f", {self.count or 'unknown'} times"
        return f"{self.operation} {self.equation} ({shapes}{count})"

    @property
    def advice(self) -> str:
        """What can be done about a contraction that no layer knows of."""
        if self.in_flax:
            return "Flax's own code, which has no place for another contraction"
        door = _DOORS.get(self.operation)
        return f"use {door} there" if door else "which has no quantized counterpart"

    @property
    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.lhs_shape, self.rhs_shape


@dataclasses.dataclass(frozen=True)
class ContractionReport:
    """One line of a conversion report.

    Attributes:
        contraction: what runs.
        reason: why it was left unquantized; None where it is quantized.
    """

    contraction: Contraction
    reason: str | None = None

    @property
    def path(self) -> str | None:
        """Path of the layer it belongs to, or None."""
        return self.contraction.layer

    @property
    def quantized(self) -> str | None:
        """How its operands are quantized, or None."""
        return self.contraction.quantized

    def __str__(self) -> str:
        """Path, contraction and verdict."""
        traced = bool(self.contraction.equation)
        quantized = self.quantized if traced else f"will quantize {self.quantized}"
        verdict = quantized if self.quantized else f"skipped: {self.reason}"
        return f"{self.path or '(root)'}: {self.contraction}: {verdict}"


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """Every contraction of a converted model, quantized how or skipped why.

    Attributes:
        lines: in the order in which the program runs them.
        note: what the lines leave open, or "".
    """

    lines: tuple[ContractionReport, ...] = ()
    note: str = ""

    @property
    def quantized(self) -> tuple[ContractionReport, ...]:
        """The lines of quantized contractions."""
        return tuple(line for line in self.lines if line.quantized)

    @property
    def skipped(self) -> tuple[ContractionReport, ...]:
        """The lines of contractions left as they were."""
        return tuple(line for line in self.lines if not line.quantized)

    def __iter__(self) -> Iterator[ContractionReport]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def __str__(self) -> str:
        """A line each, and the note."""
        lines = [*map(str, self.lines), *([self.note] if self.note else [])]
        return "\n".join(lines) or "no contraction"


@contextlib.contextmanager
def layer_scope(path: str) -> Iterator[None]:
    """Marks all that is traced within, and errors too, as belonging to the layer at this path."""
    with naming_layer(path), jax.named_scope(f"{_LAYER}[{_without_brackets(path)}]"):
        yield


@contextlib.contextmanager
def naming_layer(path: str) -> Iterator[None]:
    """Puts the innermost layer in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        if type(error) is ValueError and not message.startswith(_IN_LAYER):
            error.args = (f"{_IN_LAYER}{path or '(root)'}: {message}",)
        raise


def quantized_scope(description: str) -> contextlib.AbstractContextManager[Any]:
    """Marks a contraction whose operands are quantized, such as "weights int4/channel"."""
    return jax.named_scope(f"{_QUANTIZED}[{_without_brackets(description)}]")


def find_contractions(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Contraction]:
    """Lists every contraction that a call would run, without running it.

    Args:
        function: anything JAX can trace.
        *args: its arguments; arrays and `jax.ShapeDtypeStruct` are traced, all else is static.
        **kwargs: likewise.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    abstract = {i: _abstract(leaf) for i, leaf in enumerate(leaves) if _is_array(leaf)}

    def call(arrays: dict[int, Any]) -> Any:  # a new function, which no cache has a trace of
        filled = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        filled_args, filled_kwargs = jax.tree.unflatten(structure, filled)
        return [x for x in jax.tree.leaves(function(*filled_args, **filled_kwargs)) if _is_array(x)]

    return list(_walk(jax.make_jaxpr(call)(abstract).jaxpr, 1, "", ("", "")))


def _walk(
    jaxpr: Any, count: int | None, scope: str, sources: tuple[str, str]
) -> Iterator[Contraction]:
    """The contractions of a jaxpr that runs `count` times, called from a scope and from lines.

    The lines are the innermost that is the user's, and the innermost that is not JAX's.
    """
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, list(_inner_jaxprs(eqn.params.values()))
        if name not in (*_CONTRACTIONS, _LOOKUP) and not inner:
            continue
        eqn_scope = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))
        # In a nested jit frames begin at its function, so the caller's line may be the user's.
        own = _source(eqn, _LIBRARIES) or sources[0], _source(eqn, _NEVER_SOURCES) or sources[1]
        layer, quantized = _marks(eqn_scope)
        if name in _CONTRACTIONS or (name == _LOOKUP and quantized):
            lhs, rhs = (tuple(operand.aval.shape) for operand in eqn.invars[:2])
            where = eqn_scope, own[0] or own[1], layer, quantized, own[1].startswith("flax/")
            yield Contraction(name, _equation(eqn), lhs, rhs, count, *where)
        for jaxpr_within in inner:
            yield from _walk(jaxpr_within, _times(eqn, count), eqn_scope, own)


def _inner_jaxprs(values: Iterable[Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters, alone or in a sequence, open or closed."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _inner_jaxprs(value)
        elif hasattr(jaxpr := getattr(value, "jaxpr", value), "eqns"):
            yield jaxpr


def _times(eqn: Any, count: int | None) -> int | None:
    """How often the jaxprs inside an equation run, if it runs `count` times."""
    if eqn.primitive.name == "while":
        return None
    if count is not None and eqn.primitive.name == "scan":
        return count * int(eqn.params["length"])
    if count is not None and eqn.primitive.name == "pallas_call":
        grid = eqn.params["grid_mapping"].grid
        return count * math.prod(grid) if all(isinstance(n, int) for n in grid) else None
    return count


def _marks(scope: str) -> tuple[str | None, str | None]:
    """Innermost layer on a name stack, and the description of a product quantized in it."""
    layer = quantized = None
    for kind, text in _MARK.findall(scope):
        if kind == _LAYER:
            layer, quantized = text, None
        else:
            quantized = text
    return layer, quantized


def _equation(eqn: Any) -> str:
    """The axes of a contraction in letters."""
    name, params = eqn.primitive.name, eqn.params
    ranks = [operand.aval.ndim for operand in eqn.invars[:2]]
    if name == _LOOKUP:
        return "rows"
    if name == "conv_general_dilated":
        return _convolution_equation(params["dimension_numbers"], ranks[0])
    if name == "dot_general":
        return _dot_equation(params["dimension_numbers"], ranks, ())
    ragged = params["ragged_dot_dimension_numbers"]
    return _dot_equation(ragged.dot_dimension_numbers, ranks, ragged.rhs_group_dimensions)


def _dot_equation(dimension_numbers: Any, ranks: Sequence[int], group_axes: Sequence[int]) -> str:
    """Of a product: shared letters for batch and contracted axes, none kept for groups."""
    contracted, batch = dimension_numbers
    letters = itertools.chain(string.ascii_letters, itertools.repeat("?"))
    lhs = [next(letters) for _ in range(ranks[0])]
    rhs = ["" for _ in range(ranks[1])]
    for lhs_axes, rhs_axes in (contracted, batch):
        for lhs_axis, rhs_axis in zip(lhs_axes, rhs_axes, strict=True):
            rhs[rhs_axis] = lhs[lhs_axis]
    rhs = [letter or next(letters) for letter in rhs]
    out = [lhs[axis] for axis in batch[0]]
    out += [lhs[axis] for axis in range(ranks[0]) if axis not in (*contracted[0], *batch[0])]
    gone = (*contracted[1], *batch[1], *group_axes)
    out += [rhs[axis] for axis in range(ranks[1]) if axis not in gone]
    return f"{''.join(lhs)},{''.join(rhs)}->{''.join(out)}"


def _convolution_equation(dimension_numbers: Any, rank: int) -> str:
    """Of a convolution, in XLA's letters."""
    space = [str(axis) for axis in range(rank - 2)]

    def spelled(axes: Sequence[int], first: str, second: str) -> str:
        letters = dict(zip(axes, (first, second, *space), strict=True))
        return "".join(letters[axis] for axis in range(rank))

    lhs = spelled(dimension_numbers.lhs_spec, "b", "f")
    rhs = spelled(dimension_numbers.rhs_spec, "o", "i")
    return f"{lhs},{rhs}->{spelled(dimension_numbers.out_spec, 'b', 'f')}"


def _source(eqn: Any, libraries: tuple[str, ...]) -> str:
    """The innermost line of code outside these libraries, or ""."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not frame.file_name.startswith((*map(_folder, libraries), "<@")):
            return f"{_short(frame.file_name)}:{frame.line_num} ({frame.function_name})"
    return ""


@functools.cache
def _folder(library: str) -> str:
    """Where a library's own files lie."""
    spec = importlib.util.find_spec(library)
    return f"{Path(spec.origin).parent}/" if spec is not None and spec.origin else "<none>"


def _short(file_name: str) -> str:
    """A path from the working directory or the installed packages on, another by its name alone."""
    path = Path(file_name)
    for folder in (Path(_folder("flax")).parent, Path.cwd()):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return path.name


def _without_brackets(text: str) -> str:
    return text.replace("[", "(").replace("]", ")")


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
