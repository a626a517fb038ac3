"""Takes the dead ends out of a circuit of edges.

The rule of MIB's circuit track (arXiv 2504.13151): a node without kept inputs or without kept outputs
loses its edges, repeated until nothing changes; the embedding needs no inputs, the logits no outputs. A
head has inputs if any of its q, k, v has, and a key-value head leads on if any head of its group does.

1. Forward: from the embedding along kept edges, and from key-value heads to the heads they feed.
2. Backward: from the logits the same way round.
3. An edge stays if its source was reached forward and its target backward. On a graph without cycles this
   is what the rule leaves.

Positions of edges are not looked at: information that enters a node at one position may leave it at
another. Cost: every edge is looked at once per layer at most.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int64

from gemmascope_plugin.errors import EmptySelectionError, GemmaScopeError
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.node import NodeKind


def prune(graph: Graph, is_kept: Bool[torch.Tensor, " edge"]) -> Bool[torch.Tensor, " edge"]:
    """The kept edges that lie on a path from the embedding to the logits."""
    check_edges(graph, "Dead ends")
    begin, end = ends(graph, "embed"), ends(graph, "logits")
    feeding, fed = graph.feeds.unbind(1)
    source = torch.cat([graph.source[is_kept], feeding])
    target = torch.cat([graph.target[is_kept], fed])
    forward = _reached(begin, source, target)
    backward = _reached(end, target, source)
    return is_kept & forward[graph.source] & backward[graph.target]


def check_edges(graph: Graph, purpose: str) -> None:
    """Refuses a graph that ranks nodes."""
    if not graph.ranks_edges:
        has = "ranks nodes" if graph.has_edges else "has none"
        raise GemmaScopeError(f"{purpose} need edges, and {graph!r} {has}", fix="Graph.of_edges")


def ends(graph: Graph, kind: NodeKind) -> Bool[torch.Tensor, " node"]:
    """Where the nodes of a kind are."""
    is_end = torch.from_numpy(graph.where(kind))
    if not bool(is_end.any()):
        raise EmptySelectionError(f"{graph!r} has no node of kind {kind!r}")
    return is_end


def _reached(
    begin: Bool[torch.Tensor, " node"],
    source: Int64[torch.Tensor, " edge"],
    target: Int64[torch.Tensor, " edge"],
) -> Bool[torch.Tensor, " node"]:
    """Nodes that edges lead to from the first ones; an edge is left behind once it has been walked."""
    reached, n = begin.clone(), -1
    while n != len(source):
        n, walked = len(source), reached[source]
        reached[target[walked]] = True
        source, target = source[~walked], target[~walked]
    return reached
