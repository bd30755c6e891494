"""What a training loop calls when it logs: the progress bar with the speed, and the plots."""

from collections.abc import Callable, Sequence

import jax

from launch.experiment import Experiment
from launch.progress import Tally
from qat.training import devices
from qat.training.scalars import Writer, points
from qat.training.step import Metrics
from qat.training.throughput import Throughput, peak_of


def watcher(
    meter: Tally, throughput: Throughput, writers: Sequence[Writer]
) -> Callable[[int, Sequence[Metrics]], None]:
    """A function of the steps taken and the metrics of those since its last call.

    Args:
        meter: counts steps and shows the speed.
        throughput: of this stretch of training.
        writers: of plots.
    """

    def on_log(step: int, metrics: Sequence[Metrics]) -> None:
        speed = throughput.at(step)
        meter.advance(len(metrics), "" if speed is None else str(speed))
        found = points(step, metrics, speed)
        for writer in writers:
            writer.write(found)

    return on_log


def throughput_of(experiment: Experiment) -> Throughput:
    """What measures the speed of an experiment on all devices, by its model's analytic FLOPs."""
    tokens = experiment.tokens_at(1)
    kinds = [device.device_kind for device in jax.devices()]
    peak = peak_of(kinds, experiment.model.dtype, devices.peak)
    return Throughput(tokens, experiment.train_flops(tokens), peak)
