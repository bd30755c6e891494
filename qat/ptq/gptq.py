"""GPTQ: weights are rounded one input after another, and later ones make up for earlier errors.

Frantar et al., arXiv 2210.17323. Their recursion updates all later rows by the inverse Hessian of
the squared output error. With the Hessian as H = R D Rᵀ, R unit upper triangular, the same rows
come out without any inverse: row k is rounded after adding Σ_j R_jk (w_j - q_j) over the rows j
before it (Chee et al., arXiv 2307.13304, theorem 6). One Cholesky factorization, done from the last
row to the first, takes the place of a factorization, an inversion and another factorization.

It is done on the host in float64: Hessians of activations span as many decades as float32 has
digits, and a matrix that is not positive definite must stop the program. The rounding itself is
compiled once for all formats. It gathers errors in two levels, rows by rows within a block and by
one matrix product from all blocks before it.

Shapes: K inputs, N outputs, B rows of a block.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import NDArray

from qat.grid import AnyGrid, Leaf
from qat.ptq.rtn import prepared, spread
from qat.quantizer import Quantizer
from qat.scales import Scale, formatted, rounded, scale_for
from qat.spelling import expected_instead

_RESOLUTION = float(np.finfo(np.float32).eps)  # of the sums that make a second moment


@dataclasses.dataclass(frozen=True)
class Gptq:
    """Settings; the defaults are those of the reference implementation's best results.

    Attributes:
        damping: added to the Hessian's diagonal, as a share of its mean.
        block: rows between matrix products; changes speed, not results.
        act_order: rows with the largest inputs first.
        static_groups: block scales come from the weight as it was; otherwise from its rows as they
            are when the first of a block is reached.

    Raises:
        ValueError: a setting out of range.
    """

    damping: float = 0.01
    block: int = 128
    act_order: bool = True
    static_groups: bool = True

    def __post_init__(self) -> None:
        """Checks."""
        if not 0 <= self.damping < math.inf:
            raise ValueError(expected_instead("damping", "a finite number from 0", self.damping))
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(expected_instead("block", "an integer above 0", self.block))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Feedback:
    """How errors of earlier rows are made up for; shared by all weights with the same inputs.

    Attributes:
        order_K: int32: the rows in the order in which they are rounded.
        matrix_KK: float32, strictly lower triangular, rows and columns in that order: what a row
            takes of the error of each row before it.
    """

    order_K: Leaf
    matrix_KK: Leaf


def round_gptq(
    weight_KN: Float[Array, "K N"],
    quantizer: Quantizer,
    second_moment_KK: Float[Array, "K K"],
    settings: Gptq | None = None,
) -> tuple[Float[Array, "K N"], Scale]:
    """Rounds a weight for the least squared error of its outputs; not inside `jax.jit`.

    Args:
        weight_KN: floating-point.
        quantizer: any; its format may be traced.
        second_moment_KK: of the inputs, see `Statistics`, in any unit.
        settings: None is `Gptq()`.

    Returns:
        As `round_to_nearest`.

    Raises:
        ValueError: as `feedback` and `round_with_feedback`.
    """
    settings = settings or Gptq()
    return round_with_feedback(weight_KN, quantizer, feedback(second_moment_KK, settings), settings)


def feedback(second_moment_KK: Float[Array, "K K"], settings: Gptq) -> Feedback:
    """The factor of a Hessian, from float64 on the host.

    Inputs that are always zero have no error to make up for: their rows are rounded to nearest.
    On the diagonal the mean of the others stands for them, so that damping has no unit.

    Raises:
        ValueError: the matrix is not finite, or not positive definite in spite of its damping.
    """
    hessian_KK = np.array(second_moment_KK, np.float64)
    if not np.isfinite(hessian_KK).all():
        raise ValueError(
            "GPTQ: the second moment of the inputs is not finite: expected calibration batches "
            "that make finite activations"
        )
    diagonal_K = np.diagonal(hessian_KK)
    dead_K = diagonal_K == 0
    mean = diagonal_K[~dead_K].mean() if not dead_K.all() else 1.0
    diagonal_K = np.where(dead_K, mean, diagonal_K) + settings.damping * mean
    np.fill_diagonal(hessian_KK, diagonal_K)
    order_K = np.arange(diagonal_K.size)
    if settings.act_order:
        order_K = np.argsort(-diagonal_K, kind="stable")
    matrix_KK = _feedback_matrix(hessian_KK[np.ix_(order_K, order_K)], settings.damping)
    return Feedback(jnp.asarray(order_K, jnp.int32), jnp.asarray(matrix_KK, jnp.float32))


def round_with_feedback(
    weight_KN: Float[Array, "K N"], quantizer: Quantizer, feedback: Feedback, settings: Gptq
) -> tuple[Float[Array, "K N"], Scale]:
    """`round_gptq` where the Hessian's factor is known; `jax.vmap` over weights and factors.

    Raises:
        ValueError: as `round_to_nearest`; block scales that are not static, of rows out of order.
    """
    tiled = quantizer.granularity == "block" and quantizer.scale not in ("fixed", "learned")
    static = settings.static_groups or not tiled
    if settings.act_order and not static:
        raise ValueError(
            f"GPTQ of {str(quantizer)!r} with act_order=True, static_groups=False: rows out of "
            "order reach no block as a whole; expected static_groups=True, or act_order=False"
        )
    rows = settings.block
    if not static:  # then a block's updated rows are those that its scales come from
        assert quantizer.block_size is not None
        rows, *_ = np.atleast_1d(quantizer.block_size).tolist()
    quantizer = prepared(quantizer)
    result: tuple[Array, Scale] = _rounded(weight_KN, quantizer, feedback, rows, static)
    return result


def _feedback_matrix(hessian_KK: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
    """Rᵀ - 1 of H = R D Rᵀ: the Cholesky factor of H read backwards, in units of its diagonal."""
    try:
        factor_KK = np.linalg.cholesky(hessian_KK[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError:
        factor_KK = np.zeros_like(hessian_KK)
    pivot_K = np.diagonal(factor_KK)
    if not (pivot_K**2 > _RESOLUTION * np.diagonal(hessian_KK)).all():
        raise ValueError(
            f"GPTQ: the second moment of {pivot_K.size} inputs is singular with damping {damping}: "
            "expected a larger damping, such as 0.01, or more calibration tokens"
        )
    return np.tril((factor_KK / pivot_K).T, -1)


@functools.partial(jax.jit, static_argnames=("rows", "static"))
def _rounded(
    weight_KN: Array, quantizer: Quantizer, feedback: Feedback, rows: int, static: bool
) -> tuple[Array, Scale]:
    """Block after block; the errors of rows that are not rounded yet are zero."""
    size, outputs = weight_KN.shape
    scale = scale_for(weight_KN, quantizer, 0)
    inputs = (weight_KN.astype(jnp.float32), spread(scale, weight_KN.shape))
    ordered = jax.tree.map(lambda a: _padded(a[feedback.order_K], rows), inputs)
    matrix_KK = _padded(_padded(feedback.matrix_KK, rows).T, rows).T

    def round_block(error_KN: Array, start: Array) -> tuple[Array, tuple[Array, Scale | None]]:
        block = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=rows)
        feedback_BK, (weight_BN, scale_BN) = jax.tree.map(block, (matrix_KK, ordered))
        feedback_BB, shift_BN = block(feedback_BK, axis=1), _product(feedback_BK, error_KN)
        updated = None
        if not static:
            updated = _updated_scale(weight_BN, shift_BN, feedback_BB, quantizer, scale)
            scale_BN = spread(updated, weight_BN.shape)
        values_BN, error_BN = _round_rows(
            weight_BN, weight_BN + shift_BN, feedback_BB, scale_BN, quantizer.grid
        )
        error_KN = jax.lax.dynamic_update_slice_in_dim(error_KN, error_BN, start, 0)
        return error_KN, (values_BN, updated)

    nothing = jnp.zeros((matrix_KK.shape[0], outputs), jnp.float32)
    starts = jnp.arange(0, matrix_KK.shape[0], rows)
    _, (values, updated) = jax.lax.scan(round_block, nothing, starts)
    values_KN = values.reshape(nothing.shape)[:size]
    values_KN = jnp.zeros_like(values_KN).at[feedback.order_K].set(values_KN)
    if updated is not None:  # a stack of rows of scales
        zero_point = None if updated.zero_point is None else updated.zero_point[:, 0]
        scale = Scale(updated.scale[:, 0], scale.tensor_scale, zero_point)
    return values_KN, scale


def _round_rows(
    weight_BN: Array, target_BN: Array, feedback_BB: Array, scale_BN: Scale, grid: AnyGrid
) -> tuple[Array, Array]:
    """Values and errors of one block, row after row; targets hold what earlier blocks ask for."""

    def round_row(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        values_BN, error_BN = state
        target_N = target_BN[i] + _product(feedback_BB[i], error_BN)
        scale_N = jax.tree.map(lambda a: a[i], scale_BN)
        _, value_N = rounded(target_N, scale_N, grid)
        error_N = weight_BN[i] - value_N * scale_N.applied
        return values_BN.at[i].set(value_N), error_BN.at[i].set(error_N)

    nothing = jnp.zeros_like(weight_BN)
    values_BN, error_BN = jax.lax.fori_loop(0, len(weight_BN), round_row, (nothing, nothing))
    return values_BN, error_BN


def _updated_scale(
    weight_BN: Array, shift_BN: Array, feedback_BB: Array, quantizer: Quantizer, whole: Scale
) -> Scale:
    """Scales of one row of blocks as it stands; a scale of the whole tensor stays what it was.

    Until they are rounded, the rows of a block make up for each other's shifts too.
    """
    shift_BN = jax.lax.linalg.triangular_solve(
        feedback_BB, shift_BN, left_side=True, lower=True, unit_diagonal=True
    )
    updated_BN = weight_BN + shift_BN
    if whole.tensor_scale is None:
        return scale_for(updated_BN, quantizer, 0)
    one_level = scale_for(updated_BN, dataclasses.replace(quantizer, scale_format=None), 0)
    largest = one_level.scale * quantizer.grid.max_value
    scale = formatted(largest, quantizer, whole.tensor_scale).scale
    return Scale(jnp.where(quantizer.grid.scaled, scale, 1), whole.tensor_scale)


def _product(left: Array, right_KN: Array) -> Array:
    return jnp.matmul(left, right_KN, precision=jax.lax.Precision.HIGHEST)


def _padded(a: Array, rows: int) -> Array:
    """Up to whole blocks of rows, the last to be rounded; ones, since scales are among them."""
    return jnp.pad(a, ((0, -len(a) % rows), (0, 0)), constant_values=1)
