"""Tree SAE checkpoints: parents, baselines, contradictions."""

import numpy as np
import pytest
import torch
from gemma_scope_2_files import TREE_SIZES, put_tree, tree_arrays, tree_spec
from npz_files import D_IN, D_SAE

from gemmascope_plugin.errors import BadFileError, GemmaScopeError, WidthMismatchError
from gemmascope_plugin.loading import load, spec_of
from gemmascope_plugin.saes import TreeSAE


def test_parents_and_weights(tmp_path) -> None:
    one = tree_spec()
    put_tree(tmp_path, one)
    sae = load(one, local_dir=tmp_path)
    assert type(sae) is TreeSAE and spec_of(sae) == one
    values = tree_arrays()
    np.testing.assert_array_equal(sae.W_enc.numpy(), values["encoder.weight"].T)
    np.testing.assert_array_equal(sae.W_dec.numpy(), values["decoder.weight"].T)
    own = sae.parent[TREE_SIZES[0] :].numpy()
    stored = values["parent_index_1"]
    assert (sae.parent[: TREE_SIZES[0]] == -1).all() and (stored == TREE_SIZES[0]).any()
    np.testing.assert_array_equal(own, np.where(stored == TREE_SIZES[0], -1, stored))
    assert sae.cfg.hook_name == "blocks.5.hook_resid_pre" and sae.cfg.standardize
    x = torch.randn(6, D_IN, generator=torch.Generator().manual_seed(0))
    assert sae(x).shape == x.shape


@pytest.mark.parametrize("kind", ["topk", "matryoshka_4layer"])
def test_flat_baselines_are_trees_of_one_layer(tmp_path, kind: str) -> None:
    one = tree_spec()
    values = {k: v for k, v in tree_arrays().items() if not k.startswith("parent")}
    put_tree(tmp_path, one, values=values, type=kind)
    sae = load(one, local_dir=tmp_path)
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
