"""What load_model takes, and what it refuses before anything is read."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from gemmascope_plugin.errors import MissingFileError, ModelError, UnknownNameError
from gemmascope_plugin.models import load_model
from gemmascope_plugin.models.weight_layout import find_weights, hub_name
from tests.factories import tiny_hf, tiny_tokenizer, unchecked
from tests.tiny_models import gemma3, random_tokens


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    target = tmp_path_factory.mktemp("model")
    tiny_hf(kind[0]).save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)
    return target


def settings(folder, file: str, **values) -> None:
    """Changes values of a JSON file."""
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def other(tmp_path):
    """A folder that a test may change."""
    tiny_hf("gemma2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


# --- devices and types -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"device": "cuda:77"}, {"dtype": "float8"}, {"backend": "tl"}])
def test_what_is_wrong_is_said_before_anything_is_read(wrong) -> None:
    with pytest.raises(UnknownNameError, match=next(iter(wrong))):
        unchecked(load_model)("/nowhere", **wrong)


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16])
def test_types_by_name(kind, folder, dtype) -> None:
    model = load_model(folder, backend=kind[1], dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.cfg.dtype == torch.bfloat16


def test_gemma_3_is_refused_in_float16(tmp_path) -> None:
    gemma3().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match='overflows in float16.*Try: dtype="bfloat16"'):
        load_model(tmp_path, dtype="float16")
    with pytest.raises(ModelError, match="overflows in float16"):
        load_model(gemma3(), dtype=torch.float16, tokenizer=None)


# --- layout ----------------------------------------------------------------------------------------


def test_the_unembedding_is_one_row_per_word(kind, folder) -> None:
    """So that a logit reads one row, and a pass copies nothing."""
    assert load_model(folder, backend=kind[1]).W_U.T.is_contiguous()


@torch.no_grad()
def test_a_hooked_model_equals_one_with_weights_of_its_own(other) -> None:
    """Views of transformers' tensors give the same logits, to the last bit, as contiguous copies."""
    model = load_model(other)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.contiguous()
    tokens = random_tokens(length=30)
    assert torch.equal(model(tokens), copied(tokens))


# --- models in memory ------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_in_memory(kind) -> None:
    hf = copy.deepcopy(tiny_hf(kind[0])).requires_grad_(True)
    tokens = random_tokens(length=30)
    expected = hf(tokens).logits
    model = load_model(hf, backend=kind[1], tokenizer=tiny_tokenizer())
    assert (model(tokens) - expected).abs().max() < 5e-6
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert "in memory" in model.gemmascope_source
    if kind[1] == "hooked":
        assert all(parameter.requires_grad for parameter in hf.parameters())
        assert torch.equal(hf(tokens).logits, expected)
        hf.model.embed_tokens.weight.zero_()
        assert (model(tokens) - expected).abs().max() < 5e-6  # nothing is shared
        assert model.W_U.T.is_contiguous()


@torch.no_grad()
def test_a_multimodal_model_in_memory() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = gemma3()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    whole = Gemma3ForConditionalGeneration(config).float().eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.tie_weights()
    model = load_model(whole, tokenizer=None)
    tokens = random_tokens()
    assert (model(tokens) - text(tokens).logits).abs().max() < 5e-6


def test_the_tokenizer_of_a_model_in_memory_is_that_of_its_folder(folder) -> None:
    from transformers import AutoModelForCausalLM

    model = load_model(AutoModelForCausalLM.from_pretrained(folder))
    assert model.to_tokens("w5 w6").tolist() == [[2, 5, 6]]
    assert model.cfg.model_name == folder.name


def test_a_model_in_memory_from_nowhere_needs_a_tokenizer() -> None:
    with pytest.raises(MissingFileError, match="no tokenizer for 'the model in memory'.*=None"):
        load_model(gemma3())


def test_an_adapter_that_is_not_merged_is_refused() -> None:
    class PeftModel(torch.nn.Module):
        def merge_and_unload(self):
            """As PEFT has it."""

    with pytest.raises(ModelError, match=r"not merged.*Try: model\.merge_and_unload\(\)"):
        load_model(PeftModel())
    hf = gemma3()
    hf.model.layers[0].mlp.up_proj.lora_A = torch.nn.Linear(2, 2)  # what add_adapter() does
    with pytest.raises(ModelError, match="has an adapter that is not merged"):
        load_model(hf, tokenizer=None)


def test_other_objects_are_refused(kind, folder) -> None:
    with pytest.raises(ModelError, match="got a Linear.*Gemma2ForCausalLM"):
        load_model(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="TransformerLens model already"):
        load_model(load_model(folder, backend=kind[1]))
    with pytest.raises(ModelError, match="got int 7"):
        unchecked(load_model)(7)


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        from transformers import Gemma3ForCausalLM

        hf = Gemma3ForCausalLM(gemma3().config)
    with pytest.raises(ModelError, match="not in memory"):
        load_model(hf, tokenizer=None)


# --- folders that cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_quantised_folders_are_refused(method: str, other) -> None:
    settings(other, "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=rf"quantised \({method}\).*GGUF.*dequantize\(\)"):
        load_model(other)


def test_an_adapter_folder_is_refused(other) -> None:
    (other / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter.*merge_and_unload\(\)"):
        load_model(other)
    (other / "config.json").unlink()
    with pytest.raises(ModelError, match="holds an adapter"):
        load_model(other)


def test_an_adapter_in_a_repository_is_refused(tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants
    from transformers.utils import hub

    for module in (constants, hub.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--lora"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repository / "snapshots" / ("0" * 40) / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="'lora' holds an adapter"):
        load_model("somebody/lora")


def test_no_tokenizer_is_invented(other) -> None:
    for file in other.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(MissingFileError, match=r"no tokenizer.*tokenizer=None"):
        load_model(other)
    assert load_model(other, tokenizer=None).tokenizer is None
    tokenizer = tiny_tokenizer()
    assert load_model(other, tokenizer=tokenizer).to_tokens("w5").tolist() == [[2, 5]]


def test_tensors_that_are_missing_are_not_made_up(other) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingFileError, match=r"lack 1 tensors, such as model\.layers\.1\.mlp"):
        load_model(other)


# --- names and copies ------------------------------------------------------------------------------


def test_copies_go_with_names() -> None:
    with pytest.raises(UnknownNameError, match="Unknown source 'web'.*auto, hub, cache, package"):
        unchecked(find_weights)("2b", "web")
    with pytest.raises(MissingFileError, match="cache does not hold google/gemma-2-2b"):
        load_model("2b", source="cache")


def test_copies_do_not_go_with_paths(other) -> None:
    with pytest.raises(ModelError, match="source='hub' does not go with the path"):
        load_model(other, source="hub")


@pytest.mark.parametrize("name", ["27b", "27b-it"])
def test_names_of_two_models_are_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="could be several"):
        hub_name(name)


def test_models_without_dictionaries_have_names_too() -> None:
    assert hub_name("2b-jpn-it") == "google/gemma-2-2b-jpn-it"
    assert hub_name("google/some-new-gemma") == "google/some-new-gemma"


# --- what a model says about itself ----------------------------------------------------------------


def test_where_the_weights_come_from(kind, folder) -> None:
    assert load_model(folder, backend=kind[1]).gemmascope_source == f"folder {folder.name!r}"


@pytest.mark.parametrize(("ends", "expected"), [(7, (7,)), ([1, 106], (1, 106))])
def test_the_ids_that_end_a_text_are_those_of_the_generation_config(ends, expected, other) -> None:
    settings(other, "generation_config.json", eos_token_id=ends)
    for backend in ("hooked", "bridge"):
        assert load_model(other, backend=backend).gemmascope_eos_ids == expected


def test_without_a_generation_config_they_are_those_of_the_config(other) -> None:
    (other / "generation_config.json").unlink()
    assert load_model(other).gemmascope_eos_ids == (1,)
