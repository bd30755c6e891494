"""Error messages: what was given, what was expected, and the nearest valid spelling."""

import difflib
import textwrap
from collections.abc import Iterable


def nearest(word: object, options: Iterable[str]) -> str:
    """The option most like `word`, ignoring case; there is always one."""
    return difflib.get_close_matches(str(word).lower(), list(options), n=1, cutoff=0.0)[0]


def expected_one_of(what: str, word: object, options: Iterable[str]) -> str:
    """An error message that names a wrong word, the valid ones and the nearest of them."""
    options = list(options)
    return (
        f"unknown {what} {word!r}: expected one of {', '.join(options)}; "
        f"nearest is {nearest(word, options)!r}"
    )


def nearest_few(word: object, options: Iterable[str], most: int = 5) -> list[str]:
    """Up to `most` options, the most like `word` first."""
    return difflib.get_close_matches(str(word), list(options), n=most, cutoff=0.0)


def expected_instead(what: str, expected: str, value: object) -> str:
    """An error message that names a value of the wrong kind, in one line."""
    text = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
    return f"{what}: expected {expected}, got {textwrap.shorten(text, 80, placeholder=' …')}"
