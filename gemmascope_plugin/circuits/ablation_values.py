"""What takes the place of what a circuit of features does not keep.

================ ====================================================================================
``other``        the corrupted run of the same prompt, at every token
``zero``         nothing; where a dictionary is, what it writes without features: its bias
``mean``         the corrupted run's mean over prompts, position by position
``overall_mean`` its mean over prompts and positions
================ ====================================================================================

Except with ``other``, tokens that a dictionary leaves alone (BOS) stay as they are and enter no mean.
Features and tensor are averaged alike, so that features and error still sum to the tensor.

Cost: one forward pass over the corrupted prompts and one encode per dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.gradient.task_site import (
    Tally,
    TaskSite,
    Values,
    kept_tokens,
    keys_of,
    read_sites,
)
from gemmascope_plugin.causes.replace import MaskedMean, Replacement
from gemmascope_plugin.models import flatten_heads, restore_heads
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.saes import SparseActs
from gemmascope_plugin.saes.sparse import offsets_of


@dataclass(frozen=True, eq=False)
class AblationValue:
    """What takes the place of one site, for some prompts."""

    y: Float[torch.Tensor, "prompt pos ..."]
    """The tensor with nothing kept."""
    acts: SparseActs | None
    """The features in it."""
    leaves: Bool[torch.Tensor, "prompt pos"] | None
    """True at tokens that stay as they are, whatever is kept; None for no token."""


def ablation_values(
    model: HookedModel,
    parts: Sequence[BoundTask],
    sites: Sequence[TaskSite],
    replacement: Replacement,
) -> list[dict[str, AblationValue]]:
    """Of every part of a task, by hook."""
    runs = [read_sites(model, sites, part.corrupt, part.mask) for part in parts]
    if replacement == "other":
        return [
            {hook: AblationValue(values.y, values.acts, None) for hook, values in run.items()}
            for run in runs
        ]
    values: list[dict[str, AblationValue]] = [{} for _ in parts]
    for site in sites:
        keeps = [kept_tokens(site, part.corrupt, part.mask) for part in parts]
        at_site = [run[site.hook] for run in runs]
        ends = (
            [_nothing(site, run) for run in at_site]
            if replacement == "zero"
            else _means(site, at_site, keeps, over_positions=replacement == "overall_mean")
        )
        for i, (part, (y, acts)) in enumerate(zip(parts, ends, strict=True)):
            alone = ~kept_tokens(site, part.clean, part.mask) if site.kind == "feature" else None
            values[i][site.hook] = AblationValue(y, acts, alone)
    return values


def keep_units(
    activation: Float[torch.Tensor, "row pos ..."],
    replacement: Float[torch.Tensor, "prompt pos ..."],
    is_kept: Bool[torch.Tensor, "circuit pos_or_one unit"],
    index: Int64[torch.Tensor, " unit"] | None = None,
) -> Float[torch.Tensor, "row pos ..."]:
    """An activation of every circuit's copy of the prompts, replaced where a unit is not kept.

    Units are heads or features on axis 2, those of ``index`` or all; or one, the tensor as a whole.
    """
    copies = activation.unflatten(0, (len(is_kept), -1))
    keep = is_kept[:, None].to(activation.device)
    keep = keep.reshape(*keep.shape, *[1] * (copies.ndim - 4))
    if index is None:
        return torch.where(keep, copies, replacement).flatten(0, 1)
    old, new = copies.index_select(3, index), replacement.index_select(2, index)
    return copies.index_copy(3, index, torch.where(keep, old, new)).flatten(0, 1)


def repeat_prompts(acts: SparseActs, times: int) -> SparseActs:
    """Copies of the prompts, copy after copy, of activations ``[prompt, pos, d_sae]``."""
    n, pos, d_sae = acts.shape
    counts = acts.offsets.diff().repeat(times)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    shape = (times * n, pos, d_sae)
    return SparseActs(offsets, acts.indices.repeat(times), acts.values.repeat(times), shape)


def _nothing(site: TaskSite, values: Values) -> tuple[torch.Tensor, SparseActs | None]:
    if values.acts is None or values.x is None:
        return torch.zeros_like(values.y), None
    x = values.x.to(site.coder.W_enc.device)
    bias = site.coder.bias(x).to(values.y.device, values.y.dtype)
    y = restore_heads(bias.expand(flatten_heads(values.y).shape).contiguous(), values.y)
    empty = torch.zeros(values.acts.n_tokens + 1, dtype=torch.int64, device=x.device)
    none = values.acts.indices[:0], values.acts.values[:0]
    return y, SparseActs(empty, *none, values.acts.shape)


def _means(
    site: TaskSite,
    runs: Sequence[Values],
    keeps: Sequence[Bool[torch.Tensor, "_ pos"]],
    *,
    over_positions: bool,
) -> list[tuple[torch.Tensor, SparseActs | None]]:
    """Mean tensor and mean features of each part's prompts; all prompts have the same."""
    mean = MaskedMean(over_positions)
    for run, keep in zip(runs, keeps, strict=True):
        mean.add(run.y, keep)
    y = mean.value(runs[0].y.dtype)
    count = mean.count.sum()[None] if over_positions else mean.count
    acts = _mean_acts(site, runs, count, over_positions)
    rows = [len(run.y) for run in runs]
    return [
        (y.expand(n, *y.shape[1:]), None if acts is None else repeat_prompts(acts, n)) for n in rows
    ]


def _mean_acts(
    site: TaskSite,
    runs: Sequence[Values],
    count: Float[torch.Tensor, " pos"],
    over_positions: bool,
) -> SparseActs | None:
    """Mean features of one prompt ``[1, pos, d_sae]``; None without a dictionary."""
    if runs[0].acts is None:
        return None
    tally = Tally()
    for run in runs:
        assert run.acts is not None
        tally.add(keys_of(run.acts, not over_positions), run.acts.values)
    _, n_pos, d_sae = runs[0].acts.shape
    keys, sums = tally.keys, tally.sums
    if over_positions:
        keys = (torch.arange(n_pos)[:, None] * d_sae + keys).flatten()
        sums, count = sums.repeat(n_pos), count.expand(n_pos)
    rows = keys // d_sae
    values = sums / count.double().cpu()[rows].clamp(min=1)
    to = runs[0].acts.values
    return SparseActs(
        offsets_of(rows, n_pos).to(to.device),
        (keys % d_sae).to(to.device),
        values.to(to),
        (1, n_pos, d_sae),
    )
