"""Forests from activations and their edges: equal to loops over features and tokens; hand-made cases."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from gemmascope_plugin.errors import ModelError, UnknownNameError, WidthMismatchError
from gemmascope_plugin.features.cooccurrence import (
    active_only,
    at_same_token,
    at_tokens,
    joint_counts,
    joint_sums,
)
from gemmascope_plugin.measures.forest import (
    SIMILARITIES,
    candidate_rank,
    check_forest,
    depth,
    edge_frame,
    mcs_parents,
)
from gemmascope_plugin.measures.forest_scores import sibling_overlap
from gemmascope_plugin.saes import SparseActs
from tests.factories import unchecked

N_TOKENS, D_SAE = 60, 12


def random_acts(seed: int = 0, d_sae: int = D_SAE) -> torch.Tensor:
    """Features of different frequency, one of them dead; no two similarities are equal."""
    rng = torch.Generator().manual_seed(seed)
    acts = torch.rand(N_TOKENS, d_sae, generator=rng)
    active = torch.rand(N_TOKENS, d_sae, generator=rng) < torch.linspace(0, 0.9, d_sae)
    return acts * active


def sparse(acts: torch.Tensor) -> SparseActs:
    return SparseActs.from_dense(acts)


def slow_mcs(acts: torch.Tensor, p: int, c: int, similarity: str) -> float:
    """The definition on the tokens where the child is active, token by token."""
    if similarity == "binary":
        acts = (acts > 0).double()
    pairs = [(float(row[p]), float(row[c])) for row in acts if row[c] > 0]
    power = sum(a * a for a, _ in pairs)
    if not power:
        return 0.0
    result = sum(a * b for a, b in pairs) / math.sqrt(power * sum(b * b for _, b in pairs))
    largest = [float(acts[:, i].max()) for i in (p, c)]
    return result * min(largest) / largest[0] if similarity == "scaled" else result


def slow_parent(
    acts: torch.Tensor, c: int, levels: list[int], similarity: str, min_tokens: int, min_mcs: float
) -> int:
    counts = [int((acts[:, i] > 0).sum()) for i in range(acts.shape[1])]
    if counts[c] < min_tokens:
        return -1
    level = [sum(i >= bound for bound in levels) for i in range(acts.shape[1])]
    candidates = [
        p for p, n in enumerate(counts) if (level[p] < level[c] if levels else n > counts[c])
    ]
    scores = {p: slow_mcs(acts, p, c, similarity) for p in candidates}
    best = max(scores, key=lambda p: scores[p], default=-1)
    return best if best >= 0 and scores[best] >= min_mcs else -1


@pytest.mark.parametrize("cells", [7, 1 << 22])
@pytest.mark.parametrize("levels", [[], [3, 8, 12]])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_parents_equal_the_definition(similarity, levels: list[int], cells: int) -> None:
    acts = random_acts()
    expected = [slow_parent(acts, c, levels, similarity, 5, 0.55) for c in range(D_SAE)]
    result = mcs_parents(
        sparse(acts),
        levels=levels or None,
        similarity=similarity,
        min_tokens=5,
        min_mcs=0.55,
        cells=cells,
    )
    assert result.tolist() == expected
    assert len(set(expected)) > 3 and -1 in expected[3:]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_edges_equal_a_slow_count(similarity) -> None:
    acts = random_acts(1)
    parent = torch.tensor([-1, 5, 5, -1, 2, -1, 5, 0, 5, 11, 11, -1])
    frame = edge_frame(sparse(acts), parent, similarity=similarity, min_tokens=6)
    counts = (acts > 0).sum(0).tolist()
    children = [c for c in range(D_SAE) if parent[c] >= 0 and counts[c] >= 6]
    assert list(frame["child"]) == children and 1 not in children
    for row in frame.itertuples():
        assert row.parent == parent[row.child]
        assert (row.n_parent, row.n_child) == (counts[row.parent], counts[row.child])
        both = int(((acts[:, row.parent] > 0) & (acts[:, row.child] > 0)).sum())
        assert row.coverage == both / row.n_child
        assert row.mcs == pytest.approx(slow_mcs(acts, row.parent, row.child, similarity))
    if similarity == "binary":
        assert (frame["mcs"] - frame["coverage"] ** 0.5).abs().max() < 1e-12


@pytest.mark.parametrize("cells", [5, 1 << 22])
def test_overlap_of_siblings_equals_sets(cells: int) -> None:
    acts = random_acts(2)
    parent = torch.tensor([-1, 5, 5, -1, 2, -1, 5, 2, 5, 11, 11, -1])
    sets = [set(column.nonzero().flatten().tolist()) for column in acts.T]
    children = [c for c in range(D_SAE) if parent[c] >= 0 and len(sets[c]) >= 6]
    pairs = [(a, b) for a in children for b in children if a < b and parent[a] == parent[b]]
    expected = sum(len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs) / len(pairs)
    result = sibling_overlap(sparse(acts), parent, min_tokens=6, cells=cells)
    assert result == pytest.approx(expected) and len(pairs) > 3
    assert math.isnan(sibling_overlap(sparse(acts), torch.full((D_SAE,), -1)))


def test_a_family_by_hand() -> None:
    """Feature 0 covers 1, which is half as strong; 2 is elsewhere."""
    acts = torch.tensor([[1.0, 1, 0], [2, 1, 0], [0, 0, 3], [2, 0, 0]])
    rules = {"min_tokens": 1, "min_mcs": 0.1}
    assert mcs_parents(sparse(acts), **rules).tolist() == [-1, 0, -1]
    (row,) = edge_frame(sparse(acts), torch.tensor([-1, 0, -1]), min_tokens=1).itertuples()
    assert (row.n_parent, row.n_child, row.coverage) == (3, 2, 1.0)
    assert row.mcs == pytest.approx(3 / math.sqrt(5 * 2))
    scaled = edge_frame(sparse(acts), torch.tensor([-1, 0, -1]), similarity="scaled", min_tokens=1)
    assert scaled["mcs"][0] == pytest.approx(1.5 / math.sqrt(10))
    assert mcs_parents(sparse(acts), min_tokens=3, min_mcs=0.1).tolist() == [-1, -1, -1]
    assert mcs_parents(sparse(acts), min_tokens=1, min_mcs=0.96).tolist() == [-1, -1, -1]


def test_of_equals_the_first_is_the_parent() -> None:
    acts = torch.ones(6, 3)
    acts[0, 2] = 0
    assert mcs_parents(sparse(acts), min_tokens=1).tolist() == [-1, -1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_order_of_features_does_not_matter(seed: int) -> None:
    acts = random_acts(seed, d_sae=9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    parent = mcs_parents(sparse(acts), min_tokens=1, min_mcs=0.3)
    shuffled = mcs_parents(sparse(acts[:, order]), min_tokens=1, min_mcs=0.3)
    place = order.argsort()
    expected = torch.where(parent[order] < 0, -1, place[parent[order]])
    counts = (acts > 0).sum(0).tolist()
    assert len(set(counts)) > 5
    assert torch.equal(shuffled, expected)
    check_forest(parent, 9)
    same = sibling_overlap(sparse(acts), parent, min_tokens=1)
    assert sibling_overlap(sparse(acts[:, order]), expected, min_tokens=1) == pytest.approx(same)


@pytest.mark.parametrize("seed", range(5))
def test_a_gated_child_is_covered(seed: int) -> None:
    acts = random_acts(seed)
    parent = torch.tensor([-1, -1, -1, -1, 11, 10, 9, 8, -1, -1, -1, -1])
    acts[:, 4:8] *= (acts[:, [11, 10, 9, 8]] > 0).float()
    frame = edge_frame(sparse(acts), parent, min_tokens=1)
    assert list(frame["coverage"]) == [1.0] * 4


def test_sums_over_joint_tokens_equal_products() -> None:
    left, right = random_acts(3), random_acts(4, d_sae=5)
    a, b = sparse(left), sparse(right)
    factors = [(a.values, b.values), (torch.ones_like(a.values), b.values.square())]
    expected = [left.T.double() @ right.double(), (left > 0).double().T @ right.double().square()]
    for cells in (1, 11, 1 << 22):
        seen = []
        for features, tables in joint_sums(a, b, factors, cells=cells):
            seen += features.tolist()
            for table, whole in zip(tables, expected, strict=True):
                assert table.shape == (len(features), 5) and table.numel() <= max(cells, 5)
                assert torch.allclose(table, whole[features])
        assert seen == [i for i in range(D_SAE) if left[:, i].any()]
    counts = torch.cat([table for _, table in joint_counts(a, b)])
    assert torch.equal(counts, ((left > 0).long().T @ (right > 0).long())[1:])


def test_look_ups_equal_the_dense_tensor() -> None:
    acts = random_acts(5)
    others = torch.tensor([3, 3, -1, 0, 11, 2, 9, 9, 1, 0, 8, 7])
    result = at_same_token(sparse(acts), others[sparse(acts).indices])
    dense = torch.where(others >= 0, acts[:, others], 0)
    assert torch.equal(result, dense[acts > 0])
    some = torch.tensor([0, 3, 4, 59])
    assert torch.equal(at_tokens(sparse(acts), some).to_dense(), acts[some])
    nothing = sparse(torch.zeros(3, 4))
    assert len(at_same_token(nothing, nothing.indices)) == 0


def test_only_positive_entries_are_active() -> None:
    acts = random_acts(6) - 0.2
    assert torch.equal(active_only(sparse(acts)).to_dense(), acts.clamp(min=0))
    parent = mcs_parents(sparse(acts), min_tokens=1, min_mcs=0.3)
    assert torch.equal(parent, mcs_parents(sparse(acts.relu()), min_tokens=1, min_mcs=0.3))
    frames = [edge_frame(sparse(x), parent, min_tokens=1) for x in (acts, acts.relu())]
    pd.testing.assert_frame_equal(*frames)


def test_ranks_and_depths() -> None:
    acts = sparse(torch.tensor([[1.0, 1, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0]]))
    assert candidate_rank(acts, None).tolist() == [0, 2, 3, 1]
    assert candidate_rank(acts, [4]).tolist() == [0, 2, 3, 1]  # one level is none
    assert candidate_rank(acts, [1, 3, 4]).tolist() == [0, 1, 1, 2]
    assert depth(torch.tensor([-1, 0, 1, 2, -1])).tolist() == [0, 1, 2, 3, 0]


def test_what_is_no_forest_is_an_error() -> None:
    check = unchecked(check_forest)
    with pytest.raises(WidthMismatchError, match=r"shape \[3\], the dictionary has 4.*Try: one"):
        check(torch.tensor([-1, 0, 0]), 4)
    with pytest.raises(ModelError, match="type torch.float32.*There is: integers"):
        check(torch.zeros(4), 4)
    with pytest.raises(ModelError, match="Feature 2 has parent 4, .*There is: features 0 to 3"):
        check(torch.tensor([-1, 0, 4, 0]), 4)
    with pytest.raises(ModelError, match="Feature [123] is among its own ancestors"):
        check(torch.tensor([-1, 2, 3, 1]), 4)
    with pytest.raises(ModelError, match="Feature 0 is among its own ancestors"):
        check(torch.tensor([0, -1]), 2)
    check(torch.tensor([-1, 0, 1, 2]), 4)
    with pytest.raises(UnknownNameError, match="similarity 'cosin'.*mean 'cosine'"):
        unchecked(mcs_parents)(sparse(random_acts()), similarity="cosin")
