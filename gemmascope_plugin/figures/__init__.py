"""Figures and HTML fragments from plain arrays, lists and frames; returned, never shown."""

from __future__ import annotations

from gemmascope_plugin.figures.charts import bars, curves, heatmap
from gemmascope_plugin.figures.fragments import (
    figure_fragment,
    frame_html,
    token_rows_html,
    tokens_html,
)
from gemmascope_plugin.figures.theme import PAGE_CSS, FigureInputError

__all__ = [
    "PAGE_CSS",
    "FigureInputError",
    "bars",
    "curves",
    "figure_fragment",
    "frame_html",
    "heatmap",
    "token_rows_html",
    "tokens_html",
]
