"""Which parameters a model multiplies with activations, and how: read from its traced graph.

Where an operand of a product is a parameter, possibly cast, reshaped, transposed or sliced from a
stack of layers, its axes can be followed from the parameter to the product. So contraction axes
are known without asking which library a layer is from or guessing from a shape.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np

from qat.ptq.graph import Graph, Node, Operation

_SAME = ("convert_element_type", "copy", "sharding_constraint", "optimization_barrier")
_LOOPS = ("while", "scan", "cond", "shard_map")


@dataclasses.dataclass(frozen=True)
class Layout:
    """An array that holds the numbers of a parameter.

    Attributes:
        argument: position of the parameter among the graph's arguments.
        index: of slices taken along leading axes.
        dims: for each axis of the array, the axes of the parameter that it runs over, in order;
            axes of length 1 are in none.
    """

    argument: int
    index: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Use:
    """A product of a weight.

    Attributes:
        inputs: node of the activations.
        inputs_axes: their batch and their contracted axes, in the order of the weight's.
        operand: node of the weight as it is multiplied.
        layout: of the operand.
        batch: axes of the parameter that both operands share.
        contracted: axes of the parameter that are contracted.
    """

    inputs: Node
    inputs_axes: tuple[tuple[int, ...], tuple[int, ...]]
    operand: Node
    layout: Layout
    batch: tuple[int, ...]
    contracted: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter, or one layer's slice of it, that is multiplied with activations.

    Attributes:
        argument: position of the parameter among the graph's arguments.
        index: of the slice along leading axes.
        shape: of the whole parameter.
        batch: axes of the parameter that both operands share, such as experts.
        contracted: axes that are contracted with the inputs.
        uses: the products, in the order in which they run.
    """

    argument: int
    index: tuple[int, ...]
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    contracted: tuple[int, ...]
    uses: tuple[Use, ...]

    @property
    def stacked(self) -> int:
        """How many leading axes are a stack of weights."""
        return len(self.index) + len(self.batch)

    @property
    def matrix_axes(self) -> tuple[int, ...]:
        """Contracted axes of one weight, without the stack."""
        return tuple(axis - self.stacked for axis in self.contracted)

    def objection(self) -> str | None:
        """Why it cannot be quantized as matrices, if it cannot."""
        if any((use.batch, use.contracted) != self._first for use in self.uses):
            return "its products contract other axes of it"
        leading = len(self.index)
        if self.batch != tuple(range(leading, leading + len(self.batch))):
            return "its batch axes do not lead"
        return None

    def matrices(self, parameter: jax.Array) -> jax.Array:
        """The weight as (E, K, N): batch, contracted and other axes; `parameter` is the whole."""
        w = parameter[self.index].transpose(self._order())
        return w.reshape(self.matrices_shape())

    def matrices_shape(self) -> tuple[int, int, int]:
        """Shape (E, K, N)."""
        batch, contracted = (math.prod(self.shape[a] for a in axes) for axes in self._groups()[:2])
        kept = math.prod(self.shape[len(self.index) :]) // (batch * contracted)
        return batch, contracted, kept

    def beside(self, features: jax.Array) -> jax.Array:
        """Features (*stack, K) in a shape that broadcasts against the whole parameter."""
        stack, order = len(self.index), np.argsort(self.contracted).tolist()
        axes = [*range(stack), *(stack + position for position in order)]
        sizes = [self.shape[axis] for axis in self.contracted]
        kept = (*range(stack), *self.contracted)
        shape = [size if axis in kept else 1 for axis, size in enumerate(self.shape)]
        return features.reshape(*features.shape[:stack], *sizes).transpose(axes).reshape(shape)

    def parameter_slice(self, matrices_EKN: jax.Array) -> jax.Array:
        """The inverse of `matrices`: one layer's slice of the parameter."""
        order, rest = self._order(), self.shape[len(self.index) :]
        inverse = tuple(np.argsort(order).tolist())
        return matrices_EKN.reshape([rest[axis] for axis in order]).transpose(inverse)

    def operand(self, use: Use, matrices_EKN: jax.Array) -> jax.Array:
        """The weight as one product reads it, before the cast to its dtype."""
        axes = [axis - len(self.index) for dim in use.layout.dims for axis in dim]
        rest = self.shape[len(self.index) :]
        ones = [axis for axis in range(len(rest)) if axis not in axes]
        return self.parameter_slice(matrices_EKN).transpose([*axes, *ones])

    @property
    def _first(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.uses[0].batch, self.uses[0].contracted

    def _groups(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        axes = range(len(self.index), len(self.shape))
        others = tuple(a for a in axes if a not in (*self.batch, *self.contracted))
        return self.batch, self.contracted, others

    def _order(self) -> tuple[int, ...]:
        """Axes of one slice: batch, contracted, others."""
        return tuple(axis - len(self.index) for group in self._groups() for axis in group)


def find_weights(graph: Graph, parameters: range) -> tuple[list[Weight], dict[int, str]]:
    """The weights among a graph's arguments.

    Args:
        graph: of a model.
        parameters: positions of the parameters among the graph's arguments.

    Returns:
        Weights in the order in which they are first used, and, for parameters that are none, why.
    """
    layouts = {graph.arguments[p]: _whole(p, graph.shapes[graph.arguments[p]]) for p in parameters}
    uses: dict[tuple[int, tuple[int, ...]], list[Use]] = defaultdict(list)
    reasons: dict[int, str] = {}
    for operation in graph.operations:
        held = [node for node in operation.inputs if node in layouts]
        if not held:
            continue
        moved = _moved(operation, layouts, graph)
        use = _use(operation, layouts, graph) if moved is None else None
        if moved is not None:
            layouts[operation.outputs[0]] = moved
        elif use is not None:
            uses[use.layout.argument, use.layout.index].append(use)
        else:
            for node in held:
                reasons.setdefault(layouts[node].argument, _reason(operation))
    weights = [_weight(graph, found) for found in uses.values()]
    for parameter in {weight.argument for weight in weights} & reasons.keys():
        reasons[parameter] = f"also {reasons[parameter]}"
    for parameter in parameters:
        if parameter not in reasons and parameter not in {w.argument for w in weights}:
            reasons[parameter] = "not used"
    return [weight for weight in weights if weight.argument not in reasons], reasons


def _whole(argument: int, shape: jax.ShapeDtypeStruct) -> Layout:
    return Layout(argument, (), tuple((a,) if n > 1 else () for a, n in enumerate(shape.shape)))


def _moved(operation: Operation, layouts: dict[Node, Layout], graph: Graph) -> Layout | None:
    """The layout of what an operation makes of a parameter, if it only moves its numbers."""
    layout = layouts.get(operation.inputs[0])
    if layout is None or len(operation.outputs) != 1:
        return None
    dims, params = layout.dims, operation.params
    if operation.name in _SAME:
        return layout
    if operation.name == "transpose":
        return dataclasses.replace(layout, dims=tuple(dims[a] for a in params["permutation"]))
    if operation.name == "layer" and dims[0] in ((), (len(layout.index),)):
        return Layout(layout.argument, (*layout.index, params["index"]), dims[1:])
    if operation.name in ("reshape", "squeeze", "expand_dims") or (
        operation.name == "broadcast_in_dim" and _same_size(operation, graph)
    ):
        sizes = graph.shapes[graph.arguments[layout.argument]].shape
        grouped = _regrouped(dims, sizes, graph.shapes[operation.outputs[0]].shape)
        return None if grouped is None else dataclasses.replace(layout, dims=grouped)
    return None


def _same_size(operation: Operation, graph: Graph) -> bool:
    before, after = graph.shapes[operation.inputs[0]], graph.shapes[operation.outputs[0]]
    axes = operation.params["broadcast_dimensions"]
    return before.size == after.size and tuple(axes) == tuple(sorted(axes))


def _regrouped(
    dims: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], ...] | None:
    """Axes of a parameter, in their order, as a new shape groups them; None if it splits one."""
    axes = [axis for dim in dims for axis in dim]
    groups = []
    for length in shape:
        group: list[int] = []
        while axes and math.prod(sizes[a] for a in group) < length:
            group.append(axes.pop(0))
        if math.prod(sizes[a] for a in group) != length:
            return None
        groups.append(tuple(group))
    return tuple(groups)


def _use(operation: Operation, layouts: dict[Node, Layout], graph: Graph) -> Use | None:
    """A product of a weight with what differs between batches."""
    if operation.name != "dot_general" or len(operation.inputs) != 2:
        return None
    numbers = operation.params["dimension_numbers"]
    for own, other in ((1, 0), (0, 1)):
        operand, inputs = operation.inputs[own], operation.inputs[other]
        if operand in layouts and inputs in graph.varying:
            pairs = [sorted(zip(axes[own], axes[other], strict=True)) for axes in reversed(numbers)]
            batch, contracted = (tuple(a for _, a in group) for group in pairs)
            of_weight = [_axes([a for a, _ in group], layouts[operand]) for group in pairs]
            return Use(inputs, (batch, contracted), operand, layouts[operand], *of_weight)
    return None


def _axes(dims: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """The parameter's axes along dimensions of an operand."""
    return tuple(axis for dim in dims for axis in layout.dims[dim])


def _weight(graph: Graph, uses: list[Use]) -> Weight:
    first, index = uses[0], uses[0].layout.index
    shape = graph.shapes[graph.arguments[first.layout.argument]].shape
    contracted = first.contracted
    if not contracted:  # then it is an axis of length 1, which a layout does not follow
        contracted = (next(a for a in range(len(index), len(shape)) if shape[a] == 1),)
    return Weight(first.layout.argument, index, shape, first.batch, contracted, tuple(uses))


def _reason(operation: Operation) -> str:
    """Why a parameter that meets this operation is no weight."""
    if operation.name in _LOOPS:
        return f"used in a {operation.name} of the program, into which no calibration looks"
    return f"used by {operation.name}, which is no product with activations"
