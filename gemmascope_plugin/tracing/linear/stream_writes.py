"""What nodes write into the stream, and what becomes of it on its way up.

*Downwards*, for the sweep, :class:`DecoderWrites` has everything that a site writes, token after token:

1. For each token the rows of its active features, of all layers that write here in a cross-layer
   dictionary. Features of one token and source are neighbours among the nodes, so that one product with
   the cotangent at that token puts their effects where they belong.
2. Two constants a token: what is missing to the real tensor, and ``b_dec``.

*Upwards* :class:`Tangent` carries writes, where the sweep is its transpose:

1. A node writes into the stream at one place or, in a cross-layer dictionary, at several: each write is
   carried on its own. What an attention SAE writes to ``z`` enters through ``W_O``.
2. Attention reads the values, mixes tokens by the frozen pattern and writes beside the stream; an
   attention SAE lets nothing of that through at the tokens that it works on.
3. An affine skip adds what it makes of the stream before the MLP.
4. A residual SAE ends everything at the tokens that it works on.

Cost: downwards ``rows * d_out`` numbers where they fit the budget; else rows are gathered at every use.
Upwards ``pos * d_model * (2 head * d_head)`` multiplications a write and layer; ``write * pos * d_model``
numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from jaxtyping import Float, Int64

from gemmascope_plugin.tracing.linear.frozen_pass import FrozenAttention, FrozenPass
from gemmascope_plugin.tracing.linear.pullback import Entry
from gemmascope_plugin.tracing.linear.trace_nodes import Layout
from gemmascope_plugin.tracing.linear.trace_site import PER_LAYER, Activity


class DecoderWrites:
    """What one site writes; ``budget`` is bytes that its rows may take."""

    def __init__(self, layout: Layout, site: int, budget: int) -> None:
        self._activity = layout.activities[site]
        sites = layout.source_sites(site)
        self._sources = [layout.activities[i] for i in sites]
        self._starts = [layout.starts[i] for i in sites]
        self._offsets = [source.acts.offsets.tolist() for source in self._sources]
        self._budget = budget
        device = self._activity.rest.device
        self.rest_nodes: Int64[torch.Tensor, " pos"] = layout.rest_nodes(site).to(device)
        """The node of what is missing at each token."""
        self.b_dec = layout.b_dec(site)
        """The node of the decoder bias."""

    @property
    def n_rows(self) -> int:
        """Rows of features."""
        return sum(source.n_features for source in self._sources)

    def prepare(self) -> None:
        """Makes what is made once, before several threads ask for it."""
        _ = self._gathered, self.constants

    def rows(self, pos: int) -> Iterator[tuple[slice, Float[torch.Tensor, "some d_out"]]]:
        """The nodes of one token's features and what they write, a source at a time."""
        for i, first in enumerate(self._starts):
            start, stop = self._offsets[i][pos : pos + 2]
            if start < stop:
                nodes = slice(first + start, first + stop)
                rows = self._gathered
                yield nodes, self._gather(i, pos) if rows is None else rows[i][start:stop]

    @cached_property
    def constants(self) -> Float[torch.Tensor, "pos 2 d_out"]:
        """What is missing at each token, and ``b_dec`` where the dictionary works."""
        activity = self._activity
        b_dec = activity.keep[:, None] * activity.b_dec
        return torch.stack([activity.rest, b_dec.to(activity.rest)], 1)

    @cached_property
    def _gathered(self) -> list[Float[torch.Tensor, "row d_out"]] | None:
        """Rows by source; None where they do not fit."""
        rest = self._activity.rest
        if self.n_rows * rest.shape[1] * rest.element_size() > self._budget:
            return None
        tokens = range(len(rest))
        return [
            torch.cat([self._gather(i, pos) for pos in tokens]) for i in range(len(self._sources))
        ]

    def _gather(self, i: int, pos: int) -> Float[torch.Tensor, "some d_out"]:
        source = self._sources[i]
        return source.writers(self._activity.site.hooked.decoder_from(source.site.place), pos)


TOKENS = -1
"""Time of the embedding."""


@dataclass(frozen=True, eq=False)
class Write:
    """What a node writes into the stream at one place."""

    time: int
    """Of the site, see ``PER_LAYER``; that of ``z`` for attention."""
    positions: Int64[torch.Tensor, " some"]
    vectors: Float[torch.Tensor, "some d_model"]


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
        through = attention.post * _through(layout, layer, attention.post)
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
        vectors = _from_heads(attention, vectors) * attention.post[at, None]
    return Write(activity.site.time, at, vectors)


def _from_heads(
    attention: FrozenAttention, z: Float[torch.Tensor, "*axes heads"]
) -> Float[torch.Tensor, "*axes d_model"]:
    """What heads write, without the scale of the post-norm."""
    return z @ attention.W_O.transpose(1, 2).flatten(0, 1)


def _through(layout: Layout, layer: int, like: torch.Tensor) -> Float[torch.Tensor, " pos"]:
    """0 where an SAE takes the place of what heads write, else 1."""
    activity = _activity_at(layout, PER_LAYER * layer)
    return torch.ones_like(like) if activity is None else (~activity.keep).to(like)


def _activity_at(layout: Layout, time: int) -> Activity | None:
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
        activity = _activity_at(self._layout, PER_LAYER * self.layer + 1)
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
