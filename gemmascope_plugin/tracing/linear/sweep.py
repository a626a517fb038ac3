"""The adjoint sweep: the direct effect of every node on many targets, from the last layer to the first.

With attention patterns and norm scales frozen the stream is linear in what is written into it, so the
effect of a source is ``a_s <write_s, J^T read_t>``: its write times the target's gradient there (Ameisen
et al., "Circuit Tracing", 2025, where autograd does it).  From the top, for a chunk of targets at once:

1. A residual SAE screens everything below it: its features, error and bias are read against the
   gradient, which then ends at the tokens it works on.
2. At an MLP its dictionary is read, and an affine skip passes the gradient on to the norm before it.
3. At attention the gradient is pulled back to ``z``. An attention SAE is read and ends it there.
4. The rest goes through the frozen pattern and the values to earlier tokens, beside what passes by.
5. Token embeddings are read behind the first attention: what each becomes there is known once and for all
   (``tokens_through``). With long prompts, attention biases or an SAE there they are read below it.

Features enter where they read: transcoders at 3, attention SAEs at 4, residual SAEs at 2 of their layer.
Only tokens and layers before a target are visited, and until the first attention only its own token.
Chunks of targets fit the memory budget, and end where one more token would cost those before it more than
another chunk does.

Cost: a target costs ``layers * pos * d_model * (head * d_head + kv * d_head + rows per token)``
multiplications at most, and half of ``layers * pos^2 * head * d_head``; memory is
``targets * pos * d_model`` numbers, whatever the depth. These products are what a trace is bound by, see
``rows.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int64

from gemmascope_plugin.arguments import human_size
from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
from gemmascope_plugin.tracing.linear.targets import Seed
from gemmascope_plugin.tracing.linear.trace_nodes import DecoderWrites, Layout
from gemmascope_plugin.tracing.linear.trace_site import PER_LAYER, Activity
from gemmascope_plugin.tracing.linear.transport import (
    Cotangent,
    Entry,
    through_values,
    to_heads,
)

MAX_TARGETS = 256
"""Targets of a chunk at most: more are not faster, and their tokens lie further apart."""
MIN_CHUNK = 32
"""Targets of a chunk that may end before it is full."""
SMALL = 1 << 20
"""Operations in the time that a small product takes to be called, beside what it computes."""
MIN_TARGETS = 32
"""Targets that a thread needs to be worth its while."""


class Sweep:
    """Rows of a trace's matrix; ``budget`` is bytes that the rows of all sites may take, and as many for
    a chunk of targets.
    """

    def __init__(self, frozen: FrozenPass, layout: Layout, budget: int) -> None:
        self.frozen, self.layout, self.budget = frozen, layout, budget
        share = budget // max(1, len(layout.activities))
        self._writes = [DecoderWrites(layout, i, share) for i in range(len(layout.activities))]

    def feature_entry(self, site: int, nodes: Int64[np.ndarray, " target"]) -> Entry:
        """Features of one site as targets; ascending, so that tokens are."""
        activity, start = self.layout.activities[site], self.layout.starts[site]
        features = torch.from_numpy(nodes).to(activity.acts.indices.device) - start
        vectors, constant = activity.readers(features)
        return Entry(activity.site.time, activity.acts.rows[features], vectors, constant, start)

    def seed_entry(self, after: int, seeds: Sequence[Seed]) -> Entry:
        """Targets that are not features and enter at one time, by token, ascending."""
        embed = self.frozen.embed
        return Entry(
            after,
            torch.tensor([seed.position for seed in seeds], device=embed.device),
            torch.stack([seed.vector for seed in seeds]).to(embed),
            torch.tensor([seed.constant for seed in seeds]).to(embed),
            self.layout.n_below(after),
        )

    @cached_property
    def work(self) -> int:
        """Operations that a target costs at a token of a layer, about."""
        anatomy, layout = self.frozen.anatomy, self.layout
        heads = (anatomy.n_heads + anatomy.n_kv) * anatomy.d_head
        rows = layout.n_features // (layout.n_pos * len(layout.activities))
        return 2 * anatomy.d_model * (heads + rows)

    def bytes_per_target(self, n_pos: int, n_below: int) -> int:
        """Memory that one more target in a chunk takes."""
        anatomy = self.frozen.anatomy
        heads = anatomy.n_heads * anatomy.d_head
        per_token = 2 * anatomy.d_model + 2 * heads + anatomy.n_kv * anatomy.d_head
        rows = max((writes.n_rows for writes in self._writes), default=0)
        return (n_pos * per_token + 2 * n_below + rows) * self.frozen.embed.element_size()

    def fitting(self, n_pos: int, n_below: int, budget: int) -> int:
        """Targets up to a token, with so many nodes below them, that fit a budget: a quarter of the
        user's.
        """
        each = self.bytes_per_target(n_pos, n_below)
        if budget < each:
            raise GemmaScopeError(
                f"One target of {n_pos} tokens takes {human_size(each)}, the memory budget is "
                f"{human_size(4 * budget)}",
                fix=f"memory_budget={8 * each:_} or more",
            )
        return budget // each

    def prepare(self) -> None:
        """Makes what is made once, before several threads ask for it."""
        for layer in range(self.frozen.n_layers):
            _ = self.frozen.attention(layer).first_keys
        for writes in self._writes:
            writes.prepare()
        _ = self._tokens

    @torch.no_grad()
    def __call__(self, entry: Entry) -> Float[torch.Tensor, "target node"]:
        """Effects of the nodes below on the targets, summed over all direct paths."""
        effects = entry.vectors.new_zeros(len(entry.positions), entry.n_below)
        effects[:, self.layout.constant] = entry.constant
        state = Cotangent(entry.positions, entry.vectors)
        # what enters below the first attention reads tokens as they are
        tokens = self._tokens if entry.after >= 0 else None
        lowest = 0 if tokens is None else 1
        for layer in range(self.frozen.n_layers - 1, lowest - 1, -1):
            if PER_LAYER * layer <= entry.after and state is not None:
                state = self._layer(layer, entry.after, state, effects)
        if state is None:
            return effects
        if tokens is None:
            self._read_tokens(state, effects)
            return effects
        state = self._above_attention(0, entry.after, state, effects)
        if state is not None:
            for pos, targets, gradients in state.at():
                effects[targets, : pos + 1].addmm_(gradients, tokens[pos, : pos + 1].T)
        return effects

    @cached_property
    def _tokens(self) -> Float[torch.Tensor, "query key d_model"] | None:
        """What tokens have become behind the first attention; None where they are read below it."""
        frozen, n_pos = self.frozen, self.frozen.n_pos
        attention = frozen.attention(0)
        size = n_pos * frozen.embed.numel() * frozen.embed.element_size()
        plain = attention.bias_O is None and attention.bias_V is None and 0 not in self.layout.at
        heads = len(attention.W_O) * attention.W_O.shape[-1]
        if not plain or n_pos > heads or size > self.budget // 4:
            return None
        return attention.tokens_through(frozen.embed)

    def _layer(
        self, layer: int, after: int, state: Cotangent, effects: torch.Tensor
    ) -> Cotangent | None:
        """One layer, from above to below; None where nothing is left."""
        above = self._above_attention(layer, after, state, effects)
        if above is None:
            return None
        if after == PER_LAYER * layer:  # features of an attention SAE read z itself
            return self._through(layer, self._unscaled(layer, above), above, None)
        return self._attention(layer, above, effects)

    def _above_attention(
        self, layer: int, after: int, state: Cotangent, effects: torch.Tensor
    ) -> Cotangent | None:
        """The sites of a layer's stream and MLP; None where nothing is left below them."""
        mlp, resid = (PER_LAYER * layer + stage for stage in (1, 2))
        if resid < after and resid in self.layout.at:
            index = self.layout.at[resid]
            self._read(index, state, effects)
            cut = _ended(state, self.layout.activities[index])
            if cut is None:
                return None
            state = cut
        if mlp < after:
            index = self.layout.at[mlp]
            self._read(index, state, effects)
            state = self._skipped(self.layout.activities[index], state)
        return state

    def _attention(self, layer: int, stream: Cotangent, effects: torch.Tensor) -> Cotangent:
        attention = self.frozen.attention(layer)
        heads = to_heads(attention, stream)
        index = self.layout.at.get(PER_LAYER * layer)
        bias = attention.bias_O
        if bias is not None:
            effects[:, self.layout.attention_bias(layer)] += stream.sums(bias, attention.post)
        through = torch.ones_like(attention.post)
        if index is not None:
            activity = self.layout.activities[index]
            z = heads.movedim(0, -2).flatten(-2) * stream.scaled(attention.post)
            self._read(index, stream.with_values(z), effects)
            through = (~activity.keep).to(through)
            heads = heads * stream.scaled(through)
        if attention.bias_V is not None:
            sums = stream.sums(attention.bias_V, attention.post * through)
            effects[:, self.layout.attention_bias(layer)] += sums
        return self._through(layer, heads, stream, stream)

    def _through(
        self,
        layer: int,
        heads: Float[torch.Tensor, "head *pos target d_head"],
        state: Cotangent,
        stream: Cotangent | None,
    ) -> Cotangent:
        """To earlier tokens; see :func:`through_values`."""
        return through_values(self.frozen.attention(layer), heads, state, stream)

    def _unscaled(
        self, layer: int, state: Cotangent
    ) -> Float[torch.Tensor, "head *pos target d_head"]:
        """Gradients at ``z`` itself, as the pattern with the post-norm's scale in it takes them."""
        attention = self.frozen.attention(layer)
        heads = state.values * state.scaled(1 / attention.post)
        return heads.unflatten(-1, (len(attention.W_O), -1)).movedim(-2, 0).contiguous()

    def _skipped(self, activity: Activity, state: Cotangent) -> Cotangent:
        skip, gain = activity.site.skip, activity.read_gain
        if skip is None:
            return state
        assert gain is not None, "only transcoders have a skip"
        through = state.values @ skip.detach().to(state.values)
        factor = gain[: state.n_pos, None] if state.dense else gain[state.positions]
        return state.with_values(state.values + through * factor)

    def _read(self, index: int, state: Cotangent, effects: torch.Tensor) -> None:
        """Adds the effects of everything that a site writes."""
        writes = self._writes[index]
        for pos, targets, gradients in state.at():
            for nodes, rows in writes.rows(pos):
                effects[targets, nodes].addmm_(gradients, rows.T)
        constants, nodes = writes.constants, writes.rest_nodes
        if state.dense:
            products = torch.bmm(constants[: state.n_pos], state.values.transpose(1, 2))
            effects.index_add_(1, nodes[: state.n_pos], products[:, 0].T)
            effects[:, writes.b_dec] += products[:, 1].sum(0)
        else:
            read = torch.einsum("tcd,td->ct", constants[state.positions], state.values)
            each = torch.arange(len(state.positions), device=nodes.device)
            effects[each, nodes[state.positions]] += read[0]
            effects[:, writes.b_dec] += read[1]

    def _read_tokens(self, state: Cotangent, effects: torch.Tensor) -> None:
        embed = self.frozen.embed
        if state.dense:
            products = torch.bmm(state.values, embed[: state.n_pos, :, None])[..., 0]
            effects[:, : state.n_pos] += products.T
        else:
            targets = torch.arange(len(state.positions), device=embed.device)
            effects[targets, state.positions] += (state.values * embed[state.positions]).sum(-1)


def _ended(state: Cotangent, activity: Activity) -> Cotangent | None:
    """The gradient where an SAE of the stream leaves it: at special tokens; None for nowhere."""
    special = (~activity.keep).nonzero()[:, 0]
    if not len(special):
        return None
    passing = (~activity.keep).to(state.values)
    if not state.dense:
        return state.with_values(state.values * state.scaled(passing))
    last = int(special[-1]) + 1
    values = state.values[:last]
    return state.with_values(values * passing[: len(values), None, None])


def n_workers(sweep: Sweep, entry: Entry) -> int:
    """Threads that take chunks of an entry side by side, each with enough targets."""
    if entry.positions.device.type != "cpu":
        return 1
    n_pos = int(entry.positions.max()) + 1
    fitting = sweep.budget // (sweep.bytes_per_target(n_pos, entry.n_below) * MIN_TARGETS)
    useful = len(entry.positions) // MIN_TARGETS
    return max(1, min(torch.get_num_threads(), fitting, useful))


def chunks(sweep: Sweep, entry: Entry, n_workers: int) -> Iterator[Entry]:
    """An entry in parts that fit the budget, one for each of so many threads."""
    n_pos = int(entry.positions.max()) + 1
    fitting = sweep.fitting(n_pos, entry.n_below, sweep.budget // n_workers)
    ends = _ends(sweep, entry, min(MAX_TARGETS, fitting))
    for first, last in pairwise([0, *ends]):
        index = slice(first, last)
        yield Entry(
            entry.after,
            entry.positions[index],
            entry.vectors[index],
            entry.constant[index],
            entry.n_below,
        )


def _ends(sweep: Sweep, entry: Entry, most: int) -> list[int]:
    """Where chunks end: a further token costs all targets before it one more token at every layer,
    another chunk costs as many small products as it has tokens.
    """
    tokens, counts = entry.positions.unique_consecutive(return_counts=True)
    small = SMALL if entry.positions.device.type == "cpu" else float("inf")
    ends, start, stop = [], 0, 0
    for pos, count in zip(tokens.tolist(), counts.tolist(), strict=True):
        size = stop - start
        wasteful = size >= MIN_CHUNK and size * sweep.work > (pos + 1) * small
        if size and (wasteful or size + count > most):
            ends.append(stop)
            start = stop
        while start + most < stop + count:
            start += most
            ends.append(start)
        stop += count
    return [*ends, stop]
