"""JSON of graphs from elsewhere: what a viewer saved comes back, what is damaged is named."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope_plugin.errors import BadFileError, GemmaScopeError, UnknownNameError
from gemmascope_plugin.graphs import Graph
from gemmascope_plugin.graphs.viewer_files import INDEX, add_to_folder, check_slug
from gemmascope_plugin.graphs.write_json import cantor
from tests.graphs.graph_rules import check_rules
from tests.tracing.peer_graph import peer_file
from tests.tracing.traces import same, traced


def saved_by_a_viewer() -> dict[str, Any]:
    content = peer_file()
    content["qParams"] = {
        "pinnedIds": ["1_7_1", "3_9_1"],
        "supernodes": [["words", "0_1_1", "1_7_1"], ["gone", "9_9_9"]],
        "linkType": "both",
        "clickedId": "1_7_1",
        "sg_pos": "0.5 0.5",
        "densityThreshold": 0.9,
    }
    return content


def test_pins_and_supernodes_come_back() -> None:
    content = saved_by_a_viewer()
    graph = Graph.from_json(content)
    view = graph.metadata["view"]
    assert view["pinned"] == ("feature:1_7_1", "target:3_9_1")
    assert view["supernodes"] == (("words", "feature:0_1_1", "feature:1_7_1"), ("gone",))
    assert view["unknown"] == ("9_9_9",)
    again = graph.to_json("peer")
    check_rules(again)
    ids = {n["gemmascope"]["id"]: n["node_id"] for n in again["nodes"]}
    assert again["qParams"] == {
        **content["qParams"],
        "pinnedIds": [ids["feature:1_7_1"], ids["target:3_9_1"]],
        "supernodes": [["words", ids["feature:0_1_1"], ids["feature:1_7_1"]]],
        "clickedId": ids["feature:1_7_1"],
    }
    same(
        Graph.from_json(again),
        Graph.from_json(json.loads(json.dumps(again))),
    )
    twice = Graph.from_json(again).to_json("peer")
    assert twice["qParams"] == again["qParams"]


def test_the_view_goes_through_files_and_pruning(tmp_path: Path) -> None:
    graph = Graph.from_json(saved_by_a_viewer())
    again = Graph.load(graph.save(tmp_path / "a"))
    same(again, graph)
    plain = traced("some")
    features = plain.nodes["id"][plain.where("feature")].tolist()
    content = plain.to_json("x", groups={"all": features}, pinned=features[:1])
    shown = Graph.from_json(content)
    assert shown.metadata["view"]["supernodes"] == (("all", *features),)
    pruned = shown.prune(0.5)
    left = pruned.nodes["id"][pruned.where("feature")].tolist()
    assert 0 < len(left) < len(features)
    ((name, *members),) = pruned.to_json("x")["qParams"]["supernodes"]
    assert name == "all" and len(members) == len(left)
    assert shown.to_json("x", groups={})["qParams"]["supernodes"] == []
    with pytest.raises(UnknownNameError, match="A pin has the node 'no such'"):
        plain.to_json("x", pinned=["no such"])


def test_labels_are_wrapped_once() -> None:
    graph = Graph.from_json(peer_file())
    assert graph.nodes["label"].tolist() == ["a", "", "", "", "b"]
    for _ in range(3):
        content = graph.to_json("peer")
        labels = {n["feature_type"]: n["clerp"] for n in content["nodes"]}
        assert labels["embedding"] == 'Emb: "a"' and labels["logit"] == 'Output "b" (p=0.250)'
        graph = Graph.from_json(content)
        assert graph.nodes["label"].tolist() == ["a", "", "", "", "b"]


@pytest.mark.parametrize("form", ["pairs", "text", "table"])
def test_labels_that_a_viewer_changed_are_those_of_the_nodes(form: str) -> None:
    content, pairs = peer_file(), [[f"1_{cantor(1, 7)}_1", "capitals"]]
    forms: dict[str, Any] = {"pairs": pairs, "text": json.dumps(pairs), "table": dict(pairs)}
    content["qParams"]["clerps"] = forms[form]
    graph = Graph.from_json(content)
    assert graph.nodes["label"][graph.find("feature:1_7_1")] == "capitals"
    again = graph.to_json("x")
    assert "clerps" not in again["qParams"]
    assert [n["clerp"] for n in again["nodes"] if n["layer"] == "1"][0] == "capitals"


def test_an_activation_that_is_not_known_stays_so() -> None:
    content = peer_file()
    content["nodes"][0]["activation"] = None
    graph = Graph.from_json(content)
    again = graph.to_json("x")
    assert json.loads(json.dumps(again, allow_nan=False)) == again
    loaded = Graph.from_json(again).nodes["activation"]
    assert loaded.isna()[graph.find("feature:0_1_1")]
    assert loaded[graph.find("feature:1_7_1")] == 1.0


@pytest.mark.parametrize("slug", ["graph-metadata", "Graph-Metadata", "con", "NUL.x", "x" * 300])
def test_names_that_are_something_else(slug: str) -> None:
    with pytest.raises(UnknownNameError, match="The slug"):
        check_slug(slug)


CHANGES: list[tuple[Any, str]] = [
    (lambda c: c["nodes"][0].update(ctx_idx=float("inf")), "not JSON compliant"),
    (lambda c: c["nodes"][0].update(ctx_idx=2**70), "ctx_idx is .* not a whole number"),
    (lambda c: c["nodes"][0].update(ctx_idx=10**6), "has pos 1000000"),
    (lambda c: c["nodes"][0].update(ctx_idx=-1), "has pos -1"),
    (lambda c: c["nodes"][0].update(ctx_idx=True), "ctx_idx is True, not a whole number"),
    (lambda c: c["nodes"][0].update(layer="9" * 400), "layer is .* not a whole number"),
    (lambda c: c["nodes"][0].update(layer="99999"), "has layer 99999"),
    (lambda c: c["nodes"][0].update(feature=2**70), "feature is .* not a whole number"),
    (lambda c: c["nodes"][0].update(feature=-3), "feature is -3"),
    (lambda c: c["nodes"][0].update(clerp=None), "a label that is not text"),
    (lambda c: c["nodes"][0].update(node_id=7), "a label that is not text"),
    (lambda c: c["nodes"][0].update(activation="nan"), "activation is 'nan', not a number"),
    (lambda c: c["nodes"][4].update(token_prob="inf"), "token_prob is 'inf', not a number"),
    (lambda c: c["links"][0].update(weight="inf"), "weight of a link is 'inf', not a number"),
    (lambda c: c["links"][0].update(weight=1e300), "a weight that float32 does not have"),
    (lambda c: c["links"][0].update(weight=10**400), "too large"),
    (lambda c: c.update(nodes=[]), "it has no nodes|which is not a node"),
    (lambda c: c.update(nodes=3), "is not a graph"),
    (lambda c: c["metadata"].update(prompt_tokens=["a", 3]), "not a list of texts"),
    (lambda c: c["metadata"].update(scan={"$float": None}), "None stands for a number"),
    (lambda c: c["metadata"].update(prompt={"$float": 1}), "1 stands for a number"),
    (lambda c: c.update(qParams=[]), "qParams is not an object"),
    (lambda c: c["qParams"].update(pinnedIds=3), "pins or supernodes that are not lists"),
    (lambda c: c["qParams"].update(supernodes=[[1]]), "pins or supernodes that are not lists"),
    (lambda c: c["qParams"].update(clerps="{"), "qParams.clerps"),
    (lambda c: c["qParams"].update(clerps=[[1, 2]]), "are not pairs of texts"),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_damaged_content_is_named(number: int, tmp_path: Path) -> None:
    change, message = CHANGES[number]
    content = peer_file()
    change(content)
    with pytest.raises(BadFileError, match=message):
        Graph.from_json(content)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadFileError, match="x.json"):
        Graph.from_json(path)


def feature_of(content: dict[str, Any]) -> dict[str, Any]:
    """The first feature in a content."""
    return next(node for node in content["nodes"] if node["feature_type"].startswith("cross"))


def test_own_files_with_other_types_are_named() -> None:
    for change in (
        lambda c: c["metadata"]["gemmascope"].update(dtype="object"),
        lambda c: c["metadata"]["gemmascope"].update(metadata=[1]),
        lambda c: c["metadata"].update(gemmascope=3),
        lambda c: c["nodes"][0]["gemmascope"].update(id=3),
        lambda c: c["nodes"][-1]["gemmascope"].update(layer="high"),
        lambda c: c["nodes"][-1]["gemmascope"].update(value={"$float": []}),
        lambda c: c["nodes"][-1]["gemmascope"].update(explained="yes"),
        lambda c: feature_of(c)["gemmascope"].update(site="0"),
        lambda c: feature_of(c)["gemmascope"].update(site="blocks.1.hook_mlp_in"),
    ):
        content = copy.deepcopy(traced("some").to_json("x"))
        change(content)
        with pytest.raises(BadFileError):
            Graph.from_json(content)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["deep", "device", "bytes", "list", "nan"])
def test_files_that_are_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.json"
    texts = {"deep": b'{"nodes": ' + b"[" * 10**6, "bytes": b"\xff{", "list": b"[]", "nan": b"NaN"}
    if kind == "device":
        path.symlink_to(os.devnull)
    else:
        path.write_bytes(texts[kind])
    with pytest.raises(GemmaScopeError, match="x.json"):
        Graph.from_json(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["id", "label", "value", "$float"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a content."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(p for key, each in inner for p in places(each, (*path, key)))]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), value=VALUES, is_plain=st.booleans(), gone=st.booleans())
def test_no_content_makes_another_error(data, value, is_plain, gone) -> None:
    content = copy.deepcopy(SMALL if is_plain else saved_by_a_viewer())
    path = data.draw(st.sampled_from(places(content)[1:]))
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if gone:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    try:
        graph = Graph.from_json(content)
    except BadFileError:
        return
    assert repr(graph) and graph._repr_html_() and graph.to_json("again")


SMALL = Graph.from_json(saved_by_a_viewer()).to_json("small")


def _add(folder: str, first: int) -> None:
    graph = Graph.from_json(peer_file())
    for number in range(first, first + 5):
        add_to_folder(folder, graph.to_json(f"g{number}"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_processes_that_add_at_once_lose_no_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_add, args=(str(tmp_path), n)) for n in (0, 5)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    listed = json.loads((tmp_path / INDEX).read_text())["graphs"]
    assert sorted(g["slug"] for g in listed) == sorted(f"g{n}" for n in range(10))
    assert len(list(tmp_path.iterdir())) == 11


def test_a_damaged_list_is_named_and_left(tmp_path: Path) -> None:
    graph = Graph.from_json(peer_file())
    for text in ("{", "[]", '{"graphs": [1]}', '{"graphs": {}}', "[" * 10**5):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(BadFileError, match="graph-metadata.json.*mend it, delete it"):
            add_to_folder(tmp_path, graph.to_json("one"))
        assert (tmp_path / INDEX).read_text() == text and len(list(tmp_path.iterdir())) == 1
