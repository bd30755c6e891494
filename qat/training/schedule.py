"""Learning-rate schedules as data: one compiled train step serves every budget, rate and shape.

A schedule is a handful of numbers that the step takes as an argument: linear warm-up, a stable
stretch at the peak, and a cooldown. A cosine is the case without a stable stretch. Kumar et al.
(arXiv 2411.04330) train with a cosine after 10% of warm-up.

Warm-up–stable–decay (Hu et al., arXiv 2404.06395) makes many token budgets cost little more than
one run: `branches` gives the schedules of several budgets, which are equal until the first of them
cools down, so that one trunk serves them all. The shapes of the cooldown are those compared by
Hägele et al. (arXiv 2405.18392), who find 1 − √x best.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qat.spelling import expected_one_of

COOLDOWNS = ("linear", "sqrt", "cosine")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear warm-up, a stable stretch, and a cooldown.

    Attributes:
        peak: learning rate at the end of warm-up.
        warmup_steps: steps from 0 to `peak`.
        cooldown_start: steps after which the cooldown begins; the first warm-up counts among them.
        total_steps: steps after which it ends.
        final_fraction: rate at the end, as a share of `peak`.
        shape: index of the cooldown's shape in `COOLDOWNS`.
    """

    peak: float
    warmup_steps: int
    cooldown_start: int
    total_steps: int
    final_fraction: float
    shape: int


def warmup_cosine(
    peak: float, total_steps: int, warmup_fraction: float = 0.1, final_fraction: float = 0.1
) -> Schedule:
    """Warm-up over a share of the run, at least one step, then half a cosine.

    Raises:
        ValueError: a number is out of range.
    """
    _check(peak, [total_steps], warmup_fraction=warmup_fraction, final_fraction=final_fraction)
    warmup = _warmup_steps(warmup_fraction, total_steps)
    return Schedule(peak, warmup, warmup, total_steps, final_fraction, COOLDOWNS.index("cosine"))


def branches(
    peak: float,
    budgets: Sequence[int],
    warmup_fraction: float = 0.1,
    cooldown_fraction: float = 0.2,
    final_fraction: float = 0.0,
    cooldown: str = "sqrt",
) -> list[Schedule]:
    """Warm-up–stable–decay schedules of several budgets that share one trunk.

    Args:
        peak: learning rate of the stable stretch.
        budgets: total steps of each schedule.
        warmup_fraction: of the smallest budget, since the trunk is the same for all.
        cooldown_fraction: of each budget.
        final_fraction: rate at the end, as a share of `peak`.
        cooldown: a name in `COOLDOWNS`.

    Raises:
        ValueError: a number is out of range, or no cooldown has that name.
    """
    fractions = {
        "warmup_fraction": warmup_fraction,
        "cooldown_fraction": cooldown_fraction,
        "final_fraction": final_fraction,
    }
    _check(peak, budgets, **fractions)
    if cooldown not in COOLDOWNS:
        raise ValueError(expected_one_of("cooldown", cooldown, COOLDOWNS))
    if warmup_fraction + cooldown_fraction > 1:
        raise ValueError(
            f"warmup_fraction {warmup_fraction} and cooldown_fraction {cooldown_fraction} "
            "exceed 1 together"
        )
    warmup = _warmup_steps(warmup_fraction, min(budgets))
    return [
        Schedule(
            peak,
            warmup,
            max(warmup, budget - round(cooldown_fraction * budget)),
            budget,
            final_fraction,
            COOLDOWNS.index(cooldown),
        )
        for budget in budgets
    ]


def learning_rate(schedule: Schedule, step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of a step, counted from 0; float32."""
    done = step.astype(jnp.float32) + 1
    warmup, start, total, final = (
        jnp.asarray(number, jnp.float32)
        for number in (
            schedule.warmup_steps,
            schedule.cooldown_start,
            schedule.total_steps,
            schedule.final_fraction,
        )
    )
    progress = jnp.clip((done - start) / jnp.maximum(total - start, 1), 0, 1)
    shapes = (1 - progress, 1 - jnp.sqrt(progress), 0.5 * (1 + jnp.cos(jnp.pi * progress)))
    left = jnp.stack(shapes)[schedule.shape]
    cooled = final + (1 - final) * left
    return jnp.asarray(schedule.peak, jnp.float32) * jnp.minimum(done / warmup, cooled)


def _warmup_steps(fraction: float, total_steps: int) -> int:
    return max(1, round(fraction * total_steps))


def _check(peak: float, budgets: Sequence[int], **fractions: float) -> None:
    """Raises ValueError for what no schedule can have."""
    if not 0 < peak < float("inf"):
        raise ValueError(f"learning rate {peak}: expected a finite number above 0, such as 0.003")
    if not budgets or min(budgets) < 1:
        steps = ", ".join(map(str, budgets)) or "none"
        raise ValueError(f"total_steps {steps}: expected at least 1")
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value} is not between 0 and 1")
