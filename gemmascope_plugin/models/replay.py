"""Runs prompts again from any layer and any position, on both model classes, by the model's weights.

1. One pass over all positions (``record``) keeps the streams before and within each layer, and the keys
   and values of every layer.
2. A further pass (``run``) has copies of the prompts as rows, copy after copy. It starts at a layer and
   at a position: what lies below and before is what it was, so nothing of it is computed again. In the
   last layer only the asked position is.
3. ``variant`` runs other tokens that agree with the prompts before a position.

The arithmetic is that of ``arithmetic.py``; where that is None ``module_replay.py`` runs the model's own
modules.

Cost: the matrix products of the rows' positions in the layers that run; memory for
``[layer, prompt, pos, 2 d_model + 2 d_kv]`` numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.models.arithmetic import Arithmetic
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.replay_points import (
    OUTSIDE,
    Earlier,
    Entry,
    Points,
    Rows,
    Stage,
    cut_out,
)
from gemmascope_plugin.models.threads import threads_for_tokens
from gemmascope_plugin.types import Hooks


@dataclass(eq=False)
class Replay:
    """Prompts that were run once, to be run again from a layer and a position."""

    arithmetic: Arithmetic
    tokens: Int[torch.Tensor, "prompt pos"]
    """What follows a shorter prompt is padding."""
    at: Int[torch.Tensor, " ask"]
    """The position that each is asked about, or several of them."""
    row: Int[torch.Tensor, " ask"] | None = None
    """Which prompt each of the positions belongs to; None for one of each."""
    pre: list[torch.Tensor] = field(default_factory=list)
    """Streams before each layer, and behind the last."""
    mid: list[torch.Tensor] = field(default_factory=list)
    """Streams between attention and MLP."""
    earlier: list[Earlier] = field(default_factory=list)

    runs_whole = False
    """Never from the bottom for nothing."""

    @property
    def model(self) -> HookedModel:
        """The model."""
        return self.arithmetic.anatomy.model

    @torch.no_grad()
    def record(self, hooks: Hooks = ()) -> Float[torch.Tensor, "ask d_model"]:
        """Runs the prompts; gives what the unembedding reads at the asked positions."""
        points = Points(hooks)
        with self._threads(1, slice(0, self.tokens.shape[1])):
            x = points("hook_embed", self.arithmetic.embedded(self.tokens))
            for block in self.arithmetic.blocks:
                self.pre.append(x)
                x = block.attention(x, Rows(0), None, points, {}, self.earlier)
                self.mid.append(x)
                x = block.mlp(x, Rows(0), points, {})
            self.pre.append(x)
            return self._end(x, Rows(0), points)

    def run(self, entry: Entry, window: slice) -> Float[torch.Tensor, "ask d_model"]:
        """What the unembedding reads at the asked positions of the rows, copy after copy.

        The window has the positions that run: from the first that may differ to the last that is asked.
        """
        with self._threads(entry.copies, window):
            return self._run(entry, window)

    def _run(self, entry: Entry, window: slice) -> Float[torch.Tensor, "ask d_model"]:
        layer, stage, points = entry.layer, entry.stage, Points(entry.hooks)
        n, start = self.arithmetic.anatomy.n_layers, window.start
        x, last = entry.stream, Rows(start, self._only(points, start, entry.copies))
        if x is None:
            x = self._from(layer, stage)[:, window].repeat(entry.copies, 1, 1)
        if layer == 0 and stage == "pre":
            x = points("hook_embed", x)
        if stage == "post":
            x, layer = points(f"blocks.{layer}.hook_resid_post", x), layer + 1
        for index in range(layer, n):
            block = self.arithmetic.blocks[index]
            rows = last if index == n - 1 else Rows(start)
            if index == layer and stage == "mid":
                x = points(f"blocks.{layer}.hook_resid_mid", x)
            else:
                x = block.attention(x, rows, self.earlier[index], points, entry.values)
            x = block.mlp(x, rows, points, entry.values)
        return self._end(x, last, points)

    def climb(self, window: slice, entries: Sequence[Entry]) -> Float[torch.Tensor, "ask d_model"]:
        """The same of several passes that differ in their first layer alone, in ascending order of it.

        Rows join where they start, so that every layer is run once, for all rows that need it. What comes
        out is in the order of ``entries``.
        """
        with self._threads(sum(entry.copies for entry in entries), window):
            return self._climb(window, entries)

    def _threads(self, copies: int, window: slice) -> AbstractContextManager[None]:
        n_tokens = copies * len(self.tokens) * (window.stop - window.start)
        return threads_for_tokens(self.model, n_tokens)

    def _climb(self, window: slice, entries: Sequence[Entry]) -> Float[torch.Tensor, "ask d_model"]:
        n, nowhere = self.arithmetic.anatomy.n_layers, Points()
        at_layer: dict[int, list[int]] = {}
        for i, entry in enumerate(entries):
            at_layer.setdefault(entry.layer, []).append(i)
        order: list[int] = []
        x: torch.Tensor | None = None
        for layer in range(entries[0].layer, n):
            block, last = self.arithmetic.blocks[layer], layer == n - 1
            halfway, whole = (
                [] if x is None else [(order, self._attended(layer, window, x, nowhere))],
                [],
            )
            for i in at_layer.get(layer, ()):
                entry = entries[i]
                points = Points(entry.hooks)
                y = self._from(layer, entry.stage)[:, window].repeat(entry.copies, 1, 1)
                rows = self._rows(window, len(y), last)
                if entry.stage == "post":
                    whole.append(([i], cut_out(points(f"blocks.{layer}.hook_resid_post", y), rows)))
                    continue
                if entry.stage == "pre":
                    y = self._attended(layer, window, y, points, entry.values)
                    if block.stays_in_attention(points):
                        halfway.append(([i], y))
                        continue
                y = block.mlp(y, rows, points, entry.values)
                whole.append(([i], cut_out(y, rows)))
            if halfway:
                mid = torch.cat([y for _, y in halfway])
                y = block.mlp(mid, self._rows(window, len(mid), last), nowhere, {})
                whole.insert(0, ([i for which, _ in halfway for i in which], y))
            order = [i for which, _ in whole for i in which]
            x = torch.cat([y for _, y in whole])
        assert x is not None, "there are entries"
        final = self._end(x, self._rows(window, len(x), True), nowhere)
        each = len(self.at)
        parts = final.split([entries[i].copies * each for i in order])
        return torch.cat([part for _, part in sorted(zip(order, parts, strict=True), key=_first)])

    def _attended(
        self,
        layer: int,
        window: slice,
        x: torch.Tensor,
        points: Points,
        values: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The stream in the middle of a layer; in the last one, at the asked position if that is all."""
        rows = self._rows(window, len(x), layer == self.arithmetic.anatomy.n_layers - 1)
        block = self.arithmetic.blocks[layer]
        y = block.attention(x, rows, self.earlier[layer], points, values or {})
        return cut_out(y, rows) if block.stays_in_attention(points) else y

    def _rows(self, window: slice, n_rows: int, last: bool) -> Rows:
        copies = n_rows // len(self.tokens)
        asked = self._only(Points(), window.start, copies) if last else None
        return Rows(window.start, asked)

    def window(self, start: int) -> slice:
        """The positions from one on to the last that is asked."""
        if self.row is not None:  # of several positions of a prompt all are read
            start = min(start, int(self.at.min()))
        return slice(start, int(self.at.max()) + 1)

    def _from(self, layer: int, stage: Stage) -> torch.Tensor:
        if stage == "mid":
            return self.mid[layer]
        return self.pre[layer + (stage == "post")]

    @torch.no_grad()
    def variant(
        self, tokens: Int[torch.Tensor, "prompt pos"], start: int, hooks: Hooks = ()
    ) -> Float[torch.Tensor, "ask d_model"]:
        """Other tokens, the same as the prompts before ``start``; hooks see the positions behind it."""
        stream = self.arithmetic.embedded(tokens[:, start:])
        return self.run(Entry(0, hooks=hooks, stream=stream), slice(start, tokens.shape[1]))

    def _only(self, points: Points, start: int, copies: int) -> torch.Tensor | None:
        """The position of each row that goes on in the last layer; None where several do."""
        several = self.row is not None or _at_end(points)
        # a shorter prompt that is asked before it all is as it was: what is read of it counts for nothing
        return None if several else (self.at - start).clamp(min=0).repeat(copies)

    def _end(self, x: torch.Tensor, rows: Rows, points: Points) -> torch.Tensor:
        if _at_end(points):
            return self._asked(self.arithmetic.final(x, points), rows)
        return self.arithmetic.final(self._asked(x, rows), points)

    def _asked(
        self, x: Float[torch.Tensor, "row pos d_model"], rows: Rows
    ) -> Float[torch.Tensor, "ask d_model"]:
        if rows.asked is not None:
            return cut_out(x, rows)[:, 0]
        n = len(self.tokens)
        row = torch.arange(n, device=x.device) if self.row is None else self.row
        first = torch.arange(0, len(x), n, device=x.device)[:, None]
        at = (self.at - rows.start).clamp(min=0).repeat(len(first))
        return x[(first + row).flatten(), at]


def _first(pair: tuple[int, torch.Tensor]) -> int:
    return pair[0]


def _at_end(points: Points) -> bool:
    """Whether something happens at the final norm, which is then run at every position."""
    return any(name in points for name in OUTSIDE[1:])
