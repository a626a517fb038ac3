"""Levels: what is refused, and the sums over prefixes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.saes.matryoshka import check_levels
from gemmascope_plugin.saes.training.matryoshka_training import (
    check_level_weights,
    prefix_reconstructions,
)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((), r"needs levels, and got \(\)\. Try: levels=\(4, 32\)"),
        (None, "needs levels, and got None"),
        ("abc", "needs levels, and got 'abc'"),
        ((8, 2.5, 32), r"Level 2\.5 of \[8, 2\.5, 32\] is not a positive integer"),
        ((True, 32), "Level True of"),
        ((0, 32), "Level 0 of"),
        ((8, 4, 32), r"do not increase: 4 follows 8\. Try: levels=\(4, 8, 32\)"),
        ((8, 8, 32), "do not increase: 8 follows 8"),
        ((8, 64), r"Level 64 exceeds the 32 features .* Try: levels=\(8, 32\)"),
        ((8, 16), r"last level is 16, and the dictionary has 32 .* Try: levels=\(8, 16, 32\)"),
    ],
)
def test_bad_levels(levels: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_levels(levels, 32)


def test_good_levels_become_integers() -> None:
    assert check_levels([8, 32], 32) == (8, 32)
    assert check_levels([32], 32) == (32,)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), r"1 level weights for 2 levels \[8, 32\]"),
        ((1.0, -1.0), "not all finite and positive or 0"),
        ((1.0, float("nan")), "not all finite"),
        ((1.0, 0.0), "leave the last features without a loss"),
    ],
)
def test_bad_weights(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_level_weights(weights, (8, 32))


def test_weights_are_one_unless_given() -> None:
    assert check_level_weights(None, (8, 32)) == (1.0, 1.0)
    assert check_level_weights((0, 2.0), (8, 32)) == (0.0, 2.0)


levels_of = st.sets(st.integers(1, 12), min_size=1).map(sorted)


@settings(deadline=None)
@given(levels_of, st.lists(st.integers(1, 3), max_size=2), st.integers(0, 99))
def test_prefixes_add_up_and_end_with_the_whole(
    levels: list[int], tokens: list[int], seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    acts = torch.rand(*tokens, levels[-1], generator=rng, dtype=torch.float64)
    W_dec = torch.randn(levels[-1], 5, generator=rng, dtype=torch.float64)
    b_dec = torch.randn(5, generator=rng, dtype=torch.float64)
    reconstructions = prefix_reconstructions(acts, W_dec, b_dec, levels)
    assert len(reconstructions) == len(levels)
    for level, reconstruction in zip(levels, reconstructions, strict=True):
        slow = acts[..., :level] @ W_dec[:level] + b_dec
        torch.testing.assert_close(reconstruction, slow.expand_as(reconstruction))
    for i in range(len(levels) - 1):
        between = slice(levels[i], levels[i + 1])
        torch.testing.assert_close(
            reconstructions[i + 1] - reconstructions[i], acts[..., between] @ W_dec[between]
        )
