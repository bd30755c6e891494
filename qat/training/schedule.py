"""Learning-rate schedules as data: one compiled train step serves every budget and peak rate.

The schedule is a handful of numbers that the step takes as an argument. Kumar et al.
(arXiv 2411.04330) train with a cosine after 10% of warm-up.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then half a cosine.

    Attributes:
        peak: learning rate at the end of warm-up.
        warmup_steps: steps from 0 to `peak`.
        total_steps: step at which the cosine ends.
        final_fraction: rate at the end, as a share of `peak`.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    final_fraction: float = 0.1


def warmup_cosine(
    peak: float, total_steps: int, warmup_fraction: float = 0.1, final_fraction: float = 0.1
) -> Schedule:
    """A schedule whose warm-up is a share of the run, at least one step.

    Raises:
        ValueError: a number is out of range.
    """
    if not 0 < peak < float("inf") or total_steps < 1:
        raise ValueError(
            f"learning rate {peak} and total_steps {total_steps} must both be positive"
        )
    for name, value in (("warmup_fraction", warmup_fraction), ("final_fraction", final_fraction)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value} is not between 0 and 1")
    return Schedule(peak, max(1, round(warmup_fraction * total_steps)), total_steps, final_fraction)


def learning_rate(schedule: Schedule, step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of a step, counted from 0; float32."""
    done = step.astype(jnp.float32) + 1
    warmup = jnp.asarray(schedule.warmup_steps, jnp.float32)
    total = jnp.asarray(schedule.total_steps, jnp.float32)
    final = jnp.asarray(schedule.final_fraction, jnp.float32)
    progress = jnp.clip((done - warmup) / jnp.maximum(total - warmup, 1), 0, 1)
    cosine = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return jnp.asarray(schedule.peak, jnp.float32) * jnp.minimum(done / warmup, cosine)
