"""Circuits of features as users ask for them: options, labels, files, figures, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.causes import Task, kl_divergence, logit_diff
from gemmascope_plugin.circuits import (
    discover,
    discover_levels,
    evaluate,
    greedy,
    stability,
)
from gemmascope_plugin.errors import (
    EmptySelectionError,
    GemmaScopeError,
    InputError,
    MissingHookError,
    ModelError,
    TaskError,
    UnknownNameError,
    WidthMismatchError,
)
from gemmascope_plugin.graphs import Circuit
from gemmascope_plugin.graphs.node import Node
from gemmascope_plugin.splice import HookedSAE, splice
from tests import factories
from tests.causes.tasks import CLEAN, CORRUPT, TASK
from tests.circuits.feature_slow import dictionaries
from tests.factories import unchecked
from tests.graphs.graphs import equal
from tests.splice.test_tree_splice import tree

FAST = {"nodes": "features", "method": "atp"}


@pytest.fixture(scope="module")
def circuit(hooked2) -> Circuit:
    return discover(hooked2, TASK, saes=dictionaries(hooked2), size=12, **FAST)


def test_a_circuit_of_features_says_what_it_is(circuit, hooked2) -> None:
    assert (circuit.size, circuit.graph.unit) == (12, "node")
    assert circuit.graph.has_edges and not circuit.graph.ranks_edges
    meta = circuit.metadata
    assert meta["sites"]["blocks.1.attn.hook_z"] == ("feature", factories.D_SAE)
    assert meta["exclude"] == ("bos", "eos", "pad") and meta["per_position"] is False
    assert meta["metric_clean"] != meta["metric_corrupt"]
    sizes = [abs(score) for score in circuit.scores]
    assert sizes == sorted(sizes, reverse=True)
    assert len(circuit.nodes) == 12
    ends = {node for u, d in circuit.edges for node in (u, d.node)}
    assert ends <= set(circuit.nodes)
    # by size, whatever the sign; a smaller circuit has the edges between its nodes
    weights = circuit.edges_to_frame()["score"].abs().tolist()
    assert weights == sorted(weights, reverse=True)
    small = circuit.top(6)
    assert set(small.edges) < set(circuit.edges)
    everything = discover(hooked2, TASK, saes=dictionaries(hooked2), tau=0.0, edges=False, **FAST)
    assert everything.size == everything.n_units == circuit.n_units


def test_labels_of_errors_and_positions(hooked2) -> None:
    options = {"saes": dictionaries(hooked2)[:1], "per_position": True, "edges": False}
    placed = discover(hooked2, TASK, **options, **FAST)
    labels = [node.label for node in placed.graph.components]
    assert labels[-1] == "blocks.0.hook_resid_post/error@7"
    assert all(f"@{node.pos}" in node.label for node in placed.graph.components)
    assert list(placed.to_frame(1).columns) == [
        "rank",
        "node",
        "kind",
        "layer",
        "pos",
        "score",
        "role",
        "kept",
    ]
    assert Node.error("blocks.0.hook_resid_post").layer == 0


def test_what_features_mean(circuit, hooked2) -> None:
    node = next(node for node in circuit.nodes if node.kind == "feature")
    for labels in (
        {node.site: {node.index: "a <concept>"}},
        {node: "a <concept>"},
        lambda each: "a <concept>" if each == node else None,
    ):
        named = circuit.with_labels(labels)
        frame = named.to_frame(12)
        assert frame.loc[frame["node"] == node.label, "meaning"].tolist() == ["a <concept>"]
        assert (frame["meaning"] != "").sum() == 1
        assert "meaning" not in circuit.to_frame(1)
        assert {"source_meaning", "target_meaning"} <= set(named.edges_to_frame())
        assert f"{node.label} (a <concept>)" in repr(named.top(12))
        assert "<concept>" not in named._repr_html_()
        assert named.to_networkx().nodes[node]["meaning"] == "a <concept>"
    again = named.with_labels({node: "another"})
    assert again.graph.meanings == {node: "another"}
    named = discover(
        hooked2, TASK, saes=dictionaries(hooked2), labels={node: "x"}, edges=False, **FAST
    )
    assert named.graph.meanings == {node: "x"}


def test_a_circuit_of_features_in_a_file(circuit, tmp_path: Path, hooked2) -> None:
    node = circuit.nodes[0]
    named = circuit.with_labels({node: "größer"})
    loaded = Circuit.load(named.save(tmp_path / "one"))
    assert equal(loaded, named) and loaded.graph.unit == "node"
    assert loaded.graph.meanings == {node: "größer"} and loaded.edges == named.edges
    options = {"saes": dictionaries(hooked2)[:1], "per_position": True, "size": 9}
    placed = discover(hooked2, TASK, **options, **FAST)
    assert equal(Circuit.load(placed.save(tmp_path / "two")), placed)


def test_a_circuit_of_features_as_figure_and_in_networkx(circuit) -> None:
    named = circuit.with_labels({circuit.nodes[0]: "<b>"})
    figure = named.plot()
    drawn = [trace for trace in figure.data if trace.mode == "markers+text"]
    assert sum(len(trace.x) for trace in drawn) == circuit.size
    assert "<b>" not in figure.to_json()
    assert "12 of" in figure.layout.title.text
    graph = circuit.to_networkx()
    assert isinstance(graph, nx.MultiDiGraph)
    assert graph.number_of_nodes() == 12 and graph.number_of_edges() == len(circuit.edges)
    assert nx.is_directed_acyclic_graph(graph)
    for _, data in graph.nodes(data=True):
        assert isinstance(data["score"], float)


def test_a_graph_of_nodes_with_edges_grows_no_circuit_of_edges(circuit) -> None:
    with pytest.raises(GemmaScopeError, match="Greedy circuits need edges.*ranks nodes"):
        greedy(circuit.graph, 3)
    with pytest.raises(GemmaScopeError, match="Dead ends need edges.*ranks nodes"):
        circuit.pruned()


def test_levels_of_nested_dictionaries() -> None:
    suite = gs.tiny()
    saes = [suite.load("matryoshka", layer) for layer in (1, 2)]
    task = suite.task("agreement", n=2)
    options = {"saes": saes, "method": "atp", "edges": False}
    levels = discover_levels(suite.model, task, levels=(0, -1), **options)
    coarse, fine = levels[0], levels[-1]
    assert {size for _, size in coarse.metadata["sites"].values()} == {64}
    assert {size for _, size in fine.metadata["sites"].values()} == {512}
    assert max(node.index for node in coarse.graph.components) < 64
    assert coarse.n_units < fine.n_units
    evaluation = {"saes": saes, "n_random": 0, "sizes": []}
    assert 0 < evaluate(suite.model, coarse, task, **evaluation).metadata["n_prompts"] == 2
    with pytest.raises(EmptySelectionError, match="No level is named"):
        discover_levels(suite.model, task, levels=(), **options)
    with pytest.raises(UnknownNameError, match="has no level 3.*level 0: 64 features"):
        discover(suite.model, task, nodes="features", saes=saes, level=3)


def test_the_same_task_in_several_dictionaries(hooked2) -> None:
    first, second = (factories.residual(hooked2, 1, seed=seed) for seed in (1, 2))
    frame = stability(
        hooked2, TASK, TASK, sets={"a": [first], "b": [first], "c": [second]}, n=10, method="atp"
    )
    assert frame.loc["a", "overlap b"] == 1 and frame.loc["b", "overlap a"] == 1
    assert 0 <= frame.loc["a", "overlap c"] < 0.5
    assert frame.loc["a", "faithfulness"] == frame.loc["b", "faithfulness"]
    assert frame.loc["c", "features"] == factories.D_SAE
    loose = {"cosine": -1.0, "at_least": -1e9, "sizes": (5, 10), "n": 10, "method": "atp"}
    frame = stability(hooked2, TASK, TASK, sets={"a": [first], "c": [second]}, **loose)
    assert frame.loc["a", "overlap c"] == 1 and frame.loc["a", "size"] == 5
    with pytest.raises(EmptySelectionError, match="There are 1 sets of dictionaries to compare"):
        stability(hooked2, TASK, TASK, sets={"a": [first]})


# ------------------------------------------------------------------------------------------ bad input
def silent(model: Any) -> Any:
    """A dictionary of which nothing is ever active."""
    sae = copy.deepcopy(factories.residual(model, 0))
    sae.threshold.data.fill_(1e6)
    return sae


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"saes": None}, UnknownNameError, "need dictionaries.*saes=\\[gemmascope_plugin.load"),
        ({"saes": []}, UnknownNameError, "No dictionary was given"),
        ({"saes": ["res"]}, InputError, "'res' is not a loaded dictionary"),
        ({"method": "igg"}, UnknownNameError, "Unknown method 'igg'.*ig, atp.*Did you mean 'ig'"),
        ({"method": "exact"}, UnknownNameError, "Unknown method 'exact'"),
        ({"size": 9999}, EmptySelectionError, "A circuit of 9999 nodes.*There is: \\d+ nodes"),
        ({"size": 3, "tau": 0.1}, TaskError, "Both size=3 and tau=0.1"),
        ({"tau": -1.0}, EmptySelectionError, "The threshold is -1"),
        ({"level": 0}, UnknownNameError, "has no levels, so there is no level 0"),
        ({"nodes": ("features", "kv")}, UnknownNameError, "beside 'features' 'kv'.*head, mlp"),
        ({"units": "edges"}, TaskError, "units plays no part in circuits of features"),
        ({"select": "greedy"}, TaskError, "select plays no part in circuits of features"),
        ({"replacement": "zero"}, TaskError, "replacement plays no part.*features"),
        ({"per_pos": True}, TypeError, "unexpected keyword argument 'per_pos'"),
        ({"memory_budget": 1000}, GemmaScopeError, "The memory budget of .* is too small"),
    ],
)
def test_what_is_refused(hooked2, options: dict, error, text: str) -> None:
    arguments = {"nodes": "features", "saes": [factories.residual(hooked2, 0)], **options}
    with pytest.raises(error, match=text):
        unchecked(discover)(hooked2, TASK, **arguments)


@pytest.mark.parametrize("option", ["steps", "max_rows", "size"])
def test_counts_begin_at_one(hooked2, option: str) -> None:
    saes = [factories.residual(hooked2, 0)]
    with pytest.raises(InputError, match=f"{option}=0 is out of range.*from 1"):
        discover(hooked2, TASK, nodes="features", saes=saes, **{option: 0})


def test_dictionaries_that_do_not_fit(hooked2) -> None:
    def refused(error, text: str, *saes: Any) -> None:
        with pytest.raises(error, match=text):
            discover(hooked2, TASK, nodes="features", saes=list(saes))

    residual = factories.residual(hooked2, 0)
    refused(UnknownNameError, "Two dictionaries take the same tensor apart", residual, residual)
    before = copy.deepcopy(residual)
    before.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    refused(UnknownNameError, "Two dictionaries take the same tensor apart", residual, before)
    wide = factories.random_sae(48, 8, "blocks.0.hook_resid_post")
    refused(WidthMismatchError, "has width 48.*this one says tiny", wide)
    absent = factories.random_sae(32, 8, "blocks.9.hook_resid_post")
    refused(MissingHookError, "no hook 'blocks.9.hook_resid_post'", absent)
    middle = factories.random_sae(32, 8, "blocks.0.hook_resid_mid")
    refused(ModelError, "hook_resid_mid cannot be part.*hook_resid_post", middle)
    refused(ModelError, r"restricted to positions=\[1\]", HookedSAE(residual, positions=[1]))
    refused(EmptySelectionError, "No feature of 1 sites is active on any of 2", silent(hooked2))


def test_a_model_with_hooks_of_its_own(hooked2) -> None:
    saes = [factories.residual(hooked2, 0)]
    with (
        splice(hooked2, saes),
        pytest.raises(GemmaScopeError, match="has hooks attached.*leave the splice block"),
    ):
        discover(hooked2, TASK, nodes="features", saes=saes)


def test_metrics_without_slopes(hooked2) -> None:
    saes = [factories.residual(hooked2, 0)]
    divergence = Task(CLEAN, CORRUPT, kl_divergence())
    with pytest.raises(TaskError, match='zero on the clean run, where atp takes it.*method="ig"'):
        discover(hooked2, divergence, saes=saes, **FAST)
    rank = Task(CLEAN, CORRUPT, lambda logits, prompts: logits.argsort(-1)[:, 10].float())
    for method in ("ig", "atp"):
        with pytest.raises(TaskError, match="has no gradient with respect to the logits"):
            discover(hooked2, rank, nodes="features", saes=saes, method=method)


def test_positions_need_prompts_of_one_length(hooked2) -> None:
    saes = [factories.residual(hooked2, 0)]
    mask = torch.ones_like(CLEAN, dtype=torch.bool)
    mask[0, -1] = False
    uneven = Task(CLEAN, CORRUPT, logit_diff([1, 2], [3, 4]), mask=mask)
    with pytest.raises(TaskError, match="2 different lengths, 7 to 8 tokens.*per_position=False"):
        discover(hooked2, uneven, saes=saes, per_position=True, **FAST)
    placed = discover(hooked2, TASK, saes=saes, per_position=True, **FAST)
    with pytest.raises(TaskError, match="in prompts of 8 tokens, and these have 7 or 8"):
        evaluate(hooked2, placed, uneven, saes=saes)


def test_evaluation_with_the_wrong_dictionaries(circuit, hooked2) -> None:
    saes = dictionaries(hooked2)
    with pytest.raises(UnknownNameError, match=r"has features.*saes=\[the same dictionaries\]"):
        evaluate(hooked2, circuit, TASK)
    with pytest.raises(
        UnknownNameError, match="not those of the circuit.*at blocks.0.hook_resid_post"
    ):
        evaluate(hooked2, circuit, TASK, saes=saes[1:])
    other = [factories.residual(hooked2, 0, seed=1, d_sae=64), *saes[1:]]
    with pytest.raises(WidthMismatchError, match="has 64 features, the circuit's has 96"):
        evaluate(hooked2, circuit, TASK, saes=other)
    with pytest.raises(UnknownNameError, match="Unknown treatment of errors 'keep'.*kept"):
        unchecked(evaluate)(hooked2, circuit, TASK, saes=saes, errors="keep")
    plain = discover(hooked2, TASK, nodes="mlp", method="atp")
    with pytest.raises(TaskError, match="errors='kept' plays no part"):
        evaluate(hooked2, plain, TASK, errors="kept")
    taken = "per_position in circuits of features by 'ig' or 'atp'.*nodes=\"features\", or without"
    with pytest.raises(TaskError, match=f"per_position plays no part.*nodes by 'exact'.*{taken}"):
        discover(hooked2, TASK, nodes="mlp", per_position=True)


def test_trees_are_dictionaries_too(hooked2) -> None:
    """Features in units of each token, encoders that gate one another: still an exact circuit."""
    sae = tree()
    saes = [sae, factories.attention(hooked2, 2)]
    circuit = discover(hooked2, TASK, nodes="features", saes=saes, size=30)
    assert circuit.metadata["residual_max"] < 0.05
    options = {"saes": saes, "n_random": 0, "sizes": []}
    whole = evaluate(hooked2, circuit.top(circuit.n_units), TASK, **options)
    assert whole.faithfulness == pytest.approx(1, abs=1e-4)
    edges = circuit.edges_to_frame()
    assert {"blocks.1.hook_resid_post", "blocks.2.attn.hook_z"} == {
        end.split("/")[0] for side in ("source", "target") for end in edges[side]
    }
