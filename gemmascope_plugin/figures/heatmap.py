"""A labelled matrix as a heatmap, e.g. layer x position effects. Cost: linear in the cells."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped

from gemmascope_plugin.figures.theme import (
    axis_labels,
    check_length,
    finite_max,
    floats,
    plain,
    styled,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def heatmap(
    values: Shaped[np.ndarray, "rows columns"],
    *,
    x: Collection[object],
    y: Collection[object],
    x_title: str = "",
    y_title: str = "",
    title: str = "",
    color_title: str = "",
    symmetric: bool = True,
    limit: float | None = None,
) -> Figure:
    """Draw a matrix, its first row on top.

    Args:
        values: The matrix; NaN cells stay empty.
        x: One label per column, e.g. tokens; numbered by position when two are equal.
        y: One label per row.
        x_title: Title of the columns.
        y_title: Title of the rows.
        title: Title of the figure.
        color_title: What the colour means.
        symmetric: Diverging colours centred at 0; else one colour from least to greatest.
        limit: Absolute value of the full colours, to make heatmaps comparable; the largest absolute
            value when None.

    Returns:
        A plotly figure.

    Raises:
        FigureInputError: When labels and matrix do not fit.
    """
    import plotly.graph_objects as go

    check_length("column labels", len(x), values.shape[1], "columns")
    check_length("row labels", len(y), values.shape[0], "rows")
    full = limit or finite_max(floats(values.ravel()))
    scale = (
        {"colorscale": "RdBu", "zmin": -full, "zmax": full, "zmid": 0}
        if symmetric
        else {"colorscale": "Oranges"}
    )
    trace = go.Heatmap(
        z=values,
        x=axis_labels(x),
        y=axis_labels(y),
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": plain(color_title)}, "thickness": 14},
        hovertemplate=f"{plain(y_title)} %{{y}}<br>{plain(x_title)} %{{x}}<br>%{{z:.4g}}"
        "<extra></extra>",
        **scale,
    )
    figure = go.Figure(trace)
    height = max(280, 26 * values.shape[0] + 150)
    styled(figure, title=title, x_title=x_title, y_title=y_title, height=height)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return figure
