"""A minimiser for few coordinates that needs no gradient and no start: a grid that zooms.

A plan asks for the lowest point of a law along a budget: one or two coordinates, a smooth valley,
and around it walls where the law means nothing and cliffs where a chip's price jumps. Gradients
stop at such walls and step over such cliffs. A grid does not care, costs a few thousand
evaluations of a closed form, and takes the same path in every lane, so thousands of bootstrap draws
go through it as one program.

Each round lays the grid over a box around the best point so far and shrinks the box. It keeps
`MARGIN` spacings on either side, because in a slanted valley the best grid point may be a few
spacings away from the lowest point.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Arrays end in their axes: K coordinates, G grid points.
POINTS = (
    16  # along a coordinate: of 15 units the integers, so that a search of 1 to 16 bits has all
)
MARGIN = 3
ROUNDS = 22  # each keeps 6/15 of the box: down to 2e-9 of it


def minimise(objective: Callable[[Array], Array], dimensions: int) -> tuple[Array, Array]:
    """The lowest point in the unit cube.

    Args:
        objective: maps coordinates in [0, 1], shape (K,), to a scalar; inf where it is not defined.
        dimensions: K.

    Returns:
        The coordinates, shape (K,), to 1e-8 if the valley is that sharp in its floating point, and
        the objective there, inf if the grid never met a finite value.
    """
    axes = np.meshgrid(*[np.linspace(0.0, 1.0, POINTS)] * dimensions, indexing="ij")
    unit_GK = jnp.asarray(np.stack(axes, -1).reshape(-1, dimensions))

    def zoom(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best_K, value, span = state
        first_K = jnp.clip(best_K - span / 2, 0.0, 1.0 - span)
        grid_GK = first_K[None] + unit_GK * span
        found_K = grid_GK[jnp.argmin(jax.vmap(objective)(grid_GK))]
        found = objective(found_K)
        lower = found < value
        best_K = jnp.where(lower, found_K, best_K)
        return best_K, jnp.where(lower, found, value), span * (2 * MARGIN / (POINTS - 1))

    start = (jnp.full(dimensions, 0.5), jnp.asarray(jnp.inf), jnp.asarray(1.0))
    best_K, value, _ = jax.lax.fori_loop(0, ROUNDS, zoom, start)
    return best_K, value
