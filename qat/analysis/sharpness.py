"""How a loss bends around trained parameters, and what a change of them costs by that.

Where parameters θ become θ + Δ, as when weights are rounded, the loss grows by gᵀΔ + ½ ΔᵀHΔ and
what is beyond second order: g is the gradient, H the Hessian of the mean loss. `expand` measures
all three; `trace` and `extremes` tell of H itself: the sum of its eigenvalues, which decides what
changes of no particular direction cost, and the largest and smallest of them.

H is never made. Its product with a vector is the forward derivative of the gradient (Pearlmutter
1994), at about three gradients' time. Functions with a reverse rule of their own, as those of norms
and attention in many models, have no forward derivative; but the gradient is taken first and leaves
nothing of them but the operations of their rules, which have one. Reverse over reverse gives the
same and takes a quarter longer. One compiled program serves all: value, gradient, slope and
product, for every vector, and for every model of one shape whose `loss` is a pytree with the same
structure.

A straight-through gradient is not the derivative of the loss that it is said to be of, so its
derivative is no Hessian: losses must not quantize.

Products are float32, everything beside them float64 on the host. Errors are over batches, so they
should be of one size and drawn at random.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from qat.analysis.lanczos import ritz
from qat.analysis.paired import mean_and_standard_error
from qat.spelling import expected_instead

# Arrays end in their axes: N parameters, K eigenvalues, B batches, P probes, L leaves.
Floats = NDArray[np.float64]
Params = Any  # pytree of float32 arrays
Batch = Any  # pytree of arrays
Loss = Callable[[Params, Batch], Array]  # a mean, nats; a function, or a pytree that can be called

_SETTLED = 3  # products after which no nearer eigenvalue has come between


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, which is NaN where there was one value alone."""

    mean: float
    se: float

    @classmethod
    def of(cls, values: Sequence[float] | Floats) -> "Estimate":
        """That of independent values."""
        return cls(*mean_and_standard_error(np.asarray(values, np.float64)))


@dataclasses.dataclass(frozen=True)
class Expansion:
    """What a change Δ of the parameters costs, nats, over the same batches.

    Attributes:
        change: the loss after it minus that before.
        linear: gᵀΔ.
        quadratic: ½ ΔᵀHΔ.
        remaining: what the first is beyond the other two, paired by batch.
        squared_norm: ΔᵀΔ.
        blocks: ½ Δ_lᵀ H_ll Δ_l by name of leaf l, as if it alone were changed; empty unless asked.
    """

    change: Estimate
    linear: Estimate
    quadratic: Estimate
    remaining: Estimate
    squared_norm: float
    blocks: Mapping[str, Estimate]


@dataclasses.dataclass(frozen=True)
class Slope:
    """The gradient of the mean loss.

    Attributes:
        norm: Euclidean.
        noise: the norm that would be expected of it by the choice of batches alone, were the
            gradient of all text 0; NaN of one batch.
    """

    norm: float
    noise: float


@dataclasses.dataclass(frozen=True)
class Trace:
    """Sum of the Hessian's eigenvalues.

    Attributes:
        whole: of all parameters.
        leaves: of the diagonal block of each leaf, by name; they add up to the whole.
    """

    whole: Estimate
    leaves: Mapping[str, Estimate]


@dataclasses.dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue of the Hessian.

    Attributes:
        value: as estimated.
        bound: an eigenvalue is no farther from it than this, but for errors of float32.
        converged: whether that is within the tolerance.
    """

    value: float
    bound: float
    converged: bool


@dataclasses.dataclass(frozen=True)
class Extremes:
    """Eigenvalues of the Hessian at both ends.

    Attributes:
        largest: descending.
        smallest: ascending; below 0 where the loss bends down.
        products: with the Hessian that it took.
    """

    largest: tuple[Eigenvalue, ...]
    smallest: tuple[Eigenvalue, ...]
    products: int


def names(params: Params) -> list[str]:
    """Paths of all leaves, in order, their parts joined by slashes."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def restrict(
    loss: Loss, params: Params, chosen: Callable[[str], bool]
) -> tuple[Loss, dict[str, Array]]:
    """The loss as a function of some of the parameters, and these by name.

    Args:
        loss: (parameters, batch) → nats.
        params: of which those that are not chosen stay as they are.
        chosen: whether a leaf of this name is.

    Raises:
        ValueError: no leaf is.
    """
    leaves, structure = jax.tree.flatten(params)
    by_name = dict(zip(names(params), leaves, strict=True))
    kept = {name: leaf for name, leaf in by_name.items() if chosen(name)}
    if not kept:
        raise ValueError(expected_instead("restriction", "a leaf at least", list(by_name)))
    others = {name: leaf for name, leaf in by_name.items() if name not in kept}
    return _Restricted(_as_pytree(loss), others, tuple(by_name), structure), kept


def product(loss: Loss, params: Params, batches: Sequence[Batch], vector: Params) -> Params:
    """The Hessian of the mean loss over batches, times a vector.

    Args:
        loss: (parameters, batch) → nats.
        params: where.
        batches: of one shape.
        vector: of the structure of `params`.

    Returns:
        Of the structure of `params`, float64 NumPy arrays.
    """
    return _tree(_product(_as_pytree(loss), params, batches, vector), params)


def slope(loss: Loss, params: Params, batches: Sequence[Batch]) -> Slope:
    """The norm of the gradient of the mean loss; arguments as of `product`."""
    nowhere = jax.tree.map(jnp.zeros_like, params)  # which spares compiling the gradient alone
    loss, total_N, squares = _as_pytree(loss), np.zeros(_size(params)), 0.0
    for batch in batches:
        gradient_N = _flat(_along(loss, params, batch, nowhere)[1])
        total_N += gradient_N
        squares += float(gradient_N @ gradient_N)
    count = len(batches)
    squared = float(total_N @ total_N) / count**2
    freedom = count * (count - 1) or np.nan
    return Slope(squared**0.5, float(np.sqrt(max(squares - count * squared, 0.0) / freedom)))


def expand(
    loss: Loss, params: Params, change: Params, batches: Sequence[Batch], *, blocks: bool = False
) -> Expansion:
    """Expands the loss to second order along a change of the parameters.

    Args:
        loss: (parameters, batch) → nats.
        params: before the change.
        change: Δ, of the structure of `params`.
        batches: of one shape.
        blocks: whether to look at each leaf alone too, at the cost of one more product for each.
    """
    loss, change_N = _as_pytree(loss), _flat(change)
    moved = jax.tree.map(lambda x, dx: (x + dx).astype(x.dtype), params, change)
    parts = dict(_parts(change)) if blocks else {}

    def curved(batch: Batch, vector: Params) -> tuple[float, float, float]:
        """The loss, its slope along the vector, and half its second derivative."""
        before, _, steepness, along = _along(loss, params, batch, vector)
        return float(before), float(steepness), float(_flat(vector) @ _flat(along)) / 2

    here = [curved(batch, change) for batch in batches]
    before_B, linear_B, quadratic_B = np.array(here).T
    change_B = np.array([float(_value(loss, moved, batch)) for batch in batches]) - before_B
    return Expansion(
        Estimate.of(change_B),
        Estimate.of(linear_B),
        Estimate.of(quadratic_B),
        Estimate.of(change_B - linear_B - quadratic_B),
        float(change_N @ change_N),
        {n: Estimate.of([curved(each, part)[2] for each in batches]) for n, part in parts.items()},
    )


def trace(
    loss: Loss, params: Params, batches: Sequence[Batch], key: Array, probes: int = 32
) -> Trace:
    """The trace of the Hessian, by Hutchinson's estimator with random signs.

    Each probe looks at the next batch, so that the standard error is that of both, probes and text,
    for the price of one product each. (Estimators that deflate what is large first, as Hutch++,
    would need all probes on the same text, whose choice they then say nothing of.)

    Args:
        loss: (parameters, batch) → nats.
        params: where.
        batches: of one shape.
        key: of the signs.
        probes: P, products with the Hessian.

    Raises:
        ValueError: fewer than two probes, which have no standard error.
    """
    if probes < 2:
        raise ValueError(expected_instead("probes", "at least 2", probes))
    loss, leaves = _as_pytree(loss), names(params)
    parts_PL = np.zeros((probes, len(leaves)))
    for probe, one_key in enumerate(jax.random.split(key, probes)):
        signs = _signs(one_key, params)
        along = _along(loss, params, batches[probe % len(batches)], signs)[3]
        pairs = zip(jax.tree.leaves(signs), jax.tree.leaves(along), strict=True)
        parts_PL[probe] = [_flat(sign) @ _flat(x) for sign, x in pairs]
    by_leaf = dict(zip(leaves, map(Estimate.of, parts_PL.T), strict=True))
    return Trace(Estimate.of(parts_PL.sum(axis=1)), by_leaf)


def extremes(
    loss: Loss,
    params: Params,
    batches: Sequence[Batch],
    key: Array,
    *,
    largest: int = 5,
    smallest: int = 1,
    tolerance: float = 1e-2,
    products: int = 100,
) -> Extremes:
    """The largest and smallest eigenvalues of the Hessian, by Lanczos' method.

    It ends when all that are asked for have converged, each with a bound of at most `tolerance`
    times the largest magnitude of any, for three products in a row; or after so many products. The
    basis, which is kept orthogonal throughout, takes 8 · N · `products` bytes.

    A bound says that an eigenvalue is there, not that none was passed over: one that the start
    hardly sees may come late, and one that is there several times is found once. Where the spectrum
    has so few different values that the start's space closes, it goes on in a random direction
    outside to the last product, and finds the others.

    Args:
        loss: (parameters, batch) → nats.
        params: where.
        batches: of one shape; each product goes over all.
        key: of the random start.
        largest: how many of the largest.
        smallest: how many of the smallest.
        tolerance: see above.
        products: at most; of all batches.

    Raises:
        ValueError: a number is out of range.
    """
    size = _size(params)
    if not 0 < largest + smallest <= min(size, products) or min(largest, smallest) < 0:
        raise ValueError(
            f"largest = {largest}, smallest = {smallest}: expected one at least, and together no "
            f"more than the {size} parameters and {products} products"
        )
    loss, rng = _as_pytree(loss), np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def apply(vector_N: Floats) -> Floats:
        return _product(loss, params, batches, _tree(vector_N, params))

    settled = 0
    for values_K, bounds_K in ritz(apply, rng, size, min(products, size)):
        within_K = bounds_K <= tolerance * np.abs(values_K).max()
        pairs = zip(values_K.tolist(), bounds_K.tolist(), within_K.tolist(), strict=True)
        found = tuple(Eigenvalue(*each) for each in pairs)
        asked = Extremes(found[::-1][:largest], found[:smallest], len(found))
        enough = len(found) >= largest + smallest
        all_within = all(each.converged for each in (*asked.largest, *asked.smallest))
        settled = settled + 1 if enough and all_within else 0
        if settled == _SETTLED:
            break
    return asked


@jax.jit
def _along(loss: Loss, params: Params, batch: Batch, vector: Params) -> tuple[Any, ...]:
    """Value, gradient, slope along the vector, and the Hessian times it."""
    vector = jax.tree.map(lambda x, dx: jnp.asarray(dx, x.dtype), params, vector)
    value_and_grad = jax.value_and_grad(lambda params: loss(params, batch))
    (value, gradient), (steepness, along) = jax.jvp(value_and_grad, (params,), (vector,))
    return value, gradient, steepness, along


@jax.jit
def _value(loss: Loss, params: Params, batch: Batch) -> Array:
    return loss(params, batch)


def _product(loss: Loss, params: Params, batches: Sequence[Batch], vector: Params) -> Floats:
    total_N = np.zeros(_size(params))
    for batch in batches:
        total_N += _flat(_along(loss, params, batch, vector)[3])
    return total_N / len(batches)


def _signs(key: Array, params: Params) -> Params:
    """Random signs of the structure of the parameters."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, signs)


def _parts(change: Params) -> Iterator[tuple[str, Params]]:
    """The change of each leaf alone, by its name."""
    leaves, structure = jax.tree.flatten(change)
    for index, name in enumerate(names(change)):
        alone = [x if i == index else jnp.zeros_like(x) for i, x in enumerate(leaves)]
        yield name, jax.tree.unflatten(structure, alone)


def _size(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _flat(tree: Params) -> Floats:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def _tree(vector_N: Floats, params: Params) -> Params:
    """A flat vector in the structure of the parameters."""
    leaves, structure = jax.tree.flatten(params)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = zip(np.split(vector_N, ends), leaves, strict=True)
    return jax.tree.unflatten(structure, [part.reshape(x.shape) for part, x in parts])


def _as_pytree(loss: Loss) -> Loss:
    """So that compiled functions can take it: as it is, or a function as structure."""
    leaves = jax.tree.leaves(loss)
    return jax.tree_util.Partial(loss) if len(leaves) == 1 and leaves[0] is loss else loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Restricted:
    """See `restrict`.

    Attributes:
        loss: of all parameters.
        others: those that stay, by name.
        names: of all, in order.
        structure: of all.
    """

    loss: Any
    others: dict[str, Array]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, chosen: Mapping[str, Array], batch: Batch) -> Array:
        leaves = {**self.others, **chosen}
        params = jax.tree.unflatten(self.structure, [leaves[name] for name in self.names])
        value: Array = self.loss(params, batch)
        return value
