"""Tables of bundled dictionaries are read back as written; releases, ids and derived folders."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from gemmascope_plugin.catalog import find, get, releases, tables
from gemmascope_plugin.catalog import site_names as sites
from gemmascope_plugin.catalog.spec import SaeSpec
from gemmascope_plugin.catalog.tables import parse_release
from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError


def tiny_specs() -> list[SaeSpec]:
    specs = []
    for layer in range(4):
        for l0, canonical in ((9.25, False), (17.3, True)):
            path = sites.standard_path(layer, "512", l0)
            read, written = sites.hooks("transcoder", "mlp", layer)
            specs.append(
                SaeSpec(
                    release="gemma-2-tiny-transcoders",
                    sae_id=path,
                    repo_id="bundled/gemma-2-tiny-transcoders",
                    path=path,
                    model="gemma-2-tiny",
                    kind="transcoder",
                    site="mlp",
                    layer=layer,
                    width="512",
                    d_in=128,
                    d_out=128,
                    d_sae=512,
                    l0=l0,
                    hook_in=read,
                    hook_out=written,
                    nbytes=sites.raw_nbytes(128, 128, 512),
                    canonical=canonical,
                )
            )
    return specs


def test_a_table_is_read_back_as_it_was_written(tmp_path, monkeypatch) -> None:
    specs = tiny_specs()
    written = tables.dump_release(specs, folder=tmp_path)
    assert written.name == "gemma-2-tiny-transcoders.json"
    assert [f.name for f in tmp_path.iterdir()] == [written.name]
    assert parse_release(json.loads(written.read_text())) == tuple(specs)
    assert '[0, "512", 9.25],\n' in written.read_text()
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    tables.clear_caches()
    try:
        assert find(release=specs[0].release, layer=2, l0="canonical").one() == specs[5]
        assert specs[0].release in releases()
        assert tables.derive("gemma-scope-2b-pt-res", "layer_1/width_16k/average_l0_1").l0 == 1
    finally:
        monkeypatch.undo()
        tables.clear_caches()


def test_specs_that_the_format_cannot_hold_are_refused(tmp_path) -> None:
    odd = [replace(tiny_specs()[0], path="elsewhere", sae_id="elsewhere")]
    with pytest.raises(GemmaScopeError, match=r"cannot be written as a table\. There is: the same"):
        tables.dump_release(odd, folder=tmp_path)
    mixed = [tiny_specs()[0], replace(tiny_specs()[1], release="other")]
    with pytest.raises(GemmaScopeError, match="exactly one release"):
        tables.dump_release(mixed, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_release_and_id_name_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as error:
        get("gemma-scope-2b-res", "x")
    assert str(error.value).startswith("no release 'gemma-scope-2b-res'. There is: gemma-")
    assert "Did you mean 'gemma-scope-2b-pt-res'" in str(error.value)
    with pytest.raises(UnknownNameError) as error:
        get("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_72")
    assert "no dictionary 'layer_20/width_16k/average_l0_72' in release" in str(error.value)
    assert "'layer_20/width_16k/average_l0_71'" in str(error.value)
    assert str(error.value).endswith("Try: find(release='gemma-scope-2b-pt-res') lists all of them")


def test_a_folder_that_no_table_lists_is_derived_and_says_so() -> None:
    spec = tables.derive("gemma-scope-2b-pt-transcoders", "layer_12/width_16k/average_l0_604")
    assert (spec.layer, spec.l0, spec.provenance) == (12, 604.0, "derived")
    assert spec.hook_in == "blocks.12.ln2.hook_normalized"
    assert spec.neuronpedia_id is None and not spec.canonical
    with pytest.raises(UnknownNameError, match="has an unknown pattern"):
        tables.derive("gemma-scope-2b-pt-transcoders", "layer_12/width_17k/average_l0_604")


@pytest.mark.parametrize(
    ("release", "path"),
    [
        ("gemma-scope-2-4b-it-att", "attn_out/layer_3_width_16k_l0_big"),
        ("gemma-scope-2-4b-it-transcoders", "transcoder/layer_9_width_1m_l0_big_affine_seed_2"),
        ("gemma-scope-2-4b-it-res-all", "resid_post_all/layer_33_width_65k_l0_medium"),
    ],
)
def test_folders_of_the_second_suite_are_derived_from_their_names(release: str, path: str) -> None:
    spec = tables.derive(release, path)
    assert (spec.release, spec.path, spec.provenance) == (release, path, "derived")
    assert SaeSpec(**vars(spec)) == spec
    assert (spec.variant == "seed_2") == path.endswith("seed_2")


@pytest.mark.parametrize(
    ("release", "path"),
    [
        ("gemma-scope-2-4b-it-att", "attn_out/layer_34_width_16k_l0_big"),
        ("gemma-scope-2-4b-it-att", "attn_out/layer_3_width_16k_l0_big_affine"),
        ("gemma-scope-2-4b-it-att", "mlp_out/layer_3_width_16k_l0_big"),
        ("gemma-scope-2-4b-it-att", "layer_3/width_16k/average_l0_3"),
        ("gemma-scope-2b-pt-res", "resid_post/layer_3_width_16k_l0_big"),
        ("gemma-scope-2b-pt-mlp", "embedding/width_4k/average_l0_3"),
        ("gemma-scope-2b-pt-mlp", "layer_26/width_16k/average_l0_3"),
        ("gemma-2-2b-res-matryoshka-dc", "standard/blocks.25.hook_resid_post"),
    ],
)
def test_folders_that_cannot_be_are_refused(release: str, path: str) -> None:
    with pytest.raises(UnknownNameError, match="has an unknown pattern"):
        tables.derive(release, path)


def test_importing_and_searching_the_catalog_loads_no_heavy_library() -> None:
    code = (
        "import sys; from gemmascope_plugin.catalog import find; find(layer=20);"
        "print([m for m in ('torch', 'numpy', 'pandas', 'sae_lens', 'huggingface_hub')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
