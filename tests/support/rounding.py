"""How far two ways of computing the same thing may be apart: tolerances from the arithmetic.

Another processor, number of threads or version of torch adds the same terms in another order. A sum of
``terms`` products, of size ``scale``, then differs by about ``eps * sqrt(terms) * scale``: errors of
rounding are as good as random, so they grow with the root. Of a chain of layers, ``terms`` is the
number of terms of all sums on the way to the number. ``SAFETY`` covers the largest of many entries and
what amplifies errors on the way: softmaxes, soft-caps, norms.

Equality is for the very same computation on the very same tensors, and for what is promised to change
nothing (``error="keep"``, a file that is read again); never for how many entries are exactly zero after
two computations.
"""

from __future__ import annotations

import math

import torch

SAFETY = 4


def rounding(terms: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """The absolute difference that rounding may make to a sum.

    Args:
        terms: Terms of all sums on the way to the number.
        scale: Size of the sums on the way, which may be larger than their result.
        dtype: What they are computed in.
    """
    return SAFETY * torch.finfo(dtype).eps * math.sqrt(terms) * scale


def assert_rounded(
    actual: torch.Tensor,
    expected: torch.Tensor,
    terms: int,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Asserts that two ways of computing a tensor differ by rounding alone.

    Args:
        actual: From one way.
        expected: From the other.
        terms: Terms of all sums on the way to an entry.
        scale: Size of the sums on the way; None for the largest entry of ``expected``.
        dtype: What they are computed in; None for that of ``actual``.
    """
    size = float(expected.detach().abs().max()) if scale is None else scale
    atol = rounding(terms, size, dtype or actual.dtype)
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0, check_dtype=False)


TINY_TERMS = 3 * (32 + 12 + 20 + 48 + 2 * 32 + 64)
"""Of the tests' tiny models: three layers, each with a projection of width 32, scores of width 12,
patterns over 20 tokens, an output of width 48, and an MLP of 32 and 64."""
TINY = rounding(TINY_TERMS)
"""For numbers of size one from the tests' tiny models."""
