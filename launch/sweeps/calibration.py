"""How fast this machine trains the shapes of a sweep, from timing a few of them for seconds.

What is timed is the real train step, in as many processes as the sweep will have workers, each on
its core, all at once: two workers on one machine share its caches and memory, and run slower than
one alone. The cheapest, the dearest and the most common shape are timed, each cut to what a few
seconds allow: fewer sequences, then fewer layers, then shorter sequences, so that its matrices keep
their widths. What carries over to the other shapes is the rate, in FLOPs a second, which is smooth
in the logarithm of a step's FLOPs: small steps are mostly overhead, large ones matrix products.
"""

import collections
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np

from launch import cpu
from launch.experiment import Experiment

_AFFORDABLE = 2e10  # FLOPs of a step: a second or two of a slow core
_LEAST_S = 3.0  # of timing, however long imports and compilers took


@dataclasses.dataclass(frozen=True)
class Probe:
    """A train step that was timed.

    Attributes:
        flops: analytic, of a step.
        step_s: seconds of a step.
        compile_s: seconds until the first step was done.
        cut: whether it stands for a dearer one; with few tokens a step is mostly the optimizer's,
            so the dearer one reaches a higher rate.
    """

    flops: float
    step_s: float
    compile_s: float
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was measured, with all workers running.

    Attributes:
        workers: processes that ran side by side.
        import_s: seconds from a worker's start until all is imported.
        probes: steps that were timed, the cheapest first.
        core_share: processor time that a worker got, as a share of the time that passed; below 1
            there are more workers than cores, or something else is running.
        seconds: that measuring took.
    """

    workers: int
    import_s: float
    probes: tuple[Probe, ...]
    core_share: float
    seconds: float

    def rate(self, flops: float) -> float:
        """FLOPs a second of one worker, for steps of so many FLOPs."""
        return self._carried(flops, [probe.flops / probe.step_s for probe in self.probes])

    def compile_s(self, flops: float) -> float:
        """Seconds to compile a train step of so many FLOPs."""
        return self._carried(flops, [probe.compile_s for probe in self.probes])

    def _carried(self, flops: float, values: Sequence[float]) -> float:
        """Between the probes linear in log FLOPs, beyond them as at the nearest."""
        return float(
            np.interp(np.log(flops), [np.log(probe.flops) for probe in self.probes], values)
        )


def calibrate(
    experiments: Sequence[Experiment], seconds: float = 20.0, workers: int = 1
) -> Calibration:
    """Times train steps of some of the experiments' shapes.

    Args:
        experiments: at least one.
        seconds: about how long that may take; more where compiling takes longer.
        workers: processes that run side by side, each on one core.

    Raises:
        ValueError: no experiments or no workers.
        OSError: a process failed.
    """
    if not experiments or workers < 1:
        raise ValueError(
            f"{len(experiments)} experiments on {workers} workers: expected at least 1 of each"
        )
    start = time.monotonic()
    probed = _probed(experiments)
    shares = [_share(len(probed), workers, worker) for worker in range(workers)]
    configs = [each.config for each in probed]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(_process([configs[index] for index in share], worker))
            for worker, share in enumerate(shares)
        ]
        ready = [process.answer() for process in processes]
        left = max(_LEAST_S, seconds - (time.monotonic() - start))
        for process in processes:
            process.ask(left)
        timed = [process.answer() for process in processes]
    whole = {step_flops(each) for each in experiments}
    probes = []
    for index, each in enumerate(probed):
        work = step_flops(each)
        step_s = _mean(timed, shares, index, "step_s")
        compile_s = _mean(ready, shares, index, "compile_s")
        probes.append(Probe(work, step_s, compile_s, cut=work not in whole))
    import_s = float(np.mean([each["import_s"] for each in ready]))
    ordered = tuple(sorted(probes, key=lambda probe: probe.flops))
    core_share = float(np.mean([each["core_share"] for each in timed]))
    return Calibration(workers, import_s, ordered, core_share, time.monotonic() - start)


def step_flops(experiment: Experiment) -> int:
    """Analytic FLOPs of one train step."""
    return experiment.train_flops(experiment.tokens_at(1))


def _probed(experiments: Sequence[Experiment]) -> list[Experiment]:
    """The cheapest, the dearest and the most common shape, cut to what is affordable."""
    by_shape: dict[str, list[Experiment]] = collections.defaultdict(list)
    for each in experiments:
        by_shape[each.shape].append(each)
    firsts = sorted((group[0] for group in by_shape.values()), key=step_flops)
    common = max(by_shape.values(), key=len)[0]
    cut = [_cut(each.config) for each in (firsts[0], firsts[-1], common)]
    return list({each.shape: each for each in cut}.values())


def _cut(config: Mapping[str, Any]) -> Experiment:
    """The experiment on one device, smaller until a step is affordable."""
    config = {**config, "mesh": {"data": 1, "fsdp": 1, "tensor": 1}}
    while step_flops(experiment := Experiment.from_config(config)) > _AFFORDABLE:
        model, data = config["model"], config["data"]
        if config["batch_size"] > 1:
            config |= {"batch_size": config["batch_size"] // 2, "accumulation": 1}
        elif model["layers"] > 1:
            config |= {"model": {**model, "layers": model["layers"] // 2}}
        elif data["sequence_length"] > 1:
            config |= {"data": {**data, "sequence_length": data["sequence_length"] // 2}}
        else:
            break
    return experiment


def _share(probes: int, workers: int, worker: int) -> list[int]:
    """Which probes a worker times: all have one, and every probe has a worker."""
    return list(range(worker, probes, workers)) or [worker % probes]


def _mean(
    answers: Sequence[Mapping[str, Any]], shares: Sequence[list[int]], probe: int, name: str
) -> float:
    """The mean of what the workers that have a probe in their share say of it."""
    pairs = zip(answers, shares, strict=True)
    return float(
        np.mean([each[name][share.index(probe)] for each, share in pairs if probe in share])
    )


@contextlib.contextmanager
def _process(configs: Sequence[Mapping[str, Any]], worker: int) -> Iterator["_Process"]:
    """A process that runs `launch.sweeps.probe` on a core of its own, and ends with the context."""
    cores = cpu.cores()
    job = {"core": cores[worker % len(cores)], "started": time.time(), "configs": configs}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "launch.sweeps.probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as popen,
    ):
        process = _Process(popen, errors)
        process.ask(job)
        try:
            yield process
        finally:
            popen.kill()


@dataclasses.dataclass(frozen=True)
class _Process:
    """A process that answers lines with lines of JSON, and where it writes its errors."""

    popen: subprocess.Popen[str]
    errors: IO[str]

    def ask(self, question: object) -> None:
        """Sends a line; a process that is gone is found out by its answer."""
        assert self.popen.stdin
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.write(json.dumps(question) + "\n")
            self.popen.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Waits for a line.

        Raises:
            OSError: the process failed.
        """
        assert self.popen.stdout
        if line := self.popen.stdout.readline():
            found: dict[str, Any] = json.loads(line)
            return found
        code = self.popen.wait()
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line]
        reason = lines[-1] if lines else "without a word"
        raise OSError(f"the calibration failed, exit code {code}: {reason}")
