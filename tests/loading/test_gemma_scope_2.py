"""Single-layer folders of Gemma Scope 2: formula, orientation of the skip, config, offline."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gemma_scope_2_files import put_single, single_spec, skip
from npz_files import D_IN, D_SAE, arrays

from gemmascope_plugin.catalog import SaeSpec, find
from gemmascope_plugin.errors import BadFileError, MissingFileError, WidthMismatchError
from gemmascope_plugin.loading import load, spec_of


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def formula(inputs: torch.Tensor, affine: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    p = {name: torch.from_numpy(value) for name, value in arrays().items()}
    pre = inputs @ p["W_enc"] + p["b_enc"]
    acts = pre * (pre > p["threshold"])
    out = acts @ p["W_dec"] + p["b_dec"]
    return acts, out + inputs @ torch.from_numpy(skip()) if affine else out


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_it_computes_jumprelu(tmp_path, kind: str) -> None:
    from sae_lens import JumpReLUSAE, JumpReLUTranscoder

    sae_spec = single_spec(kind, "mlp")
    put_single(tmp_path, sae_spec)
    sae = load(sae_spec, local_dir=tmp_path)
    assert type(sae) is {"sae": JumpReLUSAE, "transcoder": JumpReLUTranscoder}[kind]
    acts, out = formula(x(5, D_IN))
    torch.testing.assert_close(sae.encode(x(5, D_IN)), acts)
    torch.testing.assert_close(sae(x(5, D_IN)), out)
    assert spec_of(sae) == sae_spec and not any(p.requires_grad for p in sae.parameters())


def test_the_skip_is_x_times_the_stored_matrix_and_not_its_transpose(tmp_path) -> None:
    from sae_lens import SAE, JumpReLUSkipTranscoder

    sae_spec = single_spec("transcoder", "mlp", affine=True)
    put_single(tmp_path, sae_spec)
    sae = load(sae_spec, local_dir=tmp_path)
    assert type(sae) is JumpReLUSkipTranscoder
    _, out = formula(x(5, D_IN), affine=True)
    torch.testing.assert_close(sae(x(5, D_IN)), out)
    torch.testing.assert_close(sae.W_skip, torch.from_numpy(skip()).T)
    wrong = formula(x(5, D_IN))[1] + x(5, D_IN) @ torch.from_numpy(skip()).T
    assert not torch.allclose(sae(x(5, D_IN)), wrong, atol=0.1)
    # The skip is a view of the file until someone saves it.
    sae.save_model(tmp_path / "saved")
    with pytest.warns(UserWarning, match="model_from_pretrained_kwargs"):  # SAELens' own
        again = SAE.load_from_disk(tmp_path / "saved")
    torch.testing.assert_close(again(x(5, D_IN)), out)


def test_metadata_says_where_it_belongs(tmp_path) -> None:
    transcoder = single_spec("transcoder", "mlp", affine=True)
    put_single(tmp_path, transcoder)
    meta = load(transcoder, local_dir=tmp_path).cfg.metadata
    assert (
        meta.hook_name == "blocks.1.mlp.hook_in" and meta.hook_name_out == "blocks.1.hook_mlp_out"
    )
    assert meta.model_from_pretrained_kwargs == {"fold_ln": False}
    assert meta.hf_hook_name == "model.layers.1.pre_feedforward_layernorm.output"
    assert meta.hf_hook_name_out == "model.layers.1.post_feedforward_layernorm.output"
    attention = single_spec("sae", "att", model="gemma-3-4b-it")
    put_single(tmp_path, attention)
    sae = load(attention, local_dir=tmp_path)
    assert sae.cfg.reshape_activations == "hook_z"
    assert sae.cfg.metadata.model_from_pretrained_kwargs is None
    hf = "model.language_model.layers.1.self_attn.o_proj.input"
    assert sae.cfg.metadata.hf_hook_name == hf
    z = x(2, 5, 4, 2)
    torch.testing.assert_close(sae.encode(z), formula(z.reshape(2, 5, 8))[0])


def test_bfloat16_and_a_folder_of_ones_own(tmp_path) -> None:
    sae_spec = single_spec()
    path = put_single(tmp_path, sae_spec)
    half = load(sae_spec, local_dir=tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.W_enc, torch.from_numpy(arrays()["W_enc"]).bfloat16())
    path.with_name("config.json").unlink()  # some folders were published without
    made = SaeSpec.from_folder(path.parent, model="mine", site="res", layer=3)
    assert torch.equal(load(made).W_enc, torch.from_numpy(arrays()["W_enc"]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hf_hook_point_in", "model.layers.2.output", "has 'model.layers.1.output'"),
        ("hf_hook_point_out", "model.layers.1.mlp.output", "has 'model.layers.1.output'"),
        ("width", 25, "has 24"),
        ("affine_connection", True, "has False"),
        ("type", "transcoder", "has 'sae'"),
        ("architecture", "topk", "has 'jumprelu'"),
        ("model_name", "gemma-v3-4b-it", "has 'gemma-3-test'"),
    ],
)
def test_a_config_that_contradicts_the_spec(tmp_path, field, value, message) -> None:
    sae_spec = single_spec()
    put_single(tmp_path, sae_spec, **{field: value})
    with pytest.raises(BadFileError) as error:
        load(sae_spec, local_dir=tmp_path)
    assert f"config.json' says {field} {value!r}, but gemma-2-test-res sae/" in str(error.value)
    assert message in str(error.value)


def test_names_of_models_are_compared_loosely(tmp_path) -> None:
    for model, name in (
        ("gemma-3-4b-it", "google/gemma-v3-4b-it"),
        ("gemma-3-270m", "gemma-v3-270m-pt"),
        ("gemma-3-1b-pt", "gemma-3-1b-pt"),
    ):
        sae_spec = single_spec(model=model)
        put_single(tmp_path, sae_spec, model_name=name)
        assert load(sae_spec, local_dir=tmp_path).cfg.metadata.model_name == model


def test_arrays_that_are_not_the_specs(tmp_path) -> None:
    sae_spec = single_spec("transcoder", "mlp")
    put_single(tmp_path, sae_spec)
    with pytest.raises(WidthMismatchError, match="has d_in 8, but .* has d_in 9"):
        load(replace(sae_spec, d_in=9), local_dir=tmp_path)
    affine = single_spec("transcoder", "mlp", affine=True)
    put_single(tmp_path, replace(affine, affine=False), affine_connection=True)
    with pytest.raises(BadFileError, match="wrong arrays: missing A"):
        load(affine, local_dir=tmp_path)


def test_a_config_that_is_not_json(tmp_path) -> None:
    sae_spec = single_spec()
    path = put_single(tmp_path, sae_spec).with_name("config.json")
    for text in ("", "[1]", "[" * 100_000, '{"type": "sae"'):
        path.write_text(text)
        with pytest.raises(BadFileError, match="config.json'"):
            load(sae_spec, local_dir=tmp_path)


def test_nothing_but_parameters_and_config_is_fetched(hub_cache, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    sae_spec, asked = single_spec(), []
    mirror = tmp_path / "hub-mirror"
    put_single(mirror, sae_spec)

    def download(repo_id, filename, **kwargs):
        asked.append(filename)
        return str(mirror / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load(sae_spec, offline=False).cfg.d_sae == D_SAE
    assert asked == [f"{sae_spec.path}/config.json", f"{sae_spec.path}/params.safetensors"]
    assert capsys.readouterr().err.startswith(
        f"downloading {sae_spec.release} {sae_spec.sae_id}, 1.8 kB"
    )


def test_offline_names_the_command(hub_cache) -> None:
    with pytest.raises(MissingFileError) as error:
        load(find(release="gemma-scope-2-1b-pt-res")[0])
    assert str(error.value).endswith(
        "Try: hf download google/gemma-scope-2-1b-pt --include "
        "'resid_post/layer_7_width_16k_l0_small/params*.safetensors' --include "
        "'resid_post/layer_7_width_16k_l0_small/*.json'"
    )


def test_a_matrix_of_zeros_and_a_nan(tmp_path) -> None:
    from safetensors.numpy import load_file, save_file

    sae_spec = single_spec()
    path = put_single(tmp_path, sae_spec)
    good = load_file(path)
    save_file({**good, "w_dec": np.zeros_like(good["w_dec"])}, path)
    with pytest.raises(BadFileError, match="W_dec of .* is all zero"):
        load(sae_spec, local_dir=tmp_path)
    good["b_enc"][3] = np.nan
    save_file(good, path)
    with pytest.raises(BadFileError, match="b_enc of .* has 1 of 24 values that are NaN or inf"):
        load(sae_spec, local_dir=tmp_path)
