"""A graph as one of networkx, for its algorithms and file formats.

Cost: a loop over nodes and edges.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int64

from gemmascope_plugin.errors import MissingExtraError
from gemmascope_plugin.graphs.graph_arrays import GraphArrays
from gemmascope_plugin.graphs.node import PORTS, layer_of

if TYPE_CHECKING:
    import networkx as nx


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
