"""One look for all figures: colours, font, margins, labels.

Colours are safe for the common kinds of colour blindness: blue against vermilion for signs, the
Okabe-Ito set for series. The font is the reader's system font, so that pages load nothing.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, SupportsFloat

from gemmascope_plugin.errors import GemmaScopeError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Numbers = Collection[SupportsFloat]
"""Numbers in a list, array, series or tensor of one dimension."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK = "#1f2430"
MUTED = "#6b7280"
GRID = "#e8eaee"
POSITIVE = "#2166ac"
NEGATIVE = "#b2182b"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b")
BAND = "rgba(107, 114, 128, 0.22)"

MAX_LABEL = 28
"""Longest label in characters; longer ones end in an ellipsis."""

PAGE_CSS = f"""
.gs-tokens, .gs-token-rows, .gs-table {{ font-family: {FONT}; color: {INK}; background: #fff; }}
.gs-title {{ font-weight: 600; margin: 0 0 4px; }}
.gs-table {{ border-collapse: collapse; font-size: 13px; }}
.gs-table th {{ text-align: left; border-bottom: 2px solid {GRID}; padding: 4px 12px 4px 4px; }}
.gs-table td {{ text-align: left; border-bottom: 1px solid {GRID}; padding: 3px 12px 3px 4px; }}
.gs-note {{ color: {MUTED}; font-size: 12px; margin: 4px 0; }}
"""
"""Rules for the classes that the HTML fragments use; a page includes them once."""


class FigureInputError(GemmaScopeError):
    """Values and labels that do not fit together."""


def check_length(noun: str, n: int, wanted: int, per: str) -> None:
    """Raise unless there is one of ``what`` for each ``want_what``."""
    if n != wanted:
        raise FigureInputError(
            f"{n} {noun} were given for {wanted} {per}",
            fix=f"give one of {noun} for each of {per}",
        )


def plain(text: str) -> str:
    """Text that plotly draws as it is: its own small markup (bold, links) switched off."""
    return html.escape(text, quote=False)


def visible(text: str, *, blanks: bool = True) -> str:
    """Text with line ends, control characters and (if ``blanks``) spaces made visible."""
    marks = {"\n": "↵", "\t": "⇥", " ": "·" if blanks else " "}
    return "".join(
        marks[c] if c in marks else c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
    )


def short_label(text: str) -> str:
    """A label cut to ``MAX_LABEL``; blanks are marked at its ends, where they would be lost."""
    cut = text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"
    core = cut.strip(" ")
    before, _, after = cut.partition(core) if core else (cut, "", "")
    return visible(before) + visible(core, blanks=False) + visible(after)


def axis_labels(labels: Iterable[object]) -> list[str]:
    """Short, escaped labels; when two are equal, all are numbered by position ("5 john").

    A category axis would draw equal labels on top of each other.
    """
    short = [short_label(str(label)) for label in labels]
    if len(set(short)) < len(short):
        short = [f"{position} {label}" for position, label in enumerate(short)]
    return [plain(label) for label in short]


def number(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:.3g}"


def styled(
    figure: Figure,
    *,
    title: str,
    x_title: str,
    y_title: str,
    height: int,
) -> Figure:
    """Give a figure the common look and return it."""
    axis = {"gridcolor": GRID, "zerolinecolor": "#c5c9d1", "linecolor": GRID, "automargin": True}
    figure.update_layout(
        template="plotly_white",
        title={"text": plain(title), "font": {"size": 16}, "x": 0, "xanchor": "left"},
        title_pad={"l": 8},
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 60, "r": 20, "t": 48, "b": 52},
        height=height,
        hoverlabel={"font": {"family": FONT}},
        # In a notebook, where the page's configuration does not reach, no button uploads the data.
        modebar={"remove": ["sendChartToCloud"]},
        legend={
            "traceorder": "normal",
            "orientation": "h",
            "yanchor": "bottom",
            "y": 1.0,
            "x": 1.0,
            "xanchor": "right",
        },
    )
    figure.update_xaxes(title_text=plain(x_title), **axis)
    figure.update_yaxes(title_text=plain(y_title), **axis)
    return figure


def floats(values: Numbers) -> list[float]:
    """Any collection of numbers as Python floats."""
    return [float(value) for value in values]


def finite_max(values: Iterable[float]) -> float:
    """Largest absolute value that is finite; 1 when there is none above 0."""
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0
