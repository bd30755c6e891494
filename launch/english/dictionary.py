"""Text of dictionaries in the format of dictd: `.dict.dz`, which is gzip.

Entries begin in the first column and go on indented. Cross references stand in braces; GCIDE adds
pronunciations between backslashes, names of its sources in brackets after every paragraph, and
letters outside ASCII as bracketed signs, such as [ae], ['e] and [=a].
"""

import re
import unicodedata

from launch.english.tidy import tidy, unwrap

_ABOUT = re.compile(r"^00-?database.*?(?=^\S)", re.DOTALL | re.MULTILINE)
_REFERENCE = re.compile(r"\{([^{}]*)\}")
_FOLDOC_END = re.compile(r"^ *(\(\d{4}(-\d\d)*\)|\[?\{Jargon File\}\]?\.?)$", re.MULTILINE)

_GCIDE_FIRST = re.compile(r"^\S[^\n]* \\", re.MULTILINE)
_GCIDE_SOURCES = re.compile(r"\[(?:1913 Webster|Webster 1913|WordNet|PJC|Century)[^\]]*\]")
_GCIDE_SPOKEN = re.compile(r" ?\\[^\\\n]*(?:\n[^\\\n]*)?\\(?: \([^()]*\))?")
_GCIDE_SIGN = re.compile(r"\[(\S{1,6}?)\]")

_ACCENTS = {  # the sign of an accent and the combining character
    "'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308", "=": "\u0304", "-": "\u0304",
    "~": "\u0303", ".": "\u0323", ",": "\u0327",
}  # fmt: skip
_SIGNS = {
    "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "aum": "ä", "imac": "ī", "eth": "ð", "thorn": "þ",
    "root": "√", "deg": "°", "add": "a\u0324", "asl": "ā", "sect": "§", "ng": "ŋ", "udd": "u\u0324",
    "yogh": "ȝ", "th": "th", "oo": "oo", "alpha": "α", "beta": "β", "gamma": "γ", "pi": "π",
    "times": "×", "divby": "÷", "sharp": "♯", "flat": "♭", "is": "is",
}  # fmt: skip


def foldoc_text(entries: str) -> str:
    """The Free On-line Dictionary of Computing, without the dates of its entries."""
    body = _FOLDOC_END.sub("", _ABOUT.sub("", entries))
    return tidy(unwrap(_REFERENCE.sub(_one_line, body)))


def gcide_text(entries: str) -> str:
    """The Collaborative International Dictionary of English, in one line a paragraph."""
    first = _GCIDE_FIRST.search(entries)
    body = entries[first.start() :] if first else entries
    body = _GCIDE_SPOKEN.sub("", _GCIDE_SOURCES.sub("", body))
    body = _GCIDE_SIGN.sub(_letter, _REFERENCE.sub(_one_line, body))
    return tidy(unwrap(body))


def _one_line(match: re.Match[str]) -> str:
    return " ".join(match.group(1).split())


def _letter(match: re.Match[str]) -> str:
    """The letter a bracketed sign stands for; what is no sign stays."""
    sign = match.group(1)
    if sign in _SIGNS:
        return _SIGNS[sign]
    accent, letters = ("^", sign[:-1]) if sign[-1] == "^" else (sign[0], sign[1:])
    if accent not in _ACCENTS or not letters.isalpha() or len(letters) > 2:
        return match.group()
    return unicodedata.normalize("NFC", letters[0] + _ACCENTS[accent] + letters[1:])
