"""Sums in at least float32, whatever the type of the model.

A model in half precision keeps its stream, its weights and what is inserted into it in its own type. What
is added up outside of it (products of writes and gradients, norms, projections, means) is widened first:
bfloat16 has 8 binary digits, and a sum over hundreds of terms in it has none left.

Weights are widened where they are asked for, one layer at a time, by ``Anatomy``; activations by whoever
adds them up, with :func:`wide`. In a float32 model nothing is copied.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped


def wide(x: Shaped[torch.Tensor, "*axes"]) -> Float[torch.Tensor, "*axes"]:
    """The tensor in at least float32; itself where it already is."""
    return x if x.dtype == torch.float64 else x.float()
