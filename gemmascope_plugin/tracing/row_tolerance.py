"""What rounding may leave between the sum of a row of a trace and what the row explains.

A row is a linear function of everything that is written into the stream; what is not in it is what the
model has rounded away. With a type whose roundings are ``u`` on average (a quarter of its ``eps``):

1. A block rounds some twelve times on the way of its stream: four norms, the products of attention and
   the MLP, their activations, two additions. Roundings are independent, so ``12 L`` of them add up to
   ``u sqrt(12 L)`` of the size of what is rounded.
2. Sums of half-precision products are kept in float32. Those of float32 are not kept in more, so each of
   the ``d`` terms of a product rounds too: ``sqrt(12 L d)``.
3. ``SIGMAS`` of that, over thousands of rows: what is above is not rounding. Heads of one layer that
   write a thousandth more than their values say are above it in float32, a third more in bfloat16.

For Gemma 3 270M (18 layers) that is 3e-5 in float32 and 0.09 in bfloat16, as a share of the absolute sum
of a row; ordinary prompts with random transcoders were off by 4e-7 and 6e-3 at most, the bundled suite,
whose stream is narrow, by a fifth of what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

ROUNDINGS = 12
"""Of the stream, in a block."""
SIGMAS = 3


def allowed_gap(dtypes: Iterable[torch.dtype], n_layers: int, d_model: int) -> float:
    """The share of the absolute sum of a row that its sum may be off.

    Args:
        dtypes: Types of the model, of features and of the rows; the narrowest counts.
        n_layers: Blocks that are passed.
        d_model: Width of the stream.
    """
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    terms = d_model if eps <= torch.finfo(torch.float32).eps else 1
    return SIGMAS * eps / 4 * math.sqrt(ROUNDINGS * n_layers * terms)
