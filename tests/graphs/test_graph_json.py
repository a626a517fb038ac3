"""The JSON of attribution graphs: the viewers' rules, and the way back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmascope_plugin.errors import (
    BadFileError,
    GemmaScopeError,
    MissingFileError,
    UnknownNameError,
)
from gemmascope_plugin.graphs import Graph
from gemmascope_plugin.graphs.node import table_columns
from gemmascope_plugin.graphs.read_json import from_cantor
from gemmascope_plugin.graphs.viewer_files import INDEX, add_to_folder, write_json
from gemmascope_plugin.graphs.write_json import cantor, shortest
from tests.graphs.graph_rules import check_rules, scores_from_file
from tests.tracing.peer_graph import peer_file
from tests.tracing.traces import same, traced

GRAPHS = ("plain", "mixed", "targets", "some")


@pytest.mark.parametrize("name", GRAPHS)
def test_files_obey_the_rules_and_come_back(name: str) -> None:
    graph = traced(name)
    content = graph.to_json("a-graph", scan="gemma-2-2b")
    check_rules(content)
    assert content["metadata"]["scan"] == "gemma-2-2b"
    same(Graph.from_json(json.loads(json.dumps(content))), graph)


@pytest.mark.parametrize("name", GRAPHS)
def test_rows_sum_to_what_they_explain_after_reading(name: str) -> None:
    graph = traced(name)
    again = Graph.from_json(graph.to_json("a"))
    active = graph.nodes["activation"].to_numpy()[graph.edges.nodes]
    size = np.abs(active).max()
    assert again.where("bias").sum() == graph.where("bias").sum() > 0
    assert np.abs(again.edges.sums - graph.edges.sums).max() <= 1e-6 * size
    assert np.abs(again.edges.sums - active).max() <= 1e-6 * size
    assert again.metadata["residual"] == graph.metadata["residual"] < 1e-6


def test_a_file_with_fewer_links_does_not_say_that_rows_sum() -> None:
    for place in (["links"], ["metadata", "gemmascope", "biases", "links"]):
        content = json.loads(json.dumps(traced().to_json("a")))
        links = content
        for name in place:
            links = links[name]
        links.pop()
        again = Graph.from_json(content)
        assert np.isnan(again.metadata["residual"]) and again.n_edges == traced().n_edges - 1


def test_a_file_without_biases_does_not_say_that_rows_sum() -> None:
    content = traced().to_json("a")
    del content["metadata"]["gemmascope"]["biases"]
    again = Graph.from_json(content)
    assert not again.where("bias").any() and np.isnan(again.metadata["residual"])
    assert "residual" not in Graph.from_json(peer_file()).metadata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b["nodes"][0].update(place=10**6), "a bias has the place 1000000"),
        (lambda b: b["nodes"][0].update(kind="feature"), "stands among the biases"),
        (lambda b: b["nodes"][0].update(layer="1"), "layer of 'bias:.*' is not a whole number"),
        (lambda b: b["nodes"][0].update(weight="1"), "weight of 'bias:.*' is not a number"),
        (lambda b: b["nodes"].append(b["nodes"][0]), "is there twice"),
        (lambda b: b["nodes"].pop(0), "which is not a node"),
        (lambda b: b["links"].append(b["links"][0]), "is there twice"),
        (lambda b: b.pop("nodes"), "'nodes' is missing"),
        (lambda b: b.update(nodes=3), "is not a graph"),
    ],
)
def test_damaged_biases_are_refused(change: Any, message: str) -> None:
    content = json.loads(json.dumps(traced().to_json("a")))
    change(content["metadata"]["gemmascope"]["biases"])
    with pytest.raises(BadFileError, match=message):
        Graph.from_json(content)


def test_pruned_graphs_come_back_with_their_shares() -> None:
    graph = traced().prune()
    content = graph.to_json("pruned")
    check_rules(content)
    assert content["metadata"]["node_threshold"] == 0.8
    assert content["metadata"]["pruning_settings"]["edge_threshold"] == 0.98
    same(Graph.from_json(content), graph)


@pytest.mark.parametrize("name", ["plain", "some"])
def test_the_viewers_compute_our_scores(name: str) -> None:
    for graph in (traced(name), traced(name).prune()):
        content = graph.to_json("scores")
        assert scores_from_file(content) == pytest.approx(tuple(graph.scores), rel=1e-6)
        details = content["metadata"]["gemmascope"]
        assert details["replacement_score"] == graph.scores.replacement
        assert details["completeness_score"] == graph.scores.completeness


def test_influence_falls_with_importance() -> None:
    graph = traced()
    content = graph.to_json("x")
    shown = {n["gemmascope"]["id"]: n["influence"] for n in content["nodes"]}
    influential = [i for i in np.argsort(-graph.influence, kind="stable") if graph.influence[i] > 0]
    shares = [shown[graph.nodes["id"][i]] for i in influential]
    assert shares == sorted(shares) and shares[0] > 0


def test_biases_are_sums_in_the_metadata() -> None:
    graph = traced()
    content = graph.to_json("x")
    sums = content["metadata"]["gemmascope"]["bias_sums"]
    names = graph.nodes["id"][graph.where("bias")]
    assert list(sums) == list(names) and not set(names) & {n["node_id"] for n in content["nodes"]}
    column = graph.edges.matrix[:, [graph.find(names.iloc[0])]].sum()
    assert sums[names.iloc[0]] == pytest.approx(float(column))
    assert content["metadata"]["gemmascope"]["residual"] == graph.metadata["residual"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights_have_theirshortest_text(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    sizes = 10 ** rng.uniform(-15, 15, 3000)
    some = [0.0, 0.1, -3.5, 1e12, 1e-12, 123456789, 2**-20, np.finfo(dtype).tiny]
    with np.errstate(over="ignore"):
        weights = np.concatenate([rng.standard_normal(3000) * sizes, some]).astype(dtype)
    weights = weights[np.isfinite(weights)]
    expected = [float(str(weight)) for weight in weights]
    assert shortest(weights).tolist() == expected


def test_names_of_nodes() -> None:
    content = traced("mixed").to_json("x")
    nodes = content["nodes"]
    by_site: dict[str, Any] = {n["gemmascope"]["site"]: n for n in nodes if n["feature"] >= 0}
    res, att = by_site["blocks.1.hook_resid_post"], by_site["blocks.2.attn.hook_z"]
    layer, word, index, _ = res["node_id"].split("_")
    assert (layer, word) == ("1", "res") and res["clerp"].startswith(f"res:{index} L1 resid")
    assert from_cantor(res["feature"]) == (1, int(index) + 2 * 2**21)
    assert from_cantor(att["feature"])[1] >> 21 == 1 and att["node_id"].startswith("2_att_")
    errors = {n["node_id"] for n in nodes if n["feature"] == -1}
    assert {"1_error_res_3", "2_error_att_3", "2_error_mlp_3"} <= errors
    details = content["metadata"]["gemmascope"]
    assert set(details["metadata"]["dictionaries"]) == set(by_site) - {""}
    assert details["limits"] == ["dictionaries beside the MLPs' are shown without examples"]


def test_targets_of_every_kind() -> None:
    content = traced("targets").to_json("x")
    targets = [n for n in content["nodes"] if n["feature_type"] == "logit"]
    assert [n["clerp"] for n in targets] == [
        'Output "<unk>" (p=0.200)',
        'Output "w4 - w5" (p=0.200)',
        'Output "w5 - w4" (p=0.200)',
        'Output "a \u201db\u201d (p =" (p=0.200)',
    ]
    assert [n["feature"] for n in targets] == [3, 2**20, 2**20 + 1, 2**20 + 2]
    assert [n["is_target_logit"] for n in targets] == [True, False, False, False]
    assert "features are targets" in content["metadata"]["gemmascope"]["limits"][0]


def test_a_graph_of_one_layer_says_what_will_not_show_it() -> None:
    graph = traced()
    shallow = (graph.nodes["layer"] < 1).to_numpy() | graph.where("target")
    nodes = graph.nodes[shallow].reset_index(drop=True)
    cut = Graph(table_columns(nodes), graph.edges.compacted(shallow), graph.tokens, graph.metadata)
    content = cut.to_json("x")
    check_rules(content)
    assert "no graph without a node above layer 0" in content["metadata"]["gemmascope"]["limits"][0]


def test_groups_become_supernodes() -> None:
    graph = traced()
    ids = list(graph.nodes["id"][graph.where("feature")][:2])
    content = graph.to_json("x", groups={"two": ids}, source_set="set-16k", description="why")
    ((name, *members),) = content["qParams"]["supernodes"]
    shown = {n["node_id"]: n["gemmascope"]["id"] for n in content["nodes"]}
    assert name == "two" and [shown[m] for m in members] == ids
    assert content["metadata"]["feature_details"] == {"neuronpedia_source_set": "set-16k"}
    assert content["metadata"]["info"]["description"] == "why"
    with pytest.raises(
        UnknownNameError, match=r"A group has the node 'blocks.0.hook.*Did you mean"
    ):
        graph.to_json("x", groups={"two": [ids[0][:-1] + "99"]})


@given(layer=st.integers(0, 200), index=st.integers(0, 2**24))
def test_pairs_are_numbers_and_back(layer: int, index: int) -> None:
    number = cantor(layer, index)
    assert from_cantor(number) == (layer, index)
    # the viewers' own inverse, in floating point
    diagonal = int((np.sqrt(8 * number + 1) - 1) // 2)
    assert number - diagonal * (diagonal + 1) // 2 == index or index > 10**7


def test_a_folder_lists_its_graphs(tmp_path: Path) -> None:
    graph = traced("some")
    first = add_to_folder(tmp_path, graph.to_json("one"))
    add_to_folder(tmp_path, graph.to_json("two"))
    add_to_folder(tmp_path, graph.to_json("one", description="newer"))
    assert first == tmp_path / "one.json"
    assert sorted(p.name for p in tmp_path.iterdir()) == [INDEX, "one.json", "two.json"]
    listed = json.loads((tmp_path / INDEX).read_text())["graphs"]
    assert [(g["slug"], g["info"]["description"]) for g in listed] == [
        ("two", ""),
        ("one", "newer"),
    ]
    assert listed[0]["info"]["create_time_ms"] > 10**12
    same(Graph.from_json(first), graph)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(BadFileError, match="graph-metadata.json"):
        add_to_folder(tmp_path, graph.to_json("one"))


def test_files_of_circuit_tracer_are_read() -> None:
    graph = Graph.from_json(peer_file())
    rows = graph.nodes[["id", "kind", "layer", "index", "weight"]].to_numpy().tolist()
    assert rows == [
        ["token:E_4_1", "token", -1, 4, 0.0],
        ["feature:0_1_1", "feature", 0, 1, 0.0],
        ["feature:1_7_1", "feature", 1, 7, 0.0],
        ["error:0_1_1", "error", 1, -1, 0.0],
        ["target:3_9_1", "target", 2, 9, 0.25],
    ]
    sources = graph.sources_of("target:3_9_1")
    assert dict(zip(sources["id"], sources["weight"], strict=True)) == {
        "feature:1_7_1": 3.0,
        "feature:0_1_1": 4.0,
        "error:0_1_1": -5.0,
    }
    assert graph.metadata["ambiguous_links"] == 0 and graph.metadata["node_threshold"] == 0.8
    check_rules(graph.to_json("again"))


def test_a_link_that_could_begin_at_two_nodes_is_counted() -> None:
    content = peer_file()
    del content["links"][-1]
    graph = Graph.from_json(content)
    assert graph.metadata["ambiguous_links"] == 1
    assert graph.n_edges == 4


def test_old_files_have_the_index_in_the_name() -> None:
    content = peer_file()
    del content["metadata"]["schema_version"]
    content["nodes"][1]["feature"] = 100007
    assert Graph.from_json(content).nodes["index"].tolist() == [4, 1, 7, -1, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("links"), "'links'"),
        (lambda c: c["nodes"][0].update(feature_type="bias"), "'0_1_1' is of the type 'bias'"),
        (lambda c: c["links"][0].update(source="E_5_1"), "ends at 'E_5_1', which is not a node"),
        (lambda c: c["links"].append(c["links"][0]), "from 'E_4_1' to '0_1_1' is there twice"),
        (
            lambda c: c["links"][0].update(source="3_9_1"),
            "leads backwards, from '3_9_1' to '0_1_1'",
        ),
        (lambda c: c["nodes"].append(c["nodes"][1]), "'feature:1_7_1' is there twice"),
    ],
)
def test_damaged_content_is_refused(change: Any, message: str) -> None:
    content = peer_file()
    change(content)
    with pytest.raises(BadFileError, match=message):
        Graph.from_json(content)


def test_mistakes(tmp_path: Path) -> None:
    graph = traced("some")
    with pytest.raises(UnknownNameError, match="The slug 'a/b' is not a file name"):
        graph.to_json("a/b")
    with pytest.raises(GemmaScopeError, match=r"grouped nodes.*groups=.* before collapse"):
        replace(graph, metadata={"supernodes": {}}).to_json("x")
    with pytest.raises(GemmaScopeError, match="is a folder"):
        write_json(tmp_path, graph.to_json("x"))
    with pytest.raises(MissingFileError, match="There is no graph at"):
        Graph.from_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(BadFileError, match="cannot read"):
        Graph.from_json(tmp_path / "bad.json")
