"""Gemma Scope 2: counts of the reference, SAELens' ids and L0s, what it lacks, sizes and hooks."""

from collections import Counter

import pytest

from gemmascope_plugin.catalog import SaeSpec, find, get, releases, tables
from gemmascope_plugin.catalog.gemma_scope_2 import SIZES, heads, target_l0, unlisted_spec

EXPECTED = {"270m": 556, "1b": 728, "4b": 876, "12b": 1156, "27b": 1436}
"""Single-layer dictionaries per repository."""
LISTED = {**EXPECTED, "270m-pt": 486, "27b-pt": 791, "27b-it": 1431}
MULTI = ("crosscoder", "clt")


def suite() -> list[SaeSpec]:
    return [spec for release in heads() for spec in tables.specs_of(release)]


def listed(name: str) -> int:
    return LISTED.get(name, LISTED[name.split("-")[0]])


@pytest.mark.parametrize("size", EXPECTED)
@pytest.mark.parametrize("tuning", ["pt", "it"])
def test_a_repository_has_the_known_number_of_dictionaries(size: str, tuning: str) -> None:
    name = f"{size}-{tuning}"
    single = [s for s in suite() if s.repo_id.endswith(name) and s.kind not in MULTI]
    assert len(single) == EXPECTED[size] == len({s.path for s in single})
    assert sum(s.provenance == "listed" for s in single) == listed(name)


def test_the_suite_is_complete() -> None:
    counts = Counter(s.kind if s.kind in MULTI else "single" for s in suite())
    assert counts == {"single": 9504, "crosscoder": 80, "clt": 32}
    unlisted = [s for s in suite() if s.provenance == "derived" and s.kind not in MULTI]
    assert len(unlisted) == 720
    assert Counter(
        (s.repo_id.removeprefix("google/gemma-scope-2-"), s.path.split("/")[0]) for s in unlisted
    ) == {
        ("27b-pt", "transcoder"): 72,
        ("27b-pt", "mlp_out"): 36,
        ("27b-pt", "attn_out"): 36,
        ("27b-pt", "mlp_out_all"): 248,
        ("27b-pt", "attn_out_all"): 248,
        ("270m-pt", "transcoder"): 70,
        ("27b-pt", "transcoder_all"): 5,
        ("27b-it", "transcoder_all"): 5,
    }
    assert all(s.provenance == "derived" for s in suite() if s.kind in MULTI)


def test_ids_paths_l0_and_pages_are_those_of_saelens(saelens: dict) -> None:
    listings = {name: row for name, row in saelens.items() if name.startswith("gemma-scope-2-")}
    assert len(listings) == 75 and set(listings) <= set(releases())
    seen = 0
    for release, row in listings.items():
        by_id = {s.sae_id: s for s in tables.specs_of(release)}
        assert {s.repo_id for s in by_id.values()} == {row["repo_id"]}
        assert {f"google/{s.model}" for s in by_id.values()} == {row["model"]}
        for entry in row["saes"]:
            spec = by_id.pop(entry["id"])
            assert spec.path == entry["path"] and spec.provenance == "listed"
            assert spec.l0 == entry["l0"] and spec.l0_is == "target"
            assert spec.neuronpedia_id == entry.get("neuronpedia")
            seen += 1
        assert {s.provenance for s in by_id.values()} <= {"derived"}
    assert seen == 8784


def test_222_dictionaries_have_a_page() -> None:
    assert sum(s.neuronpedia_id is not None for s in suite()) == 222


@pytest.mark.parametrize(
    ("label", "every_layer", "first", "last"),
    [
        ("small", False, 10, 20),
        ("medium", False, 30, 60),
        ("big", False, 60, 150),
        ("big", True, 60, 120),
    ],
)
def test_targets_ramp_over_a_third_of_the_depth(
    label: str, every_layer: bool, first: int, last: int
) -> None:
    for size in SIZES.values():
        n = size.n_layers
        targets = [target_l0(label, i, n, every_layer=every_layer) for i in range(n)]
        assert targets == sorted(targets) and targets[0] == first
        assert set(targets[-(-n // 3) :]) == {last}


def test_canonical_is_the_target_nearest_to_100() -> None:
    groups: dict[tuple[object, ...], list[SaeSpec]] = {}
    for spec in suite():
        if spec.kind not in MULTI and spec.variant != "seed_1":
            key = (spec.release, spec.layer, spec.width, spec.affine)
            groups.setdefault(key, []).append(spec)
    for specs in groups.values():
        (chosen,) = [s for s in specs if s.canonical]
        distance = {abs((s.l0 or 0) - 100): s for s in sorted(specs, key=lambda s: -(s.l0 or 0))}
        assert chosen == distance[min(distance)]
    assert not any(s.canonical for s in suite() if s.kind in MULTI or s.variant == "seed_1")


def test_hooks_gain_and_files_per_site() -> None:
    release = "gemma-scope-2-4b-it-{}".format
    res = get(release("res"), "layer_17_width_262k_l0_medium_seed_1")
    assert (res.variant, res.l0, res.l0_label) == ("seed_1", 60, "medium")
    assert res.hook_in == res.hook_out == "blocks.17.hook_resid_post"
    assert res.filename == "resid_post/layer_17_width_262k_l0_medium_seed_1/params.safetensors"
    assert res.config_filename == "resid_post/layer_17_width_262k_l0_medium_seed_1/config.json"
    assert (res.format, res.gain, res.variant) == ("gemma-scope-2", "without", "seed_1")
    att = get(release("att-all"), "layer_33_width_16k_l0_big")
    assert (att.hook_in, att.d_in, att.variant) == ("blocks.33.attn.hook_z", 2048, "all")
    mlp = get(release("mlp"), "layer_9_width_65k_l0_small")
    assert (mlp.hook_in, mlp.gain, mlp.d_in) == ("blocks.9.hook_mlp_out", "without", 2560)
    skip = get(release("transcoders"), "transcoder/layer_29_width_16k_l0_big_affine")
    assert (skip.kind, skip.affine, skip.gain) == ("transcoder", True, "with")
    assert (skip.hook_in, skip.hook_out) == ("blocks.29.mlp.hook_in", "blocks.29.hook_mlp_out")
    plain = get(release("transcoders"), "transcoder/layer_29_width_16k_l0_big")
    assert skip.nbytes - plain.nbytes == 4 * 2560 * 2560
    assert not any("examples" in name for s in suite() for name in s.filenames)


def test_widths_of_the_1b_mlp_release_go_to_1m() -> None:
    for tuning in ("pt", "it"):
        specs = tables.specs_of(f"gemma-scope-2-1b-{tuning}-mlp")
        assert len(specs) == 48 and sum(s.width == "1m" for s in specs) == 12
    assert {s.width for s in tables.specs_of("gemma-scope-2-4b-it-mlp")} == {"16k", "65k", "262k"}


@pytest.mark.parametrize(
    ("size", "gigabytes"),
    [("270m", 0.084), ("1b", 0.151), ("4b", 0.336), ("12b", 0.503), ("27b", 0.705)],
)
def test_sizes_of_single_layer_files(size: str, gigabytes: float) -> None:
    spec = find(repo_id=f"google/gemma-scope-2-{size}-it", site="res", width="16k")[0]
    assert spec.nbytes == pytest.approx(gigabytes * 1e9, rel=0.01)


def test_crosscoders_have_four_layers_and_their_width_in_all() -> None:
    spec = get("gemma-scope-2-270m-pt-crosscoders", "layer_5_9_12_15_width_262k_l0_medium")
    assert (spec.kind, spec.site, spec.format, spec.gain) == (
        *("crosscoder", "res", "crosscoder", "without"),
    )
    assert spec.layers == spec.all_layers == (5, 9, 12, 15) and spec.layer == 5
    assert spec.hooks_in == tuple(f"blocks.{n}.hook_resid_post" for n in spec.layers)
    assert (spec.d_in, spec.d_sae, spec.d_sae_per_layer) == (640, 4 * 65536, 65536)
    assert spec.filenames[3] == (
        "crosscoder/layer_5_9_12_15_width_262k_l0_medium/params_layer_3.safetensors"
    )
    assert len(spec.filenames) == 4 and spec.filename == spec.filenames[0]
    assert (spec.l0, spec.l0_label, spec.l0_text) == (None, "medium", "medium")
    assert spec.layer_text == "5,9,12,15"
    sizes = {s.model: s.nbytes / 1e9 for s in find(kind="crosscoder", width="262k", l0="big")}
    rounded = {m: round(v, 1) for m, v in sizes.items() if m.endswith("it")}
    assert list(rounded.values()) == [3.4, 6.0, 13.4, 20.1, 28.2]


def test_clts_have_every_layer_and_their_width_in_all() -> None:
    assert {s.model for s in find(kind="clt")} == {
        *("gemma-3-270m", "gemma-3-270m-it", "gemma-3-1b-pt", "gemma-3-1b-it"),
    }
    spec = get("gemma-scope-2-1b-pt-clts", "width_262k_l0_medium_affine")
    assert (spec.d_sae, spec.d_sae_per_layer, len(spec.filenames)) == (262_080, 10_080, 26)
    assert spec.hooks_in[25] == "blocks.25.mlp.hook_in" and spec.gain == "with"
    assert spec.hooks_out[25] == "blocks.25.hook_mlp_out" and spec.layer_text == "0-25"
    assert find(model="gemma-3-270m", kind="clt", width="262k")[0].d_sae_per_layer == 14_560
    plain = get("gemma-scope-2-1b-pt-clts", "width_262k_l0_medium")
    assert plain.nbytes == pytest.approx(32.6e9, rel=2e-3)
    assert spec.nbytes - plain.nbytes == 4 * 26 * 1152 * 1152
    wide = get("gemma-scope-2-1b-pt-clts", "width_524k_l0_big")
    assert (wide.d_sae_per_layer, round(wide.nbytes / 1e9, 1)) == (20_160, 65.2)


def test_every_spec_is_what_the_constructor_would_make() -> None:
    for spec in suite()[::97]:
        assert SaeSpec(**vars(spec)) == spec and hash(spec) == hash(SaeSpec(**vars(spec)))


def test_an_entry_made_from_its_name_is_the_one_of_the_rules() -> None:
    spec = get("gemma-scope-2-4b-it-transcoders", "transcoder/layer_29_width_16k_l0_big_affine")
    made = unlisted_spec("gemma-scope-2-4b-it-transcoders", 29, "16k", "big", "_affine")
    assert (made.provenance, made.canonical) == ("derived", False)
    assert vars(made) == {**vars(spec), "provenance": "derived", "canonical": False}
