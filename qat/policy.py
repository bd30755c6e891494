"""Which operand of a layer is quantized how, and which layer gets which policy.

A `Policy` names every operand that is quantized: of the dense projections, of attention's two
contractions, and the gradients that flow back through them. Formats are data, so the plain
policies that `Policy.parse` returns all share one structure: a weight, activation or cache format
that the shorthand does not mention is "none", whose grid is float32 itself, and one compiled
program then serves "w4", "a8kv4" and "none" alike. The other operands cost time even unquantized
and are left out of the program unless they are named.

The default granularities are those of Kumar et al. (arXiv 2411.04330): weights per output channel,
activations per tensor. Cached keys and values are scaled per token and head, since a cache cannot
know the tokens that come later.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args

import jax

from qat.quantizer import Granularity, Quantizer
from qat.spelling import expected_one_of, nearest, nearest_few

Mode = Literal["fake", "native"]

_OPERANDS: dict[str, tuple[str, Granularity]] = {
    "w": ("weights", "channel"),
    "a": ("activations", "tensor"),
    "kv": ("kv_cache", "token"),
    "q": ("queries", "token"),
    "p": ("probabilities", "token"),
    "grad": ("gradients", "token"),
}
_ALWAYS_PRESENT = ("w", "a", "kv")
_UNQUANTIZED_BITS = "16"
_TERM = re.compile(
    r"(kv|w|a|q|p|grad)"
    r"(mxfp\d(?:e\dm\d)?|mxint8|nvfp4|nf4|(?:u?int)?\d+(?:full)?"
    r"|e\d+m\d+(?:ieee|b11fnuz|fnuz|fn)?|ternary|binary|bf16|fp16|none)"
    r"(?:g(\d+))?"
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """Quantizers of the operands of a layer; None leaves an operand out of the program.

    As a pytree its leaves are the numbers of the formats (none while the formats are named,
    those of the grids once `traced`), and its structure is what a program is compiled for. A
    quantizer may be given by its spelling.

    Attributes:
        weights: the right-hand operand of dense projections.
        activations: the left-hand operand of dense projections.
        kv_cache: keys and values as they enter the attention cache.
        queries: queries, in the contraction with the keys.
        probabilities: attention weights, in the contraction with the values.
        gradients: what flows back into a dense projection, quantized for each of its two gradient
            contractions along the axes contracted there.
        mode: "fake" multiplies quantized values in the operands' own dtype; "native" multiplies
            their codes as int8, int4 or fp8, and needs named formats (see `qat.native`).
    """

    weights: Quantizer | None = None
    activations: Quantizer | None = None
    kv_cache: Quantizer | None = None
    queries: Quantizer | None = None
    probabilities: Quantizer | None = None
    gradients: Quantizer | None = None
    mode: Mode = dataclasses.field(default="fake", metadata={"static": True})

    def __init__(
        self,
        weights: Quantizer | str | None = None,
        activations: Quantizer | str | None = None,
        kv_cache: Quantizer | str | None = None,
        queries: Quantizer | str | None = None,
        probabilities: Quantizer | str | None = None,
        gradients: Quantizer | str | None = None,
        mode: Mode = "fake",
    ):
        """Stores, and parses the quantizers that are spelled."""
        if mode not in get_args(Mode):
            raise ValueError(expected_one_of("mode", mode, get_args(Mode)))
        given = (weights, activations, kv_cache, queries, probabilities, gradients)
        for (field, _), quantizer in zip(_OPERANDS.values(), given, strict=True):
            parsed = Quantizer.parse(quantizer) if isinstance(quantizer, str) else quantizer
            object.__setattr__(self, field, parsed)
        object.__setattr__(self, "mode", mode)

    @classmethod
    def parse(cls, text: str) -> "Policy":
        """Reads a shorthand: operand letters, each followed by bits, a format or a quantizer.

        The letters are w, a, kv, q, p and grad, in the order of the attributes. "w4a8kv4" is int4
        weights, int8 activations and an int4 cache; "we4m3ae5m2" mixes floats; "w4g128" has blocks
        of 128; "wmxfp4amxfp8", "wnf4" and "wnvfp4anvfp4" name whole quantizers; 16 means
        unquantized, as in "w4a16"; "none" quantizes nothing; "bitnet" is ternary weights with one
        mean scale and int8 activations per token (arXiv 2402.17764). After it may follow operands
        with their quantizers, and a mode: "w8a8, gradients e5m2/token/stochastic, native".

        Raises:
            ValueError: not a shorthand, or an unknown format, operand or mode.
        """
        shorthand, *terms = (part.strip() for part in text.split(","))
        operands: dict[str, Any] = {
            _OPERANDS[letter][0]: Quantizer.parse(quantizer)
            for letter, quantizer in _spelled_operands(shorthand).items()
        }
        for term in terms:
            name, _, quantizer = term.partition(" ")
            if quantizer and name in cls.__dataclass_fields__ and name != "mode":
                operands[name] = Quantizer.parse(quantizer.strip())
            elif term in get_args(Mode):
                operands["mode"] = term
            else:
                raise ValueError(_unknown_policy(text, f"{term!r} is neither operand nor mode"))
        return cls(**operands)

    def operands(self) -> dict[str, Quantizer | None]:
        """Operand names and their quantizers."""
        return {field: getattr(self, field) for field, _ in _OPERANDS.values()}

    def restricted(self, operands: Iterable[str]) -> "Policy":
        """The policy of these operands alone."""
        kept = {operand: getattr(self, operand) for operand in operands}
        return Policy(**kept, mode=self.mode)

    def traced(self) -> "Policy":
        """The same policy with its formats as data; a native one stays, as it needs their names."""
        if self.mode == "native":
            return self
        traced: dict[str, Any] = {name: q and q.traced() for name, q in self.operands().items()}
        return dataclasses.replace(self, **traced)

    @property
    def structure(self) -> str:
        """All that is compiled into a program, in words."""
        native = self.mode == "native"  # its formats are compiled in
        present = {name: q for name, q in self.operands().items() if q is not None}
        named = [f"{name} {q if native else q.structure}" for name, q in present.items()]
        return ", ".join([*named, *(["native"] if native else [])]) or "nothing"

    @property
    def description(self) -> str:
        """The quantized operands and how, "weights int4/channel, activations int8/tensor"."""
        present = {name: q for name, q in self.operands().items() if q is not None}
        named = [f"{name} {q.spelling}" for name, q in present.items() if q.quantizes]
        return ", ".join([*named, *(["native"] if named and self.mode == "native" else [])])

    def bits(self, operand: str) -> float:
        """Bits per element of "weights", "activations", "kv_cache", …; 16 is unquantized."""
        quantizer: Quantizer | None = getattr(self, operand)
        return 16.0 if quantizer is None else quantizer.bits

    def format_name(self, operand: str) -> str:
        """Name of the format of "weights", "activations", "kv_cache" and the others."""
        quantizer: Quantizer | None = getattr(self, operand)
        return "none" if quantizer is None else quantizer.host_format().name

    def __str__(self) -> str:
        """The shorthand, without what it cannot say; "none" where nothing is quantized."""
        terms = [
            letter + _term(self.operands()[field])
            for letter, (field, _) in _OPERANDS.items()
            if self.format_name(field) != "none"
        ]
        return "".join(terms) or "none"


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Rules:
    """Policies by layer path: the first pattern that matches the whole path decides.

    As a pytree its leaves are those of the policies.

    Attributes:
        rules: pairs of a regular expression and a policy, or None for "unquantized, no code".
    """

    rules: tuple[tuple[str, Policy | None], ...]

    def __init__(self, rules: Iterable[tuple[str, Policy | str | None]]):
        """Stores the pairs in order and checks that every pattern compiles."""
        if isinstance(rules, dict):
            raise ValueError(
                "rules are pairs in order: expected [(pattern, policy), …], got a dict"
            )
        pairs = [(pattern, _as_policy(policy)) for pattern, policy in rules]
        object.__setattr__(self, "rules", tuple(pairs))
        for pattern, _ in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from None

    @classmethod
    def of(cls, rules: "AnyRules") -> "Rules":
        """Rules of whatever stands for them: one policy or its shorthand is for every layer."""
        if isinstance(rules, Rules):
            return rules
        if rules is None or isinstance(rules, Policy | str):
            return cls([(".*", rules)])
        return cls(rules)

    def match(self, path: str) -> tuple[str, Policy | None] | None:
        """The first rule whose pattern matches the whole of a "/"-separated path, if any."""
        return next((rule for rule in self.rules if re.fullmatch(rule[0], path)), None)

    def policy_for(self, path: str) -> Policy | None:
        """The policy of the layer at a path.

        Raises:
            ValueError: no pattern matches; the message lists the patterns.
        """
        if (rule := self.match(path)) is not None:
            return rule[1]
        patterns = ", ".join(repr(pattern) for pattern, _ in self.rules)
        raise ValueError(f"no rule matches the layer {path!r}: expected one of {patterns}")

    def check_all_match(self, paths: Iterable[str]) -> None:
        """Raises ValueError for a rule that matches none of the paths; it lists the nearest."""
        paths = list(paths)
        for pattern, _ in self.rules:
            if not any(re.fullmatch(pattern, path) for path in paths):
                near = ", ".join(map(repr, nearest_few(pattern, paths))) or "none at all"
                raise ValueError(f"rule {pattern!r} matches no layer; nearest paths are {near}")

    def tree_flatten(self) -> tuple[tuple[Policy | None, ...], tuple[str, ...]]:
        """The policies as children, the patterns as structure."""
        return tuple(policy for _, policy in self.rules), tuple(p for p, _ in self.rules)

    @classmethod
    def tree_unflatten(cls, patterns: tuple[str, ...], policies: Iterable[Any]) -> "Rules":
        """The inverse of `tree_flatten`."""
        rules = object.__new__(cls)
        object.__setattr__(rules, "rules", tuple(zip(patterns, policies, strict=True)))
        return rules


AnyRules = Rules | Policy | str | Iterable[tuple[str, Policy | str | None]] | None


def _as_policy(policy: Policy | str | None) -> Policy | None:
    return Policy.parse(policy) if isinstance(policy, str) else policy


def _term(quantizer: Quantizer | None) -> str:
    """What follows the letter of a quantized operand."""
    assert quantizer is not None
    if "/" not in str(quantizer):
        return str(quantizer)  # a whole quantizer's name
    term = re.sub(r"^int(?!16$)(?=\d+$)", "", quantizer.host_format().name)
    return term + (f"g{quantizer.block_size}" if quantizer.granularity == "block" else "")


def _spelled_operands(shorthand: str) -> dict[str, str]:
    """Operand letter → quantizer, of a whole shorthand."""
    if shorthand == "bitnet":
        spelled = {"w": "ternary/tensor/absmean", "a": "int8/token"}
    else:
        spelled = {} if shorthand == "none" else _shorthand_terms(shorthand)
    for letter in _ALWAYS_PRESENT:
        spelled.setdefault(letter, f"none/{_OPERANDS[letter][1]}")
    return spelled


def _shorthand_terms(text: str) -> dict[str, str]:
    """Operand letter → quantizer, of a shorthand such as "w4ae4m3"."""
    quantizers: dict[str, str] = {}
    position = 0
    while position < len(text):
        match = _TERM.match(text, position)
        if match is None or match[1] in quantizers:
            reason = (
                "the same operand twice"
                if match
                else f"expected {', '.join(_OPERANDS)} and a format"
            )
            raise ValueError(_unknown_policy(text, f"{reason} at {text[position:]!r}"))
        quantizers[match[1]] = _spelled(match[1], match[2], match[3])
        position = match.end()
    if not quantizers:
        raise ValueError(_unknown_policy(text, "it is empty"))
    return quantizers


def _spelled(letter: str, term: str, block: str | None) -> str:
    """Quantizer of the operand `letter` of "4", "16", "e4m3" or "mxfp4", and of its block size."""
    if term.startswith(("mx", "nv")) or (term == "nf4" and block is None):
        return term
    name = "none" if term == _UNQUANTIZED_BITS else f"int{term}" if term[0].isdigit() else term
    return f"{name}/block:{block}" if block else f"{name}/{_OPERANDS[letter][1]}"


def _unknown_policy(text: str, reason: str) -> str:
    examples = [
        "none",
        "w4",
        "a8",
        "kv4",
        "w4a8",
        "w4a8kv4",
        "we4m3ae5m2",
        "w4g128",
        "wnf4",
        "bitnet",
    ]
    return (
        f"unknown policy {text!r}: {reason}; a policy is 'none', 'bitnet' or terms such as "
        f"w4, ae4m3, kv8; nearest example is {nearest(text, examples)!r}"
    )
