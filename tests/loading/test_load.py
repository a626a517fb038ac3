"""load(): SAELens' own objects, equal to the formula and to SAELens' own loaders."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from npz_files import D_IN, D_SAE, arrays, save, spec

from gemmascope_plugin.catalog import SaeSpec, find, get
from gemmascope_plugin.errors import (
    BadFileError,
    GemmaScopeError,
    MissingFileError,
    UnknownNameError,
    WidthMismatchError,
)
from gemmascope_plugin.loading import load, spec_of
from gemmascope_plugin.loading.load import _pair
from tests.factories import unchecked


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """JumpReLU, one position and one feature after the other."""
    p = {name: torch.from_numpy(value) for name, value in arrays().items()}
    acts = torch.zeros(len(x), D_SAE)
    recons = p["b_dec"].repeat(len(x), 1)
    for row in range(len(x)):
        for i in range(D_SAE):
            pre = (x[row] * p["W_enc"][:, i]).sum() + p["b_enc"][i]
            if pre > p["threshold"][i]:
                acts[row, i] = pre
                recons[row] += pre * p["W_dec"][i]
    return acts, recons


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["res", "transcoder"])
def test_it_computes_jumprelu(suite, name: str, compress: bool) -> None:
    save(suite.file(name), compress=compress, **arrays())
    sae = load(suite.specs[name])
    x = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(0))
    acts, recons = reference(x)
    assert 0 < (acts > 0).sum() < acts.numel()
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae.decode(sae.encode(x)), recons)
    torch.testing.assert_close(sae(x), recons)


def test_an_attention_sae_takes_heads_as_saelens_has_it(suite) -> None:
    sae = load(suite.specs["att"])
    assert sae.cfg.reshape_activations == "hook_z"
    z = torch.randn(2, 5, 4, 2, generator=torch.Generator().manual_seed(0))
    acts, recons = reference(z.reshape(10, 8))
    torch.testing.assert_close(sae.encode(z), acts.reshape(2, 5, D_SAE))
    torch.testing.assert_close(sae(z), recons.reshape(z.shape))


def test_the_object_is_saelens_own_frozen_and_says_what_it_is(suite) -> None:
    from sae_lens import JumpReLUSAE, JumpReLUTranscoder

    sae = load(suite.specs["res"])
    assert type(sae) is JumpReLUSAE and type(load(suite.specs["transcoder"])) is JumpReLUTranscoder
    assert not sae.training and not any(p.requires_grad for p in sae.parameters())
    cfg = sae.cfg
    assert (cfg.d_in, cfg.d_sae, cfg.dtype, cfg.device) == (D_IN, D_SAE, "float32", "cpu")
    assert not cfg.apply_b_dec_to_input and cfg.normalize_activations == "none"
    assert sae.device == torch.device("cpu") and sae.W_enc.device == torch.device("cpu")
    meta = cfg.metadata
    assert meta.hook_name == "blocks.1.hook_resid_post" and meta.model_name == "gemma-2-test"
    assert (meta.release, meta.sae_id, meta.l0, meta.layer, meta.site, meta.kind) == (
        *("gemma-2-test-res", "layer_1/width_24/average_l0_7", 7.0, 1, "res", "sae"),
    )
    transcoder = load(suite.specs["transcoder"]).cfg.metadata
    assert transcoder.hook_name == "blocks.1.ln2.hook_normalized"
    assert transcoder.hook_name_out == "blocks.1.hook_mlp_out"


def test_the_spec_survives_saving_and_loading_in_saelens(suite, tmp_path) -> None:
    from sae_lens import SAE

    sae = load(suite.specs["res"])
    assert spec_of(sae) == suite.specs["res"]
    sae.save_model(tmp_path / "saved")
    again = SAE.load_from_disk(tmp_path / "saved")
    assert spec_of(again) == suite.specs["res"] and torch.equal(again.W_enc, sae.W_enc)


def test_an_sae_from_elsewhere_has_no_spec() -> None:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    assert spec_of(JumpReLUSAE(JumpReLUSAEConfig(d_in=2, d_sae=4))) is None


def test_dtype_device_and_a_pair_of_names(suite) -> None:
    sae_spec = suite.specs["res"]
    half = load((sae_spec.release, sae_spec.sae_id), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.dtype == torch.bfloat16
    assert half.cfg.dtype == "bfloat16"
    assert torch.equal(half.W_enc, load(sae_spec).W_enc.bfloat16())
    assert load(sae_spec, device=torch.device("cpu")).cfg.device == "cpu"


def test_a_wrong_argument_and_unknown_names(suite) -> None:
    with pytest.raises(UnknownNameError, match="no release 'gemma-2-test-rse'.*gemma-2-test-res"):
        load(("gemma-2-test-rse", "x"))
    with pytest.raises(BadFileError, match="has wrong arrays: missing A. There is"):
        load(replace(suite.specs["transcoder"], affine=True))
    with pytest.raises(GemmaScopeError, match="got tuple .*There is: a SaeSpec or a pair"):
        _pair(("x",))
    with pytest.raises(GemmaScopeError, match="got list with 1 entries.*load_suite"):
        unchecked(load)([suite.specs["transcoder"]])
    with pytest.raises(UnknownNameError, match="no release 'gemma-2-test-rse'"):
        load("gemma-2-test-rse", "x")


def test_a_canonical_id_loads_the_file_of_the_plain_release(hub_cache, suite) -> None:
    alias = get("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
    hub_cache(alias, **arrays())
    with pytest.raises(WidthMismatchError):  # found; small where 2304 are needed
        load(("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical"))


def test_state_equals_saelens_own_gemma_2_loaders(hub_cache) -> None:
    from sae_lens.loading.pretrained_sae_loaders import (
        gemma_2_sae_huggingface_loader,
        gemma_2_transcoder_huggingface_loader,
    )

    for release, theirs_loader in (
        ("gemma-scope-2b-pt-res", gemma_2_sae_huggingface_loader),
        ("gemma-scope-2b-pt-att", gemma_2_sae_huggingface_loader),
        ("gemma-scope-2b-pt-transcoders", gemma_2_transcoder_huggingface_loader),
    ):
        listed = find(release=release, layer=3, width="16k")[0]
        width = {"d_in": D_IN, "d_out": D_IN, "d_sae": D_SAE}
        ours_spec = replace(listed, **width)
        hub_cache(ours_spec, **arrays())
        cfg, saelens_state, _ = theirs_loader(listed.repo_id, listed.path)
        loaded = load(ours_spec)
        assert {k: v.shape for k, v in loaded.state_dict().items()} == {
            k: v.shape for k, v in saelens_state.items()
        }
        for name, value in saelens_state.items():
            assert torch.equal(loaded.state_dict()[name], value)
        for key in ("model_name", "hook_name", "prepend_bos", "context_size", "dataset_path"):
            assert loaded.cfg.metadata[key] == cfg[key], key
        assert cfg["d_in"] == listed.d_in and cfg["d_sae"] == listed.d_sae


def test_embedding_saes_are_scaled_with_their_bias(hub_cache) -> None:
    from sae_lens.loading.pretrained_sae_loaders import gemma_2_sae_huggingface_loader

    listed = replace(find(model="2b", site="embedding", l0=44).one(), d_sae=D_SAE)
    raw = arrays(d_in=2304, d_out=2304)
    hub_cache(listed, **raw)
    _, saelens_state, _ = gemma_2_sae_huggingface_loader(listed.repo_id, listed.path)
    sae = load(listed)
    torch.testing.assert_close(sae.W_enc.data, saelens_state["W_enc"])
    torch.testing.assert_close(sae.W_dec.data, saelens_state["W_dec"])
    torch.testing.assert_close(sae.b_dec.data, saelens_state["b_dec"] * 48)  # sqrt(2304)
    # On scaled embeddings the reconstruction is the scaled one of the raw dictionary.
    p = {name: torch.from_numpy(value) for name, value in raw.items()}
    e = torch.randn(3, 2304, generator=torch.Generator().manual_seed(0)) / 48
    pre = e @ p["W_enc"] + p["b_enc"]
    expected = (pre * (pre > p["threshold"])) @ p["W_dec"] + p["b_dec"]
    torch.testing.assert_close(sae(e * math.sqrt(2304)), expected * 48, rtol=1e-4, atol=1e-2)


def message(error_class, suite, **values) -> str:
    save(suite.file("res"), **values)
    with pytest.raises(error_class) as error:
        load(suite.specs["res"])
    return str(error.value).replace(repr(str(suite.file("res"))), "FILE")


def test_wrong_keys(suite) -> None:
    good = arrays()
    wrong = {"W_enc": good["W_enc"], "decoder": good["W_dec"]}
    assert message(BadFileError, suite, **wrong) == (
        "FILE has wrong arrays: missing W_dec, b_enc, b_dec, threshold; unknown decoder. There is: "
        "W_enc, decoder. Try: a file with W_enc, W_dec, b_enc, b_dec, threshold"
    )


def test_mismatched_widths_name_both_sides(suite) -> None:
    assert message(WidthMismatchError, suite, **arrays(d_in=9, d_out=9)) == (
        "FILE has d_in 9, but gemma-2-test-res layer_1/width_24/average_l0_7 at "
        "'blocks.1.hook_resid_post' of gemma-2-test has d_in 8. Try: the file of another model or "
        "site lies here; check the folder and the spec"
    )
    assert "FILE has d_out 9, but" in message(WidthMismatchError, suite, **arrays(d_out=9))
    assert message(BadFileError, suite, **arrays(d_sae=25)) == (
        "W_enc of FILE has shape [8, 25], but gemma-2-test-res layer_1/width_24/average_l0_7 needs "
        "[8, 24]. Try: the file of another width lies here; check the folder and the spec"
    )
    flat = {**arrays(), "W_enc": np.ones(24, np.float32)}
    assert "W_enc of FILE has shape [24], but" in message(BadFileError, suite, **flat)
    bias = {**arrays(), "b_dec": np.ones(7, np.float32)}
    assert "b_dec of FILE has shape [7], but" in message(BadFileError, suite, **bias)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(suite, value: float) -> None:
    bad = arrays()
    bad["W_dec"][3, 2] = bad["W_dec"][5, 1] = value
    assert message(BadFileError, suite, **bad) == (
        "W_dec of FILE has 2 of 192 values that are NaN or infinite. Try: fetch or write the file "
        "again"
    )


@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_a_matrix_of_zeros(suite, name: str) -> None:
    zero = {**arrays(), name: np.zeros_like(arrays()[name])}
    expected = f"{name} of FILE is all zero. Try: fetch or write the file again"
    assert message(BadFileError, suite, **zero) == expected


def test_a_scaling_factor_of_ones_is_dropped_and_any_other_refused(suite) -> None:
    save(suite.file("res"), **arrays(), scaling_factor=np.ones(D_SAE, np.float32))
    assert set(load(suite.specs["res"]).state_dict()) == set(arrays())
    scaled = {**arrays(), "scaling_factor": np.full(D_SAE, 2, np.float32)}
    assert message(BadFileError, suite, **scaled) == (
        "scaling_factor of FILE is not one everywhere. Try: multiply the rows of W_dec by it and "
        "leave it out of the file"
    )


def test_lower_case_keys(suite) -> None:
    values = arrays()
    values["w_enc"], values["w_dec"] = values.pop("W_enc"), values.pop("W_dec")
    save(suite.file("res"), **values)
    assert torch.equal(load(suite.specs["res"]).W_enc, torch.from_numpy(values["w_enc"]))


def test_a_truncated_file(suite) -> None:
    path = suite.file("res")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadFileError, match="it is truncated or not an npz archive"):
        load(suite.specs["res"])


def test_a_failed_load_leaves_nothing_and_the_next_one_works(suite) -> None:
    before = sorted(p for p in suite.assets.rglob("*"))
    good = suite.file("res").read_bytes()
    suite.file("res").write_bytes(good[:100])
    with pytest.raises(BadFileError):
        load(suite.specs["res"])
    assert sorted(p for p in suite.assets.rglob("*")) == before
    suite.file("res").write_bytes(good)
    assert load(suite.specs["res"]).cfg.d_sae == D_SAE


def test_a_folder_of_ones_own(tmp_path) -> None:
    save(tmp_path / "average_l0_9" / "params.npz", **arrays())
    made = SaeSpec.from_folder(tmp_path / "average_l0_9", model="mine", site="res", layer=2)
    sae = load(made)
    assert spec_of(sae) == made and sae.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
    assert "dataset_path" not in sae.cfg.metadata
    (tmp_path / "average_l0_9" / "params.npz").unlink()
    with pytest.raises(MissingFileError, match="in the folder of the spec"):
        load(made)


def test_a_folder_that_mirrors_a_repository(tmp_path) -> None:
    sae_spec = spec(repo_id="google/somewhere")
    save(tmp_path / sae_spec.filename, **arrays())
    assert load(sae_spec, local_dir=tmp_path).cfg.d_in == D_IN
