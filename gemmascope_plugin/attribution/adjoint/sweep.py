"""The adjoint sweep: the direct effect of every node on many targets, from the last layer to the first.

With attention patterns and norm scales frozen the stream is linear in what is written into it, so the
effect of a source is ``a_s <write_s, J^T read_t>``: its write times the target's gradient there (Ameisen
et al., "Circuit Tracing", 2025, where autograd does it).  From the top, for a chunk of targets at once:

1. A residual SAE screens everything below it: its features, error and bias are read against the
   gradient, which then ends at the tokens it works on.
2. At an MLP its dictionary is read, and an affine skip passes the gradient on to the norm before it.
3. At attention the gradient is pulled back to ``z``. An attention SAE is read and ends it there.
4. The rest goes through the frozen pattern and the values to earlier tokens, beside what passes by.
5. At the end the token embeddings are read.

Features enter where they read: transcoders at 3, attention SAEs at 4, residual SAEs at 2 of their layer.
Only tokens and layers before a target are visited, and until the first attention only its own token.

Cost: a target costs ``layers * pos * d_model * (2 head * d_head + rows per token)`` multiplications at
most; memory is ``targets * pos * d_model`` numbers, whatever the depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64

from gemmascope_plugin.attribution.adjoint.attention_step import through_values, to_heads
from gemmascope_plugin.attribution.adjoint.cotangent import Cotangent
from gemmascope_plugin.attribution.adjoint.frozen_pass import FrozenPass
from gemmascope_plugin.attribution.adjoint.layout import Layout
from gemmascope_plugin.attribution.adjoint.site import PER_LAYER, Activity
from gemmascope_plugin.attribution.adjoint.written import Written
from gemmascope_plugin.catalog.sites import human_size
from gemmascope_plugin.errors import GemmaScopeError


@dataclass(frozen=True, eq=False)
class Entry:
    """Targets that enter the sweep at one place.

    Attributes:
        after: Time of the site below which they enter; ``PER_LAYER * layer + 3`` for the stream behind a
            layer.
    """

    after: int
    positions: Int64[torch.Tensor, " target"]
    vectors: Float[torch.Tensor, "*pos target width"]
    """At each target's token; or ``[pos, target, width]`` up to it, which the sweep then writes into."""
    own: Float[torch.Tensor, " target"]
    """What each target has of its own."""
    n_below: int
    """Nodes that can reach them: the first ones."""


class Sweep:
    """Rows of a trace's matrix.

    Args:
        record: The prompt.
        layout: Its nodes.
        budget: Bytes that the rows of all sites may take.
    """

    def __init__(self, record: FrozenPass, layout: Layout, budget: int) -> None:
        self.record, self.layout = record, layout
        share = budget // max(1, len(layout.activities))
        self._written = [Written(layout, i, share) for i in range(len(layout.activities))]

    def bytes_per_target(self, n_pos: int, n_below: int) -> int:
        """Memory that one more target in a chunk takes."""
        anatomy = self.record.anatomy
        heads = anatomy.n_heads * anatomy.d_head
        per_token = 2 * anatomy.d_model + 2 * heads + anatomy.n_kv * anatomy.d_head
        rows = max((w.n_rows for w in self._written), default=0)
        return (n_pos * per_token + 2 * n_below + rows) * self.record.embed.element_size()

    def fitting(self, n_pos: int, n_below: int, budget: int) -> int:
        """Targets that a sweep may take at once.

        Args:
            n_pos: Tokens up to the last of them.
            n_below: Nodes that can reach them.
            budget: Bytes, a quarter of what was asked for.

        Raises:
            GemmaScopeError: Not even one target fits.
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
        for layer in range(self.record.n_layers):
            self.record.attention(layer)
        for written in self._written:
            written.rows(0)

    @torch.no_grad()
    def __call__(self, entry: Entry) -> Float[torch.Tensor, "node target"]:
        """Effects of the nodes below on the targets, summed over all direct paths."""
        effects = entry.vectors.new_zeros(entry.n_below, len(entry.positions))
        effects[self.layout.own] = entry.own
        state = Cotangent(entry.positions, entry.vectors)
        for layer in range(self.record.n_layers - 1, -1, -1):
            if PER_LAYER * layer <= entry.after and state is not None:
                state = self._layer(layer, entry.after, state, effects)
        if state is not None:
            self._read_tokens(state, effects)
        return effects

    def _layer(
        self, layer: int, after: int, state: Cotangent, effects: torch.Tensor
    ) -> Cotangent | None:
        """One layer, from above to below; None where nothing is left."""
        z, mlp, resid = (PER_LAYER * layer + stage for stage in (0, 1, 2))
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
        if after == z:  # features of an attention SAE read z itself
            return self._through(layer, self._unscaled(layer, state), None)
        return self._attention(layer, state, effects)

    def _attention(self, layer: int, stream: Cotangent, effects: torch.Tensor) -> Cotangent:
        attention = self.record.attention(layer)
        heads = to_heads(attention, stream)
        index = self.layout.at.get(PER_LAYER * layer)
        bias = attention.bias_O
        if bias is not None:
            effects[self.layout.attention_bias(layer)] += stream.sums(bias, attention.post)
        through = torch.ones_like(attention.post)
        if index is not None:
            own = self.layout.activities[index]
            scaled = heads.with_values(heads.values * heads.scaled(attention.post))
            self._read(index, scaled, effects)
            through = (~own.keep).to(through)
            heads = heads.with_values(heads.values * heads.scaled(through))
        if attention.bias_V is not None:
            sums = stream.sums(attention.bias_V, attention.post * through)
            effects[self.layout.attention_bias(layer)] += sums
        return self._through(layer, heads, stream)

    def _through(self, layer: int, heads: Cotangent, stream: Cotangent | None) -> Cotangent:
        """To earlier tokens; see :func:`through_values`."""
        return through_values(self.record.attention(layer), heads, stream)

    def _unscaled(self, layer: int, heads: Cotangent) -> Cotangent:
        """Gradients at ``z`` itself, as the pattern with the post-norm's scale in it takes them."""
        scale = 1 / self.record.attention(layer).post
        return heads.with_values(heads.values * heads.scaled(scale))

    def _skipped(self, own: Activity, state: Cotangent) -> Cotangent:
        skip = own.site.skip
        if skip is None:
            return state
        assert own.read_gain is not None, "only transcoders have a skip"
        gain = own.read_gain
        through = state.values @ skip.detach().to(state.values)
        factor = gain[: state.n_pos, None] if state.dense else gain[state.positions]
        return state.with_values(state.values + through * factor)

    def _read(self, index: int, state: Cotangent, effects: torch.Tensor) -> None:
        """Adds the effects of everything that a site writes."""
        written = self._written[index]
        found = effects.new_zeros(written.offsets[state.n_pos], effects.shape[1])
        for pos, targets, gradients in state.at():
            own = slice(written.offsets[pos], written.offsets[pos + 1])
            torch.mm(written.rows(pos), gradients.T, out=found[own, targets])
        effects.index_add_(0, written.nodes[: len(found)], found)

    def _read_tokens(self, state: Cotangent, effects: torch.Tensor) -> None:
        embed = self.record.embed
        if state.dense:
            products = torch.bmm(state.values, embed[: state.n_pos, :, None])[..., 0]
            effects[: state.n_pos] += products
        else:
            columns = torch.arange(len(state.positions), device=embed.device)
            effects[state.positions, columns] += (state.values * embed[state.positions]).sum(-1)


def _ended(state: Cotangent, own: Activity) -> Cotangent | None:
    """The gradient where an SAE of the stream leaves it: at special tokens; None for nowhere."""
    left = (~own.keep).nonzero()[:, 0]
    if not len(left):
        return None
    passing = (~own.keep).to(state.values)
    if not state.dense:
        return state.with_values(state.values * state.scaled(passing))
    last = int(left[-1]) + 1
    values = state.values[:last]
    return state.with_values(values * passing[: len(values), None, None])
