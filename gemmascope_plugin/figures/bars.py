"""Ranked horizontal bars, coloured by sign, e.g. effects of heads. Cost: linear in the bars."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from gemmascope_plugin.figures.theme import (
    NEGATIVE,
    POSITIVE,
    Numbers,
    axis_labels,
    check_length,
    floats,
    styled,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def bars(
    labels: Collection[object],
    values: Numbers,
    *,
    title: str = "",
    x_title: str = "",
    errors: Numbers | None = None,
) -> Figure:
    """Draw one bar per label, the largest absolute value on top.

    Args:
        labels: What is ranked; numbered by rank when two are equal.
        values: One value per label.
        title: Title of the figure.
        x_title: What the values are.
        errors: Half lengths of error bars, one per label.

    Returns:
        A plotly figure.

    Raises:
        FigureInputError: When labels, values and errors differ in number.
    """
    import plotly.graph_objects as go

    check_length("values", len(values), len(labels), "labels")
    if errors is not None:
        check_length("errors", len(errors), len(labels), "labels")
    names, sizes = list(labels), floats(values)
    order = sorted(range(len(names)), key=lambda i: -abs(sizes[i]))
    ranked = [sizes[i] for i in order]
    halves = None if errors is None else floats(errors)
    trace = go.Bar(
        x=ranked,
        y=axis_labels(names[i] for i in order),
        orientation="h",
        marker={"color": [POSITIVE if value >= 0 else NEGATIVE for value in ranked]},
        error_x=None if halves is None else {"array": [halves[i] for i in order]},
        hovertemplate="%{y}: %{x:.4g}<extra></extra>",
    )
    figure = go.Figure(trace)
    styled(figure, title=title, x_title=x_title, y_title="", height=max(220, 24 * len(order) + 120))
    figure.update_layout(bargap=0.25, showlegend=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure
