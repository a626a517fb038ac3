"""The transpose of frozen attention: from what heads write to what their values read.

1. ``to_heads``: ``W_O`` with the post-norm's gain, head by head.
2. ``through_values``: over tokens by the frozen pattern, summed over the heads of a key-value group, and
   through ``W_V``. A gradient at one token spreads to all earlier ones here.
3. ``tokens_through``: the same for the embeddings alone, from below: what each token writes at every
   later one through the first attention and beside it.

Gradients at ``z`` lie head by head, ``[head, pos, target, d_head]``: then every step is one product of
two matrices, and nothing is turned round in memory.

Cost: ``pos * d_model * (head + kv) * d_head`` and half of ``pos^2 * head * d_head`` multiplications; a
target at one token pays for that token only.
"""

from __future__ import annotations

import torch
from jaxtyping import Float

from gemmascope_plugin.tracing.linear.cotangent import Cotangent
from gemmascope_plugin.tracing.linear.frozen_pass import QUERIES, FrozenAttention


def to_heads(
    attention: FrozenAttention, stream: Cotangent
) -> Float[torch.Tensor, "head *pos target d_head"]:
    """Gradients at ``z``, without the scale of the post-norm, from those after it."""
    values = stream.values.flatten(0, -2)
    heads = torch.bmm(values.expand(len(attention.W_O), -1, -1), attention.W_O)
    return heads.unflatten(1, stream.values.shape[:-1])


def through_values(
    attention: FrozenAttention,
    heads: Float[torch.Tensor, "head *pos target d_head"],
    state: Cotangent,
    stream: Cotangent | None,
) -> Cotangent:
    """Gradients at the stream before attention.

    Args:
        attention: The layer's.
        heads: Gradients at ``z``, see :func:`to_heads`.
        state: The targets, and where their gradients at ``z`` are.
        stream: Gradients after attention, which also pass beside it; None for nothing. A dense one is
            written into.
    """
    mixed = _mixed(attention, heads, state) if state.dense else _spread(attention, heads, state)
    n_pos, n = state.n_pos, len(state.positions)
    if stream is not None and stream.dense:
        out = stream.values
    else:
        out = mixed.new_empty(n_pos, n, attention.W_V.shape[2])
    flat, is_new = out.view(n_pos * n, -1), out is not getattr(stream, "values", None)
    for index, W_V in enumerate(attention.W_V):
        beta = 0 if is_new and index == 0 else 1
        flat.addmm_(mixed[index].view(n_pos * n, -1), W_V, beta=beta)
    if stream is not None and not stream.dense:
        out[stream.positions, torch.arange(n, device=out.device)] += stream.values
    return state.with_values(out)


def tokens_through(
    attention: FrozenAttention, embed: Float[torch.Tensor, "key d_model"]
) -> Float[torch.Tensor, "query key d_model"]:
    """What each token's embedding becomes at every later token behind the first attention.

    Args:
        attention: The first layer's, without biases.
        embed: What the tokens write.
    """
    n_pos, kv = len(embed), len(attention.W_V)
    values = torch.einsum("km,gdm->gkd", embed, attention.W_V)
    mix = attention.mix.view(kv, n_pos, attention.group, n_pos)
    W_O = attention.W_O.unflatten(0, (kv, -1))
    out = embed.new_zeros(n_pos, n_pos, embed.shape[1])
    for group in range(kv):
        for head in range(attention.group):
            written = values[group] @ W_O[group, head].T
            out += mix[group, :, head].T[:, :, None] * written
    tokens = torch.arange(n_pos, device=embed.device)
    out[tokens, tokens] += embed
    return out


def _mixed(
    attention: FrozenAttention,
    heads: Float[torch.Tensor, "head pos target d_head"],
    state: Cotangent,
) -> Float[torch.Tensor, "kv pos target d_head"]:
    """Over tokens, some queries at a time: keys that they look at only, later targets only."""
    kv, group, n_pos = len(attention.W_V), attention.group, state.n_pos
    mix = attention.mix.unflatten(-1, (group, -1))
    _, _, n, d_head = heads.shape
    flat = heads.view(kv, group, n_pos, n * d_head)
    out = heads.new_empty(kv, n_pos, n * d_head)
    out[:, QUERIES:] = 0
    for start in range(0, n_pos, QUERIES):
        stop = min(start + QUERIES, n_pos)
        first = int(torch.searchsorted(state.positions, start)) * d_head
        keys = slice(attention.first_keys[start // QUERIES], stop)
        for index in range(kv):
            for head in range(group):
                weights = mix[index, keys, head, start:stop]
                gradients = flat[index, head, start:stop, first:]
                # the first product fills what the others add to
                beta = 0 if start == head == 0 else 1
                out[index, keys, first:].addmm_(weights, gradients, beta=beta)
    return out.view(kv, n_pos, n, d_head)


def _spread(
    attention: FrozenAttention, heads: Float[torch.Tensor, "head target d_head"], state: Cotangent
) -> Float[torch.Tensor, "kv pos target d_head"]:
    """From the token of each target, targets of one token together."""
    kv, group, n_pos = len(attention.W_V), attention.group, state.n_pos
    mix = attention.mix.unflatten(-1, (group, -1))
    _, n, d_head = heads.shape
    flat = heads.view(kv, group, n * d_head)
    out = heads.new_zeros(kv, n_pos, n * d_head)
    for pos, targets, _ in state.at():
        there = slice(targets.start * d_head, targets.stop * d_head)
        for index in range(kv):
            weights = mix[index, : pos + 1, :, pos]
            out[index, : pos + 1, there].addmm_(weights, flat[index, :, there])
    return out.view(kv, n_pos, n, d_head)
