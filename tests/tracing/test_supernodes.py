"""Groups of similar features, and graphs in which groups are nodes, against dense definitions."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import gemmascope_plugin as gs
from gemmascope_plugin.errors import (
    BadFileError,
    EmptySelectionError,
    GemmaScopeError,
    MissingFileError,
    UnknownNameError,
)
from gemmascope_plugin.graphs import Graph, Supernodes, contrast
from gemmascope_plugin.graphs.adjacency import Adjacency
from gemmascope_plugin.graphs.collapse import collapse
from gemmascope_plugin.graphs.node import table_columns
from gemmascope_plugin.tracing import supernodes, trace
from gemmascope_plugin.tracing.graph_features import by_decoder
from tests import factories
from tests.splice.cross_layer_reference import clt
from tests.tracing.prompts import CLEAN, dictionaries, graph, influence, model


@cache
def pruned() -> Graph:
    return graph("clean").prune(0.7, 0.95)


@cache
def grouped() -> Supernodes:
    return supernodes(pruned(), dictionaries())


def unit(vector: np.ndarray) -> np.ndarray:
    size = np.linalg.norm(vector)
    return vector / size if size else vector


def similarity(whole: Graph, first: Any, second: Any, by: str) -> float:
    """Of two rows of the table, one pair at a time."""
    nodes = whole.nodes
    if by == "decoder":
        saes = {"blocks.1.hook_resid_post": 3, "blocks.2.attn.hook_z": 4}
        W = [
            dictionaries()[saes.get(row.site, row.layer)].W_dec[row.index].numpy(force=True)
            for row in (first, second)
        ]
        if first.site != second.site and "hook_z" in first.site + second.site:
            return 0.0
        return float(unit(W[0]) @ unit(W[1]))
    if by == "activation":
        if first.pos != second.pos:
            return 0.0
        profiles = []
        for row in (first, second):
            rows = nodes[(nodes["site"] == row.site) & (nodes["index"] == row.index)]
            rows = rows[rows["kind"] == "feature"]
            profile = np.zeros(len(whole.tokens))
            profile[rows["pos"]] = rows["activation"]
            profiles.append(unit(profile))
        return float(profiles[0] @ profiles[1])
    dense = whole.adjacency.toarray()
    i, j = whole.find(first.id), whole.find(second.id)
    return float((unit(dense[i]) @ unit(dense[j]) + unit(dense[:, i]) @ unit(dense[:, j])) / 2)


def linked(table: np.ndarray, threshold: float) -> set[frozenset[int]]:
    """Average linkage: the most similar two groups are joined, until none are similar enough."""
    groups = [[i] for i in range(len(table))]
    while len(groups) > 1:
        best = max(
            (float(table[np.ix_(a, b)].mean()), i, j)
            for i, a in enumerate(groups)
            for j, b in enumerate(groups)
            if i < j
        )
        if best[0] < threshold:
            break
        groups[best[1]] += groups.pop(best[2])
    return {frozenset(group) for group in groups if len(group) > 1}


@pytest.mark.parametrize(
    "by", [("decoder",), ("activation",), ("edges",), ("decoder", "activation", "edges")]
)
def test_groups_are_those_of_average_linkage(by: tuple[str, ...]) -> None:
    rows = list(pruned().nodes[pruned().where("feature")].itertuples())
    table = np.array(
        [[np.mean([similarity(pruned(), a, b, name) for name in by]) for a in rows] for b in rows]
    )
    threshold = min(float(np.quantile(table, 0.8)) + 1e-4, 0.9)
    ids = [row.id for row in rows]
    expected = {frozenset(ids[i] for i in group) for group in linked(table, threshold)}
    groups = supernodes(pruned(), dictionaries(), by=by, threshold=threshold)
    assert {frozenset(members) for members in groups.values()} == expected and expected


def test_a_number_of_groups() -> None:
    n_features = int(pruned().where("feature").sum())
    for n in (1, 3, n_features):
        groups = supernodes(pruned(), dictionaries(), n=n)
        alone = n_features - sum(map(len, groups.values()))
        assert len(groups) + alone == n


def test_only_features_that_are_no_targets_are_grouped() -> None:
    whole = graph("clean")
    row = whole.nodes[whole.where("feature") & (whole.nodes["layer"] == 2)].iloc[-1]
    target = gs.tracing.FeatureTarget(row["site"], int(row["index"]), int(row["pos"]))
    before = trace(model(), CLEAN, dictionaries(), targets=[target]).prune()
    groups = supernodes(before, n=1)
    (ids,) = groups.values()
    kinds = before.nodes.set_index("id").loc[list(ids), "kind"]
    assert set(kinds) == {"feature"} and row["id"] not in ids
    with pytest.raises(GemmaScopeError, match=f"The group 'a' has the target '{row['id']}'"):
        Supernodes({"a": [row["id"]]}).collapse(before)


def test_most_influential_groups_first_and_named_after_their_best_member() -> None:
    nodes = pruned().nodes.set_index("id")
    sums = []
    for name, ids in grouped().items():
        shares = pruned().influence[[pruned().find(i) for i in ids]]
        sums.append(shares.sum())
        assert name.startswith(nodes.loc[ids[int(shares.argmax())], "label"])
    assert sums == sorted(sums, reverse=True)
    same = pruned().with_labels(lambda node: "plural" if node.kind == "feature" else None)
    names = list(supernodes(same, dictionaries()))
    assert (
        names[0] == "plural" and names[1].startswith("plural @") and len(set(names)) == len(names)
    )


def collapsed_influence(before: Graph, groups: Supernodes) -> dict[str, float]:
    """Of each group: that of its members, less what flows from one to another of them."""
    dense = np.abs(before.adjacency.toarray().astype(np.float64))
    dense[:, before.where("bias")] = 0
    sums = dense.sum(1, keepdims=True)
    flow = (influence(before) + before.weights)[:, None] * dense / np.where(sums == 0, 1, sums)
    result = {}
    for name, ids in groups.items():
        members = [before.find(i) for i in ids]
        result[name] = influence(before)[members].sum() - flow[np.ix_(members, members)].sum()
    return result


def without_internal_edges(before: Graph) -> Supernodes:
    """Features of one site and token reach each other on no way; some sites have a node between."""
    rows = before.nodes[before.where("feature")]
    groups = {f"{s}@{p}": list(members["id"]) for (s, p), members in rows.groupby(["site", "pos"])}
    return Supernodes(groups)


@pytest.mark.parametrize("whole", [True, False])
def test_a_group_has_the_influence_of_its_members(whole: bool) -> None:
    before = graph("clean") if whole else pruned()
    groups = without_internal_edges(before)
    after = groups.collapse(before)
    for name, ids in groups.items():
        expected = before.influence[[before.find(i) for i in ids]].sum()
        assert after.influence[after.find(f"group:{name}")] == pytest.approx(expected, abs=1e-6)
    assert_others_are_the_same(before, after)
    np.testing.assert_allclose(after.influence, influence(after), atol=1e-6)


def assert_others_are_the_same(before: Graph, after: Graph) -> None:
    for node in after.nodes["id"]:
        if not node.startswith("group:"):
            places = before.find(node), after.find(node)
            assert before.influence[places[0]] == pytest.approx(
                after.influence[places[1]], abs=1e-6
            )
    assert after.scores.replacement == pytest.approx(before.scores.replacement, abs=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_groups_that_lead_into_each_other_both_ways(whole: bool) -> None:
    before = graph("clean") if whole else pruned()
    groups = supernodes(before, by=("edges",), threshold=0.1)
    after = groups.collapse(before)
    sources = after.edges.matrix.indices
    assert (sources >= np.repeat(after.edges.nodes, np.diff(after.edges.matrix.indptr))).any()
    for name, expected in collapsed_influence(before, groups).items():
        assert after.influence[after.find(f"group:{name}")] == pytest.approx(expected, abs=1e-6)
    assert_others_are_the_same(before, after)
    np.testing.assert_allclose(after.influence, influence(after), atol=1e-6)
    again = after.prune(0.9, 0.99)
    np.testing.assert_allclose(again.influence, influence(again), atol=1e-6)


def small() -> Graph:
    """A token, features of three layers, of which the outer two do not touch, and a target."""
    ids = ["token", "low", "middle", "high", "target"]
    kinds = ["token", "feature", "feature", "feature", "target"]
    columns = {"id": ids, "kind": kinds, "label": ids, "layer": [-1, 0, 1, 2, 3], "pos": 0}
    columns |= {"site": [f"blocks.{i}.hook_mlp_out" for i in range(5)], "index": range(5)}
    nodes = pd.DataFrame({**columns, "activation": 1.0, "weight": [0.0, 0, 0, 0, 1]})
    rows = [[1, 0, 0, 0, 0], [1, -1, 0, 0, 0], [3, 0, 1, 0, 0], [0, 0, -2, 2, 0]]
    edges = Adjacency(sp.csr_array(np.array(rows, dtype=np.float64)), np.arange(1, 5))
    return Graph(table_columns(nodes), edges, ("a",))


def test_a_group_with_a_node_between_its_members() -> None:
    before = small()
    # half of the target each, a quarter of what is above, half of that
    np.testing.assert_allclose(before.influence[[3, 2, 1]], [0.5, 0.625, 0.3125])
    after = Supernodes({"ends": ["low", "high"]}).collapse(before)
    assert list(after.nodes["id"]) == ["token", "middle", "group:ends", "target"]
    np.testing.assert_allclose(after.influence, [1, 0.625, 0.8125, 0])
    # the group's row: a quarter of 0.5 comes from between, the rest from the token; 5 in all
    flow = np.array([0.375 + 0.3125, 0.125]) / 0.8125
    expected = [[1, 0, -1, 0], [*(5 * flow), 0, 0], [0, -2, 2, 0]]
    np.testing.assert_allclose(after.edges.matrix.toarray(), expected)
    signed = Supernodes({"ends": ["low", "high"]}).collapse(before, edges="effects")
    np.testing.assert_allclose(signed.edges.matrix.toarray()[1], [4, 1, 0, 0])


def test_a_group_whose_members_touch() -> None:
    before = small()
    after = Supernodes({"upper": ["middle", "high"]}).collapse(before)
    # of 0.5 and 0.625, 0.125 flows from one to the other
    assert after.influence[after.find("group:upper")] == pytest.approx(1.0)
    assert after.influence[after.find("low")] == pytest.approx(0.3125)


def test_signed_effects_are_summed() -> None:
    before = graph("clean")
    groups = supernodes(before, n=30)
    after = groups.collapse(before, edges="effects")
    at = {node: f"group:{name}" for name, ids in groups.items() for node in ids}
    member = np.array(
        [[at.get(node, node) == new for node in before.nodes["id"]] for new in after.nodes["id"]],
        float,
    )
    dense = before.adjacency.toarray()
    expected = member @ dense @ member.T
    np.fill_diagonal(expected, 0)
    got = after.adjacency.toarray()
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    whole = without_internal_edges(before).collapse(before, edges="effects")
    sums = whole.adjacency.sum(1)[whole.edges.nodes]
    values = whole.nodes["activation"].to_numpy()[whole.edges.nodes]
    np.testing.assert_allclose(sums, values, atol=1e-5 * np.abs(values).max())


def test_edges_between_single_nodes_stay() -> None:
    before, groups = pruned(), grouped()
    after = groups.collapse(before)
    alone = [node for node in after.nodes["id"] if not node.startswith("group:")]
    cells = [
        np.ix_([g.find(n) for n in alone], [g.find(n) for n in alone]) for g in (before, after)
    ]
    got, expected = after.adjacency.toarray()[cells[1]], before.adjacency.toarray()[cells[0]]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    assert (expected != 0).any()


def test_the_node_of_a_group() -> None:
    before, groups = pruned(), grouped()
    after = groups.collapse(before)
    name, ids = next(iter(groups.items()))
    row = after.nodes.iloc[after.find(f"group:{name}")]
    members = before.nodes.set_index("id").loc[list(ids)]
    assert row["label"] == name and row["members"] == len(ids) and row["kind"] == "feature"
    assert row["activation"] == pytest.approx(members["activation"].sum())
    assert row["influence"] == members["influence"].min()
    best = members.iloc[int(before.influence[[before.find(i) for i in ids]].argmax())]
    assert (row["layer"], row["pos"], row["site"]) == (best["layer"], best["pos"], best["site"])
    assert set(after.nodes["members"]) > {1}
    assert after.metadata["supernodes"] == dict(groups)
    assert len(after) == len(before) - sum(len(ids) - 1 for ids in groups.values())


def test_collapsed_graphs_are_kept_and_shown(tmp_path: Any) -> None:
    before = pruned()
    after = supernodes(before, by=("edges",), threshold=0.1).collapse(before)
    again = Graph.load(after.save(tmp_path / "a"))
    np.testing.assert_array_equal(again.influence, after.influence)
    assert again.nodes.equals(after.nodes) and again.metadata == after.metadata
    assert "group" in after._repr_html_()
    assert after.plot().data
    content = before.to_json("a", groups=grouped())
    assert [name for name, *_ in content["qParams"]["supernodes"]] == list(grouped())


def test_contrasts_and_means_are_grouped_too() -> None:
    both = contrast(graph("clean"), graph("corrupt")).prune()
    groups = supernodes(both, dictionaries())
    after = groups.collapse(both)
    name, ids = next(iter(groups.items()))
    row = after.nodes.iloc[after.find(f"group:{name}")]
    members = both.nodes.set_index("id").loc[list(ids)]
    assert row["activation_corrupt"] == pytest.approx(members["activation_corrupt"].sum())
    many = gs.union([graph("clean"), graph("other")]).prune()
    assert_others_are_the_same(many, supernodes(many).collapse(many))


def test_closed_circles_are_refused() -> None:
    ring = Adjacency(sp.csr_array(np.array([[0.0, 1.0], [1.0, 0.0]])), np.arange(2), False)
    with pytest.raises(GemmaScopeError, match="goes round in the graph for ever"):
        ring.influence(np.ones(2))


@pytest.fixture(scope="module")
def suite() -> Any:
    return gs.tiny()


def labelled(suite: Any, task: str, number: int) -> tuple[Graph, list[Any]]:
    """A pruned graph of a held-out prompt, features called as the suite labels them."""
    saes = [suite.load("transcoder", layer) for layer in range(4)]
    words = {
        f"blocks.{i}.hook_mlp_out": {n: label.concept for n, label in suite.labels_of(sae).items()}
        for i, sae in enumerate(saes)
    }
    prompt = suite.tasks[task].clean[number]
    return trace(suite.model, prompt, saes).prune().with_labels(words), saes


def test_features_of_one_concept_come_together(suite: Any) -> None:
    before, saes = labelled(suite, "agreement", 0)
    groups = supernodes(before, saes)
    nodes = before.nodes.set_index("id")
    assert before.tokens[1] == "yesterday" and before.tokens[3] == "teachers"
    cues = set(nodes.index[nodes["label"] == "time_cue"])
    assert set(groups["time_cue"]) == cues and len(cues) >= 3
    # no group mixes the subject with the attractor, whose features are partly the same
    for ids in groups.values():
        assert len(set(nodes.loc[list(ids), "pos"])) == 1


def test_features_of_a_word_are_told_from_those_of_what_follows(suite: Any) -> None:
    before, saes = labelled(suite, "two_hop", 0)
    nodes = before.nodes.set_index("id")
    groups = supernodes(before, saes)
    labels = {name: list(nodes.loc[list(ids), "label"]) for name, ids in groups.items()}
    assert set(labels["word=is"]) == {"word=is"} and len(labels["word=is"]) >= 5
    assert "word=is" not in labels["next_is_capital"]
    assert labels["next_is_capital"].count("next_is_capital") >= 2
    after = groups.collapse(before)
    assert_others_are_the_same(before, after)


def test_edits_make_new_groups() -> None:
    first = Supernodes({"a": ["1", "2", "3"], "b": ["4"], "c": ["5", "6"]})
    assert dict(first.rename("b", "d")) == {"a": ("1", "2", "3"), "d": ("4",), "c": ("5", "6")}
    assert dict(first.rename("b", "b")) == dict(first)
    assert dict(first.merge("c", "a")) == {"b": ("4",), "c": ("5", "6", "1", "2", "3")}
    assert list(first.merge("a", "b", name="all")) == ["all", "c"]
    assert dict(first.move("4", "a")) == {"a": ("1", "2", "3", "4"), "c": ("5", "6")}
    assert first.move("7", "b")["b"] == ("4", "7")
    assert first.move("1", "a")["a"] == ("2", "3", "1")
    assert list(first.split("a", ["1", "3"], "z").items())[:2] == [("a", ("2",)), ("z", ("1", "3"))]
    assert dict(first.without("a", "5")) == {"b": ("4",), "c": ("6",)}
    assert dict(first) == {"a": ("1", "2", "3"), "b": ("4",), "c": ("5", "6")}
    assert repr(first) == "Supernodes(3 groups of 6 nodes: 'a': 3, 'b': 1, 'c': 2)"


def test_json_and_back(tmp_path: Any) -> None:
    first = Supernodes({"a": ["1", "2"], "b": ["4"]})
    assert first.to_json() == {"supernodes": [["a", "1", "2"], ["b", "4"]]}
    assert dict(Supernodes.from_json(first.to_json())) == dict(first)
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(first.to_json()))
    assert dict(Supernodes.from_json(path)) == dict(first)
    with pytest.raises(MissingFileError, match="no supernodes at"):
        Supernodes.from_json(tmp_path / "none")
    path.write_text("{")
    with pytest.raises(BadFileError, match="cannot read"):
        Supernodes.from_json(path)
    for wrong in ({}, {"supernodes": {"a": []}}, {"supernodes": [["a", 1]]}, {"supernodes": [[]]}):
        with pytest.raises(BadFileError, match=r"holds no supernodes.*\[\[\"name\", \"id\""):
            Supernodes.from_json(wrong)
    with pytest.raises(GemmaScopeError, match=r"There is a group 'a' already"):
        Supernodes.from_json({"supernodes": [["a", "1"], ["a", "2"]]})


def test_groups_that_are_none() -> None:
    first = Supernodes({"alpha": ["1", "2"], "beta": ["4"]})
    with pytest.raises(GemmaScopeError, match=r"'1' is in the groups 'a' and 'b'.*in one group"):
        Supernodes({"a": ["1"], "b": ["1"]})
    with pytest.raises(GemmaScopeError, match=r"'1' is in the groups 'a' and 'a'"):
        Supernodes({"a": ["1", "1"]})
    with pytest.raises(EmptySelectionError, match=r"The group 'a' has the nodes \[\]"):
        Supernodes({"a": []})
    with pytest.raises(EmptySelectionError, match=r"has the nodes 'xyz'.*lists of node ids"):
        Supernodes({"a": "xyz"})
    with pytest.raises(UnknownNameError, match=r"no group 'alpa'.*alpha, beta.*'alpha'"):
        first.rename("alpa", "b")
    with pytest.raises(GemmaScopeError, match=r"a group 'beta' already.*another name"):
        first.rename("alpha", "beta")
    with pytest.raises(UnknownNameError, match="no group 'gamma'"):
        first.merge("alpha", "gamma")
    with pytest.raises(EmptySelectionError, match=r"1 group cannot be merged.*\.merge\("):
        first.merge("alpha", "alpha")
    with pytest.raises(UnknownNameError, match="no group 'gamma'"):
        first.move("1", "gamma")
    with pytest.raises(UnknownNameError, match=r"'alpha' has no node '4'.*There is: 1, 2"):
        first.split("alpha", ["4"], "new")
    with pytest.raises(EmptySelectionError, match=r"2 of 2 nodes.*\.rename\('alpha', 'new'\)"):
        first.split("alpha", ["1", "2"], "new")
    with pytest.raises(GemmaScopeError, match="a group 'beta' already"):
        first.split("alpha", ["1"], "beta")
    with pytest.raises(UnknownNameError, match="no group '9'"):
        first.without("9")


def test_what_cannot_be_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    before = pruned()
    with pytest.raises(UnknownNameError, match=r"similarity 'decode'.*decoder, activation, edges"):
        supernodes(before, by=("decode",))
    with pytest.raises(EmptySelectionError, match=r"needs the dictionaries.*transcoders"):
        supernodes(before, by=("decoder",))
    with pytest.raises(EmptySelectionError, match=r"by=\(\) is not a measure"):
        supernodes(before, by=())
    with pytest.raises(UnknownNameError, match=r"threshold=0.0 is not a similarity.*up to 1"):
        supernodes(before, threshold=0.0)
    with pytest.raises(UnknownNameError, match="n=0 is not a number of groups"):
        supernodes(before, n=0)
    with pytest.raises(UnknownNameError, match=r"features of blocks.*hook_resid_post.*no dict"):
        supernodes(before, dictionaries()[:3])
    with pytest.raises(GemmaScopeError, match="grouped nodes already"):
        supernodes(grouped().collapse(before))
    monkeypatch.setattr("gemmascope_plugin.tracing.graph_features.MAX_FEATURES", 3)
    with pytest.raises(GemmaScopeError, match=r"features; similarities.*graph.prune\(\)"):
        supernodes(before)


def test_what_cannot_be_collapsed() -> None:
    before = graph("clean")
    feature = before.nodes["id"][before.where("feature")].iloc[0]
    error = before.nodes["id"][before.where("error")].iloc[0]
    with pytest.raises(UnknownNameError, match=rf"no node '{feature}0'.*{feature}.*nodes.id"):
        Supernodes({"a": [f"{feature}0"]}).collapse(before)
    for node, kind in (("token@1", "token"), (before.nodes["id"].iloc[-1], "target")):
        with pytest.raises(GemmaScopeError, match=rf"'a' has the {kind} .*that are not targets"):
            Supernodes({"a": [feature, node]}).collapse(before)
    with pytest.raises(GemmaScopeError, match=r"'a' has features and errors.*group of each"):
        Supernodes({"a": [feature, error]}).collapse(before)
    some = graph("clean", max_feature_nodes=9)
    is_explained = some.edges.row_of >= 0
    ids = [
        some.nodes["id"][some.where("feature") & mask].iloc[0]
        for mask in (is_explained, ~is_explained)
    ]
    with pytest.raises(GemmaScopeError, match=r"1 nodes that the graph explains and 1 .*None"):
        Supernodes({"a": ids}).collapse(some)
    with pytest.raises(UnknownNameError, match=r"sort of edges 'sum'.*influence, effects"):
        factories.unchecked(collapse)(before, {}, edges="sum")
    after = Supernodes({"a": [feature]}).collapse(before)
    with pytest.raises(GemmaScopeError, match="grouped nodes already"):
        Supernodes({"a": ["token@1"]}).collapse(after)


def test_features_of_a_clt_write_to_all_later_layers() -> None:
    dictionary = clt(factories.tiny_hf("gemma2"))
    before = trace(model(), CLEAN, dictionary).prune()
    places = before.where("feature").nonzero()[0]
    nodes = before.nodes.iloc[places]
    written = []
    for layer, index in zip(nodes["layer"], nodes["index"], strict=True):
        W_dec = dictionary.weights(layer).W_dec[index]
        written.append(unit(W_dec[layer:].sum(0).numpy(force=True)))
    assert len(set(nodes["layer"])) > 1
    got = by_decoder(before, places, dictionary)
    np.testing.assert_allclose(got, np.array(written) @ np.array(written).T, atol=1e-5)


def test_groups_in_a_file_a_frame_and_a_notebook(tmp_path: Path) -> None:
    groups = Supernodes({"a<b": ["x", "y"], "c": ["z"]})
    assert Supernodes.load(groups.save(tmp_path / "groups.json")) == groups
    assert groups.to_frame().to_numpy().tolist() == [["a<b", "x"], ["a<b", "y"], ["c", "z"]]
    assert "a&lt;b" in groups._repr_html_() and "<b " not in groups._repr_html_()
