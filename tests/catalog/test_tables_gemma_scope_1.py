"""Gemma Scope 1: counts of the reference, SAELens' rows without their faults, canonical by rule."""

import re
from dataclasses import replace

import pytest

from gemmascope_plugin.catalog import SaeSpec, find, get, releases, tables
from gemmascope_plugin.catalog.gemma_scope_1 import nearest_to_100

COUNTS = {
    "gemma-scope-2b-pt-res": 316,
    "gemma-scope-2b-pt-res-canonical": 58,
    "gemma-scope-2b-pt-att": 260,
    "gemma-scope-2b-pt-att-canonical": 52,
    "gemma-scope-2b-pt-mlp": 260,
    "gemma-scope-2b-pt-mlp-canonical": 52,
    "gemma-scope-2b-pt-transcoders": 26,
    "gemma-scope-9b-pt-res": 536,
    "gemma-scope-9b-pt-res-canonical": 90,
    "gemma-scope-9b-pt-att": 492,
    "gemma-scope-9b-pt-att-canonical": 84,
    "gemma-scope-9b-pt-mlp": 492,
    "gemma-scope-9b-pt-mlp-canonical": 84,
    "gemma-scope-9b-it-res": 30,
    "gemma-scope-9b-it-res-canonical": 6,
    "gemma-scope-27b-pt-res": 18,
    "gemma-scope-27b-pt-res-canonical": 3,
}
"""17 releases, 2,430 dictionaries and 429 canonical aliases."""

WRONG_PAGES = {
    # A file of layer 2, a page of layer 20.
    ("gemma-scope-9b-pt-res", "layer_2/width_16k/average_l0_8"),
    # The page of l0 12, of which there is no file.
    ("gemma-scope-9b-pt-res", "layer_20/width_131k/average_l0_114"),
}
"""Neuronpedia ids of SAELens that belong to another file."""


@pytest.mark.parametrize(("release", "count"), COUNTS.items())
def test_a_release_has_the_known_number_of_dictionaries(release: str, count: int) -> None:
    assert release in releases()
    specs = tables.specs_of(release)
    assert len(specs) == count == len({s.sae_id for s in specs}) == len({s.path for s in specs})


def test_the_suite_is_complete() -> None:
    suite = {r for r in releases() if re.match(r"gemma-scope-\d+b-", r)}
    assert suite == set(COUNTS)
    plain = [r for r in suite if not r.endswith("-canonical")]
    assert sum(COUNTS[r] for r in plain) == 2430
    assert sum(COUNTS.values()) == 2430 + 429


@pytest.mark.parametrize("release", COUNTS)
def test_rows_are_those_of_saelens_with_its_faults_corrected(release: str, saelens: dict) -> None:
    listing, specs = saelens[release], tables.specs_of(release)
    by_id = {s.sae_id: s for s in specs}
    assert {i: s.path for i, s in by_id.items()} == {r["id"]: r["path"] for r in listing["saes"]}
    assert {s.repo_id for s in specs} == {listing["repo_id"]}
    # SAELens calls the model of the instruction-tuned residual release gemma-2-9b.
    model = "gemma-2-9b-it" if "9b-it" in release else listing["model"]
    assert {s.model for s in specs} == {model}
    for row in listing["saes"]:
        spec = by_id[row["id"]]
        if (release, row["id"]) != (
            "gemma-scope-9b-pt-res-canonical",
            "layer_20/width_524k/canonical",
        ):
            assert row.get("l0") in (None, spec.l0)
        else:
            assert (row["l0"], spec.l0) == (78, 48)  # the folder is average_l0_48
        page = row.get("neuronpedia")
        if (release, row["id"]) in WRONG_PAGES:
            assert page != spec.neuronpedia_id
        elif page is None:  # only canonical files get one that SAELens gives to the alias alone
            assert spec.canonical or spec.neuronpedia_id is None
        else:
            assert page == spec.neuronpedia_id


def test_as_many_pages_as_saelens_has_but_for_the_wrong_ones(saelens: dict) -> None:
    pages = {s.neuronpedia_id for r in COUNTS for s in tables.specs_of(r) if s.neuronpedia_id}
    listing = {row.get("neuronpedia") for r in COUNTS for row in saelens[r]["saes"]} - {None}
    assert listing - pages == {
        "gemma-2-9b/20-gemmascope-res-131k__l0-10",
        "gemma-2-9b/20-gemmascope-res-131k__l0-12",
    }
    assert pages <= listing


def by_layer_and_width() -> dict[tuple[object, ...], list[SaeSpec]]:
    groups: dict[tuple[object, ...], list[SaeSpec]] = {}
    for release in COUNTS:
        if not release.endswith(("-canonical", "-transcoders")):
            for spec in tables.specs_of(release):
                if spec.site != "embedding":
                    groups.setdefault((release, spec.layer, spec.width), []).append(spec)
    return groups


def test_canonical_is_the_l0_nearest_to_100_but_for_one_tie() -> None:
    against = {}
    for key, specs in by_layer_and_width().items():
        (chosen,) = [s.l0 for s in specs if s.canonical]
        ladder = [int(s.l0 or 0) for s in specs]
        assert abs((chosen or 0) - 100) == min(abs(l0 - 100) for l0 in ladder)
        if chosen != nearest_to_100(ladder):
            against[key] = (chosen, nearest_to_100(ladder))
    assert against == {("gemma-scope-9b-pt-att", 27, "16k"): (136, 64)}


def test_both_ties_are_broken_as_published() -> None:
    tie = {"model": "9b", "site": "att", "l0": "canonical"}
    assert find(**tie, layer=27, width="16k").one().l0 == 136
    assert find(**tie, layer=23, width="131k").one().l0 == 66


def test_widths_without_a_canonical_id_have_a_canonical_choice() -> None:
    choice = find(release="gemma-scope-2b-pt-res", layer=12, width="131k", l0="canonical").one()
    assert choice.l0 == 129
    assert choice.neuronpedia_id is None
    ids = {s.sae_id for s in tables.specs_of("gemma-scope-2b-pt-res-canonical")}
    assert "layer_12/width_131k/canonical" not in ids


def test_shapes_hooks_and_sizes_per_site() -> None:
    res = get("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
    assert (res.d_in, res.d_out, res.d_sae, res.l0, res.canonical) == (2304, 2304, 16384, 71, True)
    assert (res.l0_is, res.gain, res.format, res.provenance) == (
        *("measured", "without", "npz", "listed"),
    )
    assert res.hook_in == res.hook_out == "blocks.20.hook_resid_post"
    assert res.hooks_in == (res.hook_in,) and res.all_layers == (20,)
    assert res.filenames == ("layer_20/width_16k/average_l0_71/params.npz",)
    assert res.config_filename is None
    assert res.nbytes == 4 * (2 * 2304 * 16384 + 2 * 16384 + 2304)
    assert res.neuronpedia_id == "gemma-2-2b/20-gemmascope-res-16k"
    assert res.neuronpedia_url == "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k"
    assert res.url == (
        "https://huggingface.co/google/gemma-scope-2b-pt-res/tree/main/"
        "layer_20/width_16k/average_l0_71"
    )
    att = find(model="2b", site="att", layer=3, width="16k", l0="canonical").one()
    assert (att.d_in, att.d_out, att.hook_in) == (2048, 2048, "blocks.3.attn.hook_z")
    mlp = find(model="2b", site="mlp", kind="sae", layer=3, width="16k", l0="canonical").one()
    assert (mlp.d_in, mlp.hook_in) == (2304, "blocks.3.hook_mlp_out")
    transcoder = find(model="2b", site="transcoder", layer=3).one()
    assert (transcoder.kind, transcoder.site, transcoder.gain) == ("transcoder", "mlp", "without")
    assert transcoder.hook_in == "blocks.3.ln2.hook_normalized"
    assert transcoder.hook_out == "blocks.3.hook_mlp_out"
    embedding = find(model="2b", site="embedding", l0=44).one()
    assert (embedding.hook_in, embedding.layer, embedding.d_sae) == ("hook_embed", 0, 4096)
    assert {s.l0 for s in find(model="9b", site="embedding")} == {7, 14, 22, 80}


@pytest.mark.parametrize(("model", "d_in", "d_att"), [("2b", 2304, 2048), ("9b", 3584, 4096)])
def test_widths_of_the_models(model: str, d_in: int, d_att: int) -> None:
    of_att = find(model=model, site="att", format="npz")
    assert {s.d_in for s in of_att} == {d_att}
    assert {s.d_in for s in find(model=model, site=["res", "mlp", "embedding"])} == {d_in}


def test_sizes_are_those_of_the_reference() -> None:
    assert find(model="gemma-2-27b", l0="canonical", layer=10).one().nbytes == pytest.approx(
        4.833e9, rel=1e-3
    )
    assert find(release="gemma-scope-9b-pt-res", width="1m")[0].nbytes == pytest.approx(
        30.07e9, rel=1e-3
    )


def test_a_canonical_id_names_the_file_of_the_plain_release() -> None:
    alias = get("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
    plain = get("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
    assert replace(alias, release=plain.release, sae_id=plain.sae_id) == plain
