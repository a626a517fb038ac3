"""Passes that leave out the layers below a site say what whole passes say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemmascope_plugin.models.asked import NextTokenLosses, SharedLayers
from gemmascope_plugin.models.points import lowest_layer
from gemmascope_plugin.splice import HookedSAE, splice
from tests.factories import n_hooks, residual
from tests.tiny_models import random_tokens

TOKENS = random_tokens(batch_size=2, length=12)
MASK = torch.ones(2, 11, dtype=torch.bool)


def halved(x: torch.Tensor, hook: Any) -> torch.Tensor:
    return x / 2


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_losses_are_those_of_whole_passes(model, layer: int) -> None:
    hooks = [(f"blocks.{layer}.hook_mlp_out", halved)]
    shared = NextTokenLosses(model, TOKENS, MASK, layer)
    whole = NextTokenLosses(model, TOKENS, MASK)
    first = shared(model)
    assert torch.equal(first, whole(model))
    with model.hooks(fwd_hooks=hooks):
        later = shared(model)
        assert torch.equal(later, whole(model))
    assert not torch.equal(first, later)
    assert torch.equal(shared(model), first)


def test_layers_below_run_once_and_are_themselves_again(model) -> None:
    seen: list[str] = []
    blocks = [vars(block).get("forward") for block in model.blocks]
    shared, before = SharedLayers(model, 2), n_hooks(model)

    def ran(x: torch.Tensor, hook: Any) -> None:
        seen.append(hook.name)

    hooks = [(f"blocks.{layer}.hook_resid_post", ran) for layer in range(3)]
    with torch.no_grad():
        for _ in range(2):
            with shared.passing(), model.hooks(fwd_hooks=hooks):
                model(TOKENS)
    assert [name.split(".")[1] for name in seen] == ["0", "1", "2", "2"]
    assert [vars(block).get("forward") for block in model.blocks] == blocks
    assert n_hooks(model) == before


def test_whoever_listens_below_sees_every_pass(model) -> None:
    seen: list[torch.Tensor] = []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: seen.append(x))]):
        read = NextTokenLosses(model, TOKENS, MASK, 2)
        first, again = read(model), read(model)
    assert len(seen) == 2
    assert torch.equal(first, again)


def test_a_splice_knows_its_tokens_where_the_layers_below_are_left_out(model) -> None:
    """Excluded tokens are found by their ids, which the embedding sees."""
    sae = residual(model, 2)
    shared = NextTokenLosses(model, TOKENS, MASK, 2)
    shared(model)
    excluded = (int(TOKENS[0, 3]),)
    with splice(model, HookedSAE(sae, error="drop", exclude=excluded)) as run:
        assert torch.equal(shared(run), NextTokenLosses(model, TOKENS, MASK)(run))


def test_the_lowest_layer_of_hooks() -> None:
    assert lowest_layer("blocks.3.hook_mlp_out") == 3
    assert lowest_layer("blocks.3.ln2.hook_normalized", "blocks.2.hook_mlp_out") == 2
    assert lowest_layer("hook_embed", "blocks.2.hook_mlp_out") == 0
