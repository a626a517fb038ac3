"""A pass that starts at a layer gives the logits of the whole pass."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.models.module_replay import Restart
from gemmascope_plugin.models.points import can_restart
from tests.factories import n_hooks, tiny_model
from tests.support.rounding import TINY_TERMS, assert_rounded
from tests.tiny_models import PAD_ID, random_tokens


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_every_start_gives_the_same_logits(model, n_prompts: int) -> None:
    tokens = random_tokens(batch_size=n_prompts, length=20)
    with torch.no_grad():
        whole = model(tokens.repeat(2, 1))
        before = n_hooks(model)  # the bridge adds some of its own in its first pass
        end = Restart(model, tokens, range(4))
        assert n_hooks(model) == before
        for layer in range(4):
            # the layers below ran once for each prompt, not once for each copy: a sum in another order
            assert_rounded(end(end.stream(layer, 2), start_at_layer=layer), whole, TINY_TERMS)


def test_hooks_work_in_the_layers_that_run(model) -> None:
    tokens, seen = random_tokens(), []

    def double(x, hook):
        seen.append(hook.name)
        return 2 * x

    hooks = [(f"blocks.{layer}.hook_mlp_out", double) for layer in (0, 2)]
    end = Restart(model, tokens, [1])
    with torch.no_grad():
        with end.hooks(fwd_hooks=hooks):
            late = end(end.stream(1, 1), start_at_layer=1)
        assert torch.equal(late, model.run_with_hooks(tokens, fwd_hooks=hooks[1:]))
    assert len(seen) == 2


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_mask_of_padding_in_front_is_kept(family: str, monkeypatch) -> None:
    """``HookedTransformer`` makes one where its tokenizer pads on the left."""
    model = tiny_model(family, "hooked")
    monkeypatch.setattr(model.tokenizer, "padding_side", "left")
    tokens = random_tokens(batch_size=2, length=8)
    tokens[1, :3] = PAD_ID
    with torch.no_grad():
        whole = model(tokens.repeat(3, 1))
        end = Restart(model, tokens, [1])
        late = end(end.stream(1, 3), start_at_layer=1)
        assert_rounded(late, whole, TINY_TERMS)
        bare = model(end.stream(1, 3), start_at_layer=1)
    assert not torch.allclose(bare[1, -1], whole[1, -1], atol=1e-4)


def test_a_model_with_hooks_is_not_restarted(model) -> None:
    assert can_restart(model)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: x)]):
        assert not can_restart(model)
    assert can_restart(model)
