"""A method by name: equivalent transformations, which change no function, then one rounding.

"quarot+gptq" rotates inputs and weights and then rounds by GPTQ; a transformation alone rounds to
nearest. They compose since a transformation hands on a model that computes what it did before.
"""

import dataclasses
import math

from qat.calibration import needs_value
from qat.ptq.gptq import Gptq
from qat.ptq.rtn import prepared
from qat.quantizer import Quantizer
from qat.spelling import expected_instead, expected_one_of

TRANSFORMATIONS = ("smoothquant", "awq", "quarot", "llm_int8")
ROUNDINGS = ("rtn", "gptq", "hqq")
METHODS = (*ROUNDINGS, *TRANSFORMATIONS)
NEED_DATA = ("gptq", *TRANSFORMATIONS)  # whose layers are found in a trace

_LAST = "llm_int8"  # it names inputs, which other transformations would mix


@dataclasses.dataclass(frozen=True)
class Settings:
    """Numbers of the methods; the defaults are those of their papers.

    Attributes:
        gptq: damping, order and blocks.
        smoothing: SmoothQuant's alpha between 0, all range stays in the activations, and 1.
        outliers: magnitude from which LLM.int8() leaves an input unquantized.
        seed: of QuaRot's random signs.
    """

    gptq: Gptq = dataclasses.field(default_factory=Gptq)
    smoothing: float = 0.5
    outliers: float = 6.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks."""
        if not isinstance(self.gptq, Gptq):
            raise ValueError(expected_instead("gptq", "a qat.ptq.Gptq", self.gptq))
        if not 0 <= self.smoothing <= 1:
            raise ValueError(expected_instead("smoothing", "between 0 and 1", self.smoothing))
        if not self.outliers > 0:
            raise ValueError(expected_instead("outliers", "a magnitude above 0", self.outliers))


@dataclasses.dataclass(frozen=True)
class Method:
    """A parsed method.

    Attributes:
        transformations: in the order in which they are applied.
        rounding: what rounds in the end.
    """

    transformations: tuple[str, ...]
    rounding: str

    @classmethod
    def parse(cls, text: str) -> "Method":
        """Reads names joined by "+".

        Raises:
            ValueError: an unknown name, one named twice, or a rounding that is not the last.
        """
        if not isinstance(text, str):
            raise ValueError(expected_instead("method", "a name such as 'gptq'", text))
        names = text.strip().lower().split("+")
        for name in names:
            if name not in METHODS:
                raise ValueError(expected_one_of("method", name, METHODS))
            if names.count(name) > 1:
                raise ValueError(f"method {text!r} names {name!r} twice")
        rounding = names.pop() if names[-1] in ROUNDINGS else "rtn"
        early = [name for name in names if name in ROUNDINGS]
        if early:
            rest = "+".join([name for name in names if name not in ROUNDINGS] + early[:1])
            raise ValueError(f"method {text!r}: one rounding comes last; nearest is {rest!r}")
        if _LAST in names[:-1]:
            rest = "+".join([*(name for name in names if name != _LAST), _LAST])
            raise ValueError(
                f"method {text!r}: {_LAST} follows what moves inputs; nearest is {rest!r}"
            )
        return cls(tuple(names), rounding)

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration batches."""
        return any(name in NEED_DATA for name in (*self.transformations, self.rounding))

    def __str__(self) -> str:
        """The spelling that `parse` reads."""
        return "+".join((*self.transformations, self.rounding))


def check_quantizer(quantizer: Quantizer) -> None:
    """Looks for what no method can do to trained weights, whatever they are.

    Raises:
        ValueError: a quantizer that changes nothing, is to be trained, has no number for its scale
            or no negative values, or rounds stochastically.
    """
    fmt, spelling = quantizer.host_format(), str(quantizer)
    if not fmt.quantizes:
        raise ValueError(f"quantizer {spelling!r} leaves weights as they are")
    prepared(quantizer)
    if quantizer.scale == "learned" or needs_value(quantizer):
        nearest = dataclasses.replace(quantizer, scale="mse", value=None)
        wants = "is trained" if quantizer.scale == "learned" else "needs its value"
        raise ValueError(
            f"quantizer {spelling!r}: a {quantizer.scale} scale {wants}; nearest is "
            f"{str(nearest)!r}"
        )
    if fmt.lowest >= 0 and not quantizer.zero_point:
        signed = fmt.name if fmt.is_integer else f"int{max(2, math.ceil(fmt.bits))}"
        nearest = Quantizer(
            signed, quantizer.granularity, quantizer.block_size, zero_point=fmt.is_integer
        )
        raise ValueError(
            f"quantizer {spelling!r} would make every negative weight 0; nearest is "
            f"{str(nearest)!r}"
        )
