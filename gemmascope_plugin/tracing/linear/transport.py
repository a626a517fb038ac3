"""What a frozen model makes of gradients on their way down, and of what nodes write on its way up.

*Downwards*, for the sweep. Targets are sorted by token, so those that reach a token are the last ones:
causality is a slice. Their gradients (:class:`Cotangent`) are at one token each, or at all tokens up to
the last of them.

1. ``to_heads``: ``W_O`` with the post-norm's gain, head by head.
2. ``through_values``: over tokens by the frozen pattern, summed over the heads of a key-value group, and
   through ``W_V``. A gradient at one token spreads to all earlier ones here.
3. Gradients at ``z`` lie head by head, ``[head, pos, target, d_head]``: then every step is one product of
   two matrices, and nothing is turned round in memory.

*Upwards* (:class:`Tangent`), the transpose of the sweep:

1. Attention reads the values, mixes tokens by the frozen pattern and writes beside the stream; an
   attention SAE lets nothing of that through at the tokens that it works on.
2. An affine skip adds what it makes of the stream before the MLP.
3. A residual SAE ends everything at the tokens that it works on.

Cost: downwards ``pos * d_model * (head + kv) * d_head`` and half of ``pos^2 * head * d_head``
multiplications a target; one at one token pays for that token only. Upwards ``pos * d_model * (2 head *
d_head)`` multiplications a write and layer; ``write * pos * d_model`` numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from jaxtyping import Float, Int64

from gemmascope_plugin.tracing.linear.frozen_pass import QUERIES, FrozenAttention, FrozenPass
from gemmascope_plugin.tracing.linear.trace_nodes import Layout
from gemmascope_plugin.tracing.linear.trace_site import PER_LAYER, Activity

TOKENS = -1
"""Time of the embedding."""


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


# ------------------------------------------------------------------------------------------- upwards
@dataclass(frozen=True, eq=False)
class Write:
    """What a node writes into the stream at one place."""

    time: int
    """Of the site, see ``PER_LAYER``; that of ``z`` for attention."""
    positions: Int64[torch.Tensor, " some"]
    vectors: Float[torch.Tensor, "some d_model"]


def from_heads(
    attention: FrozenAttention, z: Float[torch.Tensor, "*axes heads"]
) -> Float[torch.Tensor, "*axes d_model"]:
    """What heads write, without the scale of the post-norm."""
    return z @ attention.W_O.transpose(1, 2).flatten(0, 1)


def passing(layout: Layout, layer: int, like: torch.Tensor) -> Float[torch.Tensor, " pos"]:
    """0 where an SAE takes the place of what heads write, else 1."""
    activity = activity_at(layout, PER_LAYER * layer)
    return torch.ones_like(like) if activity is None else (~activity.keep).to(like)


def activity_at(layout: Layout, time: int) -> Activity | None:
    """The site that works at a time, if there is one."""
    return layout.activities[layout.at[time]] if time in layout.at else None


class Tangent:
    """Writes as they go up, at the tokens that count: ``n_pos``, up to that of the target."""

    def __init__(
        self, frozen: FrozenPass, layout: Layout, writes: Sequence[Write], n_pos: int
    ) -> None:
        self._frozen, self._layout, self._writes = frozen, layout, writes
        self._n_pos = n_pos
        self.layer = max(0, min(write.time for write in writes) // PER_LAYER)
        """Where they are: before this layer, the first one above them to begin with."""
        empty = frozen.embed.new_zeros(len(writes), n_pos, frozen.anatomy.d_model)
        self.stream: Float[torch.Tensor, "write pos d_model"] = self._entered(TOKENS, empty)
        """What has become of each."""

    def up(self) -> None:
        """One layer further."""
        *_, self.stream = self._stages()
        self.layer += 1

    def read(self, entry: Entry) -> Float[torch.Tensor, "write target"]:
        """Effects on targets that read within this layer, each at its own token."""
        read = next(islice(self._stages(), entry.after % PER_LAYER, None))
        return torch.einsum("wtd,td->wt", read[:, entry.positions], entry.vectors)

    def _stages(self) -> Iterator[Float[torch.Tensor, "write pos width"]]:
        """What the sites of this layer read, in their order, and last the stream behind it."""
        first = PER_LAYER * self.layer
        attention = self._frozen.attention(self.layer)
        post = attention.post[: self._n_pos, None]
        mixed = self._mixed(attention)
        yield mixed / post
        through = passing(self._layout, self.layer, attention.post)[: self._n_pos, None]
        stream = self._entered(first, self.stream + from_heads(attention, mixed * through))
        yield stream
        stream = self._entered(first + 1, self._skipped(stream))
        yield stream
        resid = activity_at(self._layout, first + 2)
        if resid is not None:
            stream = stream * (~resid.keep[: self._n_pos, None]).to(stream)
        yield self._entered(first + 2, stream)

    def _mixed(self, attention: FrozenAttention) -> Float[torch.Tensor, "write pos heads"]:
        """``z`` with the scale of the post-norm, as ``mix`` has it."""
        n_pos = self._n_pos
        values = torch.einsum("wkm,gdm->wgkd", self.stream, attention.W_V)
        mix = attention.mix.unflatten(-1, (attention.group, -1))[:, :n_pos, :, :n_pos]
        return torch.einsum("gkhq,wgkd->wqghd", mix, values).flatten(2)

    def _skipped(
        self, stream: Float[torch.Tensor, "write pos d_model"]
    ) -> Float[torch.Tensor, "write pos d_model"]:
        activity = activity_at(self._layout, PER_LAYER * self.layer + 1)
        if activity is None or activity.site.skip is None:
            return stream
        assert activity.read_gain is not None, "only transcoders have a skip"
        read = stream * activity.read_gain[: self._n_pos]
        return stream + read @ activity.site.skip.detach().T.to(read)

    def _entered(
        self, time: int, stream: Float[torch.Tensor, "write pos d_model"]
    ) -> Float[torch.Tensor, "write pos d_model"]:
        """With what is written at a time."""
        if all(write.time != time for write in self._writes):
            return stream
        added = torch.zeros_like(stream)
        for row, write in enumerate(self._writes):
            if write.time == time:
                counts = write.positions < self._n_pos
                added[row, write.positions[counts]] = write.vectors[counts].to(added)
        return stream + added
