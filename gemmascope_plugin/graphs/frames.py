"""A graph as DataFrames, text, figures and graphs of networkx.

1. Nodes and edges of component and feature graphs: names, layers, ports, positions, meanings, scores.
2. Edges of a graph of a prompt: ids and weights, by size.
3. Text and a table for notebooks.
4. Figures: edges between layers, nodes with their edges, bars, or tokens from left to right.
5. Graphs of networkx, for its algorithms and file formats.

Cost: indexing; one Python object per row; networkx a loop over nodes and edges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Int64

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import MissingExtraError, number_of
from gemmascope_plugin.figures.layered_graph import layered_graph
from gemmascope_plugin.graphs.graph_arrays import GraphArrays
from gemmascope_plugin.graphs.node import PORTS, TRACE_KINDS, layer_of

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd

    from gemmascope_plugin.figures.layered_graph import Figure


SHOWN = 12
"""Rows of a graph in a notebook."""
MAX_BARS = 40
"""Bars of a figure of nodes."""
TOLERANCE = 0.05
"""Share of the whole change of a metric that integrated gradients may miss without a word."""

Places = Int64[torch.Tensor, " some"]


def node_frame(graph: GraphArrays, nodes: Places) -> pd.DataFrame:
    """One row per node: ``node, kind, layer, score``, ``pos`` and ``meaning`` if there are any."""
    import pandas as pd

    at, columns = nodes.numpy(), graph.columns
    layers = _layers(graph)
    frame: dict[str, Any] = {
        "node": graph.labels[at],
        "kind": columns["kind"][at],
        "layer": layers[at],
    }
    if (columns["pos"] >= 0).any():
        frame["pos"] = pd.array(columns["pos"][at], dtype="Int64")
        frame["pos"][columns["pos"][at] < 0] = pd.NA
    if "meaning" in columns:
        frame["meaning"] = columns["meaning"][at]
    return pd.DataFrame({**frame, "score": columns["score"][at]})


def edge_frame(graph: GraphArrays, edges: Places) -> pd.DataFrame:
    """One row per edge: its ends, its port and position, their meanings, their layers, ``score``."""
    import pandas as pd

    ends = {"source": graph.source[edges].numpy(), "target": graph.target[edges].numpy()}
    frame: dict[str, Any] = {name: graph.labels[at] for name, at in ends.items()}
    if graph.ranks_edges:
        frame["port"] = np.array(PORTS, dtype=object)[graph.port[edges].numpy()]
    if graph.pos is not None:
        frame["pos"] = graph.pos[edges].numpy()
    if "meaning" in graph.columns:
        meanings = graph.columns["meaning"]
        frame |= {f"{name}_meaning": meanings[at] for name, at in ends.items()}
    layers = _layers(graph)
    frame |= {f"{name}_layer": layers[at] for name, at in ends.items()}
    return pd.DataFrame({**frame, "score": graph.edge_scores[edges].numpy()})


def weight_frame(graph: GraphArrays, edges: np.ndarray) -> pd.DataFrame:
    """``source, target, weight`` of some edges of a graph of a prompt."""
    import pandas as pd

    ids, rows = graph.columns["id"], graph.edges
    ends = {"source": ids[rows.source[edges]], "target": ids[rows.target[edges]]}
    return pd.DataFrame({**ends, "weight": rows.weight[edges]})


def _layers(graph: GraphArrays) -> Any:
    """Layers of the nodes, missing where a node has none."""
    import pandas as pd

    layers = pd.array(graph.columns["layer"], dtype="Int64")
    layers[np.isin(graph.columns["kind"], ["logits", "bias", "target"])] = pd.NA
    return layers


# ----------------------------------------------------------------------------------------- figures
def token_figure(graph: GraphArrays, max_edges: int) -> Figure:
    """Tokens from left to right, layers from the bottom up."""
    from gemmascope_plugin.figures.token_graph import token_graph

    edges = graph.edges
    return token_graph(
        graph.nodes, graph.tokens, edges.source, edges.target, edges.weight, max_edges
    )


def unit_figure(graph: GraphArrays, units: Places, title: str) -> Figure:
    """Edges between layers, nodes with their edges, or bars; the title says which are not drawn."""
    if graph.ranks_edges:
        return _layered(graph, units, title)
    if graph.has_edges:
        is_drawn = torch.zeros(len(graph), dtype=torch.bool)
        is_drawn[units] = True
        return _layered(graph, graph.joins(is_drawn), title, units)
    scores = graph.unit_scores[units]
    largest = scores.abs().argsort(descending=True, stable=True)[:MAX_BARS]
    if len(largest) < len(units):
        title += f", the {len(largest)} largest"
    names = [_caption(graph, i) for i in units[largest].tolist()]
    # in two lines: a figure is half as wide as a page
    sign = f"<br>{graph.metadata['sign']}" if "sign" in graph.metadata else ""
    x_title = f"effect on {graph.metadata.get('metric')}{sign}"
    return figures.bars(names, scores[largest].tolist(), title=title, x_title=x_title)


def _layered(
    graph: GraphArrays,
    edges: Places,
    title: str,
    nodes: Int64[torch.Tensor, " node"] | None = None,
) -> Figure:
    """Edges between layers, and nodes that are drawn whether they have edges or not."""
    scores = None if nodes is None or not graph.has_signs else graph.node_scores
    layers = _layers(graph)
    return layered_graph(
        [_caption(graph, i) for i in range(len(graph))],
        [_row(*pair) for pair in zip(graph.columns["kind"], graph.columns["site"], strict=True)],
        [
            None if is_missing else int(layer)
            for layer, is_missing in zip(layers, layers.isna(), strict=True)
        ],
        source=graph.source[edges].numpy(),
        target=graph.target[edges].numpy(),
        weights=graph.edge_scores[edges].numpy(),
        edge_labels=graph.labels_of(edges),
        links=graph.feeds.numpy(),
        nodes=None if nodes is None else nodes.numpy(),
        node_weights=None if scores is None else scores.numpy(),
        title=title,
    )


def _caption(graph: GraphArrays, place: int) -> str:
    """Name of a node in a figure: what it stands for, and which it is."""
    words = graph.columns["meaning"][place] if "meaning" in graph.columns else ""
    return f"{words} · {graph.labels[place]}" if words else str(graph.labels[place])


def _row(kind: str, site: str) -> str:
    """Kind of a node, and of what its dictionary takes apart: they stand in rows of their own."""
    if kind not in ("feature", "error"):
        return kind
    for part, where in (("attn", "attention"), ("mlp", "MLP")):
        if f".{part}." in site or f"hook_{part}_" in site:
            return f"{where} {kind}"
    return f"residual {kind}"


# -------------------------------------------------------------------------------------------- text
def graph_text(graph: GraphArrays) -> str:
    """What a graph is, in a line."""
    if graph.is_trace:
        counts = {kind: int(graph.where(kind).sum()) for kind in TRACE_KINDS}
        parts = ", ".join(number_of(n, kind) for kind, n in counts.items() if n)
        text = "".join(graph.tokens)
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        return f"Graph({shown!r}: {parts}, {number_of(graph.n_edges, 'edge')})"
    edges = f", {graph.n_edges} edges" if graph.has_edges else ""
    return (
        f"Graph({graph.metadata.get('task')}, {len(graph)} nodes{edges} by "
        f"{graph.metadata.get('method')}, {graph.metadata.get('sign')})"
    )


def conservation_text(metadata: Mapping[str, Any]) -> str:
    """``, conservation off by 12 %: more steps``, of nodes (the worst hook) or of edges; empty up to
    ``TOLERANCE``, or where nothing is known of it.
    """
    share = abs(metadata.get("residual_max", metadata.get("conservation", 0.0)))
    return f", conservation off by {100 * share:.0f} %: more steps" if share > TOLERANCE else ""


def unit_frame(graph: GraphArrays, units: Places) -> pd.DataFrame:
    """One row per unit."""
    if graph.is_trace:
        return weight_frame(graph, units.numpy())
    return edge_frame(graph, units) if graph.ranks_edges else node_frame(graph, units)


def graph_html(graph: GraphArrays, influence: np.ndarray | None) -> str:
    """The line, and a table of the nodes with most influence or, without it, of the largest scores."""
    if influence is not None:
        best = np.argsort(-influence, kind="stable")[:SHOWN]
        frame = graph.nodes.iloc[best][["id", "kind", "label", "layer", "pos", "activation"]]
        frame = frame.assign(influence=influence[best]).reset_index(drop=True)
        title = "the most influential nodes"
    else:
        frame, title = unit_frame(graph, graph.order()[:SHOWN]), "the largest scores"
    return f"<p>{escape(graph_text(graph))}; {title}:</p>{figures.frame_html(frame, SHOWN)}"


# ---------------------------------------------------------------------------------------- networkx
def trace_to_networkx(graph: GraphArrays) -> nx.DiGraph:
    """A graph of a prompt: node ids with the columns of ``graph.nodes`` (unknown numbers left out), edges
    with ``weight``; the graph has ``prompt`` and ``tokens``.
    """
    result = _networkx("An attribution graph was asked for as one of networkx").DiGraph(
        prompt=str(graph.metadata.get("prompt", "")), tokens=" ".join(graph.tokens)
    )
    ids = graph.columns["id"].tolist()
    for name, row in zip(ids, graph.nodes.drop(columns="id").to_dict("records"), strict=True):
        attributes = {k: v for k, v in row.items() if not (isinstance(v, float) and math.isnan(v))}
        result.add_node(name, **attributes)
    edges = graph.edges
    rows = zip(*(a.tolist() for a in (edges.source, edges.target, edges.weight)), strict=True)
    for source, target, weight in rows:
        result.add_edge(ids[source], ids[target], weight=weight)
    return result


def units_to_networkx(graph: GraphArrays, is_kept: Bool[torch.Tensor, " unit"]) -> nx.MultiDiGraph:
    """The kept edges and their ends, or the kept nodes and the edges between them.

    Nodes are :class:`Node` objects with ``kind``, ``label``, ``layer`` (not the logits), and ``score``,
    ``pos`` and ``meaning`` where they have one. Edges have ``port`` and ``score``, and ``pos`` at a
    position of their own. A key-value head leads to the heads that it feeds by edges with port
    ``"feeds"`` and score 0, which the circuit does not have: they make its paths walkable.
    """
    result = _networkx("A circuit was asked for as a graph of networkx").MultiDiGraph()
    is_node, edges = is_kept, graph.joins(is_kept) if not graph.ranks_edges else None
    if edges is None:
        edges = is_kept.nonzero().flatten()
        is_node = torch.zeros(len(graph), dtype=torch.bool)
        is_node[torch.cat([graph.source[edges], graph.target[edges]])] = True
    result.graph.update({str(key): str(value) for key, value in graph.metadata.items()})
    for place in is_node.nonzero().flatten().tolist():
        result.add_node(graph.components[place], **_node_attributes(graph, place))
    if graph.has_edges:
        _add_edges(result, graph, edges, is_node)
    return result


def _networkx(problem: str) -> Any:
    """The library."""
    try:
        import networkx as nx
    except ImportError as fault:
        raise MissingExtraError(
            f"{problem}, which is not installed", fix="pip install networkx"
        ) from fault
    return nx


def _node_attributes(graph: GraphArrays, place: int) -> dict[str, Any]:
    node = graph.components[place]
    attributes: dict[str, Any] = {"kind": node.kind, "label": graph.labels[place]}
    layer = layer_of(node)
    if layer is not None:
        attributes["layer"] = layer
    if node.pos is not None:
        attributes["pos"] = node.pos
    if node in graph.meanings:
        attributes["meaning"] = graph.meanings[node]
    if graph.node_scores is not None:
        attributes["score"] = float(graph.node_scores[place])
    return attributes


def _add_edges(
    result: nx.MultiDiGraph,
    graph: GraphArrays,
    edges: Int64[torch.Tensor, " edge"],
    is_node: Bool[torch.Tensor, " node"],
) -> None:
    nodes = graph.components
    for edge in edges.tolist():
        source, target = nodes[int(graph.source[edge])], nodes[int(graph.target[edge])]
        attributes = {"port": PORTS[int(graph.port[edge])], "score": float(graph.edge_scores[edge])}
        if graph.pos is not None:
            attributes["pos"] = int(graph.pos[edge])
        result.add_edge(source, target, **attributes)
    for kv, head in graph.feeds[is_node[graph.feeds].all(1)].tolist():
        result.add_edge(nodes[kv], nodes[head], port="feeds", score=0.0)
