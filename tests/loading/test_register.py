"""register(): SAELens knows the catalog, loads with our loader, and nothing is done twice."""

import copy

import pytest
import torch
from npz_files import D_SAE, arrays, save

from gemmascope_plugin.catalog import find, releases
from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError
from gemmascope_plugin.loading import load, register, spec_of


def directory() -> dict:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()


@pytest.mark.parametrize("name", ["res", "att", "transcoder"])
def test_saelens_loads_a_bundled_release(suite, name: str) -> None:
    from sae_lens import SAE

    register()
    wanted = suite.specs[name]
    sae = SAE.from_pretrained(wanted.release, wanted.sae_id)
    loaded = load(wanted)
    assert type(sae) is type(loaded) and spec_of(sae) == wanted
    assert sae.cfg.to_dict() == loaded.cfg.to_dict()
    for key, value in loaded.state_dict().items():
        assert torch.equal(sae.state_dict()[key], value)


def test_it_is_idempotent_and_survives_a_cleared_cache(suite) -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    get_pretrained_saes_directory.cache_clear()
    register()
    once = copy.deepcopy(directory())
    register()
    assert directory() == once and set(releases()) <= set(once)
    get_pretrained_saes_directory.cache_clear()
    assert "gemma-2-test-res" not in directory()
    load(suite.specs["res"])
    assert directory() == once


def test_what_a_refreshed_catalog_adds_is_registered(monkeypatch) -> None:
    from dataclasses import replace
    from importlib import import_module

    from gemmascope_plugin.catalog import tables

    register()
    release = "gemma-scope-2b-pt-transcoders"
    assert "found/later" not in directory()[release].saes_map
    more = (*tables.specs_of(release), replace(find(release=release)[0], sae_id="found/later"))
    tables.clear_caches()
    monkeypatch.setattr(
        import_module("gemmascope_plugin.loading.saelens_registry"),
        "specs_of",
        lambda name: more if name == release else tables.specs_of(name),
    )
    register()
    assert directory()[release].saes_map.pop("found/later") == more[0].path


def test_rows_of_saelens_are_kept_and_only_pointed_at_our_loader(suite) -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    get_pretrained_saes_directory.cache_clear()
    before = copy.deepcopy(directory())
    register()
    for release, row in before.items():
        after = directory()[release]
        if not release.startswith("gemma-scope"):
            assert after == row  # SAELens' own format stays with SAELens' own loader
            continue
        assert after.conversion_func == "gemmascope"
        assert after.config_overrides == {"gemmascope_release": release}
        assert (after.release, after.repo_id) == (row.release, row.repo_id)
        assert row.saes_map.items() <= after.saes_map.items()
        assert row.neuronpedia_id.items() <= after.neuronpedia_id.items()


def test_what_saelens_declares_wrongly_is_set_right() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    get_pretrained_saes_directory.cache_clear()
    release, sae_id = "gemma-scope-9b-pt-res-canonical", "layer_20/width_524k/canonical"
    assert directory()[release].expected_l0[sae_id] == 78  # the folder is average_l0_48
    assert directory()[release].expected_l0["layer_20/width_16k/canonical"] == 0
    assert directory()["gemma-scope-9b-it-res"].model == "gemma-2-9b"
    assert "gemma-scope-2-1b-pt-clts" not in directory()
    register()
    assert directory()[release].expected_l0[sae_id] == 48
    assert directory()[release].expected_l0["layer_20/width_16k/canonical"] == 68
    assert directory()["gemma-scope-9b-it-res"].model == "gemma-2-9b-it"
    assert directory()["gemma-scope-2-4b-it-res"].model == "google/gemma-3-4b-it"
    assert len(directory()["gemma-scope-2-1b-pt-clts"].saes_map) == 8


def test_configs_need_no_file_and_keep_l0_and_neuronpedia_id(suite) -> None:
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    register()
    release, sae_id = "gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical"
    cfg = load_sae_config_from_huggingface(release, sae_id)
    assert (cfg["d_in"], cfg["d_sae"], cfg["architecture"]) == (2304, 16384, "jumprelu")
    meta = cfg["metadata"]
    assert meta["l0"] == 71 and meta["neuronpedia_id"] == "gemma-2-2b/20-gemmascope-res-16k"
    assert (meta["release"], meta["sae_id"]) == (release, sae_id)
    for name in (r for r in releases() if r.startswith("gemma-scope")):
        first = find(release=name)[0]
        if first.kind in ("crosscoder", "clt"):
            with pytest.raises(
                GemmaScopeError, match="SAELens has no class.*gemmascope_plugin.load"
            ):
                load_sae_config_from_huggingface(name, first.sae_id)
            continue
        cfg = load_sae_config_from_huggingface(name, first.sae_id)
        assert (cfg["d_in"], cfg["metadata"]["hook_name"]) == (first.d_in, first.hook_in)


def test_saelens_loads_an_embedding_dictionary_with_the_right_bias(suite, hub_cache) -> None:
    from sae_lens import SAE

    wanted = find(model="2b", site="embedding", l0=44).one()
    raw = arrays(d_in=2304, d_sae=4096, d_out=2304)
    hub_cache(wanted, **raw)
    register()
    sae = SAE.from_pretrained(wanted.release, wanted.sae_id)
    torch.testing.assert_close(sae.b_dec.data, torch.from_numpy(raw["b_dec"]) * 48)
    assert spec_of(sae) == wanted and sae.cfg.metadata.l0 == 44


def test_a_folder_that_only_saelens_knows_is_derived(suite) -> None:
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    register()
    row = directory()["gemma-scope-2b-pt-transcoders"]
    path = "layer_12/width_16k/average_l0_604"
    row.saes_map[path] = path
    try:
        cfg = load_sae_config_from_huggingface(row.release, path)
    finally:
        del row.saes_map[path]
    assert cfg["metadata"]["gemmascope_spec"]["provenance"] == "derived"
    assert cfg["metadata"]["hook_name"] == "blocks.12.ln2.hook_normalized"


def test_our_loader_serves_as_a_converter_and_refuses_foreign_repositories(suite) -> None:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS

    register()
    wanted = suite.specs["res"]
    save(suite.file("res"), **arrays())
    loader = NAMED_PRETRAINED_SAE_LOADERS["gemmascope"]
    cfg, state, sparsity = loader(wanted.repo_id, wanted.path, cfg_overrides={"dtype": "float16"})
    assert cfg["dtype"] == "float16" and state["W_enc"].dtype == torch.float16 and sparsity is None
    assert SAE.from_pretrained(wanted.release, wanted.sae_id, converter=loader).cfg.d_sae == D_SAE
    with pytest.raises(UnknownNameError, match="repository 'other/repo' is in no release"):
        loader("other/repo", "x")


def test_a_saelens_that_moved_its_tables_is_named(monkeypatch) -> None:
    import sae_lens
    from sae_lens.loading import pretrained_sae_loaders

    monkeypatch.delattr(pretrained_sae_loaders, "NAMED_PRETRAINED_SAE_LOADERS")
    with pytest.raises(GemmaScopeError) as error:
        register()
    assert str(error.value).startswith(
        f"SAELens {sae_lens.__version__} has moved the tables that releases are registered in ("
    )
    assert str(error.value).endswith("Try: pip install 'sae-lens>=6.54,<7'")


def test_saelens_knows_our_classes() -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    register()
    assert {"tree", "matryoshka_jumprelu"} <= set(SAE_CLASS_REGISTRY)
    trained = {"tree", "gemma_scope_jumprelu", "matryoshka_prefix_batchtopk"}
    assert trained <= set(SAE_TRAINING_CLASS_REGISTRY)
