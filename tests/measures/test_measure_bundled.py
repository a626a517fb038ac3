"""The bundled suite end to end: measured, compared, drawn, and its concepts found again."""

from __future__ import annotations

import pytest

import gemmascope_plugin as gs
from gemmascope_plugin.demo.build import dictionary_scores
from gemmascope_plugin.demo.corpus import make_corpus
from gemmascope_plugin.demo.tiny_suite import TinySuite, tiny

DOCUMENTS = make_corpus(24, seed=4321)


@pytest.fixture(scope="module")
def suite() -> TinySuite:
    return tiny()


def test_trained_dictionaries_compare(suite) -> None:
    saes = {site: suite.load(site, 1) for site in ("res", "att", "mlp", "transcoder")}
    frame = gs.compare(suite.model, saes, DOCUMENTS.tokens, n_positions=4)
    for name, row in zip(frame["name"], frame.to_dict("records"), strict=True):
        other = dictionary_scores(suite.model, saes[name], DOCUMENTS.tokens)
        assert row["l0"] == pytest.approx(other["l0"])
        assert row["fvu"] == pytest.approx(other["fvu"], rel=1e-3)
        assert row["dead_share"] == pytest.approx(other["dead_share"])
        assert row["share_of_zero"] == pytest.approx(other["delta_loss_share"], abs=1e-4)
        assert row["fvu"] < 0.1 and abs(row["share_of_mean"]) < 0.1
        assert 1 / row["l0"] < row["r_l0"] < 1
    assert len(gs.measures.plot_comparison(frame).data) == 4


def test_known_concepts_are_found_again(suite) -> None:
    sae = suite.load("res", 1)
    names, concepts = DOCUMENTS.concept_matrix()
    frame = gs.measures.concept_scores_of(suite.model, sae, DOCUMENTS.tokens, concepts, names)
    frame = frame.set_index("concept")
    labels = suite.labels_of(sae)
    sure = [x for x in labels.values() if x.f1 > 0.9 and frame["n_tokens"].get(x.concept, 0) >= 20]
    assert len(sure) >= 5
    for label in sure:
        row = frame.loc[label.concept]
        assert row["f1"] > label.f1 - 0.05
        assert row["splitting"] >= 1 and row["absorption"] < 0.1


def test_forests_of_trained_dictionaries_are_no_chance(suite) -> None:
    names, concepts = DOCUMENTS.concept_matrix()
    result = gs.measures.hierarchy(
        *(suite.model, suite.load("res", 1), DOCUMENTS.tokens, concepts, names), n_parents=0
    )
    assert result.recovery is not None and result.chance is not None
    assert result.recovery.f1 > 3 * result.chance.f1 > 0
    assert result.recovery.n_children > 5 and result.n_edges > 100
    follows = gs.measures.adaptivity(
        suite.model, suite.load("res", 1), DOCUMENTS.tokens, concepts, names
    )
    assert abs(follows.k_spearman) > 0.1 and follows.std > 1
