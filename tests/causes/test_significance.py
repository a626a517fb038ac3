"""Intervals and p-values against slow references and known answers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from gemmascope_plugin.causes.effects import bootstrap, permutation_test, standard_error
from gemmascope_plugin.errors import TaskError

CHANGES = (
    torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    + torch.tensor([0.0, 1, 3])[None, :, None]
)


def test_standard_errors() -> None:
    expected = CHANGES.numpy().std(-1, ddof=1) / np.sqrt(6)
    assert np.allclose(standard_error(CHANGES), expected)


def test_the_interval_is_that_of_drawn_prompts() -> None:
    drawn = torch.randint(6, (200, 6), generator=torch.Generator().manual_seed(3))
    means = np.stack([CHANGES.double().numpy()[..., row].mean(-1) for row in drawn.numpy()])
    lower, upper = bootstrap(CHANGES, n=200, seed=3, level=0.9)
    assert np.allclose(lower, np.quantile(means, 0.05, axis=0))
    assert np.allclose(upper, np.quantile(means, 0.95, axis=0))


def test_intervals_cover_the_truth() -> None:
    """Of 400 cells with a true mean of 1 about nine in ten are inside."""
    changes = torch.randn(400, 40, generator=torch.Generator().manual_seed(1)) + 1
    lower, upper = bootstrap(changes, n=500, seed=0, level=0.9)
    inside = ((lower <= 1) & (upper >= 1)).double().mean()
    assert 0.84 < float(inside) < 0.94


def by_enumeration(cells: np.ndarray) -> tuple[list[float], list[float]]:
    """Student's t of every sign pattern."""
    signs = np.array(list(product([1, -1], repeat=cells.shape[1])))

    def t(x):
        return np.abs(x.mean(-1) / x.std(-1, ddof=1))

    flipped = np.stack([t(cells * row) for row in signs])
    reached = t(cells) - 1e-9
    single = (flipped >= reached).mean(0)
    corrected = (flipped.max(1, keepdims=True) >= reached).mean(0)
    return single.tolist(), corrected.tolist()


def test_few_prompts_try_every_sign_pattern() -> None:
    cells = CHANGES.reshape(6, 6).double()
    single, corrected = by_enumeration(cells.numpy())
    p_values = permutation_test(cells, n=64, seed=0)
    assert p_values.single.tolist() == pytest.approx(single)
    assert p_values.corrected.tolist() == pytest.approx(corrected)
    assert permutation_test(CHANGES, n=64, seed=0).single.shape == (2, 3)


def test_random_patterns_come_close_to_all_of_them(monkeypatch) -> None:
    cells = CHANGES.reshape(6, 6).double()
    single, corrected = by_enumeration(cells.numpy())
    cells = cells.repeat(1, 1)
    monkeypatch.setattr("gemmascope_plugin.causes.effects._AT_ONCE", 50)  # some patterns at a time
    # fewer than 64, so that they are drawn
    means = [permutation_test(cells, n=63, seed=seed) for seed in range(100)]
    alone = torch.stack([p.single for p in means]).mean(0)
    together = torch.stack([p.corrected for p in means]).mean(0)
    assert alone.tolist() == pytest.approx(single, abs=0.03)
    assert together.tolist() == pytest.approx(corrected, abs=0.03)


def test_without_effects_one_sweep_in_twenty_has_a_finding() -> None:
    generator = torch.Generator().manual_seed(2)
    hits = raw = 0
    for seed in range(200):
        p = permutation_test(torch.randn(20, 12, generator=generator), n=200, seed=seed)
        hits += bool((p.corrected < 0.05).any())
        raw += bool((p.single < 0.05).any())
    assert hits / 200 < 0.1
    assert raw / 200 > 0.4  # uncorrected, most sweeps would have one


def test_cells_without_change_are_no_finding() -> None:
    changes = torch.zeros(2, 8)
    changes[1] = torch.linspace(1, 2, 8)
    p = permutation_test(changes, n=256, seed=0)
    assert p.single.tolist() == [1.0, 2 / 256]
    assert p.corrected.tolist() == [1.0, 2 / 256]


def test_one_prompt_is_an_error() -> None:
    for measure in (standard_error, lambda x: bootstrap(x, 10, 0, 0.9)):
        with pytest.raises(TaskError, match="One prompt says nothing"):
            measure(CHANGES[..., :1])
    with pytest.raises(TaskError, match="level 95"):
        bootstrap(CHANGES, 10, 0, 95.0)
