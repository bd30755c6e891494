"""The text of a compiled program, and how often each of its parts runs.

XLA's optimized HLO is a list of computations, one of which is the entry; loops, calls and fusions
name the computations they run. The text states most of what counting needs but the turns of loops,
which some compilers leave to be found: the constant that a loop's condition compares its counter
with, where the counter starts, and what a turn adds to it.

Both sides of a conditional are counted as if they ran.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLEES = re.compile(
    r"(?:calls|body|true_computation|false_computation)=%?([\w.-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_INTEGERS = ("s32[]", "u32[]", "s64[]", "u64[]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = type opcode(operands), attributes`.

    Attributes:
        name: unique in its computation.
        type: such as "bf16[8,16]{1,0}", or a tuple of such.
        opcode: such as "dot".
        operands: names.
        attributes: all that follows; of a constant, its value.
        root: whether it is its computation's result.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
        entry: name of the computation that a run starts with.
        computations: by name.
        partitions: devices it runs on.
    """

    entry: str
    computations: Mapping[str, Computation]
    partitions: int


def parse(text: str) -> Module:
    """Reads a module.

    Args:
        text: as `jax.stages.Compiled.as_text` gives it.

    Raises:
        ValueError: the text is not that of an HLO module.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry: str | None = None
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (start := _INSTRUCTION.match(line)):
            current[start[2]] = _instruction(start[2], line[start.end() :], bool(start[1]))
    if entry is None:
        raise ValueError(f"expected the text of an HLO module with an ENTRY, got {text[:60]!r}")
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Module(entry, computations, int(partitions[1]) if partitions else 1)


def count_runs(module: Module) -> tuple[Mapping[str, int], tuple[str, ...]]:
    """How often each computation runs in one run of the program.

    Returns:
        Runs by name of the computation, without those that never run; and the names of loops
        whose turns cannot be found, taken to be one.
    """
    runs: collections.Counter[str] = collections.Counter()
    unknown: list[str] = []

    def visit(name: str, times: int) -> None:
        runs[name] += times
        computation = module.computations[name]
        for instruction in computation.values():
            turns: int | None = 1
            if instruction.opcode == "while":
                turns = _turns(instruction, computation, module)
                if turns is None:
                    unknown.append(instruction.name)
            for callee in _callees(instruction):
                visit(callee, times * (1 if turns is None else turns))

    visit(module.entry, 1)
    return runs, tuple(dict.fromkeys(unknown))


def shape_of(type: str) -> tuple[str, tuple[int, ...]]:
    """Dtype and sizes of an array's type."""
    match = _SHAPE.match(type)
    assert match is not None, type
    return match[1], tuple(int(size) for size in match[2].split(",") if size)


def nbytes(type: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    sizes = (
        math.prod(int(size) for size in dims.split(",") if size) * bits(dtype)
        for dtype, dims in _SHAPE.findall(type)
    )
    return sum(sizes) // 8


def bits(dtype: str) -> int:
    """Width of an HLO dtype, such as 16 of "bf16"."""
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 8  # pred


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    """Splits what follows the equals sign."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    operands = re.findall(r"%([\w.-]+)", rest[opening:closing])
    opcode, attributes = rest[end:opening].strip(), rest[closing:]
    if opcode == "constant":
        attributes = rest[opening + 1 : closing - 1]
    return Instruction(name, rest[:end], opcode, tuple(operands), attributes, root)


def _closing(text: str, opening: int) -> int:
    """Position after the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _callees(instruction: Instruction) -> Iterator[str]:
    """What an instruction runs, but for the conditions of loops and scalar reducers."""
    if instruction.opcode.endswith(("-done", "-update")):
        return  # they name what their -start runs
    if instruction.opcode == "call":
        yield from re.findall(r"to_apply=%?([\w.-]+)", instruction.attributes)
    for one, several in _CALLEES.findall(instruction.attributes):
        yield from [one] if one else re.findall(r"[\w.-]+", several)


def _turns(loop: Instruction, around: Computation, module: Module) -> int | None:
    """Turns of a loop: stated, or those of a counter that goes from start to limit by a step."""
    if stated := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(stated[1])
    named = dict(re.findall(r"(condition|body)=%?([\w.-]+)", loop.attributes))
    condition, body = (module.computations[named[each]] for each in ("condition", "body"))
    index = _only(
        re.findall(r"index=(\d+)", each.attributes)[0]
        for each in condition.values()
        if each.opcode == "get-tuple-element"
    )
    inside = [condition, *(module.computations[c] for i in condition.values() for c in _callees(i))]
    compares = [i for each in inside for i in each.values() if "direction=LT" in i.attributes]
    limit = _only(value for each in inside for value in _integers(each))
    if index is None or limit is None or len(compares) != 1:
        return None
    after = next(each for each in body.values() if each.root)
    before = around[loop.operands[0]]
    if {after.opcode, before.opcode} != {"tuple"}:
        return None
    start = _value(around, before.operands[int(index)])
    step = _step(body, after.operands[int(index)], module)
    return -(-(limit - start) // step) if start is not None and step else None


def _step(body: Computation, name: str, module: Module) -> int | None:
    """The constant that a turn adds to a counter."""
    added = body[name]
    if added.opcode == "fusion":
        return _only(
            v for callee in _callees(added) for v in _integers(module.computations[callee])
        )
    if added.opcode != "add":
        return None
    return _only(v for each in added.operands if (v := _value(body, each)) is not None)


def _value(computation: Computation, name: str) -> int | None:
    """The integer constant behind a name, copied or not."""
    found = computation[name]
    while found.opcode in ("copy", "bitcast"):
        found = computation[found.operands[0]]
    constant = found.opcode == "constant" and found.type.startswith(_INTEGERS)
    return int(found.attributes) if constant else None


def _integers(computation: Computation) -> Iterator[int]:
    """Its integer constants."""
    for name, instruction in computation.items():
        if instruction.opcode == "constant" and (value := _value(computation, name)) is not None:
            yield value


def _only(values: Iterator[str] | Iterator[int]) -> int | None:
    """The one value there is."""
    found = {int(value) for value in values}
    return found.pop() if len(found) == 1 else None
