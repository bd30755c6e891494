"""The learning rate against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.training.schedule import COOLDOWNS, branches, learning_rate, warmup_cosine

SHAPES = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - x**0.5,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
}


def reference(step, peak, warmup, total, final):
    done = step + 1
    if done < warmup:
        return peak * done / warmup
    progress = (done - warmup) / (total - warmup)
    return peak * (final + (1 - final) * (1 + np.cos(np.pi * progress)) / 2)


def test_rate_follows_the_closed_form():
    schedule = warmup_cosine(0.5, 200, warmup_fraction=0.1, final_fraction=0.2)
    steps = np.arange(200)
    rates = jax.vmap(lambda step: learning_rate(schedule, step))(jnp.asarray(steps))
    expected = [reference(step, 0.5, 20, 200, 0.2) for step in steps]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def rates(schedule):
    steps = jnp.arange(schedule.total_steps)
    return np.asarray(jax.vmap(lambda step: learning_rate(schedule, step))(steps))


@pytest.mark.parametrize("cooldown", COOLDOWNS)
def test_warmup_stable_decay_follows_the_closed_form(cooldown):
    (schedule,) = branches(0.5, [100], 0.1, 0.2, 0.05, cooldown)
    done = np.arange(1, 101)
    cooled = 0.05 + 0.95 * SHAPES[cooldown](np.clip((done - 80) / 20, 0, 1))
    expected = 0.5 * np.minimum(done / 10, cooled)
    np.testing.assert_allclose(rates(schedule), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cooldown", COOLDOWNS)
def test_branches_share_their_trunk_bit_for_bit(cooldown):
    short, long = branches(0.3, [50, 400], 0.1, 0.2, 0.1, cooldown)
    assert (short.cooldown_start, long.cooldown_start) == (40, 320)
    trunk = rates(long)[:40]
    np.testing.assert_array_equal(rates(short)[:40], trunk)
    assert trunk[5:].min() == trunk[5:].max() == np.float32(0.3)
    assert rates(short)[40] < trunk[-1]
    assert rates(short)[-1] == pytest.approx(0.03)


def test_rate_peaks_after_warmup_and_ends_at_its_final_fraction():
    schedule = warmup_cosine(1.0, 100, warmup_fraction=0.1, final_fraction=0.1)
    at = lambda step: float(learning_rate(schedule, jnp.int32(step)))  # noqa: E731
    assert at(9) == pytest.approx(1.0)
    assert at(99) == pytest.approx(0.1)
    assert 0 < at(0) < at(1)


def test_one_program_serves_all_schedules():
    traces = 0

    @jax.jit
    def rate(schedule, step):
        nonlocal traces
        traces += 1
        return learning_rate(schedule, step)

    for peak, steps in ((0.1, 10), (0.3, 1000), (1.0, 50)):
        rate(warmup_cosine(peak, steps), jnp.int32(3))
        for cooldown in COOLDOWNS:
            rate(branches(peak, [steps], cooldown=cooldown)[0], jnp.int32(3))
    assert traces == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 10), "learning rate 0.0"),
        ((0.1, 0), "total_steps 0"),
        ((0.1, 10, 1.5), "warmup_fraction 1.5"),
        ((0.1, 10, 0.1, -0.1), "final_fraction -0.1"),
    ],
)
def test_bad_schedules_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        warmup_cosine(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": []}, "total_steps none"),
        ({"budgets": [10, 0]}, "total_steps 10, 0"),
        ({"cooldown": "cosin"}, "unknown cooldown 'cosin': .* nearest is 'cosine'"),
        ({"warmup_fraction": 0.5, "cooldown_fraction": 0.6}, "exceed 1 together"),
    ],
)
def test_bad_branches_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        branches(0.1, **{"budgets": [10], **arguments})
