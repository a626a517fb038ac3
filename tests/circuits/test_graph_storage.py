"""Attribution graphs in one file: back exactly as they were, and nothing else is taken for one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from gemmascope_plugin.circuits import AttributionGraph
from gemmascope_plugin.circuits.tracing.graph_storage import _digest
from gemmascope_plugin.errors import BadFileError, GemmaScopeError, MissingFileError
from tests.circuits.traces import same, traced


@pytest.mark.parametrize("name", ["plain", "mixed", "targets", "some"])
def test_graphs_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    for graph in (traced(name), traced(name).prune(0.9)):
        path = graph.save(tmp_path / "new" / "a.safetensors")
        same(AttributionGraph.load(path), graph)
        assert AttributionGraph.load(path).scores == graph.scores
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_metadata_and_more_columns_come_back(tmp_path: Path) -> None:
    graph = traced("some")
    metadata = {
        "text": "größer ↔",
        "odd": (float("nan"), float("inf"), 1.5, (1, None)),
        "in": {"a": True},
    }
    nodes = graph.nodes.assign(group="g", flag=True, count=np.float32(0.5))
    graph = replace(graph, nodes=nodes, metadata=metadata)
    same(AttributionGraph.load(graph.save(tmp_path / "a")), graph)


def rewrite(path: Path, arrays: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """Changes the header; with arrays, writes these with a matching checksum."""
    with safe_open(path, framework="numpy") as file:
        content = json.loads(file.metadata()["gemmascope"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found |= arrays or {}
    if arrays:
        content["sha256"] = _digest(found)
    save_file(found, path, {"gemmascope": json.dumps(content | changes)})
    return path


@pytest.mark.parametrize(
    ("arrays", "changes", "message"),
    [
        ({}, {"format": "other"}, "its format is 'other'"),
        ({}, {"version": 2}, "its version is 2, and only 1 is known"),
        ({}, {"sha256": "0"}, "not those that the header was written with"),
        ({}, {"columns": ["id"]}, "the column 'kind' is missing"),
        ({"rows": np.array([3, 2])}, {}, "contradict one another"),
        ({"data": np.zeros((2, 2))}, {}, "has several axes"),
    ],
)
def test_damaged_files_are_refused(
    arrays: dict[str, np.ndarray], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = rewrite(traced("some").save(tmp_path / "a"), arrays, **changes)
    with pytest.raises(BadFileError, match=message):
        AttributionGraph.load(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rows", lambda x: x[::-1].copy(), "are not ascending places"),
        ("rows", lambda x: x + 10**6, "are not ascending places"),
        ("indptr", lambda x: x - 1, "contradict one another"),
        ("indptr", lambda x: np.concatenate([x[:1], x[:0:-1]]), "do not add up"),
        ("indices", lambda x: x - 1, "comes from no node"),
        ("indices", lambda x: x + 10**6, "leads backwards"),
        ("indices", lambda x: np.concatenate([x[1::-1], x[2:]]), "are not ascending"),
    ],
)
def test_rows_that_are_no_graph_are_refused(
    name: str, change: Any, message: str, tmp_path: Path
) -> None:
    path = traced("some").save(tmp_path / "a")
    with safe_open(path, framework="numpy") as file:
        array = change(file.get_tensor(name))
    with pytest.raises(BadFileError, match=message):
        AttributionGraph.load(rewrite(path, {name: array}))


def test_mistakes(tmp_path: Path) -> None:
    graph = traced("some")
    with pytest.raises(MissingFileError, match="There is no attribution graph at"):
        AttributionGraph.load(tmp_path / "none")
    with pytest.raises(GemmaScopeError, match=r"is a folder.*graph.safetensors"):
        graph.save(tmp_path)
    (tmp_path / "text").write_text("no arrays")
    with pytest.raises(BadFileError, match="cannot read"):
        AttributionGraph.load(tmp_path / "text")
    save_file({"a": np.zeros(1)}, tmp_path / "other")
    with pytest.raises(BadFileError, match="it is no gemmascope_plugin attribution graph"):
        AttributionGraph.load(tmp_path / "other")
    with pytest.raises(GemmaScopeError, match=r"metadata\['bad'\]\[0\] is object"):
        replace(graph, metadata={"bad": [object()]}).save(tmp_path / "a")
    with pytest.raises(
        GemmaScopeError, match=r"metadata\['deep'\] has the key 1, which is no text"
    ):
        replace(graph, metadata={"deep": {1: 2}}).save(tmp_path / "a")
    with pytest.raises(GemmaScopeError, match="Column 'label' of the nodes has None"):
        replace(graph, nodes=graph.nodes.assign(label=None).astype({"label": object})).save(
            tmp_path / "a"
        )


def test_networkx_has_the_same_nodes_and_edges() -> None:
    graph = traced().prune()
    found = graph.to_networkx()
    assert list(found.nodes) == list(graph.nodes["id"])
    assert found.number_of_edges() == graph.n_edges
    row = graph.edge_frame(1).iloc[0]
    assert found.edges[row["source"], row["target"]]["weight"] == pytest.approx(row["weight"])
    assert "activation" not in found.nodes["token@1"] and found.nodes["token@1"]["label"] == "w142"


def test_the_figure_has_tokens_below_and_targets_on_top() -> None:
    graph = traced().prune()
    figure = graph.plot(max_edges=40)
    assert figure.layout.title.text == "Attribution graph, the 40 largest edges"
    assert figure.layout.yaxis.ticktext[0] == "tokens"
    assert figure.layout.yaxis.ticktext[-1] == "targets"
    assert "1 w142" in figure.layout.xaxis.ticktext or "w142" in figure.layout.xaxis.ticktext
    places = [
        (x, y)
        for t in figure.data
        if t.name in ("token", "feature", "error")
        for x, y in zip(t.x, t.y, strict=True)
    ]
    assert len(set(places)) == len(places)
