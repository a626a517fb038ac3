"""The reconstruction condition: planted trees meet it, others do not; probes equal plain training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import ModelError, WidthMismatchError
from gemmascope_plugin.measures.probe import activity, probe_edges, sample_edges, train_probes
from gemmascope_plugin.saes import SparseActs
from tests.factories import unchecked

D, N_PARENTS, N_CHILDREN = 48, 6, 3
D_SAE = N_PARENTS * (1 + N_CHILDREN)
PARENT = torch.tensor([-1] * N_PARENTS + [p for p in range(N_PARENTS) for _ in range(N_CHILDREN)])


def planted(n_tokens: int = 1500, seed: int = 0) -> tuple[torch.Tensor, SparseActs, torch.Tensor]:
    """A tensor that parents and children add up to, activations, and the orthonormal decoder.

    One child at most goes with an active parent, so that its concept is ``d_p + d_c`` against the rest.
    """
    rng = torch.Generator().manual_seed(seed)
    W_dec = torch.linalg.qr(torch.randn(D, D_SAE, generator=rng)).Q.T.contiguous()
    acts = torch.zeros(n_tokens, D_SAE)
    acts[:, :N_PARENTS] = (torch.rand(n_tokens, N_PARENTS, generator=rng) < 0.3).float()
    which = torch.randint(0, N_CHILDREN + 1, (n_tokens, N_PARENTS), generator=rng)
    for c in range(N_PARENTS, D_SAE):
        number = (c - N_PARENTS) % N_CHILDREN
        acts[:, c] = acts[:, PARENT[c]] * (which[:, PARENT[c]] == number)
    acts *= 1 + torch.rand(acts.shape, generator=rng)
    x = acts @ W_dec + 0.05 * torch.randn(n_tokens, D, generator=rng) + 3
    return x, SparseActs.from_dense(acts), W_dec


def slow_probes(x: torch.Tensor, labels: torch.Tensor, steps: int) -> torch.Tensor:
    """Logistic regression by PyTorch's own loss and gradients, one probe at a time."""
    x = x - x.mean(0)
    x = x / x.pow(2).mean().sqrt()
    probes = []
    for label in labels.T.float():
        probe = torch.nn.Linear(x.shape[1], 1)
        torch.nn.init.zeros_(probe.weight)
        torch.nn.init.zeros_(probe.bias)
        adam = torch.optim.Adam(probe.parameters(), lr=0.01, weight_decay=1e-6)
        decay = torch.optim.lr_scheduler.ExponentialLR(adam, 1e-3 ** (1 / steps))
        balance = (label == 0).sum() / label.sum()
        loss = torch.nn.BCEWithLogitsLoss(pos_weight=balance)
        for _ in range(steps):
            adam.zero_grad()
            loss(probe(x)[:, 0], label).backward()
            adam.step()
            decay.step()
        probes.append(probe.weight[0].detach())
    return torch.stack(probes)


def test_a_planted_tree_meets_the_condition() -> None:
    x, acts, W_dec = planted()
    probes = probe_edges(x, acts, W_dec, PARENT, steps=300)
    assert probes.score == 1.0
    assert probes.child.tolist() == list(range(N_PARENTS, D_SAE))
    assert torch.equal(probes.parent, PARENT[probes.child])
    assert (probes.child_cosine > probes.parent_cosine).all() and (probes.parent_cosine > 0.1).all()
    assert (probes.child_rank == 0).all() and (probes.parent_rank == 1).all()
    assert probes.hits.all()


def test_wrong_parents_do_not() -> None:
    x, acts, W_dec = planted()
    wrong = torch.where(PARENT >= 0, (PARENT + 1) % N_PARENTS, -1)
    assert probe_edges(x, acts, W_dec, wrong, steps=300).score < 0.3


def test_probes_equal_plain_logistic_regression() -> None:
    x, acts, _ = planted(200)
    labels = activity(acts, torch.tensor([9, 2, 7]))
    probes = train_probes(x, labels, steps=40, rng=torch.Generator())
    expected = slow_probes(x, labels, 40)
    # the first gradient of the balanced bias is rounding alone, which Adam makes a step of
    assert torch.allclose(probes, expected, atol=2e-3) and expected.abs().mean() > 0.05
    assert (torch.nn.functional.cosine_similarity(probes, expected) > 1 - 1e-5).all()


def test_ranks_are_positions_by_cosine(monkeypatch) -> None:
    from gemmascope_plugin.measures import probe

    x, acts, W_dec = planted(400)
    W_dec = W_dec * torch.linspace(0.1, 9, D_SAE)[:, None] + 0.05
    probes = probe_edges(x, acts, W_dec, PARENT, steps=20)
    weights = train_probes(
        x, activity(acts, probes.child), steps=20, rng=torch.Generator().manual_seed(0)
    )
    for i, (p, c) in enumerate(zip(probes.parent.tolist(), probes.child.tolist(), strict=True)):
        cosines = torch.nn.functional.cosine_similarity(weights[i], W_dec, dim=-1)
        order = cosines.argsort(descending=True).tolist()
        assert (probes.parent_rank[i], probes.child_rank[i]) == (order.index(p), order.index(c))
        assert probes.parent_cosine[i] == pytest.approx(float(cosines[p]), abs=1e-5)
        assert bool(probes.hits[i]) == (p in order[:5] and c in order[:5])
    monkeypatch.setattr(probe, "CELLS", 2 * D_SAE)  # two directions at a time
    again = probe_edges(x, acts, W_dec, PARENT, steps=20)
    assert torch.equal(again.parent_rank, probes.parent_rank)


def sample(acts: SparseActs, parent: torch.Tensor, n: tuple[int, int], **rules: Any) -> list[int]:
    rng = torch.Generator().manual_seed(rules.get("seed", 0))
    return sample_edges(parent, acts, n, rules.get("min_tokens", 2), rng).tolist()


def test_which_edges_are_drawn() -> None:
    #                      frequent: 0 1 2; children 3 4 5 of 0, 6 of 1, 7 of 5
    fires = [9, 8, 10, 2, 3, 1, 4, 2]
    acts = torch.zeros(10, 8)
    for feature, n in enumerate(fires):
        acts[:n, feature] = 1
    parent = torch.tensor([2, -1, -1, 0, 0, 0, 1, 5])
    active = SparseActs.from_dense(acts)
    assert sample(active, parent, (9, 9)) == [
        3,
        4,
        6,
    ]  # 0 is hardly silent, 5 rare, 7 below a rare one
    assert sample(active, parent, (9, 9), min_tokens=1) == [0, 3, 4, 5, 6]
    assert sample(active, parent, (9, 9), min_tokens=4) == [6]
    one_each = {tuple(sample(active, parent, (9, 1), seed=seed)) for seed in range(20)}
    assert one_each == {(3, 6), (4, 6)}
    one_parent = {tuple(sample(active, parent, (1, 9), seed=seed)) for seed in range(20)}
    assert one_parent == {(3, 4), (6,)}


def test_the_same_seed_gives_the_same_result() -> None:
    x, acts, W_dec = planted(300)
    options = {"n_parents": 3, "max_children": 2, "steps": 5}
    a, b = (probe_edges(x, acts, W_dec, PARENT, **options) for _ in range(2))
    assert torch.equal(a.child, b.child) and torch.equal(a.parent_cosine, b.parent_cosine)
    assert len(a.child) == 6 and len(a.parent.unique()) == 3
    others = [probe_edges(x, acts, W_dec, PARENT, seed=s, **options).child for s in range(1, 6)]
    assert any(not torch.equal(a.child, other) for other in others)


def test_many_tokens_are_seen_in_batches(monkeypatch) -> None:
    from gemmascope_plugin.measures import probe

    monkeypatch.setattr(probe, "_BATCH", 256)
    x, acts, W_dec = planted(600)
    assert probe_edges(x, acts, W_dec, PARENT, steps=300).score > 0.9


def test_without_edges_there_is_no_score() -> None:
    x, acts, W_dec = planted(50)
    probes = probe_edges(x, acts, W_dec, torch.full((D_SAE,), -1))
    assert math.isnan(probes.score) and len(probes.hits) == 0


def test_what_cannot_be_probed_is_an_error() -> None:
    x, acts, W_dec = planted(50)
    probe = unchecked(probe_edges)
    with pytest.raises(WidthMismatchError, match="width 47, the decoder rows have 48.*output site"):
        probe(x[:, 1:], acts, W_dec, PARENT)
    with pytest.raises(ModelError, match="x has 49 tokens, the activations 50.*same tokens"):
        probe(x[1:], acts, W_dec, PARENT)
    with pytest.raises(ModelError, match="steps=0 is less than one.*Try: steps="):
        probe(x, acts, W_dec, PARENT, steps=0)
    with pytest.raises(ModelError, match="max_children=0 is less"):
        probe(x, acts, W_dec, PARENT, max_children=0)
    with pytest.raises(ModelError, match="is among its own ancestors"):
        probe(x, acts, W_dec, torch.zeros(D_SAE, dtype=torch.long))
