"""A circuit as a graph of networkx, for its algorithms and file formats.

Cost: a loop over the kept edges.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int64

from gemmascope_plugin.errors import MissingExtraError
from gemmascope_plugin.graphs.frames import layer_of
from gemmascope_plugin.graphs.graph import PORTS, Graph
from gemmascope_plugin.graphs.node import Node


def to_networkx(graph: Graph, kept: Bool[torch.Tensor, " unit"]) -> Any:
    """A ``MultiDiGraph`` of the kept edges and their ends, or of kept nodes and edges between them.

    Nodes are :class:`Node` objects with ``kind``, ``label``, ``layer`` (not the logits), and ``score``,
    ``pos`` and ``meaning`` where they have one. Edges have ``port`` and ``score``, and ``pos`` at a
    position of their own. A key-value head leads to the heads that it feeds by edges with port
    ``"feeds"`` and score 0, which are no edges of the circuit but make its paths walkable.

    Args:
        graph: The graph.
        kept: Which units are kept.

    Raises:
        MissingExtraError: networkx is not installed.
    """
    try:
        import networkx as nx
    except ImportError as fault:
        raise MissingExtraError(
            "A circuit was asked for as a graph of networkx, which is not installed",
            fix="pip install networkx",
        ) from fault
    there, edges = kept, graph.joins(kept) if not graph.ranks_edges else kept.nonzero().flatten()
    if graph.ranks_edges:
        there = torch.zeros(len(graph.nodes), dtype=torch.bool)
        there[torch.cat([graph.source[edges], graph.target[edges]])] = True
    result = nx.MultiDiGraph()
    result.graph.update({str(key): str(value) for key, value in graph.metadata.items()})
    for place in there.nonzero().flatten().tolist():
        result.add_node(graph.nodes[place], **_node_attributes(graph, place))
    if graph.has_edges:
        _add_edges(result, graph, edges, there)
    return result


def _node_attributes(graph: Graph, place: int) -> dict[str, Any]:
    node: Node = graph.nodes[place]
    attributes: dict[str, Any] = {"kind": node.kind, "label": node.label}
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
    result: Any,
    graph: Graph,
    edges: Int64[torch.Tensor, " edge"],
    there: Bool[torch.Tensor, " node"],
) -> None:
    nodes = graph.nodes
    for edge in edges.tolist():
        source, target = nodes[int(graph.source[edge])], nodes[int(graph.target[edge])]
        attributes = {"port": PORTS[int(graph.port[edge])], "score": float(graph.edge_scores[edge])}
        if graph.pos is not None:
            attributes["pos"] = int(graph.pos[edge])
        result.add_edge(source, target, **attributes)
    for kv, head in graph.feeds[there[graph.feeds].all(1)].tolist():
        result.add_edge(nodes[kv], nodes[head], port="feeds", score=0.0)
