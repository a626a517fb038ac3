"""Matryoshka suites and Tree SAEs: rows of SAELens, prefix sizes, widths."""

import pytest

from gemmascope_plugin.catalog import SaeSpec, find, get, tables
from gemmascope_plugin.catalog.community import MATRYOSHKAS, TREE_RELEASE


@pytest.mark.parametrize("release", MATRYOSHKAS)
def test_matryoshka_rows_are_those_of_saelens(release: str, saelens: dict) -> None:
    listing, specs = saelens[release], tables.specs_of(release)
    assert [s.repo_id for s in specs] == [listing["repo_id"]] * len(listing["saes"])
    assert {s.model for s in specs} == {listing["model"].removeprefix("google/")}
    for spec, row in zip(specs, listing["saes"], strict=True):
        values = (spec.sae_id, spec.path, spec.l0, spec.neuronpedia_id)
        assert values == (row["id"], row["path"], row["l0"], row.get("neuronpedia"))


def test_matryoshkas_know_their_prefixes_and_layout() -> None:
    spec = get("gemma-2-2b-res-snap-matryoshka-dc", "blocks.12.hook_resid_post")
    assert spec.levels == (128, 512, 2048, 8192, 32768) and spec.d_sae == 32768
    assert (spec.variant, spec.format, spec.l0_is) == ("snap", "sae_lens", "target")
    assert spec.filename == "snap/blocks.12.hook_resid_post/sae_weights.safetensors"
    assert spec.config_filename == "snap/blocks.12.hook_resid_post/cfg.json"
    assert len(find(levels=(128, 512, 2048, 8192, 32768))) == 25 + 25 + 41 + 25


def test_tree_checkpoints() -> None:
    specs = tables.specs_of(TREE_RELEASE)
    assert len(specs) == 12 + 12 + 4 + 4 == len({s.path for s in specs})
    assert {s.hook_in for s in specs} == {"blocks.5.hook_resid_pre"}
    tree = get(TREE_RELEASE, "gpt2-small/tree_sae_4layer_l0_32")
    assert tree.levels == (1536, 4608, 13824, 24576) and tree.variant == "tree-4"
    assert (tree.d_in, tree.d_sae, tree.l0, tree.format) == (768, 24576, 32, "tree")
    assert tree.filename == "gpt2-small/tree_sae_4layer_l0_32/sae.safetensors"
    assert get(TREE_RELEASE, "gpt2-small/matryoshka_2layer_49k").levels == (12288, 49152)
    assert get(TREE_RELEASE, "gpt2-small/tree_sae_2layer_6k").l0 == 8
    assert find(model="gpt2", variant="topk") == find(model="gpt2-small", variant="topk")
    for spec in specs:
        assert (spec.levels or (spec.d_sae,))[-1] == spec.d_sae
        assert SaeSpec(**vars(spec)) == spec
