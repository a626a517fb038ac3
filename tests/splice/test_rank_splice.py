"""Top-k dictionaries and SoftSAEs in a model: against plain PyTorch that ranks every pre-activation."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig

from gemmascope_plugin import saes
from gemmascope_plugin.errors import ModelError, UnknownNameError
from gemmascope_plugin.models import gradients
from gemmascope_plugin.saes import SoftSAE, SoftSAEConfig
from gemmascope_plugin.splice import Ablate, Add, HookedSAE, Scale, splice, verify
from tests.splice.kinds import TWO_KINDS
from tests.support.rounding import TINY
from tests.tiny_models import FIRST_WORD_ID, random_tokens

TOKENS = random_tokens()
KEEP = TOKENS >= FIRST_WORD_ID
SITE = "blocks.1.hook_resid_post"
N, K = 40, 5
ACTS = f"{SITE}.hook_sae_acts_post"
EDITS = (Ablate(features=2), Scale(features=[9, 12], factor=3.0), Add(features=20, amount=1.5))
BOTH = pytest.mark.parametrize("name", ["topk", "soft", "soft, standardised"])


@cache
def dictionary(name: str, dtype: str = "float32", subtract: bool = True) -> Any:
    """One with random weights; the soft one's budgets lie between 1 and 10."""
    common: dict[str, Any] = {"d_in": 32, "d_sae": N, "k": K, "dtype": dtype}
    common["apply_b_dec_to_input"] = subtract
    if "standardised" in name:
        common["normalize_activations"] = "layer_norm"
    sae: Any = (
        TopKSAE(TopKSAEConfig(**common)) if name == "topk" else SoftSAE(SoftSAEConfig(**common))
    )
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = SITE, "tiny"
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / 2)
    return sae


def limits(sae: Any, seen: torch.Tensor) -> torch.Tensor:
    """How many features each token may have."""
    if isinstance(sae, TopKSAE):
        return torch.full(seen.shape[:-1], K)
    first, _, last, _ = sae.k_estimator
    hidden = torch.relu(seen @ first.weight.T + first.bias)
    score = (hidden @ last.weight.T + last.bias)[..., 0]
    return (2 * K / (1 + torch.exp(-score))).clamp(min=1).floor()


def units(sae: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation that are taken off; 0 and 1 for none."""
    if sae.cfg.normalize_activations == "none":
        return torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    return mean, ((x - mean).pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()


def slow_features(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """Each pre-activation stays if fewer than the limit are larger; differentiable."""
    mean, std = units(sae, x)
    x = (x - mean) / (std + (1e-5 if sae.cfg.normalize_activations != "none" else 0))
    seen = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    pre = seen @ sae.W_enc + sae.b_enc
    rank = (pre[..., None, :] > pre[..., :, None]).sum(-1)
    return pre * (rank < limits(sae, seen)[..., None]) * (pre > 0)


def slow_decode(sae: Any, acts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    mean, std = units(sae, x)
    return (acts @ sae.W_dec + sae.b_dec) * std + mean


def with_tensor(model: Any, change: Any) -> torch.Tensor:
    """Logits of the bare model with the site's tensor changed at ordinary tokens."""

    def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where(KEEP[..., None], change(x), x)

    with model.hooks(fwd_hooks=[(SITE, hook)]):
        return model(TOKENS)


def edited(acts: torch.Tensor) -> torch.Tensor:
    """What EDITS do."""
    acts = acts.clone()
    acts[..., 2] = 0
    acts[..., [9, 12]] = acts[..., [9, 12]] * 3
    acts[..., 20] += 1.5
    return acts


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("subtract", [False, True])
def test_with_the_error_dropped_it_is_the_reference(hooked2, name: str, subtract: bool) -> None:
    sae = dictionary(name, subtract=subtract)
    with splice(hooked2, sae, error="drop") as spliced:
        logits, cache = spliced.run_with_cache(TOKENS)
    expected = with_tensor(hooked2, lambda x: slow_decode(sae, slow_features(sae, x), x))
    assert torch.allclose(logits, expected, atol=1e-5)
    assert (expected - hooked2(TOKENS)).abs().max() > 1e-2
    acts, x = cache[ACTS], cache[SITE]
    assert torch.allclose(acts, slow_features(sae, x) * KEEP[..., None], atol=1e-5)
    torch.testing.assert_close(sae.encode(x) * KEEP[..., None], acts)
    if name != "soft, standardised":
        torch.testing.assert_close(sae.decode(acts), cache[f"{SITE}.hook_sae_recons"])
    counts = (acts > 0).sum(-1)[KEEP]
    assert counts.max() <= 2 * K and (name == "topk" or len(counts.unique()) > 3)


@torch.no_grad()
@TWO_KINDS
@BOTH
@pytest.mark.parametrize("error", ["keep", "drop", "detach"])
def test_edits_change_what_they_name(model, name: str, error: Any) -> None:
    sae = dictionary(name)

    def change(x: torch.Tensor) -> torch.Tensor:
        acts = slow_features(sae, x)
        new = slow_decode(sae, edited(acts), x)
        return new if error == "drop" else x + new - slow_decode(sae, acts, x)

    with splice(model, sae, error=error, edits=EDITS) as spliced:
        logits = spliced(TOKENS)
    assert torch.allclose(logits, with_tensor(model, change), atol=1e-5)
    with splice(model, sae, error="keep") as spliced:
        assert torch.equal(spliced(TOKENS), model(TOKENS))


@torch.no_grad()
@BOTH
def test_a_hook_on_pre_activations_lets_others_in_and_keeps_the_budget(hooked2, name: str) -> None:
    sae = dictionary(name)

    def close(pre: torch.Tensor, hook: Any) -> torch.Tensor:
        return pre.clone().index_fill_(-1, torch.tensor([best]), -1.0)

    with splice(hooked2, sae) as spliced:
        clean = spliced.run_with_cache(TOKENS, names_filter=ACTS)[1][ACTS]
        best = int(clean.sum((0, 1)).argmax())
        with spliced.hooks(fwd_hooks=[(f"{SITE}.hook_sae_acts_pre", close)]):
            closed = spliced.run_with_cache(TOKENS, names_filter=ACTS)[1][ACTS]
    freed = clean[..., best] > 0
    assert freed.any() and not closed[..., best].any()
    assert torch.equal((closed > 0).sum(-1)[freed], (clean > 0).sum(-1)[freed])
    assert torch.allclose(closed[~freed], clean[~freed], atol=TINY * float(clean.max()))


@BOTH
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_gradients_are_those_of_the_reference(double, name: str, error: Any) -> None:
    sae = dictionary(name, "float64")

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1] * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).sum()

    def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
        acts = slow_features(sae, x)
        new = slow_decode(sae, edited(acts), x)
        new = new if error == "drop" else x + new - slow_decode(sae, acts, x)
        return torch.where(KEEP[..., None], new, x)

    with splice(double, sae, error=error, edits=EDITS) as spliced:
        got = gradients(spliced, TOKENS, metric, ["hook_embed"])["hook_embed"]
    with double.hooks(fwd_hooks=[(SITE, hook)]):
        expected = gradients(double, TOKENS, metric, ["hook_embed"])["hook_embed"]
    assert torch.allclose(got, expected, atol=1e-8 * float(expected.abs().max()))


@torch.no_grad()
def test_what_verify_measures(hooked2) -> None:
    sae = dictionary("soft")
    report = verify(hooked2, sae, TOKENS)
    _, cache = hooked2.run_with_cache(TOKENS, names_filter=SITE)
    acts = slow_features(sae, cache[SITE][KEEP])
    assert report.l0 == pytest.approx(float((acts > 0).sum(-1).float().mean()))


def test_refusals() -> None:
    soft = dictionary("soft")
    with pytest.raises(ModelError, match="two_stage=True is for JumpReLU.*selects by rank"):
        HookedSAE(soft, two_stage=True)
    for sae in (soft, dictionary("topk")):
        with pytest.raises(UnknownNameError, match=f"no level 0.*one dictionary of {N} features"):
            HookedSAE(sae, level=0)
    hooked = HookedSAE(soft, error="drop")
    x = torch.ones(1, 2, 32)
    x[0, 1, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN or infinity.*keep="):
        hooked(x, x, torch.ones(1, 2, dtype=torch.bool))
    hooked(x, x, torch.tensor([[True, False]]))


def test_what_is_left_to_fold_is_refused_and_folding_it_helps() -> None:
    rescaled = TopKSAE(TopKSAEConfig(d_in=32, d_sae=N, k=K, rescale_acts_by_decoder_norm=True))
    rescaled.cfg.metadata.hook_name = SITE
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rescaled.W_dec *= torch.linspace(0.5, 2, N)[:, None]
        before = rescaled(x)
    with pytest.raises(ModelError, match=r"times the norms.*sae.fold_W_dec_norm\(\), then"):
        HookedSAE(rescaled)
    rescaled.fold_W_dec_norm()
    rescaled.cfg.rescale_acts_by_decoder_norm = False
    coder = HookedSAE(rescaled).weights
    out = saes.reconstruct(coder, coder.encode_sparse(x).to_dense(), x)
    torch.testing.assert_close(out, before.detach())
    scaled = SoftSAE(
        SoftSAEConfig(d_in=32, d_sae=N, k=K, normalize_activations="expected_average_only_in")
    )
    scaled.cfg.metadata.hook_name = SITE
    with pytest.raises(ModelError, match=r"normalises its input.*fold_activation_norm_scaling"):
        HookedSAE(scaled)
    scaled.fold_activation_norm_scaling_factor(2.0)
    assert HookedSAE(scaled).d_sae == N
