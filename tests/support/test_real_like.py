"""The fixture has the statistics it is there for."""

from __future__ import annotations

import copy

import torch

from tests.support.real_like import BIG, BOS, END, hf_model, real_like, vocabulary


def _tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(END + 1, len(vocabulary()), (8, 20), generator=generator)
    tokens[:, 0] = BOS
    return tokens


def test_the_stream_is_long_and_mostly_its_mean() -> None:
    _, cache = real_like().run_with_cache(_tokens())
    stream = cache["blocks.3.hook_resid_post"][:, 1:].flatten(0, 1).double()
    mean = stream.mean(0)
    assert 8e4 < float(stream.norm(dim=-1).median()) < 3e5
    assert 0.9 < float(mean.pow(2).sum() / stream.pow(2).sum(1).mean()) < 0.98
    assert float(mean[list(BIG)].pow(2).sum() / mean.pow(2).sum()) > 0.7


def test_both_classes_are_the_transformers_model() -> None:
    expected = hf_model()(_tokens()).logits
    for backend in ("hooked", "bridge"):
        assert (real_like(backend)(_tokens()) - expected).abs().max() < 1e-3


def test_float16_overflows_and_bfloat16_does_not() -> None:
    for dtype, is_finite in ((torch.float16, False), (torch.bfloat16, True)):
        logits = copy.deepcopy(hf_model()).to(dtype)(_tokens()).logits
        assert bool(torch.isfinite(logits).all()) is is_finite
