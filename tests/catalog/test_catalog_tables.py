"""Tables: what SAELens lists, without its faults; written and read back unchanged."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from gemmascope_plugin.catalog import find, get, releases, sites, tables
from gemmascope_plugin.catalog.spec import SaeSpec
from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError

COUNTS = {
    "gemma-scope-2b-pt-res": 316,
    "gemma-scope-2b-pt-res-canonical": 58,
    "gemma-scope-2b-pt-att": 260,
    "gemma-scope-2b-pt-att-canonical": 52,
    "gemma-scope-2b-pt-mlp": 260,
    "gemma-scope-2b-pt-mlp-canonical": 52,
    "gemma-scope-2b-pt-transcoders": 26,
}


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


@pytest.mark.parametrize(("release", "count"), COUNTS.items())
def test_a_release_has_the_known_number_of_dictionaries(release: str, count: int) -> None:
    assert release in releases()
    specs = tables.specs_of(release)
    assert len(specs) == count == len({s.sae_id for s in specs}) == len({s.path for s in specs})


def test_rows_are_those_of_saelens_with_its_faults_corrected() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    for release in COUNTS:
        row = directory[release]
        specs = {s.sae_id: s for s in tables.specs_of(release)}
        assert {i: s.path for i, s in specs.items()} == dict(row.saes_map)
        for sae_id, spec in specs.items():
            assert spec.repo_id == row.repo_id and spec.model == row.model
            # SAELens has no L0 for embeddings and canonical rows and shows 0.
            assert row.expected_l0[sae_id] in (0.0, spec.l0)
            page = row.neuronpedia_id[sae_id]
            assert (
                page is None
                and (spec.canonical or not spec.neuronpedia_id)
                or (page == spec.neuronpedia_id)
            )


def test_shapes_hooks_and_sizes_per_site() -> None:
    res = get("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
    assert (res.d_in, res.d_out, res.d_sae, res.l0, res.canonical) == (2304, 2304, 16384, 71, True)
    assert res.hook_in == res.hook_out == "blocks.20.hook_resid_post"
    assert res.nbytes == 4 * (2 * 2304 * 16384 + 2 * 16384 + 2304)
    assert res.neuronpedia_id == "gemma-2-2b/20-gemmascope-res-16k"
    assert res.url == (
        "https://huggingface.co/google/gemma-scope-2b-pt-res/tree/main/"
        "layer_20/width_16k/average_l0_71"
    )
    att = find(model="2b", site="att", layer=3, width="16k", l0="canonical").one()
    assert (att.d_in, att.d_out, att.hook_in) == (2048, 2048, "blocks.3.attn.hook_z")
    mlp = find(model="2b", site="mlp", kind="sae", layer=3, width="16k", l0="canonical").one()
    assert (mlp.d_in, mlp.hook_in) == (2304, "blocks.3.hook_mlp_out")
    transcoder = find(model="2b", site="transcoder", layer=3).one()
    assert (transcoder.kind, transcoder.site) == ("transcoder", "mlp")
    assert transcoder.hook_in == "blocks.3.ln2.hook_normalized"
    assert transcoder.hook_out == "blocks.3.hook_mlp_out"
    embedding = find(model="2b", site="embedding", l0=44).one()
    assert (embedding.hook_in, embedding.layer, embedding.d_sae) == ("hook_embed", 0, 4096)


def test_a_canonical_id_names_the_file_of_the_plain_release() -> None:
    alias = get("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
    plain = get("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
    assert replace(alias, release=plain.release, sae_id=plain.sae_id) == plain


def test_a_table_is_read_back_as_it_was_written(tmp_path, monkeypatch) -> None:
    specs = tiny_specs()
    written = tables.dump_release(specs, folder=tmp_path)
    assert written.name == "gemma-2-tiny-transcoders.json"
    assert [f.name for f in tmp_path.iterdir()] == [written.name]
    assert tables.parse_release(json.loads(written.read_text())) == tuple(specs)
    assert '[0, "512", 9.25],\n' in written.read_text()
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    tables._files.cache_clear()
    tables.tables.cache_clear()
    tables.canonical_releases.cache_clear()
    try:
        assert find(model="tiny", layer=2, l0="canonical").one() == specs[5]
    finally:
        monkeypatch.undo()
        tables._files.cache_clear()
        tables.tables.cache_clear()
        tables.canonical_releases.cache_clear()


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


def test_importing_and_searching_the_catalog_loads_no_heavy_library() -> None:
    code = (
        "import sys; from gemmascope_plugin.catalog import find; find(model='2b', layer=20);"
        "print([m for m in ('torch', 'numpy', 'pandas', 'sae_lens', 'huggingface_hub')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
