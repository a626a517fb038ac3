"""Hierarchy of whole dictionaries: forests of their own and from activations, levels, known concepts."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch

from gemmascope_plugin.errors import (
    EmptySelectionError,
    ModelError,
    UnknownNameError,
    WidthMismatchError,
)
from gemmascope_plugin.measures import Hierarchy, hierarchy
from gemmascope_plugin.measures.forest import edge_frame, mcs_parents
from gemmascope_plugin.measures.probe import probe_edges
from gemmascope_plugin.saes import SparseActs
from gemmascope_plugin.splice import HookedSAE
from tests import factories
from tests.factories import activations, unchecked
from tests.splice.kinds import TWO_KINDS
from tests.splice.reference import features
from tests.splice.test_level_and_encoder import LEVELS, matryoshka
from tests.splice.test_tree_splice import tree
from tests.tiny_models import FIRST_WORD_ID, PAD_ID, random_tokens

TOKENS = random_tokens(batch_size=20)
TOKENS[3, 14:] = PAD_ID
KEEP = TOKENS >= FIRST_WORD_ID
RULES: dict[str, Any] = {"min_tokens": 8, "min_mcs": 0.2, "steps": 30}
CONCEPTS = torch.stack([TOKENS < 200, TOKENS < 130, TOKENS < 100, TOKENS % 2 == 0, KEEP], -1)
NAMES = ["below 200", "below 130", "below 100", "even", "word"]


def acts_of(model: Any, sae: Any) -> SparseActs:
    x = activations(model, TOKENS, sae.cfg.metadata.hook_name)[KEEP]
    return SparseActs.from_dense(features(sae, x))


@TWO_KINDS
def test_a_forest_from_activations_of_the_tokens_that_count(model) -> None:
    sae = factories.residual(model, 1)
    result = hierarchy(model, sae, TOKENS, n_parents=0, batch_size=3, **RULES)
    acts = acts_of(model, sae)
    assert result.forest == "mcs" and result.n_tokens == acts.n_tokens == int(KEEP.sum())
    assert torch.equal(result.parent, mcs_parents(acts, min_tokens=8, min_mcs=0.2))
    expected = edge_frame(acts, result.parent, min_tokens=8)
    assert result.n_edges == len(expected) > 20
    pd.testing.assert_frame_equal(result.edges[list(expected.columns)], expected, rtol=1e-5)
    assert result.coverage == pytest.approx(expected["coverage"].mean())
    assert result.binary_mcs == pytest.approx((expected["coverage"] ** 0.5).mean())
    assert math.isnan(result.s_res) and result.edges["hit"].isna().all()
    assert result.recovery is None and result.edges["is_ancestor"].isna().all()


def test_a_tree_has_its_own_forest_and_covers_it(hooked2) -> None:
    sae = tree()
    result = hierarchy(hooked2, sae, TOKENS, **RULES)
    assert result.forest == "own" and torch.equal(result.parent, sae.parent)
    assert (result.edges["coverage"] == 1).all() and result.binary_mcs == 1
    assert result.n_edges > 5 and 0 <= result.sibling_iou <= 1
    assert (result.edges["child"] >= 8).all() and (result.edges["parent"] < 8).all()
    binary = hierarchy(hooked2, sae, TOKENS, similarity="binary", n_parents=0, **RULES)
    assert binary.mcs == pytest.approx(binary.binary_mcs) == pytest.approx(result.binary_mcs)
    other = hierarchy(hooked2, sae, TOKENS, forest="mcs", n_parents=0, **RULES)
    assert other.forest == "mcs" and (other.parent[:8] == -1).all()  # its layers are levels
    assert other.parent.max() < 8 and not torch.equal(other.parent, result.parent)


def test_the_first_level_of_a_tree_has_no_edges(hooked2) -> None:
    result = hierarchy(hooked2, HookedSAE(tree(), level=0), TOKENS, CONCEPTS, NAMES, **RULES)
    assert (result.level, result.d_sae, result.n_edges, result.n_probed) == (0, 8, 0, 0)
    row = result.row()
    assert all(math.isnan(row[name]) for name in ("coverage", "mcs", "s_res", "tree_precision"))
    assert all(math.isnan(row[name]) for name in ("sibling_iou", "chance_precision"))
    assert "0 edges" in repr(result)


def test_parents_of_a_matryoshka_are_in_earlier_levels(hooked2) -> None:
    result = hierarchy(hooked2, matryoshka(hooked2), TOKENS, n_parents=0, **RULES)
    level = torch.bucketize(torch.arange(LEVELS[-1]), torch.tensor(LEVELS), right=True)
    child = torch.tensor(result.edges["child"].tolist())
    assert len(child) > 20 and (level[result.parent[child]] < level[child]).all()
    middle = hierarchy(
        hooked2, HookedSAE(matryoshka(hooked2), level=1), TOKENS, n_parents=0, **RULES
    )
    assert (middle.level, len(middle.parent)) == (1, LEVELS[1])
    acts = acts_of(hooked2, matryoshka(hooked2)).to_dense()[:, : LEVELS[1]]
    options = {"levels": LEVELS[:2], "min_tokens": 8, "min_mcs": 0.2}
    expected = mcs_parents(SparseActs.from_dense(acts), **options)
    assert torch.equal(middle.parent, expected)


@TWO_KINDS
def test_probes_of_a_transcoder_read_what_it_predicts(model) -> None:
    sae = factories.transcoder(model, 1)
    result = hierarchy(model, sae, TOKENS, n_parents=9, max_children=2, **RULES)
    y = activations(model, TOKENS, sae.cfg.metadata.hook_name_out)[KEEP]
    rules = {"n_parents": 9, "max_children": 2, "min_tokens": 8, "steps": 30}
    probed = probe_edges(y, acts_of(model, sae), sae.W_dec, result.parent, **rules)
    assert result.n_probed == len(probed.child) > 5
    assert result.s_res == probed.score
    hits = result.edges.dropna(subset="hit")
    assert list(hits["child"]) == probed.child.tolist()
    assert list(hits["hit"]) == probed.hits.tolist()


def test_probes_see_a_sample_of_the_tokens(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    rules = {**RULES, "min_tokens": 5}
    some = [
        hierarchy(hooked2, sae, TOKENS, probe_tokens=200, **rules, batch_size=b) for b in (3, 20)
    ]
    assert some[0].row() == pytest.approx(some[1].row()) and some[0].n_probed > 5
    assert some[0].edges["hit"].equals(some[1].edges["hit"])
    assert some[0].n_probed < hierarchy(hooked2, sae, TOKENS, **rules).n_probed


def test_a_planted_forest_of_known_concepts(hooked2) -> None:
    """Features that stand for concepts by construction, hung below one another and apart."""
    sae = factories.residual(hooked2, 1)
    acts = acts_of(hooked2, sae).to_dense() > 0
    chosen = acts.sum(0).argsort(descending=True)[:3].tolist()
    a, b, c = (acts[:, i] for i in chosen)
    marks = torch.zeros(*TOKENS.shape, 4, dtype=torch.bool)
    marks[KEEP] = torch.stack([a | b | c, b | c, c, a | b | c], -1)
    parent = torch.full((acts.shape[1],), -1)
    parent[chosen[2]], parent[chosen[1]] = chosen[1], chosen[0]
    names = ["all", "two", "one", "all again"]
    options = {"forest": parent, "n_parents": 0, "min_tokens": 3, "min_f1": 0.3}
    result = hierarchy(hooked2, sae, TOKENS, marks, names, **options)
    assert result.forest == "given" and result.recovery is not None and result.chance is not None
    rows = result.edges.set_index("child")
    assert list(result.edges["child"]) == sorted(chosen[1:])
    for child, row in rows.iterrows():
        sets = {
            name: set(marks[KEEP][:, i].nonzero()[:, 0].tolist()) for i, name in enumerate(names)
        }
        for end, feature in (("parent_concept", row["parent"]), ("child_concept", child)):
            tokens = set(acts[:, feature].nonzero()[:, 0].tolist())
            f1 = {n: 2 * len(tokens & s) / (len(tokens) + len(s)) for n, s in sets.items()}
            assert row[end] == max(f1, key=lambda n: f1[n]) and row[end] != "all again"
        assert row["is_ancestor"] == (sets[row["parent_concept"]] > sets[row["child_concept"]])
    assert result.recovery.precision == rows["is_ancestor"].mean()
    assert result.row()["tree_f1"] == result.recovery.f1


def test_concepts_of_a_corpus_are_read_where_tokens_count(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    result = hierarchy(hooked2, sae, TOKENS, CONCEPTS, NAMES, n_parents=0, **RULES)
    assert result.recovery is not None
    marked = result.edges["parent_concept"].notna() & result.edges["child_concept"].notna()
    assert marked.sum() == result.recovery.n_labelled
    assert (result.edges["is_ancestor"].notna() == marked).all()
    wrong = CONCEPTS.clone()
    wrong[~KEEP] = ~wrong[~KEEP]
    again = hierarchy(hooked2, sae, TOKENS, wrong, NAMES, n_parents=0, **RULES)
    assert again.row() == pytest.approx(result.row(), nan_ok=True)


def test_a_row_and_a_sentence(hooked2) -> None:
    result = hierarchy(hooked2, factories.transcoder(hooked2, 1), TOKENS, CONCEPTS, NAMES, **RULES)
    frame = result.to_frame()
    assert isinstance(result, Hierarchy) and len(frame) == 1
    assert frame["n_edges"][0] == result.n_edges and "chance_f1" in frame
    text = repr(result)
    assert "blocks.1.ln2.hook_normalized -> blocks.1.hook_mlp_out, 96 features" in text
    assert "forest 'mcs'" in text and "tree precision" in text and "(chance" in text
    assert "<table" in result._repr_html_()


def test_what_cannot_be_measured_is_an_error(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    measure = unchecked(hierarchy)
    with pytest.raises(ModelError, match="resid_post has no forest of its own.*Try: forest='mcs'"):
        measure(hooked2, sae, TOKENS, forest="own")
    with pytest.raises(UnknownNameError, match="forest 'msc'.*Did you mean 'mcs'"):
        measure(hooked2, sae, TOKENS, forest="msc")
    with pytest.raises(UnknownNameError, match="similarity 'binari'.*mean 'binary'"):
        measure(hooked2, sae, TOKENS, similarity="binari")
    with pytest.raises(ModelError, match="There are concepts and no names.*Try: both"):
        measure(hooked2, sae, TOKENS, CONCEPTS)
    with pytest.raises(ModelError, match="There are names and no concepts"):
        measure(hooked2, sae, TOKENS, names=NAMES)
    with pytest.raises(ModelError, match="4 names were given for 5 concepts"):
        measure(hooked2, sae, TOKENS, CONCEPTS, NAMES[:4])
    with pytest.raises(ModelError, match=r"given for \[20, 19\] tokens"):
        measure(hooked2, sae, TOKENS, CONCEPTS[:, 1:], NAMES)
    with pytest.raises(ModelError, match="n_parents=-1 is negative.*Try: n_parents=0"):
        measure(hooked2, sae, TOKENS, n_parents=-1)
    with pytest.raises(ModelError, match="probe_tokens=0 is less than one"):
        measure(hooked2, sae, TOKENS, probe_tokens=0)
    with pytest.raises(WidthMismatchError, match=r"forest has shape \[3\], .* has 96 features"):
        measure(hooked2, sae, TOKENS, forest=torch.tensor([-1, 0, 0]))
    with pytest.raises(EmptySelectionError, match="only excluded tokens"):
        measure(hooked2, sae, TOKENS[:, :1])
