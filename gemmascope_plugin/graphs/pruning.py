"""Pruning: which nodes and edges of a trace matter, and which edges of a circuit lead nowhere.

*Traces* (Ameisen et al., "Circuit Tracing", 2025; the definitions are circuit-tracer's). With ``Abar``
the absolute matrix, each row divided by its sum, ``w`` the weights of the targets and
``I = sum_k w Abar^k``:

1. Nodes: the fewest that hold ``node_threshold`` of all influence; tokens and targets always.
2. Edges among them, ``Abar`` and ``I`` taken anew: the fewest that hold ``edge_threshold`` of
   ``Abar_ij (I_i + w_i)``.
3. Features without inputs or outputs and errors without outputs go, until nothing changes.
4. Replacement score: the share of tokens in the influence of tokens and errors. Completeness score: the
   share of inputs other than errors, over all nodes by ``I + w``. Both are structural: whether the pruned
   graph computes what the model does is for ``check_by_ablation`` to say.

*Circuits of edges*, the rule of MIB's circuit track (arXiv 2504.13151): a node without kept inputs or
without kept outputs loses its edges, repeated until nothing changes; the embedding needs no inputs, the
logits no outputs. A head has inputs if any of its q, k, v has, and a key-value head leads on if any head
of its group does.

1. Forward: from the embedding along kept edges, and from key-value heads to the heads they feed.
2. Backward: from the logits the same way round.
3. An edge stays if its source was reached forward and its target backward. On a graph without cycles this
   is what the rule leaves. Positions of edges are not looked at: information that enters a node at one
   position may leave it at another.

Cost: of traces sorting the edges among the kept nodes and a few passes over all entries; of circuits
every edge is looked at once per layer at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64

from gemmascope_plugin.errors import EmptySelectionError, GemmaScopeError, UnknownNameError
from gemmascope_plugin.graphs.adjacency import Adjacency
from gemmascope_plugin.graphs.node import NodeKind

if TYPE_CHECKING:
    from gemmascope_plugin.graphs.graph_arrays import GraphArrays

Where = Callable[[str], np.ndarray]
"""From a kind to True at its nodes."""


class TraceScores(NamedTuple):
    """How much of a graph is explained by features, structurally."""

    replacement: float
    """Influence of tokens over that of tokens and errors."""
    completeness: float
    """Share of inputs other than errors, weighted by influence."""


class Pruned(NamedTuple):
    """What pruning keeps."""

    nodes: np.ndarray
    """True at kept nodes."""
    edges: Adjacency
    """Only the kept edges."""
    shares: np.ndarray
    """Cumulative share of the influence, nodes sorted by it."""


def scores_of(
    edges: Adjacency, influence: np.ndarray, weights: np.ndarray, where: Where
) -> TraceScores:
    """Replacement and completeness."""
    errors = where("error")
    of_tokens, of_errors = influence[where("token")].sum(), influence[errors].sum()
    total = of_tokens + of_errors
    output = influence + weights
    fractions = np.zeros(len(output))
    fractions[edges.nodes] = edges.normalised.matrix @ errors.astype(edges.matrix.dtype)
    return TraceScores(
        float(of_tokens / total) if total else 1.0,
        float(((1 - fractions) * output).sum() / output.sum()),
    )


def prune_masks(
    edges: Adjacency,
    influence: np.ndarray,
    weights: np.ndarray,
    where: Where,
    node_threshold: float,
    edge_threshold: float,
) -> Pruned:
    """Kept nodes and edges."""
    for name, value in (("node", node_threshold), ("edge", edge_threshold)):
        if not 0 < value <= 1:
            raise UnknownNameError(
                f"{name}_threshold={value} is not a share", exists="shares above 0, up to 1"
            )
    always = where("token") | (weights > 0) | where("target")
    nodes = (influence >= _bar(influence, node_threshold)) & ~where("bias") | always
    among = edges.subset(nodes)
    scores = _edge_scores(among, weights)
    entries = among.entries(scores >= _bar(scores, edge_threshold))
    nodes, entries = _without_idle_nodes(entries, nodes, where("feature"), where("error"), always)
    return Pruned(nodes, entries, cumulative(influence))


def cumulative(influence: np.ndarray) -> np.ndarray:
    """The share that each node and all more influential ones have."""
    order = np.argsort(-influence, kind="stable")
    shares = np.empty(len(influence))
    shares[order] = np.cumsum(influence[order]) / max(influence.sum(), 1e-30)
    return shares


def _edge_scores(edges: Adjacency, weights: np.ndarray) -> np.ndarray:
    """``Abar_ij (I_i + w_i)``, one per entry."""
    normal = edges.normalised
    output = normal.influence(weights) + weights
    return normal.matrix.data * np.repeat(output[edges.nodes], np.diff(edges.matrix.indptr))


def _bar(scores: np.ndarray, share: float) -> float:
    """The smallest of the fewest scores that sum to a share of all."""
    if not len(scores):
        return 0.0
    ordered = np.sort(scores)[::-1]
    sums = np.cumsum(ordered, dtype=np.float64)
    place = int(np.searchsorted(sums / max(sums[-1], 1e-30), share))
    return float(ordered[min(place, len(ordered) - 1)])


def _without_idle_nodes(
    edges: Adjacency,
    nodes: np.ndarray,
    features: np.ndarray,
    errors: np.ndarray,
    always: np.ndarray,
) -> tuple[np.ndarray, Adjacency]:
    while True:
        out = np.zeros(len(nodes), dtype=bool)
        out[edges.matrix.indices] = True
        fed = np.zeros(len(nodes), dtype=bool)
        fed[edges.nodes] = np.diff(edges.matrix.indptr) > 0
        left = nodes & (always | out) & (~features | fed | always)
        if (left == nodes).all():
            return nodes, edges
        nodes, edges = left, edges.subset(left)


# --------------------------------------------------------------------------------------- dead ends
def without_dead_ends(
    graph: GraphArrays, is_kept: Bool[torch.Tensor, " edge"]
) -> Bool[torch.Tensor, " edge"]:
    """The kept edges that lie on a path from the embedding to the logits."""
    check_edges(graph, "Dead ends")
    begin, end = ends(graph, "embed"), ends(graph, "logits")
    feeding, fed = graph.feeds.unbind(1)
    source = torch.cat([graph.source[is_kept], feeding])
    target = torch.cat([graph.target[is_kept], fed])
    forward = _reached(begin, source, target)
    backward = _reached(end, target, source)
    return is_kept & forward[graph.source] & backward[graph.target]


def check_edges(graph: GraphArrays, purpose: str) -> None:
    """Refuses a graph that ranks nodes."""
    if not graph.ranks_edges:
        has = "ranks nodes" if graph.has_edges else "has none"
        raise GemmaScopeError(f"{purpose} need edges, and {graph!r} {has}", fix="Graph.of_edges")


def ends(graph: GraphArrays, kind: NodeKind) -> Bool[torch.Tensor, " node"]:
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
