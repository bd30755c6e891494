"""Post-training quantization: one method a file, one door for all of them.

A method is a pipeline: transformations that change no function (`smoothquant`, `awq`, `quarot`,
`llm_int8`), then one rounding (`rtn`, `gptq`, `hqq`), as in "quarot+gptq". The door takes any NNX
or Linen model. Given calibration batches it traces the model and finds every parameter that is
multiplied with activations, whatever layer holds it (`weights`); each is rounded when all before
it are, on inputs that came through them (`stream`). Without batches, as rounding to nearest needs
none, it takes the kernels of an NNX model's dense layers.

What a model quantizes itself, activations and cache, stays as its policy says and is seen by
calibration; quantizers of the weights that are rounded here are taken from it.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from qat.contractions import naming_layer
from qat.ptq.adapters import model_of
from qat.ptq.blocks import check_blocks
from qat.ptq.files import load, save
from qat.ptq.gptq import Gptq
from qat.ptq.methods import METHODS, Method, Settings, check_quantizer
from qat.ptq.model import Model
from qat.ptq.report import ParameterReport, left_alone
from qat.ptq.rounding import Rounding
from qat.ptq.stream import Stream, batches_of
from qat.ptq.transforming import Transformation
from qat.ptq.weights import Weight
from qat.quantizer import Quantizer
from qat.spelling import expected_instead, nearest_few

__all__ = [
    "METHODS",
    "Gptq",
    "Method",
    "ParameterReport",
    "Settings",
    "check_quantizer",
    "load",
    "quantize",
    "save",
    "transform",
]


def quantize(
    model: Any,
    method: str,
    quantizer: Quantizer | str,
    calibration: Iterable[Any] = (),
    skip: str | None = None,
    *,
    call: Callable[[Any, Any], Any] | None = None,
    settings: Settings | None = None,
) -> tuple[Any, list[ParameterReport]]:
    """Quantizes the weights of a trained model.

    Args:
        model: any NNX module, or a pair (Linen module, variables); it stays as it is.
        method: such as "rtn", "gptq", "awq" or "quarot+gptq".
        quantizer: of the weights, along their contraction axes, or its spelling; "int4" has one
            scale a weight, "int4/channel" one an output.
        calibration: inputs of the model, batches of one shape. "rtn" and "hqq" do without
            on an NNX model.
        skip: regular expression; layers whose whole path matches stay unquantized. None skips none.
        call: (model, batch) → anything, how a batch runs; None is ``model(batch)``.
        settings: numbers of the methods; None is `Settings()`.

    Returns:
        A copy to be called as before, a module or a pair as `model` was, with dequantized values in
        its weights, and a report of every parameter, which holds the codes.

    Raises:
        ValueError: not a model or a quantizer; unknown method; a method that cannot take the
            quantizer, or misses its calibration batches; batches of different shapes; a `skip` that
            is no regular expression or matches no layer; nothing to quantize; weights or inputs
            that are not finite.
    """
    ready = _ready(model, method, quantizer, calibration, skip, call, settings)
    subject, rounded = ready.rounding.apply(ready.model, ready.targets, ready.stream)
    reports = {
        report.path: _with_reason(report, ready.fixed.get(report.path)) for report in rounded
    }
    for path, value in subject.parameters.items():
        if path not in reports:
            reports[path] = left_alone(path, value, ready.reasons[path])
    return subject.result, [reports[path] for path in subject.parameters]


def transform(
    model: Any,
    method: str,
    quantizer: Quantizer | str,
    calibration: Iterable[Any] = (),
    skip: str | None = None,
    *,
    call: Callable[[Any, Any], Any] | None = None,
    settings: Settings | None = None,
) -> Any:
    """The model whose weights `quantize` rounds: it computes what the original does.

    Of methods that only round it has the original's parameters; other methods have scaled or
    rotated them. So what `quantize` returns less this is what rounding changed.

    Args and errors are those of `quantize`.

    Returns:
        A module or a pair, as `model` was; weights that are to be rounded have no quantizers.
    """
    return _ready(model, method, quantizer, calibration, skip, call, settings).model.result


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A model before its weights are rounded.

    Attributes:
        model: transformed.
        targets: weights to round, by path of their parameter.
        rounding: how.
        stream: of the model, with calibration; None without.
        reasons: why other parameters stay as they are.
        fixed: why the inputs of some targets are not transformed.
    """

    model: Model
    targets: dict[str, list[Weight]]
    rounding: Rounding
    stream: Stream | None
    reasons: dict[str, str]
    fixed: dict[str, str]


def _ready(
    model: Any,
    method: str,
    quantizer: Quantizer | str,
    calibration: Iterable[Any],
    skip: str | None,
    call: Callable[[Any, Any], Any] | None,
    settings: Settings | None,
) -> _Ready:
    """All that comes before rounding; see `quantize`."""
    quantizer, parsed = Quantizer.of(quantizer), Method.parse(method)
    check_quantizer(quantizer)
    settings = Settings() if settings is None else settings
    if not isinstance(settings, Settings):
        raise ValueError(expected_instead("settings", "a qat.ptq.Settings", settings))
    batches = list(batches_of(calibration))
    if parsed.needs_data and not batches:
        raise ValueError(
            f"method {method!r} looks at the inputs of layers: expected calibration=batches"
        )
    if isinstance(model, tuple) and not batches:
        raise ValueError(
            "a Linen model makes its layers when it runs: expected calibration=batches"
        )
    subject = model_of(model, call, batches[0] if batches else None)
    kept = _kept_layers(subject, skip)
    bare = subject.without_quantizers(
        [p for p in subject.parameters if p not in kept], ("weights",)
    )
    found, reasons = _find(bare, _stream_of(bare, batches))
    targets = {path: weights for path, weights in found.items() if path not in kept}
    _check(subject, quantizer, found, targets, skip, reasons)
    subject = subject.without_quantizers(targets, ("weights",))
    fixed = _not_transformed(subject, targets) if parsed.transformations else {}
    movable = {path: weights for path, weights in targets.items() if path not in fixed}
    for name in parsed.transformations:
        seen = _stream_of(subject.without_quantizers(movable, ("activations",)), batches)
        subject = Transformation(quantizer, settings).apply(name, subject, movable, seen)
    if parsed.transformations == ("quarot",):  # which may have reached them by the residual stream
        fixed = {path: reason for path, reason in fixed.items() if path not in subject.rotated}
    rounding = Rounding(parsed.rounding, quantizer, settings)
    reasons |= dict.fromkeys(kept & found.keys(), f"skipped by {skip!r}")
    return _Ready(subject, targets, rounding, _stream_of(subject, batches), reasons, fixed)


def _kept_layers(model: Model, skip: str | None) -> set[str]:
    """Parameters whose layer's whole path matches `skip`."""
    try:
        pattern = re.compile(skip or "")
    except re.error as error:
        raise ValueError(f"skip {skip!r} is not a regular expression: {error}") from None
    if skip is None:
        return set()
    return {path for path in model.parameters if pattern.fullmatch(path.rpartition("/")[0])}


def _stream_of(model: Model, batches: Sequence[Any]) -> Stream | None:
    return Stream(model.function(), model.parameters, batches) if batches else None


def _find(model: Model, stream: Stream | None) -> tuple[dict[str, list[Weight]], dict[str, str]]:
    """Weights by path of their parameter, and why other parameters are none."""
    found: dict[str, list[Weight]] = {}
    if stream is not None:
        for weight in stream.weights:
            found.setdefault(stream.path(weight), []).append(weight)
        return found, stream.reasons
    reasons = {}
    for path in model.parameters:
        weight_or_reason = model.declared(path)
        if isinstance(weight_or_reason, Weight):
            found[path] = [weight_or_reason]
        else:
            reasons[path] = weight_or_reason
    return found, reasons


def _not_transformed(model: Model, targets: Mapping[str, Sequence[Weight]]) -> dict[str, str]:
    """Why the inputs of some weights cannot be transformed, by path."""
    reasons = {}
    for path, (weight, *_) in targets.items():
        several = "its experts share a layer" if weight.batch else None
        if (reason := several or model.objection(path)) is not None:
            reasons[path] = f"inputs not transformed: {reason}"
    return reasons


def _with_reason(report: ParameterReport, more: str | None) -> ParameterReport:
    return dataclasses.replace(report, reason="; ".join(filter(None, (report.reason, more))))


def _check(
    model: Model,
    quantizer: Quantizer,
    found: Mapping[str, Any],
    targets: Mapping[str, Sequence[Weight]],
    skip: str | None,
    reasons: Mapping[str, str],
) -> None:
    """Raises ValueError where nothing is left to do, or a weight cannot be quantized."""
    layers = [path.rpartition("/")[0] for path in found]
    if skip is not None and len(targets) == len(found):
        near = ", ".join(map(repr, nearest_few(skip, layers))) or "none at all"
        raise ValueError(f"skip {skip!r} matches no dense layer; nearest paths are {near}")
    if not targets:
        others = "; ".join(f"{path}: {reason}" for path, reason in list(reasons.items())[:3])
        raise ValueError(
            f"nothing to quantize: the model has {len(layers)} dense layers, skip is {skip!r}"
            + (f"; {others}" if others else "")
        )
    for path in targets:
        with naming_layer(path.rpartition("/")[0]):
            if not bool(jnp.all(jnp.isfinite(model.parameters[path]))):
                raise ValueError("its weights are not finite")
    check_blocks(quantizer, {path: weight for path, (weight, *_) in targets.items()})
