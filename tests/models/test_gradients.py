"""Gradients at hooks, with frozen parameters, against autograd on the transformers model."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.errors import HookNotFiredError
from gemmascope_plugin.models import gradients
from tests.factories import n_hooks
from tests.support.rounding import TINY
from tests.tiny_models import random_tokens

TOKENS = random_tokens()


def metric(logits: torch.Tensor) -> torch.Tensor:
    """A sum that gives every logit at the last position a weight of its own."""
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return (logits[:, -1] * weights).sum()


def reference(hf, modules: dict[str, object]) -> dict[str, torch.Tensor]:
    """Gradients at the outputs of transformers modules, by plain forward hooks and autograd."""
    outputs = {}

    def keep(name: str):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            if not output.requires_grad:
                output.requires_grad_(True)
            output.retain_grad()
            outputs[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        with torch.enable_grad():
            metric(hf(TOKENS).logits).backward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: output.grad for name, output in outputs.items()}


def test_gradients_are_those_of_transformers(model, hf) -> None:
    layers = hf.model.layers
    modules = {"hook_embed": hf.model.embed_tokens}
    for i in (0, 1, 2):
        modules[f"blocks.{i}.hook_attn_out"] = layers[i].post_attention_layernorm
        modules[f"blocks.{i}.hook_mlp_out"] = layers[i].post_feedforward_layernorm
        modules[f"blocks.{i}.hook_resid_post"] = layers[i]
    expected = reference(hf, modules)
    got = gradients(model, TOKENS, metric, list(modules))
    for name, grad in got.items():
        want = expected[name]
        assert torch.allclose(grad, want, atol=1e-5 * float(want.abs().max()) + 1e-8), name


def test_both_classes_agree_at_heads() -> None:
    from tests.factories import tiny_model

    name = "blocks.1.attn.hook_z"
    hooked, bridge = (
        gradients(tiny_model("gemma2", backend), TOKENS, metric, [name])[name]
        for backend in ("hooked", "bridge")
    )
    assert hooked.shape == bridge.shape == (*TOKENS.shape, 4, 12)
    assert torch.allclose(hooked, bridge, atol=TINY)


def test_a_norm_called_three_times_gives_the_sum(hooked2) -> None:
    """``HookedTransformer`` runs ``ln1`` once each for queries, keys and values."""
    model = hooked2
    name = "blocks.1.ln1.hook_normalized"
    grad = gradients(model, TOKENS, metric, [name])[name]
    eps, at = 1e-2, (0, 7, 3)
    shifted = []
    for sign in (1, -1):

        def nudge(x, hook, sign=sign):
            x = x.clone()
            x[at] += sign * eps
            return x

        with torch.no_grad(), model.hooks(fwd_hooks=[(name, nudge)]):
            shifted.append(float(metric(model(TOKENS))))
    slope = (shifted[0] - shifted[1]) / (2 * eps)
    assert float(grad[at]) == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_a_metric_that_ignores_the_logits_is_an_error(model) -> None:
    with pytest.raises(HookNotFiredError, match="No gradient reached blocks.0.hook_resid_post"):
        gradients(model, TOKENS, lambda logits: torch.zeros(()), ["blocks.0.hook_resid_post"])


def test_a_constant_metric_in_the_graph_is_an_error(model) -> None:
    with pytest.raises(HookNotFiredError, match="No gradient reached"):
        gradients(
            model,
            TOKENS,
            lambda logits: torch.zeros((), requires_grad=True) * 2,
            ["blocks.0.hook_resid_post"],
        )


def test_nothing_is_left_behind(model) -> None:
    before = n_hooks(model)
    gradients(model, TOKENS, metric, ["blocks.1.hook_mlp_out"])
    assert n_hooks(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_trainable_parameters_collect_nothing_and_keep_their_flags(hooked2):
    weight = hooked2.blocks[0].mlp.W_in.requires_grad_(True)
    try:
        gradients(hooked2, TOKENS, lambda logits: logits[0, -1, 5], ["blocks.1.hook_resid_pre"])
        assert weight.grad is None
        assert weight.requires_grad
    finally:
        weight.requires_grad_(False)
