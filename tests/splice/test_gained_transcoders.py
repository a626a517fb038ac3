"""Transcoders of Gemma Scope 2 spliced in: the norm's output with gain, and the affine skip."""

from __future__ import annotations

import copy

import pytest
import torch

from gemmascope_plugin.errors import MissingHookError
from gemmascope_plugin.models.gradients import gradients
from gemmascope_plugin.splice import Ablate, Clamp, splice
from tests import factories
from tests.splice.gained_transcoders import folded, gained_transcoder, skip_matrix, transcoded
from tests.splice.reference import features, largest
from tests.tiny_models import random_tokens

TOKENS = random_tokens()
KINDS = pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])


@torch.no_grad()
@KINDS
def test_with_the_error_dropped_it_is_the_computation_on_transformers(model, hf, skip) -> None:
    codes = [gained_transcoder(hf, layer, skip=skip, seed=layer) for layer in (0, 2)]
    with splice(model, codes, error="drop") as spliced:
        logits = spliced(TOKENS)
    with transcoded(hf, codes, TOKENS):
        assert largest(logits - hf(TOKENS).logits) < 1e-5
    with transcoded(hf, codes, TOKENS, gain=False):
        assert largest(logits - hf(TOKENS).logits) > 1e-2, "a missing gain goes unnoticed"
    with transcoded(hf, codes, TOKENS, transpose=True):
        assert (largest(logits - hf(TOKENS).logits) > 1e-2) == skip


@torch.no_grad()
@KINDS
def test_with_the_error_kept_the_logits_are_the_models_own(model, hf, skip) -> None:
    code, bare = gained_transcoder(hf, 1, skip=skip), model(TOKENS)
    with splice(model, code) as spliced:
        assert torch.equal(spliced(TOKENS), bare)
        logits, _ = spliced.run_with_cache(TOKENS)
        assert torch.equal(logits, bare)
    with splice(model, code, error="detach") as spliced:
        assert largest(spliced(TOKENS) - bare) < 1e-5


@torch.no_grad()
def test_the_cache_has_the_names_that_users_know(model, hf) -> None:
    code, site = gained_transcoder(hf, 1, skip=True), "blocks.1.hook_mlp_out"
    with splice(model, code, exclude=()) as spliced:
        _, cache = spliced.run_with_cache(TOKENS)
    x = cache[f"{site}.hook_sae_input"]
    expected = features(code, x) @ code.W_dec + code.b_dec + x @ skip_matrix(x.shape[-1])
    assert spliced.saes[0].hook_in == "blocks.1.mlp.hook_in"
    assert largest(cache[f"{site}.hook_sae_acts_post"] - features(code, x)) < 1e-5
    assert largest(cache[f"{site}.hook_sae_recons"] - expected) < 1e-5
    assert largest(cache[f"{site}.hook_sae_error"] + expected - cache[site]) < 1e-5


@torch.no_grad()
def test_the_tensor_that_is_read_is_in_the_cache_on_both_classes(model, hf) -> None:
    code, name = gained_transcoder(hf, 1, skip=False), "blocks.1.mlp.hook_in"
    site = "blocks.1.hook_mlp_out.hook_sae_input"
    with splice(model, code) as spliced:
        _, cache = spliced.run_with_cache(TOKENS, names_filter=[name, site])
    assert torch.equal(cache[name], cache[site])


@torch.no_grad()
def test_edits_leave_the_skip_alone(model, hf) -> None:
    """Short cut and full computation agree, and the change is that of the edited rows alone."""
    code, site = gained_transcoder(hf, 1, skip=True), "blocks.1.hook_mlp_out"
    edits = (Clamp(features=3, value=2.0), Ablate(features=[5, 8]))
    with splice(model, code, edits=edits) as spliced:
        short = spliced(TOKENS)
        full, cache = spliced.run_with_cache(TOKENS)
    assert largest(short - full) < 1e-5
    x = cache[f"{site}.hook_sae_input"][:, 1:]
    rows, acts = torch.tensor([3, 5, 8]), features(code, x)
    change = torch.tensor([2.0, 0.0, 0.0]) - acts[..., rows]
    bare = factories.activations(model, TOKENS, site)[:, 1:]
    out = cache[f"{site}.hook_sae_output"][:, 1:]
    assert torch.equal(cache[site][:, 1:], bare)
    assert largest(out - bare - change @ code.W_dec[rows]) < 1e-5


@KINDS
def test_with_the_error_kept_the_gradient_is_the_models_own(model, hf, skip) -> None:
    def metric(logits):
        return logits[:, -1, 7].sum()

    name, code = "blocks.0.hook_resid_post", gained_transcoder(hf, 1, skip=skip)
    expected = gradients(model, TOKENS, metric, [name])[name]
    with splice(model, code) as spliced:
        sub = f"{code.cfg.metadata.hook_name_out}.hook_sae_acts_post"
        got = gradients(spliced, TOKENS, metric, [name, sub])
    assert largest(got[name] - expected) < 1e-5 * max(1.0, largest(expected))
    assert largest(got[sub]) > 0


def test_with_the_error_dropped_the_gradient_goes_through_the_skip(model, hf) -> None:
    def metric(logits):
        return logits[:, -1, 7].sum()

    name, code = "blocks.0.hook_resid_post", gained_transcoder(hf, 1, skip=True)
    without = copy.deepcopy(code)
    without.W_skip.data.zero_()
    slopes = []
    for transcoder in (code, without):
        with splice(model, transcoder, error="drop") as spliced:
            slopes.append(gradients(spliced, TOKENS, metric, [name])[name])
    assert largest(slopes[0] - slopes[1]) > 1e-3


def test_a_model_with_folded_norms_is_refused(model, hf) -> None:
    code = gained_transcoder(hf, 1, skip=False)
    with (
        pytest.raises(MissingHookError, match="were folded.*load_model"),
        splice(folded(model), code),
    ):
        pass
