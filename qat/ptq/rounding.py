"""The rounding of all weights of a model, streamed where there is calibration data."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from qat.ptq.gptq import feedback, round_with_feedback
from qat.ptq.hqq import round_hqq
from qat.ptq.methods import Settings
from qat.ptq.model import Model
from qat.ptq.report import ParameterReport, relative_error
from qat.ptq.rounded import RoundedMatrices, stored
from qat.ptq.rtn import dequantized, prepared, round_to_nearest
from qat.ptq.statistics import Statistics, output_error
from qat.ptq.stream import Stream
from qat.ptq.weights import Weight
from qat.quantizer import Quantizer
from qat.scales import Scale

Targets = Mapping[str, Sequence[Weight]]


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """One weight.

    Attributes:
        matrices: codes and scales.
        errors: of its outputs, and those of rounding to nearest; None without calibration.
    """

    matrices: RoundedMatrices
    errors: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How weights are rounded.

    Attributes:
        name: "rtn", "gptq" or "hqq".
        quantizer: of the weights.
        settings: numbers of the methods.
    """

    name: str
    quantizer: Quantizer
    settings: Settings

    def apply(
        self, model: Model, targets: Targets, stream: Stream | None
    ) -> tuple[Model, list[ParameterReport]]:
        """The model with rounded weights, and a report of each.

        Args:
            model: unrounded; features that its transforms keep exact keep their rows of weights.
            targets: weights by path of their parameter, as traced if there is a stream.
            stream: of the model, with calibration; None without.
        """
        if stream is None:
            rounded = self._declared(model, targets)
        else:
            rounded = self._streamed(model, targets, stream)
        reports, parameters = [], {}
        for path, weights in targets.items():
            rows = _exact_rows(model, path, weights[0])
            report, parameters[path] = self._assembled(
                path, model.parameters[path], weights, rounded[path], rows
            )
            reports.append(report)
        return model.with_parameters(parameters), reports

    def _declared(self, model: Model, targets: Targets) -> dict[str, list[_Rounded]]:
        """Each stack of weights, of whose inputs nothing is known."""
        rounded = {}
        for path, (weight,) in targets.items():
            values_EKN, scale = self._values(weight.matrices(model.parameters[path]), None)
            rounded[path] = [_Rounded(RoundedMatrices.of(values_EKN, scale, self.quantizer))]
        return rounded

    def _streamed(
        self, model: Model, targets: Targets, stream: Stream
    ) -> dict[str, list[_Rounded]]:
        """Each weight, given inputs from the rounded layers before it."""
        rounded: dict[str, list[_Rounded]] = defaultdict(list)

        def visit(weight: Weight, exact_EKN: jax.Array, statistics: Statistics) -> jax.Array:
            path, exact_EKN = stream.path(weight), exact_EKN.astype(jnp.float32)
            rows = _exact_rows(model, path, weight)
            kept_EKN = jnp.float32(0) if rows is None else weight.matrices(rows)
            rest_EKN = jnp.where(kept_EKN == 0, exact_EKN, 0)
            values_EKN, scale = self._values(rest_EKN, statistics)
            pairs = ((values_EKN, scale), _round_to_nearest(rest_EKN, self.quantizer))
            kept_EKN = kept_EKN.astype(jnp.float32)
            quantized: list[jax.Array] = [_dequantized(*pair) + kept_EKN for pair in pairs]
            errors = [float(_output_error(exact_EKN, each, statistics)) for each in quantized]
            matrices = RoundedMatrices.of(values_EKN, scale, self.quantizer)
            rounded[path].append(_Rounded(matrices, (errors[0], errors[1])))
            return quantized[0]

        stream.run(visit, [w for w in stream.weights if stream.path(w) in targets])
        return rounded

    def _values(
        self, weight_EKN: jax.Array, statistics: Statistics | None
    ) -> tuple[jax.Array, Scale]:
        """Values of the grid and scales, by the method."""
        if self.name == "rtn":
            return _round_to_nearest(weight_EKN, self.quantizer)
        if self.name == "hqq":
            rounded: tuple[jax.Array, Scale] = jax.vmap(round_hqq, (0, None))(
                weight_EKN, prepared(self.quantizer)
            )
            return rounded
        assert statistics is not None
        settings = self.settings.gptq
        pairs = [
            round_with_feedback(weight_KN, self.quantizer, feedback(moment_KK, settings), settings)
            for weight_KN, moment_KK in zip(weight_EKN, statistics.second_moment_KK, strict=True)
        ]
        stacked: tuple[jax.Array, Scale] = jax.tree.map(lambda *xs: jnp.stack(xs), *pairs)
        return stacked

    def _assembled(
        self,
        path: str,
        value: jax.Array,
        weights: Sequence[Weight],
        rounded: Sequence[_Rounded],
        exact_rows: jax.Array | None,
    ) -> tuple[ParameterReport, jax.Array]:
        """The report of a parameter, and its new value, from those of its slices."""
        codes = stored([r.matrices for r in rounded], weights, self.quantizer, str(value.dtype))
        quantized, nbytes = codes.dequantize(), codes.pack().nbytes
        if exact_rows is not None:
            quantized += exact_rows.astype(value.dtype)
            nbytes += int(jnp.count_nonzero(exact_rows)) * exact_rows.dtype.itemsize
        errors = [r.errors for r in rounded if r.errors is not None]
        report = ParameterReport(
            path=path,
            quantized=True,
            reason=f"{self.name} {self.quantizer}",
            nbytes=nbytes,
            relative_error=relative_error(value, quantized),
            output_errors=tuple(error for error, _ in errors),
            rtn_output_errors=tuple(error for _, error in errors),
            stored=codes,
            exact_rows=exact_rows,
        )
        return report, quantized


def _round_to_nearest(weight_EKN: jax.Array, quantizer: Quantizer) -> tuple[jax.Array, Scale]:
    rounded: tuple[jax.Array, Scale] = jax.vmap(round_to_nearest, (0, None))(
        weight_EKN, prepared(quantizer)
    )
    return rounded


@jax.jit
def _dequantized(values_EKN: jax.Array, scale: Scale) -> jax.Array:
    weights_EKN: jax.Array = jax.vmap(dequantized)(values_EKN, scale)
    return weights_EKN


@jax.jit
def _output_error(
    exact_EKN: jax.Array, quantized_EKN: jax.Array, statistics: Statistics
) -> jax.Array:
    """Root mean square over the experts of a weight."""
    moments_EKK = statistics.second_moment_KK
    errors_E = jax.vmap(output_error)(exact_EKN, quantized_EKN, moments_EKK)
    return jnp.sqrt(jnp.mean(jnp.square(errors_E)))


def _exact_rows(model: Model, path: str, weight: Weight) -> jax.Array | None:
    """A parameter in float16 where its rows stay exact, 0 elsewhere; None if all are rounded."""
    transform = model.transform(path)
    if transform is None or transform.exact_K is None:
        return None
    exact = weight.beside(transform.exact_K)
    return jnp.where(exact, model.parameters[path], 0).astype(jnp.float16)
