"""How alike the decoder rows of a dictionary are: the mean maximum cosine with another row.

1. Rows are scaled to length 1; rows that are zero are left out.
2. For each row the largest cosine with any *other* row; the mean over rows. High values mean that
   features are compositions or copies of one another (the composition measure of Matryoshka SAEs,
   arXiv 2503.17547). Signed: opposite rows are not alike.

Cost: ``2 * d_sae ** 2 * d_out`` operations; a block of ``chunk`` rows is compared with all at a time, so
that ``chunk * d_sae`` cosines are held and never ``d_sae ** 2``. A decoder of another type than float32
is copied to it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float

_VALUES = 1 << 24
"""Cosines held at a time: 64 MB, 64 rows of 262,144 features."""


@torch.no_grad()
def max_cosines(
    W_dec: Float[torch.Tensor, "d_sae d_out"], *, chunk: int | None = None
) -> Float[torch.Tensor, " rows"]:
    """Each row's largest cosine with another row, for the rows that are not zero."""
    rows = W_dec.detach().float()
    norms = torch.linalg.vector_norm(rows, dim=-1)
    there = norms > 0
    if int(there.sum()) < 2:
        return norms.new_zeros(0)
    size = chunk or max(1, _VALUES // len(rows))
    found = []
    for start in range(0, len(rows), size):
        own = slice(start, start + size)
        cosines = (rows[own] @ rows.T).div_(norms[own, None]).div_(norms)
        cosines[:, ~there] = -math.inf
        here = torch.arange(len(cosines), device=rows.device)
        cosines[here, here + start] = -math.inf
        found.append(cosines.amax(-1)[there[own]])
    return torch.cat(found)


def mean_max_cosine(W_dec: Float[torch.Tensor, "d_sae d_out"]) -> float:
    """Mean over rows of the largest cosine with another row; NaN for fewer than two rows."""
    found = max_cosines(W_dec)
    return float(found.mean()) if len(found) else math.nan
