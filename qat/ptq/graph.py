"""A traced function as one flat graph of operations.

Calls are inlined and scans over layers unrolled, until what is left is a list of operations on
numbered values, in which the inputs and weights of every layer have a number, whoever wrote the
model. Every iteration of a scan holds the same equations, by which compiled programs are shared.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

Node = int  # a value of the graph
_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2")
_CUSTOM_CALLS = ("custom_jvp_call", "custom_vjp_call")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One step of the graph.

    Attributes:
        name: of the primitive; "layer" takes one slice of a scanned array, "stack" is the inverse.
        run: values → values; it is compiled, and stands for itself in the cache of programs.
        inputs: what it reads.
        outputs: what it makes.
        params: of the primitive.
        scope: name stack of where it was traced.
    """

    name: str
    run: Callable[..., Sequence[Any]]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    params: dict[str, Any]
    scope: str = ""


@dataclasses.dataclass
class Graph:
    """All operations of a function, in an order in which they can run.

    Attributes:
        operations: the steps.
        arguments: nodes of the function's flat arguments.
        results: nodes of its flat results.
        constants: values known beforehand, by node.
        shapes: shape and dtype of every node.
        varying: nodes that differ between batches.
        programs: compiled pieces, shared by all evaluations.
    """

    operations: list[Operation]
    arguments: tuple[Node, ...]
    results: tuple[Node, ...]
    constants: dict[Node, Any]
    shapes: list[jax.ShapeDtypeStruct]
    varying: set[Node]
    programs: dict[Hashable, Callable[..., Any]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def maker(self) -> dict[Node, int]:
        """Position of the operation that makes a node."""
        return {node: i for i, op in enumerate(self.operations) for node in op.outputs}

    def ancestors(self, nodes: Iterable[Node], known: Iterable[Node] = ()) -> list[int]:
        """Positions of the operations that must run for `nodes`, given what is known."""
        known, waiting, positions = set(known), list(nodes), set()
        while waiting:
            node = waiting.pop()
            position = self.maker.get(node)
            if node in known or position is None or position in positions:
                continue
            positions.add(position)
            waiting.extend(self.operations[position].inputs)
        return sorted(positions)


def trace(function: Callable[..., Any], fixed: Any, batch: Any) -> Graph:
    """The graph of ``function(fixed, batch)``.

    Args:
        function: of two pytrees of arrays.
        fixed: what all batches share, arrays or their shapes; the first arguments of the graph.
        batch: what differs between them.
    """
    closed = jax.make_jaxpr(function)(fixed, batch)
    shared = len(jax.tree.leaves(fixed))
    builder = _Builder()
    arguments = tuple(
        builder.node(var.aval, i >= shared) for i, var in enumerate(closed.jaxpr.invars)
    )
    results = builder.inline(closed.jaxpr, builder.held(closed.consts), arguments, "")
    return Graph(
        builder.operations,
        arguments,
        tuple(results),
        builder.constants,
        builder.shapes,
        builder.varying,
    )


class _Builder:
    """Collects the operations of nested jaxprs."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.constants: dict[Node, Any] = {}
        self.shapes: list[jax.ShapeDtypeStruct] = []
        self.varying: set[Node] = set()
        self._runs: dict[int, Callable[..., Any]] = {}  # a scan's equations are added many times

    def node(self, aval: Any, varies: bool) -> Node:
        """A new node."""
        self.shapes.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        if varies:
            self.varying.add(len(self.shapes) - 1)
        return len(self.shapes) - 1

    def held(self, values: Iterable[Any]) -> tuple[Node, ...]:
        """Nodes of known values."""
        nodes = []
        for value in values:
            nodes.append(self.node(jax.typeof(value), False))
            self.constants[nodes[-1]] = value
        return tuple(nodes)

    def step(
        self,
        name: str,
        run: Callable[..., Any],
        inputs: tuple[Node, ...],
        avals: Iterable[Any],
        params: dict[str, Any],
        scope: str,
    ) -> tuple[Node, ...]:
        """Adds an operation; returns the nodes of its outputs."""
        varies = not self.varying.isdisjoint(inputs)
        outputs = tuple(self.node(aval, varies) for aval in avals)
        self.operations.append(Operation(name, run, inputs, outputs, params, scope))
        return outputs

    def inline(
        self, jaxpr: Any, consts: Sequence[Node], arguments: Sequence[Node], scope: str
    ) -> list[Node]:
        """Adds the operations of a jaxpr; returns the nodes of its results."""
        nodes: dict[Any, Node] = dict(zip(jaxpr.constvars, consts, strict=True))
        nodes.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Node:
            return self.held([atom.val])[0] if isinstance(atom, core.Literal) else nodes[atom]

        names = jaxpr.debug_info.with_unknown_names()
        for eqn in jaxpr.eqns:
            where = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))
            nodes.update(zip(eqn.outvars, self._add(eqn, read, where, names), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _add(self, eqn: Any, read: Callable[[Any], Node], scope: str, names: Any) -> Sequence[Node]:
        """Adds one equation, or what it calls."""
        name, params = eqn.primitive.name, eqn.params
        if name == "scan" and self._is_a_stack(params, arguments := [*map(read, eqn.invars)]):
            return self._unroll(params, arguments, scope)
        if name in _CALLS or name in _CUSTOM_CALLS:
            called = params["call_jaxpr" if name in _CUSTOM_CALLS else "jaxpr"]
            consts = self.held(getattr(called, "consts", ()))
            arguments = [read(atom) for atom in eqn.invars]
            return self.inline(getattr(called, "jaxpr", called), consts, arguments, scope)
        inputs = tuple(read(x) for x in eqn.invars if not isinstance(x, core.Literal))
        run = self._runs.setdefault(id(eqn), _alone(eqn, names))
        avals = [var.aval for var in eqn.outvars]
        return self.step(name, run, inputs, avals, params, scope)

    def _is_a_stack(self, params: dict[str, Any], inputs: list[Node]) -> bool:
        """Whether a scan runs through layers, with arrays of their own, and not through time."""
        scanned = inputs[params["num_consts"] + params["num_carry"] :]
        own = any(node not in self.varying and self.shapes[node].ndim > 1 for node in scanned)
        return own and params["length"] > 0

    def _unroll(self, params: dict[str, Any], inputs: list[Node], scope: str) -> list[Node]:
        """Adds every iteration of a scan."""
        consts, carried = params["num_consts"], params["num_carry"]
        body, length = params["jaxpr"], params["length"]
        held = self.held(body.consts)
        carry, scanned = inputs[consts : consts + carried], inputs[consts + carried :]
        made: list[Sequence[Node]] = [()] * length
        for i in reversed(range(length)) if params["reverse"] else range(length):
            layers = [self._layer(node, i, scope) for node in scanned]
            arguments = [*inputs[:consts], *carry, *layers]
            results = self.inline(body.jaxpr, held, arguments, scope)
            carry, made[i] = results[:carried], results[carried:]
        return [*carry, *(self._stack(nodes, scope) for nodes in zip(*made, strict=True))]

    def _layer(self, node: Node, index: int, scope: str) -> Node:
        """One slice of a scanned array; the index is data, so that all share one program."""
        shape = self.shapes[node]
        (position,) = self.held([jnp.int32(index)])
        aval = jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype)
        params = {"index": index}
        (output,) = self.step("layer", _take, (node, position), [aval], params, scope)
        return output

    def _stack(self, nodes: Sequence[Node], scope: str) -> Node:
        shape = self.shapes[nodes[0]]
        aval = jax.ShapeDtypeStruct((len(nodes), *shape.shape), shape.dtype)
        (output,) = self.step("stack", _join, tuple(nodes), [aval], {}, scope)
        return output


def _alone(eqn: Any, names: Any) -> Callable[..., Sequence[Any]]:
    """A function of an equation's variables; its literals are part of it."""
    variables = [x for x in eqn.invars if not isinstance(x, core.Literal)]
    jaxpr = core.Jaxpr((), variables, eqn.outvars, [eqn], eqn.effects, names)
    function: Callable[..., Sequence[Any]] = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))
    return function


def _take(x: Any, index: Any) -> Sequence[Any]:
    return [jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)]


def _join(*xs: Any) -> Sequence[Any]:
    return [jnp.stack(xs)]
