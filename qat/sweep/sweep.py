"""What a sweep is: a base experiment, a grid of changes to it, and what becomes of trained models.

A `Sweep` is pure data and checks itself when it is made, so that nothing is trained before every
key, type and spelling of all runs is known to be right. What a config means is not known here:
whoever runs the sweep resolves each and finds out, for instance, that a batch is too large.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qat.quantizer import Quantizer
from qat.spelling import expected_instead, expected_one_of
from qat.sweep.grid import Grid, apply
from qat.training.results import hash_of

_METHODS = ("rtn", "gptq", "hqq")  # after which a model computes as before


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Many runs as data; lists are taken for tuples.

    Attributes:
        config: base experiment, a plain nested dict of what JSON can hold.
        grid: what each run changes, in the order in which runs start.
        ptq_methods: each applied to every finished run, "rtn", "gptq" or "hqq"; empty for none.
            Methods that change a model's inputs are for `launch.ptq`.
        ptq_formats: spellings of `qat.Quantizer`, for each method; empty for none.
        ptq_at: the shares of a run's training after which that is done, in (0, 1].
        ptq_calibration: sequences of the run's training text that methods which need some see.

    Raises:
        ValueError: the grid is empty, names an unknown key or gives two runs that are the same; an
            unknown method, a misspelt or equal quantizers, or a share out of range.
    """

    config: Mapping[str, Any]
    grid: Grid
    ptq_methods: tuple[str, ...] = ()
    ptq_formats: tuple[str, ...] = ()
    ptq_at: tuple[float, ...] = (1.0,)
    ptq_calibration: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.config, Mapping):
            expected = "a nested dict, such as get_config().to_dict()"
            raise ValueError(expected_instead("config", expected, self.config))
        for name in ("grid", "ptq_methods", "ptq_formats", "ptq_at"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        self._check_runs()
        self._check_ptq()

    def configs(self) -> Iterator[dict[str, Any]]:
        """The config of every run, in order."""
        return (apply(self.config, overrides) for overrides in self.grid)

    def _check_runs(self) -> None:
        """Raises ValueError for no run, one that cannot be, or one that is there twice."""
        if not self.grid:
            raise ValueError("the grid is empty: expected at least one run")
        first: dict[str, int] = {}
        for number, config in enumerate(self.configs(), start=1):
            try:
                identity = hash_of(config)
            except TypeError as error:
                raise ValueError(f"config: expected what JSON can hold; {error}") from None
            if (same := first.setdefault(identity, number)) != number:
                changes = dict(self.grid[number - 1])
                raise ValueError(f"runs {same} and {number} of the grid are the same: {changes}")

    def _check_ptq(self) -> None:
        """Raises ValueError for what cannot be done to a trained model, or only twice."""
        for method in self.ptq_methods:
            if method not in _METHODS:
                raise ValueError(expected_one_of("ptq method", method, _METHODS))
        if bool(self.ptq_methods) != bool(self.ptq_formats):
            raise ValueError(
                f"ptq_methods {self.ptq_methods} and ptq_formats {self.ptq_formats}: "
                "expected both or neither"
            )
        for share in self.ptq_at:
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                expected = "a share of training above 0 and at most 1"
                raise ValueError(expected_instead("ptq_at", expected, share))
        if not self.ptq_at:
            raise ValueError("ptq_at is empty: expected at least one share, such as 1.0")
        sequences = self.ptq_calibration
        if isinstance(sequences, bool) or not isinstance(sequences, int) or sequences < 1:
            expected = "a whole number of sequences, such as 32"
            raise ValueError(expected_instead("ptq_calibration", expected, sequences))
        quantizers = [Quantizer.of(text, "ptq_formats") for text in self.ptq_formats]
        for text, quantizer in zip(self.ptq_formats, quantizers, strict=True):
            if not quantizer.quantizes:
                raise ValueError(
                    f"ptq_formats: {text!r} quantizes nothing, expected such as 'int4'"
                )
        _check_different("ptq_methods", self.ptq_methods, self.ptq_methods)
        _check_different("ptq_formats", self.ptq_formats, [*map(str, quantizers)])
        _check_different("ptq_at", self.ptq_at, self.ptq_at)


def _as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(expected_instead(name, "a tuple", values))
    return tuple(values)


def _check_different(name: str, values: Sequence[Any], meanings: Sequence[Any]) -> None:
    """Raises ValueError where two values mean the same."""
    first: dict[Any, Any] = {}
    for value, meaning in zip(values, meanings, strict=True):
        if meaning in first:
            raise ValueError(f"{name}: {first[meaning]!r} and {value!r} are the same")
        first[meaning] = value
