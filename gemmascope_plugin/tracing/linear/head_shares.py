"""How much of a source's effect on a target each attention head carried, layer by layer.

With ``F`` what the source has become before layer ``l`` and ``G`` the target's gradient behind its
attention, both with everything frozen, the effect is

    A = <F, G> + sum_h <OV_h F, G>

at every layer between them: what passes the layer by, and what each of its heads carries, its loading
(Kamath et al., "Tracing Attention Computation Through Feature Interactions", 2025).

1. A sweep from the target keeps its gradient at ``z`` and behind the attention of every layer.
2. The source's writes go up, see ``transport.py``. At each layer their values meet the gradient that the
   frozen pattern takes to the tokens that are read; the sum is over these tokens, so it is known which
   token a head read.
3. A node of a cross-layer dictionary writes at several places. Each write is carried on its own; those
   that enter above a layer pass it by. What an attention SAE writes to ``z`` enters through ``W_O``.

Cost: a sweep of one target, with ``layer * pos * (d_model + head * d_head)`` numbers kept; then
``pos^2 * head * d_head`` multiplications a write and layer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.tracing.linear.frozen_pass import FrozenAttention, FrozenPass
from gemmascope_plugin.tracing.linear.sweep import Sweep
from gemmascope_plugin.tracing.linear.trace_nodes import Layout
from gemmascope_plugin.tracing.linear.trace_site import PER_LAYER, Activity
from gemmascope_plugin.tracing.linear.transport import (
    TOKENS,
    Cotangent,
    Entry,
    Tangent,
    Write,
    from_heads,
    passing,
)


@dataclass(frozen=True, eq=False)
class Loadings:
    """What the heads carried from some sources to one target."""

    loads: Float[torch.Tensor, "source layer head pos"]
    """By the token that the head read."""
    bypass: Float[torch.Tensor, "source layer"]
    """What passed the layer by."""
    effects: Float[torch.Tensor, " source"]
    """The edges, as the sweep finds them."""
    between: Bool[torch.Tensor, "source layer"]
    """Whether a layer's attention lies above the source's first write and below the target."""

    @property
    def gaps(self) -> Float[torch.Tensor, " source"]:
        """Largest difference between an edge and its parts at a layer."""
        sums = self.bypass + self.loads.sum((2, 3))
        gaps = (sums - self.effects[:, None]).abs().masked_fill(~self.between, 0)
        return gaps.amax(1)


class _Trail(Sweep):
    """A sweep of one target that keeps what it meets at attention."""

    def __init__(self, frozen: FrozenPass, layout: Layout, budget: int) -> None:
        super().__init__(frozen, layout, budget)
        self.heads: dict[int, torch.Tensor] = {}
        """``[pos, head * d_head]``, without the scale of the post-norm."""
        self.streams: dict[int, torch.Tensor] = {}
        """``[pos, d_model]``; none for a target that reads ``z``."""

    def _through(
        self,
        layer: int,
        heads: Float[torch.Tensor, "head *pos target d_head"],
        state: Cotangent,
        stream: Cotangent | None,
    ) -> Cotangent:
        self.heads[layer] = _spread(state.with_values(heads.movedim(0, -2).flatten(-2)))
        if stream is not None:
            self.streams[layer] = _spread(stream)
        return super()._through(layer, heads, state, stream)

    @cached_property
    def _tokens(self) -> Float[torch.Tensor, "query key d_model"] | None:
        """None: the first attention is met like every other."""
        return None


def _spread(state: Cotangent) -> Float[torch.Tensor, "pos width"]:
    """The gradient of the only target at all tokens, as a copy: dense ones are written into."""
    if state.dense:
        return state.values[:, 0].clone()
    values = state.values.new_zeros(state.n_pos, state.values.shape[1])
    values[state.positions] = state.values
    return values


@torch.no_grad()
def loadings(sweep: Sweep, entry: Entry, sources: Sequence[int]) -> Loadings:
    """Loads of all heads on the edges from nodes below one target into it."""
    assert len(entry.positions) == 1, "targets are taken one by one"
    frozen = sweep.frozen
    trail = _Trail(frozen, sweep.layout, sweep.budget)
    effects = trail(entry)[0, torch.tensor(sources)]
    shape = (len(sources), frozen.n_layers)
    n_pos = int(entry.positions[0]) + 1
    loads = effects.new_zeros(*shape, frozen.anatomy.n_heads, n_pos)
    bypass = effects.new_zeros(shape)
    between = torch.zeros(shape, dtype=torch.bool)
    layers = torch.arange(frozen.n_layers) * PER_LAYER
    for owners, writes in _chunks(sweep, sources, entry):
        carried, passed = _carried(trail, entry, writes)
        loads.index_add_(0, owners, carried)
        bypass.index_add_(0, owners, passed)
        times = torch.tensor([write.time for write in writes])
        reached = (times[:, None] < layers) & (layers <= entry.after)
        for owner, row in zip(owners.tolist(), reached, strict=True):
            between[owner] |= row
    return Loadings(loads, bypass, effects, between)


def _chunks(
    sweep: Sweep, sources: Sequence[int], entry: Entry
) -> Iterator[tuple[torch.Tensor, list[Write]]]:
    """Writes below the target of all sources, and the place of their source, as many as fit."""
    frozen, layout = sweep.frozen, sweep.layout
    writes = [(i, w) for i, node in enumerate(sources) for w in writes_of(frozen, layout, node)]
    writes = [(i, write) for i, write in writes if write.time < entry.after]
    n_pos = int(entry.positions[0]) + 1
    size = sweep.fitting(n_pos, entry.n_below, sweep.budget)
    for start in range(0, len(writes), size):
        part = writes[start : start + size]
        yield torch.tensor([owner for owner, _ in part]), [write for _, write in part]


def _carried(
    trail: _Trail, entry: Entry, writes: Sequence[Write]
) -> tuple[Float[torch.Tensor, "write layer head pos"], Float[torch.Tensor, "write layer"]]:
    """Loads of heads, and what passes by, of each write."""
    frozen = trail.frozen
    n_pos = int(entry.positions[0]) + 1
    tangent = Tangent(frozen, trail.layout, writes, n_pos)
    shape = (len(writes), frozen.n_layers)
    loads = entry.vectors.new_zeros(*shape, frozen.anatomy.n_heads, n_pos)
    bypass = entry.vectors.new_zeros(shape)
    last = entry.after // PER_LAYER
    while True:
        layer = tangent.layer
        if layer in trail.heads:
            heads = trail.heads[layer]
            stream = tangent.stream[:, : len(heads)]
            loads[:, layer, :, : len(heads)] = _loads(frozen.attention(layer), stream, heads)
        if layer in trail.streams:
            passing = trail.streams[layer]
            stream = tangent.stream[:, : len(passing)]
            bypass[:, layer] = torch.einsum("wpm,pm->w", stream, passing)
        if layer >= last:
            break
        tangent.up()
    whole = tangent.read(entry)
    times = torch.tensor([write.time for write in writes])
    later = times[:, None] >= PER_LAYER * torch.arange(frozen.n_layers)
    return loads, torch.where(later, whole, bypass)


def _loads(
    attention: FrozenAttention,
    stream: Float[torch.Tensor, "write pos d_model"],
    heads: Float[torch.Tensor, "pos heads"],
) -> Float[torch.Tensor, "write head pos"]:
    """``<OV_h F, G>`` by the token that is read."""
    group, kv, n_pos = attention.group, len(attention.W_V), len(heads)
    mix = attention.mix.unflatten(-1, (group, -1))[:, :n_pos, :, :n_pos]
    pulled = torch.einsum("gkhq,qghd->gkhd", mix, heads.unflatten(-1, (kv, group, -1)))
    values = torch.einsum("wkm,gdm->wgkd", stream, attention.W_V)
    return torch.einsum("gkhd,wgkd->wghk", pulled, values).flatten(1, 2)


def writes_of(frozen: FrozenPass, layout: Layout, node: int) -> list[Write]:
    """All that a node writes, which is a node of the layout; nothing for the constant of targets."""
    if node < layout.n_pos:
        at = torch.tensor([node])
        return [Write(TOKENS, at, frozen.embed[at])]
    if node < layout.n_fixed:
        return _bias_writes(frozen, layout, node - layout.constant - 1)
    site = bisect_right(layout.starts, node) - 1
    activity, entry = layout.activities[site], node - layout.starts[site]
    if entry < activity.n_features:
        return _feature_writes(frozen, layout, site, entry)
    at = activity.keep.nonzero()[entry - activity.n_features]
    return [_write(frozen, activity, at, activity.rest[at])]


def _feature_writes(frozen: FrozenPass, layout: Layout, site: int, entry: int) -> list[Write]:
    source = layout.activities[site]
    at, feature = source.acts.rows[[entry]], int(source.acts.indices[entry])
    writes = []
    for index in layout.output_sites(site):
        activity = layout.activities[index]
        row = activity.site.hooked.decoder_from(source.site.place)[feature].detach()
        vectors = row.to(source.acts.values) * source.acts.values[[entry], None]
        writes.append(_write(frozen, activity, at, vectors))
    return writes


def _bias_writes(frozen: FrozenPass, layout: Layout, index: int) -> list[Write]:
    """Those of a bias, counted from the first layer's attention; see ``layout``."""
    if index < 0:
        return []
    if index < frozen.n_layers:
        return _attention_biases(frozen, layout, index)
    site, passed = divmod(index - frozen.n_layers, 2)
    activity = layout.activities[site]
    at = (~activity.keep if passed else activity.keep).nonzero()[:, 0]
    vectors = activity.rest[at] if passed else activity.b_dec.expand(len(at), -1)
    return [_write(frozen, activity, at, vectors)]


def _attention_biases(frozen: FrozenPass, layout: Layout, layer: int) -> list[Write]:
    attention = frozen.attention(layer)
    total = attention.post.new_zeros(frozen.n_pos, frozen.anatomy.d_model)
    if attention.bias_O is not None:
        total += attention.post[:, None] * attention.bias_O
    if attention.bias_V is not None:
        through = attention.post * passing(layout, layer, attention.post)
        total += through[:, None] * attention.bias_V
    return [Write(PER_LAYER * layer, torch.arange(frozen.n_pos), total)]


def _write(
    frozen: FrozenPass,
    activity: Activity,
    at: torch.Tensor,
    vectors: Float[torch.Tensor, "some d_out"],
) -> Write:
    if activity.site.kind == "attention":
        attention = frozen.attention(activity.site.layer)
        vectors = from_heads(attention, vectors) * attention.post[at, None]
    return Write(activity.site.time, at, vectors)
