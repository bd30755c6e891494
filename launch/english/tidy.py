"""What all cleaners end with: plain characters, no rules or ragged white space, no empty rest."""

import re

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060\ufeff\ufffd]"
)
_SPACES = re.compile("[\xa0\u2000-\u200a\u202f\u205f\u3000]")
_RULE = re.compile(r"^[-=*~_+|#^. \t]{3,}$", re.MULTILINE)  # ====, +---+---+, * * *
_BLANK_LINES = re.compile(r"\n{3,}")
_FEWEST_LETTERS = 0.5  # of what is not white space: below it is a table or a dump


def tidy(text: str) -> str:
    """A text of readable lines, one empty line at most between them; "" if nothing is left."""
    text = _INVISIBLE.sub("", _SPACES.sub(" ", text.replace("\r\n", "\n")))
    lines = (line.rstrip() for line in _RULE.sub("", text).split("\n"))
    text = _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")
    return text + "\n" if text else ""


def unwrap(text: str) -> str:
    """Every paragraph in one line; paragraphs are what empty lines part."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def is_prose(text: str) -> bool:
    """Whether a text is mostly words of the Latin alphabet."""
    solid = "".join(text.split())
    letters = sum(character.isalpha() and character < "\u0250" for character in solid)
    return letters > _FEWEST_LETTERS * len(solid)
