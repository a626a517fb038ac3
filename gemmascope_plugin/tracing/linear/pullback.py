"""Gradients of many targets, and how frozen attention pulls them back: from what heads write to what
their values read.

Targets are sorted by token, so those that reach a token are the last ones: causality is a slice. Their
gradients are at one token each, or at all tokens up to the last of them.

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

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64

from gemmascope_plugin.tracing.linear.frozen_pass import QUERIES, FrozenAttention


@dataclass(frozen=True, eq=False)
class Entry:
    """Targets that enter the sweep at one place."""

    after: int
    """Time of the site below which they enter; ``PER_LAYER * layer + 3`` for the stream behind one."""
    positions: Int64[torch.Tensor, " target"]
    vectors: Float[torch.Tensor, "*pos target width"]
    """At each target's token; or ``[pos, target, width]`` up to it, which the sweep then writes into."""
    constant: Float[torch.Tensor, " target"]
    """The part of each target that comes from no node."""
    n_below: int
    """Nodes that can reach them: the first ones."""


@dataclass(frozen=True, eq=False)
class Cotangent:
    """A gradient per target."""

    positions: Int64[torch.Tensor, " target"]
    """Of the targets, ascending."""
    values: Float[torch.Tensor, "*pos target width"]
    """``[target, width]``, each at its own token; or ``[pos, target, width]``."""

    @property
    def dense(self) -> bool:
        """Whether it is spread over tokens."""
        return self.values.ndim == 3

    @cached_property
    def n_pos(self) -> int:
        """Tokens that it may reach."""
        return len(self.values) if self.dense else int(self.positions[-1]) + 1

    def at(self) -> Iterator[tuple[int, slice, Float[torch.Tensor, "some width"]]]:
        """Token by token: the targets that may be reached from it, and their gradients there."""
        n = len(self.positions)
        ends = torch.arange(self.n_pos + 1, device=self.positions.device)
        firsts = torch.searchsorted(self.positions, ends).tolist()
        for pos in range(self.n_pos):
            if self.dense:
                yield pos, slice(firsts[pos], n), self.values[pos, firsts[pos] :]
            elif firsts[pos] < firsts[pos + 1]:
                targets = slice(firsts[pos], firsts[pos + 1])
                yield pos, targets, self.values[targets]

    def scaled(self, factor: Float[torch.Tensor, " all_pos"]) -> Float[torch.Tensor, ...]:
        """``factor`` of each token in a shape that multiplies the values."""
        return factor[: self.n_pos, None, None] if self.dense else factor[self.positions, None]

    def sums(
        self, vector: Float[torch.Tensor, " width"], factor: Float[torch.Tensor, " all_pos"]
    ) -> Float[torch.Tensor, " target"]:
        """``sum_pos factor <vector, values>`` of each target."""
        products = (self.values @ vector) * self.scaled(factor)[..., 0]
        return products.sum(0) if self.dense else products

    def with_values(self, values: Float[torch.Tensor, "*pos target width"]) -> Cotangent:
        """The same targets with other gradients."""
        return Cotangent(self.positions, values)


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
    """Gradients at the stream before attention, from those at ``z`` (``heads``, which stand where
    ``state`` does) and those after it (``stream``), which also pass beside it. A dense ``stream`` is
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
    """What each token's embedding becomes at every later token behind the first attention, which has no
    biases.
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
        columns = slice(targets.start * d_head, targets.stop * d_head)
        for index in range(kv):
            weights = mix[index, : pos + 1, :, pos]
            out[index, : pos + 1, columns].addmm_(weights, flat[index, :, columns])
    return out.view(kv, n_pos, n, d_head)
