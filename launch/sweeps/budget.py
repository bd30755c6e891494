"""What a sweep will cost, before anything is run.

FLOPs are the analytic ones of result rows, but of the steps that are really taken: budgets that
branch off one run share its trunk. Programs are compiled once for each shape in every worker that
meets it. Time on this machine follows from a calibration, time on accelerators from the peak of
their data sheets and an assumed share of it that training reaches. How large the validation text is
is not known before it is prepared, so evaluations are counted in full.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

from launch.experiment import Experiment
from launch.sweeps.calibration import Calibration, step_flops
from launch.sweeps.rounding import narrower
from qat.spelling import expected_one_of
from qat.training import devices

UTILISATION = 0.4  # of the peak; what well-tuned training of large models reaches on accelerators
ACCELERATORS = {
    "v5e": "TPU v5e",
    "v5p": "TPU v5p",
    "v6e": "TPU v6e",
    "H100": "NVIDIA H100 80GB HBM3",
}

# Seconds to compile the initialisation, or an evaluation, as a share of those of the train step.
_SHARE_OF_COMPILING = 0.5
_HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Ptq:
    """What finished runs are quantized with, as in `qat.sweep.Sweep`.

    Attributes:
        methods: names.
        formats: spellings of quantizers of the weights.
        at: shares of a run's training at which to quantize; 1 is the end, of every budget.
    """

    methods: Sequence[str] = ()
    formats: Sequence[str] = ()
    at: Sequence[float] = (1.0,)


_NO_PTQ = Ptq()


@dataclasses.dataclass(frozen=True)
class ShapeBudget:
    """The runs that share compiled programs.

    Attributes:
        params: N, non-embedding parameters.
        structure: of the policies, in words.
        runs: how many.
        tokens: trained on, every step counted once.
        train_flops: of training on them.
        eval_flops: of all evaluations.
        evaluations: of models as trained.
        ptq_evaluations: of models quantized after training.
        programs: train step and evaluations to compile.
        compiles: how often they are compiled in all workers together.
        worker_s: seconds of all its runs and compiles one after another on one worker of this
            machine; None without a calibration.
        longest_s: seconds of its longest run there, compiling included; None without a calibration.
    """

    params: int
    structure: str
    runs: int
    tokens: int
    train_flops: int
    eval_flops: int
    evaluations: int
    ptq_evaluations: int
    programs: int
    compiles: int
    worker_s: float | None
    longest_s: float | None

    @property
    def rows(self) -> int:
        """Results: one for every evaluation."""
        return self.evaluations + self.ptq_evaluations

    @property
    def flops(self) -> int:
        """Of training and evaluation."""
        return self.train_flops + self.eval_flops


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a sweep costs.

    Attributes:
        shapes: the dearest first.
        workers: processes side by side on this machine.
        calibration: of this machine; None was not asked for.
        chips: accelerators that work on the sweep.
        utilisation: share of their peak that is assumed.
        prices: of a chip for an hour, by accelerator, in whatever currency.
    """

    shapes: tuple[ShapeBudget, ...]
    workers: int
    calibration: Calibration | None
    chips: int
    utilisation: float
    prices: Mapping[str, float]

    def total(self, name: str) -> int:
        """Sum over shapes of a whole number of `ShapeBudget`, such as "tokens"."""
        return sum(getattr(shape, name) for shape in self.shapes)

    @property
    def hours_here(self) -> float | None:
        """Of all workers of this machine, to which runs go as these become free; None is unknown.

        It is no less than the longest run takes, and no less than every worker's share.
        """
        if self.calibration is None:
            return None
        spent = sum(shape.worker_s or 0.0 for shape in self.shapes)
        longest = max(shape.longest_s or 0.0 for shape in self.shapes)
        workers = min(self.workers, self.total("runs"))
        return (self.calibration.import_s + max(spent / workers, longest)) / _HOUR

    @property
    def chip_hours(self) -> dict[str, float]:
        """Hours of one chip, by accelerator, at the assumed share of its bfloat16 peak."""
        return {
            name: self.total("flops") / (peak_of(name) * self.utilisation) / _HOUR
            for name in ACCELERATORS
        }

    @property
    def money(self) -> dict[str, float]:
        """By accelerator that has a price, in the currency of the prices."""
        return {name: self.chip_hours[name] * price for name, price in self.prices.items()}


def estimate(
    experiments: Sequence[Experiment],
    workers: int,
    *,
    ptq: Ptq = _NO_PTQ,
    calibration: Calibration | None = None,
    chips: int = 1,
    utilisation: float = UTILISATION,
    prices: Mapping[str, float] | None = None,
) -> Budget:
    """Adds up what the runs of a sweep cost.

    Args:
        experiments: the runs.
        workers: processes side by side.
        ptq: what finished runs are quantized with.
        calibration: of this machine; None leaves its hours unknown.
        chips: accelerators that share the runs.
        utilisation: share of their peak, in (0, 1].
        prices: of a chip for an hour, by names of `ACCELERATORS`; there are no defaults.

    Raises:
        ValueError: no runs, or a number out of range.
    """
    prices = dict(prices or {})
    _check(experiments, workers, chips, utilisation)
    _check_prices(prices)
    groups: dict[str, list[Experiment]] = collections.defaultdict(list)
    for each in experiments:
        groups[each.shape].append(each)
    shapes = [_shape(group, workers, ptq, calibration) for group in groups.values()]
    shapes.sort(key=lambda shape: -shape.flops)
    return Budget(tuple(shapes), workers, calibration, chips, utilisation, prices)


def prices_of(words: Sequence[str]) -> dict[str, float]:
    """Reads prices as a flag gives them, such as ["v5e:1.2", "H100:2.5"].

    Raises:
        ValueError: not an accelerator, a colon and a number.
    """
    prices: dict[str, float] = {}
    for word in words:
        name, _, price = word.partition(":")
        if name in prices:
            raise ValueError(f"price {word!r}: {name} has one already, {prices[name]:g}")
        try:
            prices[name] = float(price)
        except ValueError:
            raise ValueError(
                f"price {word!r}: expected an accelerator, a colon and a number, such as 'v5e:1.2'"
            ) from None
    _check_prices(prices)
    return prices


def peak_of(accelerator: str) -> float:
    """FLOPs a second of a chip in bfloat16, by its name in `ACCELERATORS`."""
    found = devices.peak(ACCELERATORS[accelerator], "bfloat16")
    assert found is not None
    return found


def trained_tokens(experiment: Experiment) -> int:
    """Those of the steps that are taken: the run's, and what its branches add."""
    steps = experiment.schedule.total_steps
    added = sum(each.total_steps - each.cooldown_start for each in experiment.branches)
    return experiment.tokens // steps * (steps + added)


def evaluations(experiment: Experiment, ptq: Ptq) -> tuple[int, int]:
    """How often a run is evaluated as trained, and quantized: at every budget, and on its way."""
    formats = narrower(experiment.policy, tuple(ptq.formats))
    quantizers, budgets = len(ptq.methods) * len(formats), len(experiment.branches) + 1
    steps = experiment.schedule.total_steps
    on_the_way = {max(1, round(share * steps)) for share in ptq.at if share < 1}
    looks = len(on_the_way) if quantizers else 0
    ends = budgets if 1.0 in ptq.at else 0
    return budgets + looks, quantizers * (ends + looks)


def _shape(
    runs: Sequence[Experiment], workers: int, ptq: Ptq, calibration: Calibration | None
) -> ShapeBudget:
    """The budget of runs of one shape."""
    first = runs[0]
    tokens = [trained_tokens(each) for each in runs]
    counts = [evaluations(each, ptq) for each in runs]
    programs = 1 + _evaluation_programs(runs, ptq)
    eval_flops = first.config["evaluation_batches"] * step_flops(first) // 3  # forward alone
    compiling_workers = min(workers, len(runs))
    longest_s = worker_s = None
    if calibration is not None:
        rate = calibration.rate(step_flops(first))
        compile_s = calibration.compile_s(step_flops(first))
        compile_s *= 1 + _SHARE_OF_COMPILING * programs  # as many evaluations, and initialisation
        seconds = [
            (first.train_flops(trained) + eval_flops * sum(count)) / rate
            for trained, count in zip(tokens, counts, strict=True)
        ]
        longest_s = compile_s + max(seconds)
        worker_s = compile_s * compiling_workers + sum(seconds)
    plain, quantized = map(sum, zip(*counts, strict=True))
    return ShapeBudget(
        params=first.model.params,
        structure=first.policy.structure,
        runs=len(runs),
        tokens=sum(tokens),
        train_flops=first.train_flops(sum(tokens)),
        eval_flops=eval_flops * (plain + quantized),
        evaluations=plain,
        ptq_evaluations=quantized,
        programs=programs,
        compiles=programs * compiling_workers,
        worker_s=worker_s,
        longest_s=longest_s,
    )


def _evaluation_programs(runs: Sequence[Experiment], ptq: Ptq) -> int:
    """Evaluations of a shape to compile: one for each structure, as trained and quantized."""
    policies = {each.config["policy"]: each.policy for each in runs}
    formats = tuple(ptq.formats) if ptq.methods else ()
    structures = {each.structure for each in policies.values()}
    for policy in policies.values():
        for weights in narrower(policy, formats):
            structures.add(dataclasses.replace(policy, weights=weights).structure)
    return len(structures)


def _check(experiments: Sequence[Experiment], workers: int, chips: int, utilisation: float) -> None:
    """Raises ValueError for what has no cost."""
    if not experiments:
        raise ValueError("no runs: expected at least one experiment")
    for name, number in (("workers", workers), ("chips", chips)):
        if number < 1:
            raise ValueError(f"{name} = {number}: expected at least 1")
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation = {utilisation}: expected a share above 0, at most 1")


def _check_prices(prices: Mapping[str, float]) -> None:
    """Raises ValueError for an unknown accelerator or an impossible price."""
    for name, price in prices.items():
        if name not in ACCELERATORS:
            raise ValueError(expected_one_of("accelerator", name, ACCELERATORS))
        if not 0 <= price < math.inf:
            raise ValueError(f"price of {name} = {price}: expected at least 0, and finite")
