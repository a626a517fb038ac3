"""A graph in layers: nodes in rows from the bottom up, edges as curves between them.

1. Only the edges with the largest absolute weights are drawn, and the nodes that they touch or that are
   asked for.
2. A row for the key-value heads of a layer, above it its heads, above them its MLP, so that edges go up;
   nodes without a layer stand on top of all. Rows without nodes are left out.
3. Width of an edge: its absolute weight, in a few steps, each step and sign one trace of plotly. Curves
   bow to the side, more the further they go, so that they do not run through the nodes between.

Cost: linear in the edges, and a sort of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from gemmascope_plugin.figures.theme import (
    MUTED,
    NEGATIVE,
    POSITIVE,
    SERIES,
    check_length,
    plain,
    short_label,
    styled,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_EDGES = 300
"""Edges that are drawn at most."""
MAX_LABELS = 20
"""Nodes of one row that are labelled; more are named when pointed at."""
LIFT = {
    **{"kv": 0.0, "head": 0.3, "attention feature": 0.3, "attention error": 0.35},
    **{"mlp": 0.6, "MLP feature": 0.6, "MLP error": 0.65},
    **{"feature": 0.6, "residual feature": 0.8, "residual error": 0.85},
}
"""Order of the rows of a layer by kind."""
WIDTHS = (1.0, 2.0, 3.2, 4.6)
_T = np.linspace(0, 1, 13)
_BOW = 0.05
_SPACE = 0.4
"""Distance of two nodes of one row, at most; the figure is 2 wide."""

Ends = Int[np.ndarray, " edge"]


def layered_graph(
    labels: Sequence[str],
    kinds: Sequence[str],
    layers: Sequence[int | None],
    *,
    source: Ends,
    target: Ends,
    weights: Float[np.ndarray, " edge"],
    edge_labels: Sequence[str] | Shaped[np.ndarray, " edge"],
    links: Int[np.ndarray, "link two"] | None = None,
    nodes: Int[np.ndarray, " some"] | None = None,
    node_weights: Float[np.ndarray, " node"] | None = None,
    title: str = "",
    max_edges: int = MAX_EDGES,
) -> Figure:
    """A figure of the largest ``max_edges`` edges, which lie between places in ``labels``.

    A kind is a colour and a height within the layer; a layer of None is on top of all. ``links`` are
    pairs of nodes that belong together, joined by a dotted line where both are drawn; ``nodes`` are drawn
    whether edges touch them or not; a negative ``node_weights`` puts a ring around a node. The title says
    itself when edges are left out.
    """
    import plotly.graph_objects as go

    check_length("kinds", len(kinds), len(labels), "labels")
    check_length("layers", len(layers), len(labels), "labels")
    for name, values in (("targets", target), ("weights", weights), ("edge labels", edge_labels)):
        check_length(name, len(values), len(source), "sources")
    if node_weights is not None:
        check_length("node weights", len(node_weights), len(labels), "labels")
    chosen = np.argsort(-np.abs(weights), kind="stable")[:max_edges]
    if len(chosen) < len(source):
        title += f", the {len(chosen)} largest drawn"
    # Small ones first, so that large ones lie on top.
    chosen = chosen[::-1]
    ends, sizes = np.stack([source[chosen], target[chosen]], 1), weights[chosen]
    drawn = np.unique(ends if nodes is None else np.concatenate([ends.ravel(), nodes]))
    heights = _heights(kinds, layers)
    places = _places(heights, drawn)
    figure = go.Figure()
    if links is not None and len(links):
        _add_links(figure, links[np.isin(links, drawn).all(1)], places)
    add_edges(figure, places[ends], sizes, np.asarray(edge_labels, dtype=object)[chosen])
    if node_weights is not None and bool((node_weights[drawn] < 0).any()):
        title += ", ringed nodes work against the metric"
    add_nodes(figure, drawn, labels, kinds, places, node_weights)
    named = {i: layer for i in drawn.tolist() if (layer := layers[i]) is not None and layer >= 0}
    ticks = {
        layer: float(np.mean([places[i, 1] for i in named if named[i] == layer]))
        for layer in sorted(set(named.values()))
    }
    n_rows = len(np.unique(heights[drawn]))
    styled(figure, title=title, x_title="", y_title="layer", height=min(2400, 64 * n_rows + 170))
    _style_axes(figure, ticks, n_rows)
    return figure


def _heights(kinds: Sequence[str], layers: Sequence[int | None]) -> Float[np.ndarray, " node"]:
    """What orders the rows: layer, and kind within it."""
    top = max((layer for layer in layers if layer is not None), default=-1) + 1
    heights = [
        top if layer is None else layer + LIFT.get(kind, 0.3)
        for kind, layer in zip(kinds, layers, strict=True)
    ]
    return np.array(heights, dtype=float)


def _places(
    heights: Float[np.ndarray, " node"], drawn: Int[np.ndarray, " some"]
) -> Float[np.ndarray, "node two"]:
    """Where the drawn nodes stand; NaN for the others."""
    places = np.full((len(heights), 2), np.nan)
    for i, height in enumerate(np.unique(heights[drawn])):
        row = drawn[heights[drawn] == height]
        space = min(_SPACE, 2 / max(1, len(row) - 1))
        places[row, 0] = (np.arange(len(row)) - (len(row) - 1) / 2) * space
        places[row, 1] = i
    return places


def _curves(
    ends: Float[np.ndarray, "edge end two"],
) -> Float[np.ndarray, "edge step two"]:
    """Quadratic curves from end to end, bowed to the side that the edge leans to."""
    begin, end = ends[:, 0], ends[:, 1]
    rise, lean = end[:, 1] - begin[:, 1], end[:, 0] - begin[:, 0]
    middle = (begin + end) / 2
    # What stands upright has no side of its own: left and right in turn.
    side = np.where(np.abs(lean) > 1e-9, np.sign(lean), np.where(np.arange(len(ends)) % 2, 1, -1))
    middle[:, 0] += side * _BOW * np.maximum(rise - 1, 0)
    t = _T[None, :, None]
    return (1 - t) ** 2 * begin[:, None] + 2 * t * (1 - t) * middle[:, None] + t**2 * end[:, None]


def _broken(lines: Float[np.ndarray, "line step two"]) -> tuple[list[Any], list[Any]]:
    """Coordinates of many lines in one trace, with a gap after each."""
    gap = np.full((len(lines), 1, 2), np.nan)
    flat = np.concatenate([lines, gap], 1).reshape(-1, 2).round(4)
    x, y = ([None if np.isnan(v) else v for v in column] for column in flat.T.tolist())
    return x, y


def _add_links(
    figure: Figure, links: Int[np.ndarray, "link two"], places: Float[np.ndarray, "node two"]
) -> None:
    x, y = _broken(places[links])
    line = {"color": MUTED, "width": 1, "dash": "dot"}
    figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)


def add_edges(
    figure: Figure,
    ends: Float[np.ndarray, "edge end two"],
    weights: Float[np.ndarray, " edge"],
    names: Shaped[np.ndarray, " edge"],
) -> None:
    """One trace per sign and width, and one of invisible points that say what an edge is."""
    if not len(ends):
        return
    curves = _curves(ends)
    size = np.abs(weights) / (np.abs(weights).max() or 1.0)
    step = np.minimum((size * len(WIDTHS)).astype(int), len(WIDTHS) - 1)
    for width in range(len(WIDTHS)):
        for name, color, of_sign in (
            ("positive score", POSITIVE, weights >= 0),
            ("negative score", NEGATIVE, weights < 0),
        ):
            here = (step == width) & of_sign
            if not here.any():
                continue
            x, y = _broken(curves[here])
            figure.add_scatter(
                x=x,
                y=y,
                mode="lines",
                line={"color": color, "width": WIDTHS[width]},
                opacity=0.35 + 0.15 * width,
                hoverinfo="skip",
                name=name,
                legendgroup=name,
                showlegend=bool(width == step[of_sign].max()),
            )
    texts = [
        f"{plain(str(name))}: {weight:.4g}" for name, weight in zip(names, weights, strict=True)
    ]
    middle = curves[:, len(_T) // 2].round(4)
    figure.add_scatter(
        x=middle[:, 0].tolist(),
        y=middle[:, 1].tolist(),
        mode="markers",
        marker={"size": 12, "opacity": 0},
        hovertext=texts,
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )


def add_nodes(
    figure: Figure,
    drawn: Int[np.ndarray, " some"],
    labels: Sequence[str],
    kinds: Sequence[str],
    places: Float[np.ndarray, "node two"],
    weights: Float[np.ndarray, " node"] | None = None,
) -> None:
    """One trace per kind; where nodes have weights, pointing at one says it."""
    against = np.zeros(len(labels), dtype=bool) if weights is None else weights < 0
    says = [""] * len(labels) if weights is None else [f": {weight:.4g}" for weight in weights]
    distinct = list(dict.fromkeys(kinds))
    for i, kind in enumerate(distinct):
        row = [int(node) for node in drawn if kinds[node] == kind]
        if not row:
            continue
        _, inverse, counts = np.unique(places[row, 1], return_inverse=True, return_counts=True)
        crowded = counts[inverse] > MAX_LABELS
        names = [plain(short_label(labels[node])) for node in row]
        figure.add_scatter(
            x=places[row, 0].round(4).tolist(),
            y=places[row, 1].round(4).tolist(),
            mode="markers+text",
            marker={
                "size": 13,
                "color": SERIES[i % len(SERIES)],
                "line": {
                    "color": [NEGATIVE if against[node] else "white" for node in row],
                    "width": [3.0 if against[node] else 1.5 for node in row],
                },
            },
            text=["" if many else name for name, many in zip(names, crowded, strict=True)],
            textposition="middle right",
            textfont={"size": 10},
            hovertext=[plain(labels[node]) + says[node] for node in row],
            hovertemplate="%{hovertext}<extra></extra>",
            name=plain(kind),
        )


def _style_axes(figure: Figure, ticks: Mapping[int, float], n_rows: int) -> None:
    """Layers at the left, no scale below, and a line of its own for the legend below the title."""
    figure.update_xaxes(visible=False, range=[-1.15, 1.15])
    figure.update_yaxes(
        range=[-0.6, max(n_rows, 1) - 0.4],
        tickmode="array",
        tickvals=list(ticks.values()),
        ticktext=[str(layer) for layer in ticks],
        showgrid=False,
        zeroline=False,
    )
    figure.update_layout(margin_t=84, title={"y": 1, "yanchor": "top", "yref": "container"})
    figure.update_layout(title_pad={"l": 8, "t": 14}, hovermode="closest")
