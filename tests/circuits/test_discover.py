"""Ranking nodes by effect; circuits and scores as tables and figures."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from gemmascope_plugin.causes import FeatureId, edge_attribution
from gemmascope_plugin.circuits import Scores, discover, top_n
from gemmascope_plugin.circuits.circuit_methods import Options
from gemmascope_plugin.circuits.discover import METHODS
from gemmascope_plugin.circuits.scored_methods import graph_of
from gemmascope_plugin.errors import EmptySelectionError, TaskError, UnknownNameError
from gemmascope_plugin.graphs import Graph
from gemmascope_plugin.graphs.node import Node
from tests import factories
from tests.causes.tasks import CLEAN, CORRUPT, TASK, metric_under, values_at
from tests.factories import unchecked

NODES = (Node.head(1, 3), Node.mlp(2), Node.of_feature(FeatureId("blocks.0.hook_resid_post", 7)))
CIRCUIT = top_n(
    Graph.of_nodes(
        NODES, [3.0, -2.0, 0.5], {"task": "t", "metric": "LogitDiff", "method": "exact"}
    ),
    2,
)
SCORES = Scores(
    circuit=CIRCUIT,
    faithfulness=0.8,
    sizes=(0, 1, 2, 3),
    faithfulness_by_size=(0.0, 0.9, 0.8, 1.0),
    random_by_size=((0.0, 0.0), (0.1, 0.3), (0.2, 0.6), (1.0, 1.0)),
    metric_full=4.0,
    metric_empty=1.0,
    metadata={"task": "t", "n_prompts": 5},
)


def drop(model, node: Node) -> float:
    """How far the metric falls when the node alone gets its corrupted value."""
    corrupt = values_at(model, CORRUPT, node.hook)

    def patch(x):
        x = x.clone()
        place = (slice(None), slice(None), node.index) if node.kind == "head" else slice(None)
        x[place] = corrupt[place]
        return x

    return metric_under(model, CLEAN, {}) - metric_under(model, CLEAN, {node.hook: patch})


def test_nodes_are_ranked_by_the_size_of_their_effect(model) -> None:
    circuit = discover(model, TASK)
    assert len(set(circuit.ranking)) == 15
    assert circuit.size == 7
    for node, score in zip(circuit.ranking, circuit.scores, strict=True):
        assert score == pytest.approx(drop(model, node), abs=1e-5)
    sizes = [abs(score) for score in circuit.scores]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("method", ["exact", "atp"])
def test_features_are_ranked_with_the_rest(hooked2, method: str) -> None:
    saes = [factories.residual(hooked2, 0), factories.attention(hooked2, 1)]
    kinds = ("head", "mlp", "feature")
    circuit = discover(hooked2, TASK, nodes=kinds, saes=saes, method=method, size=4)
    assert {node.kind for node in circuit.ranking} == set(kinds)
    assert len(circuit.nodes) == 4
    assert circuit.metadata["method"] == method
    assert {node.layer for node in circuit.ranking if node.kind == "feature"} == {0, 1}


def test_a_kind_named_twice_is_ranked_once(hooked2) -> None:
    assert len(discover(hooked2, TASK, nodes=("mlp", "mlp")).ranking) == 3
    assert len(discover(hooked2, TASK, nodes="mlp").ranking) == 3


def test_what_does_not_exist_is_an_error(hooked2) -> None:
    with pytest.raises(UnknownNameError, match="'heads'.*Did you mean 'head'"):
        discover(hooked2, TASK, nodes=("heads",))
    with pytest.raises(UnknownNameError, match="'exakt'.*Did you mean 'exact'"):
        discover(hooked2, TASK, method="exakt")
    with pytest.raises(EmptySelectionError, match="No node kind is named"):
        discover(hooked2, TASK, nodes=())
    with pytest.raises(EmptySelectionError, match="A circuit of 99 nodes.*15 nodes"):
        discover(hooked2, TASK, size=99)
    with pytest.raises(UnknownNameError, match="needs dictionaries"):
        discover(hooked2, TASK, nodes="feature")


def test_labels_say_where_a_node_is() -> None:
    assert [node.label for node in NODES] == ["L1H3", "MLP2", "blocks.0.hook_resid_post/7"]
    assert [node.layer for node in NODES] == [1, 2, 0]


def test_a_circuit_as_table_figure_and_text() -> None:
    frame = CIRCUIT.to_frame()
    assert list(frame.columns) == ["rank", "node", "kind", "layer", "score", "role", "kept"]
    assert frame["role"].tolist() == ["supports", "opposes", "supports"]
    assert frame["kept"].tolist() == [True, True, False]
    (bars,) = CIRCUIT.plot().data
    assert sorted(bars.x) == [-2.0, 3.0]
    assert repr(CIRCUIT) == "Circuit(t, 2 of 3 nodes by exact, 1 against the metric: +L1H3, -MLP2)"
    assert CIRCUIT.top(1).nodes == NODES[:1]


@pytest.mark.parametrize("size", [-1, 4])
def test_a_circuit_of_more_nodes_than_there_are_is_an_error(size: int) -> None:
    with pytest.raises(EmptySelectionError, match=f"A circuit of {size} nodes"):
        CIRCUIT.top(size)


def test_scores_as_table_figure_and_text() -> None:
    frame = SCORES.to_frame()
    assert frame["size"].tolist() == [0, 1, 2, 3]
    assert frame.loc[1, ["random_mean", "random_min", "random_max"]].tolist() == [0.2, 0.1, 0.3]
    assert len(SCORES.plot().data) >= 2
    assert repr(SCORES) == (
        "Scores(t, 2 of 3 nodes, faithfulness 0.800, best of 2 random 0.600, metric full 4.000, "
        "empty 1.000)"
    )


def test_the_size_from_which_on_a_circuit_is_faithful() -> None:
    """0.9 at size 1 does not count for 0.85: size 2 falls below it again."""
    assert SCORES.smallest(0.75) == 1
    assert SCORES.smallest(0.85) == 3
    assert SCORES.smallest(1.1) is None


@pytest.mark.parametrize(
    "method", ["eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "exact", "acdc"]
)
def test_methods_of_edges(hooked2, method: str) -> None:
    options = {"steps": 2} if "ig" in method else {}
    circuit = discover(hooked2, TASK, method=method, units="edges", **options)
    assert circuit.graph.has_edges and circuit.n_units == 190
    assert circuit.metadata["method"] == method
    assert circuit.size == 19 or method == "acdc"


def test_sizes_bars_and_growth(hooked2) -> None:
    best = discover(hooked2, TASK, method="eap", size=12)
    bar = sorted(map(abs, best.scores), reverse=True)[11]
    assert torch.equal(discover(hooked2, TASK, method="eap", tau=bar).is_kept, best.is_kept)
    grown = discover(hooked2, TASK, method="eap", size=12, select="greedy")
    assert grown.size == 12
    assert torch.equal(grown.pruned().is_kept | grown.is_kept, grown.is_kept)


def test_scores_of_edges_say_how_far_the_metric_falls(hooked2) -> None:
    """The same sign whichever run is patched, and that of nodes."""
    noising = graph_of(edge_attribution(hooked2, TASK, method="eap"))
    denoising = graph_of(edge_attribution(hooked2, TASK, method="eap", direction="denoising"))
    assert float((noising.unit_scores * denoising.unit_scores).sum()) > 0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"method": "eap", "units": "nodes"}, TaskError, "scores edges, not nodes.*exact, atp"),
        ({"method": "atp", "units": "edges"}, TaskError, "scores nodes, not edges.*eap-ig"),
        ({"method": "eap", "units": "edge"}, UnknownNameError, "Unknown units 'edge'"),
        ({"method": "eap", "size": 3, "tau": 0.1}, TaskError, "Both size=3 and tau=0.1"),
        ({"method": "eap", "size": 191}, EmptySelectionError, "191 edges.*190 edges"),
        ({"method": "eapig"}, UnknownNameError, "Unknown method 'eapig'.*'eap-ig'"),
        ({"method": "eap", "nodes": "mlp"}, TaskError, "no part in circuits of edges"),
        ({"method": "acdc", "size": 9}, TaskError, "tau=0.01 sets what ACDC keeps"),
        ({"method": "atp", "select": "greedy"}, TaskError, "select plays no part.*nodes"),
        ({"replacement": "zero"}, TaskError, "replacement plays no part.*'exact'"),
        ({"steps": 3}, TaskError, "steps plays no part in circuits of nodes by 'exact'"),
        ({"method": "eap", "steps": 3}, TaskError, "steps plays no part.*edges by 'eap'"),
        ({"method": "atp", "memory_budget": "1 GB"}, TaskError, "memory_budget plays no part"),
        ({"saes": []}, TaskError, "saes plays no part in circuits of nodes"),
        ({"method": "acdc", "rank": "positive"}, TaskError, "rank plays no part.*'acdc'"),
        ({"method": "atp*", "rank": "negative"}, TaskError, "rank plays no part.*'atp\\*'"),
        ({"rank": "positiv"}, UnknownNameError, "Unknown rank 'positiv'.*'positive'"),
        ({"method": "eap", "select": "greed"}, UnknownNameError, "Unknown selection 'greed'"),
    ],
)
def test_what_discover_refuses(hooked2, options: dict, error, text: str) -> None:
    with pytest.raises(error, match=text):
        unchecked(discover)(hooked2, TASK, **options)


def test_integrated_gradients_of_nodes_take_as_many_steps_as_asked(hooked2) -> None:
    few, many = (discover(hooked2, TASK, method="ig", steps=n).graph.unit_scores for n in (1, 3))
    assert float((few - many).abs().max()) > 1e-3 * float(many.abs().max())


def test_every_method_says_what_it_takes_costs_and_follows() -> None:
    names = {(method.scores, method.name) for method in METHODS}
    assert len(names) == len(METHODS)
    options = {field.name for field in fields(Options)}
    for method in METHODS:
        assert method.paper and method.cost
        assert method.options <= options
    assert {name for scored, name in names if scored == "features"} == {"ig", "atp"}


def test_an_option_says_which_methods_take_it(hooked2) -> None:
    with pytest.raises(TaskError) as caught:
        discover(hooked2, TASK, method="relp", steps=4)
    assert str(caught.value) == (
        "steps plays no part in circuits of nodes by 'relp'. There is: steps in circuits of nodes by "
        "'ig', edges by 'eap-ig' or 'eap-ig-activations', features by 'ig'. Try: without steps="
    )
