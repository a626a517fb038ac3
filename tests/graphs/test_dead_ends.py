"""Pruning: MIB's rule, as a loop over nodes; idempotent, a subset, monotone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from gemmascope_plugin.circuits import top_n
from gemmascope_plugin.errors import EmptySelectionError, GemmaScopeError
from gemmascope_plugin.graphs import Circuit, Graph
from gemmascope_plugin.graphs.adjacency import EdgeList
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.graphs.node import Node
from gemmascope_plugin.graphs.pruning import without_dead_ends
from tests.graphs.graphs import EDGES, Recipe, edge_graph, node_graph


def slow_prune(graph: Graph, is_kept: torch.Tensor) -> torch.Tensor:
    """Nodes without kept inputs or without kept outputs lose their edges, until nothing changes."""
    nodes, feeds = graph.components, graph.feeds.tolist()
    sources, targets = graph.source.tolist(), graph.target.tolist()
    edges = set(is_kept.nonzero().flatten().tolist())
    while True:
        read = {targets[e] for e in edges}
        read |= {head for kv, head in feeds if kv in read}
        written = {sources[e] for e in edges}
        alive = {i for i in read & written if nodes[i].kind in ("head", "mlp")}
        alive |= {i for i, node in enumerate(nodes) if node.kind in ("embed", "logits")}
        alive |= {kv for kv, head in feeds if head in alive}
        left = {e for e in edges if sources[e] in alive and targets[e] in alive}
        if left == edges:
            return torch.tensor([e in edges for e in range(graph.n_edges)])
        edges = left


@settings(deadline=None, max_examples=60)
@given(recipe=EDGES)
def test_pruning_is_the_rule_of_mib(recipe: Recipe) -> None:
    graph = recipe.graph()
    is_kept = recipe.kept(graph.n_edges)
    got = without_dead_ends(graph, is_kept)
    assert torch.equal(got, slow_prune(graph, is_kept))
    assert bool((got <= is_kept).all())
    assert torch.equal(without_dead_ends(graph, got), got)


@settings(deadline=None, max_examples=40)
@given(recipe=EDGES)
def test_more_edges_leave_more_edges(recipe: Recipe) -> None:
    graph = recipe.graph()
    first, second = recipe.kept(graph.n_edges), recipe.kept(graph.n_edges, seed=1)
    assert bool((without_dead_ends(graph, first) <= without_dead_ends(graph, first | second)).all())


def test_dead_ends_go_and_paths_stay() -> None:
    graph = edge_graph(EdgeMap(2, 2, 1))
    path = {"embed->L0KV0.v", "L0H1->L1H0.q", "L1H0->logits"}
    dead = {
        "MLP0->L1KV0.k",  # nothing reaches MLP0
        "L0H1->MLP1",  # MLP1 leads nowhere
        "L1H1->MLP1",  # reached through MLP0's edge only, and leads nowhere
    }
    labels = graph.edge_labels
    is_kept = torch.tensor([label in path | dead for label in labels])
    assert int(is_kept.sum()) == 6
    got = without_dead_ends(graph, is_kept)
    assert {label for label, stays in zip(labels, got.tolist(), strict=True) if stays} == path


def test_everything_and_nothing_stay_as_they_are() -> None:
    graph = edge_graph()
    everything = torch.ones(graph.n_edges, dtype=torch.bool)
    assert bool(without_dead_ends(graph, everything).all())
    assert not bool(without_dead_ends(graph, ~everything).any())


def test_a_pruned_circuit_shares_its_graph() -> None:
    circuit = top_n(edge_graph(), 20)
    pruned = circuit.pruned()
    assert isinstance(pruned, Circuit)
    assert pruned.graph is circuit.graph
    assert 0 < pruned.size < 20
    assert set(pruned.edges) < set(circuit.edges)


def test_without_edges_or_ends_there_is_nothing_to_prune() -> None:
    with pytest.raises(GemmaScopeError, match="Dead ends need edges"):
        top_n(node_graph(), 2).pruned()
    edges = EdgeList.of([0], [1], [1.0])
    graph = Graph.of_nodes((Node.mlp(0), Node.logits()), None, edges=edges)
    with pytest.raises(EmptySelectionError, match="no node of kind 'embed'"):
        top_n(graph, 1).pruned()
