"""A graph over a text: tokens from left to right, layers from the bottom up, edges between the nodes.

1. Only the edges with the largest absolute weights are drawn, and the nodes that they touch.
2. The nodes of one cell (token and layer) stand side by side; columns are as wide as their fullest cell.

Cost: linear in the edges, and a sort of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from gemmascope_plugin.figures.layered_graph import add_edges, add_nodes
from gemmascope_plugin.figures.theme import axis_labels, check_length, styled

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

_GAP = 0.6
"""Space between columns, in widths of a node."""


def token_graph(
    nodes: DataFrame,
    tokens: Sequence[str],
    source: Int[np.ndarray, " edge"],
    target: Int[np.ndarray, " edge"],
    weights: Float[np.ndarray, " edge"],
    max_edges: int,
) -> Figure:
    """A figure of the largest ``max_edges`` edges between nodes with the columns ``label, kind, layer,
    pos``; tokens have layer -1, and what has position -1 is not drawn.
    """
    import plotly.graph_objects as go

    for name, values in (("targets", target), ("weights", weights)):
        check_length(name, len(values), len(source), "sources")
    layers, positions = nodes["layer"].to_numpy(), nodes["pos"].to_numpy()
    possible = ((positions[source] >= 0) & (positions[target] >= 0)).nonzero()[0]
    order = np.argsort(-np.abs(weights[possible]), kind="stable")
    chosen = possible[order[:max_edges]][::-1]
    ends = np.stack([source[chosen], target[chosen]], 1)
    drawn = np.unique(ends)
    places, centres = _places(layers, positions, drawn, len(tokens))
    labels = [str(label) for label in nodes["label"]]
    names = np.array([f"{labels[i]} → {labels[j]}" for i, j in ends], dtype=object)
    figure = go.Figure()
    add_edges(figure, places[ends], weights[chosen], names)
    add_nodes(figure, drawn, labels, nodes["kind"].tolist(), places)
    left = len(possible) - len(chosen)
    title = "Attribution graph" + (f", the {len(chosen)} largest edges" if left else "")
    n_rows = int(layers[drawn].max(initial=0)) + 2
    styled(figure, title=title, x_title="", y_title="layer", height=min(2400, 80 * n_rows + 170))
    figure.update_xaxes(tickvals=centres.tolist(), ticktext=axis_labels(tokens))
    figure.update_xaxes(showgrid=False, zeroline=False)
    # a label beside each of many nodes would cover them: names are shown when pointed at
    figure.update_traces(mode="markers", selector={"mode": "markers+text"})
    ticks = sorted(set(layers[drawn].tolist()))
    words = {-1: "tokens", **dict.fromkeys(layers[nodes["kind"] == "target"], "targets")}
    names_of = [words.get(layer, str(layer)) for layer in ticks]
    figure.update_yaxes(tickvals=ticks, ticktext=names_of, zeroline=False)
    return figure.update_layout(hovermode="closest", margin_t=84)


def _places(
    layers: Int[np.ndarray, " node"],
    positions: Int[np.ndarray, " node"],
    drawn: Int[np.ndarray, " some"],
    n_tokens: int,
) -> tuple[Float[np.ndarray, "node two"], Float[np.ndarray, " token"]]:
    """Where the drawn nodes stand (NaN for the others), and the middle of each token's column."""
    cells = np.stack([positions[drawn], layers[drawn]], 1)
    _, cell, sizes = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    cell = cell.ravel()
    widths = np.ones(n_tokens)
    np.maximum.at(widths, positions[drawn], sizes[cell])
    right = np.cumsum(widths + _GAP)
    centres = right - (widths + _GAP) / 2
    places = np.full((len(layers), 2), np.nan)
    for i in range(len(sizes)):
        members = drawn[cell == i]
        offset = np.arange(len(members)) - (len(members) - 1) / 2
        places[members, 0] = centres[positions[members]] + offset
        places[members, 1] = layers[members]
    return places, centres
