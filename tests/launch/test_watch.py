"""What a run is watched by, with a writer that keeps what it gets."""

import numpy as np
import pytest

from configs import tiny
from launch import progress
from launch.experiment import Experiment
from launch.progress import Meter
from launch.watch import throughput_of, watcher
from qat.training import devices
from qat.training.step import Metrics


class Kept:
    def __init__(self):
        self.points = []

    def write(self, points):
        self.points += points

    def close(self):
        raise AssertionError("whoever opened it closes it")


def metrics(steps):
    return [Metrics(np.float32(step), 0.0, 0.0) for step in steps]


def test_bar_and_plots_get_every_step_and_the_speed(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    experiment = Experiment.from_config(tiny.get_config().to_dict())
    monkeypatch.setattr(devices, "peak", lambda kind, dtype: 1e12)
    throughput, writer = throughput_of(experiment), Kept()
    with Meter("Training", 488, "steps") as meter:
        meter.skip(300)
        on_log = watcher(meter, throughput, [writer])
        on_log(302, metrics([301, 302]))
        on_log(305, metrics([303, 304, 305]))
    assert [(step, numbers["loss"]) for step, numbers in writer.points] == [
        (step, step) for step in range(301, 306)
    ]
    assert "step_ms" not in writer.points[-2][1]
    last = writer.points[-1][1]
    step_s = last["step_ms"] / 1e3
    assert last["tokens_per_s"] == pytest.approx(32 * 64 / step_s)
    matrices = experiment.model.kernel_params + 32 * 256
    work = 3 * 32 * 64 * (2 * matrices + 4 * 2 * 32 * 64)
    assert last["utilisation"] == pytest.approx(work / step_s / 8e12)  # the tests have 8 devices
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("Training: 302/488 steps")
    assert second.startswith("Training: 305/488 steps")
    assert first.endswith(" s")  # too early to tell what is left
    assert second.endswith("% of peak")


def test_no_peak_is_no_utilisation():
    throughput = throughput_of(Experiment.from_config(tiny.get_config().to_dict()))
    throughput.at(1)
    assert throughput.at(2).utilisation is None
