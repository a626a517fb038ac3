"""With the error kept, gradients are those of the real model, however many dictionaries there are.

The reference is the bare model in float64: its metric when ``eps * W_dec[i]`` is added at one site and
position, as a central difference. No dictionary runs in it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import HookNotFiredError
from gemmascope_plugin.models import flatten_heads, gradients, restore_heads
from gemmascope_plugin.splice import Ablate, Scale, splice
from gemmascope_plugin.splice.pass_features import SUB_HOOKS
from tests import factories
from tests.support.rounding import TINY
from tests.tiny_models import random_tokens

TOKENS = random_tokens(batch_size=1)
EPS = 1e-4
SETS = {
    "one": lambda model: [factories.residual(model, 1)],
    "two": lambda model: [factories.residual(model, 0), factories.residual(model, 1, seed=7)],
    "four": factories.four_dictionaries,
}


def metric(logits: torch.Tensor) -> torch.Tensor:
    """A sum that gives every logit at the last position a weight of its own."""
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return (logits[:, -1] * weights).sum()


def output_hook(sae: Any) -> str:
    return sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name


def acts_hook(sae: Any) -> str:
    return f"{output_hook(sae)}.hook_sae_acts_post"


def slope(model: Any, hook: str, pos: int, direction: torch.Tensor) -> float:
    """Central difference of the metric along a direction at one hook and position."""

    def moved(amount: float) -> float:
        def add(x, hook):
            flat = flatten_heads(x).clone()
            flat[:, pos] += amount * direction
            return restore_heads(flat, x)

        with torch.no_grad(), model.hooks(fwd_hooks=[(hook, add)]):
            return float(metric(model(TOKENS)))

    return (moved(EPS) - moved(-EPS)) / (2 * EPS)


def active_entries(acts: torch.Tensor, n: int = 3) -> list[tuple[int, int]]:
    """The strongest active (position, feature) pairs and one that is off."""
    order = acts[0].flatten().argsort(descending=True)[:n].tolist()
    pairs = [divmod(i, acts.shape[-1]) for i in order]
    return [*pairs, (acts.shape[1] - 1, int(acts[0, -1].argmin()))]


def feature_gradients(model: Any, saes: list[Any], error: str = "keep") -> list[list[float]]:
    """Per dictionary: gradients at the sampled features beside finite differences of the bare model."""
    with splice(model, saes, error=error) as spliced:
        hooks = [acts_hook(sae) for sae in saes]
        with torch.no_grad():
            _, cache = spliced.run_with_cache(TOKENS, names_filter=hooks)
        got = gradients(spliced, TOKENS, metric, hooks)
    return [
        [float(got[hook][0, pos, i]), slope(model, output_hook(sae), pos, sae.W_dec[i])]
        for sae, hook in zip(saes, hooks, strict=True)
        for pos, i in active_entries(cache[hook])
    ]


@pytest.mark.parametrize("name", SETS)
def test_feature_gradients_equal_finite_differences_of_the_real_model(double, name: str) -> None:
    got, real = torch.tensor(feature_gradients(double, SETS[name](double)), dtype=torch.float64).T
    assert real.abs().max() > 1e-2
    assert (got - real).abs().max() < 1e-4 * real.abs().max()


def test_a_detached_error_gives_wrong_gradients_upstream(double) -> None:
    """Negative control: the comparison above can fail."""
    first, second = feature_gradients_by_site(double, "detach")
    assert second < 1e-4  # nothing but the real model lies above the last dictionary
    assert first > 0.1


def feature_gradients_by_site(model: Any, error: str) -> list[float]:
    """Relative error of the feature gradients at each of two dictionaries."""
    pairs = torch.tensor(
        feature_gradients(model, SETS["two"](model), error), dtype=torch.float64
    ).reshape(2, -1, 2)
    off = (pairs[..., 0] - pairs[..., 1]).abs().amax(1)
    return (off / pairs[..., 1].abs().amax(1)).tolist()


def test_gradients_upstream_are_the_bare_models(model) -> None:
    names = ["hook_embed", "blocks.0.hook_attn_out", "blocks.1.hook_resid_post"]
    bare = gradients(model, TOKENS, metric, names)
    saes = factories.four_dictionaries(model)
    with splice(model, saes) as spliced:
        got = gradients(spliced, TOKENS, metric, [*names, *map(acts_hook, saes)])
    for name in names:
        assert torch.allclose(got[name], bare[name], atol=1e-5 * float(bare[name].abs().max()))


def test_both_model_classes_agree_at_features() -> None:
    hooked, bridge = (factories.tiny_model("gemma3", backend) for backend in ("hooked", "bridge"))
    saes = factories.four_dictionaries(hooked)
    grads = []
    for model in (hooked, bridge):
        with splice(model, saes) as spliced:
            grads.append(gradients(spliced, TOKENS, metric, list(map(acts_hook, saes))))
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-5 * float(grad.abs().max()))


def test_gradients_at_heads_pass_a_spliced_attention_dictionary(model) -> None:
    name = "blocks.1.attn.hook_z"
    bare = gradients(model, TOKENS, metric, [name])[name]
    with splice(model, factories.attention(model, 1)) as spliced:
        got = gradients(spliced, TOKENS, metric, [name, f"{name}.hook_sae_acts_post"])[name]
    assert got.shape == bare.shape
    assert torch.allclose(got, bare, atol=1e-5 * float(bare.abs().max()))


def test_error_and_features_get_the_gradient_of_the_site(hooked2) -> None:
    """``d m / d e = g`` and ``d m / d f = W_dec g`` with the bare model's ``g`` at the site."""
    sae = factories.residual(hooked2, 1)
    name = output_hook(sae)
    g = gradients(hooked2, TOKENS, metric, [name])[name]
    with splice(hooked2, sae, exclude=()) as spliced:
        hooks = [f"{name}.hook_sae_error", acts_hook(sae)]
        got = gradients(spliced, TOKENS, metric, hooks)
    assert torch.allclose(got[hooks[0]], g, atol=TINY)
    assert torch.allclose(got[hooks[1]], g @ sae.W_dec.T, atol=1e-5)


@pytest.mark.parametrize("listened", [False, True])
@pytest.mark.parametrize("site", ["residual", "transcoder", "attention"])
def test_the_gradient_upstream_of_an_edit_is_that_of_the_edited_model(
    double, site: str, listened: bool
) -> None:
    sae = getattr(factories, site)(double, 1)
    edits = [Scale(features=list(range(0, 96, 2)), factor=3.0), Ablate(features=[1, 3, 5, 7, 9])]
    direction = torch.linspace(-1, 1, 32, dtype=torch.float64)
    names = ["hook_embed", acts_hook(sae)] if listened else ["hook_embed"]
    with splice(double, sae, edits=edits) as spliced:
        got = gradients(spliced, TOKENS, metric, names)["hook_embed"][0] @ direction
        expected = [slope(double, "hook_embed", pos, direction) for pos in (4, 17)]
    bare = [slope(double, "hook_embed", pos, direction) for pos in (4, 17)]
    assert got[[4, 17]].tolist() == pytest.approx(expected, rel=1e-3)
    assert abs(bare[1] - expected[1]) > 1e-2 * abs(expected[1])


@pytest.mark.parametrize("site", ["residual", "transcoder"])
def test_without_the_error_the_gradient_is_that_of_the_reconstruction(double, site: str) -> None:
    sae = getattr(factories, site)(double, 1)
    direction = torch.linspace(-1, 1, 32, dtype=torch.float64)
    with splice(double, sae, error="drop") as spliced:
        got = gradients(spliced, TOKENS, metric, ["hook_embed"])["hook_embed"][0, 17] @ direction
        expected = slope(double, "hook_embed", 17, direction)
    assert float(got) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("site", ["residual", "transcoder"])
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_gradients_through_edits_agree_between_the_classes(site: str, error: str) -> None:
    grads = []
    for backend in ("hooked", "bridge"):
        model = factories.tiny_model("gemma2", backend)
        sae = getattr(factories, site)(factories.tiny_model("gemma2", "hooked"), 1)
        edit = Scale(features=list(range(96)), factor=2.0)
        with splice(model, sae, error=error, edits=edit) as spliced:
            grads.append(gradients(spliced, TOKENS, metric, ["hook_embed"])["hook_embed"])
    assert torch.allclose(*grads, atol=1e-5 * float(grads[0].abs().max()))


def test_a_dictionary_at_the_embedding_gets_gradients(hooked2) -> None:
    sae = factories.dictionary(hooked2, "hook_embed")
    g = gradients(hooked2, TOKENS, metric, ["hook_embed"])["hook_embed"]
    with splice(hooked2, sae, exclude=()) as spliced:
        got = gradients(spliced, TOKENS, metric, [acts_hook(sae)])[acts_hook(sae)]
    assert torch.allclose(got, g @ sae.W_dec.T, atol=1e-5)


def test_dictionaries_collect_no_gradients(hooked2) -> None:
    saes = [copy.deepcopy(sae) for sae in factories.four_dictionaries(hooked2)]
    for sae in saes:
        sae.requires_grad_(True)
    with splice(hooked2, saes) as spliced:
        gradients(spliced, TOKENS, metric, list(map(acts_hook, saes)))
    parameters = [p for module in (*saes, hooked2) for p in module.parameters()]
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("site", ["residual", "transcoder", "attention"])
def test_every_sub_hook_has_a_gradient_with_the_error_kept(model, site: str) -> None:
    """Features and error are leaves; above the features the gradient is the features' own."""
    sae = getattr(factories, site)(model, 1)
    name = output_hook(sae)
    names = [f"{name}.{part}" for part in SUB_HOOKS]
    with splice(model, sae, exclude=()) as spliced:
        got = gradients(spliced, TOKENS, metric, [*names, "hook_embed"])
        _, cache = spliced.run_with_cache(TOKENS, names_filter=names)
    bare = gradients(model, TOKENS, metric, [name, "hook_embed"])
    to_output = flatten_heads(bare[name])
    to_acts = to_output @ sae.W_dec.T
    to_pre = to_acts * (cache[f"{name}.hook_sae_acts_post"] > 0)
    to_input = to_pre @ sae.W_enc.T
    expected = [to_input, to_pre, to_acts, to_output, to_output, to_output]
    for key, value in zip(names, expected, strict=True):
        assert torch.allclose(got[key], value, atol=1e-5 * float(value.abs().max())), key
    assert torch.allclose(got["hook_embed"], bare["hook_embed"], atol=TINY)


def test_leaves_collect_their_gradients(hooked2) -> None:
    """What a forward hook holds on to has a ``.grad`` after the backward pass."""
    sae = factories.residual(hooked2, 1)
    held: dict[str, torch.Tensor] = {}
    parts = ("acts_post", "error")
    hooks = [
        (f"{output_hook(sae)}.hook_sae_{p}", lambda x, hook: held.update({hook.name: x}))
        for p in parts
    ]
    with splice(hooked2, sae) as spliced:
        metric(spliced.run_with_hooks(TOKENS, fwd_hooks=hooks)).backward()
    g = gradients(hooked2, TOKENS, metric, [output_hook(sae)])[output_hook(sae)]
    acts, error = held.values()
    assert acts.grad is not None
    assert error.grad is not None
    assert torch.allclose(acts.grad[:, 1:], (g @ sae.W_dec.T)[:, 1:], atol=1e-5)
    assert torch.allclose(error.grad[:, 1:], g[:, 1:], atol=TINY)
    assert not acts.grad[:, 0].any()


def test_a_gradient_after_the_metric_is_an_error(hooked2) -> None:
    sae = factories.residual(hooked2, 2)
    name = f"{output_hook(sae)}.hook_sae_acts_post"
    with (
        splice(hooked2, sae) as spliced,
        pytest.raises(HookNotFiredError, match=f"No gradient reached {name}"),
    ):
        gradients(spliced, TOKENS, lambda logits: 0 * logits.sum().detach(), [name])
