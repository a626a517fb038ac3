"""Logits against transformers: what is reported, and that every wrong setting is seen."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.models import Parity, load_model, parity
from gemmascope_plugin.models.load_model import hooked_from_hf
from gemmascope_plugin.models.parity import BEYOND, KEPT, fixed_tokens, last_logits
from tests.factories import tiny_hf, tiny_tokenizer
from tests.tiny_models import BOS_ID, random_tokens


def test_models_agree_far_below_the_tolerance(model, hf) -> None:
    report = parity(model, hf, random_tokens(length=80))
    assert isinstance(report, Parity) and report.ok and report.check() is report
    assert report.max_logit_difference < 1e-5 < report.tolerance and report.tokens == 80


@torch.no_grad()
def test_the_compared_logits_are_the_last_ones(model, hf) -> None:
    tokens = random_tokens(length=80)
    torch.testing.assert_close(last_logits(hf, tokens), hf(tokens).logits[:, -KEPT:])
    short = random_tokens(length=5)
    assert parity(model, hf, short).ok and last_logits(hf, short).shape[1] == 5


def test_the_fixed_sequence_is_longer_than_the_window_and_holds_words_only() -> None:
    config = tiny_hf("gemma2").config
    tokens = fixed_tokens(config)
    assert tokens.shape == (1, config.sliding_window + BEYOND) and tokens[0, 0] == BOS_ID
    assert tokens[0, 1:].min() >= 32 and tokens.max() < config.vocab_size
    assert torch.equal(tokens, fixed_tokens(config))
    config = copy.deepcopy(config)
    config.max_position_embeddings = 40
    assert fixed_tokens(config).shape == (1, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_model_reports_it(kind, tmp_path, dtype) -> None:
    tiny_hf(kind[0]).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path, backend=kind[1], dtype=dtype, check_parity=True)
    report = model.gemmascope_parity
    assert report.ok and report.tokens == 80
    assert report.max_logit_difference < 0.5 * report.tolerance
    assert not hasattr(load_model(tmp_path, backend=kind[1], dtype=dtype), "gemmascope_parity")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["window", "attention cap", "post-norm", "rotary base"])
def test_wrong_settings_are_seen(fault: str, dtype) -> None:
    hf = copy.deepcopy(tiny_hf("gemma2")).to(dtype)
    wrong = copy.deepcopy(hf)
    if fault == "window":
        wrong.config.sliding_window = 8
    elif fault == "attention cap":
        wrong.config.attn_logit_softcapping = 0.5
    elif fault == "post-norm":
        wrong.model.layers[1].post_feedforward_layernorm.weight.zero_()
    else:
        wrong.config.rope_parameters = {**wrong.config.rope_parameters, "rope_theta": 100.0}
    model = hooked_from_hf(wrong, tiny_tokenizer(), "tiny")
    report = parity(model, hf, fixed_tokens(hf.config))
    assert not report.ok
    with pytest.raises(ModelError, match="Logits differ from transformers' by .* on 80 tokens"):
        report.check()


def test_load_model_raises_when_the_comparison_fails(tmp_path, monkeypatch) -> None:
    load = importlib.import_module("gemmascope_plugin.models.load_model")

    tiny_hf("gemma2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    right = load.hooked_config

    def wrong(config, name):
        made = right(config, name)
        made.output_logits_soft_cap = -1.0
        return made

    monkeypatch.setattr(load, "hooked_config", wrong)
    with pytest.raises(ModelError, match="Logits differ"):
        load_model(tmp_path, check_parity=True)
    assert load_model(tmp_path) is not None  # only on request


def test_nan_is_not_parity() -> None:
    assert not Parity(max_logit_difference=float("nan"), tokens=1, tolerance=1.0).ok
