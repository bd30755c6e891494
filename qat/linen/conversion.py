"""Conversion of a Linen model that somebody else wrote.

Linen makes submodules while it runs, so there is no tree of layers to rewrite. Flax's own
`intercept_methods` shows each method call of each module instead: where the code about to run is
that of a layer which `qat.linen.calls` knows, it runs under the policy of the rule that matches
the layer's path. Nothing is patched, and a model that was not converted never notices.

The converted module is of a subclass of the model's own class, whose methods start the
interception: parameter tree, attributes, `isinstance` and every public method stay. The rules are
an attribute of that class and not a field, since Flax's transforms hand all fields to the class
they transformed.
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import freeze
from flax.traverse_util import flatten_dict

from qat.contractions import (
    Contraction,
    ContractionReport,
    ConversionReport,
    find_contractions,
    layer_scope,
    naming_layer,
)
from qat.linen import layers
from qat.linen.calls import FLAX_LAYERS, Layer, absent, code_of, filled
from qat.linen.state import input_transform
from qat.policy import AnyRules, Policy, Rules
from qat.spelling import expected_instead

M = TypeVar("M", bound=nn.Module)

_UNTRACED = "(Linen makes layers when they run: give example inputs to see them)"
_RULES = "quantization_rules"  # attribute of a converted class
_UNBOUND_METHODS = ("apply", "init", "init_with_output", "lazy_init")
_in_charge: contextvars.ContextVar["_Conversion | None"] = contextvars.ContextVar(
    "conversion", default=None
)
_calls = itertools.count()


def quantize_model(
    module: M,
    rules: AnyRules,
    *inputs: Any,
    **kwargs: Any,
) -> tuple[M, ConversionReport]:
    """Converts a model: its layers contract as the rules say, its parameters stay as they are.

    Args:
        module: any unbound Linen module; it is not changed. A converted one gets new rules.
        rules: pairs (pattern, policy) by layer path, such as "encoder/Dense_0"; the first whose
            pattern matches the whole path decides, None leaves a layer unquantized. Attention
            modules have a path too: their rule says how queries, keys and values, and
            probabilities are quantized. One policy, or its shorthand, is for all layers.
        *inputs: example inputs for the report, arrays or `jax.ShapeDtypeStruct`; nothing is run.
        **kwargs: keywords of the call, and ``method`` to report on another than ``__call__``.

    Returns:
        The converted module, and a report of every contraction that it runs on these inputs;
        empty without inputs, as then no layer can be known.

    Raises:
        ValueError: no Linen module, or one that is bound already; and, given inputs here, else
            when the model is first called: a layer that no rule matches; a rule that matches no
            layer.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            expected_instead("quantize_model", "an instance of a Linen module", module)
        )
    if module.scope is not None:
        raise ValueError(
            f"quantize_model takes an unbound module, got {module.path} of a bound one"
        )
    rules = Rules.of(rules)
    original = getattr(type(module), "unconverted_class", type(module))
    fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.init}
    plain, converted = (
        kind(**{**fields, "parent": None}) for kind in (original, _converted_class(original, rules))
    )
    if not inputs and not kwargs:
        return converted, ConversionReport(note=_UNTRACED)
    return converted, _report(plain, converted, inputs, kwargs)


def rules_of(module: nn.Module) -> Rules | None:
    """Those by which a module was converted, or None."""
    return getattr(type(module), _RULES, None)


def _converted_class(original: type[M], rules: Rules) -> type[M]:
    """The class of converted modules; the same for equal rules, so that modules compare equal."""
    try:
        return _cached_class(original, rules)  # type: ignore[no-any-return]
    except TypeError:  # formats that are traced have no hash
        return _new_class(original, rules)


def _new_class(original: type[M], rules: Rules) -> type[M]:
    names = [n for n in dir(original) if n == "__call__" or not n.startswith("_")]
    methods = {n: getattr(original, n) for n in names if n != "setup"}
    wrapped = {
        name: _converting_method(method, checks=name == "__call__")
        for name, method in methods.items()
        if name in _UNBOUND_METHODS or hasattr(method, "method_handler_wrapped")  # Flax's mark
    }
    same = {n: getattr(original, n) for n in ("__module__", "__qualname__", "__doc__")}
    members = {**same, **wrapped, _RULES: rules, "unconverted_class": original}
    return type(original.__name__, (original,), members)  # the name names layers automatically


_cached_class: Callable[..., Any] = functools.lru_cache(maxsize=64)(_new_class)


def _converting_method(method: Callable[..., Any], checks: bool) -> Callable[..., Any]:
    """A method of the model that runs converted; `checks` that every rule has a layer."""

    @functools.wraps(method, updated=())
    def converting(self: Any, *args: Any, **kwargs: Any) -> Any:
        root = 0 if self.scope is None else len(self.path)
        notes = current.notes if (current := _in_charge.get()) else None
        with _taking_charge(_Conversion(getattr(type(self), _RULES), root, notes)) as conversion:
            _forbid_reuse(self)
            result = method(self, *args, **kwargs)
            if checks:
                conversion.check_rules(self)
            return result

    return nn.nowrap(converting)


@contextlib.contextmanager
def _taking_charge(conversion: "_Conversion") -> Iterator["_Conversion"]:
    """Intercepts method calls, unless this very model is in charge already; gives what is."""
    current = _in_charge.get()
    if current and (current.rules, current.root) == (conversion.rules, conversion.root):
        yield current
        return
    token = _in_charge.set(conversion)
    try:
        with nn.intercept_methods(conversion):
            yield conversion
    finally:
        _in_charge.reset(token)


@dataclasses.dataclass(frozen=True, eq=False)
class _Conversion:
    """The interceptor of one call of a converted model.

    Attributes:
        rules: that decide.
        root: how many parts of a module's path lead to the converted model.
        notes: what a report needs to know, while one is made.
        met: paths of the layers that ran.
    """

    rules: Rules
    root: int = 0
    notes: "_Notes | None" = None
    met: set[str] = dataclasses.field(default_factory=set)

    def __call__(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Runs a method of a module; called by Flax."""
        module = context.module
        if _in_charge.get() is not self or module.scope is None:
            return call(*args, **kwargs)
        _forbid_reuse(module)
        layer = _LAYERS.get(context.orig_method.func)
        with self._scope(module):
            policy = layer and self._decide(module, layer)
            if layer is None or policy is None:
                return call(*args, **kwargs)
            return layer.run(module, policy, call, *args, **kwargs)

    def check_rules(self, model: nn.Module) -> None:
        """Raises ValueError for a rule that matches no layer, when the model has run.

        Nor any module that did not run this time, but has parameters.
        """
        parameters = flatten_dict(model.variables.get("params", {}))
        holders = {"/".join(path[:n]) for path in parameters for n in range(len(path))}
        self.rules.check_all_match(self.met, holders)

    def _scope(self, module: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Names a module in errors, and marks for a report what it contracts."""
        if self.notes is not None:
            return self.notes.scope(module)
        return naming_layer("/".join(module.path))

    def _decide(self, module: nn.Module, layer: Layer) -> Policy | None:
        """The policy of a layer; None leaves it as it is."""
        path = "/".join(module.path[self.root :])
        self.met.add(path)
        policy = self.rules.policy_for(path)
        pattern, _ = self.rules.match(path) or ("", None)
        missing = layer.operands if policy is None else absent(policy, *layer.operands)
        reason: str | None
        if (objection := layer.objection(module, policy)) is not None:
            missing, reason = layer.operands, objection
        elif missing == layer.operands or layer.several:
            reason = Rules.why_unquantized(pattern, policy, missing)
        else:
            reason = None  # for then it is not the layer's own contraction
        if self.notes is not None:
            self.notes.reasons["/".join(module.path)] = reason
        if missing != layer.operands:
            return policy
        transformed = objection is None and input_transform(module) is not None
        return Policy() if transformed else None


@dataclasses.dataclass
class _Notes:
    """What a conversion met: by path, why a layer's contraction may be unquantized, and classes."""

    reasons: dict[str, str | None] = dataclasses.field(default_factory=dict)
    classes: dict[str, str] = dataclasses.field(default_factory=dict)

    def scope(self, module: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Marks what a module contracts as its own."""
        path = "/".join(module.path)
        self.classes[path] = type(module).__name__
        return layer_scope(path)

    def line(self, contraction: Contraction) -> ContractionReport:
        """A line of the report."""
        path = contraction.layer or ""
        if contraction.quantized:
            return ContractionReport(contraction)
        unknown = (
            f"contraction outside any layer this knows, in {self.classes.get(path, 'a function')} "
            f"at {contraction.source}; {contraction.advice}"
        )
        return ContractionReport(contraction, self.reasons.get(path) or unknown)


def _report(
    plain: nn.Module, converted: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> ConversionReport:
    """Traces the converted model, with variables in the shapes of the plain one's."""
    rules: Rules = getattr(type(converted), _RULES)
    notes = _Notes()

    def run(*inputs: Any, **kwargs: Any) -> Any:
        key = jax.random.key(0)
        shapes = jax.eval_shape(lambda: plain.init(key, *inputs, **kwargs))
        variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        rngs, mutable = {"params": key}, True  # what a quantizer holds is made on the way
        with _taking_charge(_Conversion(rules, notes=notes)):
            return converted.apply(variables, *inputs, rngs=rngs, mutable=mutable, **kwargs)

    found = find_contractions(run, *inputs, **kwargs)
    rules.check_all_match({*notes.reasons, *(c.layer for c in found if c.layer is not None)})
    return ConversionReport(tuple(map(notes.line, found)))


class _Unequal:
    """Has another hash each time it is asked."""

    def __hash__(self) -> int:
        return next(_calls)


def _forbid_reuse(module: nn.Module) -> None:
    """Keeps `nn.jit` from taking a trace of the same layer elsewhere, with other rules, for this.

    It looks traces up by a hash of the module and of its scope's flags, but not of its path.
    """
    if module.scope is None or _RULES in module.scope.flags:
        return
    module.scope.flags = freeze({**module.scope.flags, _RULES: _Unequal()})
    fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.init}
    for child in jax.tree.leaves({**fields, "parent": None}):
        if isinstance(child, nn.Module):  # bound before its parent's first method was called
            _forbid_reuse(child)


def _run_own(module: nn.Module, policy: Policy, call: Any, *args: Any, **kwargs: Any) -> Any:
    with filled(module, policy=policy):
        return call(*args, **kwargs)


_OWN_METHODS = (
    layers.Dense.__call__,
    layers.DenseGeneral.__call__,
    layers.Einsum.__call__,
    layers.Conv.__call__,
    layers.Embed.__call__,
    layers.Embed.attend,
)
_LAYERS = FLAX_LAYERS | {code_of(m): Layer(_run_own, slots=("policy",)) for m in _OWN_METHODS}
