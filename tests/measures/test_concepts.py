"""Known concepts: best feature, splitting and absorption against sets of tokens, and planted cases."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from gemmascope_plugin.errors import EmptySelectionError, ModelError
from gemmascope_plugin.measures import concept_scores, concept_scores_of
from gemmascope_plugin.saes import SparseActs
from gemmascope_plugin.splice import HookedSAE
from tests import factories
from tests.factories import activations, unchecked
from tests.splice.reference import features
from tests.tiny_models import PAD_ID, random_tokens

COLUMNS = [
    *("concept", "n_tokens", "feature", "precision", "recall", "f1"),
    *("splitting", "absorption", "absorbed_by", "split_features"),
]


def slow_scores(active, concepts, *, min_gain=0.03, min_precision=0.5, subset=1.0, min_tokens=5):
    """The definitions word for word, on Python sets."""
    sets = [set(column.nonzero().flatten().tolist()) for column in active.T]
    rows = []
    for column in concepts.T:
        holds = set(column.nonzero().flatten().tolist())
        if not holds or not any(a & holds for a in sets):
            rows.append((len(holds), None, None, 0, None, None))
            continue
        f1 = [2 * len(a & holds) / (len(a) + len(holds)) for a in sets]
        main = f1.index(max(f1))
        precise = [a for a in sets if a and len(a & holds) / len(a) >= min_precision]
        covered, k = sets[main] & holds, 1
        while True:
            gain = max((len((a & holds) - covered) for a in precise), default=0)
            if not gain or gain / len(holds) < min_gain:
                break
            covered = covered | next(
                a & holds for a in precise if len((a & holds) - covered) == gain
            )
            k += 1
        silent = holds - sets[main]
        absorbers = [
            i
            for i, a in enumerate(sets)
            if len(a & holds) >= max(min_tokens, subset * len(a))
            and len(a & holds) < len(sets[main] & holds)
        ]
        absorbed = set().union(*(sets[i] & silent for i in absorbers))
        most = max((len(sets[i] & silent) for i in absorbers), default=0)
        by = next((i for i in absorbers if len(sets[i] & silent) == most), None) if most else None
        rows.append((len(holds), main, f1[main], k, len(absorbed) / len(holds), by))
    return rows


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rules", [{}, {"min_gain": 0.1, "subset": 0.4, "min_tokens": 1}])
def test_scores_equal_the_definitions_on_sets(seed: int, rules: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    concepts = torch.rand(80, 6, generator=generator) < torch.tensor([0.5, 0.3, 0.2, 0.1, 0.6, 0.0])
    # half of the features live within a concept, so that there are subsets and parts
    within = concepts[:, torch.arange(20) % 6]
    active = torch.rand(80, 20, generator=generator) < torch.rand(20, generator=generator) * 0.6
    active[:, :10] &= within[:, :10]
    frame = concept_scores(active, concepts, list("abcdef"), **rules)
    expected = slow_scores(active, concepts, **rules)
    assert any(row[4] for row in expected) and any(row[3] > 1 for row in expected)
    for row, (n, main, f1, k, absorption, by) in zip(frame.itertuples(), expected, strict=True):
        assert (row.n_tokens, row.splitting) == (n, k)
        assert row.feature == main if main is not None else row.feature is pd.NA
        if main is not None:
            assert row.f1 == pytest.approx(f1)
            assert row.f1 == pytest.approx(
                2 * row.precision * row.recall / (row.precision + row.recall)
            )
            assert row.absorption == pytest.approx(absorption)
            assert row.absorbed_by == by if by is not None else row.absorbed_by is pd.NA


def planted(*spans: tuple[int, int]) -> torch.Tensor:
    """100 tokens, one feature per span of tokens where it is active."""
    token = torch.arange(100)[:, None]
    return torch.cat([(token >= a) & (token < b) for a, b in spans], dim=1)


def test_a_planted_absorption() -> None:
    """The concept holds on 0..40; its feature has a hole on 30..40 that a specific one fills."""
    frame = concept_scores(planted((0, 30), (30, 40), (28, 60)), planted((0, 40)), ["letter"])
    assert list(frame.columns) == COLUMNS
    (row,) = frame.itertuples()
    assert (row.feature, row.precision, row.recall) == (0, 1.0, 0.75)
    assert (row.absorption, row.absorbed_by) == (0.25, 1)
    assert row.splitting == 2


def test_no_absorption_by_a_feature_that_also_means_something_else() -> None:
    active, concept = planted((0, 30), (30, 41)), planted((0, 40))
    assert concept_scores(active, concept, ["letter"])["absorption"][0] == 0
    assert concept_scores(active, concept, ["letter"], subset=0.9)["absorption"][0] == 0.25
    assert concept_scores(active, concept, ["x"], subset=0.9, min_tokens=11)["absorption"][0] == 0


def test_equal_parts_are_splitting_and_not_absorption() -> None:
    frame = concept_scores(planted((0, 20), (20, 40), (0, 100)), planted((0, 40)), ["letter"])
    (row,) = frame.itertuples()
    assert (row.feature, row.splitting, row.absorption) == (0, 2, 0.0)


def test_a_dense_feature_is_no_part_of_a_concept() -> None:
    assert concept_scores(planted((0, 20), (0, 100)), planted((0, 40)), ["a"])["splitting"][0] == 1
    loose = concept_scores(planted((0, 20), (0, 100)), planted((0, 40)), ["a"], min_precision=0.4)
    assert loose["splitting"][0] == 2


def test_concepts_without_tokens_or_features() -> None:
    frame = concept_scores(planted((0, 10)), planted((50, 50), (50, 60)), ["never", "unseen"])
    assert frame["feature"].isna().all() and frame["absorbed_by"].isna().all()
    assert list(frame["n_tokens"]) == [0, 10] and list(frame["splitting"]) == [0, 0]
    assert math.isnan(frame["recall"][0]) and frame["recall"][1] == 0
    assert frame["absorption"].isna().all()


def test_sparse_and_dense_activations_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(60, 12, generator=generator) - 0.5
    acts = torch.where(acts > 0, acts, 0)
    concepts = torch.rand(60, 4, generator=generator) < 0.4
    sparse = concept_scores(SparseActs.from_dense(acts), concepts, list("abcd"))
    assert sparse.equals(concept_scores(acts > 0, concepts, list("abcd")))


def test_a_dictionary_is_scored_at_the_tokens_that_count(model) -> None:
    sae, tokens = factories.transcoder(model, 1), random_tokens(batch_size=5)
    tokens[2, 15:] = PAD_ID
    keep = tokens > 2
    concepts = torch.stack([tokens < 128, tokens % 3 == 0, tokens == PAD_ID], -1)
    names = ["low", "third", "pad"]
    table = concept_scores_of(model, sae, tokens, concepts, names, batch_size=2, min_tokens=1)
    x = activations(model, tokens, sae.cfg.metadata.hook_name)[keep]
    expected = concept_scores(features(sae, x) > 0, concepts[keep], names, min_tokens=1)
    assert table.equals(expected)
    assert table["n_tokens"][2] == 0


def test_a_level_has_its_own_features(hooked2) -> None:
    from tests.splice.test_level_and_encoder import matryoshka

    tokens = random_tokens()
    concepts = (tokens < 128)[..., None]
    hooked = HookedSAE(matryoshka(hooked2), level=0)
    frame = concept_scores_of(hooked2, hooked, tokens, concepts, ["low"])
    assert frame["feature"][0] < 8


def test_tokens_and_names_must_fit(hooked2) -> None:
    active, concepts = planted((0, 10)), planted((0, 10))
    scores = unchecked(concept_scores)
    with pytest.raises(ModelError, match="given for 99 tokens, the features for 100.*Try: both"):
        scores(active, concepts[:99], ["a"])
    with pytest.raises(ModelError, match="2 names were given for 1 concepts.*one name per column"):
        scores(active, concepts, ["a", "b"])
    with pytest.raises(EmptySelectionError, match="no tokens.*Try: at least one"):
        scores(active[:0], concepts[:0], ["a"])
    tokens = random_tokens()
    sae = factories.residual(hooked2, 1)
    with pytest.raises(
        ModelError, match=r"for \[2, 19\] tokens.*\(2, 20\).*document, pos, concept"
    ):
        unchecked(concept_scores_of)(hooked2, sae, tokens, tokens[:, 1:, None] > 9, ["a"])
