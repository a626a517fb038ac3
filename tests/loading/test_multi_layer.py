"""Crosscoders and cross-layer transcoders from generated files, against loops over every feature."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gemma_scope_2_files import N_LAYERS, D, F, multi_spec, put_multi
from safetensors.numpy import save_file

from gemmascope_plugin.errors import BadFileError, MissingFileError, WidthMismatchError
from gemmascope_plugin.loading import load, spec_of
from gemmascope_plugin.saes import CrossCoder, CrossLayerTranscoder


def inputs(*shape: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, D, generator=rng) for _ in range(N_LAYERS)]


def slow(files, x) -> tuple[list, list]:
    """One token, one feature, one output layer at a time."""
    acts = [torch.zeros(len(x[0]), F) for _ in files]
    out = [torch.from_numpy(p["b_dec"]).repeat(len(x[0]), 1) for p in files]
    for i, p in enumerate(files):
        for t in range(len(x[0])):
            for feature in range(F):
                w = torch.from_numpy(p["w_enc"][:, feature])
                pre = float((x[i][t] * w).sum()) + float(p["b_enc"][feature])
                if pre > p["threshold"][feature]:
                    acts[i][t, feature] = pre
                    for j in range(N_LAYERS):
                        out[j][t] += pre * torch.from_numpy(p["w_dec"][feature, j])
        if "affine_skip_connection" in p:
            out[i] += x[i] @ torch.from_numpy(p["affine_skip_connection"])
    return acts, out


@pytest.mark.parametrize(("kind", "affine"), [("clt", False), ("clt", True), ("crosscoder", False)])
def test_it_computes_the_formula(tmp_path, kind: str, affine: bool) -> None:
    sae_spec = multi_spec(kind, affine=affine)
    files = put_multi(tmp_path, sae_spec)
    made = load(sae_spec, local_dir=tmp_path)
    assert type(made) is {"clt": CrossLayerTranscoder, "crosscoder": CrossCoder}[kind]
    x = inputs(4)
    acts, out = slow(files, x)
    assert 0 < sum(int((a > 0).sum()) for a in acts) < 4 * N_LAYERS * F
    for actual, expected in zip(made.encode(x), acts, strict=True):
        torch.testing.assert_close(actual, expected)
    for actual, expected in zip(made(x), out, strict=True):
        torch.testing.assert_close(actual, expected)
    batched = made([one_layer.reshape(2, 2, D) for one_layer in x])
    torch.testing.assert_close(batched[2].reshape(4, D), out[2])


def test_it_says_what_it_is_and_opens_layers_when_used(tmp_path) -> None:
    sae_spec = multi_spec("crosscoder")
    put_multi(tmp_path, sae_spec)
    made = load(sae_spec, local_dir=tmp_path)
    cfg = made.cfg
    assert cfg.hooks_in == cfg.hooks_out == tuple(f"blocks.{i}.hook_resid_post" for i in (2, 5, 7))
    assert (cfg.layers, cfg.d_sae, cfg.d_in) == ((2, 5, 7), (F, F, F), D)
    assert cfg.metadata["release"] == sae_spec.release and spec_of(made) == sae_spec
    assert made.opened == () and "open=0/3" in repr(made)
    made.encode_layer(1, inputs(2)[1])
    assert made.opened == (1,)
    made.decode_layer(1, made.encode(inputs(2))[:2])
    made.close()
    assert made.opened == ()
    clt = multi_spec("clt")
    put_multi(tmp_path, clt)
    meta = load(clt, local_dir=tmp_path).cfg.metadata
    assert meta["model_from_pretrained_kwargs"] == {"fold_ln": False}


def test_other_types_follow_the_module(tmp_path) -> None:
    sae_spec = multi_spec("clt", affine=True)
    put_multi(tmp_path, sae_spec)
    x = inputs(3)
    full = load(sae_spec, local_dir=tmp_path)
    reference = full(x)
    double = full.double()
    assert double(x)[0].dtype == torch.float64
    torch.testing.assert_close(double(x)[2].float(), reference[2])
    half = load(sae_spec, local_dir=tmp_path, dtype=torch.bfloat16)
    assert half(x)[0].dtype == torch.bfloat16
    assert half.weights(0).W_dec.dtype == torch.float32  # stays in the file


def test_a_feature_that_writes_before_its_own_layer_is_refused(tmp_path) -> None:
    sae_spec = multi_spec("clt")
    files = put_multi(tmp_path, sae_spec)
    files[2]["w_dec"][4, 1, 0] = 1
    save_file(files[2], tmp_path / sae_spec.filenames[2])
    made = load(sae_spec, local_dir=tmp_path)
    made.encode_layer(0, inputs(1)[0])
    with pytest.raises(BadFileError, match="feature 4 of .*params_layer_2.* writes before its own"):
        made.encode_layer(2, inputs(1)[2])
    with pytest.raises(BadFileError, match="feature 4 of"):
        load(sae_spec, local_dir=tmp_path, check=True)


def test_an_empty_file_a_missing_file_and_wrong_shapes(tmp_path) -> None:
    sae_spec = multi_spec("clt")
    put_multi(tmp_path, sae_spec)
    with pytest.raises(BadFileError, match=r"W_dec of .* shape \[10, 3, 6\], but .* \[10, 4, 6\]"):
        load(replace(sae_spec, layers=(0, 1, 2, 3), d_sae=40), local_dir=_four(tmp_path, sae_spec))
    put_multi(tmp_path, sae_spec)
    (tmp_path / sae_spec.filenames[0]).write_bytes(b"")  # seen in a published suite
    with pytest.raises(BadFileError, match="params_layer_0.safetensors': its header claims"):
        load(sae_spec, local_dir=tmp_path)
    (tmp_path / sae_spec.filenames[1]).unlink()
    with pytest.raises(MissingFileError, match="params_layer_1.safetensors' in local_dir"):
        load(sae_spec, local_dir=tmp_path)


def _four(tmp_path, sae_spec):
    """The same folder with a fourth file and a config that agrees."""
    import json
    import shutil

    shutil.copy(
        tmp_path / sae_spec.filenames[2], tmp_path / sae_spec.path / "params_layer_3.safetensors"
    )
    config = tmp_path / sae_spec.config_filename
    config.write_text(json.dumps({**json.loads(config.read_text()), "width": 40}))
    return tmp_path


def test_offline_counts_the_missing_files(hub_cache) -> None:
    with pytest.raises(MissingFileError) as error:
        load(multi_spec("clt"))
    assert "offline mode is on; 3 of its 3 files are missing" in str(error.value)
    assert "--include 'clt/width_30_l0_big/params*.safetensors'" in str(error.value)


def test_layers_named_one_by_one_in_the_config(tmp_path) -> None:
    sae_spec = multi_spec("crosscoder")
    hooks = [f"model.layers.{i}.output" for i in sae_spec.layers]
    put_multi(tmp_path, sae_spec, hf_hook_point_in=hooks, hf_hook_point_out=hooks)
    assert load(sae_spec, local_dir=tmp_path).cfg.n_layers == 3
    put_multi(tmp_path, sae_spec, hf_hook_point_in=hooks[::-1])
    with pytest.raises(BadFileError, match="says hf_hook_point_in"):
        load(sae_spec, local_dir=tmp_path)


def test_inputs_of_another_width(tmp_path) -> None:
    sae_spec = multi_spec("crosscoder")
    put_multi(tmp_path, sae_spec)
    made = load(sae_spec, local_dir=tmp_path)
    with pytest.raises(WidthMismatchError, match="has 3 layers, got 2 tensors"):
        made.encode(inputs(1)[:2])
    with pytest.raises(
        WidthMismatchError, match="reads width 6 at blocks.2.hook_resid_post.* has 7"
    ):
        made.encode([torch.ones(1, 7)] * 3)
    assert np.isfinite(made(inputs(1))[0].numpy()).all()
