"""A Tree SAE in a model: against plain PyTorch, on both model classes.

The reference encodes and decodes with a formula of its own; deviations are the token's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import FeatureIndexError, ModelError, UnknownNameError
from gemmascope_plugin.models import gradients
from gemmascope_plugin.saes import TreeSAE, TreeSAEConfig
from gemmascope_plugin.splice import Ablate, Add, Clamp, HookedSAE, Project, Scale, splice, verify
from gemmascope_plugin.splice.pass_features import SUB_HOOKS
from tests import factories
from tests.splice.kinds import TWO_KINDS
from tests.support.rounding import TINY
from tests.tiny_models import FIRST_WORD_ID, random_tokens

TOKENS = random_tokens()
KEEP = TOKENS >= FIRST_WORD_ID
SITE = "blocks.1.hook_resid_post"
SIZES, K = (8, 24), (3, 4)
N = sum(SIZES)


@cache
def tree(dtype: str = "float32") -> TreeSAE:
    rng = torch.Generator().manual_seed(5)
    cfg = TreeSAEConfig(d_in=32, d_sae=N, features_per_layer=SIZES, k_per_layer=K, dtype=dtype)
    cfg.metadata.hook_name, cfg.metadata.model_name = SITE, "tiny"
    sae = TreeSAE(cfg)
    decoder = torch.nn.functional.normalize(torch.randn(N, 32, generator=rng), dim=-1)
    above = torch.randint(-1, SIZES[0], (SIZES[1],), generator=rng)
    state = {"W_enc": decoder.T, "W_dec": decoder, "b_dec": torch.randn(32, generator=rng) / 5}
    sae.load_state_dict({**state, "parent": torch.cat([torch.full((SIZES[0],), -1), above])})
    return sae.requires_grad_(False).eval()


def units(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    return mean, ((x - mean).pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()


def slow_features(sae: TreeSAE, x: torch.Tensor, n_layers: int = 2) -> torch.Tensor:
    """Top-k of each layer by the rank of every open pre-activation; differentiable."""
    mean, std = units(x)
    pre = ((x - mean) / (std + 1e-5) - sae.b_dec) @ sae.W_enc
    blocks: list[torch.Tensor] = []
    start = 0
    for size, k in list(zip(SIZES, K, strict=True))[:n_layers]:
        gate = torch.ones_like(pre[..., start : start + size])
        for i in range(size) if start else ():
            if (p := int(sae.parent[start + i])) >= 0:
                gate[..., i] = (blocks[0][..., p] > 1e-3).to(pre.dtype)
        gated = pre[..., start : start + size] * gate
        rank = (gated[..., None, :] > gated[..., :, None]).sum(-1)
        blocks.append(gated * (rank < k) * (gated > 0))
        start += size
    return torch.cat(blocks, -1)


def slow_decode(sae: TreeSAE, acts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    mean, std = units(x)
    return (acts @ sae.W_dec[: acts.shape[-1]] + sae.b_dec) * std + mean


def with_tensor(model: Any, change: Any) -> torch.Tensor:
    """Logits of the bare model with the site's tensor changed at ordinary tokens."""

    def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where(KEEP[: len(x), :, None], change(x), x)

    with model.hooks(fwd_hooks=[(SITE, hook)]):
        return model(TOKENS)


def edited(acts: torch.Tensor) -> torch.Tensor:
    """What EDITS do."""
    acts = acts.clone()
    acts[..., 2] = 0
    acts[..., [9, 12]] = acts[..., [9, 12]] * 3
    acts[..., 20] += 1.5
    return acts


EDITS = (Ablate(features=2), Scale(features=[9, 12], factor=3.0), Add(features=20, amount=1.5))


@torch.no_grad()
def test_with_the_error_dropped_it_is_the_reference(model) -> None:
    sae = tree()
    with splice(model, sae, error="drop") as spliced:
        logits, cache = spliced.run_with_cache(TOKENS)
        assert torch.allclose(spliced(TOKENS), logits, atol=1e-5)
    expected = with_tensor(model, lambda x: slow_decode(sae, slow_features(sae, x), x))
    assert torch.allclose(logits, expected, atol=1e-5)
    assert (expected - model(TOKENS)).abs().max() > 1e-2
    acts, x = cache[f"{SITE}.hook_sae_acts_post"], cache[SITE]
    assert torch.allclose(acts, slow_features(sae, x) * KEEP[..., None], atol=1e-5)
    assert (acts[:, 1:] > 0).any(-1).all() and not acts[:, 0].any()
    assert torch.equal(cache[f"{SITE}.hook_sae_output"][:, 0], x[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("error", ["keep", "detach"])
def test_with_the_error_kept_the_model_is_its_own(model, error) -> None:
    bare = model(TOKENS)
    with splice(model, tree(), error=error) as spliced:
        assert torch.allclose(spliced(TOKENS), bare, atol=1e-5)
        logits, cache = spliced.run_with_cache(TOKENS)
    assert torch.allclose(logits, bare, atol=1e-5)
    whole = cache[f"{SITE}.hook_sae_recons"] + cache[f"{SITE}.hook_sae_error"]
    assert torch.allclose(whole[:, 1:], cache[SITE][:, 1:], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("listened", [False, True])
@pytest.mark.parametrize("error", ["keep", "drop", "detach"])
def test_edits(model, error, listened: bool) -> None:
    """Each edited feature adds ``(a' - a) * W_dec * std``; with the error dropped ``D(a')`` flows."""
    sae = tree()

    def change(x: torch.Tensor) -> torch.Tensor:
        acts = slow_features(sae, x)
        new = slow_decode(sae, edited(acts), x)
        return new if error == "drop" else x + new - slow_decode(sae, acts, x)

    names = [f"{SITE}.hook_sae_acts_post"] if listened else ["hook_embed"]
    with splice(model, sae, error=error, edits=EDITS) as spliced:
        logits, _ = spliced.run_with_cache(TOKENS, names_filter=names)
    expected = with_tensor(model, change)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert (expected - model(TOKENS)).abs().max() > 1e-2


@torch.no_grad()
@TWO_KINDS
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_a_hook_on_features_is_an_edit(model, error) -> None:
    def hook(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        return edited(acts) * KEEP[..., None]

    with splice(model, tree(), error=error, edits=EDITS) as spliced:
        expected = spliced(TOKENS)
    with splice(model, tree(), error=error) as spliced:
        hooks = [(f"{SITE}.hook_sae_acts_post", hook)]
        assert torch.allclose(spliced.run_with_hooks(TOKENS, fwd_hooks=hooks), expected, atol=1e-5)


@torch.no_grad()
@TWO_KINDS
def test_gates_follow_a_hook_on_pre_activations_but_not_an_edit(model) -> None:
    sae = tree()
    name = f"{SITE}.hook_sae_acts_post"
    with splice(model, sae) as spliced:
        clean = spliced.run_with_cache(TOKENS, names_filter=name)[1][name]
    parent = int(clean[..., : SIZES[0]].sum((0, 1)).argmax())
    children = sae.children_of(parent)
    assert clean[..., children].any()

    def close(pre: torch.Tensor, hook: Any) -> torch.Tensor:
        pre = pre.clone()
        pre[..., parent] = 0
        return pre

    with splice(model, sae) as spliced:
        hooks = [(f"{SITE}.hook_sae_acts_pre", close)]
        with spliced.hooks(fwd_hooks=hooks):
            closed = spliced.run_with_cache(TOKENS, names_filter=name)[1][name]
    with splice(model, sae, edits=Ablate(features=parent)) as spliced:
        ablated = spliced.run_with_cache(TOKENS, names_filter=name)[1][name]
    assert not closed[..., [parent, *children]].any()
    assert not ablated[..., parent].any()
    assert torch.equal(ablated[..., children], clean[..., children])


@torch.no_grad()
@TWO_KINDS
@pytest.mark.parametrize("error", ["keep", "drop", "detach"])
def test_a_hook_on_the_input_changes_the_deviation_along_with_the_features(model, error) -> None:
    sae = tree()

    def move(x: torch.Tensor) -> torch.Tensor:
        return 2 * x + torch.linspace(-1, 1, x.shape[-1])

    def change(x: torch.Tensor) -> torch.Tensor:
        new = slow_decode(sae, slow_features(sae, move(x)), move(x))
        return new if error == "drop" else x + new - slow_decode(sae, slow_features(sae, x), x)

    with splice(model, sae, error=error) as spliced:
        hooks = [(f"{SITE}.hook_sae_input", lambda x, hook: move(x))]
        logits = spliced.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert torch.allclose(logits, with_tensor(model, change), atol=1e-4)


def metric(logits: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return (logits[:, -1] * weights).sum()


def test_feature_gradients_with_the_error_kept(model) -> None:
    """``W_dec[i] * std`` of the token times the bare model's own gradient, and nothing changes above."""
    sae = tree()
    bare = gradients(model, TOKENS, metric, [SITE, "hook_embed"])
    names = [f"{SITE}.{part}" for part in SUB_HOOKS]
    with splice(model, sae, exclude=()) as spliced:
        got = gradients(spliced, TOKENS, metric, [*names, "hook_embed"])
        _, cache = spliced.run_with_cache(TOKENS, names_filter=[*names, SITE])
    _, std = units(cache[SITE])
    to_acts = bare[SITE] * std @ sae.W_dec.T
    to_pre = to_acts * (cache[names[2]] > 0)
    leaf = cache[SITE].clone().requires_grad_(True)
    slow_features(sae, leaf).backward(to_acts)
    assert leaf.grad is not None
    site = bare[SITE]
    expected = [leaf.grad, to_pre, to_acts, site, site, site]
    for name, value in zip(names, expected, strict=True):
        assert torch.allclose(got[name], value, atol=1e-5 * float(value.abs().max())), name
    assert torch.allclose(got["hook_embed"], bare["hook_embed"], atol=TINY)


@pytest.mark.parametrize("listened", [False, True])
@pytest.mark.parametrize("error", ["keep", "drop", "detach"])
def test_gradients_upstream_are_those_of_the_reference(double, error, listened: bool) -> None:
    """Through features and deviation alike, edited or not."""
    sae = tree("float64")

    def change(x: torch.Tensor) -> torch.Tensor:
        acts = slow_features(sae, x)
        new, real = slow_decode(sae, edited(acts), x), slow_decode(sae, acts, x)
        return {"drop": new, "keep": x + new - real, "detach": (x - real).detach() + new}[error]

    def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where(KEEP[..., None], change(x), x)

    names = ["hook_embed", f"{SITE}.hook_sae_acts_post"] if listened else ["hook_embed"]
    with splice(double, sae, error=error, edits=EDITS) as spliced:
        got = gradients(spliced, TOKENS, metric, names)["hook_embed"]
    with double.hooks(fwd_hooks=[(SITE, hook)]):
        expected = gradients(double, TOKENS, metric, ["hook_embed"])["hook_embed"]
    bare = gradients(double, TOKENS, metric, ["hook_embed"])["hook_embed"]
    assert torch.allclose(got, expected, atol=1e-8 * float(expected.abs().max()))
    assert (expected - bare).abs().max() > 1e-2 * bare.abs().max()


@torch.no_grad()
@TWO_KINDS
@pytest.mark.parametrize("level", [0, 1, -1])
def test_a_level_is_the_tree_of_its_first_layers(model, level: int) -> None:
    sae, n_layers = tree(), level % 2 + 1
    hooked = HookedSAE(sae, error="drop", level=level)
    assert hooked.d_sae == sum(SIZES[:n_layers])
    with splice(model, hooked) as spliced:
        logits = spliced(TOKENS)
    expected = with_tensor(model, lambda x: slow_decode(sae, slow_features(sae, x, n_layers), x))
    assert torch.allclose(logits, expected, atol=1e-5)


@torch.no_grad()
def test_beside_another_dictionary(hooked2) -> None:
    other = factories.residual(hooked2, 1)
    with splice(
        hooked2, [tree(), other], edits=Clamp(features=3, value=2.0, sae=tree())
    ) as spliced:
        logits = spliced(TOKENS)
    sae = tree()

    def change(x: torch.Tensor) -> torch.Tensor:
        return x + (2.0 - slow_features(sae, x)[..., 3:4]) * sae.W_dec[3] * units(x)[1]

    assert torch.allclose(logits, with_tensor(hooked2, change), atol=1e-5)


@torch.no_grad()
def test_projection_needs_no_deviation(hooked2) -> None:
    sae = tree()
    with splice(hooked2, sae, edits=Project(features=3, factor=0.0)) as spliced:
        _, cache = spliced.run_with_cache(TOKENS, names_filter=f"{SITE}.hook_sae_output")
    assert (cache[f"{SITE}.hook_sae_output"][:, 1:] @ sae.W_dec[3]).abs().max() < 1e-5


def test_refusals(hooked2) -> None:
    with pytest.raises(ModelError, match="two_stage=True is for JumpReLU.*two_stage=False"):
        HookedSAE(tree(), two_stage=True)
    with pytest.raises(UnknownNameError, match="no level 2.*level 0: 8 features, level 1: 32"):
        HookedSAE(tree(), level=2)
    with (
        pytest.raises(FeatureIndexError, match="Feature 32 does not exist"),
        splice(hooked2, tree(), edits=Ablate(features=N)),
    ):
        pass
    hooked = HookedSAE(tree(), error="drop")
    x = torch.ones(1, 2, 32)
    x[0, 1, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN or infinity.*keep="):
        hooked(x, x, torch.ones(1, 2, dtype=torch.bool))
    hooked(x, x, torch.tensor([[True, False]]))


@torch.no_grad()
def test_what_verify_measures(hooked2) -> None:
    sae = tree()
    x = factories.activations(hooked2, TOKENS, SITE)[KEEP]
    report = verify(hooked2, sae, TOKENS)
    acts = slow_features(sae, x)
    assert report.l0 == pytest.approx(float((acts > 0).sum(-1).float().mean()))
    unexplained = (x - slow_decode(sae, acts, x)).pow(2).sum()
    assert report.fvu == pytest.approx(float(unexplained / (x - x.mean(0)).pow(2).sum()), rel=1e-4)
