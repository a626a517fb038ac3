"""One tensor per site on every model class and folding."""

from __future__ import annotations

import copy

import pytest
import torch

from gemmascope_plugin.errors import MissingHookError
from gemmascope_plugin.models.points import is_folded, norm_gain, reading, width_at
from tests.factories import activations
from tests.splice.gained_transcoders import folded
from tests.tiny_models import random_tokens

TOKENS = random_tokens()
GAINED, PLAIN = "blocks.1.mlp.hook_in", "blocks.1.ln2.hook_normalized"


def read(model, name: str) -> torch.Tensor:
    how = reading(model, name)
    return how(activations(model, TOKENS, how.hook))


@torch.no_grad()
def norm_output(hf) -> torch.Tensor:
    seen = []
    module = hf.model.layers[1].pre_feedforward_layernorm
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    hf(TOKENS)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", [GAINED, "blocks.1.ln2.hook_out"])
def test_the_norms_output_with_gain_is_that_of_transformers(model, hf, name: str) -> None:
    expected = norm_output(hf)
    assert (read(model, name) - expected).abs().max() < 1e-5
    assert (read(model, PLAIN) - expected).abs().max() > 0.3, "a forgotten gain goes unnoticed"
    assert width_at(model, name) == expected.shape[-1]


def test_the_gain_is_one_plus_the_checkpoints_weight(model, hf) -> None:
    for layer in range(3):
        weight = hf.model.layers[layer].pre_feedforward_layernorm.weight
        assert torch.equal(norm_gain(model, layer), 1 + weight)


def test_other_hooks_are_read_as_they_fire(model) -> None:
    for name in ("blocks.0.hook_resid_post", "blocks.2.attn.hook_z", PLAIN):
        how = reading(model, name)
        assert (how.name, how.hook, how.gain) == (name, name, None)


def test_folding_takes_the_gain_away_and_is_refused(model) -> None:
    changed = folded(model)
    assert is_folded(changed, 1) and not is_folded(model, 1)
    for name in (GAINED, "blocks.1.ln2.hook_out"):
        with pytest.raises(MissingHookError, match="were folded.*gemmascope_plugin.load_model"):
            reading(changed, name)
    assert (read(changed, PLAIN) - read(model, PLAIN)).abs().max() < 1e-5


def test_the_bridges_compatibility_mode_is_refused_too() -> None:
    from tests.factories import tiny_model

    bridge = copy.deepcopy(tiny_model("gemma3", "bridge"))
    bridge.enable_compatibility_mode(center_unembed=False)
    with pytest.raises(MissingHookError, match="were folded"):
        reading(bridge, GAINED)


def test_processing_without_folding_keeps_the_gain() -> None:
    from tests.factories import tiny_model

    bridge = copy.deepcopy(tiny_model("gemma2", "bridge"))
    bridge.process_weights(fold_ln=False, center_unembed=False)
    assert not is_folded(bridge, 1)
    assert (read(bridge, GAINED) - read(tiny_model("gemma2", "bridge"), GAINED)).abs().max() < 1e-6


def test_a_layer_or_name_that_does_not_exist_is_missing(model) -> None:
    for name in ("blocks.3.mlp.hook_in", "blocks.1.mlp.hook_inn", "blocks.1.hook_resid_pots"):
        with pytest.raises(MissingHookError, match="The model has no hook"):
            reading(model, name)
