"""What sources become on their way up: the tangent of the frozen model, where the sweep is its transpose.

1. A node writes into the stream at one place or, in a cross-layer dictionary, at several: each write is
   carried on its own. What an attention SAE writes to ``z`` enters through ``W_O``.
2. Attention reads the values, mixes tokens by the frozen pattern and writes beside the stream; an
   attention SAE lets nothing of that through at the tokens that it works on.
3. An affine skip adds what it makes of the stream before the MLP.
4. A residual SAE ends everything at the tokens that it works on.

Cost: ``pos * d_model * (2 head * d_head)`` multiplications a write and layer; ``write * pos * d_model``
numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Int64

from gemmascope_plugin.tracing.linear.frozen_pass import FrozenAttention, FrozenPass
from gemmascope_plugin.tracing.linear.node_order import Layout
from gemmascope_plugin.tracing.linear.sweep import Entry
from gemmascope_plugin.tracing.linear.trace_site import PER_LAYER, Activity

TOKENS = -1
"""Time of the embedding."""


@dataclass(frozen=True, eq=False)
class Write:
    """What a node writes into the stream at one place."""

    time: int
    """Of the site, see ``PER_LAYER``; that of ``z`` for attention."""
    positions: Int64[torch.Tensor, " some"]
    vectors: Float[torch.Tensor, "some d_model"]


def writes_of(record: FrozenPass, layout: Layout, node: int) -> list[Write]:
    """All that a node writes; nothing for the part of targets that is their own.

    Args:
        record: The prompt.
        layout: Its nodes.
        node: One of them, but no target that is no feature.
    """
    if node < layout.n_pos:
        at = torch.tensor([node])
        return [Write(TOKENS, at, record.embed[at])]
    if node < layout.n_fixed:
        return _bias_writes(record, layout, node - layout.own - 1)
    site = bisect_right(layout.starts, node) - 1
    own, entry = layout.activities[site], node - layout.starts[site]
    if entry < own.n_features:
        return _feature_writes(record, layout, site, entry)
    at = own.keep.nonzero()[entry - own.n_features]
    return [_written(record, own, at, own.rest[at])]


def _feature_writes(record: FrozenPass, layout: Layout, site: int, entry: int) -> list[Write]:
    source = layout.activities[site]
    at, feature = source.acts.rows[[entry]], int(source.acts.indices[entry])
    found = []
    for index in layout.hearing(site):
        own = layout.activities[index]
        row = own.site.hooked.decoder_from(source.site.place)[feature].detach()
        vectors = row.to(source.acts.values) * source.acts.values[[entry], None]
        found.append(_written(record, own, at, vectors))
    return found


def _bias_writes(record: FrozenPass, layout: Layout, index: int) -> list[Write]:
    """Those of a bias, counted from the first layer's attention; see ``layout``."""
    if index < 0:
        return []
    if index < record.n_layers:
        return _attention_biases(record, layout, index)
    site, passed = divmod(index - record.n_layers, 2)
    own = layout.activities[site]
    at = (~own.keep if passed else own.keep).nonzero()[:, 0]
    vectors = own.rest[at] if passed else own.b_dec.expand(len(at), -1)
    return [_written(record, own, at, vectors)]


def _attention_biases(record: FrozenPass, layout: Layout, layer: int) -> list[Write]:
    attention = record.attention(layer)
    total = attention.post.new_zeros(record.n_pos, record.anatomy.d_model)
    if attention.bias_O is not None:
        total += attention.post[:, None] * attention.bias_O
    if attention.bias_V is not None:
        through = attention.post * _through(layout, layer, attention.post)
        total += through[:, None] * attention.bias_V
    return [Write(PER_LAYER * layer, torch.arange(record.n_pos), total)]


def _written(
    record: FrozenPass, own: Activity, at: torch.Tensor, vectors: Float[torch.Tensor, "some d_out"]
) -> Write:
    if own.site.kind == "attention":
        attention = record.attention(own.site.layer)
        vectors = _from_heads(attention, vectors) * attention.post[at, None]
    return Write(own.site.time, at, vectors)


def _from_heads(
    attention: FrozenAttention, z: Float[torch.Tensor, "*axes heads"]
) -> Float[torch.Tensor, "*axes d_model"]:
    """What heads write, without the scale of the post-norm."""
    return z @ attention.W_O.transpose(1, 2).flatten(0, 1)


def _through(layout: Layout, layer: int, like: torch.Tensor) -> Float[torch.Tensor, " pos"]:
    """0 where an SAE takes the place of what heads write, else 1."""
    own = _activity_at(layout, PER_LAYER * layer)
    return torch.ones_like(like) if own is None else (~own.keep).to(like)


def _activity_at(layout: Layout, time: int) -> Activity | None:
    return layout.activities[layout.at[time]] if time in layout.at else None


class Tangent:
    """Writes as they go up.

    Args:
        record: The prompt.
        layout: Its nodes.
        writes: What goes up.
        n_pos: Tokens that count: up to that of the target.
    """

    def __init__(
        self, record: FrozenPass, layout: Layout, writes: Sequence[Write], n_pos: int
    ) -> None:
        self._record, self._layout, self._writes = record, layout, writes
        self._n_pos = n_pos
        self.layer = max(0, min(write.time for write in writes) // PER_LAYER)
        """Where they are: before this layer, the first one above them to begin with."""
        empty = record.embed.new_zeros(len(writes), n_pos, record.anatomy.d_model)
        self.stream: Float[torch.Tensor, "write pos d_model"] = self._entered(TOKENS, empty)
        """What has become of each."""

    def up(self) -> None:
        """One layer further."""
        *_, self.stream = self._stages()
        self.layer += 1

    def read(self, entry: Entry) -> Float[torch.Tensor, "write target"]:
        """Effects on targets that read within this layer.

        Args:
            entry: Each at its own token.
        """
        read = next(islice(self._stages(), entry.after % PER_LAYER, None))
        return torch.einsum("wtd,td->wt", read[:, entry.positions], entry.vectors)

    def _stages(self) -> Iterator[Float[torch.Tensor, "write pos width"]]:
        """What the sites of this layer read, in their order, and last the stream behind it."""
        first = PER_LAYER * self.layer
        attention = self._record.attention(self.layer)
        post = attention.post[: self._n_pos, None]
        mixed = self._mixed(attention)
        yield mixed / post
        through = _through(self._layout, self.layer, attention.post)[: self._n_pos, None]
        stream = self._entered(first, self.stream + _from_heads(attention, mixed * through))
        yield stream
        stream = self._entered(first + 1, self._skipped(stream))
        yield stream
        resid = _activity_at(self._layout, first + 2)
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
        own = _activity_at(self._layout, PER_LAYER * self.layer + 1)
        if own is None or own.site.skip is None:
            return stream
        assert own.read_gain is not None, "only transcoders have a skip"
        read = stream * own.read_gain[: self._n_pos]
        return stream + read @ own.site.skip.detach().T.to(read)

    def _entered(
        self, time: int, stream: Float[torch.Tensor, "write pos d_model"]
    ) -> Float[torch.Tensor, "write pos d_model"]:
        """With what is written at a time."""
        if all(write.time != time for write in self._writes):
            return stream
        added = torch.zeros_like(stream)
        for row, write in enumerate(self._writes):
            if write.time == time:
                seen = write.positions < self._n_pos
                added[row, write.positions[seen]] = write.vectors[seen].to(added)
        return stream + added
