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

TOKENS = random_tokens(batch_size=1, length=7, seed=8)


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
    assert torch.equal(lens.columns["id"][-1, :, :4], best.indices)
    assert torch.allclose(lens.values[-1, :, :4], best.values, atol=TINY)
    assert torch.allclose(lens.values[-1, :, 4:], p[:, [9, 10]], atol=TINY)
    order = p.argsort(-1, descending=True).argsort(-1) + 1
    assert torch.equal(lens.columns["rank"][-1, :, 4:], order[:, [9, 10]])


def test_earlier_layers_go_through_the_same_end(hooked2, monkeypatch) -> None:
    monkeypatch.setattr(unembed, "TILE", 3 * 100)
    lens = logit_lens(hooked2, TOKENS, layers=[0, -2], positions=[2, -1])
    assert lens.axes == ("layer", "pos", "token")
    assert lens.labels["layer"] == (0, 1)
    assert lens.labels["pos"] == (2, 6)
    for row, layer in enumerate(lens.labels["layer"]):
        best = distributions(hooked2, layer)[[2, 6]].topk(5, dim=-1)
        assert torch.equal(lens.columns["id"][row], best.indices)
        assert torch.allclose(lens.values[row], best.values, atol=TINY)


def test_never_more_logits_than_a_tile(hooked2, monkeypatch) -> None:
    whole = logit_lens(hooked2, TOKENS, top_k=50, tokens=[9])
    monkeypatch.setattr(unembed, "TILE", 3 * 100)
    monkeypatch.setattr(unembed, "ROWS", 3)
    with LargestTensor(width=90) as largest:
        lens = logit_lens(hooked2, TOKENS, top_k=50, tokens=[9])
    assert 0 < largest.numel <= 3 * (100 + 50)
    for name in ("id", "rank"):
        assert torch.equal(lens.columns[name], whole.columns[name])


def test_tables_and_figures(hooked2) -> None:
    lens = logit_lens(hooked2, "w9 w8 w7", top_k=2, tokens=["w50"], positions=[1, 3])
    frame = lens.to_frame()
    assert list(frame.columns) == ["layer", "pos", "at", "token", "id", "rank", "probability"]
    assert set(frame["at"]) == {"w9", "w7"}
    last = frame[(frame["layer"] == 2) & (frame["pos"] == 3)]
    assert last["rank"].tolist()[:2] == [1, 2]
    assert "w50" in last["token"].tolist()
    best = lens.at(layer=2, pos=-1).to_frame()
    assert list(best.columns) == ["token", "id", "rank", "probability"]
    assert best["token"].tolist() == last["token"].tolist()
    figure = lens.plot().data[0]
    assert figure.type == "heatmap"
    assert figure.text[-1][-1] == best["token"][0]
    other = lens.at(token="w50").plot()
    assert other.data[0].z[0][0] == pytest.approx(float(lens.values[0, 0, 2]))
    assert other.data[0].text[-1][-1] == best["token"][0]
    assert "probability of 'w50'" in other.layout.title.text
    assert lens.at(layer=2, pos=3).plot().data[0].type == "bar"
    assert repr(lens).startswith(
        "Effects(logit lens, 3 layer x 2 pos x 3 token, after layer 2 at position 3: "
    )
    i = int(lens.columns["id"][0, 0, 2])
    assert torch.equal(lens.at(token=i).values, lens.at(token="w50").values)


def test_a_token_in_the_list_has_one_row(hooked2) -> None:
    best = logit_lens(hooked2, "w9 w8 w7", positions=[3], layers=[2], top_k=3)
    second = int(best.columns["id"][0, 0, 1])
    lens = logit_lens(hooked2, "w9 w8 w7", positions=[3], layers=[2], top_k=3, tokens=[second])
    assert lens.values.shape == (1, 1, 4)
    assert lens.to_frame()["id"].tolist() == best.to_frame()["id"].tolist()


def test_it_has_no_metric(hooked2) -> None:
    with pytest.raises(TaskError, match="is not of a metric"):
        _ = logit_lens(hooked2, TOKENS).share


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
    with pytest.raises(UnknownNameError, match="no layer 0 among.*There is: 1"):
        lens.at(layer=0)
    with pytest.raises(UnknownNameError, match="'w9' was not asked for.*tokens="):
        lens.at(token="w9")
