"""What a quantizer is: format, granularity, where its scale comes from, how it rounds.

A `Quantizer` is a description; `qat.scales` reads its scale part and `qat.quantization` applies
it, in training and in storage alike, so the two cannot drift. Its format may be traced, and so
may the number it is given (`value`); everything else is structure and decides which program is
compiled.

Sources: OCP Microscaling Formats 1.0 (mxfp8, mxfp6, mxfp4, mxint8); NVIDIA's NVFP4; QLoRA (arXiv
2305.14314) for nf4; BitNet b1.58 (arXiv 2402.17764) for absmean; LSQ (arXiv 1902.08153) for
learned scales; QuEST (arXiv 2502.05003) for Gaussian scales and the trust estimator.
"""

import dataclasses
import re
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from qat.formats import Format, gaussian_clip, parse_format
from qat.grid import AnyGrid, Codebook
from qat.pytree import register_unchecked
from qat.spelling import expected_instead, expected_one_of, nearest

Granularity = Literal["tensor", "channel", "token", "block"]
ScaleMethod = Literal["absmax", "absmean", "percentile", "mse", "gaussian", "fixed", "learned"]
ScaleFormat = Literal["e8m0", "e4m3"]
Rounding = Literal["nearest", "stochastic"]
Gradient = Literal["identity", "clipped", "trust"]

_WITH_ZERO_POINT = ("absmax", "percentile", "mse", "fixed")
_WITH_VALUE = ("fixed", "learned", "gaussian")
_DEFAULT_PERCENTILE = 99.9
_STATIC: dict[str, Any] = {"static": True}
_NAMES = {
    "mxfp8": "e4m3/block:32/e8m0",
    "mxfp8e5m2": "e5m2/block:32/e8m0",
    "mxfp6": "e2m3/block:32/e8m0",
    "mxfp6e3m2": "e3m2/block:32/e8m0",
    "mxfp4": "e2m1/block:32/e8m0",
    "mxint8": "int8/block:32/e8m0",
    "nvfp4": "e2m1/block:16/e4m3",
    "nf4": "nf4/block:64",
}


@register_unchecked
@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How one operand is quantized.

    As a pytree its leaves are the format's numbers, once `traced`, and `value`.

    Attributes:
        format: a `Format`, its name, or a traced `Grid` or `Codebook`.
        granularity: which elements share a scale: "tensor", all; "channel" (of a weight) or
            "token" (of an activation or cache), those of one slice along the contraction axes;
            "block", `block_size` neighbours along the last contraction axis.
        block_size: for "block"; a pair also groups the last axis that is not contracted, as for
            square blocks of weights.
        scale: where the scale comes from. "absmax": the largest magnitude becomes the format's;
            "absmean": the mean magnitude becomes 1 (BitNet's); "percentile": that percentile of
            the magnitudes instead of the largest; "mse": the least squared error among 100
            shrunken ranges; "gaussian": the clip that is best for normal values, times their
            root mean square (`value`, if given, is that clip); "fixed": `value` is the largest
            magnitude; "learned": `value` is the scale, with LSQ's gradient.
        scale_format: None, float32; "e8m0", powers of two by the rule of OCP MX; "e4m3", NVFP4's
            two levels, with one float32 scale a tensor above them.
        zero_point: integers only: the range from the smallest to the largest value (and zero) is
            mapped to all codes, with an integer for zero. Without one, an unsigned format makes
            every negative value zero.
        rounding: "nearest", ties to even; "stochastic", which needs a key.
        gradient: straight-through estimator: "identity"; "clipped", zero outside the range;
            "trust", zero where the error exceeds half the format's largest step.
        percentile: for that scale, in percent.
        value: float32, scalar or of the scale's shape; for "fixed" with a zero point the pair
            (smallest, largest value). None for other scales, or where a layer supplies it: from
            training or, for "fixed", from calibration, before which its results are NaN. What is
            given as Python numbers or NumPy arrays is checked; JAX arrays are not looked at.

    Raises:
        ValueError: a field that is unknown, out of range, or at odds with another.
    """

    format: Format | AnyGrid
    granularity: Granularity = dataclasses.field(default="tensor", metadata=_STATIC)
    block_size: int | tuple[int, int] | None = dataclasses.field(default=None, metadata=_STATIC)
    scale: ScaleMethod = dataclasses.field(default="absmax", metadata=_STATIC)
    scale_format: ScaleFormat | None = dataclasses.field(default=None, metadata=_STATIC)
    zero_point: bool = dataclasses.field(default=False, metadata=_STATIC)
    rounding: Rounding = dataclasses.field(default="nearest", metadata=_STATIC)
    gradient: Gradient = dataclasses.field(default="identity", metadata=_STATIC)
    percentile: float = dataclasses.field(default=_DEFAULT_PERCENTILE, metadata=_STATIC)
    value: Any = None

    def __init__(
        self,
        format: Format | AnyGrid | str,
        granularity: Granularity = "tensor",
        block_size: int | tuple[int, int] | None = None,
        scale: ScaleMethod = "absmax",
        scale_format: ScaleFormat | None = None,
        zero_point: bool = False,
        rounding: Rounding = "nearest",
        gradient: Gradient = "identity",
        percentile: float = _DEFAULT_PERCENTILE,
        value: Any = None,
    ):
        """Checks and stores; a format name is parsed."""
        fields = dict(locals())
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, fields[field.name])
        if isinstance(format, str):
            object.__setattr__(self, "format", _format_alone(format))
        self._check()

    @classmethod
    def of(cls, quantizer: "Quantizer | str", what: str = "quantizer") -> "Quantizer":
        """The quantizer itself, or the one that is spelled: what every door takes.

        Args:
            quantizer: one, or what `parse` reads.
            what: it is for, in the error message.

        Raises:
            ValueError: neither, or as `parse`.
        """
        if isinstance(quantizer, str):
            return cls.parse(quantizer)
        if not isinstance(quantizer, cls):
            expected = "a Quantizer or its spelling, such as 'int4/channel'"
            raise ValueError(expected_instead(what, expected, quantizer))
        return quantizer

    @classmethod
    def parse(cls, text: str) -> "Quantizer":
        """Reads "FORMAT" and any of its options, such as "int4/block:128/mse".

        After the format, in any order, separated by "/": a granularity (``channel``,
        ``block:32``, ``block:128x128``), a scale method (``mse``, ``percentile:99.5``), a scale
        format (``e8m0``, ``e4m3``), ``zero_point``, ``stochastic``, ``clipped`` or ``trust``.
        Whole quantizers by name, which may be followed by options too: ``mxfp8``, ``mxfp8e5m2``,
        ``mxfp6``, ``mxfp6e3m2``, ``mxfp4``, ``mxint8``, ``nvfp4`` and ``nf4`` (blocks of 64).

        Raises:
            ValueError: unknown word, with the nearest valid spelling.
        """
        if not isinstance(text, str):
            raise ValueError(expected_instead("quantizer", "text, such as 'int4/channel'", text))
        name, *options = text.strip().lower().split("/")
        parts = _NAMES.get(name, name).split("/")
        if parts[1:] and any(option.partition(":")[0] in _GRANULARITIES for option in options):
            parts = [parts[0], *(p for p in parts[1:] if not p.startswith("block"))]
        if any(format_ in options for format_ in get_args(ScaleFormat)):
            parts = [parts[0], *(p for p in parts[1:] if p not in get_args(ScaleFormat))]
        fields: dict[str, Any] = {}
        for option in [*parts[1:], *options]:
            new = _parsed_option(option, text)
            if repeated := sorted(new.keys() & fields.keys()):
                raise ValueError(f"quantizer {text!r}: {repeated[0]} is given twice")
            fields |= new
        return cls(_parsed_format(parts[0]), **fields)

    @property
    def grid(self) -> AnyGrid:
        """The format's values as arrays."""
        return self.format.grid() if isinstance(self.format, Format) else self.format

    def traced(self) -> "Quantizer":
        """The same quantizer with its format and its number as data: what a model's state holds."""
        value = self.value
        if self.scale == "gaussian" and value is None and isinstance(self.format, Format):
            value = gaussian_clip(self.format)
        value = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), value)
        return dataclasses.replace(self, format=self.grid, value=value)

    @property
    def bits(self) -> float:
        """Bits per element as laws and result rows count them: 16 means unquantized."""
        fmt = self.host_format()
        return fmt.bits if fmt.quantizes else 16.0

    def host_format(self) -> Format:
        """The format, where it is known on the host.

        Raises:
            ValueError: the format is traced: it has numbers but no name.
        """
        if not isinstance(self.format, Format):
            raise ValueError("this needs a named Format, got a traced grid")
        return self.format

    @property
    def structure(self) -> str:
        """All but the format, in the words that `parse` reads."""
        size = self.block_size
        block = "x".join(map(str, size)) if isinstance(size, tuple) else str(size)
        percent = np.format_float_positional(self.percentile, trim="-")
        method = f"percentile:{percent}" if self.scale == "percentile" else self.scale
        parts = [
            f"block:{block}" if self.granularity == "block" else self.granularity,
            self.scale_format,
            method if self.scale != "absmax" else None,
            "zero_point" if self.zero_point else None,
            self.rounding if self.rounding != "nearest" else None,
            self.gradient if self.gradient != "identity" else None,
        ]
        return "/".join(part for part in parts if part)

    @property
    def program(self) -> str:
        """All that is compiled into a program: of the format, whether it is a codebook."""
        levels = self.format.levels if isinstance(self.format, Format | Codebook) else None
        size = None if levels is None else np.shape(levels)[-1]
        return self.structure if size is None else f"{size}-level codebook/{self.structure}"

    @property
    def quantizes(self) -> bool:
        """Whether it changes its operand; a traced format may."""
        return not isinstance(self.format, Format) or self.format.quantizes

    def __str__(self) -> str:
        """The spelling that `parse` reads, without `value`; a traced format is "traced"."""
        named = isinstance(self.format, Format)
        spelling = f"{self.format if named else 'traced'}/{self.structure}"
        return _NAME_OF.get(spelling, spelling)

    def _check(self) -> None:
        """Raises ValueError where a field is unknown or fields contradict each other."""
        if not isinstance(self.format, Format | AnyGrid):
            expected = "a Format, its name such as 'int4', or a traced grid"
            raise ValueError(expected_instead("format", expected, self.format))
        for field, options in _OPTIONS.items():
            word = getattr(self, field)
            if word not in options and (word is not None or field != "scale_format"):
                raise ValueError(expected_one_of(field.replace("_", " "), word, options))
        if (self.granularity == "block") != (self.block_size is not None):
            raise ValueError(
                f"granularity {self.granularity!r} with block_size {self.block_size}: "
                "a block size goes with granularity 'block', as in 'int4/block:32'"
            )
        if self.block_size is not None and not _is_block_size(self.block_size):
            expected = "an integer above 0, or a pair of them as (128, 128)"
            raise ValueError(expected_instead("block_size", expected, self.block_size))
        if not _is_number(self.percentile) or not 0 < self.percentile <= 100:
            expected = "a number above 0, at most 100"
            raise ValueError(expected_instead("percentile", expected, self.percentile))
        if self.percentile != _DEFAULT_PERCENTILE and self.scale != "percentile":
            raise ValueError(f"percentile {self.percentile} with scale {self.scale!r}: {_UNUSED}")
        if self.scale == "learned" and self.scale_format is not None:
            raise ValueError(f"a learned scale is float32, got scale format {self.scale_format!r}")
        if self.scale == "learned" and self.gradient != "identity":
            raise ValueError(f"a learned scale has LSQ's gradient, got {self.gradient!r}")
        if not isinstance(self.zero_point, bool):
            raise ValueError(expected_instead("zero_point", "True or False", self.zero_point))
        if self.zero_point:
            self._check_zero_point()
        if self.value is not None:
            self._check_value()

    def _check_zero_point(self) -> None:
        if isinstance(self.format, Format) and not (
            self.format.is_integer or not self.format.scaled
        ):
            raise ValueError(
                f"zero_point with format {self.format}: only integers can be shifted; "
                f"nearest is 'uint{max(1, round(self.format.bits))}'"
            )
        if self.scale not in _WITH_ZERO_POINT or self.scale_format is not None:
            raise ValueError(
                f"zero_point with scale {self.scale!r} and scale format {self.scale_format!r}: "
                f"expected one of {', '.join(_WITH_ZERO_POINT)}, and float32 scales"
            )

    def _check_value(self) -> None:
        """Raises ValueError for a number that has no use or, known on the host, no meaning."""
        if self.scale not in _WITH_VALUE:
            used = ", ".join(_WITH_VALUE)
            raise ValueError(f"value with scale {self.scale!r}: expected scale {used}, or no value")
        pair = self.scale == "fixed" and self.zero_point
        ends = self._ends_on_host(pair)
        if ends is None:
            return
        if isinstance(self.format, Format) and not self.format.scaled:
            raise ValueError(f"value with format {self.format}, which has no scale: expected None")
        low, high = ends if pair else (0.0, ends[0])
        if not np.all(np.isfinite(low) & np.isfinite(high) & (low < high)):
            expected = "(smallest, largest) in that order" if pair else "finite numbers above 0"
            raise ValueError(
                expected_instead(f"value of a {self.scale} scale", expected, self.value)
            )

    def _ends_on_host(self, pair: bool) -> list[Any] | None:
        """`value` as one float64 array, or two; None where a part of it is JAX's."""
        if not all(map(_is_on_host, jax.tree.leaves(self.value))):
            return None
        try:
            ends = [np.asarray(end, np.float64) for end in (self.value if pair else [self.value])]
        except (TypeError, ValueError):
            ends = []
        if len(ends) != 1 + pair:
            expected = "a pair (smallest, largest)" if pair else "a number, or an array of them"
            raise ValueError(
                expected_instead(f"value of a {self.scale} scale", expected, self.value)
            )
        return ends


_UNUSED = "expected scale 'percentile', as in 'int4/percentile:99.5'"
_NAME_OF = {spelling: name for name, spelling in _NAMES.items()}
_GRANULARITIES = get_args(Granularity)
_OPTIONS: dict[str, tuple[str, ...]] = {
    "granularity": _GRANULARITIES,
    "scale": get_args(ScaleMethod),
    "scale_format": get_args(ScaleFormat),
    "rounding": get_args(Rounding),
    "gradient": get_args(Gradient),
}
_FIELD_OF = {word: field for field, words in _OPTIONS.items() for word in words}
_BLOCK = re.compile(r"block:(\d+)(?:x(\d+))?")
_PERCENTILE = re.compile(r"percentile:(\d+(?:\.\d+)?)")


def _parsed_option(option: str, text: str) -> dict[str, Any]:
    """The fields that one word of a spelling sets."""
    if match := _BLOCK.fullmatch(option):
        size = (int(match[1]), int(match[2])) if match[2] else int(match[1])
        return {"granularity": "block", "block_size": size}
    if match := _PERCENTILE.fullmatch(option):
        return {"scale": "percentile", "percentile": float(match[1])}
    if option == "zero_point":
        return {"zero_point": True}
    if option in _FIELD_OF and option != "block":
        return {_FIELD_OF[option]: option}
    words = ["block:32", "percentile:99.9", "zero_point", *_FIELD_OF]
    words.remove("block")
    raise ValueError(f"quantizer {text!r}: {expected_one_of('option', option, words)}")


def _parsed_format(name: str) -> Format:
    try:
        return parse_format(name)
    except ValueError as error:
        closest = nearest(name, _NAMES)
        if closest[:2] == name[:2].lower():
            raise ValueError(
                f"unknown format or quantizer {name!r}; nearest is {closest!r}"
            ) from error
        raise


def _format_alone(name: str) -> Format:
    """A format by name, where a whole quantizer is not expected."""
    if "/" in name or name.strip().lower() in _NAMES.keys() - {"nf4"}:
        raise ValueError(f"format {name!r} is a whole quantizer: Quantizer.parse reads it")
    return parse_format(name)


def _is_block_size(size: Any) -> bool:
    sizes = size if isinstance(size, tuple) and len(size) == 2 else (size,)
    return all(type(n) is int and n > 0 for n in sizes)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _is_on_host(leaf: Any) -> bool:
    """Whether a number is the caller's; JAX's constants in a trace are a subclass of arrays."""
    return isinstance(leaf, int | float | str | np.generic) or type(leaf) is np.ndarray
