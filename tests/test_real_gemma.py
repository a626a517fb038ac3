"""What must hold on a real Gemma: splices change nothing, gradients are the model's, sums add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.models import gradients
from tests.support.real_saes import fitted_sae, fitted_transcoders

pytestmark = pytest.mark.real

PROMPT = "When Mary and John went to the store, John gave a drink to"
RESID, LATER = "blocks.5.hook_resid_post", "blocks.11.hook_resid_post"


@pytest.fixture(scope="module")
def task(real_model: Any) -> Any:
    return gs.Task.builtin("ioi", real_model, n=4)


@pytest.fixture(scope="module")
def transcoders(real_model: Any) -> list[Any]:
    return fitted_transcoders(real_model)


@pytest.fixture(scope="module")
def saes(real_model: Any) -> list[Any]:
    return [fitted_sae(real_model, RESID), fitted_sae(real_model, LATER)]


@pytest.mark.parametrize("fixture", ["real_model", "real_bridge_half"])
@torch.no_grad()
def test_splicing_with_the_error_kept_changes_nothing(fixture: str, request: Any, saes) -> None:
    """Not even in bfloat16: the error is what is missing from the very tensor that flows on."""
    model = request.getfixturevalue(fixture)
    tokens = model.to_tokens(PROMPT)
    bare = model(tokens)[:, -1]
    with gs.splice(model, saes, error="keep") as spliced:
        logits, cache = spliced.run_with_cache(
            tokens, names_filter=lambda name: name.endswith("sae_acts_post")
        )
    assert all(int((acts[0, 1:] > 0).sum()) > 0 for acts in cache.values()) and len(cache) == 2
    assert torch.equal(logits[:, -1], bare)


def test_feature_gradients_equal_finite_differences_of_the_bare_model(real_model, saes) -> None:
    """The upper SAE, whose error is kept, does not stand in the way of the lower one's gradient."""
    model, lower = real_model, saes[0]
    tokens = model.to_tokens(PROMPT)
    mary, john = (model.to_single_token(word) for word in (" Mary", " John"))
    name = f"{RESID}.hook_sae_acts_post"

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, mary] - logits[0, -1, john]

    with gs.splice(model, saes, error="keep", exclude=()) as spliced:
        acts = spliced.run_with_cache(tokens, names_filter=[name])[1][name][0, -1]
        grad = gradients(spliced, tokens, metric, [name])[name][0, -1]
    features = acts.topk(4).indices
    x = model.run_with_cache(tokens, names_filter=[RESID])[1][RESID][0, -1]
    step = 0.002 * float(x.norm()) / lower.W_dec[features].norm(dim=1)
    moves = step[:, None] * lower.W_dec[features]

    def move(stream: torch.Tensor, hook: Any) -> torch.Tensor:
        stream[:, -1] += torch.cat([moves, -moves])
        return stream

    with torch.no_grad():
        logits = model.run_with_hooks(tokens.repeat(8, 1), fwd_hooks=[(RESID, move)])[:, -1]
    high, low = (logits[:, mary] - logits[:, john]).chunk(2)
    difference = (high - low) / (2 * step)
    # at a hundredth of the norm the third derivative still shows, by a few percent
    assert torch.allclose(
        grad[features], difference, rtol=0.02, atol=0.01 * float(difference.abs().max())
    )


@pytest.mark.parametrize(("fixture", "most"), [("real_model", 1e-5), ("real_bridge_half", 2e-2)])
def test_rows_of_a_trace_sum_to_what_they_explain(fixture: str, most: float, request: Any) -> None:
    """In bfloat16 the stream is rounded to eight bits at every layer, and no node has that."""
    model = request.getfixturevalue(fixture)
    graph = gs.trace(
        model, "The capital of France is", fitted_transcoders(model), max_feature_nodes=64
    )
    assert graph.metadata["residual"] < most


@pytest.mark.parametrize(
    "prompt",
    [
        '<a href="',  # two likely tokens differ by a space
        "def add(a, b):\n    return",
        "\u201cTo be or not to be",
        "1, 2, 4, 8, 16,",
        "\u65e5\u672c\u306e\u9996\u90fd\u306f",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",  # bytes
        "...",
    ],
)
def test_ordinary_prompts_can_be_traced(prompt: str, real_model: Any, transcoders: Any) -> None:
    graph = gs.trace(real_model, prompt, transcoders, max_feature_nodes=16)
    assert graph.nodes["id"].is_unique and graph.metadata["residual"] < 1e-5
    targets = graph.metadata["targets"]
    assert len(set(targets)) == len(targets) == graph.where("target").sum()


def test_integrated_gradients_are_conserved(real_model, task) -> None:
    """Ten midpoints at the upper layers, five for edges: a few percent of the gap."""
    nodes = gs.attribution_patching(
        real_model, task, "z", method="ig", steps=10, layers=[15, 16, 17]
    )
    assert nodes.metadata["residual_max"] < 0.02
    edges = gs.edge_attribution(real_model, task.first(2), method="eap-ig", steps=5)
    assert abs(edges.metadata["conservation"]) < 0.1


def test_direct_contributions_sum_to_the_logit_difference(real_model, task) -> None:
    effects = gs.direct_logit_attribution(real_model, task, by="head")
    total, whole = float(effects.values.sum()), effects.metadata["metric_clean"]
    assert abs(total - whole) < 1e-4 * effects.values.abs().sum()


def test_all_edges_are_the_model_and_none_the_corrupted_run(real_model, task) -> None:
    circuit = gs.discover(real_model, task.first(2), method="eap", size=50)
    scores = gs.evaluate(real_model, circuit, task.first(2), sizes=[0, 5644], n_random=0)
    ends = [scores.faithfulness_by_size[scores.sizes.index(size)] for size in (0, 5644)]
    assert ends == pytest.approx([0, 1], abs=1e-3)
