"""Interventions on traces: every column is what a frozen run does; with all kept a run is the model's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.errors import (
    EmptySelectionError,
    GemmaScopeError,
    TaskError,
    UnknownNameError,
)
from gemmascope_plugin.tracing.ablation_check import ablated_run, check_by_ablation
from gemmascope_plugin.tracing.intervention import intervene, through
from gemmascope_plugin.tracing.traced_prompt import TracedPrompt
from tests import factories
from tests.tiny_models import random_tokens
from tests.tracing.test_adjoint import SETS, dictionaries

TOKENS = random_tokens(batch_size=1, length=20, seed=5)


def traced(model: Any, saes: Any, **options: Any) -> Any:
    return gs.trace(
        model, TOKENS, saes, exclude=("bos",), targets=[("w9", "w10"), "w11"], **options
    )


@pytest.mark.parametrize("name", SETS)
def test_every_column_is_a_frozen_intervention(
    name: str, kind: tuple[str, str], model: Any, hf: Any
) -> None:
    if kind[1] == "bridge" and name not in ("mixed", "affine clt"):
        pytest.skip("the same code, and slow")
    saes = dictionaries(name, model, hf)
    graph = traced(model, saes)
    usable = graph.nodes[graph.nodes["kind"].isin(["feature", "error", "token"])]["id"].to_numpy()
    rng = np.random.default_rng(1)
    scale = np.abs(graph.nodes["activation"]).max()
    for node in rng.choice(usable, 3, replace=False):
        done = intervene(model, graph, saes, {node: 2.0}, constrained=True)
        assert done.largest_gap < 5e-6 * scale, node


def test_free_interventions_are_those_of_a_splice(hooked2: Any) -> None:
    saes = [factories.transcoder(hooked2, layer, seed=layer) for layer in range(3)]
    graph = traced(hooked2, saes)
    row = graph.nodes[
        (graph.nodes["site"] == "blocks.1.hook_mlp_out") & graph.where("feature")
    ].iloc[0]
    done = intervene(hooked2, graph, saes, {row["id"]: 3.0})
    clamp = gs.Clamp(
        features=[int(row["index"])], value=3 * row["activation"], positions=int(row["pos"])
    )
    with gs.splice(hooked2, saes[1], exclude=("bos",), edits=clamp) as spliced, torch.no_grad():
        expected = spliced(TOKENS)[0, -1].softmax(-1)
    tokens = done.top_tokens
    words = tokens[tokens["token"].str.strip().str.startswith("w")]
    ids = [int(word.strip().removeprefix("w")) for word in words["token"]]
    assert len(ids) > 5
    np.testing.assert_allclose(words["after"], expected[ids].numpy(), rtol=1e-4)
    assert "free" in repr(done) and "correlation" in done._repr_html_()


def test_paths_are_followed(hooked2: Any) -> None:
    saes = [factories.transcoder(hooked2, layer, seed=layer) for layer in range(3)]
    graph = traced(hooked2, saes)
    dense = graph.adjacency.toarray().astype(np.float64)
    values = graph.nodes["activation"].to_numpy()
    node = int(np.flatnonzero(graph.where("token"))[3])
    relative = np.zeros(len(values))
    relative[node] = -1.0
    for i in range(node + 1, len(values)):
        change = dense[i] @ relative
        if graph.where("feature")[i]:
            relative[i] = change / values[i]
    got = through(graph, {node: 0.0})
    np.testing.assert_allclose(got, (dense @ relative)[graph.edges.nodes], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["affine", "mixed", "affine clt"])
def test_everything_kept_is_the_model(name: str, model: Any, hf: Any) -> None:
    saes = dictionaries(name, model, hf)
    prompt = TracedPrompt.of_graph(model, traced(model, saes), saes)
    is_kept = torch.ones(2, prompt.layout.n_nodes, dtype=torch.bool)
    end, logits = ablated_run(prompt, is_kept, [19])
    with torch.no_grad():
        expected = model(TOKENS)[0, -1]
    assert torch.allclose(logits[1, 0], expected, atol=1e-5)
    assert torch.allclose(end[0], prompt.frozen.stream(3), atol=1e-4)


def test_ablation_equals_a_splice_that_drops_errors(hooked2: Any) -> None:
    saes = [factories.transcoder(hooked2, layer, seed=layer) for layer in range(3)]
    graph = traced(hooked2, saes)
    prompt = TracedPrompt.of_graph(hooked2, graph, saes)
    is_kept = torch.zeros(1, prompt.layout.n_nodes, dtype=torch.bool)
    _, logits = ablated_run(prompt, is_kept, [19])
    edits = [gs.Ablate(features=None, sae=sae) for sae in saes]
    with gs.splice(hooked2, saes, error="drop", exclude=("bos",), edits=edits) as spliced:
        expected = spliced(TOKENS)[0, -1]
    assert torch.allclose(logits[0, 0], expected.detach(), atol=1e-5)


def test_check_by_ablation(hooked2: Any) -> None:
    saes = [factories.transcoder(hooked2, layer, seed=layer) for layer in range(3)]
    graph = traced(hooked2, saes)
    whole = check_by_ablation(hooked2, graph, saes, n_random=2)
    assert whole.faithfulness == pytest.approx(1.0, abs=1e-4)
    assert whole.kl == pytest.approx(0.0, abs=1e-6)
    small = check_by_ablation(hooked2, graph.prune(0.6), saes, n_random=2)
    assert small.frame["what"].tolist() == [
        "the model",
        "the graph",
        "the graph and all errors",
        "random graph 1",
        "random graph 2",
        "nothing",
    ]
    assert small.frame["features"].iloc[1] == graph.prune(0.6).where("feature").sum()
    assert "AblationCheck(faithfulness" in repr(small)
    other = check_by_ablation(hooked2, graph.prune(0.6), saes, n_random=2, seed=1)
    assert other.faithfulness == small.faithfulness and other.random != small.random


def test_refused(hooked2: Any) -> None:
    saes = [factories.transcoder(hooked2, layer, seed=layer) for layer in range(3)]
    graph = traced(hooked2, saes)
    with pytest.raises(EmptySelectionError, match="No change is given"):
        intervene(hooked2, graph, saes, {})
    with pytest.raises(UnknownNameError, match="is a bias and cannot be changed"):
        intervene(hooked2, graph, saes, {"bias:b_enc_and_b_U": 0.0})
    with pytest.raises(UnknownNameError, match="no node"):
        intervene(hooked2, graph, saes, {"nothing": 0.0})
    others = [factories.transcoder(hooked2, layer, seed=layer + 5) for layer in range(3)]
    with pytest.raises(UnknownNameError, match="do not exist on this prompt"):
        intervene(hooked2, graph, others, {"token@3": 0.0})
    direction = gs.tracing.StreamDirection(torch.ones(32), 1)
    probe = gs.trace(hooked2, TOKENS, saes, exclude=("bos",), targets=[direction])
    with pytest.raises(TaskError, match="a direction, which a graph does not hold"):
        check_by_ablation(hooked2, probe, saes)
    feature = graph.nodes[graph.where("feature")].iloc[-1]
    target = gs.tracing.FeatureTarget(feature["site"], int(feature["index"]), int(feature["pos"]))
    only = gs.trace(hooked2, TOKENS, saes, exclude=("bos",), targets=[target])
    with pytest.raises(TaskError, match="explains features only"):
        check_by_ablation(hooked2, only, saes)
    budget: Any = {"memory_budget": 4000}
    with pytest.raises(GemmaScopeError, match="attention patterns of 20 tokens"):
        check_by_ablation(hooked2, graph, saes, **budget)
    with pytest.raises(GemmaScopeError, match="attention patterns of 20 tokens"):
        intervene(hooked2, graph, saes, {"token@3": 0.0}, **budget)


@pytest.mark.parametrize("constrained", [True, False])
def test_likely_tokens_and_targets_are_of_one_run(constrained: bool) -> None:
    """Without a soft-cap the difference of two targets is that of their log-probabilities."""
    model = factories.tiny_model("gemma3", "hooked")
    saes = [factories.transcoder(model, layer, seed=layer) for layer in range(3)]
    best = model(TOKENS)[0, -1].topk(2).indices.tolist()
    graph = gs.trace(model, TOKENS, saes, exclude=("bos",), targets=best)
    feature = graph.nodes["id"][graph.where("feature")].iloc[0]
    done = intervene(model, graph, saes, {feature: 5.0}, constrained=constrained)
    rows = done.targets
    after = (rows["before"] + rows["actual"]).to_numpy()
    tokens = done.top_tokens.set_index("token")["after"]
    said = np.log([tokens[label] for label in rows["label"]])
    assert np.abs(np.diff(after) - np.diff(said)).max() < 1e-4
    assert np.abs(rows["actual"]).max() > 1e-3, "something has to move"
