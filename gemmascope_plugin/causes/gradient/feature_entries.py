"""Products of features with gradients, at active entries only.

1. ``dm/da_f`` at a token is ``<W_f, g>`` with ``g`` the gradient at the site: one row of the decoder and
   one of ``g`` for each active entry, never ``[token, d_sae]``.
2. Sums over tokens and prompts are kept by *key*: the feature, or position and feature. ``Tally`` merges
   the keys of one batch of prompts into those of the batches before.

Cost: ``2 * active * width`` operations, in blocks of ``BLOCK`` numbers; a sort of the keys a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64, Int64

from gemmascope_plugin.saes import SparseActs

BLOCK = 2**24
"""Numbers gathered at a time."""


def _none(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype)


def slopes_of_entries(
    acts: SparseActs,
    W_dec: Float[torch.Tensor, "d_sae width"],
    gradient: Float[torch.Tensor, "prompt pos width"],
) -> Float[torch.Tensor, " active"]:
    """``<W_f, g>`` for every active entry, in its order."""
    flat = gradient.flatten(0, -2).to(W_dec.device)
    slopes = []
    size = max(1, BLOCK // W_dec.shape[1])
    for rows, features in zip(acts.rows.split(size), acts.indices.split(size), strict=True):
        slopes.append((W_dec[features].to(flat.dtype) * flat[rows]).sum(-1))
    return torch.cat(slopes) if slopes else flat.new_zeros(0)


@dataclass
class Tally:
    """Sums by key, over as many batches as come."""

    keys: Int64[torch.Tensor, " key"] = field(default_factory=lambda: _none(torch.int64))
    """Ascending."""
    sums: Float64[torch.Tensor, " key"] = field(default_factory=lambda: _none(torch.float64))

    def add(
        self, keys: Int64[torch.Tensor, " entry"], values: Float[torch.Tensor, " entry"]
    ) -> None:
        """Adds entries to the sums of their keys, which may be new ones.

        A value of zero makes a key known and no more.
        """
        every = torch.cat([self.keys, keys.cpu()])
        self.keys, place = every.unique(return_inverse=True)
        entries = torch.cat([self.sums, values.detach().double().cpu()])
        self.sums = torch.zeros(len(self.keys), dtype=torch.float64).index_add(0, place, entries)


def keys_of(acts: SparseActs, per_position: bool) -> Int64[torch.Tensor, " active"]:
    """``feature``, or ``position * d_sae + feature``, of entries of ``[prompt, pos, d_sae]``."""
    if not per_position:
        return acts.indices
    return acts.rows % acts.shape[-2] * acts.d_sae + acts.indices
