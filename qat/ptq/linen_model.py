"""A Linen model as post-training quantization sees it: a module and its variables.

Transforms of inputs are variables of their layers, in a collection of their own, and the module is
converted so that its layers read them. An `nn.scan` hands only the collections that its author
named to the layers within, so those take no transform.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from qat.linen.conversion import quantize_model, rules_of
from qat.linen.state import INPUTS, TRANSFORMS, meeting_transforms
from qat.policy import Policy, Rules
from qat.ptq.model import Parameters, is_numeric
from qat.ptq.weights import Weight
from qat.transforms import InputTransform

_ELSEWHERE = ("params", TRANSFORMS, "cache", "intermediates")  # the last two are left by calls


@dataclasses.dataclass(frozen=True, eq=False)
class LinenModel:
    """See `qat.ptq.model.Model`.

    Attributes:
        module: unbound.
        variables: as `init` returned them.
        call: (module, batch) → anything, how a batch runs.
        example: a batch, or None.
    """

    module: nn.Module
    variables: Mapping[str, Any]
    call: Callable[[Any, Any], Any]
    example: Any

    @property
    def result(self) -> tuple[nn.Module, dict[str, Any]]:
        """Module and variables."""
        return self.module, dict(self.variables)

    @functools.cached_property
    def parameters(self) -> Parameters:
        """The collection "params"."""
        return _flat(self.variables.get("params", {}))

    @property
    def others(self) -> Parameters:
        """Arrays of other collections, whose name comes first."""
        held = {name: tree for name, tree in self.variables.items() if name not in _ELSEWHERE}
        return {path: value for path, value in _flat(held).items() if is_numeric(value)}

    def function(self) -> Callable[[Parameters, Any], Any]:
        """`apply`, without mutable collections."""

        def run(parameters: Parameters, batch: Any) -> Any:
            variables = {**self.variables, "params": _nested(parameters)}
            return self.module.apply(variables, batch, method=self.call)

        return run

    def declared(self, path: str) -> Weight | str:
        """Linen's layers are known when they run."""
        return "not known without calibration: Linen makes layers when they run"

    def objection(self, path: str) -> str | None:
        """A transform must reach the layer's contraction."""
        if _layer(path) in self._reachable:
            return None
        return "Flax's code for it was replaced, or an nn.scan keeps the transform from it"

    def transform(self, path: str) -> InputTransform | None:
        """From the layer's variable."""
        held: dict[tuple[str, ...], InputTransform] = flatten_dict(
            dict(self.variables.get(TRANSFORMS, {}))
        )
        return held.get(_place(path))

    @property
    def cache_seed(self) -> int | None:
        """Linen's attention has no place for it."""
        return None

    def with_parameters(self, parameters: Mapping[str, jax.Array]) -> "LinenModel":
        """Other variables."""
        return self._with_collection("params", _nested({**self.parameters, **parameters}))

    def with_others(self, others: Mapping[str, jax.Array]) -> "LinenModel":
        """Other variables."""
        merged = _nested({**_flat(self.variables), **others})
        return dataclasses.replace(self, variables=merged)

    def with_transforms(self, transforms: Mapping[str, InputTransform]) -> "LinenModel":
        """Variables of a converted module's layers."""
        held = flatten_dict(dict(self.variables.get(TRANSFORMS, {})))
        for path, transform in transforms.items():
            place = _place(path)
            held[place] = held.get(place, InputTransform()).followed_by(transform)
        converted = dataclasses.replace(self, module=self._converted)
        return converted._with_collection(TRANSFORMS, unflatten_dict(held))

    def without_quantizers(self, paths: Collection[str], operands: Collection[str]) -> "LinenModel":
        """Rules of these layers come first."""
        rules = rules_of(self.module)
        if rules is None:
            return self
        layers = [(layer, rules.policy_for(layer)) for layer in map(_layer, paths)]
        bare = [
            (re.escape(layer), policy.without(operands))
            for layer, policy in layers
            if policy is not None and any(getattr(policy, operand) for operand in operands)
        ]
        module, _ = quantize_model(self.module, Rules([*bare, *rules.rules]))
        return dataclasses.replace(self, module=module)

    def with_rotated_cache(self, seed: int) -> "LinenModel":
        """Linen's attention has no place for it."""
        return self

    @property
    def rotated(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def with_rotated_residual(self, seed: int) -> "LinenModel":
        """Linen's layers are not known before they run."""
        return self

    def _with_collection(self, name: str, values: dict[str, Any]) -> "LinenModel":
        return dataclasses.replace(self, variables={**self.variables, name: values})

    @property
    def _converted(self) -> nn.Module:
        """The module, converted so that its layers read transforms."""
        if rules_of(self.module) is not None:
            return self.module
        return quantize_model(self.module, Rules([(".*", Policy())]))[0]

    @functools.cached_property
    def _reachable(self) -> set[str]:
        """Layers that ask for a transform when they run, inside this model."""
        marks = unflatten_dict(dict.fromkeys(map(_place, self.parameters), 0))
        marked = dataclasses.replace(self, module=self._converted)._with_collection(
            TRANSFORMS, marks
        )
        with meeting_transforms() as met:
            jax.eval_shape(marked.function(), self.parameters, self.example)
        return met


def _layer(path: str) -> str:
    return path.rpartition("/")[0]


def _flat(tree: Mapping[str, Any]) -> Parameters:
    return {"/".join(path): leaf for path, leaf in flatten_dict(dict(tree)).items()}


def _nested(parameters: Mapping[str, jax.Array]) -> dict[str, Any]:
    nested: dict[str, Any] = unflatten_dict({tuple(p.split("/")): x for p, x in parameters.items()})
    return nested


def _place(path: str) -> tuple[str, ...]:
    """Of a layer's transform in its collection, by path of its weight."""
    return (*path.split("/")[:-1], INPUTS)
