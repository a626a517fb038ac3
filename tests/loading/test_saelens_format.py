"""SAELens' own format: what SAELens saves, we load, and it computes the same."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from npz_files import D_IN, D_SAE, arrays, spec
from safetensors.torch import load_file, save_file

from gemmascope_plugin.errors import (
    BadFileError,
    GemmaScopeError,
    UnknownNameError,
    WidthMismatchError,
)
from gemmascope_plugin.loading import load, spec_of
from gemmascope_plugin.saes import MatryoshkaSAE, check_architecture

LEVELS = (8, 16, 24)


def matryoshka_spec(**changes):
    fields = {"repo_id": "someone/matryoshka", "path": "blocks.1.hook_resid_post"}
    fields |= {"format": "sae_lens", "levels": LEVELS, "l0": 40.0}
    return spec(**{**fields, **changes})


def x() -> torch.Tensor:
    return torch.randn(6, D_IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    """A JumpReLU that subtracts its bias from the input, as batch-top-k ones are saved."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    cfg = JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=True)
    cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    cfg.metadata.context_size = 512
    sae = JumpReLUSAE(cfg)
    sae.load_state_dict({name: torch.from_numpy(value) for name, value in arrays().items()})
    sae.save_model(tmp_path / "blocks.1.hook_resid_post")
    return tmp_path / "blocks.1.hook_resid_post" / "cfg.json"


def test_it_computes_what_saelens_computes(saved, tmp_path) -> None:
    from sae_lens import SAE, JumpReLUSAE

    plain = SAE.load_from_disk(saved.parent)
    matryoshka = load(matryoshka_spec(), local_dir=tmp_path)
    assert type(plain) is JumpReLUSAE and type(matryoshka) is MatryoshkaSAE
    assert plain.cfg.apply_b_dec_to_input and not matryoshka.cfg.apply_b_dec_to_input
    torch.testing.assert_close(matryoshka.encode(x()), plain.encode(x()))
    torch.testing.assert_close(matryoshka(x()), plain(x()))
    assert not any(p.requires_grad for p in matryoshka.parameters())
    half = load(matryoshka_spec(), local_dir=tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.cfg.dtype == "bfloat16"


def test_metadata_keeps_what_the_file_says_and_adds_levels(saved, tmp_path) -> None:
    sae = load(matryoshka_spec(), local_dir=tmp_path)
    meta = sae.cfg.metadata
    assert meta.context_size == 512 and meta.levels == list(LEVELS) and meta.l0 == 40
    assert spec_of(sae) == matryoshka_spec()


def change(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_levels_of_the_file(saved, tmp_path) -> None:
    metadata = json.loads(saved.read_text())["metadata"]
    details = {"training_architecture_details": {"matryoshka_widths": [4, 24]}}
    change(saved, metadata={**metadata, **details})
    assert load(matryoshka_spec(levels=()), local_dir=tmp_path).cfg.metadata.levels == [4, 24]
    with pytest.raises(BadFileError, match=r"matryoshka_widths \[4, 24\], but .* \[8, 16, 24\]"):
        load(matryoshka_spec(), local_dir=tmp_path)


def test_encoding_at_a_level_and_truncating(saved, tmp_path) -> None:
    sae = load(matryoshka_spec(), local_dir=tmp_path)
    check_architecture(sae)
    assert sae.cfg.levels == LEVELS and sae.cfg.metadata.levels == list(LEVELS)
    torch.testing.assert_close(sae.encode(x(), level=0), sae.encode(x())[:, :8])
    small = sae.truncate(1)
    torch.testing.assert_close(small(x()), sae.decode(sae.encode(x()), level=1))
    assert not small.W_enc.requires_grad and spec_of(small) is None


def test_a_dictionary_without_levels_stays_plain(saved, tmp_path) -> None:
    from sae_lens import JumpReLUSAE

    assert type(load(matryoshka_spec(levels=()), local_dir=tmp_path)) is JumpReLUSAE


def test_what_we_save_is_read_again(saved, tmp_path) -> None:
    sae = load(matryoshka_spec(), local_dir=tmp_path)
    sae.save_model(saved.parent)
    for sae_spec in (matryoshka_spec(), matryoshka_spec(levels=())):
        again = load(sae_spec, local_dir=tmp_path)
        assert type(again) is MatryoshkaSAE and again.cfg.levels == LEVELS
        assert torch.equal(again.encode(x(), 0), sae.encode(x(), 0))
    change(saved, lvels=[24])
    with pytest.raises(UnknownNameError, match="no setting 'lvels'"):
        load(matryoshka_spec(), local_dir=tmp_path)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([8, 4, 24], "do not increase: 4 follows 8"),
        ([8, 25], "Level 25 exceeds the 24 features"),
        (7, "needs levels, and got 7"),
    ],
)
def test_levels_in_the_file_that_cannot_be(saved, tmp_path, widths, message: str) -> None:
    metadata = json.loads(saved.read_text())["metadata"]
    details = {"training_architecture_details": {"matryoshka_widths": widths}}
    change(saved, metadata={**metadata, **details})
    with pytest.raises(BadFileError, match=f"cfg.json.*{message}"):
        load(matryoshka_spec(), local_dir=tmp_path)


def test_configs_of_before_version_6(saved, tmp_path) -> None:
    saved.write_text(
        json.dumps(
            {
                "architecture": "jumprelu",
                "d_in": D_IN,
                "d_sae": D_SAE,
                "dtype": "torch.float32",
                "hook_name": "blocks.1.hook_resid_post",
                "activation_fn_str": "relu",
                "apply_b_dec_to_input": False,
                "finetuning_scaling_factor": False,
                "normalize_activations": "none",
            }
        )
    )
    p = {name: torch.from_numpy(value) for name, value in arrays().items()}
    pre = x() @ p["W_enc"] + p["b_enc"]
    sae = load(matryoshka_spec(), local_dir=tmp_path)
    torch.testing.assert_close(sae.encode(x()), pre * (pre > p["threshold"]))


def test_refusals(saved, tmp_path) -> None:
    good = saved.read_text()

    def refused(match: str, sae_spec=None, **changes) -> None:
        change(saved, **changes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(BadFileError, match=match):
                load(sae_spec or matryoshka_spec(), local_dir=tmp_path)
        saved.write_text(good)

    refused("says d_in 8, but .* has 9", replace(matryoshka_spec(), d_in=9))
    refused("says hook_name .* has 'blocks.1.attn.hook_z'", matryoshka_spec(site="att", hook_in=_Z))
    refused("SAELens refuses the config of a 'nonsense'", architecture="nonsense")
    refused("scaled by a factor", normalize_activations="expected_average_only_in")
    refused("is not a config of SAELens", metadata=[1])
    weights = saved.with_name("sae_weights.safetensors")
    values = load_file(weights)
    save_file({**values, "b_dec": torch.ones(7)}, weights)
    refused("b_dec of .* has shape")
    save_file({**values, "W_dec": torch.ones(D_SAE, 7)}, weights)
    with pytest.raises(WidthMismatchError, match="has d_out 7"):
        load(matryoshka_spec(), local_dir=tmp_path)
    values.pop("threshold")
    save_file(values, weights)
    refused("wrong arrays: missing threshold")
    saved.unlink()
    with pytest.raises(GemmaScopeError, match="cfg.json"):
        load(matryoshka_spec(), local_dir=tmp_path)


_Z = "blocks.1.attn.hook_z"
