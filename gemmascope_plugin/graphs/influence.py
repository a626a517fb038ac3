"""Which nodes and edges of an attribution graph matter, and how much of it errors explain.

With ``Abar`` the absolute matrix, each row divided by its sum, ``w`` the weights of the targets and
``I = sum_k w Abar^k`` (Ameisen et al., "Circuit Tracing", 2025; the definitions are circuit-tracer's):

1. Nodes: the fewest that hold ``node_threshold`` of all influence; tokens and targets always.
2. Edges among them, ``Abar`` and ``I`` taken anew: the fewest that hold ``edge_threshold`` of
   ``Abar_ij (I_i + w_i)``.
3. Features without inputs or outputs and errors without outputs go, until nothing changes.
4. Replacement score: the share of tokens in the influence of tokens and errors. Completeness score: the
   share of inputs other than errors, over all nodes by ``I + w``.

Both scores are structural. Whether the pruned graph computes what the model does is for
``check_by_ablation`` to say.

Cost: sorting the edges among the kept nodes; a few passes over all entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gemmascope_plugin.errors import UnknownNameError
from gemmascope_plugin.graphs.adjacency import Adjacency

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
    nodes, entries = _without_dead_ends(entries, nodes, where("feature"), where("error"), always)
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


def _without_dead_ends(
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
