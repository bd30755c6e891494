"""How fast a run is: time of a step, tokens and FLOPs a second, share of the devices' peak.

The clock is read where the loop reads its losses, which is when the steps up to there are done, so
that timing never makes a device wait. The first reading only starts the clock: what came before it
holds the compilation. The median over recent stretches is not moved by a checkpoint, an evaluation
or a busy machine now and then.

FLOPs are the analytic ones of the model (`qat.training.flops`), not those of a compiler, so that
recomputation and quantization count as time lost: this is model FLOP utilisation as Chowdhery et
al. (PaLM, arXiv 2204.02311) define it.
"""

import collections
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable

_STRETCHES = 20  # that the median is taken of
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a run is.

    Attributes:
        step_s: seconds of a step, the median.
        tokens_per_s: training tokens a second, over all devices.
        flops_per_s: model FLOPs a second, over all devices.
        utilisation: `flops_per_s` as a share of the devices' peak; None where that is unknown.
    """

    step_s: float
    tokens_per_s: float
    flops_per_s: float
    utilisation: float | None

    def __str__(self) -> str:
        """In a few words, as beside a progress bar."""
        words = [
            f"{1e3 * self.step_s:.3g} ms/step",
            f"{_short(self.tokens_per_s)}tokens/s",
            f"{_short(self.flops_per_s)}FLOP/s",
        ]
        if self.utilisation is not None:
            words.append(f"{self.utilisation:.1%} of peak")
        return ", ".join(words)


class Throughput:
    """Measures the speed of a run between the steps at which it logs.

    Args:
        tokens_per_step: tokens of a global batch.
        flops_per_step: analytic FLOPs of a step on them, forward and backward.
        peak_flops_per_s: of all devices together, as of `peak_of`; None if unknown.
        clock: seconds.
    """

    def __init__(
        self,
        tokens_per_step: int,
        flops_per_step: float,
        peak_flops_per_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_step, peak_flops_per_s
        self._clock = clock
        self._last: tuple[int, float] | None = None
        self._step_s: collections.deque[float] = collections.deque(maxlen=_STRETCHES)

    def at(self, step: int) -> Speed | None:
        """Reads the clock and says how fast the run is; None before the second reading.

        Args:
            step: steps taken. Where it is not above that of the last reading, as when a branch
                begins, the stretch between them is left out.
        """
        now = self._clock()
        if self._last is not None and step > self._last[0]:
            self._step_s.append((now - self._last[1]) / (step - self._last[0]))
        self._last = step, now
        if not self._step_s:
            return None
        step_s = statistics.median(self._step_s)
        flops_per_s = self._flops / step_s
        utilisation = None if self._peak is None else flops_per_s / self._peak
        return Speed(step_s, self._tokens / step_s, flops_per_s, utilisation)


def peak_of(
    device_kinds: Iterable[str], dtype: str, peak: Callable[[str, str], float | None]
) -> float | None:
    """Peak FLOPs a second of several devices together; None where that of one is unknown.

    Args:
        device_kinds: `jax.Device.device_kind` of each.
        dtype: in which matrices are multiplied, such as "bfloat16".
        peak: (device kind, dtype) → FLOPs a second of one device, or None.
    """
    peaks = [peak(kind, dtype) for kind in device_kinds]
    known = [each for each in peaks if each is not None]
    return sum(known) if peaks and len(known) == len(peaks) else None


def _short(number: float) -> str:
    """Three digits and a prefix, "1.23 M"."""
    for size, prefix in _PREFIXES:
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "
