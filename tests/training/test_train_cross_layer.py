"""Crosscoders and CLTs through ``train()``: both formats, splicing, resuming, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import SAE

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.errors import (
    BadFileError,
    GemmaScopeError,
    MissingFileError,
    MissingHookError,
)
from gemmascope_plugin.files.whole import remove
from gemmascope_plugin.loading import load
from gemmascope_plugin.splice import HookedSAE, splice
from gemmascope_plugin.training import TrainSpec
from tests.training.cases import corpus, run, same, spec

GIVEN: list[dict[str, Any]] = [
    {"architecture": "jumprelu_crosscoder"},
    {"architecture": "jumprelu_clt", "gain": "with"},
    {"architecture": "jumprelu_clt", "options": {"affine": True}},
]
EACH = pytest.mark.parametrize("changes", GIVEN, ids=["crosscoder", "clt", "skip clt"])


def several(changes: dict[str, Any], **more: Any) -> TrainSpec:
    layers = {"layers": [0, 1], "layer": None, "model": "gemma-2-toy", "d_sae": 32}
    return spec(**{**layers, **changes, **more})


@EACH
def test_both_formats_splice_alike(hooked2, tmp_path, changes: dict) -> None:
    recipe = several(changes)
    sae = run(hooked2, recipe, run_dir=tmp_path / "r")
    from_saelens = SAE.load_from_disk(tmp_path / "r/final")
    assert type(from_saelens) is type(sae) and same(from_saelens, sae)
    (file,) = (tmp_path / "r/export").rglob("params_layer_0.safetensors")
    entry = SaeSpec.from_layers_folder(
        file.parent, model="gemma-2-toy", kind=sae.cfg.kind, gain=recipe.gain
    )
    assert entry.hooks_in == sae.cfg.hooks_in and entry.hooks_out == sae.cfg.hooks_out
    from_export = load(entry, check=True)
    assert from_export.cfg.affine == sae.cfg.affine == bool(changes.get("options"))
    tokens = corpus()[:3]
    with torch.no_grad():
        logits = []
        for dictionary in (sae, from_saelens, from_export):
            with splice(hooked2, dictionary, error="drop", exclude=(2, 1, 0)) as spliced:
                logits.append(spliced(tokens))
            with splice(hooked2, dictionary, exclude=(2, 1, 0)) as spliced:
                assert torch.equal(spliced(tokens), hooked2(tokens))
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
        assert not torch.allclose(logits[0], hooked2(tokens), atol=1e-2)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    with pytest.raises(GemmaScopeError, match=f"A {sae.cfg.kind} has many sites"):
        HookedSAE(sae)


@EACH
def test_it_explains_what_it_was_trained_on(hooked2, changes: dict) -> None:
    fit = {"steps": 250, "target_l0": 8.0, "lr": 1e-2, "sparsity_coefficient": 0.2, "d_sae": 96}
    sae = run(hooked2, several(changes, **fit))
    assert sae.cfg.metadata.fvu < 0.6 and 2 < sae.cfg.metadata.l0 < 16


@EACH
def test_it_goes_on_bit_by_bit(hooked2, tmp_path, changes: dict) -> None:
    recipe = several(changes)
    whole = run(hooked2, recipe, run_dir=tmp_path / "r", checkpoint_every=10)
    remove(tmp_path / "r/checkpoints/step_24")
    assert same(whole, run(hooked2, recipe, run_dir=tmp_path / "r", resume=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 0]}, r"layers=\(1, 0\) is out of range.*increasing layers from 0"),
        ({"layers": [0, 0]}, "increasing layers from 0"),
        ({"d_sae": 33}, "d_sae=33 is out of range.*multiples of the 2 layers"),
        ({"layer": 1}, "names two sites"),
        ({"layers": [], "layer": 1}, "A crosscoder needs layers"),
        (
            {"architecture": "jumprelu"},
            r"layers=\(0, 1\) means? nothing to the architecture 'jumprelu'",
        ),
        ({"dead_features": "ghost"}, "no pre-activations that ghost gradients"),
        ({"options": {"affine": True}}, "A crosscoder has no affine skip"),
        ({"site": "att"}, "A crosscoder reads the residual stream, not site='att'"),
        ({"options": {"afine": True}}, "'afine' is not an option.*Did you mean 'affine'"),
    ],
)
def test_what_cannot_be(hooked2, changes: dict, message: str) -> None:
    with pytest.raises(GemmaScopeError, match=message):
        run(hooked2, several({"architecture": "jumprelu_crosscoder"}, **changes))


def test_layers_that_the_model_lacks(hooked2) -> None:
    with pytest.raises(MissingHookError, match="blocks.9.hook_resid_post"):
        run(hooked2, several(GIVEN[0], layers=[0, 9]))


def test_folders_that_are_no_such_dictionary(hooked2, tmp_path) -> None:
    options: dict[str, Any] = {"model": "toy", "kind": "crosscoder"}
    with pytest.raises(MissingFileError, match="params_layer_0.safetensors"):
        SaeSpec.from_layers_folder(tmp_path, **options)
    with pytest.raises(GemmaScopeError, match="Unknown kind 'cross'.*Did you mean 'crosscoder'"):
        SaeSpec.from_layers_folder(tmp_path, model="toy", kind="cross")
    run(hooked2, several(GIVEN[0]), run_dir=tmp_path / "r")
    (file,) = (tmp_path / "r/export").rglob("params_layer_0.safetensors")
    with pytest.raises(BadFileError, match=r"has 2 files, and the layers are \[3\]"):
        SaeSpec.from_layers_folder(file.parent, layers=[3], **options)
    wrong = SaeSpec.from_layers_folder(file.parent, model="gemma-2-toy", kind="clt", layers=[0, 1])
    with pytest.raises(BadFileError, match="says type 'crosscoder'"):
        load(wrong)
