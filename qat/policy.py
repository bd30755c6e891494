"""Which operand of a layer is quantized how, and which layer gets which policy.

A `Policy` names every operand that is quantized in the forward pass. Formats are data, so the
policies that `Policy.parse` returns all share one structure: an operand that the shorthand does
not mention gets the format "none", whose grid is float32 itself. One compiled program then serves
"w4", "a8kv4" and "none" alike. An operand set to None by hand is left out of the program.

The default granularities are those of Kumar et al. (arXiv 2411.04330): weights per output channel,
activations per tensor. Cached keys and values are scaled per token and head, since a cache cannot
know the tokens that come later.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable

import jax

from qat.formats import parse_format
from qat.quantizer import Granularity, Quantizer

_OPERANDS: dict[str, tuple[str, Granularity]] = {
    "w": ("weights", "channel"),
    "a": ("activations", "tensor"),
    "kv": ("kv_cache", "token"),
}
_UNQUANTIZED_BITS = "16"
_TERM = re.compile(
    r"(kv|w|a)"
    r"((?:int)?\d+|e\d+m\d+(?:ieee|b11fnuz|fnuz|fn)?|ternary|binary|bf16|fp16|none)"
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """Quantizers of the operands of a layer; None leaves an operand out of the program.

    As a pytree its leaves are the numbers of the formats (none while the formats are named,
    those of the grids once `traced`), and its structure is what a program is compiled for.

    Attributes:
        weights: the right-hand operand of dense projections.
        activations: the left-hand operand of dense projections.
        kv_cache: keys and values as they enter the attention cache.
    """

    weights: Quantizer | None = None
    activations: Quantizer | None = None
    kv_cache: Quantizer | None = None

    @classmethod
    def parse(cls, text: str) -> "Policy":
        """Reads a shorthand: operand letters w, a, kv, each followed by bits or a format.

        "w4a8kv4" is int4 weights, int8 activations and an int4 cache; "we4m3ae5m2" mixes floats;
        16 means unquantized, as in "w4a16"; "none" quantizes nothing. The structure is the same
        for every shorthand.

        Raises:
            ValueError: not a shorthand, or an unknown format in it.
        """
        formats = {} if text == "none" else _shorthand_terms(text)
        return cls(
            **{
                field: Quantizer(parse_format(formats.get(letter, "none")), granularity)
                for letter, (field, granularity) in _OPERANDS.items()
            }
        )

    def traced(self) -> "Policy":
        """The same policy with its formats as data."""
        operands = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Policy(**{name: q and q.traced() for name, q in operands.items()})

    def bits(self, operand: str) -> float:
        """Bits per element of "weights", "activations" or "kv_cache"; 16 is unquantized."""
        quantizer: Quantizer | None = getattr(self, operand)
        return 16.0 if quantizer is None else quantizer.bits

    def format_name(self, operand: str) -> str:
        """Name of the format of "weights", "activations" or "kv_cache"."""
        quantizer: Quantizer | None = getattr(self, operand)
        return "none" if quantizer is None else quantizer.host_format().name

    def __str__(self) -> str:
        """The shorthand, without granularities; "none" where nothing is quantized."""
        terms = [
            letter + re.sub(r"^int(?!16$)(?=\d)", "", self.format_name(field))
            for letter, (field, _) in _OPERANDS.items()
            if self.format_name(field) != "none"
        ]
        return "".join(terms) or "none"


@dataclasses.dataclass(frozen=True)
class Rules:
    """Policies by layer path: the first pattern that matches the whole path decides.

    Attributes:
        rules: pairs of a regular expression and a policy, or None for "unquantized, no code".
    """

    rules: tuple[tuple[str, Policy | None], ...]

    def __init__(self, rules: Iterable[tuple[str, Policy | None]]):
        """Stores the pairs in order and checks that every pattern compiles."""
        object.__setattr__(self, "rules", tuple(rules))
        for pattern, _ in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from None

    def policy_for(self, path: str) -> Policy | None:
        """The policy of the layer at a "/"-separated path.

        Raises:
            ValueError: no pattern matches; the message lists the patterns.
        """
        for pattern, policy in self.rules:
            if re.fullmatch(pattern, path):
                return policy
        patterns = ", ".join(repr(pattern) for pattern, _ in self.rules)
        raise ValueError(f"no rule matches the layer {path!r}: expected one of {patterns}")


def _shorthand_terms(text: str) -> dict[str, str]:
    """Operand letter → format name, of a shorthand such as "w4ae4m3"."""
    formats: dict[str, str] = {}
    position = 0
    while position < len(text):
        match = _TERM.match(text, position)
        if match is None or match[1] in formats:
            reason = "the same operand twice" if match else "expected w, a or kv and a format"
            raise ValueError(_unknown_policy(text, f"{reason} at {text[position:]!r}"))
        formats[match[1]] = _format_of_term(match[2])
        position = match.end()
    if not formats:
        raise ValueError(_unknown_policy(text, "it is empty"))
    return formats


def _format_of_term(term: str) -> str:
    """Format name of "4", "16" or "e4m3"."""
    if term == _UNQUANTIZED_BITS:
        return "none"
    return f"int{term}" if term.isdigit() else term


def _unknown_policy(text: str, reason: str) -> str:
    examples = ["none", "w4", "a8", "kv4", "w4a8", "w4a8kv4", "we4m3ae5m2"]
    nearest = difflib.get_close_matches(text.lower(), examples, 1, 0.0)[0]
    return (
        f"unknown policy {text!r}: {reason}; a policy is 'none' or terms such as "
        f"w4, ae4m3, kv8; nearest example is {nearest!r}"
    )
