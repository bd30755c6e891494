"""How every figure looks: an SVG small enough to be read on a phone, one colour a series."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_STYLE: dict[str, Any] = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "svg.hashsalt": "qat",
    "figure.constrained_layout.use": True,
}
_SIZE_INCHES = (4.8, 4.3)
_COLOURS = ("#4053d3", "#ddb310", "#b51d14", "#00beff", "#fb49b0", "#00b25d", "#6b6b6b")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@contextmanager
def figure() -> Iterator[tuple[Figure, Axes]]:
    """A figure in the report's style; no window system is touched."""
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        drawn = Figure(figsize=_SIZE_INCHES)
        yield drawn, drawn.subplots()


def svg(drawn: Figure, axes: Axes) -> str:
    """The figure with its legend below the axis, where it hides nothing."""
    if entries := len(axes.get_legend_handles_labels()[0]):
        columns = 2 if entries == 2 else 3
        drawn.legend(loc="outside lower center", ncols=columns, fontsize=10, frameon=False)
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def style(index: int) -> dict[str, Any]:
    """Marker and colour of a series."""
    return {
        "marker": _MARKERS[index % len(_MARKERS)],
        "color": _COLOURS[index % len(_COLOURS)],
    }
