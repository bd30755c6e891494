"""Numbers in flags: 1e18,1e19 and E=1.69,alpha=0.34."""

from collections.abc import Sequence


def listed(flag: str, words: Sequence[str]) -> tuple[float, ...]:
    """A flag's words as numbers.

    Raises:
        ValueError: one of them is none.
    """
    return tuple(_number(flag, word, word, "numbers such as 1e18,1e19") for word in words)


def named(flag: str, words: Sequence[str]) -> dict[str, float]:
    """A flag's NAME=NUMBER words as a mapping.

    Raises:
        ValueError: one of them is none, or names what another has named.
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, value = (part.strip() for part in word.partition("="))
        if name in found:
            raise ValueError(f"--{flag} gives {name} twice: {found[name]:g} and {value}")
        found[name] = _number(flag, value, word, "NAME=NUMBER such as E=1.69")
    return found


def _number(flag: str, text: str, word: str, expected: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--{flag}: expected {expected}, not {word!r}") from None
