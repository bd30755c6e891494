"""Which variants of a model are asked for: methods × formats, under a policy.

A policy says what is quantized: "w" the weights; "wa" weights and activations, these per token;
"kv" the cache alone, per token and head, which no method for weights has a say in. All three are
in the element format that is asked for. Formats whose blocks are part of them (those of OCP MX and
NVFP4) keep these everywhere; other blocks, scale methods and options are the weights' own.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from qat.policy import Policy
from qat.ptq import Method, check_quantizer
from qat.quantizer import Quantizer
from qat.spelling import expected_one_of
from qat.training.results import hash_of

POLICIES = ("w", "wa", "kv")

_RANGE = re.compile(r"(u?int)(\d+)(?:…|\.\.\.?|-|–)(?:\1)?(\d+)(/.*)?")
_ROUNDING = "rtn"  # of the cache, and where a method names none


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to quantize a model after training; all None is the model as it is.

    Attributes:
        method: of `qat.ptq`, or "none".
        weights: quantizer of the kernels.
        activations: quantizer of what enters them.
        kv_cache: quantizer of keys and values.
    """

    method: str = "none"
    weights: Quantizer | None = None
    activations: Quantizer | None = None
    kv_cache: Quantizer | None = None

    @classmethod
    def of(cls, policy: str, method: str, quantizer: Quantizer) -> "Variant":
        """The variant of a policy of `POLICIES`.

        Args:
            policy: what is quantized.
            method: of the weights.
            quantizer: of the weights; what else is quantized is so in its format.
        """
        if policy == "kv":
            return cls(_ROUNDING, kv_cache=_per_token(quantizer))
        activations = _per_token(quantizer) if policy == "wa" else None
        return cls(method, quantizer, activations)

    def resized(self, size: int | tuple[int, int] | None) -> "Variant":
        """With another size of all blocks."""

        def of(quantizer: Quantizer | None) -> Quantizer | None:
            if quantizer is None or quantizer.block_size is None:
                return quantizer
            return dataclasses.replace(quantizer, block_size=size)

        return Variant(self.method, of(self.weights), of(self.activations), of(self.kv_cache))

    @property
    def spellings(self) -> tuple[str, str, str, str]:
        """Method and quantizers as result rows have them."""
        quantizers = (self.weights, self.activations, self.kv_cache)
        weights, activations, kv_cache = (str(each) if each else "none" for each in quantizers)
        return self.method, weights, activations, kv_cache

    @property
    def needs_text(self) -> bool:
        """Whether the method has to see what the model computes."""
        return self.weights is not None and Method.parse(self.method).needs_data

    @property
    def file_name(self) -> str:
        """Without a suffix; codebooks may be longer than file systems allow."""
        name = re.sub(r"[^\w.+-]", "_", "-".join(self.spellings))
        return name if len(name) < 200 else f"{name[:150]}-{hash_of({'name': name})}"

    def __str__(self) -> str:
        if self == ORIGINAL:
            return "original"
        operands = Policy(self.weights, self.activations, self.kv_cache)
        return f"{self.method} {operands.description}"


ORIGINAL = Variant()


def variants(
    methods: Sequence[str], formats: Sequence[str], policies: Sequence[str]
) -> list[Variant]:
    """Every variant asked for, once, in order.

    Args:
        methods: of `qat.ptq`, steps joined by "+".
        formats: spellings of `qat.Quantizer`, and ranges of integers, "int2…int8"; weights are
            quantized per channel where it is not said how.
        policies: of `POLICIES`.

    Raises:
        ValueError: an unknown method, format or policy, or nothing is asked for.
    """
    for name, asked in (("methods", methods), ("formats", formats), ("policy", policies)):
        if not asked:
            raise ValueError(f"--{name} is empty: expected at least one")
    names = [_name(Method.parse(method)) for method in methods]
    for policy in policies:
        if policy not in POLICIES:
            raise ValueError(expected_one_of("policy", policy, POLICIES))
    quantizers = [_quantizer(each) for text in formats for each in spelled(text)]
    return _once(
        Variant.of(policy, method, quantizer)
        for policy in policies
        for method in names
        for quantizer in quantizers
    )


def listed(text: str) -> list[str]:
    """The parts of a list, at commas outside parentheses."""
    return re.split(r",(?![^(]*\))", text) if text else []


def spelled(text: str) -> list[str]:
    """The formats that a range such as "int2…int8" or "int2-8/block:32" stands for, or the text.

    Raises:
        ValueError: the range falls.
    """
    match = _RANGE.fullmatch(text.strip().lower())
    if match is None:
        return [text]
    kind, first, last, options = match.groups()
    if int(first) > int(last):
        raise ValueError(f"format range {text!r} falls: expected {kind}{last}…{kind}{first}")
    return [f"{kind}{bits}{options or ''}" for bits in range(int(first), int(last) + 1)]


def _name(method: Method) -> str:
    """The shortest spelling: a transformation alone rounds to nearest."""
    if method.transformations and method.rounding == _ROUNDING:
        return "+".join(method.transformations)
    return str(method)


def _quantizer(text: str) -> Quantizer:
    """Of weights: per channel unless the spelling says otherwise.

    Raises:
        ValueError: it is misspelt, or nothing that trained numbers are rounded by.
    """
    quantizer = Quantizer.parse(text)
    if quantizer.granularity == "tensor" and "tensor" not in text.lower().split("/"):
        quantizer = dataclasses.replace(quantizer, granularity="channel")
    check_quantizer(quantizer)
    return quantizer


def _per_token(quantizer: Quantizer) -> Quantizer:
    """The same format for activations or a cache."""
    if quantizer.scale_format is not None:
        return quantizer
    return Quantizer(quantizer.format, "token", zero_point=quantizer.zero_point)


def _once(found: Iterable[Variant]) -> list[Variant]:
    """Without those that are there twice."""
    return list({each.spellings: each for each in found}.values())
