"""The learning rate against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.training.schedule import learning_rate, warmup_cosine


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
