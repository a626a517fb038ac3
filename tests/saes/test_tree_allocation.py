"""Quotas against brute force, and which children move."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.saes.training.tree_steps import (
    grant,
    move_dead_children,
    reallocation_steps,
    shares,
)

CAPACITIES = st.lists(st.floats(0.01, 10), min_size=1, max_size=4)


def worst(capacity: list[float], counts: tuple[int, ...]) -> float:
    """``min C_p / k_p`` over parents that have children."""
    return min(c / k for c, k in zip(capacity, counts, strict=True) if k)


@given(capacity=CAPACITIES, n=st.integers(1, 6))
def test_the_heap_is_the_greedy_rule_and_the_rule_is_optimal(capacity, n: int) -> None:
    slow = [0] * len(capacity)
    for _ in range(n):
        ratios = [c / (k + 1) for c, k in zip(capacity, slow, strict=True)]
        slow[ratios.index(max(ratios))] += 1
    given_to = grant(capacity, n)
    counts = tuple(given_to.count(p) for p in range(len(capacity)))
    assert counts == tuple(slow)
    every = product(range(n + 1), repeat=len(capacity))
    best = max(worst(capacity, split) for split in every if sum(split) == n)
    assert worst(capacity, counts) == pytest.approx(best)


@given(capacity=CAPACITIES, n=st.integers(0, 12), data=st.data())
def test_limits_are_kept(capacity, n: int, data) -> None:
    m = len(capacity)
    counts = data.draw(st.lists(st.integers(0, 4), min_size=m, max_size=m))
    limits = data.draw(st.lists(st.integers(0, 4), min_size=m, max_size=m))
    given_to = grant(capacity, n, counts=counts, limits=limits)
    free = sum(max(0, most - has) for most, has in zip(limits, counts, strict=True))
    assert len(given_to) == min(n, free)
    for p in given_to:
        assert counts[p] + given_to.count(p) <= limits[p]


@given(data=st.data(), n=st.integers(1, 20), m=st.integers(1, 5))
def test_only_dead_children_move_and_only_towards_the_quotas(data, n: int, m: int) -> None:
    place = torch.tensor(data.draw(st.lists(st.integers(0, m - 1), min_size=n, max_size=n)))
    dead = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    capacity = torch.tensor(data.draw(st.lists(st.floats(0.01, 10), min_size=m, max_size=m)))
    moved = move_dead_children(place, dead, capacity)
    assert torch.equal(moved[~dead], place[~dead])
    given_to = grant(capacity.double().tolist(), n)
    for p in range(m):
        quota, before, after = given_to.count(p), int((place == p).sum()), int((moved == p).sum())
        assert min(before, quota) <= after <= max(before, quota)
        if dead.all():
            assert after == quota


def test_a_candidate_without_capacity_gains_nothing() -> None:
    place, dead = torch.tensor([0, 0, 0, 0]), torch.ones(4, dtype=torch.bool)
    moved = move_dead_children(place, dead, torch.tensor([0.0, 0.0, 3.0]))
    assert moved.tolist() == [2, 2, 2, 2]


def test_shares_of_the_loss() -> None:
    share = shares(torch.tensor(6.0), torch.tensor([True, False, True]))
    assert share.tolist() == [2.0, 0.0, 2.0, 2.0]
    assert shares(torch.tensor(6.0), torch.tensor([False])).tolist() == [0.0, 6.0]


def test_the_published_schedule() -> None:
    expected = (3000, 9000, 19_000, 29_000, 39_000, 49_000)
    assert reallocation_steps(3000, 10_000, 50_000) == expected
    assert reallocation_steps(5, 5, 5) == ()
    for first, longest in ((0, 10), (11, 10)):
        with pytest.raises(ModelError, match=f"is {first} steps, the longest 10"):
            reallocation_steps(first, longest, 100)
