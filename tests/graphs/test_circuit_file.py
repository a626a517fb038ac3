"""Circuits in one file: back exactly as they were, and nothing else is taken for one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope_plugin.circuits import top_n
from gemmascope_plugin.errors import BadFileError, GemmaScopeError, MissingFileError
from gemmascope_plugin.graphs import Circuit, Graph
from gemmascope_plugin.graphs.node import Node
from tests.graphs.bundles import read, rewrite
from tests.graphs.graphs import ANY, Recipe, edge_graph, equal, node_graph


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return top_n(edge_graph(), 5).save(tmp_path / "circuit")


@settings(deadline=None, max_examples=30)
@given(recipe=ANY)
def test_a_circuit_comes_back_as_it_was(recipe: Recipe) -> None:
    circuit = recipe.circuit()
    with tempfile.TemporaryDirectory() as folder:
        loaded = Circuit.load(circuit.save(f"{folder}/circuit"))
    assert equal(loaded, circuit)
    assert loaded.order.equal(circuit.order)


def test_metadata_come_back_as_they_were(tmp_path: Path) -> None:
    metadata = {
        "task": "größer ↔ als",
        "numbers": [1, 0.1, float("inf"), None, True],
        "nested": {"a": [[1, 2], {"b": ()}]},
    }
    circuit = top_n(Graph.of_nodes([Node.mlp(0)], [0.1], metadata), 1)
    assert Circuit.load(circuit.save(tmp_path / "new" / "c")).metadata == circuit.metadata


def test_a_graph_with_scores_of_nodes_and_of_edges(tmp_path: Path) -> None:
    graph = edge_graph()
    scores = torch.randn(len(graph))
    both = Graph.of_nodes(graph.components, scores, edges=graph.edges)
    circuit = top_n(both, 3)
    assert equal(Circuit.load(circuit.save(tmp_path / "new" / "c")), circuit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranked": "both"}, "ranked is 'both', neither edge nor node"),
        ({"ranked": "node"}, "there are no scores of nodes"),
        ({"ranked": None}, "'ranked' is None, not text"),
        ({"columns": ["kind"]}, "not those that it has arrays and texts for"),
        ({"texts": {"kind": ["head"]}}, "the column 'kind' has a place where it has no text"),
        ({"texts": {"kind": [3]}}, r"kind\[0\] is 3, not text"),
    ],
)
def test_ranks_and_texts_that_contradict_the_arrays(
    path: Path, changes: dict, message: str
) -> None:
    rewrite(path, **changes)
    with pytest.raises(BadFileError, match=message):
        Circuit.load(path)


def test_a_folder_is_made_and_an_older_circuit_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    top_n(edge_graph(), 5).save(path)
    second = top_n(node_graph(), 2)
    assert second.save(str(path)) == path
    assert [each.name for each in path.parent.iterdir()] == ["b"]
    assert equal(Circuit.load(str(path)), second)
    with pytest.raises(GemmaScopeError, match=r"is a folder.*a/circuit.safetensors"):
        second.save(path.parent)


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_circuit(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    old = Circuit.load(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(GemmaScopeError, match="No space left on device"):
            top_n(edge_graph(), 9).save(path)
    assert len(list(path.parent.iterdir())) == 1
    assert equal(Circuit.load(path), old)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": {3: "x"}}, r"metadata\['a'\] has the key 3"),
        ({"a": [torch.ones(1)]}, r"metadata\['a'\]\[0\] is Tensor, which cannot be saved"),
        ({"a": "x" * (51 << 20)}, r"bytes as JSON\. There is: room for"),
        ({"a": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_metadata_that_json_cannot_hold(tmp_path: Path, metadata: dict, message: str) -> None:
    circuit = top_n(Graph.of_nodes([Node.mlp(0)], [1.0], metadata), 1)
    with pytest.raises(GemmaScopeError, match=message):
        circuit.save(tmp_path / "new" / "c")
    assert not list(tmp_path.iterdir())


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="There is no circuit at .*circuit.save"):
        Circuit.load(tmp_path / "none")


def test_another_format_or_version(path: Path) -> None:
    rewrite(path, version=4)
    with pytest.raises(BadFileError, match="is of version 4. There is: version 1"):
        Circuit.load(path)
    rewrite(path, version=1, format="else")
    with pytest.raises(BadFileError, match="it is not a gemmascope_plugin graph"):
        Circuit.load(path)


def test_damaged_files(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for damaged in (data[:-1], data[:-1] + b"\x01", b"", data[:3], data[:200]):
        path.write_bytes(damaged)
        with pytest.raises(BadFileError, match="cannot read .*Try: save the circuit again"):
            Circuit.load(path)


def test_words_are_part_of_the_digest(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"eap", b"atp"))
    with pytest.raises(BadFileError, match="it is not as it was written"):
        Circuit.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kept": 4}, "n_kept is 4, but the arrays have 5"),
        ({"n_nodes": 1}, "n_nodes is 1"),
        ({"ports": ["", "q"]}, "ports are"),
        ({"rank": "best"}, "rank is 'best', not one of absolute, positive, negative"),
        ({"tokens": ["a"]}, "the column 'id' is missing"),
        ({"metadata": []}, r"'metadata' is \[\], not an object"),
        ({"metadata": {"$float": "nan"}}, "the metadata are not an object"),
    ],
)
def test_a_header_that_contradicts_the_arrays(path: Path, changes: dict, message: str) -> None:
    rewrite(path, **changes)
    with pytest.raises(BadFileError, match=message):
        Circuit.load(path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("is_kept", None, "array 'is_kept' is missing: it is a graph without a selection"),
        ("edge.target", None, "array 'edge.target' is missing"),
        ("extra", np.ones(1), "array 'extra' is unknown"),
        ("is_kept", np.ones(2, dtype=bool), "array .* is "),
        ("is_kept", np.ones((), dtype=bool), "array 'is_kept' is "),
        ("edge.source", np.ones(()), "array .* is "),
        ("node.site", np.ones(2, dtype=np.int32), "the columns differ in length"),
        ("edge.target", 99, "the target of an edge is not among"),
        ("edge.source", -1, "the source of an edge is not among"),
        ("node.index", 0, "a node is there twice"),
        ("node.index", -1, "has index -1"),
        ("node.index", 2**40, "has index 1099511627776"),
        ("node.site", 77, "the column 'site' has a place where it has no text"),
        ("edge.weight", float("nan"), "a score is NaN"),
        ("edge.weight", float("inf"), "a score is NaN or infinite"),
        ("edge.port", 5, "port number 5"),
    ],
)
def test_arrays_that_are_no_graph(path: Path, name: str, array: Any, message: str) -> None:
    if not (array is None or isinstance(array, np.ndarray)):
        array = np.full_like(read(path)[1][name], array)
    rewrite(path, {name: array})
    with pytest.raises(BadFileError, match=message):
        Circuit.load(path)


@pytest.mark.parametrize("site", ["blocks.x.attn.hook_z", "blocks.99999.attn.hook_z"])
def test_hooks_that_no_component_has(path: Path, site: str) -> None:
    texts = read(path)[0]["texts"]
    rewrite(path, texts={**texts, "site": [site] * len(texts["site"])})
    with pytest.raises(BadFileError, match="is not the hook of a|a node is there twice"):
        Circuit.load(path)
    rewrite(path, texts={**texts, "kind": ["tail"] * len(texts["kind"])})
    with pytest.raises(BadFileError, match="a node is of the kind 'tail'"):
        Circuit.load(path)


def test_layers_that_are_not_those_of_the_hooks(path: Path) -> None:
    rewrite(path, {"node.layer": np.full_like(read(path)[1]["node.layer"], 1)})
    with pytest.raises(BadFileError, match="the embed at 'hook_embed' has layer 1"):
        Circuit.load(path)


def test_the_graph_of_a_circuit_is_a_graph(path: Path) -> None:
    graph, circuit = Graph.load(path), Circuit.load(path)
    assert equal(Circuit(graph, circuit.is_kept), circuit)
    with pytest.raises(BadFileError, match="it is a graph without a selection"):
        Circuit.load(graph.save(path))


@pytest.mark.parametrize("pos", [-1, 10**6, 2**60])
def test_positions_that_no_prompt_has(tmp_path: Path, pos: int) -> None:
    path = top_n(edge_graph(n_pos=2), 5).save(tmp_path / "circuit")
    rewrite(path, {"edge.pos": np.full_like(read(path)[1]["edge.pos"], pos)})
    with pytest.raises(BadFileError, match="an edge has a position outside 0 to 262143"):
        Circuit.load(path)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=6,
)
FIELDS = [
    "n_nodes",
    "n_edges",
    "n_kept",
    "columns",
    "texts",
    "tokens",
    "ports",
    "metadata",
    "rank",
    "ranked",
]


@settings(deadline=None, max_examples=80)
@given(field=st.sampled_from([*FIELDS, "version", "format"]), value=VALUES)
def test_no_header_makes_another_error(field: str, value: object) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = top_n(node_graph(), 2).save(f"{name}/c")
        rewrite(path, **{field: value})
        try:
            again = Circuit.load(path)
        except BadFileError:
            return
        assert field in ("metadata", "ranked", "n_edges", "tokens") and again.size == 2


@settings(deadline=None, max_examples=80)
@given(place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_no_damage_passes(place: float, byte: int, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        circuit = top_n(edge_graph(), 5)
        path = circuit.save(f"{name}/c")
        data = bytearray(path.read_bytes())
        at = int(place**2 * (len(data) - 1))
        if cut:
            del data[at:]
        elif data[at] == byte:
            return
        else:
            data[at] = byte
        path.write_bytes(data)
        try:
            again = Circuit.load(path)
        except BadFileError:
            return
        assert equal(again, circuit)  # white space of the header
