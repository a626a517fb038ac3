"""Sums in another order stay within the tolerance, sums of other numbers do not."""

from __future__ import annotations

import pytest
import torch

from tests.support.rounding import assert_rounded, rounding


@pytest.mark.parametrize("terms", [16, 1024, 65536])
def test_sums_in_another_order_are_within_the_tolerance(terms: int) -> None:
    x = torch.randn(64, terms, generator=torch.Generator().manual_seed(0))
    shuffled = x[:, torch.randperm(terms, generator=torch.Generator().manual_seed(1))]
    scale = float(x.abs().sum(1).max())
    assert_rounded(shuffled.cumsum(1)[:, -1], x.sum(1), terms, scale=scale)


def test_what_is_larger_than_rounding_is_refused() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    size = float(x.abs().max())
    assert_rounded(x + 0.9 * rounding(64, size), x, 64)
    with pytest.raises(AssertionError, match="not close"):
        assert_rounded(x + 2 * rounding(64, size), x, 64)


def test_half_precision_has_a_wider_tolerance() -> None:
    assert rounding(9, dtype=torch.bfloat16) == 65536 * rounding(9)
