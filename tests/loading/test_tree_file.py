"""Tree SAE checkpoints: parents, baselines, contradictions."""

import importlib

import numpy as np
import pytest
import torch
from gemma_scope_2_files import TREE_K, TREE_SIZES, put_tree, tree_arrays, tree_spec
from npz_files import D_IN, D_SAE

from gemmascope_plugin.errors import BadFileError, GemmaScopeError, WidthMismatchError
from gemmascope_plugin.loading import load, spec_of
from gemmascope_plugin.loading.sources import locate
from gemmascope_plugin.saes import TreeSAE


def test_parents_and_weights(tmp_path) -> None:
    sae_spec = tree_spec()
    put_tree(tmp_path, sae_spec)
    sae = load(sae_spec, local_dir=tmp_path)
    assert type(sae) is TreeSAE and spec_of(sae) == sae_spec
    values = tree_arrays()
    np.testing.assert_array_equal(sae.W_enc.numpy(), values["encoder.weight"].T)
    np.testing.assert_array_equal(sae.W_dec.numpy(), values["decoder.weight"].T)
    layer_parents = sae.parent[TREE_SIZES[0] :].numpy()
    stored = values["parent_index_1"]
    assert (sae.parent[: TREE_SIZES[0]] == -1).all() and (stored == TREE_SIZES[0]).any()
    np.testing.assert_array_equal(layer_parents, np.where(stored == TREE_SIZES[0], -1, stored))
    assert sae.cfg.hook_name == "blocks.5.hook_resid_pre" and sae.cfg.standardize
    x = torch.randn(6, D_IN, generator=torch.Generator().manual_seed(0))
    assert sae(x).shape == x.shape


@pytest.mark.parametrize("kind", ["topk", "matryoshka_4layer"])
def test_flat_baselines_are_trees_of_one_layer(tmp_path, kind: str) -> None:
    sae_spec = tree_spec()
    values = {k: v for k, v in tree_arrays().items() if not k.startswith("parent")}
    put_tree(tmp_path, sae_spec, values=values, type=kind)
    sae = load(sae_spec, local_dir=tmp_path)
    assert sae.cfg.features_per_layer == (D_SAE,) and sae.cfg.k_per_layer == (5,)


def test_matching_pursuit_is_refused(tmp_path) -> None:
    put_tree(tmp_path, tree_spec(), type="mp_sae")
    with pytest.raises(GemmaScopeError, match="matching-pursuit dictionary"):
        load(tree_spec(), local_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_name": "blocks.6.hook_resid_pre"}, "says hook_name 'blocks.6.hook_resid_pre'"),
        ({"d_in": 9}, "says d_in 9"),
        ({"features_per_layer": [8, 15]}, "has layers of"),
        ({"k_per_layer": [3]}, "has layers of"),
        ({"k_per_layer": [3, -1]}, "not positive integers"),
    ],
)
def test_configs_that_contradict(tmp_path, changes: dict, message: str) -> None:
    put_tree(tmp_path, tree_spec(), **changes)
    with pytest.raises(BadFileError, match=message):
        load(tree_spec(), local_dir=tmp_path)


def test_arrays_that_contradict(tmp_path) -> None:
    def refused(error, match, **changes):
        put_tree(tmp_path, tree_spec(), values={**tree_arrays(), **changes})
        with pytest.raises(error, match=match):
            load(tree_spec(), local_dir=tmp_path)

    parents = tree_arrays()["parent_index_1"]
    refused(BadFileError, "feature 8 of .* has parent 9", parent_index_1=np.full_like(parents, 9))
    refused(BadFileError, "has parent -1", parent_index_1=np.full_like(parents, -1))
    refused(WidthMismatchError, "b_dec .* has shape", b_dec=np.ones(7, np.float32))
    refused(BadFileError, "type torch.float32", parent_index_1=parents.astype(np.float32))


def test_saved_by_saelens_and_loaded_by_both(tmp_path) -> None:
    from sae_lens import SAE

    put_tree(tmp_path / "theirs", tree_spec())
    sae = load(tree_spec(), local_dir=tmp_path / "theirs")
    sae_spec = tree_spec(format="sae_lens", path="saved")
    sae.save_model(tmp_path / "saved")
    x = torch.randn(6, D_IN, generator=torch.Generator().manual_seed(0))
    for again in (load(sae_spec, local_dir=tmp_path), SAE.load_from_disk(tmp_path / "saved")):
        assert type(again) is TreeSAE and torch.equal(again.parent, sae.parent)
        for name, value in sae.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)
        torch.testing.assert_close(again(x), sae(x))
    assert load(sae_spec, local_dir=tmp_path, dtype=torch.bfloat16).parent.dtype == torch.int64


def test_other_types_keep_the_parents(tmp_path) -> None:
    put_tree(tmp_path, tree_spec())
    whole = load(tree_spec(), local_dir=tmp_path)
    half = load(tree_spec(), local_dir=tmp_path, dtype=torch.bfloat16)
    assert half.dtype == half.W_enc.dtype == torch.bfloat16 and half.cfg.dtype == "bfloat16"
    assert torch.equal(half.parent, whole.parent)


def test_k_beyond_its_layer(tmp_path) -> None:
    put_tree(tmp_path, tree_spec(), k_per_layer=[9, 2])
    with pytest.raises(BadFileError, match=r"\[8, 16\] features with k = \[9, 2\].*at most its"):
        load(tree_spec(), local_dir=tmp_path)


def test_saelens_loads_a_tree_of_the_catalog(tmp_path, monkeypatch) -> None:
    """The listed files are large: a small one takes the place of one of them."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    register_module = importlib.import_module("gemmascope_plugin.loading.saelens_registry")

    sae_spec = tree_spec()
    put_tree(tmp_path, sae_spec)
    files = locate(sae_spec, local_dir=tmp_path)
    register_module.register()
    monkeypatch.setattr(register_module, "_spec", lambda *_: sae_spec)
    monkeypatch.setattr(register_module, "locate", lambda *_, **__: files)
    names = ("tree-sae", "gpt2-small/tree_sae_2layer_6k")
    sae, loaded = SAE.from_pretrained(*names), load(sae_spec, local_dir=tmp_path)
    assert type(sae) is TreeSAE and spec_of(sae) == sae_spec
    for name, value in loaded.state_dict().items():
        assert torch.equal(sae.state_dict()[name], value)
    assert load_sae_config_from_huggingface(*names)["k_per_layer"] == TREE_K
