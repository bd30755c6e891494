"""The family of precision laws: how bit widths enter the law of size and data.

Three choices, each a word of the name: what few bits cost (the composition), the curve over bits
(the shape, see `efficiency`) and, where there is an efficiency, whether it has an offset.

    precision        N_eff = N Π_x f_x(P_x): few bits act like fewer parameters
    tokens           D_eff = D Π_x f_x(P_x): like less data
    both             N_eff and D_eff, by one efficiency
    untied           N_eff and D_eff, each by its own
    additive         + Σ_x c_x t_x(P_x)
    scaled           + Σ_x c_x t_x(P_x) N^-a D^b
    multiplicative   × Π_x (1 + c_x t_x(P_x))

over x of weights, activations and KV cache. `precision`, exponential with offset, is the law of
Kumar et al. 2024 (arXiv 2411.04330) with the offsets of its appendix K; α and β are untied, unlike
the paper's Table 2, and 16 bits are a width like any other. An operand that no row quantizes drops
out with its parameters, so the weights-only law is the same law on a table of such runs.

Rounding after training adds ``C_T D^γ_D N^-γ_N exp(-P_post/γ_post)`` (the paper's Eq. 2, for models
of high precision). With the word `unified` it is Eq. 9: N_eff instead of N, and a factor
``1 - exp(-C_x (P_x - P_post))`` for each operand that was quantized in training, zero where the
model trained with no more bits than it is rounded to.
"""

import dataclasses
import itertools

import jax.numpy as jnp
from jax import Array

from qat.laws.forms.efficiency import (
    MIN_EFFICIENCY,
    SHAPES,
    efficiency,
    offset_parameter,
    shape_parameters,
    tail,
    without_effect,
)
from qat.laws.forms.size import chinchilla
from qat.laws.law import Group, Law, Parameter, Values, amplitude, positive, power, signed
from qat.laws.table import BITS_COLUMNS, UNQUANTIZED_BITS

OPERANDS = {
    "w": ("weight_bits", "the weights"),
    "a": ("activation_bits", "the activations"),
    "kv": ("kv_bits", "the KV cache"),
}
_REDUCING = {"precision": ("N",), "tokens": ("D",), "both": ("ND",), "untied": ("N", "D")}
_ADDING = ("additive", "scaled", "multiplicative")
_FORMULAS = {
    "precision": "A N_eff^-alpha + B D^-beta + E",
    "tokens": "A N^-alpha + B D_eff^-beta + E",
    "both": "A N_eff^-alpha + B D_eff^-beta + E",
    "untied": "A N_eff^-alpha + B D_eff^-beta + E",
    "additive": "A N^-alpha + B D^-beta + E + sum_x c_x t_x",
    "scaled": "A N^-alpha + B D^-beta + E + sum_x c_x t_x N^-a D^b",
    "multiplicative": "(A N^-alpha + B D^-beta + E) prod_x (1 + c_x t_x)",
}
_TAILS = {
    "exponential": "exp(-P_x/gamma_x)",
    "weibull": "exp(-(P_x/gamma_x)^k_x)",
    "power": "(1 + P_x/gamma_x)^-k_x",
    "logistic": "1/(1 + exp(P_x/gamma_x))",
}


@dataclasses.dataclass(frozen=True)
class Precision:
    """One member of the family.

    Attributes:
        composition: first word of its name.
        shape: of the curves over bits.
        offset: whether efficiencies have one.
        unified: whether the cost of rounding is Eq. 9 instead of Eq. 2.
    """

    composition: str
    shape: str = "exponential"
    offset: bool = True
    unified: bool = False

    @property
    def name(self) -> str:
        """Its words, without those that go without saying."""
        words = [self.composition, self.shape if self.shape != "exponential" else ""]
        words += ["" if self.offset else "plain", "unified" if self.unified else ""]
        return "_".join(filter(None, words))

    def law(self) -> Law:
        """The law with all its declarations."""
        parameters, groups = [*chinchilla.parameters], []
        for operand, (column, what) in OPERANDS.items():
            own, neutral = self._of_operand(operand, what)
            parameters += own
            names = tuple(p.name for p in own)
            groups.append(Group((column,), names, neutral, self._curve_parameters + 1))
        if self.composition == "scaled":
            parameters += _SCALED
        parameters += _ROUNDING
        names = tuple(p.name for p in _ROUNDING)
        groups.append(Group(("ptq_bits",), names, (0.0, 0.0, 0.0, 1.0)))
        if self.unified:
            for operand, (column, what) in OPERANDS.items():
                parameter = _robustness(operand, what)
                parameters.append(parameter)
                names = (parameter.name,)
                groups.append(Group((column, "ptq_bits"), names, (_ALWAYS_ROUNDS,), widths=2))
        return Law(
            name=self.name,
            formula=self._formula,
            loss=self.loss,
            parameters=tuple(parameters),
            columns=("params", "tokens", *BITS_COLUMNS),
            groups=tuple(groups),
            domain=None if self.composition in _ADDING else self.domain,
        )

    def loss(self, p: Values, c: Values) -> Array:
        """Nats per token, elementwise over rows."""
        size = {"params": c["params"], "tokens": c["tokens"]}
        if self.composition in _ADDING:
            trained = self._added(chinchilla.loss(p, size), p, c)
        else:
            size = self._effective(p, c)
            trained = chinchilla.loss(p, size)
        effective = size["params"] if self.unified else c["params"]
        scale = power(c["tokens"], p["gamma_D"]) * power(effective, -p["gamma_N"])
        degradation = p["C_T"] * scale * jnp.exp(-c["ptq_bits"] / p["gamma_post"])
        if self.unified:
            for operand, (column, _) in OPERANDS.items():
                spare = jnp.maximum(c[column] - c["ptq_bits"], 0.0)
                degradation *= -jnp.expm1(-p[f"C_{operand}"] * spare)
        return trained + jnp.where(c["ptq_bits"] < UNQUANTIZED_BITS, degradation, 0.0)

    def domain(self, p: Values, c: Values) -> Array:
        """Where every efficiency is above `MIN_EFFICIENCY`."""
        factors = [f for each in _REDUCING[self.composition] for f in self._factors(each, p, c)]
        return jnp.min(jnp.stack(factors), axis=0) >= MIN_EFFICIENCY

    def _effective(self, p: Values, c: Values) -> dict[str, Array]:
        """N_eff and D_eff, as columns."""
        size = {"N": c["params"], "D": c["tokens"]}
        for reduced in _REDUCING[self.composition]:
            for factor in self._factors(reduced, p, c):
                size |= {each: size[each] * factor for each in reduced}
        return {"params": size["N"], "tokens": size["D"]}

    def _factors(self, reduced: str, p: Values, c: Values) -> list[Array]:
        """The efficiency of each operand."""
        return [
            efficiency(self.shape, c[column], **_shape_of(p, self._suffix(operand, reduced)))
            for operand, (column, _) in OPERANDS.items()
        ]

    def _added(self, loss: Array, p: Values, c: Values) -> Array:
        """The loss with what few bits add to it."""
        for operand, (column, _) in OPERANDS.items():
            shape = _shape_of(p, operand)
            cost = p[f"c_{operand}"] * tail(self.shape, c[column], shape["gamma"], shape["k"])
            if self.composition == "scaled":
                cost *= power(c["params"], -p["a"]) * power(c["tokens"], p["b"])
            loss = loss * (1 + cost) if self.composition == "multiplicative" else loss + cost
        return loss

    @property
    def _curve_parameters(self) -> int:
        """How many parameters a curve over bits has."""
        height = self.offset or self.composition in _ADDING
        return len(shape_parameters(self.shape, "", "")) + height

    def _suffix(self, operand: str, reduced: str) -> str:
        """Of an operand's parameters; those of data have their own where there are two."""
        return f"{operand}_D" if self.composition == "untied" and reduced == "D" else operand

    def _of_operand(
        self, operand: str, what: str
    ) -> tuple[tuple[Parameter, ...], tuple[float, ...]]:
        """An operand's parameters, and the values at which they have no effect."""
        if self.composition in _ADDING:
            cost = _cost(self.composition, operand, what)
            rest = shape_parameters(self.shape, operand, what)
            return (cost, *rest), (0.0, *(1.0 for _ in rest))
        own: tuple[Parameter, ...] = ()
        for reduced in _REDUCING[self.composition]:
            suffix = self._suffix(operand, reduced)
            own += shape_parameters(self.shape, suffix, what)
            if self.offset:
                own += (offset_parameter(suffix, what),)
        return own, tuple(without_effect(p.name, self.offset) for p in own)

    @property
    def _formula(self) -> str:
        curve = "1 - exp(n_x) t_x" if self.offset else "1 - t_x"
        if logistic := self.shape == "logistic" and self.offset:
            curve = "1/(1 + exp(n_x - P_x/gamma_x))"
        parts = [_FORMULAS[self.composition]]
        if self.composition not in _ADDING:
            reduced = dict.fromkeys("".join(_REDUCING[self.composition]))
            parts += [f"{each}_eff = {each} prod_x ({curve})" for each in reduced]
            if self.composition == "untied":
                parts[-1] += " with parameters of its own"
        size = "N_eff" if self.unified else "N"
        rounding = f" + C_T D^gamma_D {size}^-gamma_N exp(-P_post/gamma_post)"
        rounding += " prod_x (1 - exp(-C_x (P_x - P_post)))" if self.unified else ""
        parts[0] += rounding
        tail_parts = [] if logistic else [f"t_x = {_TAILS[self.shape]}"]
        return ", ".join([*parts, *tail_parts, "x = w, a, kv"])


def _shape_of(p: Values, suffix: str) -> dict[str, Array]:
    """The parameters of one curve; no offset is 0, no power 1."""
    default = {"gamma": 1.0, "n": 0.0, "k": 1.0}
    return {name: p.get(f"{name}_{suffix}", jnp.asarray(x)) for name, x in default.items()}


def _cost(composition: str, operand: str, what: str) -> Parameter:
    """The amplitude c of what few bits add."""
    name = f"c_{operand}"
    if composition == "multiplicative":
        meaning = f"share by which few bits of {what} raise the loss, no unit"
        return _named(name, positive(meaning, (1e-8, 1e8), (0.03, 3.0)))
    if composition == "additive":
        meaning = f"loss that few bits of {what} add, nats"
        return _named(name, positive(meaning, (1e-8, 1e8), (0.03, 3.0)))
    meaning = f"amplitude of the cost of few bits of {what}, nats · params^a / tokens^b"
    return _named(name, amplitude(meaning, per={"params": "a"}, times={"tokens": "b"}))


def _robustness(operand: str, what: str) -> Parameter:
    meaning = f"1 / bits over which training with fewer bits of {what} spares rounding its cost"
    return _named(f"C_{operand}", positive(meaning, (1e-3, _ALWAYS_ROUNDS), (0.05, 3.0)))


def _named(name: str, parameter: Parameter) -> Parameter:
    return dataclasses.replace(parameter, name=name)


_ALWAYS_ROUNDS = 1e3  # of C_x: a bit to spare, and rounding costs what it costs at 16 bits
_SCALED = [
    _named("a", signed("exponent of 1 / params in the cost of few bits", (-3.0, 3.0), (0.0, 1.0))),
    _named("b", signed("exponent of tokens in the cost of few bits", (-3.0, 3.0), (0.0, 1.0))),
]
_ROUNDING = [
    _named(
        "C_T",
        amplitude(
            "amplitude of the cost of rounding, nats · params^gamma_N / tokens^gamma_D",
            per={"params": "gamma_N"},
            times={"tokens": "gamma_D"},
        ),
    ),
    _named("gamma_D", signed("exponent of tokens in that cost", (-3.0, 3.0), (0.0, 1.0))),
    _named("gamma_N", signed("exponent of 1 / params in that cost", (-3.0, 3.0), (0.0, 1.0))),
    _named(
        "gamma_post", positive("bits over which that cost falls e-fold", (0.1, 30.0), (0.3, 4.0))
    ),
]
FAMILY = [
    Precision(composition, shape, offset, unified)
    for composition, shape, offset, unified in itertools.product(
        (*_REDUCING, *_ADDING), SHAPES, (True, False), (False, True)
    )
    if (offset or composition in _REDUCING) and (not unified or composition == "precision")
]
