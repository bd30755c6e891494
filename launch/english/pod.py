"""Text of POD, the markup of Perl's manuals."""

import html
import re

from launch.english.tidy import tidy

_ESCAPES = {"sol": "/", "verbar": "|"}  # the other names are those of HTML
_COMMAND = re.compile(r"^=(\w+)[ \t]*(.*)$", re.DOTALL)
_BEGIN = re.compile(r"^=begin\b.*?^=end\b[^\n]*$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"[A-Z](?:<<<+ (.*?) >>>+|<< (.*?) >>|<([^<>]*)>)", re.DOTALL)


def pod_text(source: str) -> str:
    """The text of a POD file: headings, paragraphs, and code as it is indented."""
    paragraphs = []
    for paragraph in re.split(r"\n[ \t]*\n", _BEGIN.sub("", source)):
        stripped = paragraph.strip("\n")
        if command := _COMMAND.match(stripped):
            name, rest = command.groups()
            if name in ("encoding", "for", "cut", "pod", "over", "back"):
                continue
            stripped = "" if rest == "*" else rest
        if not stripped[:1].isspace():
            stripped = " ".join(_plain(stripped).split())
        paragraphs.append(stripped)
    return tidy("\n\n".join(paragraphs))


def _plain(text: str) -> str:
    """Resolves formatting codes, the inner ones first."""
    before = ""
    while before != text:
        before, text = text, _CODE.sub(_resolve, text)
    return text


def _resolve(match: re.Match[str]) -> str:
    body = next(group for group in match.groups() if group is not None)
    match match.group()[0]:
        case "E":
            return _ESCAPES[body] if body in _ESCAPES else html.unescape(f"&{body};")
        case "X" | "Z":
            return ""
        case "L" if "://" in body.partition("|")[2] or "://" not in body:
            text, bar, _ = body.partition("|")
            page, _, section = text.partition("/")
            return text if bar else (section.strip('"') or page)
        case _:
            return body
