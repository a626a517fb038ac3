"""Exact activation patching: replace, recompute everything downstream, read the metric.

1. Run clean and corrupted prompts once and keep the activations at the patched hooks.
2. The base run is the corrupted one (denoising, clean values are inserted) or the clean one (noising);
   zeros, means or another prompt's values can be inserted in place of the other run's
   (Heimersheim & Nanda, arXiv 2404.15255, for the method).
3. Every patch is run alone, in a copy of the prompts. One that inserts what is there already has no
   effect and is not run; nor is its effect on a prompt where it does.
4. Below the patched layer, and before the first position that it changes, a copy is the base run: what is
   above and behind runs alone (``replayed.py``), from the patched point on.
5. Copies whose patches begin at nearly the same position climb the layers together, up to as many rows as
   are allowed; each joins at its layer. So a layer is run for all of them at once.
6. Where that cannot be, for a model that is not a Gemma, passes start at the patched layer by the model's
   own modules, and whole where other hooks take part, those of dictionaries among them.

Cost: four forward passes, and the matrix products of the positions behind each patch's first change, in
the layers above it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.components import COMPONENTS, layer_of
from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.experiment import Experiment, experiment
from gemmascope_plugin.causes.grid import Choice, Features, Patch, inserting
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.replace import PatchReplacement
from gemmascope_plugin.causes.replayed import Part, inside, starting_at
from gemmascope_plugin.causes.task import Task, check_task
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.points import n_layers
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.models.replay import Replay
from gemmascope_plugin.models.replay_points import Entry
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes
from gemmascope_plugin.types import Direction

MAX_ROWS = 512
"""Rows of prompts in one forward pass by default."""
_SPREAD, _TOKENS = 0.15, 256
"""Share of positions that may be run for nothing, once a pass has this many."""
_AT_ONCE = 1024
"""Positions of a pass on a CPU: more make products no faster, and memory is asked for anew each time."""


@gate(model=check_model, task=check_task, saes=check_saes)
def activation_patching(
    model: HookedModel,
    task: Task,
    component: str,
    *,
    direction: Direction = "denoising",
    axes: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    per_position: bool = True,
    saes: Saes = None,
    features: Features | None = None,
    replacement: PatchReplacement = "other",
    seed: int | None = None,
    max_rows: int = MAX_ROWS,
    memory_budget: int | str | None = None,
    progress: bool = False,
) -> Effects:
    """The exact effect on the metric of patching each node alone.

    A prompt that is shorter than others has no token at later positions: patches there leave it as it is.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        task: Clean and corrupted prompts and a metric.
        component: ``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out``, ``mlp_out`` (layer by
            position); ``z``, ``q``, ``pattern`` (layer by head), ``k``, ``v`` (layer by key-value
            head); ``neuron`` (layer by neuron); ``ln1_scale``, ``ln1_post_scale``, ``ln2_scale``,
            ``ln2_post_scale`` (layer by position), ``ln_final_scale`` (position); ``feature``,
            and ``error`` for the whole reconstruction error of each dictionary, which is else kept.
        direction: ``denoising`` puts clean values into the corrupted run, ``noising`` the reverse.
        axes: One patch per coordinate along these, such as ``("layer", "head", "pos")``; along the
            others a patch covers everything at once. None for the axes in brackets above.
        layers: Only these layers.
        heads: Only these heads; key-value heads for ``k`` and ``v``.
        positions: Only these positions, from the start of each prompt; queries for ``pattern``.
        neurons: Only these neurons.
        per_position: Whether components without heads have the axis ``pos``, where ``axes`` does not
            say.
        saes: Dictionaries, for ``feature`` and ``error``.
        features: Which features, as ``FeatureId(site, index)`` or, of a single dictionary, as indices;
            None for all whose activation the replacement changes.
        replacement: ``other``, the other run's activation; ``zero``; ``mean``, the other run's mean at
            each position over prompts; ``overall_mean``, over positions as well; ``resample``, the
            other run's activation of another prompt of the same length.
        seed: For ``resample`` alone; 0 by default.
        max_rows: Most prompts, copies counted, in one forward pass.
        memory_budget: Bytes, or e.g. ``"2 GB"``, for activations (``memory.py`` says what is counted).
        progress: Show a progress bar.

    Returns:
        Effects with ``values[axes] = metric(patched) - metric(base)``, averaged over prompts, and the
        same of each prompt.

    Raises:
        TaskError: Prompts that cannot be compared, a metric that does not tell them apart, or a
            replacement that the component or the prompts do not allow.
        UnknownNameError: An unknown component, direction, replacement, axis, layer, head, position or
            neuron, or features without dictionaries.
        EmptySelectionError: An empty list of axes or coordinates.
        GemmaScopeError: A memory budget too small for one prompt.

    Example:
        >>> suite = gs.tiny()
        >>> task = suite.task("agreement", n=8)
        >>> effects = gs.activation_patching(suite.model, task, "resid_pre")
        >>> effects
        Effects(resid_pre, exact patching, denoising, 4 layer x 7 pos, first prompt 'were' (13)
          against 'was' (24), metric clean 9.480, corrupt -10.958, excluded tokens none)
        >>> effects.top(2).round(2)
           layer  pos  effect  share
        0      0    3   20.44    1.0
        1      2    3   20.43    1.0
    """
    choice = Choice(
        axes=axes,
        per_position=per_position,
        layers=layers,
        heads=heads,
        positions=positions,
        neurons=neurons,
        features=features,
    )
    with experiment(
        model,
        task,
        component,
        choice,
        direction=direction,
        saes=saes,
        replacement=replacement,
        seed=seed,
        limit=Limit(max_rows, memory_budget),
    ) as run:
        changes = sweep(run, progress=progress) - run.base_by_prompt
        return run.effects(changes.mean(1), "exact patching", by_prompt=changes)


@torch.no_grad()
def sweep(run: Experiment, *, progress: bool = False) -> Float[torch.Tensor, "patch prompt"]:
    """The metric of each prompt under each patch alone, on the CPU."""
    from tqdm.auto import tqdm

    patches = run.grid.patches
    metric = run.base_by_prompt.repeat(len(patches), 1)
    total, title = len(run.parts) * len(patches), f"patching {run.grid.component}"
    with warnings.catch_warnings(), tqdm(total=total, desc=title, disable=not progress) as bar:
        # the bridge warns that an edited norm scale may differ from the unedited norm by rounding
        warnings.filterwarnings("ignore", message=".*hook edited hook_scale")
        for part in run.parts:
            live = _live(run, part)
            bar.update(len(patches) - len(live))
            for chunk in _chunks(run, part, live):
                values = _chunk_metric(run, part, chunk).cpu()
                for patch, value in zip(chunk, values, strict=True):
                    where = part.index[patch.changed].cpu()
                    metric[patch.index, where] = value[patch.changed.cpu()].to(metric)
                bar.update(len(chunk))
    return metric


def first_layer(patch: Patch) -> int:
    """The first layer that a patch touches."""
    return min(layer_of(hook) for hook in patch.hooks)


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


def _live(run: Experiment, part: Part) -> list[_Live]:
    """Patches that change something that is asked about, from the lowest layer and position on."""
    changes, is_asked = _Changes.of(run, part), part.before_asked()
    live = []
    for i, patch in enumerate(run.grid.patches):
        changed = changes.by_position(patch)[:, : is_asked.shape[1]] & is_asked
        if bool(changed.any()):
            window = part.replay.window(int(changed.any(0).int().argmax()))
            layer = 0 if part.replay.runs_whole else first_layer(patch)
            live.append(_Live(i, layer, window.start, changed.any(1)))
    return sorted(live, key=lambda patch: (patch.layer, patch.start, patch.index))


def _chunks(run: Experiment, part: Part, live: Sequence[_Live]) -> Iterator[list[_Live]]:
    """Patches that ride together: of nearly one position, and as many as rows are allowed.

    Each chunk is in ascending order of layers.
    """
    stop = int(part.replay.at.max()) + 1
    chunk: list[_Live] = []
    for patch in sorted(live, key=lambda patch: (patch.start, patch.layer, patch.index)):
        if chunk:
            width = stop - chunk[0].start
            enough = len(chunk) * len(part.index) * width >= _TOKENS
            if enough and patch.start - chunk[0].start > _SPREAD * width:
                yield from _in_order(run, part, chunk)
                chunk = []
        chunk.append(patch)
    if chunk:
        yield from _in_order(run, part, chunk)


def _in_order(run: Experiment, part: Part, chunk: list[_Live]) -> Iterator[list[_Live]]:
    copies = max(1, run.rows // len(part.index))
    if run.base.device.type == "cpu":
        window = part.replay.window(chunk[0].start)
        tokens = len(part.index) * (window.stop - window.start)
        copies = min(copies, max(1, _AT_ONCE // tokens))
    chunk = sorted(chunk, key=lambda patch: (patch.layer, patch.start, patch.index))
    for start in range(0, len(chunk), copies):
        yield chunk[start : start + copies]


def _chunk_metric(
    run: Experiment, part: Part, chunk: Sequence[_Live]
) -> Float[torch.Tensor, "patch part"]:
    """A copy of the prompts for each patch; those of one layer start together."""
    window = part.replay.window(min(patch.start for patch in chunk))
    last = n_layers(run.model)  # where the final norm begins
    several = any(len(run.grid.patches[live.index].hooks) > 1 for live in chunk)
    entries = []
    for layer, group in groupby(chunk, key=lambda live: min(max(live.layer, 0), last)):
        patches = [run.grid.patches[live.index] for live in group]
        entries.append(_entry(run, part, layer, patches, window))
    if isinstance(part.replay, Replay) and not several and entries[-1].layer < last:
        return part.metric(part.replay.climb(window, entries))
    if part.replay.runs_whole:
        patches = [run.grid.patches[live.index] for live in chunk]
        entries = [_entry(run, part, 0, patches, window)]
    return torch.cat([part.metric(part.replay.run(entry, window)) for entry in entries])


def _entry(
    run: Experiment, part: Part, layer: int, patches: Sequence[Patch], window: slice
) -> Entry:
    """Where patches whose first layer is this one start."""
    names = {hook for patch in patches for hook in patch.hooks}
    other = {name: inside(run.other[name][part.index], name, window) for name in names}
    hooks = inserting([_shifted(run, patch, window) for patch in patches], other)
    stage, spares = starting_at(layer, names)
    values = {}
    if spares:
        (name,) = (name for name in names if name.startswith(f"blocks.{layer}."))
        value = run.here[name][part.index][:, window]
        values[name] = value.repeat(len(patches), *[1] * (value.ndim - 1))
    return Entry(layer, stage, len(patches), hooks, values)


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
