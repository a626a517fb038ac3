"""The logit lens ends where the model ends, and keeps what the whole distributions would say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemmascope_plugin.causes.exact.logit_lens import logit_lens
from gemmascope_plugin.errors import EmptySelectionError, InputError, TaskError, UnknownNameError
from gemmascope_plugin.models import unembed
from tests.splice.gained_transcoders import folded
from tests.support.largest import LargestTensor
from tests.support.rounding import TINY
from tests.tiny_models import random_tokens

TOKENS = random_tokens(batch=1, length=7, seed=8)


@torch.no_grad()
def distributions(model: Any, layer: int) -> torch.Tensor:
    """Of the residual stream after a layer, by the model's own modules."""
    x = model.run_with_cache(TOKENS)[1][f"blocks.{layer}.hook_resid_post"]
    return model(x, start_at_layer=model.cfg.n_layers).softmax(-1)[0]


@torch.no_grad()
def test_the_last_layer_is_the_model(model) -> None:
    check_last(model)


def test_folded_models(model) -> None:
    check_last(folded(model))


@torch.no_grad()
def check_last(model) -> None:
    lens = logit_lens(model, TOKENS, top_k=4, tokens=[9, "w10"])
    p = model(TOKENS).softmax(-1)[0]
    best = p.topk(4, dim=-1)
    assert torch.equal(lens.ids[-1], best.indices)
    assert torch.allclose(lens.probabilities[-1], best.values, atol=TINY)
    assert torch.allclose(lens.asked_probabilities[-1], p[:, [9, 10]], atol=TINY)
    order = p.argsort(-1, descending=True).argsort(-1) + 1
    assert torch.equal(lens.ranks[-1], order[:, [9, 10]])


def test_earlier_layers_go_through_the_same_end(hooked2, monkeypatch) -> None:
    monkeypatch.setattr(unembed, "TILE", 3 * 100)
    lens = logit_lens(hooked2, TOKENS, layers=[0, -2], positions=[2, -1])
    assert lens.layers == (0, 1)
    assert lens.positions == (2, 6)
    for row, layer in enumerate(lens.layers):
        best = distributions(hooked2, layer)[[2, 6]].topk(5, dim=-1)
        assert torch.equal(lens.ids[row], best.indices)
        assert torch.allclose(lens.probabilities[row], best.values, atol=TINY)


def test_never_more_logits_than_a_tile(hooked2, monkeypatch) -> None:
    whole = logit_lens(hooked2, TOKENS, top_k=50, tokens=[9])
    monkeypatch.setattr(unembed, "TILE", 3 * 100)
    monkeypatch.setattr(unembed, "ROWS", 3)
    with LargestTensor(width=90) as largest:
        lens = logit_lens(hooked2, TOKENS, top_k=50, tokens=[9])
    assert 0 < largest.numel <= 3 * (100 + 50)
    assert torch.equal(lens.ids, whole.ids) and torch.equal(lens.ranks, whole.ranks)


def test_tables_and_figures(hooked2) -> None:
    lens = logit_lens(hooked2, "w9 w8 w7", top_k=2, tokens=["w50"], positions=[1, 3])
    frame = lens.to_frame()
    assert list(frame.columns) == ["layer", "pos", "at", "token", "id", "rank", "probability"]
    assert set(frame["at"]) == {"w9", "w7"}
    last = frame[(frame["layer"] == 2) & (frame["pos"] == 3)]
    assert last["rank"].tolist()[:2] == [1, 2]
    assert "w50" in last["token"].tolist()
    assert last["token"].tolist()[0] == lens.top(2)[0][0]
    figure = lens.plot().data[0]
    assert figure.type == "heatmap"
    assert figure.text[-1][-1] == lens.top(2)[0][0]
    other = lens.plot("w50").data[0]
    assert other.z[0][0] == pytest.approx(float(lens.asked_probabilities[0, 0, 0]))
    assert repr(lens).startswith(
        "LogitLens(3 layers x 2 positions, top 2, after layer 2 at the end"
    )


def test_mistakes(hooked2) -> None:
    with pytest.raises(TaskError, match="2 prompts were given"):
        logit_lens(hooked2, random_tokens(2, 4))
    with pytest.raises(EmptySelectionError, match="no layer 3.*layers 0 to 2"):
        logit_lens(hooked2, TOKENS, layers=[3])
    with pytest.raises(EmptySelectionError, match="No position is chosen"):
        logit_lens(hooked2, TOKENS, positions=[])
    with pytest.raises(InputError, match="top_k=0 is out of range.*from 1.*top_k=5, the default"):
        logit_lens(hooked2, TOKENS, top_k=0)
    lens = logit_lens(hooked2, TOKENS, layers=[1])
    with pytest.raises(UnknownNameError, match="Layer 0 .* was not kept.*layers 1"):
        lens.top(0)
    with pytest.raises(UnknownNameError, match="'w9' was not asked for.*tokens="):
        lens.plot("w9")
