"""Post-training quantization: one method a file, one door for all of them.

A method turns a weight and a quantizer into a `QTensor`. The door finds the weights: it walks
the model, takes every dense layer's kernel with the contraction axes that the layer itself
declares (never guessed from a shape), and reports every parameter, quantized or not, and why.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from qat.ptq.rtn import round_to_nearest
from qat.quantization import QTensor
from qat.quantizer import Quantizer
from qat.spelling import expected_instead, expected_one_of, nearest_few

Model = TypeVar("Model", bound=nnx.Module)
Method = Callable[[jax.Array, Quantizer, tuple[int, ...]], QTensor]

METHODS: dict[str, Method] = {"rtn": round_to_nearest}


@dataclasses.dataclass(frozen=True)
class ParameterReport:
    """What became of one parameter.

    Attributes:
        path: "/"-separated.
        quantized: whether its values changed.
        reason: the quantizer, or why the parameter was left alone.
        nbytes: of codes and scales, or of the parameter as it is.
        relative_error: root mean square error over root mean square; 0 if left alone.
    """

    path: str
    quantized: bool
    reason: str
    nbytes: int
    relative_error: float


def quantize(
    model: Model, method: str, quantizer: Quantizer | str, skip: str | None = None
) -> tuple[Model, list[ParameterReport]]:
    """Quantizes the weights of a trained NNX model.

    Args:
        model: any NNX module; it stays as it is.
        method: "rtn".
        quantizer: of the kernels, along their contraction axes, or its spelling.
        skip: regular expression; layers whose whole path matches stay unquantized. None skips none.

    Returns:
        A copy to be called as before, with dequantized values in its kernels, and a report of
        every parameter.

    Raises:
        ValueError: not an NNX module or a quantizer, unknown method, a `skip` that is no regular
            expression or matches no dense layer, or nothing to quantize.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(expected_instead("ptq.quantize", "an NNX module", model))
    quantizer = Quantizer.of(quantizer)
    if method not in METHODS:
        raise ValueError(expected_one_of("method", method, METHODS))
    copy = nnx.clone(model)
    layers = _dense_layers(copy)
    _check_skip(skip, layers)
    reports = [
        _quantize_parameter(path, parameter, layers, METHODS[method], quantizer, skip)
        for path, parameter in _parameters(copy)
    ]
    if not any(report.quantized for report in reports):
        raise ValueError(
            f"nothing to quantize: the model has {len(layers)} dense layers, skip is {skip!r}"
        )
    return copy, reports


def _check_skip(skip: str | None, layers: Iterable[str]) -> None:
    """Raises ValueError where `skip` is no pattern, or that of no layer."""
    if skip is None:
        return
    try:
        matches = [path for path in layers if re.fullmatch(skip, path)]
    except re.error as error:
        raise ValueError(f"skip {skip!r} is not a regular expression: {error}") from None
    if not matches:
        near = ", ".join(map(repr, nearest_few(skip, layers))) or "none at all"
        raise ValueError(f"skip {skip!r} matches no dense layer; nearest paths are {near}")


def _parameters(model: nnx.Module) -> list[tuple[str, nnx.Param[jax.Array]]]:
    """Parameters with the path of their layer and their own name."""
    nodes = nnx.iter_graph(model)
    return [("/".join(map(str, path)), node) for path, node in nodes if isinstance(node, nnx.Param)]


def _dense_layers(model: nnx.Module) -> dict[str, nnx.Linear | nnx.LinearGeneral]:
    """Dense layers by path."""
    nodes = nnx.iter_graph(model)
    dense = (nnx.Linear, nnx.LinearGeneral)
    return {"/".join(map(str, path)): node for path, node in nodes if isinstance(node, dense)}


def _quantize_parameter(
    path: str,
    parameter: nnx.Param[jax.Array],
    layers: dict[str, nnx.Linear | nnx.LinearGeneral],
    method: Method,
    quantizer: Quantizer,
    skip: str | None,
) -> ParameterReport:
    """Quantizes one parameter in place, if it is the kernel of a layer that is not skipped."""
    layer, _, name = path.rpartition("/")
    weight = parameter[...]
    if layer not in layers or name != "kernel":
        return ParameterReport(path, False, "not the kernel of a dense layer", weight.nbytes, 0.0)
    if skip is not None and re.fullmatch(skip, layer):
        return ParameterReport(path, False, f"skipped by {skip!r}", weight.nbytes, 0.0)
    stack, axes = _kernel_axes(layers[layer], weight.ndim)

    def quantize_kernel(kernel: jax.Array) -> QTensor:
        return method(kernel, quantizer, axes)

    for _ in range(stack):
        quantize_kernel = jax.vmap(quantize_kernel)
    qtensor = quantize_kernel(weight)
    parameter.set_value(qtensor.dequantize())
    error = _relative_error(weight, parameter[...])
    return ParameterReport(path, True, str(quantizer), qtensor.nbytes, error)


def _relative_error(weight: jax.Array, quantized: jax.Array) -> float:
    """Norm of the error over the norm of the weight, in float64 against overflow; 0 for 0/0."""
    exact, rounded = np.asarray(weight, np.float64), np.asarray(quantized, np.float64)
    error, size = np.linalg.norm(rounded - exact), np.linalg.norm(exact)
    return float(error / size) if size else float(error)


def _kernel_axes(layer: nnx.Linear | nnx.LinearGeneral, rank: int) -> tuple[int, tuple[int, ...]]:
    """Leading axes over which a kernel is stacked, and the contraction axes of one kernel."""
    inputs, outputs = np.size(layer.in_features), np.size(layer.out_features)
    return rank - inputs - outputs, tuple(range(inputs))
