"""A forest against known concepts: planted trees are recovered, others as far as loops over sets say."""

from __future__ import annotations

import math

import pytest
import torch

from gemmascope_plugin.demo.corpus import label_features
from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.features.cooccurrence import best_concepts
from gemmascope_plugin.measures.forest import check_forest
from gemmascope_plugin.measures.forest_scores import (
    Recovery,
    chance_recovery,
    concept_order,
    redrawn,
    tree_recovery,
)
from gemmascope_plugin.saes import SparseActs
from tests.factories import unchecked

N_TOKENS = 120


def sets_of(marks: torch.Tensor) -> list[frozenset[int]]:
    return [frozenset(column.nonzero().flatten().tolist()) for column in marks.T]


def nested(seed: int, n: int = 10) -> torch.Tensor:
    """Concepts of which many lie within others, some are equal, and one never holds."""
    rng = torch.Generator().manual_seed(seed)
    marks = torch.rand(N_TOKENS, n, generator=rng) < torch.linspace(0.9, 0.2, n)
    for i in range(1, n - 1):
        if i % 3:
            marks[:, i] &= marks[:, i - 1]
    marks[:, 4] = marks[:, 3]
    marks[:, n - 1] = False
    return marks


def binary_tree(depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Intervals that halve: concepts ``[token, concept]`` and the parent of each."""
    spans, parent = [(0, N_TOKENS)], [-1]
    for i in range(2**depth - 1):
        low, high = spans[i]
        middle = (low + high) // 2
        # not the whole parent, so that each level is a concept of its own
        spans += [(low, middle - 1), (middle, high - 1)]
        parent += [i, i]
    token = torch.arange(N_TOKENS)[:, None]
    low, high = torch.tensor(spans).T
    return (token >= low) & (token < high), torch.tensor(parent)


def slow_recovery(
    parent: list[int], judged: list[int], concept: list[int], sets: list[frozenset[int]]
) -> dict[str, float]:
    """The definitions word for word."""

    def is_above(p: int, c: int) -> bool:
        return p >= 0 and c >= 0 and sets[p] > sets[c]

    labelled = [c for c in judged if concept[c] >= 0 and concept[parent[c]] >= 0]
    right = [c for c in labelled if is_above(concept[parent[c]], concept[c])]
    stands = {c for c in concept if c >= 0}
    wanted = {c for c in stands if any(is_above(p, c) for p in stands)}
    recovery = set()
    for feature in range(len(parent)):
        ancestor = parent[feature]
        while ancestor >= 0:
            if is_above(concept[ancestor], concept[feature]):
                recovery.add(concept[feature])
            ancestor = parent[ancestor]
    return {
        "precision": len(right) / len(labelled) if labelled else math.nan,
        "edge_recovery": len(right) / len(judged) if judged else math.nan,
        "recall": len(recovery) / len(wanted) if wanted else math.nan,
        "n_labelled": len(labelled),
        "n_children": len(wanted),
    }


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_concepts_is_that_of_their_sets(seed: int) -> None:
    marks = nested(seed)
    sets = sets_of(marks)
    frequent = [i for i, s in enumerate(sets) if len(s) >= 8 and sets.index(s) == i]
    order = concept_order(marks, [f"c{i}" for i in range(10)], min_tokens=8)
    assert order.names == tuple(f"c{i}" for i in frequent) and "c4" not in order.names
    assert torch.equal(order.holds, marks[:, frequent])
    expected = [[sets[p] > sets[c] for c in frequent] for p in frequent]
    assert order.above.tolist() == expected and any(map(any, expected))


@pytest.mark.parametrize("seed", range(10))
def test_recovery_equals_loops_over_sets(seed: int) -> None:
    order = concept_order(nested(seed), [f"c{i}" for i in range(10)], min_tokens=8)
    rng = torch.Generator().manual_seed(seed)
    n = 25
    parent = (torch.rand(n, generator=rng) * torch.arange(n)).long()
    parent[torch.rand(n, generator=rng) < 0.2] = -1
    parent[0] = -1
    concept = torch.randint(-1, len(order.names), (n,), generator=rng)
    judged = (parent >= 0).nonzero()[:, 0][::2]
    recovery = tree_recovery(parent, judged, concept, order.above)
    lists = (parent.tolist(), judged.tolist(), concept.tolist())
    expected = slow_recovery(*lists, sets_of(order.holds))
    assert {name: getattr(recovery, name) for name in expected} == pytest.approx(
        expected, nan_ok=True
    )
    assert recovery.n_labelled and recovery.n_children


def test_a_planted_tree_is_recovered_and_chance_is_far_below() -> None:
    marks, parent = binary_tree(4)
    order = concept_order(marks, [str(i) for i in range(31)], min_tokens=2)
    assert len(order.names) == 31
    stands = best_concepts(SparseActs.from_dense(marks.float()), order.holds).at_least(0.5)
    assert stands.tolist() == list(range(31))
    judged = torch.arange(1, 31)
    recovery = tree_recovery(parent, judged, stands, order.above)
    assert (recovery.precision, recovery.recall, recovery.edge_recovery, recovery.f1) == (
        1,
        1,
        1,
        1,
    )
    assert recovery.n_children == 30
    rank = marks.sum(0).neg().unique(return_inverse=True)[1]
    chance = chance_recovery(parent, judged, stands, order.above, rank, seed=3)
    assert chance.precision < 0.4 and chance.f1 < 0.6 and chance.n_children == 30
    again = chance_recovery(parent, judged, stands, order.above, rank, seed=3)
    assert again == chance
    assert chance_recovery(parent, judged, stands, order.above, rank, n_draws=1, seed=3) != chance


def test_ancestors_at_any_distance_count_for_recall_alone() -> None:
    """0 > 1 > 2 as concepts; feature 3, which stands for nothing, is between 0 and 2."""
    above = torch.zeros(3, 3, dtype=torch.bool)
    above[0, 1] = above[0, 2] = above[1, 2] = True
    concept = torch.tensor([0, 1, 2, -1])
    recovery = tree_recovery(torch.tensor([-1, -1, 3, 0]), torch.tensor([2, 3]), concept, above)
    assert math.isnan(recovery.precision) and recovery.edge_recovery == 0
    assert recovery.recall == 0.5 and recovery.f1 == 0  # 2 is found below 0, and 1 below nothing


def test_f1_is_the_harmonic_mean() -> None:
    rest = {"edge_recovery": 0.1, "n_labelled": 3, "n_children": 4}
    assert Recovery(precision=0.5, recall=0.25, **rest).f1 == pytest.approx(1 / 3)
    assert Recovery(precision=0.0, recall=0.0, **rest).f1 == 0
    assert math.isnan(Recovery(precision=0.5, recall=math.nan, **rest).f1)


@pytest.mark.parametrize("seed", range(5))
def test_random_parents_are_possible_ones(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    rank = torch.randint(0, 5, (30,), generator=rng)
    parent = torch.full((30,), -1)
    for c in range(30):
        possible = (rank < rank[c]).nonzero()[:, 0]
        if len(possible) and c % 4:
            parent[c] = possible[torch.randint(len(possible), (1,), generator=rng)]
    judged = (parent >= 0).nonzero()[:, 0][1:]
    draws = torch.stack([redrawn(parent, judged, rank, rng) for _ in range(40)])
    rest = torch.ones(30, dtype=torch.bool)
    rest[judged] = False
    assert (draws[:, rest] == parent[rest]).all()
    for child in judged.tolist():
        drawn = set(draws[:, child].tolist())
        assert all(rank[p] < rank[child] for p in drawn)
        assert drawn <= set(parent[judged].tolist())
    assert len(draws.unique(dim=0)) > 30
    check_forest(draws[0], 30)


@pytest.mark.parametrize("seed", range(4))
def test_best_concepts_equal_sets(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    marks = nested(seed)
    active = torch.rand(N_TOKENS, 14, generator=rng) < torch.linspace(0, 1, 14)
    active[:, :6] = marks[:, :6] & (torch.rand(N_TOKENS, 6, generator=rng) < 0.8)
    active[:, 13] = False
    recovery = best_concepts(SparseActs.from_dense(active.float()), marks)
    concepts, names = sets_of(marks), [f"c{i}" for i in range(10)]
    labels = label_features(active, marks, names)
    for i, tokens in enumerate(sets_of(active)):
        f1 = [2 * len(tokens & s) / max(len(tokens) + len(s), 1) for s in concepts]
        best = f1.index(max(f1))
        if not max(f1):
            assert recovery.concept[i] == -1 and recovery.f1[i] == 0 and i not in labels
            continue
        assert recovery.concept[i] == best and recovery.f1[i] == pytest.approx(max(f1))
        shares = [len(tokens & concepts[best]) / len(s) for s in (tokens, concepts[best])]
        assert [float(recovery.precision[i]), float(recovery.recall[i])] == pytest.approx(shares)
        assert (i in labels) == (max(f1) >= 0.5)
        if i in labels:
            assert labels[i].concept == names[best]
            assert labels[i].precision == pytest.approx(shares[0], abs=1e-4)
    assert recovery.at_least(0.5).tolist() == [
        names.index(labels[i].concept) if i in labels else -1 for i in range(14)
    ]
    assert 3 < len(labels) < 14


def test_without_concepts_nothing_stands_for_anything() -> None:
    acts = SparseActs.from_dense(torch.ones(5, 3))
    assert best_concepts(acts, torch.zeros(5, 2, dtype=torch.bool)).concept.tolist() == [-1] * 3
    order = concept_order(torch.zeros(5, 2, dtype=torch.bool), ["a", "b"])
    assert order.names == () and order.above.shape == (0, 0)
    nothing = torch.full((3,), -1)
    recovery = tree_recovery(torch.tensor([-1, 0, 0]), torch.tensor([1, 2]), nothing, order.above)
    assert math.isnan(recovery.recall) and math.isnan(recovery.f1) and recovery.edge_recovery == 0


def test_names_must_fit() -> None:
    with pytest.raises(ModelError, match="2 names were given for 10 concepts.*one name per column"):
        unchecked(concept_order)(nested(0), ["a", "b"])
