"""Clean minus corrupted attribution graph, against a loop over entries."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from gemmascope_plugin.errors import GemmaScopeError, TaskError, UnknownNameError
from gemmascope_plugin.graphs import Graph, contrast
from gemmascope_plugin.tracing import supernodes, trace
from tests import factories
from tests.tracing.prompts import (
    CLEAN,
    CORRUPT,
    assert_close,
    dictionaries,
    entries,
    graph,
    influence,
    key,
    model,
    values,
)


@pytest.fixture(scope="module")
def difference() -> Graph:
    return contrast(graph("clean"), graph("corrupt"))


def test_edges_and_activations_are_differences(difference: Graph) -> None:
    clean, corrupt = entries(graph("clean")), entries(graph("corrupt"))
    expected = {k: clean.get(k, 0) - corrupt.get(k, 0) for k in {*clean, *corrupt}}
    assert_close(entries(difference), expected)
    clean, corrupt = values(graph("clean")), values(graph("corrupt"))
    assert set(clean) - set(corrupt) and set(corrupt) - set(clean), (
        "each has features that the other lacks"
    )
    assert_close(
        values(difference), {k: clean.get(k, 0) - corrupt.get(k, 0) for k in {*clean, *corrupt}}
    )
    for row in difference.nodes[difference.where("feature")].itertuples():
        assert row.activation_clean == clean.get(key(row), 0)
        assert row.activation_corrupt == corrupt.get(key(row), 0)


def test_every_node_is_there_once(difference: Graph) -> None:
    keys = [key(row) for row in difference.nodes.itertuples()]
    both = {key(row) for g in ("clean", "corrupt") for row in graph(g).nodes.itertuples()}
    assert len(keys) == len(set(keys)) and set(keys) == both


def test_rows_sum_to_the_difference_of_pre_activations(difference: Graph) -> None:
    sums = difference.adjacency.sum(1)[difference.edges.nodes]
    expected = difference.nodes["activation"].to_numpy()[difference.edges.nodes]
    scale = difference.nodes[["activation_clean", "activation_corrupt"]].abs().max().max()
    gap = np.abs(sums - expected).max() / scale
    assert gap < 1e-5 and difference.metadata["residual"] == pytest.approx(gap, rel=1e-6)
    assert set(np.flatnonzero(difference.where("target"))) <= set(difference.edges.nodes)


def test_influence_and_pruning(difference: Graph) -> None:
    np.testing.assert_array_equal(
        difference.weights[difference.targets], graph("clean").weights[graph("clean").targets]
    )
    np.testing.assert_allclose(difference.influence, influence(difference), atol=1e-6)
    pruned = difference.prune()
    assert 0 < len(pruned) < len(difference) and "activation_clean" in pruned.nodes
    assert 0 <= difference.scores.replacement <= 1


def test_words_of_both_prompts(difference: Graph) -> None:
    words = graph("clean").tokens[3], graph("corrupt").tokens[3]
    assert difference.tokens[3] == " | ".join(words)
    assert difference.nodes["label"][difference.find("token@3")] == " | ".join(words)
    assert difference.tokens[2] == graph("clean").tokens[2]
    assert difference.metadata["prompt"] == graph("clean").metadata["prompt"]
    assert difference.metadata["corrupt_prompt"] == graph("corrupt").metadata["prompt"]
    assert difference.to_json("a")["metadata"]["prompt_tokens"] == list(difference.tokens)


def test_the_same_prompt_twice_leaves_nothing() -> None:
    difference = contrast(graph("clean"), graph("clean"))
    assert difference.n_edges == 0 and difference.metadata["residual"] == 0


def test_targets_in_order() -> None:
    clean, corrupt = graph("clean", (7, (9, 10))), graph("corrupt", (8, (10, 9)))
    difference = contrast(clean, corrupt, targets="order")
    targets = difference.nodes[difference.where("target")]
    ends = [g.nodes[g.where("target")] for g in (clean, corrupt)]
    assert list(targets["label"]) == [
        f"{a} | {b}" for a, b in zip(*(e["label"] for e in ends), strict=True)
    ]
    expected = ends[0]["activation"].to_numpy() - ends[1]["activation"].to_numpy()
    np.testing.assert_allclose(targets["activation"], expected)


def test_rows_that_one_graph_alone_explains_are_left_out() -> None:
    some = graph("corrupt", max_feature_nodes=9)
    difference = contrast(graph("clean"), some)
    ids = set(difference.nodes["id"].iloc[difference.edges.nodes])
    unexplained = some.where("feature") & (some.edges.row_of < 0)
    missing = set(some.nodes["id"][unexplained])
    assert not ids & missing
    clean = set(graph("clean").nodes["id"])
    assert difference.metadata["rows_left_out"] == len(missing & clean) > 0
    assert difference.metadata["residual"] < 1e-5


def test_a_graph_that_lost_effects_has_no_residual() -> None:
    difference = contrast(graph("clean", min_share=0.01), graph("corrupt"))
    assert math.isnan(difference.metadata["residual"])


def test_a_target_of_the_corrupted_graph_alone_is_left_out() -> None:
    difference = contrast(graph("clean", (7,)), graph("corrupt"))
    assert list(difference.nodes["label"][difference.where("target")]) == ["w7"]


def test_prompts_that_do_not_match() -> None:
    with pytest.raises(TaskError, match=r"have 7 and 9 tokens.*Try: prompts of equal length"):
        contrast(graph("clean"), graph("long"))
    with pytest.raises(
        TaskError,
        match=r"lacks 2 of the clean graph's 3 targets: w8, w9 - w10.*There is: targets w7",
    ):
        contrast(graph("clean"), graph("corrupt", (7,)))
    with pytest.raises(TaskError, match=r"lacks 1 .*Did you mean 'w8'.*targets=\"order\""):
        contrast(graph("clean", (88,)), graph("corrupt", (8,)))
    with pytest.raises(UnknownNameError, match=r"way to match targets 'lable'.*'label'"):
        factories.unchecked(contrast)(graph("clean"), graph("corrupt"), targets="lable")


def test_graphs_that_do_not_match() -> None:
    clean, corrupt = graph("clean"), graph("corrupt")
    saes = [*dictionaries()[:2], factories.transcoder(model(), 2, seed=9), *dictionaries()[3:]]
    other = trace(model(), CORRUPT, saes, targets=[7])
    with pytest.raises(
        TaskError, match=r"other dictionaries.*at blocks.2.hook_mlp_out.*same transcoders"
    ):
        contrast(clean, other)
    fewer = trace(model(), CLEAN, dictionaries()[:3], targets=[7])
    with pytest.raises(TaskError, match=r"at blocks.1.hook_resid_post none and not .*features"):
        contrast(clean, fewer)
    with pytest.raises(TaskError, match="The corrupted graph is of the model 'b'"):
        contrast(clean, replace(corrupt, metadata={**corrupt.metadata, "model": "b"}))
    with pytest.raises(GemmaScopeError, match=r"pruned.*contrast\(trace\(...\), trace\(...\)\)"):
        contrast(clean.prune(), corrupt)
    with pytest.raises(TaskError, match="has the columns"):
        contrast(clean, contrast(clean, corrupt))
    twice = contrast(clean, corrupt)
    with pytest.raises(GemmaScopeError, match="is a contrast itself"):
        contrast(twice, twice)
    grouped = supernodes(clean).collapse(clean)
    with pytest.raises(GemmaScopeError, match=r"grouped nodes.*before collapse"):
        contrast(clean, grouped)
