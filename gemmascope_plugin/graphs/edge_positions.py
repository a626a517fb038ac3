"""Where the edges of a graph lie in a model's matrix of writers and readers."""

from __future__ import annotations

import torch
from jaxtyping import Int64

from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.node import PORTS

Places = tuple[Int64[torch.Tensor, " edge"], Int64[torch.Tensor, " edge"]]
"""Row of the writer and column of the reader of every edge."""


def places_in(graph: Graph, edge_map: EdgeMap) -> Places:
    """Rows and columns of all edges of a graph, in its order.

    Args:
        graph: A graph of edges.
        edge_map: The model's edges.

    Raises:
        GemmaScopeError: The graph is one of nodes, or its edges have positions.
        UnknownNameError: An edge does not exist in the model.
    """
    if not graph.ranks_edges or graph.pos is not None:
        has = "edges at single positions" if graph.ranks_edges else "nodes only"
        raise GemmaScopeError(
            f"{graph!r} has {has}, and no mask over edges",
            fix="a graph of edges without positions",
        )
    writes, reads = _ends(graph, edge_map)
    rows, columns = writes[graph.source], reads[graph.target, graph.port.long()]
    bad = (rows < 0) | (columns < 0)
    bad |= ~edge_map.mask[rows.clamp(min=0), columns.clamp(min=0)]
    if bool(bad.any()):
        label = graph.labels_of(bad.nonzero().flatten()[:1])[0]
        raise UnknownNameError(
            f"The model has no edge {label!r}",
            exists=f"{edge_map.n_edges} edges of {edge_map.n_layers} layers with "
            f"{edge_map.n_heads} heads and {edge_map.n_kv} key-value heads",
            fix="the model that the circuit was discovered in",
        )
    return rows, columns


def _ends(
    graph: Graph, edge_map: EdgeMap
) -> tuple[Int64[torch.Tensor, " node"], Int64[torch.Tensor, "node port"]]:
    """Row of every node that writes and column of every port that reads; -1 for those of no model."""
    place = {node: i for i, node in enumerate(graph.components)}
    rows = torch.full((len(graph.nodes),), -1)
    columns = torch.full((len(graph.nodes), len(PORTS)), -1)
    for row, node in enumerate(edge_map.writers):
        if node in place:
            rows[place[node]] = row
    for column, (node, port) in enumerate(edge_map.readers):
        if node in place:
            columns[place[node], PORTS.index(port)] = column
    return rows, columns
