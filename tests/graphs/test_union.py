"""The mean of attribution graphs of several prompts, against a loop over entries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gemmascope_plugin.errors import (
    EmptySelectionError,
    GemmaScopeError,
    InputError,
    TaskError,
    UnknownNameError,
)
from gemmascope_plugin.graphs import Graph, contrast, union
from gemmascope_plugin.tracing import supernodes
from tests import factories
from tests.tracing.prompts import assert_close, entries, graph, influence, key, values

SHORT = ["bos", "a", "b", "verb", "c", "d", "end"]
LONG = ["bos", "a", "b", "verb", "extra", "more", "c", "d", "end"]
NAMES = ("clean", "corrupt", "other")


def mean(parts: list[dict[Any, float]]) -> dict[Any, float]:
    keys = {key for part in parts for key in part}
    return {key: sum(part.get(key, 0) for part in parts) / len(parts) for key in keys}


def three() -> list[Graph]:
    return [graph(name) for name in NAMES]


def assert_mean(mean_graph: Graph, graphs: list[Any], names: Any, positions: Any = None) -> None:
    """A graph is the mean of graphs; the positions of all of them have names."""
    expected = [entries(g, n) for g, n in zip(graphs, names, strict=True)]
    assert_close(entries(mean_graph, positions), mean(expected))
    expected = [values(g, n) for g, n in zip(graphs, names, strict=True)]
    assert_close(values(mean_graph, positions), mean(expected))
    keys = [
        {key(row, n) for row in g.nodes.itertuples()} for g, n in zip(graphs, names, strict=True)
    ]
    for row in mean_graph.nodes.itertuples():
        count = sum(key(row, positions) in part for part in keys)
        assert row.count == count and row.share == count / len(graphs)


def test_prompts_of_equal_length() -> None:
    mean_graph = union(three())
    assert_mean(mean_graph, three(), [None] * 3)
    assert len({row.count for row in mean_graph.nodes.itertuples()}) == 3
    assert mean_graph.metadata["residual"] < 1e-6 and mean_graph.metadata["n_graphs"] == 3
    assert mean_graph.tokens[3] == " | ".join(graph(name).tokens[3] for name in NAMES)
    weights = np.mean([g.weights[g.targets] for g in three()], 0)
    np.testing.assert_allclose(mean_graph.weights[mean_graph.targets], weights)


def test_influence_pruning_and_files(tmp_path: Any) -> None:
    mean_graph = union(three())
    np.testing.assert_allclose(mean_graph.influence, influence(mean_graph), atol=1e-6)
    pruned = mean_graph.prune()
    assert 0 < len(pruned) < len(mean_graph) and "share" in pruned.nodes
    again = Graph.load(mean_graph.save(tmp_path / "a"))
    assert again.nodes.equals(mean_graph.nodes) and again.metadata["positions"] == tuple("0123456")


def test_from_the_end() -> None:
    graphs = [graph("clean"), graph("long")]
    mean_graph = union(graphs, align="end")
    names = [[str(i - n) for i in range(n)] for n in (7, 9)]
    assert_mean(mean_graph, graphs, names, names[1])
    assert mean_graph.metadata["positions"] == tuple(names[1]) and len(mean_graph.tokens) == 9
    # a target is read at the last token of both
    assert set(mean_graph.nodes["count"][mean_graph.where("target")]) == {2}
    assert f"token@{-9}" in set(mean_graph.nodes["id"])


def test_labels() -> None:
    graphs = [graph("clean"), graph("long")]
    mean_graph = union(graphs, labels=[SHORT, LONG])
    assert set(mean_graph.metadata["positions"]) == set(LONG)
    assert_mean(mean_graph, graphs, [SHORT, LONG], mean_graph.tokens)
    assert mean_graph.tokens == mean_graph.metadata["positions"]
    order = [mean_graph.tokens.index(name) for name in ("bos", "verb", "extra", "more", "end")]
    assert order == sorted(order)
    words = graph("clean").tokens[3], graph("long").tokens[3]
    assert words[0] == words[1]
    assert mean_graph.nodes["label"][mean_graph.find("token@verb")] == f"verb: {words[0]}"
    assert mean_graph.metadata["residual"] < 1e-6


def test_the_mean_of_contrasts_is_the_contrast_of_means() -> None:
    pairs = [("clean", "corrupt"), ("other", "clean")]
    of_contrasts = union(contrast(graph(a), graph(b)) for a, b in pairs)
    of_means = contrast(*(union(graph(pair[side]) for pair in pairs) for side in (0, 1)))
    assert_close(entries(of_contrasts), entries(of_means))
    assert list(of_contrasts.nodes["id"]) == list(of_means.nodes["id"])
    for column in ("activation", "activation_clean", "activation_corrupt"):
        np.testing.assert_allclose(of_contrasts.nodes[column], of_means.nodes[column], atol=1e-6)
    assert of_contrasts.metadata["residual"] < 1e-6 and of_means.metadata["residual"] < 1e-6


def test_an_iterator_is_read_one_graph_at_a_time() -> None:
    asked: list[str] = []

    def read() -> Iterator[Graph]:
        for name in NAMES:
            asked.append(name)
            yield graph(name)

    def labels() -> Iterator[list[str]]:
        for number in range(3):
            assert len(asked) == number + 1
            yield SHORT

    assert union(read(), labels=labels()).metadata["n_graphs"] == 3


def test_rare_nodes_are_left_out() -> None:
    whole, mean_graph = union(three()), union(three(), min_share=0.6)
    keys = {key(row) for row in mean_graph.nodes.itertuples()}
    rare = (whole.nodes["share"] < 0.6) & whole.nodes["kind"].isin(["feature", "error"])
    assert set(mean_graph.nodes["id"]) == set(whole.nodes["id"][~rare]) and rare.any()
    expected = {k: v for k, v in entries(whole).items() if keys.issuperset(k)}
    assert_close(entries(mean_graph), expected)
    assert math.isnan(mean_graph.metadata["residual"])
    with pytest.raises(GemmaScopeError, match="pruned or lacks rare nodes"):
        contrast(mean_graph, mean_graph)


def test_unexplained_nodes_count_as_nothing_in_sums() -> None:
    graphs = [graph("clean"), graph("corrupt", max_feature_nodes=9)]
    mean_graph = union(graphs)
    assert mean_graph.metadata["residual"] < 1e-6
    both = mean_graph.where("feature") & (mean_graph.nodes["count"] == 2).to_numpy()
    assert set(mean_graph.nodes["explained"][both]) == {1, 2}


def test_pruned_graphs() -> None:
    graphs = [g.prune() for g in three()]
    mean_graph = union(graphs)
    assert_mean(mean_graph, graphs, [None] * 3)
    assert math.isnan(mean_graph.metadata["residual"]) and "influence" not in mean_graph.nodes
    assert mean_graph.metadata["node_threshold"] == 0.8


def test_targets_in_order() -> None:
    graphs = [graph("clean", (7,)), graph("corrupt", (8,))]
    mean_graph = union(graphs, targets="order")
    row = mean_graph.nodes[mean_graph.where("target")].iloc[0]
    assert row["label"] == "w7 | w8" and mean_graph.where("target").sum() == 1
    expected = np.mean([g.nodes["activation"].iloc[-1] for g in graphs])
    assert row["activation"] == pytest.approx(expected)
    by_label = union(graphs)
    assert list(by_label.nodes["count"][by_label.where("target")]) == [1, 1]


def test_mistakes() -> None:
    clean, long = graph("clean"), graph("long")
    with pytest.raises(EmptySelectionError, match=r"No graph was given.*\[trace"):
        union([])
    with pytest.raises(InputError, match=r"single graph. Try: union\(\[graph, other\]\)"):
        factories.unchecked(union)(clean)
    with pytest.raises(TaskError, match=r"Graph 1 has 9 tokens, the first graph 7.*align=\"end\""):
        union([clean, long])
    with pytest.raises(UnknownNameError, match=r"alignment 'ends'.*position, end.*'end'"):
        factories.unchecked(union)([clean], align="ends")
    with pytest.raises(TaskError, match="both align"):
        union([clean], align="end", labels=[SHORT])
    with pytest.raises(TaskError, match="Graph 1 has 9 tokens and 7 labels"):
        union([clean, long], labels=[SHORT, SHORT])
    with pytest.raises(TaskError, match=r"has the label 'a' 2 times.*'a 1', 'a 2'"):
        union([clean], labels=[["bos", "a", "a", "b", "c", "d", "e"]])
    with pytest.raises(TaskError, match="has the labels 'bos a b"):
        union([clean], labels=["bos a b"])
    with pytest.raises(TaskError, match="There are labels number 1 without graph"):
        union([clean], labels=[SHORT, SHORT])
    with pytest.raises(TaskError, match=r"There are graph number 0 without labels"):
        union([clean], labels=[])
    with pytest.raises(UnknownNameError, match=r"min_share=2.0 is not a share.*from 0 to 1"):
        union([clean], min_share=2.0)
    with pytest.raises(TaskError, match=r"Graph 1 has the columns.*contrasts only"):
        union([clean, contrast(clean, clean)])
    with pytest.raises(TaskError, match="names"):
        union([clean, union([clean], labels=[SHORT])])
    with pytest.raises(GemmaScopeError, match="Graph 0 has grouped nodes"):
        union([supernodes(clean).collapse(clean)])
    only = union([graph("clean"), graph("other")], labels=[SHORT, [f"{n}'" for n in SHORT]])
    assert only.where("token").sum() == 14
    with pytest.raises(EmptySelectionError, match=r"min_share=0.9 leaves no.*up to 0.50"):
        union(
            [graph("clean"), graph("other")],
            labels=[SHORT, [f"{n}'" for n in SHORT]],
            min_share=0.9,
        )
