"""What the layer benchmark compares, and of it plain Flax and ours; see also `others`.

Of a model and a scheme, a library makes a `Contender`: parameters and a pure function of them.
Loss, optimizer and training step are then the same for everybody.

What the libraries do is not the same arithmetic. Ours rounds in float32 and multiplies in float32,
forward and backward, with one scale for a whole tensor of activations. Qwix and AQT multiply
integers forward and unrounded values backward, with a scale for each token; with rounded gradients
they multiply integers backward too, and Qwix then draws one random number for each index of the
first axis, where ours and AQT draw one for each element. These are everyone's defaults; the schemes
"w8a8-token" and "sr-element" take the differences away.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

import qat
import qat.nnx
from launch.benchmarks.models import Workload
from qat.policy import Policy
from qat.quantizer import Quantizer

# Maps parameters, constants, a noise key and inputs to outputs.
Apply = Callable[[Any, Any, jax.Array, jax.Array], jax.Array]

SCHEMES = {
    "off": "our layers without a policy: they flatten batches to matrices, as Flax does not",
    "none": "our layers with formats that quantize nothing",
    "w8a8": "int8 weights and activations",
    "w8a8-token": "the same, with a scale for each token, as Qwix and AQT have in every scheme",
    "w4a8": "int4 weights, int8 activations",
    "w3a8": "int3 weights, int8 activations",
    "e4m3": "e4m3 weights and activations",
    "block128": "int4 weights, a scale for each 128 along the contraction; int8 activations",
    "nf4": "NF4 weights, a scale for each 64 along the contraction",
    "sr": "w8a8, and gradients rounded to int8 stochastically",
    "sr-element": "the same, with a random number for each element, as ours and AQT have in sr",
}
# Schemes that are for one library alone.
ONLY = {"off": "ours", "none": "ours", "w8a8-token": "ours", "sr-element": "qwix"}
COUNTED_BITS = range(2, 9)

BLOCK, NF4_BLOCK = 128, 64  # elements that share a scale


class MissingSchemeError(Exception):
    """A library has no such scheme; the message says why."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model under a scheme, ready to be trained.

    Attributes:
        apply: the model. Contenders whose `apply` is equal run the same compiled program.
        params: what is trained.
        constants: data that is not trained.
        weight_bytes: gives the memory of the quantized kernels as the library stores them.
    """

    apply: Apply
    params: Any
    constants: Any
    weight_bytes: Callable[[], int]


@dataclasses.dataclass(frozen=True)
class Library:
    """One way to quantize a model.

    Attributes:
        name: as in the table.
        plain: the unquantized library with the same API of Flax.
        package: module that must be installed.
        build: makes the contender of a scheme; raises MissingSchemeError.
        weights_of_bits: makes contenders with weights of `COUNTED_BITS` and int8 activations.
    """

    name: str
    plain: str
    package: str
    build: Callable[[Workload, str], Contender]
    weights_of_bits: Callable[[Workload], Iterator[Contender]]

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return importlib.util.find_spec(self.package) is not None


def plain_nnx(workload: Workload) -> Contender:
    """The unquantized NNX model."""
    model, layers = _nnx_model(workload, nnx.Linear)
    return _nnx_contender(model, lambda: _float_bytes(layers))


def plain_linen(workload: Workload) -> Contender:
    """The unquantized Linen model."""
    model = workload.linen(None)
    return linen_contender(workload, model, None, lambda _: plain_nnx(workload).weight_bytes())


_SHORTHANDS = {
    "none": "none",
    "w8a8": "w8a8",
    "w4a8": "w4a8",
    "w3a8": "w3a8",
    "e4m3": "we4m3ae4m3",
    "block128": f"w4g{BLOCK}a8",
    "nf4": "wnf4",
}


@dataclasses.dataclass(frozen=True)
class _NnxApply:
    """An NNX model as a pure function; equal where the graphs are."""

    graph: Any
    noisy: bool

    def __call__(self, params: Any, constants: Any, key: jax.Array, inputs: jax.Array) -> jax.Array:
        model = nnx.merge(self.graph, params, constants)
        if self.noisy:
            qat.nnx.set_key(model, key)
        outputs: jax.Array = model(inputs)
        return outputs


def _nnx_model(workload: Workload, dense: Any) -> tuple[nnx.Module, list[nnx.Linear]]:
    """The model and its layers that are to be quantized."""
    layers: list[nnx.Linear] = []

    def collected(*args: Any, **kwargs: Any) -> nnx.Linear:
        layers.append(dense(*args, **kwargs))
        return layers[-1]

    return workload.nnx(collected), layers


def _float_bytes(layers: Sequence[nnx.Linear]) -> int:
    """Memory of unquantized kernels."""
    return sum(int(layer.kernel[...].nbytes) for layer in layers)


def _nnx_contender(
    model: nnx.Module, weight_bytes: Callable[[], int], noisy: bool = False
) -> Contender:
    graph, state = nnx.split(model)
    params, constants = (nnx.to_pure_dict(part) for part in nnx.split_state(state, nnx.Param, ...))
    return Contender(_NnxApply(graph, noisy), params, constants, weight_bytes)


def _our_policy(scheme: str) -> Policy | None:
    if scheme == "off":
        return None
    w8a8 = Policy.parse("w8a8")
    if scheme == "w8a8-token":
        return dataclasses.replace(w8a8, activations=Quantizer("int8", "token"))
    if scheme == "sr":
        rounding = Quantizer("int8", "token", rounding="stochastic")
        return dataclasses.replace(w8a8, gradients=rounding)
    if scheme == "nf4":
        return Policy(weights="nf4")  # and no code for the activations
    return Policy.parse(_SHORTHANDS[scheme])


def _ours(workload: Workload, scheme: str) -> Contender:
    policy = _our_policy(scheme)
    model, layers = _nnx_model(workload, functools.partial(qat.nnx.Linear, policy=policy))

    def weight_bytes() -> int:
        if policy is None or policy.weights is None or scheme == "none":
            return _float_bytes(layers)
        stored = (qat.quantize(layer.kernel[...], policy.weights, axis=0) for layer in layers)
        return sum(int(kernel.pack().nbytes) for kernel in stored)

    return _nnx_contender(model, weight_bytes, noisy=scheme == "sr")


def _ours_of_bits(workload: Workload) -> Iterator[Contender]:
    dense = functools.partial(qat.nnx.Linear, policy=Policy.parse("w8a8"))
    model, _ = _nnx_model(workload, dense)
    for bits in COUNTED_BITS:
        qat.nnx.set_policy(model, Policy.parse(f"w{bits}a8"))
        yield _nnx_contender(model, lambda: 0)


def linen_contender(
    workload: Workload, model: Any, rng: str | None, weight_bytes: Callable[[Any], int]
) -> Contender:
    """A Linen model with the parameters of the plain one; `rng` names the stream of its noise."""
    inputs, _ = workload.batch()
    params = workload.linen(None).init(jax.random.key(0), inputs)["params"]

    def apply(params: Any, constants: Any, key: jax.Array, inputs: jax.Array) -> jax.Array:
        del constants
        rngs = None if rng is None else {rng: key}
        outputs: jax.Array = model.apply({"params": params}, inputs, rngs=rngs)
        return outputs

    return Contender(apply, params, (), lambda: weight_bytes(params))


PLAIN = {"flax nnx": plain_nnx, "flax linen": plain_linen}
OURS = Library("ours", "flax nnx", "qat", _ours, _ours_of_bits)
