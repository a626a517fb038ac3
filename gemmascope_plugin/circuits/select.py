"""Chooses the units of a graph that make a circuit: the best, those above a bar, or grown.

* ``top_n``: the units with the largest scores, connected or not; prune the result.
* ``threshold``: all units with a score of at least a bar.
* ``greedy``: edges only, grown from the logits backwards as in EAP-IG (arXiv 2403.17806): at each step
  the edge with the largest absolute score whose target is in the circuit already comes in, and its
  source with it. A head that comes in brings the inputs of its key-value head too.

Cost of ``greedy``: a sort of the edges and one step of a heap per chosen edge; the heap holds one edge
per node in the circuit, the best one not yet chosen among those that end there.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import islice

import torch
from jaxtyping import Int64

from gemmascope_plugin.errors import EmptySelectionError
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import Rank
from gemmascope_plugin.graphs.pruning import check_edges, ends


def top_n(graph: Graph, n: int, *, rank: Rank = "absolute") -> Circuit:
    """The circuit of the ``n`` best edges, or nodes of a graph that ranks nodes.

    Args:
        graph: The graph.
        n: How many to keep.
        rank: By ``absolute`` score; or those that support the metric most first (``positive``), or
            those that work against it most (``negative``).

    Raises:
        EmptySelectionError: ``n`` is negative or larger than the number of units.
        UnknownNameError: Another rank.
    """
    empty = torch.zeros(len(graph.unit_scores), dtype=torch.bool)
    return Circuit(graph, empty, rank).top(n)


def threshold(graph: Graph, tau: float, *, rank: Rank = "absolute") -> Circuit:
    """The circuit of all units with a score of at least ``tau``.

    Args:
        graph: The graph.
        tau: The bar.
        rank: Whether ``absolute`` scores are compared, scores (``positive``) or their opposites
            (``negative``).

    Raises:
        EmptySelectionError: ``tau`` is negative or NaN.
        UnknownNameError: Another rank.
    """
    if not tau >= 0:
        raise EmptySelectionError(f"The threshold is {tau}", fix="a number from 0 up")
    return Circuit(graph, graph.ranked_by(rank) >= tau, rank)


def greedy(graph: Graph, n: int, *, rank: Rank = "absolute") -> Circuit:
    """The circuit of ``n`` edges grown from the logits backwards.

    Args:
        graph: A graph with edges.
        n: How many to keep.
        rank: What counts as the largest score, as for :func:`top_n`.

    Raises:
        GemmaScopeError: The graph has no edges.
        UnknownNameError: Another rank.
        EmptySelectionError: ``n`` is negative or larger than the number of edges, or of those from which
            the logits can be reached; or there are no logits.
    """
    check_edges(graph, "Greedy circuits")
    is_kept = torch.zeros_like(top_n(graph, n).is_kept)  # refuses numbers out of range
    grown = list(islice(_growth(graph, graph.order(rank)), n))
    if len(grown) < n:
        raise EmptySelectionError(
            f"A circuit of {n} edges was asked for", exists=f"{len(grown)} that lead to the logits"
        )
    is_kept[torch.tensor(grown, dtype=torch.int64)] = True
    return Circuit(graph, is_kept, rank)


def _growth(graph: Graph, order: Int64[torch.Tensor, " edge"]) -> Iterator[int]:
    """Edges in the order in which they come in."""
    # ranks of the edges that end at a node, best first, lie side by side
    ranked = graph.target[order].argsort(stable=True)
    bounds = torch.searchsorted(graph.target[order][ranked], torch.arange(len(graph) + 1))
    starts, ranks = bounds.tolist(), ranked.tolist()
    sources, edges = graph.source[order].tolist(), order.tolist()
    kv_heads: dict[int, list[int]] = {}
    for kv, head in graph.feeds.tolist():
        kv_heads.setdefault(head, []).append(kv)

    heap: list[tuple[int, int]] = []
    members: set[int] = set()

    def offer(place: int, node: int) -> None:
        if place < starts[node + 1]:
            heappush(heap, (ranks[place], place))

    def join(node: int) -> None:
        for reader in (node, *kv_heads.get(node, ())):
            if reader not in members:
                members.add(reader)
                offer(starts[reader], reader)

    targets = graph.target[order].tolist()
    for node in ends(graph, "logits").nonzero().flatten().tolist():
        join(node)
    while heap:
        rank, place = heappop(heap)
        offer(place + 1, targets[rank])
        join(sources[rank])
        yield edges[rank]
