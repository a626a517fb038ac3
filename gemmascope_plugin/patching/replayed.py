"""A task's base run in parts that are run again late: from the first layer and position that differ.

1. Prompts whose first difference and whose length are the same (or nearly) make a part, so that hardly a
   position is run for nothing. Each part is recorded once (``models/replay.py``).
2. The other run is computed from the first difference on; before it, it *is* the base run.
3. A metric is read from the end of the stream, some rows at a time: from the logits of the tokens that it
   names alone, where no others count.

Cost: one pass over the base prompts and one over the ends of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.readout import OfResiduals
from gemmascope_plugin.models.replay import Arithmetic, Replay, Stage, keeping, replayable
from gemmascope_plugin.patching.task import BoundTask

_ROWS = 128
"""Rows whose logits are all formed at once."""
_WASTE, _FEW = 0.1, 48
"""Share of positions, or positions, that may be run for nothing to run more prompts together."""


@dataclass(eq=False)
class Part:
    """Some prompts of a task."""

    index: Int[torch.Tensor, " part"]
    """Which."""
    start: int
    """The first position at which any of them differs between both runs."""
    bound: BoundTask
    """The task on them, cut to their length."""
    replay: Replay
    base: Float[torch.Tensor, " part"]
    """The metric of the base run, from the same arithmetic, on the CPU."""
    other: Float[torch.Tensor, " part"]
    """That of the other run."""
    here: Mapping[str, torch.Tensor]
    """Activations of the base run ``[part, pos, ...]``."""
    there: Mapping[str, torch.Tensor]
    """Those of the other run."""

    def metric(
        self,
        layer: int,
        window: slice,
        *,
        stage: Stage = "pre",
        copies: int = 1,
        hooks: Sequence[tuple[str, Callable[..., Any]]] = (),
        known: Mapping[str, torch.Tensor] | None = None,
        stream: torch.Tensor | None = None,
    ) -> Float[torch.Tensor, "copy part"]:
        """The metric of copies of the prompts that are run again; arguments as for ``Replay.run``."""
        final = self.replay.run(
            layer,
            window,
            stage=stage,
            copies=copies,
            hooks=hooks,
            known=known,
            stream=stream,
        )
        return metric_of(self.bound, self.replay.arithmetic.anatomy, final).unflatten(
            0, (copies, -1)
        )


def replayed(
    model: HookedModel,
    bound: BoundTask,
    base: Int[torch.Tensor, "prompt pos"],
    other: Int[torch.Tensor, "prompt pos"],
    *,
    rows: int,
    here: Sequence[str] = (),
    there: Sequence[str] = (),
) -> Iterator[Part] | None:
    """The parts of a task, made one after the other; None where the model has to run by itself.

    Args:
        model: The model.
        bound: The task.
        base: Tokens of the run that will be run again.
        other: Those of the other run.
        rows: Prompts of a part at most.
        here: Points whose activations in the base run are kept.
        there: Points whose activations in the other run are kept, some of ``here``.
    """
    if not replayable([*here, *there]):
        return None
    arithmetic = Arithmetic.of(model, base)
    if arithmetic is None:
        return None
    starts = first_differences(base, other, bound)
    groups = together(starts, bound.lengths.tolist(), rows)

    def parts() -> Iterator[Part]:
        for group in groups:
            index = torch.tensor(group, device=base.device)
            width = int(bound.lengths[index].max())
            some = bound.part(index).cut(width)
            start = min(starts[i] for i in group)
            tokens = (base[index, :width], other[index, :width])
            yield _part(arithmetic, index, start, some, tokens, here, there)

    return parts()


def _part(
    arithmetic: Arithmetic,
    index: torch.Tensor,
    start: int,
    bound: BoundTask,
    tokens: tuple[torch.Tensor, torch.Tensor],
    here: Sequence[str],
    there: Sequence[str],
) -> Part:
    assert bound.metric.at is not None
    one_each = len(bound.metric.at) == len(bound)
    replay = Replay(
        arithmetic,
        tokens[0],
        bound.metric.at,
        None if one_each else bound.metric.places(len(bound))[0],
    )
    kept: dict[str, torch.Tensor] = {}
    changed: dict[str, torch.Tensor] = {}
    end = replay.record(keeping(kept, dict.fromkeys([*here, *there])))
    away = replay.variant(tokens[1], start, keeping(changed, there))
    for name, x in changed.items():
        axis = position_axis(name)
        changed[name] = torch.cat([kept[name].narrow(axis, 0, start), x], axis)
    before, after = (metric_of(bound, arithmetic.anatomy, final).cpu() for final in (end, away))
    return Part(index, start, bound, replay, before, after, kept, changed)


def position_axis(name: str) -> int:
    """Which axis of a point's tensor has the positions that a pass runs: queries, of a pattern."""
    return 2 if name.endswith("hook_pattern") else 1


@torch.no_grad()
def first_differences(
    base: Int[torch.Tensor, "prompt pos"], other: Int[torch.Tensor, "prompt pos"], bound: BoundTask
) -> list[int]:
    """The first position of each prompt at which both runs differ, or the asked one before it."""
    rows, places = bound.metric.places(len(bound))
    at = torch.full_like(bound.lengths, base.shape[1]).scatter_reduce(0, rows, places, "amin")
    differs = (base != other) & bound.mask
    first = torch.where(differs.any(1), differs.int().argmax(1), at)
    return torch.minimum(first, at).tolist()


def together(starts: Sequence[int], lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Prompts that are run together.

    Args:
        starts: The first position of each that is run.
        lengths: Where each ends.
        rows: Prompts together at most.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(starts)), key=lambda i: (starts[i], lengths[i], i)):
        if groups and len(groups[-1]) < rows:
            group = [*groups[-1], i]
            needed = sum(lengths[j] - starts[j] for j in group)
            run = len(group) * (max(lengths[j] for j in group) - min(starts[j] for j in group))
            if run - needed <= max(_FEW, _WASTE * needed):
                groups[-1] = group
                continue
        groups.append([i])
    return [sorted(group) for group in groups]


def metric_of(
    bound: BoundTask, anatomy: Anatomy, final: Float[torch.Tensor, "ask d_model"]
) -> Float[torch.Tensor, " row"]:
    """The metric of rows, copies of the prompts, from what the unembedding reads.

    Args:
        bound: The task on these prompts.
        anatomy: The model's.
        final: Output of the final norm at the asked positions, copy after copy.
    """
    metric = bound.metric
    out = anatomy.unembedding(before_cap=metric.metric.before_cap)
    each = len(metric.places(len(bound))[0])
    parts = final.split(max(1, _ROWS // each) * each)
    return torch.cat([metric.of_rows(OfResiduals(out, out.read(x, normed=True))) for x in parts])


def joined(
    parts: Sequence[Part], names: Sequence[str], n_prompts: int, n_pos: int, other: bool
) -> dict[str, torch.Tensor]:
    """Activations of all prompts of a task, 0 behind the end of shorter ones."""
    out: dict[str, torch.Tensor] = {}
    for name in names:
        for part in parts:
            x = (part.there if other else part.here)[name]
            is_pattern = name.endswith("hook_pattern")
            shape = (x.shape[1], n_pos, n_pos) if is_pattern else (n_pos, *x.shape[2:])
            whole = out.setdefault(name, x.new_zeros(n_prompts, *shape))
            width = x.shape[position_axis(name)]
            if is_pattern:
                whole[part.index, :, :width, :width] = x
            else:
                whole[part.index, :width] = x
    return out
