"""A task's base run in parts that are run again late: from the first layer and position that differ.

1. Prompts whose first difference and whose length are the same (or nearly) make a part, so that hardly a
   position is run for nothing. Each part is recorded once (``models/replay.py``).
2. The other run is computed from the first difference on; before it, it *is* the base run.
3. A model that is not known as functions of its weights, or has dictionaries spliced in, runs by its own
   modules (``models/module_replay.py``), every position of it.
4. A metric is read from the end of the stream, some rows at a time: from the logits of the tokens that it
   names alone, where no others count.

Cost: one pass over the base prompts and one over the ends of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.components import Runner
from gemmascope_plugin.models.arithmetic import Arithmetic
from gemmascope_plugin.models.module_replay import ModuleReplay
from gemmascope_plugin.models.protocol import HookedModel, model_of
from gemmascope_plugin.models.readout import OfResiduals
from gemmascope_plugin.models.record import check_reached, keeping
from gemmascope_plugin.models.replay import Replay
from gemmascope_plugin.models.replay_points import Stage, replayable
from gemmascope_plugin.models.unembed import unembedding

_ROWS = 128
"""Rows whose logits are all formed at once."""
_A_PART = 24
"""What a part costs beside its positions (weights are read once more), in positions."""
_KNOWN = ("attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out")
"""Points whose recorded value spares what lies before them in their layer."""
_MID = ("ln2.", "mlp.", "ln2_post.", "hook_mlp_out")
"""Points between attention and the end of the layer."""


@dataclass(eq=False)
class Part:
    """Some prompts of a task."""

    index: Int[torch.Tensor, " part"]
    """Which."""
    start: int
    """The first position at which any of them differs between both runs."""
    bound: BoundTask
    """The task on them, cut to their length."""
    replay: Replay | ModuleReplay
    base: Float[torch.Tensor, " part"]
    """The metric of the base run, from the same arithmetic, on the CPU."""
    other: Float[torch.Tensor, " part"]
    """That of the other run."""
    base_acts: Mapping[str, torch.Tensor]
    """Activations of the base run ``[part, pos, ...]``."""
    other_acts: Mapping[str, torch.Tensor]
    """Those of the other run."""

    def before_asked(self) -> Bool[torch.Tensor, "part pos"]:
        """True up to the last position that each prompt is asked about; what is behind has no effect."""
        row, at = self.bound.metric.places(len(self.bound))
        last = torch.zeros_like(self.bound.lengths).scatter_reduce(0, row, at, "amax")
        positions = torch.arange(self.bound.clean.shape[1], device=last.device)
        return positions <= last[:, None]

    def metric(self, final: Float[torch.Tensor, "ask d_model"]) -> torch.Tensor:
        """The metric of copies of the prompts, ``[copy, part]``, from what a pass of ``replay`` gives."""
        return metric_of(self.bound, self.replay.model, final).unflatten(0, (-1, len(self.bound)))


def replayed(
    runner: Runner,
    bound: BoundTask,
    base: Int[torch.Tensor, "prompt pos"],
    other: Int[torch.Tensor, "prompt pos"],
    *,
    rows: int,
    base_points: Sequence[str] = (),
    other_points: Sequence[str] = (),
    whole: bool = False,
) -> Iterator[Part]:
    """The parts of a task, made one after the other.

    Activations at ``base_points`` in the base run and at ``other_points``, some of them, in the other run
    are kept.
    ``whole`` says that something else than the other tokens may differ before the first of them.
    """
    model, points = model_of(runner), (base_points, other_points)
    plain = runner is model and replayable([*base_points, *other_points])
    arithmetic = Arithmetic.of(model, base) if plain else None
    if arithmetic is None:
        groups = [index.tolist() for index in torch.arange(len(base)).split(rows)]
        starts = [0] * len(base)
    else:
        starts = first_differences(base, other, bound)
        groups = together(starts, bound.lengths.tolist(), rows)
    for group in groups:
        index = torch.tensor(group, device=base.device)
        width = base.shape[1] if arithmetic is None else int(bound.lengths[index].max())
        task = bound.part(index).cut(width)
        row, at = task.metric.places(len(task))
        tokens = base[index, :width]
        if arithmetic is None:
            replay = ModuleReplay(runner, tokens, at, row)
        else:
            replay = Replay(arithmetic, tokens, at, None if len(at) == len(task) else row)
        start = min(starts[i] for i in group)
        yield _part(index, start, task, replay, other[index, :width], points, whole)


def _part(
    index: torch.Tensor,
    start: int,
    bound: BoundTask,
    replay: Replay | ModuleReplay,
    other: torch.Tensor,
    points: tuple[Sequence[str], Sequence[str]],
    whole: bool,
) -> Part:
    names = [*points[0], *points[1]]
    acts: dict[str, torch.Tensor] = {}
    changed: dict[str, torch.Tensor] = {}
    end = replay.record(keeping(acts, names))
    away = replay.variant(other, start, keeping(changed, points[1]))
    check_reached(acts, names)
    for name, x in changed.items():
        axis = position_axis(name)
        changed[name] = torch.cat([acts[name].narrow(axis, 0, start), x], axis)
    before, after = (metric_of(bound, replay.model, final).cpu() for final in (end, away))
    return Part(index, 0 if whole else start, bound, replay, before, after, acts, changed)


def starting_at(layer: int, names: set[str]) -> tuple[Stage, bool]:
    """Where in a layer a pass starts whose first changes are at these points.

    Also whether a known value at the only point of the layer spares what lies before it.
    """
    prefix = f"blocks.{layer}."
    first = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if first and all(name == "hook_resid_post" for name in first):
        return "post", False
    within = bool(first) and all(name.startswith(_MID) for name in first)
    return "mid" if within else "pre", len(first) == 1 and next(iter(first)) in _KNOWN


def position_axis(name: str) -> int:
    """Which axis of a point's tensor has the positions that a pass runs: queries, of a pattern."""
    return 2 if name.endswith("hook_pattern") else 1


def inside(x: torch.Tensor, name: str, window: slice) -> torch.Tensor:
    """The positions of a window of a point's tensor; of a pattern, the keys that there are as well."""
    x = x.narrow(position_axis(name), window.start, window.stop - window.start)
    return x[..., : window.stop] if name.endswith("hook_pattern") else x


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
    """Prompts that are run together."""
    groups: list[list[int]] = []
    for i in sorted(range(len(starts)), key=lambda i: (starts[i], lengths[i], i)):
        if groups and len(groups[-1]) < rows:
            apart = _positions(groups[-1], starts, lengths) + lengths[i] - starts[i] + _A_PART
            if _positions([*groups[-1], i], starts, lengths) <= apart:
                groups[-1].append(i)
                continue
        groups.append([i])
    return [sorted(group) for group in groups]


def _positions(group: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> int:
    """How many are run for a group, those for nothing counted."""
    width = max(lengths[i] for i in group) - min(starts[i] for i in group)
    return len(group) * width


def metric_of(
    bound: BoundTask, model: HookedModel, final: Float[torch.Tensor, "ask d_model"]
) -> Float[torch.Tensor, " row"]:
    """The metric of rows, copies of the prompts, from what the unembedding reads."""
    metric = bound.metric
    out = unembedding(model, before_cap=metric.metric.before_cap)
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
            x = (part.other_acts if other else part.base_acts)[name]
            is_pattern = name.endswith("hook_pattern")
            shape = (x.shape[1], n_pos, n_pos) if is_pattern else (n_pos, *x.shape[2:])
            whole = out.setdefault(name, x.new_zeros(n_prompts, *shape))
            width = x.shape[position_axis(name)]
            if is_pattern:
                whole[part.index, :, :width, :width] = x
            else:
                whole[part.index, :width] = x
    return out
