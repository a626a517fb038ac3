"""Graphs of components and circuits as JSON: back exactly as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from gemmascope_plugin.circuits import top_n
from gemmascope_plugin.errors import BadFileError, UnknownNameError
from gemmascope_plugin.graphs import Circuit, Graph
from gemmascope_plugin.graphs.node import Node
from tests.graphs.graphs import ANY, Recipe, edge_graph, equal, node_graph


@settings(deadline=None, max_examples=30)
@given(recipe=ANY)
def test_a_circuit_comes_back_as_it_was(recipe: Recipe) -> None:
    circuit = recipe.circuit()
    text = json.dumps(circuit.to_json(), allow_nan=False)
    assert equal(Circuit.from_json(json.loads(text)), circuit)


def test_scores_meanings_and_metadata_come_back(tmp_path: Path) -> None:
    graph = Graph.of_nodes([Node.mlp(0), Node.logits()], [1 / 3, 1e-38], {"a": float("inf")})
    graph = graph.with_labels({Node.mlp(0): "größer"})
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(graph.to_json("graph")), encoding="utf-8")
    again = Graph.from_json(path)
    assert again.meanings == graph.meanings and again.metadata == graph.metadata
    assert again.node_scores is not None and again.node_scores.equal(graph.node_scores)


def test_a_graph_without_a_selection_is_not_a_circuit() -> None:
    content = edge_graph().to_json("graph")
    assert Graph.from_json(content).edge_labels == edge_graph().edge_labels
    with pytest.raises(BadFileError, match="a graph without a selection"):
        Circuit.from_json(content)
    with pytest.raises(UnknownNameError, match="The slug 'a/b' is not a file name"):
        edge_graph().to_json("a/b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["links"][0].update(source="nobody"), "a link ends at 'nobody'"),
        (lambda c: c["links"][0].update(weight=1e300), "a score is NaN or infinite"),
        (lambda c: c["links"][0].update(weight="1"), "an entry is not a number"),
        (lambda c: c["links"].append(c["links"][0]), "an edge is there twice"),
        (lambda c: c["nodes"].append(c["nodes"][0]), "a node is there twice"),
        (lambda c: c["nodes"][0].update(feature_type="tail"), "a node is of the kind 'tail'"),
        (lambda c: c["nodes"][0].update(ctx_idx=2**40), "has pos 1099511627776"),
        (lambda c: c["nodes"][0].pop("feature"), "'feature' is missing"),
        (lambda c: c["metadata"]["gemmascope"].update(ranked="both"), "neither edge nor node"),
        (lambda c: c["metadata"]["gemmascope"].update(kept=[10**6]), "is not among the"),
    ],
)
def test_what_is_not_a_circuit_is_refused(change: Any, message: str) -> None:
    content = json.loads(json.dumps(top_n(edge_graph(), 5).to_json()))
    change(content)
    with pytest.raises(BadFileError, match=message):
        Circuit.from_json(content)


def test_units_that_are_nodes() -> None:
    circuit = top_n(node_graph(), 2)
    assert Circuit.from_json(circuit.to_json()).nodes == circuit.nodes
