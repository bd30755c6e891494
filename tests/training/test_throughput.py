"""Speed from log events, by a clock that the test turns, and the points that are plotted."""

import jax.numpy as jnp
import numpy as np
import pytest

from qat.training.scalars import points
from qat.training.step import Metrics
from qat.training.throughput import Speed, Throughput, peak_of


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def speeds(readings, **options):
    """Speeds at (step, seconds since the reading before) of 1000 tokens and 6e6 FLOPs a step."""
    clock = Clock()
    throughput = Throughput(1000, 6e6, clock=clock, **options)
    for step, seconds in readings:
        clock.now += seconds
        yield throughput.at(step)


def test_compilation_is_left_out_and_outliers_do_not_count():
    before, first, *_, last = speeds([(50, 60.0), (100, 5.0), (150, 5.0), (200, 400.0), (250, 5.0)])
    assert before is None
    assert first == last == Speed(0.1, pytest.approx(10_000), pytest.approx(6e7), None)


def test_steps_count_and_not_log_events():
    *_, last = speeds([(10, 9.0), (12, 0.2), (14, 0.2), (64, 5.0)])
    assert last.step_s == pytest.approx(0.1)


def test_old_stretches_are_forgotten():
    slow = [(step, 1.0) for step in range(1, 32)]
    fast = [(step, 0.1) for step in range(32, 52)]
    *_, last = speeds(slow + fast)
    assert last.step_s == pytest.approx(0.1)


def test_a_step_that_goes_back_begins_anew():
    *_, last = speeds([(10, 1.0), (20, 1.0), (12, 70.0), (22, 1.0)])
    assert last.step_s == pytest.approx(0.1)


def test_utilisation_is_the_share_of_all_devices_peak():
    peaks = {("v5e", "bfloat16"): 3e8}
    peak = peak_of(["v5e", "v5e"], "bfloat16", lambda *key: peaks.get(key))
    assert peak == 6e8
    *_, last = speeds([(1, 1.0), (2, 0.1)], peak_flops_per_s=peak)
    assert last.utilisation == pytest.approx(0.1)
    assert peak_of(["v5e", "cpu"], "bfloat16", lambda *key: peaks.get(key)) is None
    assert peak_of([], "bfloat16", lambda *key: 1.0) is None


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        (Speed(0.0213, 96_200, 3.1e9, None), "21.3 ms/step, 96.2 ktokens/s, 3.1 GFLOP/s"),
        (
            Speed(2.5, 4.2e6, 1.234e15, 0.4567),
            "2.5e+03 ms/step, 4.2 Mtokens/s, 1.23 PFLOP/s, 45.7% of peak",
        ),
        (Speed(1.0, 12.0, 1.5, None), "1e+03 ms/step, 12 tokens/s, 1.5 FLOP/s"),
    ],
)
def test_a_speed_in_words(speed, words):
    assert str(speed) == words


def metrics(loss):
    return Metrics(jnp.float32(loss), np.float32(2 * loss), 0.5)


def test_every_step_has_a_point_and_the_last_its_speed():
    speed = Speed(0.25, 4000.0, 1e6, 0.5)
    assert points(7, [metrics(3.0), metrics(2.0)], speed) == [
        (6, {"loss": 3.0, "grad_norm": 6.0, "learning_rate": 0.5}),
        (
            7,
            {"loss": 2.0, "grad_norm": 4.0, "learning_rate": 0.5}
            | {"step_ms": 250.0, "tokens_per_s": 4000.0, "utilisation": 0.5},
        ),
    ]
    assert points(7, [metrics(1.0)], None)[0][1].keys() == {"loss", "grad_norm", "learning_rate"}
    unknown = Speed(0.25, 4000.0, 1e6, None)
    assert "utilisation" not in points(7, [metrics(1.0)], unknown)[0][1]
    assert points(7, [], speed) == []
