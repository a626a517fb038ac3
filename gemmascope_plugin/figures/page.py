"""Fragments of a self-contained page: figures with the plotting library inlined, and tables."""

from __future__ import annotations

import html
from numbers import Integral, Real
from typing import TYPE_CHECKING

from gemmascope_plugin.figures.theme import FigureInputError

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

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
