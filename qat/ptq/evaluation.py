"""Values of a graph for several batches, computed on demand and forgotten when nobody waits.

Calibration that streams needs to stop in the middle of a model: compute the inputs of one layer
over all batches, change that layer, go on. Hooks into layers would tie that to one library, and
running the model anew for each layer costs the square of its depth. Here any value of the traced
model can be asked for; what was computed is kept only as long as an operation still waits for it;
and a value can be replaced before others are computed from it.

The operations between two questions are compiled together. Layers of a scan share programs, and so
do evaluations of other graphs: what a program is lowered to says whether it was compiled before,
whichever model, method or format it was for.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from qat.ptq.graph import Graph, Node, Operation

_KEPT = 256  # compiled programs; those not used for longest are forgotten

_Program = Callable[[Sequence[Any]], list[Any]]
_Plan = tuple[tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]], ...]


class Evaluation:
    """Values of a graph for several batches of its inputs, computed when asked for.

    Args:
        graph: what to evaluate.
        fixed: arguments that all batches share, by node.
        batches: the other arguments, a dictionary for each batch.
        wanted: every node that will be asked for, again until it is released; nothing else is kept.
    """

    def __init__(
        self,
        graph: Graph,
        fixed: dict[Node, Any],
        batches: Sequence[dict[Node, Any]],
        wanted: Iterable[Node],
    ):
        self._graph = graph
        self._given = {**graph.constants, **fixed}, batches
        self._replaced: dict[Node, Any] = {}
        self._wanted = set(wanted)
        self.restart()

    def restart(self) -> None:
        """Forgets what was computed, not what was replaced: what follows is computed anew."""
        shared, batches = self._given
        self._shared = {**shared, **self._replaced}
        self._batches = [dict(batch) for batch in batches]
        self._readers = dict.fromkeys(range(len(self._graph.shapes)), 0)
        known = {*self._shared, *(self._batches[0] if self._batches else ())}
        self._waiting = set(self._graph.ancestors(self._wanted, known))
        for position in self._waiting:
            for node in self._graph.operations[position].inputs:
                self._readers[node] += 1
        for node in self._wanted:
            self._readers[node] += 1

    def replace(self, node: Node, value: Any) -> None:
        """Sets a value that all batches share, before or after it would be computed."""
        self._replaced[node] = self._shared[node] = value

    def values(self, node: Node) -> Iterator[Any]:
        """The value of a node for every batch in turn, all of which must be taken."""
        shared, varying = self._pending(node)
        self._run(shared, [self._shared])
        for batch in self._batches:
            self._run(varying, [batch])
            yield batch[node] if node in self._graph.varying else self._shared[node]
        self._done([*shared, *varying])

    def release(self, node: Node) -> None:
        """Says that a wanted node will not be asked for again."""
        self._wanted.remove(node)
        self._forget(node)

    def _pending(self, node: Node) -> tuple[list[int], list[int]]:
        """Operations still to run for a node: those that all batches share, and the others."""
        known = {*self._shared, *(self._batches[0] if self._batches else ())}
        positions, varying = self._graph.ancestors([node], known), self._graph.varying
        parts: tuple[list[int], list[int]] = [], []
        for position in positions:
            parts[not varying.isdisjoint(self._graph.operations[position].outputs)].append(position)
        return parts

    def _run(self, positions: list[int], places: list[dict[Node, Any]]) -> None:
        """Runs operations as one program, and stores what somebody still waits for."""
        if not positions:
            return
        steps = [self._graph.operations[p] for p in positions]
        made = set(itertools.chain.from_iterable(step.outputs for step in steps))
        read = dict.fromkeys(itertools.chain.from_iterable(step.inputs for step in steps))
        inputs = [node for node in read if node not in made]
        within = dict.fromkeys(made, 0)
        for step in steps:
            for node in step.inputs:
                if node in within:
                    within[node] += 1
        outputs = sorted(node for node in made if self._readers[node] > within[node])
        for place in places:
            values = [place[n] if n in place else self._shared[n] for n in inputs]
            program = self._program(steps, inputs, outputs, values)
            place.update(zip(outputs, program(values), strict=True))

    def _program(
        self, steps: list[Operation], inputs: list[Node], outputs: list[Node], values: list[Any]
    ) -> _Program:
        """The compiled program of these steps; equal steps of other layers share it."""
        numbers: dict[Node, int] = {}
        for node in itertools.chain(inputs, *(step.outputs for step in steps)):
            numbers.setdefault(node, len(numbers))

        def numbered(nodes: Iterable[Node]) -> tuple[int, ...]:
            return tuple(numbers[node] for node in nodes)

        plan = tuple((step.run, numbered(step.inputs), numbered(step.outputs)) for step in steps)
        shapes = tuple(self._graph.shapes[node] for node in inputs)
        key = plan, shapes, numbered(outputs)
        if key not in self._graph.programs:
            self._graph.programs[key] = _shared(plan, key[2], values)
        return self._graph.programs[key]

    def _done(self, positions: list[int]) -> None:
        """Counts operations as run, and forgets what nobody waits for any more."""
        for position in positions:
            if position in self._waiting:
                self._waiting.remove(position)
                for node in self._graph.operations[position].inputs:
                    self._forget(node)

    def _forget(self, node: Node) -> None:
        """One reader less."""
        self._readers[node] -= 1
        if self._readers[node] <= 0:
            self._shared.pop(node, None)
            for batch in self._batches:
                batch.pop(node, None)


@dataclasses.dataclass(frozen=True)
class _Lowered:
    """A program that equals others of the same text, in which its constants are too."""

    digest: bytes
    run: _Program = dataclasses.field(compare=False)


def _shared(plan: _Plan, outputs: tuple[int, ...], values: Sequence[Any]) -> _Program:
    """A program, or the equal one that there is."""
    run = functools.partial(_run_plan, plan, outputs)
    program = jax.jit(run, keep_unused=True)  # so that the text says which inputs it reads
    if getattr(jax.config, "jax_use_simplified_jaxpr_constants", False):
        return program  # of a text without constants
    text = program.lower(values).as_text()
    return _known(_Lowered(hashlib.blake2b(text.encode()).digest(), program))


@functools.lru_cache(_KEPT)
def _known(lowered: _Lowered) -> _Program:
    """Of equal programs the first."""
    return lowered.run


def _run_plan(plan: _Plan, outputs: tuple[int, ...], inputs: Sequence[Any]) -> list[Any]:
    values = dict(enumerate(inputs))
    for run, read, made in plan:
        values.update(zip(made, run(*(values[n] for n in read)), strict=True))
    return [values[n] for n in outputs]
