"""HQQ: the scales of a weight for which few errors are large, without data.

Half-quadratic quantization (Badri and Shaji, 2023): the error that a group is judged by is
Σ|w - ŵ|^0.7, which forgives outliers. Each iteration sets them aside by the norm's shrinkage, and
solves for a parameter of the grid in closed form, by least squares over the rest.

We depart from the publication in four ways.

* It solves for a real zero point. Ours are integers, so that zero stays exact: the better of the
  two integers beside the solution is taken. A whole code shifts the range and nothing else; what
  the fraction was good for is found in the scale.
* It leaves the scale as it is; we solve for that as well, s = Σ v(w - e) / Σ v² for values v and
  outliers e. That is the same step for the other parameter of the same affine map, and the only
  one that symmetric formats have. Scales are rounded to what their format can hold.
* Shrinkage is measured in steps of the group and not in units of the weight, so that scaling a
  weight scales its result. At first an error of one step is an outlier, at last one of a quarter.
* Iterations may go astray, so each group keeps the best that it has seen; the first is that of
  rounding to nearest, and no group ends up worse.

Shapes: K inputs, N outputs, G groups (in their compact shape).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.groups import Groups, groups_of
from qat.ptq.rtn import dequantized, prepared, spread
from qat.quantizer import Quantizer
from qat.scales import Scale, formatted, rounded, scale_for

_NORM = 0.7
_ITERATIONS = 20
_BETA, _ANNEALING = 1.0, 1.1  # weight of the quadratic half, and its growth an iteration


def round_hqq(
    weight_KN: Float[Array, "K N"], quantizer: Quantizer
) -> tuple[Float[Array, "K N"], Scale]:
    """Rounds a weight to the nearest values of the grid whose scales suit it best.

    Args:
        weight_KN: floating-point.
        quantizer: its format may be traced; its scale method says where the search starts.

    Returns:
        As `round_to_nearest`.

    Raises:
        ValueError: as `round_to_nearest`.
    """
    result: tuple[Array, Scale] = _rounded(weight_KN, prepared(quantizer))
    return result


@jax.jit
def _rounded(weight_KN: Array, quantizer: Quantizer) -> tuple[Array, Scale]:
    groups = groups_of(weight_KN, quantizer, 0)
    first = scale_for(weight_KN, quantizer, 0)
    weight_KN = weight_KN.astype(jnp.float32)

    def iterate(i: Array, state: tuple[Scale, Scale, Array]) -> tuple[Scale, Scale, Array]:
        current, best, least_G = state
        beta = _BETA * _ANNEALING ** i.astype(jnp.float32)
        current, error_G = _improved(weight_KN, current, beta, quantizer, groups)
        better_G = error_G < least_G
        return current, _chosen(better_G, current, best), jnp.where(better_G, error_G, least_G)

    start = (first, first, _error(weight_KN, first, quantizer, groups))
    _, best, _ = jax.lax.fori_loop(0, _ITERATIONS, iterate, start)
    return rounded(weight_KN, spread(best, weight_KN.shape), quantizer.grid)[1], best


def _improved(
    weight_KN: Array, current: Scale, beta: Array, quantizer: Quantizer, groups: Groups
) -> tuple[Scale, Array]:
    """Another scale and zero point for every group, and their errors."""
    scale_KN = spread(current, weight_KN.shape)
    exact_KN, values_KN = rounded(weight_KN, scale_KN, quantizer.grid)
    target_KN = exact_KN - _shrunk(exact_KN - values_KN, beta)
    scale = _rescaled(current, values_KN, target_KN, quantizer, groups)
    if current.zero_point is None:
        return scale, _error(weight_KN, scale, quantizer, groups)
    mean_G = _sums(values_KN - target_KN, groups) / _sums(jnp.ones_like(values_KN), groups)
    below_G = current.zero_point + jnp.floor(mean_G)
    low, high = (_shifted(scale, below_G + up, quantizer) for up in (0, 1))
    low_G, high_G = (_error(weight_KN, side, quantizer, groups) for side in (low, high))
    return _chosen(low_G < high_G, low, high), jnp.minimum(low_G, high_G)


def _rescaled(
    current: Scale, values_KN: Array, target_KN: Array, quantizer: Quantizer, groups: Groups
) -> Scale:
    """The scale of least squares from values to targets, where there is one."""
    ratio_G = _sums(values_KN * target_KN, groups) / _sums(jnp.square(values_KN), groups)
    possible_G = (ratio_G > 0) & (ratio_G < jnp.inf) & quantizer.grid.scaled
    largest_G = current.applied * ratio_G * quantizer.grid.max_value
    scale = formatted(largest_G, quantizer, current.tensor_scale).scale
    return dataclasses.replace(current, scale=jnp.where(possible_G, scale, current.scale))


def _shifted(scale: Scale, zero_point_G: Array, quantizer: Quantizer) -> Scale:
    """With another zero point: a code of the grid; none where the format has no scale."""
    grid = quantizer.grid
    code_G = jnp.clip(zero_point_G, grid.min_value, grid.max_value)
    return dataclasses.replace(scale, zero_point=jnp.where(grid.scaled, code_G, 0))


def _shrunk(error_KN: Array, beta: Array) -> Array:
    """The outliers among errors: the proximal step of the norm, as its authors approximate it."""
    magnitude_KN = jnp.abs(error_KN)
    kept_KN = jnp.maximum(magnitude_KN - magnitude_KN ** (_NORM - 1) / beta, 0)
    return jnp.sign(error_KN) * kept_KN


def _error(weight_KN: Array, scale: Scale, quantizer: Quantizer, groups: Groups) -> Array:
    """Σ|w - ŵ|^p of every group."""
    _, values_KN = rounded(weight_KN, spread(scale, weight_KN.shape), quantizer.grid)
    return _sums(jnp.abs(weight_KN - dequantized(values_KN, scale)) ** _NORM, groups)


def _sums(x_KN: Array, groups: Groups) -> Array:
    """Of every group, in the shape of compact scales."""
    return jnp.sum(groups.split(x_KN), axis=groups.reduced).reshape(groups.compact_shape)


def _chosen(first_G: Array, yes: Scale, no: Scale) -> Scale:
    """One of two scales for every group; a scale of the whole tensor is the same in both."""
    scale_G = jnp.where(first_G, yes.scale, no.scale)
    if yes.zero_point is None or no.zero_point is None:
        return Scale(scale_G, yes.tensor_scale)
    return Scale(scale_G, None, jnp.where(first_G, yes.zero_point, no.zero_point))
