"""Weights and norms in one vocabulary: what they compute is what the model computes."""

from __future__ import annotations

import copy

import pytest
import torch

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.points import Norm
from tests.factories import tiny_model
from tests.splice.gained_transcoders import folded
from tests.tiny_models import random_tokens

TOKENS = random_tokens(batch_size=2, length=9, seed=3)


@torch.no_grad()
def cache_of(model):
    return model.run_with_cache(TOKENS)[1]


def close(a, b) -> bool:
    return torch.allclose(a, b, atol=2e-5, rtol=1e-4)


def test_weights_and_norms_compute_what_the_model_does(model) -> None:
    check(model)


def test_folded_models(model) -> None:
    check(folded(model))


def check(model) -> None:
    anatomy, cache = Anatomy(model), cache_of(model)
    assert anatomy.group == anatomy.n_heads // anatomy.n_kv == 2
    for layer in range(anatomy.n_layers):
        name = f"blocks.{layer}."
        ln1, ln2 = anatomy.norm(layer, "ln1"), anatomy.norm(layer, "ln2")
        assert ln1 is not None and ln2 is not None
        normed = ln1(cache[f"{name}hook_resid_pre"])
        for port, weight in (("q", anatomy.W_Q), ("k", anatomy.W_K), ("v", anatomy.W_V)):
            projected = torch.einsum("bsm,hmd->bshd", normed, weight(layer))
            assert close(projected, cache[f"{name}attn.hook_{port}"]), (layer, port)
        z = cache[f"{name}attn.hook_z"]
        total = anatomy.head_sum(layer, z)
        assert close(anatomy.head_results(layer, z).sum(-2), total)
        post = anatomy.norm(layer, "ln1_post")
        assert post is not None
        assert close(post(total), cache[f"{name}hook_attn_out"])
        x = cache[f"{name}hook_resid_mid"]
        assert close(x / ln2.scale(x), cache[f"{name}ln2.hook_normalized"])
    last = cache[f"blocks.{anatomy.n_layers - 1}.hook_resid_post"]
    assert close(anatomy.ln_final(last) @ anatomy.W_U, cache["unembed.hook_out"])


@pytest.mark.parametrize("gain", [None, torch.linspace(0.3, 2.0, 6, dtype=torch.float64)])
def test_derivatives_of_the_norm(gain) -> None:
    norm = Norm(gain, 1e-6)
    x, v, u = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    forward = torch.autograd.functional.jvp(norm, x, v)[1]
    backward = torch.autograd.functional.vjp(norm, x, u)[1]
    torch.testing.assert_close(norm.jvp(x, v), forward)
    torch.testing.assert_close(norm.vjp(x, u), backward)
    torch.testing.assert_close((norm.jvp(x, v) * u).sum(), (v * norm.vjp(x, u)).sum())
    torch.testing.assert_close(norm.frozen(x, x), norm(x))
    several = torch.stack([v, 2 * v], 1)
    torch.testing.assert_close(norm.jvp(x[:, None], several)[:, 1], 2 * forward)


def test_models_that_are_not_a_gemma_are_refused() -> None:
    parallel = copy.deepcopy(tiny_model("gemma2", "hooked"))
    parallel.cfg.parallel_attn_mlp = True
    with pytest.raises(ModelError, match="read the same tensor.*a Gemma model"):
        Anatomy(parallel)
