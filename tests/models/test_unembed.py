"""Logits, losses and divergences in tiles against the model's own logits, all at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gemmascope_plugin.models import readout, unembed
from tests.support.largest import LargestTensor
from tests.support.rounding import TINY
from tests.tiny_models import VOCABULARY, random_tokens

TOKENS = random_tokens(batch_size=3, length=7)
WORDS = torch.tensor([[5, 9], [200, 4], [77, 77]])


@pytest.fixture(params=["one tile", "small tiles"])
def tiled(request, monkeypatch) -> None:
    """Tiles that divide neither the rows nor the unembed."""
    if request.param == "small tiles":
        monkeypatch.setattr(unembed, "TILE", 5 * 37)
        monkeypatch.setattr(unembed, "ROWS", 5)
        monkeypatch.setattr(unembed, "WORDS", 33)


@pytest.fixture(scope="module")
def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """End of the residual stream and the model's own logits."""
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS, names_filter=[last])
    return cache[last], logits


def logits_at(model: Any, resid: torch.Tensor, *, before_cap: bool = False) -> torch.Tensor:
    """All logits of residuals before the final norm."""
    out = unembed.unembedding(model, before_cap=before_cap)
    return unembed.all_logits(out, out.read(resid))


def test_all_logits_and_those_of_some_words(model, run) -> None:
    resid, logits = run
    assert torch.allclose(logits_at(model, resid), logits, atol=TINY)
    out = unembed.unembedding(model)
    some = out.logits_each(out.read(resid[:, -1]), WORDS)
    assert torch.allclose(some, logits[:, -1].gather(-1, WORDS), atol=TINY)
    shared = out.logits(out.read(resid), torch.tensor([3, 250]))
    assert torch.allclose(shared, logits[..., [3, 250]], atol=TINY)


def test_before_the_soft_cap(model, run) -> None:
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0
    before = logits_at(model, run[0], before_cap=True)
    after = cap * torch.tanh(before / cap) if cap > 0 else before
    assert torch.allclose(after, run[1], atol=TINY)


@pytest.mark.usefixtures("tiled")
def test_losses_and_best_words(model, run) -> None:
    resid, logits = run
    log = logits.double().log_softmax(-1)
    losses = readout.cross_entropy(model, resid[:, :-1], TOKENS[:, 1:])
    assert torch.allclose(losses.double(), -log[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0])
    out = unembed.unembedding(model)
    last = readout.OfResiduals(out, out.read(resid[:, -1]))
    picked = last.log_probs(WORDS)
    assert torch.allclose(picked.double(), log[:, -1].gather(-1, WORDS), atol=1e-5)
    best, ids, normaliser = last.top(12)
    values, places = log[:, -1].topk(12)
    assert torch.equal(ids, places)
    assert torch.allclose((best - normaliser[:, None]).double(), values, atol=1e-5)


@pytest.mark.usefixtures("tiled")
def test_divergence(model, run) -> None:
    resid, logits = run
    p, q = logits[:1].double().log_softmax(-1), logits.double().log_softmax(-1)
    slow = (p.exp() * (p - q)).sum(-1)
    out = unembed.unembedding(model)
    fast = unembed.divergence(out, out.read(resid[:1]), out.read(resid))
    assert torch.equal(fast[0], torch.zeros(7))
    assert torch.allclose(fast.double(), slow, atol=TINY)
    assert fast[1:, 1:].min() > 1e-3


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("quantity", ["loss", "divergence", "mean", "logits"])
def test_gradients(model, run, quantity: str) -> None:
    resid = run[0][:, :-1]
    weights = torch.randn(resid.shape[:-1], generator=torch.Generator().manual_seed(1))

    def fast(x: torch.Tensor) -> torch.Tensor:
        if quantity == "loss":
            return readout.cross_entropy(model, x, TOKENS[:, 1:])
        out = unembed.unembedding(model)
        if quantity == "divergence":
            return unembed.divergence(out, out.read(resid[:1]), out.read(x))
        if quantity == "mean":
            return unembed.mean_logit(out, out.read(x))
        return logits_at(model, x)[..., 3:9].square().sum(-1)

    def slow(x: torch.Tensor) -> torch.Tensor:
        logits = _slow_logits(model, x)
        log = logits.log_softmax(-1)
        if quantity == "loss":
            return -log.gather(-1, TOKENS[:, 1:, None])[..., 0]
        if quantity == "divergence":
            p = log[:1].detach()
            return (p.exp() * (p - log)).sum(-1)
        return logits.mean(-1) if quantity == "mean" else logits[..., 3:9].square().sum(-1)

    pairs = []
    for fn in (fast, slow):
        x = resid.clone().requires_grad_(True)
        value = fn(x)
        (value * weights.to(value.dtype)).sum().backward()
        pairs.append((value.detach(), x.grad))
    (value, gradient), (other, wanted) = pairs
    assert wanted is not None and float(wanted.abs().max()) > 1e-5
    scale = float(wanted.abs().max())
    assert torch.allclose(value, other.to(value.dtype), atol=TINY, rtol=1e-5)
    assert torch.allclose(gradient, wanted, atol=1e-5 * scale)


def _slow_logits(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The model's own modules on one row at a time."""
    logits = model.unembed(model.ln_final(x))
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits


@pytest.mark.usefixtures("tiled")
def test_in_bfloat16_the_weights_are_read_and_nothing_else_is_rounded(model, run) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    wide = copy.deepcopy(half).to(torch.float32)
    x = run[0].bfloat16()
    for function, args in ((readout.cross_entropy, (TOKENS,)), (logits_at, ())):
        got, wanted = (function(m, y, *args) for m, y in ((half, x), (wide, x.float())))
        assert got.dtype == torch.float32
        # the gain of the norm is added up in bfloat16 on one of the classes
        assert torch.allclose(got, wanted, atol=2e-2)
    # what the model itself says carries eight bits
    assert torch.allclose(logits_at(half, x), _slow_logits(half, x).float(), atol=0.1)


def test_words_in_the_other_layout_and_a_bias(hooked2) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(hooked2)
    weight = other.unembed.W_U.data
    other.unembed.W_U.data = weight.contiguous()
    assert other.unembed.W_U.stride() != weight.T.contiguous().T.stride()
    assert torch.allclose(logits_at(other, x), logits_at(hooked2, x), atol=TINY)
    other.unembed.b_U.data = torch.linspace(-1, 1, VOCABULARY)
    assert torch.allclose(logits_at(other, x), _slow_logits(other, x[None])[0], atol=TINY)
    targets = torch.tensor([0, 1, 2, 255])
    slow = torch.nn.functional.cross_entropy(
        _slow_logits(other, x[None])[0], targets, reduction="none"
    )
    assert torch.allclose(readout.cross_entropy(other, x, targets), slow, atol=1e-5)


def test_overflow_of_exponentials_and_nan() -> None:
    from gemmascope_plugin.models.points import Norm

    out = unembed.Unembedding(torch.eye(4), None, None, Norm(None, 0.0))
    x = torch.tensor([[1e4, 0.0, 0.0, -1e4], [0.0, float("nan"), 0.0, 0.0]])
    lse = unembed.log_normaliser(out, x)
    assert float(lse[0]) == 1e4
    assert bool(lse[1].isnan())


@pytest.mark.parametrize("quantity", ["log_probs", "divergence_from", "top"])
def test_no_tensor_of_all_logits_is_ever_made(model, run, quantity: str, monkeypatch) -> None:
    monkeypatch.setattr(unembed, "TILE", 4 * VOCABULARY)
    x = run[0].flatten(0, 1).clone().requires_grad_(quantity != "top")
    out = unembed.unembedding(model)
    with LargestTensor(width=VOCABULARY // 8) as largest:
        rows = readout.OfResiduals(out, out.read(x))
        argument: Any = {"log_probs": TOKENS.flatten()[:, None], "divergence_from": rows}
        value = getattr(rows, quantity)(argument.get(quantity, 3))
        if x.requires_grad:
            value.sum().backward()
    assert 0 < largest.numel <= 4 * VOCABULARY, largest.shape
