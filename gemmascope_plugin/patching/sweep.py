"""Runs every patch of an experiment, many of them in one forward pass, each pass starting late.

1. A patch that inserts what is there already has no effect and is not run; nor is its effect on a prompt
   where it does.
2. The others are sorted by the first layer that they touch, and by the first position. A pass carries
   copies of the prompts, each with its own patch, up to as many rows as are allowed.
3. Below the first patched layer, and before the first position that a patch changes, every copy is the
   base run: a pass runs what is above and behind alone (``replayed.py``), from the patched point on.
4. Where that cannot be, for a model that is not a Gemma, passes start at the patched layer by the model's
   own modules (``models/restart.py``), and whole where somebody's hooks take part, those of dictionaries
   among them.

Cost: the matrix products of the positions behind the first change, in the layers above the patch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.models.points import n_layers
from gemmascope_plugin.models.replay import Stage
from gemmascope_plugin.models.restart import Restart, can_restart
from gemmascope_plugin.patching.components import COMPONENTS, layer_of
from gemmascope_plugin.patching.experiment import Experiment
from gemmascope_plugin.patching.insert import inserting
from gemmascope_plugin.patching.nodes import Patch
from gemmascope_plugin.patching.replayed import Part, position_axis

_KNOWN = ("attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out")
"""Points whose recorded value spares what lies before them in their layer."""
_MID = ("ln2.", "mlp.", "ln2_post.", "hook_mlp_out")
"""Points between attention and the end of the layer."""
_SPREAD, _TOKENS = 0.15, 256
"""Share of positions that may be run for nothing, once a pass has this many."""


@torch.no_grad()
def sweep(
    run: Experiment, *, restart: bool = True, progress: bool = False
) -> Float[torch.Tensor, "patch prompt"]:
    """The metric of each prompt under each patch alone, on the CPU.

    Args:
        run: The experiment.
        restart: Whether passes start late where they can.
        progress: Show a progress bar.
    """
    if run.parts is not None and restart:
        return _replayed(run, progress)
    from tqdm.auto import tqdm

    patches = run.grid.patches
    # running a patch that changes nothing would only add rounding
    live = [i for i, patch in enumerate(patches) if run.changes(patch)]
    live.sort(key=lambda i: first_layer(patches[i]))
    metric = run.base_by_prompt.repeat(len(patches), 1)
    copies = max(1, run.rows // len(run.base))
    chunks = [live[i : i + copies] for i in range(0, len(live), copies)]
    parts = torch.arange(len(run.base)).split(run.rows)
    title = f"patching {run.grid.component}"
    total = len(parts) * len(chunks)
    with warnings.catch_warnings(), tqdm(total=total, desc=title, disable=not progress) as bar:
        # the bridge warns that an edited norm scale may differ from the unedited norm by rounding
        warnings.filterwarnings("ignore", message=".*hook edited hook_scale")
        for index in parts:
            passes = _passes(run, index, [[patches[i] for i in chunk] for chunk in chunks], restart)
            for chunk, values in zip(chunks, passes, strict=True):
                metric[torch.tensor(chunk)[:, None], index] = values.to(metric)
                bar.update()
    return metric


def first_layer(patch: Patch) -> int:
    """The first layer that a patch touches."""
    return min(layer_of(hook) for hook in patch.hooks)


def _passes(
    run: Experiment,
    index: Int[torch.Tensor, " part"],
    chunks: Sequence[Sequence[Patch]],
    restart: bool,
) -> Iterator[Float[torch.Tensor, "patch part"]]:
    """One pass per chunk of patches, over some of the prompts."""
    index = index.to(run.base.device)
    bound, base = run.bound.part(index), run.base[index]
    # sorted, so that the first patch of a chunk is the earliest
    last = n_layers(run.model)  # where the final norm begins
    starts = [min(first_layer(chunk[0]), last) for chunk in chunks]
    late = restart and any(start > 0 for start in starts) and can_restart(run.model)
    end = Restart(run.model, base, starts) if late else None
    for chunk, start in zip(chunks, starts, strict=True):
        hooks = inserting(chunk, {h: run.other[h][index] for p in chunk for h in p.hooks})
        if end is None:
            rows = base.repeat(len(chunk), 1)
            values = bound.measure(run.runner, rows, fwd_hooks=hooks)
        else:
            rows = end.stream(start, len(chunk))
            values = bound.measure(end, rows, fwd_hooks=hooks, start_at_layer=start)
        yield values.reshape(len(chunk), len(base))


@dataclass(frozen=True, eq=False)
class _Changes:
    """Where the patches of a component change what a run of some prompts has."""

    component: str
    by_hook: Mapping[str, Bool[torch.Tensor, "part pos *axis"]]
    """True where any number differs; the axis beside positions is the one that patches choose from."""

    @classmethod
    def of(cls, run: Experiment, part: Part) -> _Changes:
        """On the prompts of a part."""
        dims = COMPONENTS[run.grid.component].dims
        differs = {}
        for hook in run.grid.hooks:
            x = run.here[hook][part.index] != run.other[hook][part.index]
            x = x.flatten(1 + len(dims)).any(-1) if x.ndim > 1 + len(dims) else x
            differs[hook] = x.movedim(1 + dims.index("pos"), 1)
        return cls(run.grid.component, differs)

    def by_position(self, patch: Patch) -> Bool[torch.Tensor, "part pos"]:
        """The positions at which a patch changes anything."""
        dims = COMPONENTS[self.component].dims
        at = dict(zip(dims, patch.index, strict=False))
        pos = at.pop("pos", slice(None))
        (beside,) = at.values() if at else (None,)
        out = None
        for hook in patch.hooks:
            x = self.by_hook[hook]
            if x.ndim == 3:
                x = x[:, :, beside] if isinstance(beside, int) else _chosen(x, beside).any(-1)
            out = x if out is None else out | x
        assert out is not None, "a patch touches a hook"
        inside = torch.zeros_like(out)
        inside[
            :, [pos] if isinstance(pos, int) else list(pos) if isinstance(pos, tuple) else pos
        ] = True
        return out & inside


def _chosen(x: torch.Tensor, at: object) -> torch.Tensor:
    return x[:, :, list(at)] if isinstance(at, tuple) else x


@dataclass(frozen=True)
class _Live:
    """A patch that changes some prompts of a part."""

    index: int
    layer: int
    start: int
    changed: Bool[torch.Tensor, " part"]


def _replayed(run: Experiment, progress: bool) -> Float[torch.Tensor, "patch prompt"]:
    from tqdm.auto import tqdm

    assert run.parts is not None
    patches = run.grid.patches
    metric = run.base_by_prompt.repeat(len(patches), 1)
    title = f"patching {run.grid.component}"
    with tqdm(total=len(run.parts) * len(patches), desc=title, disable=not progress) as bar:
        for part in run.parts:
            for chunk in _chunks(run, part, _live(run, part)):
                values = _chunk_metric(run, part, chunk).cpu()
                for live, value in zip(chunk, values, strict=True):
                    where = part.index[live.changed].cpu()
                    metric[live.index, where] = value[live.changed.cpu()].to(metric)
                bar.update(len(chunk))
            bar.n = min(bar.total, bar.n)
    return metric


def _live(run: Experiment, part: Part) -> list[_Live]:
    """Patches that change something that is asked about, from the lowest layer and position on."""
    changes, asked = _Changes.of(run, part), int(part.replay.at.max())
    live = []
    for i, patch in enumerate(run.grid.patches):
        changed = changes.by_position(patch)[:, : asked + 1]
        if bool(changed.any()):
            start = int(changed.any(0).int().argmax())
            live.append(_Live(i, first_layer(patch), start, changed.any(1)))
    return sorted(live, key=lambda patch: (patch.layer, patch.start, patch.index))


def _chunks(run: Experiment, part: Part, live: Sequence[_Live]) -> Iterator[list[_Live]]:
    """Patches that ride one pass: of one layer, and nearly one position."""
    copies = max(1, run.rows // len(part.index))
    chunk: list[_Live] = []
    stop = int(part.replay.at.max()) + 1
    for patch in live:
        if chunk:
            width = stop - chunk[0].start
            idle = (patch.start - chunk[0].start) / width
            enough = len(chunk) * len(part.index) * width >= _TOKENS
            if patch.layer != chunk[0].layer or len(chunk) == copies or (enough and idle > _SPREAD):
                yield chunk
                chunk = []
        chunk.append(patch)
    if chunk:
        yield chunk


def _chunk_metric(
    run: Experiment, part: Part, chunk: Sequence[_Live]
) -> Float[torch.Tensor, "patch part"]:
    """One pass with a copy of the prompts for each patch."""
    patches = [run.grid.patches[live.index] for live in chunk]
    last = part.replay.arithmetic.anatomy.n_layers
    layer, window = min(chunk[0].layer, last), part.replay.window(chunk[0].start)
    names = {hook for patch in patches for hook in patch.hooks}
    other = {
        name: run.other[name][part.index].narrow(
            position_axis(name), window.start, window.stop - window.start
        )
        for name in names
    }
    hooks = inserting([_shifted(run, patch, window) for patch in patches], other)
    stage, known = entered(run, part, layer, names, window, len(chunk))
    return part.metric(layer, window, stage=stage, copies=len(chunk), hooks=hooks, known=known)


def entered(
    run: Experiment, part: Part, layer: int, names: set[str], window: slice, copies: int
) -> tuple[Stage, dict[str, torch.Tensor]]:
    """Where in a layer a pass starts whose first changes are at these points, and what is known there.

    Args:
        run: The experiment.
        part: Some of its prompts.
        layer: The layer.
        names: All points that are changed.
        window: The positions that run.
        copies: Of the prompts.
    """
    prefix = f"blocks.{layer}."
    first = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    stage: Stage = "pre"
    if first and all(name == "hook_resid_post" for name in first):
        return "post", {}
    if first and all(name.startswith(_MID) for name in first):
        stage = "mid"
    known = {}
    if len(first) == 1 and (name := next(iter(first))) in _KNOWN:
        value = run.here[prefix + name][part.index][:, window]
        known[prefix + name] = value.repeat(copies, *[1] * (value.ndim - 1))
    return stage, known


def _shifted(run: Experiment, patch: Patch, window: slice) -> Patch:
    """The same patch, positions counted from the first that runs, without those that do not run."""
    dims = COMPONENTS[run.grid.component].dims
    if "pos" not in dims[: len(patch.index)]:
        return patch
    index, axis = list(patch.index), dims.index("pos")
    at = index[axis]
    if isinstance(at, int):
        index[axis] = at - window.start
    elif isinstance(at, tuple):
        index[axis] = tuple(p - window.start for p in at if window.start <= p < window.stop)
    return Patch(patch.hooks, tuple(index))
