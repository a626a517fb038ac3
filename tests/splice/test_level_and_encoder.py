"""Prefixes of Matryoshka dictionaries, and the faster encoder, inside a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import FeatureIndexError, ModelError, UnknownNameError
from gemmascope_plugin.splice import Ablate, Add, HookedSAE, splice
from tests import factories
from tests.splice.reference import features, reconstructed
from tests.tiny_models import random_tokens

TOKENS = random_tokens()
SITE = "blocks.1.hook_resid_post"
LEVELS = [8, 32, factories.D_SAE]


def matryoshka(model: Any) -> Any:
    sae = copy.deepcopy(factories.residual(model, 1))
    sae.cfg.metadata.levels = LEVELS
    return sae


def prefix(sae: Any, width: int) -> Any:
    """A dictionary of the first features alone."""
    small = factories.random_sae(sae.cfg.d_in, width, SITE)
    for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec"):
        whole = getattr(sae, name).data
        cut = whole[..., :width] if name == "W_enc" else whole if name == "b_dec" else whole[:width]
        getattr(small, name).data = cut.clone()
    return small


@torch.no_grad()
@pytest.mark.parametrize("level", [0, 1, 2, -1])
def test_a_level_is_the_dictionary_of_its_first_features(model, hf, level: int) -> None:
    sae = matryoshka(model)
    hooked = HookedSAE(sae, error="drop", level=level)
    assert hooked.d_sae == LEVELS[level]
    with splice(model, hooked) as spliced:
        logits, cache = spliced.run_with_cache(TOKENS, names_filter=f"{SITE}.hook_sae_acts_post")
    with reconstructed(hf, [prefix(sae, LEVELS[level])], TOKENS):
        expected = hf(TOKENS).logits
    assert torch.allclose(logits, expected, atol=1e-5)
    acts = cache[f"{SITE}.hook_sae_acts_post"]
    whole = features(sae, factories.activations(model, TOKENS, SITE))[..., : LEVELS[level]]
    assert torch.allclose(acts[:, 1:], whole[:, 1:], atol=1e-5)


def test_a_level_shares_the_memory_of_the_whole(hooked2) -> None:
    sae = matryoshka(hooked2)
    hooked = HookedSAE(sae, level=0)
    assert hooked.weights.W_dec.data_ptr() == sae.W_dec.data_ptr()
    assert "d_sae=8" in repr(hooked)
    assert "level=0" in repr(hooked)
    assert hooked.with_error("drop").d_sae == 8


def test_features_beyond_the_level_cannot_be_edited(hooked2) -> None:
    hooked = HookedSAE(matryoshka(hooked2), level=0)
    with (
        pytest.raises(FeatureIndexError, match="Feature 8 does not exist.*features 0 to 7"),
        splice(hooked2, hooked, edits=Ablate(features=8)),
    ):
        pass


def test_levels_that_do_not_exist_are_errors(hooked2) -> None:
    with pytest.raises(UnknownNameError, match="no level 3.*level 0: 8 features, level 1: 32"):
        HookedSAE(matryoshka(hooked2), level=3)
    with pytest.raises(UnknownNameError, match="has no levels.*96 features.*variant='matryoshka'"):
        HookedSAE(factories.residual(hooked2, 1), level=0)


@torch.no_grad()
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_two_stages_encode_the_same_features(model, error) -> None:
    sae, name = factories.residual(model, 1), f"{SITE}.hook_sae_acts_post"
    runs = []
    for two_stage in (False, True):
        hooked = HookedSAE(sae, error=error, two_stage=two_stage)
        with splice(model, hooked, edits=Add(features=3, amount=2.0)) as spliced:
            runs.append(
                (spliced(TOKENS), spliced.run_with_cache(TOKENS, names_filter=name)[1][name])
            )
    (logits, acts), (fast_logits, fast_acts) = runs
    assert torch.equal(acts != 0, fast_acts != 0)
    assert torch.allclose(acts, fast_acts, atol=1e-5)
    assert torch.allclose(logits, fast_logits, atol=1e-5)


def test_two_stages_have_the_same_gradients(model) -> None:
    sae, slopes = factories.residual(model, 1), []
    for two_stage in (False, True):
        stream = factories.activations(model, TOKENS, SITE).requires_grad_(True)
        keep = torch.ones(stream.shape[:2], dtype=torch.bool)
        hooked = HookedSAE(sae, error="drop", two_stage=two_stage)
        hooked(stream, stream, keep).pow(2).sum().backward()
        slopes.append(stream.grad)
    assert torch.allclose(*slopes, rtol=1e-4, atol=1e-4)


def test_two_stages_need_float32(hooked2) -> None:
    sae = copy.deepcopy(factories.residual(hooked2, 1)).bfloat16()
    with pytest.raises(ModelError, match="float32 dictionary, this one is torch.bfloat16"):
        HookedSAE(sae, two_stage=True)


@torch.no_grad()
def test_what_is_active_does_not_depend_on_who_listens(hooked2) -> None:
    """Thresholds at computed pre-activations, where the rounding of a product would decide."""
    sae = copy.deepcopy(factories.residual(hooked2, 1))
    x = factories.activations(hooked2, TOKENS, SITE)
    pre = x @ sae.W_enc + sae.b_enc
    sae.threshold.data = pre[0, 1:].topk(2, dim=0).values[1].clamp(min=0.01)
    parts = ("input", "acts_pre", "acts_post", "recons", "error", "output")
    edit = Ablate(features=list(range(0, factories.D_SAE, 3)))
    for error in ("keep", "drop"):
        for edits in ((), edit):
            hooked = HookedSAE(sae, error=error)
            with splice(hooked2, hooked, edits=edits) as spliced:
                expected = spliced(TOKENS)
                for part in parts[: 4 if error == "drop" else 6]:
                    name = f"{SITE}.hook_sae_{part}"
                    logits, _ = spliced.run_with_cache(TOKENS, names_filter=name)
                    assert torch.allclose(logits, expected, atol=1e-5), (error, edits, part)
