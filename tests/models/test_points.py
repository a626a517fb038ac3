"""Hook points by name: typos, gated hooks, widths and the order of heads."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.errors import MissingHookError
from gemmascope_plugin.models import flatten_heads, hook_names, hook_point, restore_heads
from gemmascope_plugin.models.points import width_at
from tests.factories import activations
from tests.tiny_models import random_tokens


def test_a_typo_names_the_nearest_hook(model) -> None:
    with pytest.raises(MissingHookError) as raised:
        hook_point(model, "blocks.1.hook_resid_pots")
    text = str(raised.value)
    assert text.startswith("The model has no hook 'blocks.1.hook_resid_pots'.")
    assert "There is: 3 layers," in text
    assert "Did you mean 'blocks.1.hook_resid_post'" in text
    assert "list(model.hook_dict)" in text


def test_a_layer_beyond_the_model_is_missing(model) -> None:
    with pytest.raises(MissingHookError, match="3 layers"):
        hook_point(model, "blocks.3.hook_resid_post")


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("blocks.0.hook_mlp_in", "use_hook_mlp_in"),
        ("blocks.0.hook_q_input", "use_split_qkv_input"),
        ("blocks.0.attn.hook_result", "use_attn_result"),
    ],
)
def test_a_hook_that_is_switched_off_is_refused(model, name: str, flag: str) -> None:
    with pytest.raises(MissingHookError, match=f"never fires while {flag} is off.*set_{flag}"):
        hook_point(model, name)


def test_a_hook_that_was_switched_on_is_given(model) -> None:
    model.set_use_hook_mlp_in(True)
    try:
        assert hook_point(model, "blocks.0.hook_mlp_in") is model.hook_dict["blocks.0.hook_mlp_in"]
    finally:
        model.set_use_hook_mlp_in(False)


def test_common_names_exist_on_both_classes(model) -> None:
    wanted = ("resid_pre", "resid_post", "attn_out", "mlp_out")
    names = {f"blocks.{layer}.hook_{site}" for layer in range(3) for site in wanted}
    assert names | {"hook_embed", "blocks.0.attn.hook_z"} <= set(hook_names(model))


@pytest.mark.parametrize(
    "name",
    [
        "hook_embed",
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_resid_mid",
        "blocks.2.hook_resid_post",
        "blocks.0.hook_attn_out",
        "blocks.0.hook_mlp_out",
        "blocks.0.ln2.hook_normalized",
        "blocks.0.attn.hook_z",
    ],
)
def test_the_expected_width_is_that_of_the_tensor(model, name: str) -> None:
    assert width_at(model, name) == activations(model, random_tokens(), name).shape[-1]


def test_an_unknown_site_has_no_expected_width(model) -> None:
    assert width_at(model, "blocks.0.mlp.hook_post") is None


def test_heads_are_flattened_head_by_head_and_restored() -> None:
    z = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    flat = flatten_heads(z)
    assert torch.equal(flat[..., 5:10], z[:, :, 1])
    assert torch.equal(restore_heads(flat, z), z)
    assert flatten_heads(flat) is flat
