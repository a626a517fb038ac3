"""Files of crosscoders and CLTs say themselves what they read; those that contradict them are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gemmascope_plugin as gs
from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.demo.corpus import make_corpus
from gemmascope_plugin.errors import BadFileError, UnknownNameError
from gemmascope_plugin.loading import load
from gemmascope_plugin.splice import splice
from gemmascope_plugin.training.buckets import read_activations
from gemmascope_plugin.training.learner import Learner
from tests.support.rounding import assert_rounded
from tests.tiny_models import PAD_ID
from tests.training.cases import run, spec

CLT: dict[str, Any] = {"architecture": "jumprelu_clt", "options": {"affine": True}}
GIVEN: list[dict[str, Any]] = [
    {"architecture": "jumprelu_crosscoder"},
    {**CLT, "gain": "without"},
    {**CLT, "gain": "with"},
]
EACH = pytest.mark.parametrize("changes", GIVEN, ids=["crosscoder", "clt", "clt with gain"])


def several(changes: dict[str, Any], **more: Any) -> Any:
    short = {"layers": [0, 2], "layer": None, "model": "gemma-2-toy", "d_sae": 32, "steps": 8}
    return spec(**{**short, **changes, **more})


def exported(run_dir: Path) -> Path:
    (first,) = (run_dir / "export").rglob("params_layer_0.safetensors")
    return first.parent


@EACH
def test_nothing_need_be_said_to_read_the_same_tensors(hooked2, tmp_path, changes: dict) -> None:
    sae = run(hooked2, several(changes), run_dir=tmp_path / "r")
    folder = exported(tmp_path / "r")
    entry = SaeSpec.from_layers_folder(folder, model="gemma-2-toy", kind=sae.cfg.kind)
    assert entry.layers == sae.cfg.layers == (0, 2)
    assert entry.hooks_in == sae.cfg.hooks_in and entry.hooks_out == sae.cfg.hooks_out
    read, x = load(entry), torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    layers = list(x.split(32, -1))
    # the same weights at other addresses: rounding may differ
    assert_rounded(torch.cat(read.encode(layers), -1), sae.encode(x), 32)
    for trained, loaded in zip(sae.dictionary()(layers), read(layers), strict=True):
        assert_rounded(trained, loaded, 64)
    for i, name in enumerate(("params_layer_0", "params_layer_1")):
        decoder = load_file(folder / f"{name}.safetensors")["w_dec"]
        assert not decoder[:, :i].any() and decoder[:, i:].any(-1).all()


def test_files_that_contradict_what_is_said(hooked2, tmp_path) -> None:
    run(hooked2, several(GIVEN[1]), run_dir=tmp_path / "r")
    folder = exported(tmp_path / "r")
    options: dict[str, Any] = {"model": "gemma-2-toy", "kind": "clt"}
    with pytest.raises(BadFileError, match="says gain 'without'.* has 'with'"):
        load(SaeSpec.from_layers_folder(folder, gain="with", **options))
    with pytest.raises(BadFileError, match=r"says layers \[0, 2\].* has \[0, 1\]"):
        load(SaeSpec.from_layers_folder(folder, layers=[0, 1], **options))
    with pytest.raises(UnknownNameError, match=r"SaeSpec.from_layers_folder\(.*kind='clt'\)"):
        SaeSpec.from_folder(folder, model="gemma-2-toy", site="mlp", layer=0, kind="clt")
    config = folder / "config.json"
    content = json.loads(config.read_text())
    for damage, message in (
        ({"layers": [0, "2"]}, "There is: a list of layers"),
        ({"layers": 2}, "says layers 2"),
        ({"gain": "half"}, "says gain 'half'. There is: without or with"),
    ):
        config.write_text(json.dumps({**content, **damage}))
        with pytest.raises(BadFileError, match=message):
            SaeSpec.from_layers_folder(folder, **options)
    config.write_text("{")
    with pytest.raises(BadFileError, match="cannot read .*config.json"):
        SaeSpec.from_layers_folder(folder, **options)


def test_checkpoints_of_another_dictionary(hooked2, tmp_path) -> None:
    run(hooked2, several(GIVEN[0]), run_dir=tmp_path / "r")
    saved = tmp_path / "r/checkpoints/step_8"
    (weights,) = saved.glob("*.safetensors")
    tensors = load_file(weights)
    hooks = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    hooks += [f"blocks.{i}.{end}" for i in (0, 2) for end in ("mlp.hook_in", "hook_mlp_out")]
    bucket = {name: torch.randn(16, 32) for name in hooks}
    place = torch.device("cpu")
    clt = Learner(several(GIVEN[2]), bucket, model_name="m", device=place)
    with pytest.raises(BadFileError, match="a dictionary of other tensors or shapes"):
        clt.restore(tensors, {})
    save_file({**tensors, "sae.W_dec": torch.zeros(32, 32)}, weights)
    with pytest.raises(BadFileError, match="it is not the file that state.json was written with"):
        run(hooked2, several(GIVEN[0]), run_dir=tmp_path / "r", resume=True)
    with pytest.raises(BadFileError, match="another one: specs.jumprelu_clt_0_2 was None and is"):
        run(hooked2, several(GIVEN[1]), run_dir=tmp_path / "r", resume=True)


@EACH
def test_a_tensor_of_any_layer_that_is_not_finite(
    hooked2, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    recipe = several(changes)
    _, written = recipe.sites("clt" if "clt" in recipe.architecture else "crosscoder")

    def spoilt(bucket: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bucket[written[-1]][3, 5] = float("nan")
        return bucket

    place = "gemmascope_plugin.training.buckets.read_activations"
    monkeypatch.setattr(place, lambda *arguments: spoilt(read_activations(*arguments)))
    with pytest.raises(BadFileError, match=f"{written[-1]}.*not finite"):
        run(hooked2, recipe)


def test_a_clt_of_the_bundled_model_splices_as_its_files_do(tmp_path) -> None:
    model, tokens = gs.tiny().model, make_corpus(40, 1000).tokens
    short: dict[str, Any] = {"d_sae": 64, "layers": [0, 1, 2, 3], "steps": 20, "batch_size": 128}
    sae = gs.train(
        model, {**CLT, **short, "model": "gemma-2-tiny"}, tokens, run_dir=tmp_path, progress=False
    )
    entry = SaeSpec.from_layers_folder(exported(tmp_path), model="gemma-2-tiny", kind="clt")
    read = load(entry, check=True)
    text = tokens[:2] != PAD_ID  # padding is masked where dictionaries are spliced in
    with torch.no_grad():
        whole, logits = model(tokens[:2])[text], []
        for dictionary in (sae, read):
            with splice(model, dictionary, error="drop") as spliced:
                logits.append(spliced(tokens[:2])[text])
            with splice(model, dictionary) as spliced:
                assert torch.equal(spliced(tokens[:2])[text], whole)
    assert torch.equal(*logits) and not torch.allclose(logits[0], whole, atol=1e-2)
