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
from collections.abc import Collection, Iterable
from typing import Any, Literal, get_args

import jax

from qat.pytree import register_unchecked
from qat.quantizer import Granularity, Quantizer
from qat.spelling import expected_instead, expected_one_of, nearest, nearest_few

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
_NAMES = {"bitnet": {"w": "ternary/tensor/absmean", "a": "int8/token"}, "none": {}}
_EMPTY = "nothing"
_UNQUANTIZED_BITS = "16"
_EXAMPLES = ("none", "w4", "a8", "kv4", "w4a8", "w4a8kv4", "we4m3ae5m2", "w4g128", "wnf4", "bitnet")
_TERM = re.compile(
    r"(kv|w|a|q|p|grad)"
    r"(mxfp\d(?:e\dm\d)?|mxint8|nvfp4|nf4|(?:u?int)?\d+(?:full)?"
    r"|e\d+m\d+(?:ieee|b11fnuz|fnuz|fn)?|ternary|binary|bf16|fp16|none)"
    r"(?:g(\d+))?"
)


@register_unchecked
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
            checked = None if quantizer is None else Quantizer.of(quantizer, field)
            object.__setattr__(self, field, checked)
        object.__setattr__(self, "mode", mode)

    @classmethod
    def of(cls, policy: "Policy | str | None") -> "Policy | None":
        """The policy itself, or the one that is spelled; None stays None. What every door takes.

        Raises:
            ValueError: neither, or as `parse`.
        """
        if isinstance(policy, str):
            return cls.parse(policy)
        if policy is not None and not isinstance(policy, cls):
            expected = "a Policy, its spelling such as 'w4a8', or None"
            raise ValueError(expected_instead("policy", expected, policy))
        return policy

    @classmethod
    def parse(cls, text: str) -> "Policy":
        """Reads a shorthand: operand letters, each followed by bits, a format or a quantizer.

        The letters are w, a, kv, q, p and grad, in the order of the attributes. "w4a8kv4" is int4
        weights, int8 activations and an int4 cache; "we4m3ae5m2" mixes floats; "w4g128" has blocks
        of 128; "wmxfp4amxfp8", "wnf4" and "wnvfp4anvfp4" name whole quantizers; 16 means
        unquantized, as in "w4a16"; "none" quantizes nothing; "bitnet" is ternary weights with one
        mean scale and int8 activations per token (arXiv 2402.17764). After it may follow operands
        with their quantizers, and a mode: "w8a8, gradients e5m2/token/stochastic, native". Without
        a shorthand there are no other operands, as in "weights int4/channel"; "nothing" has none.

        Raises:
            ValueError: not a shorthand, or an unknown format, operand or mode.
        """
        if not isinstance(text, str):
            raise ValueError(expected_instead("policy", "text, such as 'w4a8'", text))
        first, *others = (part.strip() for part in text.lower().split(","))
        fields = {} if first == _EMPTY else _parsed_term(first)
        if fields is None:
            spelled = _spelled_operands(first).items()
            fields = {_OPERANDS[letter][0]: Quantizer.parse(word) for letter, word in spelled}
        for term in others:
            if (new := _parsed_term(term)) is None:
                raise ValueError(_unknown_term(text, term))
            fields |= new
        return cls(**fields)

    def operands(self) -> dict[str, Quantizer | None]:
        """Operand names and their quantizers."""
        return {field: getattr(self, field) for field, _ in _OPERANDS.values()}

    def restricted(self, operands: Iterable[str]) -> "Policy":
        """The policy of these operands alone."""
        kept = {operand: getattr(self, operand) for operand in operands}
        return Policy(**kept, mode=self.mode)

    def without(self, operands: Collection[str]) -> "Policy":
        """The policy with these operands unquantized."""
        return self.restricted(name for name in self.operands() if name not in operands)

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
        named = [f"{name} {q if native else q.program}" for name, q in present.items()]
        return ", ".join([*named, *(["native"] if native else [])]) or "nothing"

    @property
    def description(self) -> str:
        """The quantized operands and how, "weights int4/channel, activations int8/tensor"."""
        present = {name: q for name, q in self.operands().items() if q is not None}
        named = [f"{name} {q}" for name, q in present.items() if q.quantizes]
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
        """The shortest text that `parse` reads as this policy.

        Only what has a name can be read again: not numbers given as `value`, a user's own format
        or, in its place, "traced".
        """
        shorthand = "".join(map(_term, _OPERANDS, self.operands().values())) or "none"
        texts = [self._text_after(start) for start in (shorthand, *_NAMES, None)]
        return min((text for text in texts if text is not None), key=len)

    def _text_after(self, start: str | None) -> str | None:
        """The spelling that begins so, without anything for None, or None if there is none."""
        assumed = Policy() if start is None else Policy.parse(start)
        pairs = [(name, q, assumed.operands()[name]) for name, q in self.operands().items()]
        others = [(name, q) for name, q, old in pairs if str(q) != str(old)]
        if any(q is None for _, q in others):
            return None
        native = [self.mode] if self.mode == "native" else []
        terms = [*([start] if start else []), *(f"{name} {q}" for name, q in others), *native]
        return ", ".join(terms) or _EMPTY


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
        items = [] if isinstance(rules, dict | str) or not isinstance(rules, Iterable) else [*rules]
        if not items:
            expected = "pairs (pattern, policy) in order, such as [('head', None), ('.*', 'w4a8')]"
            raise ValueError(expected_instead("rules", expected, rules))
        object.__setattr__(self, "rules", tuple(map(_checked_rule, items)))

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
        layer = repr(path) if path else "(root)"
        raise ValueError(f"no rule matches the layer {layer}: expected one of {patterns}")

    def check_all_match(self, paths: Iterable[str], others: Iterable[str] = ()) -> None:
        """Raises ValueError for a rule that matches no path of a layer; it lists the nearest.

        Args:
            paths: of layers.
            others: that a rule may match too.
        """
        paths, others = list(paths), list(others)
        for pattern, _ in self.rules:
            if not any(re.fullmatch(pattern, path) for path in (*paths, *others)):
                near = ", ".join(map(repr, nearest_few(pattern, paths))) or "none at all"
                raise ValueError(f"rule {pattern!r} matches no layer; nearest paths are {near}")

    @staticmethod
    def why_unquantized(pattern: str, policy: Policy | None, operands: Iterable[str]) -> str:
        """Why a rule leaves these operands of a layer as they are."""
        if policy is None or not policy.description:
            return f"unquantized by rule {pattern!r}"
        return f"rule {pattern!r} quantizes no {', '.join(operands)}"

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        """The policies as children, the patterns as structure."""
        return tuple(policy for _, policy in self.rules), tuple(p for p, _ in self.rules)

    @classmethod
    def tree_unflatten(cls, patterns: tuple[str, ...], policies: Iterable[Any]) -> "Rules":
        """The inverse of `tree_flatten`."""
        rules = object.__new__(cls)
        object.__setattr__(rules, "rules", tuple(zip(patterns, policies, strict=True)))
        return rules


AnyRules = Rules | Policy | str | Iterable[tuple[str, Policy | str | None]] | None


def _checked_rule(rule: Any) -> tuple[str, Policy | None]:
    """A rule with its policy read."""
    if not isinstance(rule, tuple | list) or len(rule) != 2 or not isinstance(rule[0], str):
        raise ValueError(expected_instead("rule", "a pair (pattern, policy)", rule))
    try:
        re.compile(rule[0])
    except re.error as error:
        raise ValueError(f"rule {rule[0]!r} is not a regular expression: {error}") from None
    return rule[0], Policy.of(rule[1])


def _parsed_term(term: str) -> dict[str, Any] | None:
    """The field that "gradients e5m2/token" or "native" sets; None of anything else."""
    name, _, quantizer = term.partition(" ")
    if quantizer and name in (field for field, _ in _OPERANDS.values()):
        return {name: Quantizer.parse(quantizer)}
    return {"mode": term} if term in get_args(Mode) else None


def _term(letter: str, quantizer: Quantizer | None) -> str:
    """An operand in shorthand, such as "w4"; nothing where it needs none or has none."""
    default = f"none/{_OPERANDS[letter][1]}"
    if quantizer is None or (letter in _ALWAYS_PRESENT and str(quantizer) == default):
        return ""
    name, _, rest = str(quantizer).partition("/")
    bits = _UNQUANTIZED_BITS if name == "none" else re.sub(r"^int(?!16$)(?=\d+$)", "", name)
    size = re.fullmatch(r"block:(\d+)", rest)
    term = f"{letter}{bits}" + (f"g{size[1]}" if size else "")
    match = _TERM.fullmatch(term)
    exact = match is not None and str(Quantizer.parse(_spelled(*match.groups()))) == str(quantizer)
    return term if exact else ""


def _spelled_operands(shorthand: str) -> dict[str, str]:
    """Operand letter → quantizer, of a whole shorthand."""
    named = _NAMES.get(shorthand)
    spelled = dict(named) if named is not None else _shorthand_terms(shorthand)
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
    return (
        f"unknown policy {text!r}: {reason}; a policy is 'none', 'bitnet' or terms such as "
        f"w4, ae4m3, kv8; nearest example is {_meant(text)!r}"
    )


def _unknown_term(text: str, term: str) -> str:
    expected = ", ".join([*(field for field, _ in _OPERANDS.values()), *get_args(Mode)])
    return (
        f"unknown policy {text!r}: {term!r} is neither operand nor mode; expected one of "
        f"{expected}, an operand with its quantizer; nearest is {_meant_term(term)!r}"
    )


def _meant(text: str) -> str:
    """The policy that a text was perhaps to be: an example, where nothing tells more."""
    if _is_quantizer(text):
        return f"weights {text}" if "/" in text else f"w{text.removeprefix('int')}"
    joined = text.replace(" ", "")
    terms = list(_TERM.finditer(joined))
    once = len({term[1] for term in terms}) == len(terms)
    if terms and once and "".join(term[0] for term in terms) == joined:
        return joined
    if _is_quantizer(text.partition(" ")[2]):
        return _meant_term(text)
    return nearest(text, _EXAMPLES) if text else "none"


def _meant_term(term: str) -> str:
    """The mode, or the operand with its quantizer, that a term was perhaps to be."""
    word, _, quantizer = term.partition(" ")
    name = nearest(word, [*(field for field, _ in _OPERANDS.values()), *get_args(Mode)])
    return name if name in get_args(Mode) else f"{name} {quantizer or 'int8/token'}"


def _is_quantizer(text: str) -> bool:
    """Whether it begins as one does: with a format, then options."""
    return _TERM.fullmatch(f"w{text.partition('/')[0]}") is not None
