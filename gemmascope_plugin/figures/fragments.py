"""Fragments of HTML: cards and tables, figures with the plotting library inlined, coloured tokens.

All text is escaped, and nothing is loaded from anywhere. Tokens are coloured by a value each: white is
0, orange a positive and blue a negative value; the number is in the tooltip, and blanks and line ends
are drawn.

Cost: linear in rows and tokens; 5 MB for the plotting library.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

from gemmascope_plugin.figures.theme import (
    FONT,
    INK,
    MUTED,
    FigureInputError,
    Numbers,
    check_length,
    finite_max,
    floats,
    number,
    visible,
)

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

_CELL = "padding:2px 10px 2px 0;text-align:left;vertical-align:top"
_CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "displayModeBar": "hover",
    # By default a figure offers to upload its data.
    "showSendToCloud": False,
    # What is left (save as picture, reset) is short enough not to cover titles.
    "modeBarButtonsToRemove": [
        "zoom2d",
        "pan2d",
        "select2d",
        "lasso2d",
        "zoomIn2d",
        "zoomOut2d",
        "autoScale2d",
    ],
}


def card(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """A titled list of facts."""
    rows = "".join(
        f'<tr><td style="{_CELL};opacity:.65">{html.escape(name)}</td>'
        f'<td style="{_CELL}">{html.escape(str(value))}</td></tr>'
        for name, value in facts
    )
    return (
        '<div style="border:1px solid #8884;border-radius:6px;padding:8px 12px;'
        'display:inline-block;font-family:sans-serif;font-size:13px">'
        f"<b>{html.escape(title)}</b><table>{rows}</table></div>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """A plain table with a note below."""
    head = "".join(f'<th style="{_CELL}">{html.escape(name)}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{html.escape(str(c))}</td>' for c in row) + "</tr>"
        for row in rows
    )
    foot = f'<div style="opacity:.65">{html.escape(note)}</div>' if note else ""
    return (
        '<div style="font-family:sans-serif;font-size:13px">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{foot}</div>"
    )


def figure_fragment(fig: Figure, include_js: bool, *, div_id: str | None = None) -> str:
    """A ``div`` that draws the figure without any request to a network.

    Args:
        fig: A plotly figure.
        include_js: Put the plotting library (about 5 MB) before the figure: True for the first
            figure of a page and False for all others.
        div_id: Id of the element; a random one when None.

    Returns:
        An HTML fragment as wide as its container.
    """
    import plotly.io
    from plotly.offline import get_plotlyjs

    body = plotly.io.to_html(
        fig,
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        default_height=f"{fig.layout.height or 400}px",
        div_id=div_id,
        config=_CONFIG,
    )
    library = f'<script type="text/javascript">{get_plotlyjs()}</script>' if include_js else ""
    return f'<div class="gs-figure">{library}{body}</div>'


def frame_html(frame: DataFrame, max_rows: int = 50) -> str:
    """The first rows of a frame as a table; text is escaped, numbers have four digits.

    Args:
        frame: Any frame; its index is left out.
        max_rows: How many rows to show; a note says how many follow.

    Returns:
        An HTML fragment of class ``gs-table``.

    Raises:
        FigureInputError: When ``max_rows`` is not positive.
    """
    if max_rows < 1:
        raise FigureInputError(f"max_rows is {max_rows}", fix="give a number from 1 up")
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in frame.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>"
        for row in frame.head(max_rows).itertuples(index=False, name=None)
    )
    table = f'<table class="gs-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    left = len(frame) - max_rows
    return table + (f'<p class="gs-note">… and {left} more rows</p>' if left > 0 else "")


def _cell(value: object) -> str:
    real = isinstance(value, Real) and not isinstance(value, Integral)
    text = f"{value:.4g}" if real else str(value)
    return html.escape(text)


_ORANGE = (245, 124, 0)
_BLUE = (33, 102, 172)
_WRAP = html.escape(
    f"font-family:{FONT};font-size:14px;color:{INK};background:#fff;line-height:1.9"
)
_TOKEN = "padding:2px 1px;border-radius:3px;white-space:pre-wrap"


def tokens_html(
    tokens: Collection[str],
    values: Numbers,
    *,
    title: str | None = None,
    labels: Collection[str] | None = None,
    max_value: float | None = None,
) -> str:
    """One line of tokens, each coloured by its value.

    Args:
        tokens: Text of each token.
        values: One value per token.
        title: A line above.
        labels: A note per token, shown in its tooltip.
        max_value: Value of the full colour; the largest absolute value when None.

    Returns:
        An HTML fragment.

    Raises:
        FigureInputError: When tokens, values and labels differ in number.
    """
    spans = _spans(tokens, values, labels, max_value)
    return f'<div class="gs-tokens" style="{_WRAP}">{_title(title)}{spans}</div>'


def token_rows_html(
    tokens: Collection[str],
    rows: Sequence[tuple[str, Numbers]],
    *,
    title: str | None = None,
) -> str:
    """The same tokens once per row, e.g. one row per feature.

    Args:
        tokens: Text of each token.
        rows: A label and one value per token for every row.
        title: A line above. Each row has the full colour at its largest absolute value.

    Returns:
        An HTML fragment.

    Raises:
        FigureInputError: When a row differs from the tokens in length.
    """
    label_style = f"color:{MUTED};font-size:12px;padding:2px 12px 2px 0;vertical-align:top"
    lines = "".join(
        f'<tr><td style="{label_style}">{html.escape(label)}</td>'
        f"<td>{_spans(tokens, values, None, None)}</td></tr>"
        for label, values in rows
    )
    table = f'<table style="border-collapse:collapse">{lines}</table>'
    return f'<div class="gs-token-rows" style="{_WRAP}">{_title(title)}{table}</div>'


def _spans(
    tokens: Collection[str],
    values: Numbers,
    labels: Collection[str] | None,
    max_value: float | None,
) -> str:
    check_length("values", len(values), len(tokens), "tokens")
    if labels is not None:
        check_length("labels", len(labels), len(tokens), "tokens")
    numbers = floats(values)
    full = abs(max_value) if max_value else finite_max(numbers)
    notes = labels if labels is not None else [""] * len(tokens)
    return "".join(
        _span(token, value, note, full)
        for token, value, note in zip(tokens, numbers, notes, strict=True)
    )


def _span(token: str, value: float, note: str, full: float) -> str:
    tip = f"{visible(token)}: {number(value)}" + (
        f" ({visible(note, blanks=False)})" if note else ""
    )
    style = f"{_TOKEN};background:{_color(value / full)}"
    # The break after a token lets long prompts wrap without adding a blank to the text.
    return (
        f'<span class="gs-token" style="{style}" title="{html.escape(tip)}">'
        f"{html.escape(visible(token))}</span><wbr>"
    )


def _color(share: float) -> str:
    """White at 0 to orange at 1, to blue at -1; a value that is not finite stays white."""
    if share != share:
        share = 0.0
    strength = min(abs(share), 1.0)
    target = _ORANGE if share > 0 else _BLUE
    red, green, blue = (round(255 + (part - 255) * 0.85 * strength) for part in target)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _title(title: str | None) -> str:
    if not title:
        return ""
    return f'<div class="gs-title" style="font-weight:600">{html.escape(title)}</div>'
