"""Feature patching from a cache, and edits along decoder directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import EmptySelectionError, UnknownNameError
from gemmascope_plugin.saes import SparseActs
from gemmascope_plugin.splice import Add, Project, Replace, splice
from tests import factories
from tests.factories import activations
from tests.splice.reference import features
from tests.support.rounding import TINY
from tests.tiny_models import random_tokens

TOKENS, OTHER = random_tokens(), random_tokens(seed=5)
SITES = {
    "residual": "blocks.1.hook_resid_post",
    "attention": "blocks.1.attn.hook_z",
    "transcoder": "blocks.1.hook_mlp_out",
}
CHOSEN = [2, 30, 77]


def made(model: Any, site: str) -> tuple[Any, str]:
    return getattr(factories, site)(model, 1), SITES[site]


@torch.no_grad()
def output(model: Any, sae: Any, name: str, edits: Any, **options: Any) -> torch.Tensor:
    with splice(model, sae, edits=edits, **options) as spliced:
        _, cache = spliced.run_with_cache(TOKENS, names_filter=f"{name}.hook_sae_output")
    return cache[f"{name}.hook_sae_output"]


@torch.no_grad()
def cache_of(model: Any, sae: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    with splice(model, sae) as spliced:
        return spliced.run_with_cache(tokens)[1]


@pytest.mark.parametrize("chosen", [CHOSEN, 30, None])
@pytest.mark.parametrize("site", SITES)
def test_features_of_another_run_are_patched_in(model, site: str, chosen) -> None:
    sae, name = made(model, site)
    source = cache_of(model, sae, OTHER)
    acts = source[f"{name}.hook_sae_acts_post"]
    index = list(range(factories.D_SAE)) if chosen is None else torch.tensor([chosen]).flatten()
    here = features(sae, activations(model, TOKENS, sae.cfg.metadata.hook_name))
    change = (acts - here)[..., index] @ sae.W_dec[index]
    expected = activations(model, TOKENS, name)
    expected[:, 1:] += change[:, 1:]
    for values in (source, acts, SparseActs.from_dense(acts), acts[..., index]):
        got = output(model, sae, name, Replace(features=chosen, source=values))
        assert torch.allclose(got, expected, atol=1e-5)


def test_patching_in_ones_own_features_changes_nothing(model) -> None:
    sae, name = made(model, "residual")
    edit = Replace(features=None, source=cache_of(model, sae, TOKENS))
    assert torch.allclose(
        output(model, sae, name, edit), activations(model, TOKENS, name), atol=10 * TINY
    )


def test_one_prompt_can_be_patched_into_many(hooked2) -> None:
    sae, name = made(hooked2, "residual")
    acts = cache_of(hooked2, sae, OTHER)[f"{name}.hook_sae_acts_post"]
    single = output(hooked2, sae, name, Replace(features=CHOSEN, source=acts[:1]))
    many = output(hooked2, sae, name, Replace(features=CHOSEN, source=acts[[0, 0]]))
    assert torch.equal(single, many)


@torch.no_grad()
def test_generated_tokens_keep_their_features(model) -> None:
    """The source ends with the prompt; with and without a key-value cache the rest is the model's own."""
    sae, name = made(model, "residual")
    edit = Replace(features=None, source=cache_of(model, sae, OTHER))
    options = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False}
    with splice(model, sae, edits=edit) as spliced:
        cached, plain = (
            spliced.generate(TOKENS, use_past_kv_cache=u, **options) for u in (True, False)
        )
    assert torch.equal(cached, plain)
    assert cached.shape == (2, 25)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (torch.zeros(2, 20, 7), r"shape \[2, 20, 7\].*\[batch or 1, pos, 3\] for 3 features"),
        (torch.zeros(2, 9, 96), r"2 prompts with 9 tokens.*batch of 2 with 20"),
        (torch.zeros(3, 20, 96), r"3 prompts with 20 tokens.*batch of 2 with 20"),
    ],
)
def test_a_source_of_another_shape_is_an_error(hooked2, source, said: str) -> None:
    sae, name = made(hooked2, "residual")
    with pytest.raises(EmptySelectionError, match=said):
        output(hooked2, sae, name, Replace(features=CHOSEN, source=source))


def test_a_cache_without_the_features_is_an_error(hooked2) -> None:
    sae, name = made(hooked2, "residual")
    source = cache_of(hooked2, factories.residual(hooked2, 0), OTHER)
    with pytest.raises(
        UnknownNameError, match=f"activation in the cache '{name}.hook_sae_acts_post'"
    ):
        output(hooked2, sae, name, Replace(features=CHOSEN, source=source))


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5])
@pytest.mark.parametrize("site", SITES)
def test_projection_scales_what_points_along_a_feature(model, site: str, factor: float) -> None:
    sae, name = made(model, site)
    y, direction = activations(model, TOKENS, name), sae.W_dec[30]
    along = torch.outer(direction, direction) / direction.dot(direction)
    expected = y - y @ along + factor * (y @ along)
    got = output(model, sae, name, Project(features=30, factor=factor))
    assert torch.equal(got[:, 0], y[:, 0])
    assert torch.allclose(got[:, 1:], expected[:, 1:], atol=1e-5)
    if factor == 0:
        assert (got[:, 1:] @ direction).abs().max() < 1e-5


def test_projection_comes_after_the_edits_of_activations(hooked2) -> None:
    sae, name = made(hooked2, "residual")
    added = output(hooked2, sae, name, Add(features=30, amount=3.0))
    direction = sae.W_dec[30]
    edits = [Project(features=30, factor=2.0), Add(features=30, amount=3.0)]
    along = (added @ direction / direction.dot(direction))[..., None] * direction
    got = output(hooked2, sae, name, edits)
    assert torch.allclose(got[:, 1:], (added + along)[:, 1:], atol=1e-5)


def test_projection_without_the_error_works_on_the_reconstruction(hooked2) -> None:
    sae, name = made(hooked2, "residual")
    plain = output(hooked2, sae, name, (), error="drop")
    got = output(hooked2, sae, name, Project(features=[30], factor=0.0), error="drop")
    direction = sae.W_dec[30]
    along = (plain @ direction / direction.dot(direction))[..., None] * direction
    assert torch.allclose(got[:, 1:], (plain - along)[:, 1:], atol=1e-5)
