"""Traces as users make them: targets, selection, tables, pruning, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.errors import (
    EmptySelectionError,
    FeatureIndexError,
    GemmaScopeError,
    MissingHookError,
    ModelError,
    TaskError,
    UnknownNameError,
    WidthMismatchError,
)
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.tracing.linear.targets import as_target
from tests import factories
from tests.factories import unchecked
from tests.support.real_like import PROMPT, real_like, real_like_transcoders, vocabulary
from tests.tiny_models import random_tokens

TOKENS = random_tokens(batch_size=1, length=20, seed=5)
SITE = "blocks.2.hook_mlp_out"


def transcoders(model: Any) -> list[Any]:
    return [factories.transcoder(model, layer, seed=layer) for layer in range(3)]


def traced(model: Any, **options: Any) -> Graph:
    return gs.trace(model, TOKENS, transcoders(model), exclude=("bos",), **options)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return traced(factories.tiny_model("gemma2", "hooked"))


def active(graph: Graph, site: str = SITE) -> tuple[int, int]:
    """An active feature of a site, and where."""
    row = graph.nodes[(graph.nodes["site"] == site) & graph.where("feature")].iloc[0]
    return int(row["index"]), int(row["pos"])


def test_residual_and_metadata(graph: Graph) -> None:
    assert graph.metadata["residual"] < 1e-6
    assert graph.metadata["logits"] == "before the final soft-cap"
    assert graph.metadata["token_ids"] == tuple(TOKENS[0].tolist())


def test_default_targets_are_the_likeliest_tokens(graph: Graph, hooked2: Any) -> None:
    chances = hooked2(TOKENS)[0, -1].float().softmax(-1)
    best = chances.topk(10)
    rows = graph.nodes[graph.where("target")]
    assert rows["index"].tolist() == best.indices.tolist()
    np.testing.assert_allclose(rows["weight"], best.values.numpy(), rtol=1e-4)


def test_words_pairs_and_features_as_targets(hooked2: Any, graph: Graph) -> None:
    feature, pos = active(graph)
    vector = torch.ones(hooked2.cfg.d_model)
    targets = [
        "w9",
        ("w9", "w10"),
        gs.tracing.Logit(11, position=4),
        gs.tracing.StreamDirection(vector, layer=0, position=7, name="probe"),
        gs.tracing.FeatureTarget(SITE, feature, pos),
    ]
    graph = traced(hooked2, targets=targets)
    rows = graph.nodes[graph.where("target")]
    assert rows["label"].tolist() == ["w9", "w9 - w10", "w11", "probe"]
    assert rows["pos"].tolist() == [19, 19, 4, 7]
    assert graph.weights.sum() == pytest.approx(1.0)
    assert graph.nodes["id"][graph.targets[0]] == f"{SITE}/{feature}@{pos}"
    assert graph.metadata["residual"] < 1e-6
    reaching = graph.sources_of(rows.index[3])
    assert (reaching["layer"] <= 0).all() and (reaching["pos"] <= 7).all()


def test_logit_differences_are_those_of_logits(hooked2: Any) -> None:
    graph = traced(hooked2, targets=[("w9", "w10")])
    end = {}

    def keep(x: torch.Tensor, hook: Any) -> None:
        end["x"] = x

    with torch.no_grad(), hooked2.hooks(fwd_hooks=[("unembed.hook_in", keep)]):
        hooked2(TOKENS)
    expected = end["x"][0, -1] @ (hooked2.W_U[:, 9] - hooked2.W_U[:, 10])
    assert graph.nodes["activation"].iloc[-1] == pytest.approx(float(expected), rel=1e-5)


def test_pruning_is_monotone_and_leaves_no_dead_ends(graph: Graph) -> None:
    small, large = graph.prune(0.5, 0.9), graph.prune(0.9, 0.99)
    assert set(small.nodes["id"]) < set(large.nodes["id"]) < set(graph.nodes["id"])
    assert not small.where("bias").any()
    dense = small.adjacency.toarray() != 0
    features = small.where("feature")
    assert dense[features].any(1).all() and dense[:, features | small.where("error")].any(0).all()
    assert small.where("token").sum() == TOKENS.shape[1]
    shares = small.nodes["influence"].to_numpy()
    assert shares.min() > 0 and shares.max() <= 1 + 1e-9


def test_tables(graph: Graph) -> None:
    edges = graph.edge_frame(5)
    assert list(edges.columns) == ["source", "target", "weight"]
    assert edges["weight"].abs().is_monotonic_decreasing
    dense = graph.adjacency
    first = edges.iloc[0]
    at = graph.find(first["target"]), graph.find(first["source"])
    assert dense[at[0], at[1]] == pytest.approx(first["weight"])
    assert "Graph(" in repr(graph) and "20 tokens" in repr(graph)
    assert "most influential" in graph._repr_html_()


def test_labels(graph: Graph) -> None:
    feature, _ = active(graph)
    named = graph.with_labels({(SITE, feature): "plural"})
    rows = named.nodes[(named.nodes["site"] == SITE) & (named.nodes["index"] == feature)]
    assert (rows["label"] == "plural").all()
    assert named.nodes["id"].equals(graph.nodes["id"])


def test_labels_in_every_form(graph: Graph) -> None:
    feature, _ = active(graph)
    node = next(node for node in graph.components if (node.site, node.index) == (SITE, feature))
    forms: list[Any] = [
        {SITE: {feature: "plural"}},
        {(SITE, feature): "plural"},
        {node: "plural"},
        lambda each: "plural" if each == node else None,
    ]
    for labels in forms:
        named = graph.with_labels(labels)
        assert named.columns["label"][graph.components.index(node)] == "plural"
        assert "meaning" not in named.columns
    first = graph.components[0]
    assert graph.with_labels({first: "begin"}).columns["label"][0] == "begin"


def test_no_two_nodes_are_equal(graph: Graph) -> None:
    assert len(set(graph.components)) == len(graph)
    by_kind = {node.kind: node for node in graph.components}
    assert by_kind["bias"].label.startswith("bias:b_dec_of") or "special" in by_kind["bias"].label
    assert by_kind["target"].label == graph.nodes["id"].iloc[-1]
    assert by_kind["token"].label == "token@19"


def test_scores_are_shares(graph: Graph) -> None:
    assert 0 < graph.scores.replacement < 1
    assert 0 < graph.scores.completeness < 1


def test_same_numbers_on_both_classes(graph: Graph) -> None:
    other = traced(factories.tiny_model("gemma2", "bridge"))
    assert other.nodes["id"].tolist() == graph.nodes["id"].tolist()
    scale = np.abs(graph.edges.matrix.data).max()
    gap = np.abs((other.edges.matrix - graph.edges.matrix).toarray()).max()
    assert gap < 5e-6 * scale


REFUSED = [
    ({"targets": []}, TaskError, "No target was given"),
    ({"targets": ["w9", 9]}, TaskError, "given twice"),
    ({"targets": [("w9", "w9")]}, TaskError, "itself is zero"),
    ({"targets": [gs.tracing.Logit("w9", 20)]}, TaskError, "outside the prompt of 20 tokens"),
    ({"targets": [gs.tracing.Logit(999)]}, UnknownNameError, "Token id 999 does not exist"),
    ({"targets": ["zebra"]}, UnknownNameError, "not a single token"),
    (
        {"targets": [gs.tracing.FeatureTarget("blocks.2.mlp_out", 1, 3)]},
        UnknownNameError,
        "No dictionary stands at",
    ),
    (
        {"targets": [gs.tracing.FeatureTarget(SITE, 95, 0)]},
        FeatureIndexError,
        "not active at position 0",
    ),
    ({"max_n_logits": 0}, TaskError, "max_n_logits=0"),
    ({"desired_logit_prob": 1.5}, TaskError, "desired_logit_prob=1.5"),
    ({"max_feature_nodes": 0}, TaskError, "max_feature_nodes=0"),
    ({"min_share": 1.0}, TaskError, "min_share=1.0"),
    ({"memory_budget": 4000}, GemmaScopeError, "attention patterns of 20 tokens"),
    ({"memory_budget": 60_000}, GemmaScopeError, "One target of"),
]


@pytest.mark.parametrize(("options", "error", "words"), REFUSED)
def test_refused(options: dict[str, Any], error: type, words: str, hooked2: Any) -> None:
    arguments = {"exclude": ("bos",), **options}
    with pytest.raises(error, match=words):
        unchecked(gs.trace)(hooked2, TOKENS, transcoders(hooked2), **arguments)


def test_what_is_no_target_is_refused() -> None:
    with pytest.raises(TaskError, match="1.5 is not a target"):
        unchecked(as_target)(1.5)


def test_a_layer_without_a_dictionary_is_refused(hooked2: Any) -> None:
    with pytest.raises(ModelError, match="no dictionary of the MLP of layer 1,.*layers 0, 2"):
        gs.trace(hooked2, TOKENS, [transcoders(hooked2)[i] for i in (0, 2)])


def test_two_dictionaries_at_one_site_are_refused(hooked2: Any) -> None:
    twice = [*transcoders(hooked2), factories.transcoder(hooked2, 1, seed=9)]
    with pytest.raises(ModelError, match="Two dictionaries stand at blocks.1.hook_mlp_out"):
        gs.trace(hooked2, TOKENS, twice)


def test_transcoders_of_another_model_are_refused(hooked2: Any) -> None:
    hooks = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    other = factories.random_sae(16, 8, *hooks, d_out=16)
    saes = transcoders(hooked2)
    with pytest.raises(WidthMismatchError, match="width 16, the model's tensor 32"):
        gs.trace(hooked2, TOKENS, [saes[0], other, saes[2]])
    hooks = "blocks.7.ln2.hook_normalized", "blocks.7.hook_mlp_out"
    with pytest.raises(MissingHookError, match="blocks.7"):
        gs.trace(hooked2, TOKENS, [*saes, factories.random_sae(32, 8, *hooks, d_out=32)])


def test_a_folded_gain_is_refused(hooked2: Any) -> None:
    import copy

    folded = copy.deepcopy(hooked2)
    folded.process_weights_(
        fold_ln=True,
        center_writing_weights=False,
        center_unembed=False,
        refactor_factored_attn_matrices=False,
    )
    hooks = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
    gained = factories.random_sae(32, 8, *hooks, d_out=32)
    saes = transcoders(hooked2)
    with pytest.raises(MissingHookError, match="folded"):
        gs.trace(folded, TOKENS, [saes[0], gained, saes[2]])
    assert gs.trace(folded, TOKENS, saes, exclude=("bos",)).metadata["residual"] < 1e-6


def test_a_prompt_without_active_features_is_refused(hooked2: Any) -> None:
    with pytest.raises(EmptySelectionError, match="No feature of 3 dictionaries is active"):
        gs.trace(hooked2, TOKENS[:, :1], transcoders(hooked2))


def test_a_direction_of_nothing_is_refused(hooked2: Any) -> None:
    for nothing in (
        torch.zeros(hooked2.cfg.d_model),
        torch.full((hooked2.cfg.d_model,), torch.nan),
    ):
        with pytest.raises(TaskError, match="'direction' is zero or not finite"):
            traced(hooked2, targets=gs.tracing.StreamDirection(nothing, 1))


def test_several_prompts_are_refused(hooked2: Any) -> None:
    with pytest.raises(TaskError, match="2 prompts were given"):
        gs.trace(hooked2, random_tokens(batch_size=2), transcoders(hooked2))


def test_thresholds_and_nodes_are_checked(graph: Graph) -> None:
    with pytest.raises(UnknownNameError, match="node_threshold=0.0 is not a share"):
        graph.prune(0.0)
    with pytest.raises(EmptySelectionError, match="node_threshold=0.001 and edge_threshold=0.001"):
        graph.prune(0.001, 0.001)
    with pytest.raises(UnknownNameError, match="no node 'token@99'.*Did you mean 'token@9'"):
        graph.find("token@99")
    with pytest.raises(UnknownNameError, match="Nothing is known of what reaches 'token@3'"):
        graph.sources_of("token@3")


def test_hooks_are_gone(hooked2: Any) -> None:
    before = factories.n_hooks(hooked2)
    traced(hooked2, targets=["w9"])
    assert factories.n_hooks(hooked2) == before


def test_tokens_that_look_alike_are_different_targets() -> None:
    """`` Paris`` and ``Paris`` are two tokens: identity is the id, in tables, files and JSON."""
    model, transcoders = real_like(), real_like_transcoders()
    exact, spaced = vocabulary().index("Paris"), vocabulary().index("\u2581Paris")
    graph = gs.trace(model, PROMPT, transcoders, targets=[exact, spaced], max_feature_nodes=8)
    targets = graph.nodes[graph.nodes["kind"] == "target"]
    assert targets["index"].tolist() == [exact, spaced]
    assert targets["label"].tolist() == ["Paris", " Paris"]
    assert targets["id"].tolist() == [f"target:logit:{exact}@5", f"target:logit:{spaced}@5"]
    assert graph.metadata["residual"] < 1e-4
    difference = gs.trace(
        model, PROMPT, transcoders, targets=[(spaced, exact)], max_feature_nodes=8
    )
    assert difference.nodes["label"].iloc[-1] == "' Paris' - Paris"
    back = gs.Graph.from_json(graph.to_json("two-tokens"))
    assert back.nodes.query("kind == 'target'")["index"].tolist() == [exact, spaced]
    with pytest.raises(
        UnknownNameError, match=rf"'Paris' \(id {exact}\).*' Paris' \(id {spaced}\)"
    ):
        gs.trace(model, PROMPT, transcoders, targets=["Paris"])
    with pytest.raises(TaskError, match="'Paris' at position 5 is given twice"):
        gs.trace(model, PROMPT, transcoders, targets=[exact, exact])


@pytest.mark.parametrize("prompt", ["The cat", '<a href="', "a\n", "Mary and John gave a", "Yes ü"])
def test_every_likely_token_may_be_a_target(prompt: str) -> None:
    """All tokens of a vocabulary that holds most words twice, and bytes."""
    graph = gs.trace(
        real_like(),
        prompt,
        real_like_transcoders(),
        max_n_logits=442,
        desired_logit_prob=1.0,
        max_feature_nodes=1,
    )
    assert graph.nodes["id"].is_unique
    assert not any("\ufffd" in label for label in graph.nodes["label"])
    if prompt.endswith("ü"):
        assert graph.tokens[-2:] == ("<0xC3>", "<0xBC>")
