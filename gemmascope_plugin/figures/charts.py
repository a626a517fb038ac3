"""Plain charts: bars, lines and heatmaps.

``bars``      ranked horizontal bars, coloured by sign, such as effects of heads
``curves``    lines over a common x with an optional shaded band, such as a circuit against random ones
``heatmap``   a labelled matrix, such as effects by layer and position

Cost: linear in what is drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped

from gemmascope_plugin.figures.theme import (
    BAND,
    MUTED,
    NEGATIVE,
    POSITIVE,
    SERIES,
    Numbers,
    axis_labels,
    check_length,
    finite_max,
    floats,
    plain,
    short_label,
    styled,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter


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


Band = tuple[str, Numbers, Numbers]
"""Name, lower edge, upper edge; one value of each edge per x."""


def curves(
    x: Numbers,
    series: Mapping[str, Numbers],
    *,
    band: Band | None = None,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    hline: float | None = None,
    ticks: Collection[object] | None = None,
) -> Figure:
    """Draw one line per series.

    Args:
        x: Places where all series are known.
        series: Values by name; NaN leaves a gap.
        band: A shaded area drawn under the lines.
        title: Title of the figure.
        x_title: What x is.
        y_title: What the values are.
        hline: Height of a dashed reference line.
        ticks: A label for each x, such as a token; the numbers themselves when None.

    Returns:
        A plotly figure.

    Raises:
        FigureInputError: When a series, the ticks or an edge of the band differ from x in length.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    places = floats(x)
    if band is not None:
        for trace in _band(places, band):
            figure.add_trace(trace)
    for i, (name, values) in enumerate(series.items()):
        check_length(f"values of {name!r}", len(values), len(places), "places on x")
        color = SERIES[i % len(SERIES)]
        figure.add_trace(
            go.Scatter(
                x=places,
                y=floats(values),
                name=plain(name),
                mode="lines+markers",
                line={"color": color, "width": 2.5},
                marker={"size": 6, "color": color},
            )
        )
    if hline is not None:
        figure.add_hline(y=hline, line={"color": MUTED, "dash": "dash", "width": 1})
    styled(figure, title=title, x_title=x_title, y_title=y_title, height=380)
    if ticks is not None:
        check_length("ticks", len(ticks), len(places), "places on x")
        labels = [plain(short_label(str(tick))) for tick in ticks]
        figure.update_xaxes(tickmode="array", tickvals=places, ticktext=labels)
    # The legend has a line of its own below the title, so that neither covers the other.
    figure.update_layout(margin_t=76, title={"y": 1, "yanchor": "top", "yref": "container"})
    figure.update_layout(title_pad={"l": 8, "t": 14})
    return figure


def _band(x: list[float], band: Band) -> list[Scatter]:
    """The two edges; the second is filled towards the first, so their order matters."""
    import plotly.graph_objects as go

    name, low, high = band
    check_length(f"lower values of {name!r}", len(low), len(x), "places on x")
    check_length(f"upper values of {name!r}", len(high), len(x), "places on x")
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    lower = go.Scatter(x=x, y=floats(low), showlegend=False, **edge)
    upper = go.Scatter(
        x=x, y=floats(high), name=plain(name), fill="tonexty", fillcolor=BAND, **edge
    )
    return [lower, upper]


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
