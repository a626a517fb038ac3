"""The best, those above a bar, or grown: each against an obvious rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope_plugin.circuits import greedy, threshold, top_n
from gemmascope_plugin.errors import EmptySelectionError, GemmaScopeError
from gemmascope_plugin.graphs import Graph
from gemmascope_plugin.graphs.adjacency import EdgeList
from gemmascope_plugin.graphs.node import Node
from tests.graphs.graphs import ANY, EDGE_MAP, EDGES, Recipe, edge_graph, node_graph


def readers_of(graph: Graph, place: int) -> set[int]:
    """A node, and the key-value head of a head."""
    node, readers = graph.components[place], {place}
    if node.kind == "head":
        in_layer = [n for n in graph.components if n.kind != "logits" and n.layer == node.layer]
        n_heads, n_kv = (sum(n.kind == kind for n in in_layer) for kind in ("head", "kv"))
        readers.add(graph.components.index(Node.kv(node.layer, node.index // (n_heads // n_kv))))
    return readers


def slow_greedy(graph: Graph, n: int) -> set[int]:
    """At every step all edges are looked at."""
    joined, chosen = {graph.components.index(Node.logits())}, set()
    sizes = graph.edge_scores.abs().tolist()
    sources, targets = graph.source.tolist(), graph.target.tolist()
    for _ in range(n):
        open_edges = [e for e in range(graph.n_edges) if targets[e] in joined and e not in chosen]
        best = max(open_edges, key=lambda e: (sizes[e], -e))
        chosen.add(best)
        joined |= readers_of(graph, sources[best])
    return chosen


@settings(deadline=None, max_examples=25)
@given(recipe=EDGES)
def test_greedy_circuits_equal_the_slow_rule(recipe: Recipe) -> None:
    graph = recipe.graph()
    n = int(recipe.density * min(graph.n_edges, 25))
    got = set(greedy(graph, n).is_kept.nonzero().flatten().tolist())
    assert got == slow_greedy(graph, n)


@settings(deadline=None, max_examples=25)
@given(recipe=EDGES)
def test_greedy_circuits_lead_to_the_logits(recipe: Recipe) -> None:
    graph = recipe.graph()
    n = int(recipe.density * graph.n_edges)
    circuit = greedy(graph, n)
    assert circuit.size == n
    left = circuit.is_kept.nonzero().flatten().tolist()
    ends, n_left = {graph.components.index(Node.logits())}, -1
    while n_left != len(left):
        n_left = len(left)
        joined = [e for e in left if int(graph.target[e]) in ends]
        ends = ends.union(*(readers_of(graph, int(graph.source[e])) for e in joined))
        left = [e for e in left if e not in joined]
    assert not left


@settings(deadline=None, max_examples=25)
@given(recipe=ANY)
def test_the_best_are_as_many_as_asked_for_and_no_other_is_better(recipe: Recipe) -> None:
    graph = recipe.graph()
    n = int(recipe.density * len(graph.unit_scores))
    for rank in ("absolute", "positive", "negative"):
        circuit = top_n(graph, n, rank=rank)
        scores = _by(rank, graph.unit_scores)
        assert circuit.size == n
        inside, out = scores[circuit.is_kept].tolist(), scores[~circuit.is_kept].tolist()
        assert min(inside, default=9.0) >= max(out, default=-9.0)
        bigger = top_n(graph, min(n + 1, circuit.n_units), rank=rank)
        assert bool((circuit.is_kept <= bigger.is_kept).all())
        assert circuit.top(n).is_kept.equal(circuit.is_kept)


def _by(rank: str, scores: torch.Tensor) -> torch.Tensor:
    if rank == "absolute":
        return scores.abs()
    return scores if rank == "positive" else -scores


def test_a_signed_ranking_stays_signed() -> None:
    graph = edge_graph()
    circuit = top_n(graph, 3, rank="positive")
    assert all(score > 0 for score in circuit.scores[:10])
    assert circuit.top(10).is_kept.equal(top_n(graph, 10, rank="positive").is_kept)
    assert not circuit.top(10).is_kept.equal(top_n(graph, 10).is_kept)


@settings(deadline=None, max_examples=25)
@given(tau=st.floats(0, 4))
def test_all_above_a_bar_are_kept(tau: float) -> None:
    for graph in (edge_graph(), node_graph()):
        assert threshold(graph, tau).is_kept.equal(graph.unit_scores.abs() >= tau)
    graph = edge_graph()
    for sign, rank in ((1, "positive"), (-1, "negative")):
        assert threshold(graph, 1.0, rank=rank).is_kept.equal(sign * graph.unit_scores >= 1.0)
    assert threshold(edge_graph(), 2.0).size > threshold(edge_graph(), 3.0).size > 0


def test_what_cannot_be_selected_is_an_error() -> None:
    graph, n = edge_graph(), EDGE_MAP.n_edges
    for select in (top_n, greedy):
        with pytest.raises(EmptySelectionError, match=f"{n + 1} edges.*There is: {n} edges"):
            select(graph, n + 1)
        with pytest.raises(EmptySelectionError, match="-1 edges"):
            select(graph, -1)
    with pytest.raises(EmptySelectionError, match="7 nodes.*There is: 6 nodes"):
        top_n(node_graph(), 7)
    with pytest.raises(GemmaScopeError, match=r"Greedy circuits need edges.*Graph\.of_edges"):
        greedy(node_graph(), 1)
    for tau in (-0.1, float("nan")):
        with pytest.raises(EmptySelectionError, match=f"The threshold is {tau}"):
            threshold(graph, tau)


def test_edges_that_do_not_lead_to_the_logits_cannot_grow() -> None:
    graph = Graph.of_nodes(
        (Node.embed(), Node.mlp(0), Node.mlp(1), Node.logits()),
        None,
        edges=EdgeList.of([0, 1, 0], [1, 2, 3], [3.0, 2.0, 1.0]),
    )
    assert greedy(graph, 1).is_kept.tolist() == [False, False, True]
    with pytest.raises(EmptySelectionError, match="2 edges.*There is: 1 that lead to the logits"):
        greedy(graph, 2)
