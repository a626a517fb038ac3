"""Circuits in a folder: back exactly as they were, and nothing else is taken for one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from gemmascope_plugin.circuits import Circuit, Graph, top_n
from gemmascope_plugin.circuits.storage import ARRAYS, JSON
from gemmascope_plugin.errors import BadFileError, GemmaScopeError, MissingFileError
from gemmascope_plugin.patching.node import Node
from tests.circuits.graphs import ANY, Recipe, edge_graph, equal, node_graph


def rewrite(folder: Path, arrays: dict[str, torch.Tensor] | None = None, **changes: Any) -> None:
    """Changes fields of the JSON; with arrays, writes these with a matching checksum."""
    if arrays is not None:
        data = save(arrays)
        (folder / ARRAYS).write_bytes(data)
        changes["sha256"] = hashlib.sha256(data).hexdigest()
    content = json.loads((folder / JSON).read_text())
    (folder / JSON).write_text(json.dumps(content | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return top_n(edge_graph(), 5).save(tmp_path / "circuit")


@settings(deadline=None, max_examples=30)
@given(recipe=ANY)
def test_a_circuit_comes_back_as_it_was(recipe: Recipe) -> None:
    circuit = recipe.circuit()
    with tempfile.TemporaryDirectory() as folder:
        loaded = Circuit.load(circuit.save(folder))
    assert equal(loaded, circuit)
    assert loaded.order.equal(circuit.order)


def test_metadata_come_back_as_they_were(tmp_path: Path) -> None:
    metadata = {
        "task": "größer ↔ als\ud800",
        "numbers": [1, 0.1, float("inf"), None, True],
        "nested": {"a": [[1, 2], {"b": ()}]},
    }
    circuit = top_n(Graph.of_nodes([Node.mlp(0)], [0.1], metadata), 1)
    assert Circuit.load(circuit.save(tmp_path)).metadata == circuit.metadata


def test_a_graph_with_scores_of_nodes_and_of_edges(tmp_path: Path) -> None:
    graph = edge_graph()
    scores = torch.randn(len(graph.nodes))
    both = Graph(
        graph.nodes, scores, graph.source, graph.target, graph.port, None, graph.edge_scores
    )
    circuit = top_n(both, 3)
    assert equal(Circuit.load(circuit.save(tmp_path)), circuit)


@pytest.mark.parametrize("graph", [edge_graph(), node_graph()], ids=["edges", "nodes"])
def test_files_of_version_1_are_read(graph: Graph, tmp_path: Path) -> None:
    """They say neither what is ranked nor what nodes mean."""
    circuit = top_n(graph, 3)
    folder = circuit.save(tmp_path)
    content = json.loads((folder / JSON).read_text())
    old = {key: value for key, value in content.items() if key not in ("ranked", "meanings")}
    (folder / JSON).write_text(json.dumps({**old, "version": 1}))
    assert equal(Circuit.load(folder), circuit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranked": "both"}, "ranked is 'both', neither edge nor node"),
        ({"ranked": "node"}, "array 'node_scores' is missing"),
        ({"meanings": {"0": 3}}, "meanings are no texts by node"),
        ({"meanings": {"99": "x"}}, "cannot read"),
    ],
)
def test_ranks_and_meanings_that_contradict_the_arrays(
    folder: Path, changes: dict, message: str
) -> None:
    rewrite(folder, **changes)
    with pytest.raises(BadFileError, match=message):
        Circuit.load(folder)


def test_a_folder_is_made_and_an_older_circuit_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    top_n(edge_graph(), 5).save(folder)
    second = top_n(node_graph(), 2)
    assert second.save(str(folder)) == folder
    assert sorted(path.name for path in folder.iterdir()) == [JSON, ARRAYS]
    assert equal(Circuit.load(str(folder)), second)


def test_a_failed_save_leaves_the_old_circuit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    old = Circuit.load(folder)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(GemmaScopeError, match="No space left on device"):
        top_n(edge_graph(), 9).save(folder)
    assert len(list(folder.iterdir())) == 2
    assert equal(Circuit.load(folder), old)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": {3: "x"}}, r"metadata\['a'\] has the key 3"),
        ({"a": [torch.ones(1)]}, r"metadata\['a'\]\[0\] is Tensor, which cannot be saved"),
        ({"a": "x" * (1 << 20)}, r"bytes as JSON\. There is: room for"),
    ],
)
def test_metadata_that_json_cannot_hold(tmp_path: Path, metadata: dict, message: str) -> None:
    circuit = top_n(Graph.of_nodes([Node.mlp(0)], [1.0], metadata), 1)
    with pytest.raises(GemmaScopeError, match=message):
        circuit.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [JSON, ARRAYS])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(MissingFileError, match=f"no circuit in .*: no {name}.*circuit.save"):
        Circuit.load(folder)


def test_another_format_or_version(folder: Path) -> None:
    rewrite(folder, version=3)
    with pytest.raises(BadFileError, match="is of version 3. There is: versions 1 and 2.*newer"):
        Circuit.load(folder)
    rewrite(folder, version=2, format="else")
    with pytest.raises(BadFileError, match="its format is 'else', not 'gemmascope_plugin circuit'"):
        Circuit.load(folder)


def test_damaged_files(folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / ARRAYS).read_bytes())
    for damaged in (data[:-1], data[:-1] + b"\x01", b""):
        (folder / ARRAYS).write_bytes(damaged)
        with pytest.raises(BadFileError, match="is not the file that circuit.json was written"):
            Circuit.load(folder)
    (folder / JSON).write_text("{")
    with pytest.raises(BadFileError, match="cannot read"):
        Circuit.load(folder)


def test_arrays_of_another_circuit(folder: Path, tmp_path: Path) -> None:
    other = top_n(edge_graph(seed=1), 5).save(tmp_path / "other")
    (folder / ARRAYS).write_bytes((other / ARRAYS).read_bytes())
    with pytest.raises(BadFileError, match="is not the file that circuit.json was written"):
        Circuit.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kept": 4}, "n_kept is 4, but the arrays have 5"),
        ({"n_nodes": 1}, "n_nodes is 1"),
        ({"ports": ["", "q"]}, "ports are"),
        ({"signed": "no"}, "signed is no truth value"),
        ({"metadata": []}, "metadata no object"),
        ({"sites": [["tail", "hook_embed"]]}, r"\['tail', 'hook_embed'\] is no kind of node"),
        ({"sites": []}, "cannot read"),
    ],
)
def test_a_json_that_contradicts_the_arrays(folder: Path, changes: dict, message: str) -> None:
    rewrite(folder, **changes)
    with pytest.raises(BadFileError, match=message):
        Circuit.load(folder)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("kept", None, "array 'kept' is missing"),
        ("port", None, "array 'port' is missing"),
        ("extra", torch.ones(1), "array 'extra' is unknown"),
        ("kept", torch.ones(2, dtype=torch.bool), "array .* is "),
        ("kept", torch.ones(()).bool(), "cannot read"),
        ("node_site", torch.ones(2).int(), "array 'node_site' is"),
        ("target", 99, "the target of an edge is not among"),
        ("source", -1, "the source of an edge is not among"),
        ("node_index", 0, "a node is there twice"),
        ("node_index", -1, "a negative place or index"),
        ("node_site", 77, "cannot read"),
        ("edge_scores", float("nan"), "a score is NaN"),
        ("port", 5, "port number 5"),
    ],
)
def test_arrays_that_are_no_graph(folder: Path, name: str, array: Any, message: str) -> None:
    arrays = load_file(folder / ARRAYS)
    if array is None:
        del arrays[name]
    else:
        new = isinstance(array, torch.Tensor)
        arrays[name] = array if new else torch.full_like(arrays[name], array)
    rewrite(folder, arrays)
    with pytest.raises(BadFileError, match=message):
        Circuit.load(folder)


VALUES = st.one_of(st.none(), st.integers(-2, 40), st.text(max_size=3), st.lists(st.integers(0, 3)))


@settings(deadline=None, max_examples=30)
@given(field=st.sampled_from(["n_edges", "sites", "ports", "metadata", "sha256"]), value=VALUES)
def test_no_json_makes_another_error(field: str, value: object) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = top_n(node_graph(), 2).save(name)
        rewrite(folder, **{field: value})
        try:
            Circuit.load(folder)
        except BadFileError:
            return
        assert (field, value) == ("n_edges", 0)
