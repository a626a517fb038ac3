"""What must hold on the bundled suite: the splice is exact, causes agree, the circuit is real."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.causes.components import acts_hook
from gemmascope_plugin.circuits import Scores
from gemmascope_plugin.demo import TinySuite
from gemmascope_plugin.models import to_tokens
from gemmascope_plugin.models.gradients import gradients

N_PROMPTS = 16


@pytest.fixture(scope="module", params=["hooked", "bridge"])
def suite(request: pytest.FixtureRequest) -> TinySuite:
    return gs.tiny(backend=request.param)


def dictionaries(suite: TinySuite, *kinds: str) -> list[Any]:
    return [gs.load(s) for s in suite.specs if s.kind in kinds and not (s.variant or s.affine)]


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_all_dictionaries_at_once_leave_the_logits_as_they_are(suite, kind):
    tokens = to_tokens(suite.model, suite.tasks["ioi"].clean)
    with torch.no_grad():
        bare = suite.model(tokens)
        with gs.splice(suite.model, dictionaries(suite, kind)) as spliced:
            untouched = spliced(tokens)
            listened, _ = spliced.run_with_cache(tokens, names_filter=lambda n: "hook_sae" in n)
    assert float((untouched - bare).abs().max()) <= 1e-5
    assert float((listened - bare).abs().max()) <= 1e-5


@pytest.mark.parametrize("n", [2, 4])
def test_feature_gradients_are_those_of_the_real_model(suite, n):
    """Against central differences of the bare model along a feature's direction."""
    model, task = suite.model, suite.tasks["ioi"].first(4).bind(suite.model)
    saes = [suite.load("res", layer) for layer in range(n)]

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return task.metric(logits).sum()

    hooks = [acts_hook(sae.cfg.metadata.hook_name) for sae in saes]
    with gs.splice(model, saes) as spliced:
        _, acts = spliced.run_with_cache(task.clean, names_filter=hooks)
        grads = gradients(spliced, task.clean, metric, hooks)
    for sae, hook in zip(saes, hooks, strict=True):
        for row, pos, feature in active_places(acts[hook]):
            step = 0.02 * float(acts[hook][row, pos, feature])

            def moved(sign: float, sae=sae, row=row, pos=pos, feature=feature, step=step) -> float:
                def add(x: torch.Tensor, hook: Any) -> torch.Tensor:
                    x = x.clone()
                    x[row, pos] += sign * step * sae.W_dec[feature]
                    return x

                name = sae.cfg.metadata.hook_name
                with torch.no_grad(), model.hooks(fwd_hooks=[(name, add)]):
                    return float(metric(model(task.clean)))

            expected = (moved(1) - moved(-1)) / (2 * step)
            assert float(grads[hook][row, pos, feature]) == pytest.approx(
                expected, rel=0.05, abs=5e-3
            )


def active_places(acts: torch.Tensor) -> list[tuple[int, int, int]]:
    """The most active feature at a few tokens."""
    return [(row, pos, int(acts[row, pos].argmax())) for row, pos in ((0, 9), (1, 13), (2, 14))]


@pytest.mark.parametrize(
    ("component", "direction"),
    [(c, "denoising") for c in ("resid_pre", "attn_out", "mlp_out", "z", "feature")]
    + [(c, "noising") for c in ("attn_out", "z", "feature")],
)
def test_attribution_ranks_nodes_like_exact_patching(suite, component, direction):
    task = suite.tasks["ioi"].first(N_PROMPTS if component == "feature" else 64)
    saes = suite.load("res", 2) if component == "feature" else None
    exact = gs.activation_patching(suite.model, task, component, direction=direction, saes=saes)
    guess = gs.attribution_patching(suite.model, task, component, direction=direction, saes=saes)
    assert exact.spearman(guess) >= 0.8


@pytest.mark.parametrize("method", ["exact", "atp"])
def test_the_circuit_is_faithful_and_beats_every_random_one(suite, method):
    circuit = gs.discover(suite.model, suite.task("ioi", split="train", n=32), method=method)
    scores: Scores = gs.evaluate(suite.model, circuit, suite.tasks["ioi"].first(32), n_random=20)
    assert circuit.size <= len(circuit.ranking) / 2 == 10
    assert scores.faithfulness >= 0.8
    assert len(scores.random) == 20
    assert scores.faithfulness > max(scores.random)


def test_a_circuit_of_heads_mlps_and_features_is_ranked_and_checked(suite):
    task, sae = suite.task("ioi", split="train", n=8), suite.load("res", 2)
    circuit = gs.discover(
        suite.model, task, nodes=("head", "mlp", "feature"), saes=sae, method="atp"
    )
    scores = gs.evaluate(suite.model, circuit, suite.tasks["ioi"].first(8), saes=sae, n_random=2)
    assert {node.kind for node in circuit.nodes} == {"head", "mlp", "feature"}
    assert scores.faithfulness >= 0.8
    assert scores.faithfulness > max(scores.random)


def test_a_bundled_dictionary_is_an_ordinary_release_of_saelens():
    from sae_lens import SAE

    gs.register()
    spec = gs.find(model="gemma-2-tiny", site="mlp", kind="transcoder", layer=1, affine=False).one()
    from_saelens, loaded = SAE.from_pretrained(spec.release, spec.sae_id), gs.load(spec)
    assert type(from_saelens) is type(loaded)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in from_saelens.state_dict().items())
