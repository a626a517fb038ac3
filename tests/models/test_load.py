"""Models from a Hugging Face folder: the same logits as transformers on both classes."""

from __future__ import annotations

import json

import pytest
import torch

from gemmascope_plugin.errors import MissingFileError, ModelError, UnknownNameError
from gemmascope_plugin.models import load_model
from tests.factories import tiny_hf, tiny_tokenizer, unchecked
from tests.tiny_models import gemma2, random_tokens


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    target = tmp_path_factory.mktemp("model")
    tiny_hf(kind[0]).save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def loaded(kind, folder):
    return load_model(folder, backend=kind[1])


@torch.no_grad()
def test_logits_are_those_of_transformers(loaded, hf) -> None:
    tokens = random_tokens(length=40)
    assert (loaded(tokens) - hf(tokens).logits).abs().max() < 5e-6


def test_the_model_is_frozen_and_in_eval_mode(loaded) -> None:
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_the_tokenizer_comes_along(loaded) -> None:
    assert loaded.to_tokens("w5 w6").tolist() == [[2, 5, 6]]


def test_loading_prints_nothing(kind, folder, capsys) -> None:
    load_model(folder, backend=kind[1])
    assert capsys.readouterr().out == ""


@torch.no_grad()
def test_bfloat16_weights_give_bfloat16_logits_near_the_real_ones(kind, folder, hf) -> None:
    model = load_model(folder, backend=kind[1], dtype=torch.bfloat16)
    tokens = random_tokens()
    logits = model(tokens)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits.dtype == torch.bfloat16
    reference = hf(tokens).logits
    assert (logits.float() - reference).abs().max() < 0.2 * reference.std()


def test_one_key_value_head(tmp_path) -> None:
    hf = gemma2(num_key_value_heads=1, attn_logit_softcapping=None, final_logit_softcapping=None)
    hf.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    tokens = random_tokens()
    with torch.no_grad():
        difference = (load_model(tmp_path)(tokens) - hf(tokens).logits).abs().max()
    assert difference < 1e-5


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(UnknownNameError) as raised:
        unchecked(load_model)("x", backend="hook")
    assert str(raised.value) == (
        "Unknown backend 'hook'. There is: hooked, bridge. Did you mean 'hooked'?"
    )


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "/nowhere/at/all"])
def test_a_model_that_is_nowhere_is_an_error(name: str) -> None:
    with pytest.raises(MissingFileError, match=f"The model {name!r} could not be read.*folder"):
        load_model(name)


def test_a_folder_without_weights_is_an_error(tmp_path) -> None:
    tiny_hf("gemma2").config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(MissingFileError, match="could not be read"):
        load_model(tmp_path)


def test_truncated_weights_are_an_error(tmp_path) -> None:
    tiny_hf("gemma2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(MissingFileError, match="could not be read"):
        load_model(tmp_path)


def test_another_architecture_is_an_error(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="is a 'gpt2' model.*gemma2 and gemma3_text"):
        load_model(tmp_path)


def test_scaled_rotary_embeddings_fit_the_bridge_only(tmp_path) -> None:
    hf = gemma2(rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0})
    hf.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match='rotary embedding.*backend="bridge"'):
        load_model(tmp_path)
    tokens = random_tokens()
    with torch.no_grad():
        bridge = load_model(tmp_path, backend="bridge")
        assert (bridge(tokens) - hf(tokens).logits).abs().max() < 1e-5
