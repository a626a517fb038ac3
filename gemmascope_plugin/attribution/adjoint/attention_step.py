"""The transpose of frozen attention: from what heads write to what their values read.

1. ``to_heads``: ``W_O`` with the post-norm's gain, head by head.
2. ``through_values``: over tokens by the frozen pattern, summed over the heads of a key-value group, and
   through ``W_V``. A gradient at one token spreads to all earlier ones here.

Cost: ``pos * d_model * head * d_head`` and half of ``pos^2 * head * d_head`` multiplications; a target
at one token pays for that token only.
"""

from __future__ import annotations

import torch
from jaxtyping import Float

from gemmascope_plugin.attribution.adjoint.cotangent import Cotangent
from gemmascope_plugin.attribution.adjoint.frozen_pass import FrozenAttention

QUERIES = 64
"""Queries that are mixed at a time."""


def to_heads(attention: FrozenAttention, stream: Cotangent) -> Cotangent:
    """Gradients at ``z`` (heads flattened), without the scale of the post-norm, from those after it."""
    weights = attention.W_O.permute(1, 0, 2).flatten(1)
    return stream.with_values(stream.values @ weights)


def through_values(
    attention: FrozenAttention, heads: Cotangent, stream: Cotangent | None
) -> Cotangent:
    """Gradients at the stream before attention.

    Args:
        attention: The layer's.
        heads: Gradients at ``z``, see :func:`to_heads`.
        stream: Gradients after attention, which also pass beside it; None for nothing. A dense one is
            written into.
    """
    kv, d_head = len(attention.W_V), attention.W_V.shape[1]
    mixed = _spread(attention, heads) if not heads.dense else _mixed(attention, heads)
    n_pos, n = heads.n_pos, len(heads.positions)
    if stream is not None and stream.dense:
        out = stream.values
    else:
        out = mixed.new_zeros(n_pos, n, attention.W_V.shape[2])
    flat = out.view(n_pos * n, -1)
    for index in range(kv):
        flat.addmm_(mixed[index].reshape(n_pos * n, d_head), attention.W_V[index])
    if stream is not None and not stream.dense:
        out[stream.positions, torch.arange(n, device=out.device)] += stream.values
    return heads.with_values(out)


def _mixed(
    attention: FrozenAttention, heads: Cotangent
) -> Float[torch.Tensor, "kv pos target width"]:
    """Over tokens, some queries at a time: earlier keys only, later targets only."""
    kv, group, n_pos = len(attention.W_V), attention.group, heads.n_pos
    mix = attention.mix.unflatten(-1, (group, -1))
    z = heads.values.unflatten(-1, (kv, group, -1))
    out = z.new_zeros(kv, n_pos, len(heads.positions), z.shape[-1])
    for start in range(0, n_pos, QUERIES):
        stop = min(start + QUERIES, n_pos)
        first = int(torch.searchsorted(heads.positions, start))
        own = z[start:stop, first:].permute(2, 3, 0, 1, 4).flatten(3).flatten(1, 2)
        weights = mix[:, :stop, :, start:stop].flatten(2)
        out[:, :stop, first:] += torch.bmm(weights, own).unflatten(-1, (-1, z.shape[-1]))
    return out


def _spread(
    attention: FrozenAttention, heads: Cotangent
) -> Float[torch.Tensor, "kv pos target width"]:
    kv, group, n_pos = len(attention.W_V), attention.group, heads.n_pos
    mix = attention.mix.unflatten(-1, (group, -1))[:, :n_pos, :, heads.positions]
    z = heads.values.unflatten(-1, (kv, group, -1))
    return torch.einsum("kpgt,tkgd->kptd", mix, z)
