"""Generation: with and without the key-value cache, on both model classes."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.splice import Ablate, Add, Clamp, splice
from tests import factories
from tests.tiny_models import random_tokens

PROMPT = random_tokens(batch_size=1, length=6)
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
