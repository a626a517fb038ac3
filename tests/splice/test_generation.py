"""Generation and steering: with and without the key-value cache, on both model classes."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.errors import EmptySelectionError, FeatureIndexError
from gemmascope_plugin.splice import Ablate, Add, Clamp, splice, steer
from tests import factories
from tests.factories import n_hooks, tiny_model
from tests.tiny_models import random_tokens

PROMPT = random_tokens(batch=1, length=6)
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False}
EDITS = {
    "everywhere": [Add(features=3, amount=6.0)],
    "one position": [Clamp(features=3, value=9.0, positions=4)],
    "slice": [Clamp(features=[3, 8], value=9.0, positions=slice(1, 3))],
}


@torch.no_grad()
@pytest.mark.parametrize("name", EDITS)
def test_the_key_value_cache_changes_nothing(model, name: str) -> None:
    sae = factories.residual(model, 1)
    with splice(model, sae, edits=EDITS[name]) as spliced:
        cached, plain = (
            spliced.generate(PROMPT, use_past_kv_cache=use, **OPTIONS) for use in (True, False)
        )
        by_hand = PROMPT
        for _ in range(OPTIONS["max_new_tokens"]):
            following = spliced(by_hand)[:, -1].argmax(-1, keepdim=True)
            by_hand = torch.cat([by_hand, following], dim=1)
    assert torch.equal(cached, by_hand)
    assert torch.equal(plain, by_hand)


@torch.no_grad()
def test_generation_without_edits_is_the_models_own(model) -> None:
    bare = model.generate(PROMPT, return_type="tokens", verbose=False, prepend_bos=False, **OPTIONS)
    with splice(model, factories.four_dictionaries(model)) as spliced:
        assert torch.equal(spliced.generate(PROMPT, **OPTIONS), bare)


@torch.no_grad()
def test_generation_from_nothing_but_bos_works(hooked2) -> None:
    with splice(hooked2, factories.residual(hooked2, 1), edits=Ablate(features=1)) as spliced:
        assert spliced.generate(PROMPT[:, :1], **OPTIONS).shape == (1, 7)


def test_steering_with_strength_zero_changes_nothing(model) -> None:
    result = steer(model, factories.residual(model, 1), 3, 0.0, "w5 w6 w7", max_new_tokens=5)
    assert result.after == result.before


def test_both_classes_steer_alike() -> None:
    sae = factories.residual(tiny_model("gemma2", "hooked"), 1)
    one, other = (
        steer(tiny_model("gemma2", backend), sae, 3, 8.0, "w5 w6 w7", max_new_tokens=6)
        for backend in ("hooked", "bridge")
    )
    assert one == other
    assert one.after != one.before


def test_sampling_is_reproducible_and_leaves_the_random_state(model) -> None:
    sae = factories.residual(model, 1)
    state = torch.get_rng_state()
    first, again, other = (
        steer(model, sae, 3, 4.0, "w5 w6", max_new_tokens=8, temperature=1.0, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first.before != other.before
    assert torch.equal(torch.get_rng_state(), state)


def test_steering_is_described(hooked2) -> None:
    before = n_hooks(hooked2)
    result = steer(hooked2, factories.residual(hooked2, 1), 3, 8.0, "w5 w6", max_new_tokens=3)
    assert repr(result).startswith("Steering(blocks.1.hook_resid_post feature 3, strength 8)")
    assert result.prompt == "w5 w6"
    assert len(result.after.split()) == 3
    assert n_hooks(hooked2) == before


def test_steering_errors(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    with pytest.raises(FeatureIndexError, match="Feature 96 does not exist"):
        steer(hooked2, sae, 96, 1.0, "w5 w6")
    with pytest.raises(EmptySelectionError, match="The prompt is empty"):
        steer(hooked2, sae, 1, 1.0, "")
