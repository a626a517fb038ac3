"""Passes that make logits at some positions, none, or stop early: what they give is the whole pass's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemmascope_plugin.models.asked import (
    NextTokenLosses,
    asked_positions,
    final_residuals,
    no_logits,
)
from tests.support.rounding import TINY
from tests.tiny_models import random_tokens

TOKENS = random_tokens(batch_size=4, length=9)
AT = torch.tensor([3, 8])
MASK = TOKENS[:, 1:] % 3 > 0


@pytest.fixture(scope="module")
def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)


def test_logits_at_the_position_of_each_prompt(model, logits) -> None:
    rows = torch.arange(4)
    wanted = logits[rows, AT[rows % 2]]
    with torch.no_grad(), asked_positions(model, AT) as readout:
        got = model(TOKENS)
    assert got.shape == (4, 1, model.cfg.d_vocab)
    assert torch.allclose(got[:, 0], wanted, atol=TINY)
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0
    (before,) = readout.before_cap
    capped = cap * torch.tanh(before / cap) if cap > 0 else before
    assert torch.allclose(capped, got, atol=TINY)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), logits)


def test_words_of_each_prompt(model, logits) -> None:
    words = torch.tensor([[5, 6, 7], [8, 8, 9]])
    wanted = logits[torch.arange(4), AT.repeat(2)].gather(-1, words.repeat(2, 1))
    with torch.no_grad(), asked_positions(model, AT, words):
        got = model(TOKENS)
    assert torch.allclose(got[:, 0], wanted, atol=TINY)


@pytest.mark.parametrize("at", [slice(-2, None), [1, 5], [-1]])
def test_the_same_positions_in_every_row(model, logits, at) -> None:
    with torch.no_grad(), asked_positions(model, at):
        got = model(TOKENS)
    assert torch.allclose(got, logits[:, at], atol=TINY)


def test_places_one_by_one(model, logits) -> None:
    rows, at = torch.tensor([0, 0, 3]), torch.tensor([2, 7, 1])
    with torch.no_grad(), asked_positions(model, lambda n: (rows, at)):
        got = model(TOKENS)
    assert torch.allclose(got[:, 0], logits[rows, at], atol=TINY)


def test_gradients_reach_the_hooks_of_the_model(model) -> None:
    def gradient(cut: bool) -> torch.Tensor:
        held = {}

        def start(x: torch.Tensor, hook: Any) -> torch.Tensor:
            held["x"] = x.detach().requires_grad_(True)
            return held["x"]

        with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", start)]):
            if cut:
                with asked_positions(model, AT, torch.tensor([[5], [6]])):
                    value = model(TOKENS)[:, 0, 0]
            else:
                words = torch.tensor([5, 6, 5, 6])
                value = model(TOKENS)[torch.arange(4), AT.repeat(2), words]
        value.sum().backward()
        return held["x"].grad

    wanted = gradient(False)
    assert float(wanted.abs().max()) > 1e-4
    assert torch.allclose(gradient(True), wanted, atol=TINY)


def test_a_hook_at_the_logits_sees_all_of_them(model, logits) -> None:
    seen = []

    def double(x: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return 2 * x

    words = torch.tensor([[5], [6]])
    with torch.no_grad(), model.hooks(fwd_hooks=[("unembed.hook_out", double)]):
        wanted = model(TOKENS)
        with asked_positions(model, AT, words):
            got = model(TOKENS)
        losses = NextTokenLosses(model, TOKENS, MASK)(model)
    assert seen[1] == (4, 1, model.cfg.d_vocab)
    assert torch.allclose(
        got[:, 0], wanted[torch.arange(4), AT.repeat(2)].gather(-1, words.repeat(2, 1)), atol=4e-6
    )
    slow = -wanted[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]
    assert torch.allclose(losses, slow[MASK], atol=1e-5)


def test_losses_and_passes_without_logits(model, logits) -> None:
    slow = -logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]
    with torch.no_grad():
        assert torch.allclose(NextTokenLosses(model, TOKENS, MASK)(model), slow[MASK], atol=1e-5)
        with no_logits(model):
            assert model(TOKENS).numel() == TOKENS.numel()
        with final_residuals(model) as readout:
            model(TOKENS)
        assert readout.normed[0].shape == (*TOKENS.shape, model.cfg.d_model)


def test_blocks_within_blocks_and_errors_leave_the_model_as_it_was(model, logits) -> None:
    with torch.no_grad():
        with asked_positions(model, AT):
            with pytest.raises(ZeroDivisionError), no_logits(model):
                raise ZeroDivisionError
            assert model(TOKENS).shape == (4, 1, model.cfg.d_vocab)
        assert "forward" not in vars(model.unembed)
        assert torch.equal(model(TOKENS), logits)


def test_losses_of_a_second_pass_are_its_own_where_it_differs(model) -> None:
    def changed(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[1, 4:] = 0
        return x

    read = NextTokenLosses(model, TOKENS, MASK)
    first, again = read(model), read(model)
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", changed)]):
        second, slow = read(model), model(TOKENS).detach()
    wanted = -slow[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0][MASK]
    assert torch.equal(first, again)
    assert torch.allclose(second, wanted, atol=1e-5)
    assert not torch.allclose(first, second, atol=1e-3)
