"""Quantization in NumPy, written from the specifications: lists of values and explicit loops.

It shares nothing with `qat`. A format is the sorted list of its values, decoded from the bit
patterns that the standards describe; rounding searches that list; scales are computed by a loop
over groups. All is float64, but for the three steps that are *defined* in float32: the product
with a reciprocal, the 20-bit scale, and the final product (which XLA on CPU flushes to zero below
the smallest normal number, as is done here).

Sources: OCP 8-bit Floating Point Specification 1.0, OCP Microscaling Formats 1.0, IEEE 754-2019,
NVIDIA's description of NVFP4, QLoRA (arXiv 2305.14314), BitNet b1.58 (2402.17764), LSQ
(1902.08153), QuEST (2502.05003).
"""

import dataclasses
import functools
import itertools
import math
import re

import ml_dtypes
import numpy as np
from scipy.stats import norm

from tests.gaussian_oracle import gaussian_clip

SMALLEST, LARGEST = 2.0**-126, 2.0**126  # of scales; the smallest normal number of float32 too
WIDE = {"bf16": (ml_dtypes.bfloat16, 0x7F80), "fp16": (np.float16, 0x7C00)}  # infinity's bits
BIASES = {"e4m3fnuz": 8, "e4m3b11fnuz": 11, "e5m2fnuz": 16}  # of formats without negative zero
NF4 = (  # as published, in float32
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NAMES = {  # name: element format, block, scale format
    "mxfp8": ("e4m3", 32, "e8m0"),
    "mxfp8e5m2": ("e5m2", 32, "e8m0"),
    "mxfp6": ("e2m3", 32, "e8m0"),
    "mxfp6e3m2": ("e3m2", 32, "e8m0"),
    "mxfp4": ("e2m1", 32, "e8m0"),
    "mxint8": ("int8", 32, "e8m0"),
    "nvfp4": ("e2m1", 16, "e4m3"),
    "nf4": ("nf4", 64, None),
}


@dataclasses.dataclass(frozen=True)
class Values:
    """A format: its values in rising order, float64, and the integer code of each."""

    values: np.ndarray
    codes: np.ndarray
    scaled: bool = True

    @property
    def highest(self):
        return self.values[-1]

    @property
    def lowest(self):
        return self.values[0]

    @property
    def largest_step(self):
        return np.diff(self.values)[-1] if self.values.size > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Spec:
    """What to do, in the words of a quantizer; `levels` for a format without a name."""

    format: str
    granularity: str = "tensor"
    block_size: int | tuple[int, int] | None = None
    scale: str = "absmax"
    scale_format: str | None = None
    zero_point: bool = False
    percentile: float = 99.9
    value: object = None
    levels: tuple[float, ...] | None = None
    up: bool = False  # scales rounded up, as under stochastic rounding

    @property
    def values(self):
        return from_levels(self.levels) if self.levels else values_of(self.format)

    @classmethod
    def named(cls, name, **changes):
        element, block, scale_format = NAMES[name]
        return cls(element, "block", block, scale_format=scale_format, **changes)


@dataclasses.dataclass
class Result:
    """Values in the input's dtype; codes; scale (applied), zero point and tensor scale by group."""

    values: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    tensor_scale: float | None


def from_levels(levels):
    """A codebook: codes are positions."""
    values = np.sort(np.asarray(levels, np.float32)).astype(np.float64)
    return Values(values, np.arange(values.size))


@functools.cache
def values_of(name):
    """The values of a format by its name."""
    if name in ("binary", "int1"):
        return Values(np.array([-1.0, 1.0]), np.array([-1, 1]))
    if name == "ternary":
        return Values(np.array([-1.0, 0.0, 1.0]), np.array([-1, 0, 1]))
    if name == "nf4":
        return from_levels(NF4)
    if match := re.fullmatch(r"(u?)int(\d+)(full)?", name):
        unsigned, bits, full = bool(match[1]), int(match[2]), bool(match[3])
        high = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
        low = 0 if unsigned else -high - full
        return Values(np.arange(low, high + 1.0), np.arange(low, high + 1))
    if name in WIDE:
        dtype, infinity = WIDE[name]
        patterns = np.arange(infinity, dtype=np.uint16)
        return _signed(patterns.view(dtype).astype(np.float64), scaled=False)
    return _float(name)


def _float(name):
    """ExMy: every bit pattern of exponent and mantissa, decoded."""
    x, y, suffix = re.fullmatch(r"e(\d)m(\d+)(\w*)", name).groups()
    x, y = int(x), int(y)
    bias = BIASES.get(name, 2 ** (x - 1) - 1)
    patterns = np.arange(2 ** (x + y))
    exponent, mantissa = patterns >> y, patterns & (2**y - 1)
    values = np.where(
        exponent == 0,
        np.ldexp(mantissa / 2**y, 1 - bias),
        np.ldexp(1 + mantissa / 2**y, np.minimum(exponent - bias, 1000)),
    )
    if suffix == "ieee" or name == "e5m2":  # the topmost exponent is for infinity and NaN
        values = values[exponent < 2**x - 1]
    if name == "e4m3":  # OCP: the topmost pattern alone is NaN
        values = values[:-1]
    values = values[values < 2.0**128]  # eight exponent bits end where float32 does
    return _signed(values, scaled=x < 8)


def _signed(magnitudes, scaled):
    """Both signs of rising magnitudes from zero; a code is the signed position."""
    position = np.arange(magnitudes.size)
    return Values(
        np.concatenate([-magnitudes[:0:-1], magnitudes]),
        np.concatenate([-position[:0:-1], position]),
        scaled,
    )


def nf4_by_its_formula():
    """QLoRA's NormalFloat: 8 positive and 7 negative quantiles of the normal, and zero."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2  # 0.9677083, as its authors publish it
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    return tuple(levels / levels.max())


def nearest(y, fmt):
    """(values, codes) nearest to y; ties to the even code; NaN stays, with the code 0."""
    y = np.asarray(y, np.float64)
    below = np.clip(np.searchsorted(fmt.values, y, side="right") - 1, 0, fmt.values.size - 2)
    low, high = fmt.values[below], fmt.values[below + 1]
    middle = (low + high) / 2
    upper_is_even = fmt.codes[below + 1] % 2 == 0
    if (fmt.codes % 2 != 0).all():  # binary: the sign
        upper_is_even = ~np.signbit(y)
    up = (y > middle) | ((y == middle) & upper_is_even)
    index = below + up
    bad = np.isnan(y)
    return np.where(bad, np.nan, fmt.values[index]), np.where(bad, 0, fmt.codes[index])


def neighbours(y, fmt):
    """The largest value not above y and the smallest not below, of values inside the range."""
    y = np.clip(np.asarray(y, np.float64), fmt.lowest, fmt.highest)
    low = fmt.values[np.searchsorted(fmt.values, y, side="right") - 1]
    high = fmt.values[np.searchsorted(fmt.values, y, side="left")]
    return low, high


def groups(shape, spec, axis):
    """Index tuples of the groups that share a scale, with the position of each group's scale."""
    axes = {a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))}
    tile = [n if a in axes else 1 for a, n in enumerate(shape)]
    if spec.granularity == "tensor" or not axes:
        tile = list(shape)
    elif spec.granularity == "block":
        order = [a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))]
        tile = [1] * len(shape)
        sizes = spec.block_size if isinstance(spec.block_size, tuple) else (spec.block_size,)
        kept = [a for a in range(len(shape)) if a not in axes]
        for a, size in zip((order[-1], *kept[-1:]), sizes, strict=False):
            tile[a] = size
    counts = [1 if n == t else n // t for n, t in zip(shape, tile, strict=True)]
    for position in itertools.product(*(range(c) for c in counts)):
        yield (
            position,
            tuple(slice(p * t, (p + 1) * t) for p, t in zip(position, tile, strict=True)),
        )


def scale_shape(shape, spec, axis):
    positions = [p for p, _ in groups(shape, spec, axis)]
    return tuple(max(p[a] for p in positions) + 1 for a in range(len(shape)))


def short(scale, up=False):
    """A positive number to 20 significant bits, nearest even or up, within 2**±126."""
    if not np.isfinite(scale):
        return scale
    fraction, exponent = math.frexp(scale)
    whole = math.ceil(fraction * 2**20) if up else round(fraction * 2**20)
    return min(max(math.ldexp(whole, exponent - 20), SMALLEST), LARGEST)


def times_reciprocal(x, divisor):
    """x · (1 / divisor), two float32 operations, subnormal results flushed."""
    with np.errstate(all="ignore"):
        product = np.float32(x) * (np.float32(1) / np.float32(divisor))
    return flushed(product).astype(np.float64)


def flushed(x):
    """Zeros for what is below float32's smallest normal number."""
    x = np.asarray(x)
    return np.where(np.abs(x) < x.dtype.type(SMALLEST), np.copysign(x.dtype.type(0), x), x)


def magnitudes(x, fmt):
    """max(x, -x · highest / -lowest): how far each value reaches towards an end of the format."""
    ratio = 0.0 if fmt.lowest >= 0 else np.float32(fmt.highest) / np.float32(-fmt.lowest)
    return np.maximum(x, (-np.float32(x)) * np.float32(ratio)).astype(np.float64)


def float32_scale(amax, fmt, up=False):
    """amax · (1 / highest) in float32, then 20 bits."""
    return short(float(times_reciprocal(amax, fmt.highest)), up)


def e8m0_scale(amax, fmt, up=False):
    """OCP MX: 2**(floor(log2 amax) - floor(log2 highest)); up: the least that clips nothing."""
    if amax < SMALLEST:
        return SMALLEST
    exponent = (math.frexp(amax)[1] - 1) - (math.frexp(fmt.highest)[1] - 1)
    if up and amax > math.ldexp(fmt.highest, exponent):
        exponent += 1
    return min(max(math.ldexp(1.0, exponent), SMALLEST), LARGEST)


def nvfp4_scales(amaxes, fmt, up=False):
    """(block scales, which are e4m3 values of at least 2**-6, tensor scale)."""
    e4m3 = values_of("e4m3")
    ideal = [float(times_reciprocal(amax, fmt.highest)) for amax in amaxes]
    tensor_scale = short(float(times_reciprocal(max(ideal, default=0.0), 448)), up)
    tensor_scale = max(tensor_scale, 2.0**-120)
    wanted = times_reciprocal(np.array(ideal), tensor_scale)
    blocks = neighbours(wanted, e4m3)[1] if up else nearest(wanted, e4m3)[0]
    return np.maximum(blocks, 2.0**-6), tensor_scale


def amax_of(x, spec):
    """What the largest value of the format stands for in a finite float32 group, float64."""
    fmt, reach = spec.values, magnitudes(x, spec.values)
    amax = float(reach.max(initial=0.0))
    if spec.scale == "absmax":
        return amax
    if spec.scale == "percentile":
        return percentile(reach, spec.percentile)
    if spec.scale == "absmean":
        return float(np.abs(x.astype(np.float64)).mean()) * fmt.highest
    if spec.scale == "gaussian":
        return gaussian_clip(fmt) * math.sqrt(np.square(x.astype(np.float64)).mean())
    if spec.scale == "fixed":
        return float(spec.value)
    raise ValueError(spec.scale)


def percentile(values, percent):
    """By linear interpolation between order statistics, on the sorted list."""
    ordered = np.sort(np.asarray(values, np.float64), axis=None)
    place = percent / 100 * (ordered.size - 1)
    below = math.floor(place)
    above = min(below + 1, ordered.size - 1)
    return float(ordered[below] + (place - below) * (ordered[above] - ordered[below]))


def shifted(low, high, spec):
    """Scale and zero point that map low … high to all codes, both ends included.

    Where both ends lie half-way between integers, rounding would lose one code, and quantizing
    twice would shrink the range: then the next smaller scale is taken.
    """
    fmt = spec.values
    steps = fmt.highest - fmt.lowest
    span = np.float32(high) - np.float32(low)
    scale = short(float(times_reciprocal(span, steps)))
    if np.rint(times_reciprocal(high, scale)) - np.rint(times_reciprocal(low, scale)) < steps:
        fraction, exponent = math.frexp(scale)
        bits = 21 if fraction == 0.5 else 20  # numbers lie twice as close below a power of two
        scale = max(math.ldexp(fraction * 2**bits - 1, exponent - bits), SMALLEST)
    return scale, fmt.lowest - float(np.rint(times_reciprocal(low, scale)))


def range_of(x, spec):
    """(low, high) of a finite group, with zero between them."""
    low, high = min(float(x.min(initial=0)), 0.0), max(float(x.max(initial=0)), 0.0)
    if spec.scale == "percentile":
        low = min(max(percentile(x, 100 - spec.percentile), low), 0.0)
        high = max(min(percentile(x, spec.percentile), high), 0.0)
    elif spec.scale == "fixed":
        low, high = (float(end) for end in spec.value)
    return low, high


def scales(x, spec, axis):
    """(scale, zero point, tensor scale), float64 arrays of one number a group; NaN if poisoned."""
    x = flushed(np.asarray(x, np.float32))
    fmt = spec.values
    shape = scale_shape(x.shape, spec, axis)
    scale, zero_point, amaxes = np.ones(shape), np.zeros(shape), np.zeros(shape)
    for position, index in groups(x.shape, spec, axis):
        group = x[index]
        if not fmt.scaled:
            continue
        if spec.scale != "fixed" and not np.isfinite(group).all():
            scale[position] = np.nan
        elif spec.zero_point:
            scale[position], zero_point[position] = shifted(*range_of(group, spec), spec)
        else:
            amaxes[position] = amax_of(group, spec)
            rule = e8m0_scale if spec.scale_format == "e8m0" else float32_scale
            scale[position] = rule(amaxes[position], fmt, spec.up)
    if spec.scale_format != "e4m3" or not fmt.scaled:
        return scale, zero_point, None
    blocks, tensor_scale = nvfp4_scales(amaxes.ravel(), fmt, spec.up)
    return np.where(np.isnan(scale), scale, blocks.reshape(shape)), zero_point, tensor_scale


def quantize(x, spec, axis, given=None):
    """Quantizes by loops over the groups.

    Args:
        x: array, float32 or bfloat16.
        spec: what to do.
        axis: contraction axis or a tuple of them.
        given: (scale, zero point, tensor scale) to use instead of `scales`.
    """
    dtype, shape = np.asarray(x).dtype, np.shape(x)
    scale, zero_point, tensor_scale = given or scales(x, spec, axis)
    x = flushed(np.asarray(x, np.float32))
    values, codes = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    for position, index in groups(shape, spec, axis):
        applied = scale[position] * (1.0 if tensor_scale is None else tensor_scale)
        y = times_reciprocal(x[index], applied)
        shift = zero_point[position]  # added to integers, as ONNX's QuantizeLinear has it
        value, code = nearest(np.rint(y) + shift if spec.zero_point else y, spec.values)
        with np.errstate(all="ignore"):
            values[index] = np.float32(value - shift) * np.float32(applied)
        codes[index] = code
    with np.errstate(invalid="ignore"):  # NaN to bfloat16
        return Result(flushed(values).astype(dtype), codes, scale, zero_point, tensor_scale)
