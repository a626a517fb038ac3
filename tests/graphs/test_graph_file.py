"""Attribution graphs in one file: back exactly as they were, and nothing else is taken for one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gemmascope_plugin.errors import BadFileError, GemmaScopeError, InputError, MissingFileError
from gemmascope_plugin.graphs import Graph
from gemmascope_plugin.graphs.adjacency import Adjacency
from gemmascope_plugin.graphs.node import table_columns
from tests.graphs.bundles import read, rewrite
from tests.tracing.traces import same, traced


@pytest.mark.parametrize("name", ["plain", "mixed", "targets", "some"])
def test_graphs_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    for graph in (traced(name), traced(name).prune(0.9)):
        path = graph.save(tmp_path / "new" / "a.safetensors")
        same(Graph.load(path), graph)
        assert Graph.load(path).scores == graph.scores
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_metadata_and_more_columns_come_back(tmp_path: Path) -> None:
    graph = traced("some")
    metadata = {
        "text": "größer ↔",
        "odd": (float("nan"), float("inf"), 1.5, (1, None)),
        "in": {"a": True},
    }
    nodes = graph.nodes.assign(group="g", flag=True, count=np.float32(0.5))
    graph = replace(graph, columns=table_columns(nodes), metadata=metadata)
    same(Graph.load(graph.save(tmp_path / "a")), graph)


def column(path: Path, name: str, place: int, value: Any) -> Path:
    """Changes one entry of a column or array, with a digest that fits."""
    content, arrays = read(path)
    if name in content["texts"]:
        texts, places = content["texts"], arrays[f"node.{name}"].copy()
        texts[name].append(value)
        places[place] = len(texts[name]) - 1
        return rewrite(path, {f"node.{name}": places}, texts=texts)
    name = name if name in arrays else f"node.{name}"
    array = arrays[name].copy()
    array[place] = value
    return rewrite(path, {name: array})


@pytest.mark.parametrize(
    ("arrays", "changes", "message"),
    [
        ({}, {"format": "other"}, "it is not a gemmascope_plugin graph"),
        ({}, {"version": 3}, "is of version 3. There is: version 1"),
        ({}, {"columns": ["id"]}, "not those that it has arrays and texts for"),
        ({}, {"columns": "id"}, "'columns' is 'id', not a list"),
        ({}, {"tokens": ["a", 3]}, r"tokens\[1\] is 3, not text"),
        ({}, {"tokens": ["a"]}, "the token 'token@1' has pos 1"),
        ({}, {"metadata": [1]}, "'metadata' is .*, not an object"),
        ({}, {"metadata": {"x": {"$float": "1e5"}}}, "'1e5' stands for a number"),
        ({}, {"texts": {}}, "the column 'id' has entries that are not text"),
        ({"edge.rows": np.array([3, 2])}, {}, "contradict one another"),
        ({"edge.rows": np.array([3.0, 2.0])}, {}, r"'edge.rows' is \(2,\) of float64"),
        ({"edge.weight": np.zeros((2, 2))}, {}, r"'edge.weight' is \(2, 2\)"),
        ({"more": np.zeros(2)}, {}, "the array 'more' is unknown"),
        ({"node.more": np.zeros(2)}, {}, "not those that it has arrays and texts for"),
        ({"node.pos": np.zeros(3)}, {}, "the columns differ in length"),
    ],
)
def test_damaged_files_are_refused(
    arrays: dict[str, np.ndarray], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = rewrite(traced("some").save(tmp_path / "a"), arrays, **changes)
    with pytest.raises(BadFileError, match=message):
        Graph.load(path)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("edge.weight", 0, np.nan, "an edge is NaN or infinite"),
        ("edge.weight", -1, np.inf, "an edge is NaN or infinite"),
        ("pos", 0, 10**6, "the token 'token@0' has pos 1000000"),
        ("pos", 3, -1, "the token 'token@3' has pos -1"),
        ("layer", -1, 10**6, "the target .* has layer 1000000"),
        ("index", 0, 2**40, "the token 'token@0' has index"),
        ("index", 2, -1, "the token 'token@2' has index -1"),
        ("weight", -1, np.nan, "the target .* has weight nan"),
        ("activation", -1, -np.inf, "the target .* has activation -inf"),
        ("kind", 0, "ghost", "a node is of the kind 'ghost'"),
        ("id", 1, "token@0", "the node 'token@0' is there twice"),
        ("label", 1, None, r"label\[\d+\] is None, not text"),
    ],
)
def test_content_that_is_not_of_a_graph_is_refused(name, place, value, message, tmp_path) -> None:
    path = column(traced("some").save(tmp_path / "a"), name, place, value)
    with pytest.raises(BadFileError, match=message):
        Graph.load(path)


def test_every_change_of_a_label_is_found_out(tmp_path: Path) -> None:
    path = traced("some").save(tmp_path / "a")
    data = path.read_bytes()
    label = traced("some").nodes["label"].iloc[-1]
    old, new = (f'\\"{text}\\"'.encode() for text in (label, "x" * len(label)))
    assert data.count(old) >= 1
    path.write_bytes(data.replace(old, new))
    with pytest.raises(BadFileError, match="it is not as it was written"):
        Graph.load(path)


def test_graphs_that_could_not_be_read_are_not_written(tmp_path: Path) -> None:
    graph = traced("some")
    matrix = graph.edges.matrix.copy()
    matrix.data[3] = np.nan
    with pytest.raises(GemmaScopeError, match="cannot be saved: an edge is NaN or infinite"):
        replace(graph, edges=Adjacency(matrix, graph.edges.nodes)).save(tmp_path / "a")
    with pytest.raises(GemmaScopeError, match="cannot be saved: the token 'token@0' has pos"):
        replace(graph, columns=table_columns(graph.nodes.assign(pos=99))).save(tmp_path / "a")
    with pytest.raises(GemmaScopeError, match="surrogates not allowed"):
        replace(graph, metadata={"x": "\ud800"}).save(tmp_path / "a")
    deep: list[Any] = []
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(GemmaScopeError, match="nested more than 64 deep"):
        replace(graph, metadata={"x": deep}).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_any_damage_is_found_out(tmp_path: Path, place: float, byte: int, cut: bool) -> None:
    path = tmp_path / "a"
    if not path.exists():
        traced("some").save(path)
    data = bytearray(path.read_bytes())
    at = int(place**3 * (len(data) - 1))  # mostly in the header
    if cut:
        del data[at:]
    elif data[at] == byte:
        return
    else:
        data[at] = byte
    (tmp_path / "b").write_bytes(data)
    try:
        graph = Graph.load(tmp_path / "b")
    except BadFileError:
        return
    same(graph, traced("some"))  # white space of the header


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("edge.rows", lambda x: x[::-1].copy(), "are not ascending places"),
        ("edge.rows", lambda x: x + 10**6, "are not ascending places"),
        ("edge.indptr", lambda x: x - 1, "contradict one another"),
        ("edge.indptr", lambda x: np.concatenate([x[:1], x[:0:-1]]), "do not add up"),
        ("edge.source", lambda x: x - 1, "comes from no node"),
        ("edge.source", lambda x: x + 10**6, "leads backwards"),
        ("edge.source", lambda x: np.concatenate([x[1::-1], x[2:]]), "are not ascending"),
    ],
)
def test_rows_that_are_no_graph_are_refused(
    name: str, change: Any, message: str, tmp_path: Path
) -> None:
    path = traced("some").save(tmp_path / "a")
    array = change(read(path)[1][name])
    with pytest.raises(BadFileError, match=message):
        Graph.load(rewrite(path, {name: array}))


def test_mistakes(tmp_path: Path) -> None:
    graph = traced("some")
    with pytest.raises(MissingFileError, match="There is no graph at"):
        Graph.load(tmp_path / "none")
    with pytest.raises(GemmaScopeError, match=r"is a folder.*graph.safetensors"):
        graph.save(tmp_path)
    (tmp_path / "text").write_text("no arrays")
    with pytest.raises(BadFileError, match="cannot read"):
        Graph.load(tmp_path / "text")
    save_file({"a": np.zeros(1)}, tmp_path / "other")
    with pytest.raises(BadFileError, match="it is not a gemmascope_plugin graph"):
        Graph.load(tmp_path / "other")
    with pytest.raises(GemmaScopeError, match=r"metadata\['bad'\]\[0\] is object"):
        replace(graph, metadata={"bad": [object()]}).save(tmp_path / "a")
    with pytest.raises(
        GemmaScopeError, match=r"metadata\['deep'\] has the key 1, which is not plain text"
    ):
        replace(graph, metadata={"deep": {1: 2}}).save(tmp_path / "a")
    with pytest.raises(GemmaScopeError, match="Column 'label' of the nodes has None"):
        replace(graph, columns={**graph.columns, "label": np.full(len(graph), None)}).save(
            tmp_path / "a"
        )


def test_networkx_has_the_same_nodes_and_edges() -> None:
    graph = traced().prune()
    result = graph.to_networkx()
    assert list(result.nodes) == list(graph.nodes["id"])
    assert result.number_of_edges() == graph.n_edges
    row = graph.edge_frame(1).iloc[0]
    assert result.edges[row["source"], row["target"]]["weight"] == pytest.approx(row["weight"])
    assert (
        "activation" not in result.nodes["token@1"] and result.nodes["token@1"]["label"] == "w142"
    )


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


def test_what_is_not_a_path_or_a_number_is_refused() -> None:
    graph: Any = traced("some")
    graphs: Any = Graph
    for call in (graphs.from_json, graphs.load, graph.save):
        with pytest.raises(InputError, match="=3 is not a path"):
            call(3)
    with pytest.raises(InputError, match="node_threshold='0.8' is not a number"):
        graph.prune(node_threshold="0.8")
