"""Text of HTML pages."""

import re
from html.parser import HTMLParser

from launch.english.tidy import tidy

_VOID = {
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr",
}  # fmt: skip
_SKIPPED = {"head", "script", "style", "nav", "footer", "form", "svg", "button"}
_SKIPPED_CLASSES = {  # of Sphinx, DocBook, Texinfo and SQLite
    "headerlink", "toctree-wrapper", "contents", "related", "sphinxsidebar", "footer",
    "navheader", "navfooter", "toc", "nosearch", "header", "printindex-cp", "printindex-fn",
}  # fmt: skip
_SKIPPED_IDS = {"footer", "toc"}
_PARAGRAPHS = {
    "p", "pre", "blockquote", "table", "ul", "ol", "dl", "h1", "h2", "h3", "h4", "h5", "h6",
}  # fmt: skip
_LINES = {"br", "div", "li", "dt", "dd", "tr", "section"}
_PARTS = {"td": "\t", "th": "\t"}


class _Text(HTMLParser):
    """Collects text, white space as a browser would have it, without what surrounds a page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipping: list[str] = []  # open elements from the skipped one inwards
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        skip = (
            tag in _SKIPPED
            or not _SKIPPED_CLASSES.isdisjoint(values.get("class", "").split())
            or values.get("id") in _SKIPPED_IDS
        )
        if self._skipping or skip:
            if tag in _SKIPPED and not self._skipping:
                self.parts.append("\n")
            if tag not in _VOID:
                self._skipping.append(tag)
            return
        self._break(tag)
        self._preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            if tag in self._skipping:  # an element that was never closed ends with its parent
                while self._skipping.pop() != tag:
                    pass
            return
        self._preformatted -= tag == "pre" and self._preformatted > 0
        if tag in _PARAGRAPHS or tag == "tr":
            self._break(tag)

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data if self._preformatted else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self.parts.append("\n\n")
        elif tag in _LINES:
            self.parts.append("\n")
        else:
            self.parts.append(_PARTS.get(tag, ""))


def html_text(page: str) -> str:
    """The text of an HTML page: its main part if one is marked, without navigation."""
    main = re.search(r'<div[^>]*role="main"', page)
    parser = _Text()
    parser.feed(page[main.start() :] if main else page)
    parser.close()
    text = "".join(parser.parts)
    return tidy(re.sub(r" *\n +(?=\S)", _indent, text))


def _indent(match: re.Match[str]) -> str:
    """Keeps the indentation of code, which is two spaces at least; drops single spaces."""
    return "\n" if match.group().endswith("\n ") else match.group()
