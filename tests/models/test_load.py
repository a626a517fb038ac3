"""Models from a Hugging Face folder: the same logits as transformers on both classes."""

from __future__ import annotations

import json

import pytest
import torch

from gemmascope_plugin.errors import MissingFileError, ModelError, UnknownNameError
from gemmascope_plugin.models import load_model
from gemmascope_plugin.models.load_model import hooked_config
from gemmascope_plugin.models.weight_layout import hub_name
from tests.factories import tiny_hf, tiny_tokenizer, unchecked
from tests.tiny_models import gemma2, gemma3, random_tokens


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


def test_a_model_that_is_nowhere_is_an_error() -> None:
    name = "nobody/no-such-model"
    with pytest.raises(MissingFileError, match=f"The model {name!r} could not be read.*folder"):
        load_model(name)


@pytest.mark.parametrize("name", ["gpt2", "no-such-model", "gemma-2-3b", "gemma-4-4b"])
def test_the_hub_is_not_asked_for_names_that_no_gemma_has(name: str, monkeypatch) -> None:
    from transformers import AutoConfig

    monkeypatch.setattr(AutoConfig, "from_pretrained", None)  # would be called to ask
    with pytest.raises(UnknownNameError, match=f"{name!r} is not the name of a Gemma 2 or Gemma 3"):
        load_model(name)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "../nowhere", "~/no such folder"])
def test_a_folder_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(MissingFileError, match=r"There is no folder '.*nowhere|no such folder'"):
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
    with pytest.raises(ModelError, match="is a 'gpt2' model.*gemma2 and gemma3_text and gemma3"):
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


STRETCHED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A checkpoint of the kind of Gemma 3 4B: nested text config, vision tower, stretched RoPE.

    Returns the folder and the whole transformers model.
    """
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = gemma3(rope_parameters=STRETCHED)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    whole = Gemma3ForConditionalGeneration(config).float().eval().requires_grad_(False)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.tie_weights()
    whole.set_attn_implementation("eager")
    folder = tmp_path_factory.mktemp("multimodal")
    whole.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, whole


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@torch.no_grad()
def test_the_text_tower_of_a_multimodal_checkpoint(multimodal, backend) -> None:
    folder, whole = multimodal
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gemma3"
    model = load_model(folder, backend=backend, check_parity=True)
    tokens = random_tokens(length=100)
    assert (model(tokens) - whole(tokens).logits).abs().max() < 1e-5
    assert not any("vision" in name for name, _ in model.named_parameters())
    assert "blocks.2.hook_resid_post" in model.hook_dict


@torch.no_grad()
def test_the_stretched_rotary_embedding_matters(multimodal, tmp_path) -> None:
    """Without the factor the logits would be others, so the test above can see it."""
    folder, whole = multimodal
    hf = gemma3()  # the same weights, nothing stretched
    tokens = random_tokens(length=100)
    assert (hf(tokens).logits - whole(tokens).logits).abs().max() > 0.1


def test_the_published_spelling_of_the_factor_is_understood() -> None:
    """config.json of the 4B, 12B and 27B has ``rope_scaling`` beside two bases."""
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        num_hidden_layers=6,
        rope_theta=1_000_000,
        rope_local_base_freq=10_000,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
        max_position_embeddings=131_072,
    )
    cfg = hooked_config(config, "x")
    assert (cfg.rotary_base, cfg.rotary_base_local, cfg.rotary_scaling_factor) == (
        *(1_000_000, 10_000),
        8.0,
    )
    assert cfg.attn_types == ["local"] * 5 + ["global"]
    assert cfg.n_ctx == 131_072  # TransformerLens makes masks and rotary tables as they are needed


def test_other_scalings_of_gemma_3_fit_the_bridge_only() -> None:
    rope = {**STRETCHED, "full_attention": {"rope_type": "dynamic", "factor": 2.0}}
    rope["full_attention"]["rope_theta"] = 1e6
    config = gemma3().config
    config.rope_parameters = rope
    with pytest.raises(
        ModelError, match=r"\(dynamic\)\. There is: default and linear\. Try: load_m"
    ):
        hooked_config(config, "x")


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("2b", "google/gemma-2-2b"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("google/gemma-2-9b-it", "google/gemma-2-9b-it"),
        ("gemma-2-27b-pt", "google/gemma-2-27b"),
        ("gemma-3-270m", "google/gemma-3-270m"),
        ("gemma-3-270m-pt", "google/gemma-3-270m"),
        ("gemma-3-4b", "google/gemma-3-4b-pt"),
        ("google/gemma-3-4b", "google/gemma-3-4b-pt"),
        ("4b-it", "google/gemma-3-4b-it"),
        ("gemma-2-2b-it", "google/gemma-2-2b-it"),  # no dictionaries, but a model
        ("somebody/gemma-2-2b", "somebody/gemma-2-2b"),
    ],
)
def test_names_are_those_of_find(name: str, repository: str) -> None:
    assert hub_name(name) == repository


def test_a_name_of_two_models_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="could be several.*gemma-2-27b, gemma-3-27b-pt"):
        load_model("27b")


def test_offline_the_error_says_which_command_to_run() -> None:
    with pytest.raises(MissingFileError) as error:
        load_model("2b")
    text = str(error.value)
    assert "`hf download google/gemma-2-2b`" in text and "without HF_HUB_OFFLINE" in text


def test_the_bundled_model_has_its_own_door() -> None:
    with pytest.raises(MissingFileError, match=r"Try: gemmascope_plugin\.tiny\(\)\.model"):
        load_model("gemma-2-tiny")


@torch.no_grad()
def test_a_cached_model_loads_offline_by_its_short_name(tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    repo = tmp_path / "models--google--gemma-2-2b"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    hf = tiny_hf("gemma2")
    hf.save_pretrained(repo / "snapshots" / commit)
    tiny_tokenizer().save_pretrained(repo / "snapshots" / commit)
    model = load_model("2b", backend="bridge")
    tokens = random_tokens()
    assert (model(tokens) - hf(tokens).logits).abs().max() < 1e-5
    assert model.cfg.model_name == "gemma-2-2b"
