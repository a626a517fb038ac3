"""Scores of features, errors, heads and MLPs from slopes at their sites.

1. A feature is a node if it is active in any prompt, clean or corrupted, at a token that its dictionary
   works on; with ``per_position`` each position is a node of its own.
2. Its score is the sum over tokens, and the mean over prompts, of ``(a - a') <W_f, g>``; that of an
   error ``(e - e') . g``, one number a token; that of a head ``(z - z') . g_z``.
3. Features that are active in the corrupted runs only are counted: their clean activation is 0, their
   slope is that of any other (see ``causes/gradient/site_runs.py``).
4. What the scores of a site sum to, and what replacing the whole site does, is in the metadata.

Cost: ``2 * active * width`` operations; nothing of size ``d_sae``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64

from gemmascope_plugin.causes.gradient.site_runs import PartRun, SiteRun
from gemmascope_plugin.causes.gradient.task_site import Tally, TaskSite, keys_of, slopes_of_entries
from gemmascope_plugin.circuits.feature_layout import SiteNodes, n_of
from gemmascope_plugin.errors import EmptySelectionError


@dataclass(frozen=True, eq=False)
class ScoredNodes:
    """All nodes of a task and their scores."""

    layout: tuple[SiteNodes, ...]
    scores: Float32[torch.Tensor, " node"]
    corrupt_only: dict[str, int]
    """Features that are active in corrupted runs only, and entries (one feature at one token)."""


@torch.no_grad()
def score_nodes(
    parts: Sequence[PartRun], *, n_heads: int, per_position: bool, errors: bool
) -> ScoredNodes:
    """Every node with its score."""
    n_prompts = sum(len(part.bound) for part in parts)
    layout, scores, start = [], [], 0
    counts = {"features": 0, "entries": 0}
    for i, site in enumerate(run.site for run in parts[0].sites):
        runs = [part.sites[i] for part in parts]
        n = n_of(site, n_heads)
        tally = _tally(runs, n, per_position)
        error = _errors(runs, per_position) if errors and site.kind == "feature" else tally.sums[:0]
        places = torch.arange(len(error))
        nodes = SiteNodes(site, n, tally.keys, places, per_position, start)
        start = nodes.stop
        layout.append(nodes)
        scores += [tally.sums / n_prompts, error / n_prompts]
        if site.kind == "feature":
            for name, count in _corrupt_only(runs).items():
                counts[name] += count
    if not any(len(nodes.keys) for nodes in layout if nodes.site.kind == "feature"):
        raise EmptySelectionError(
            f"No feature of {len(layout)} sites is active on any of {n_prompts} prompts",
            fix="other prompts, or dictionaries that fit the model: gemmascope_plugin.verify",
        )
    return ScoredNodes(tuple(layout), torch.cat(scores).float(), counts)


def residuals(parts: Sequence[PartRun], gap: float) -> dict[str, float]:
    """By site: what the scores miss of the effect of replacing it whole, as a share of the gap."""
    residual = {}
    for i, first in enumerate(parts[0].sites):
        runs = [part.sites[i] for part in parts]
        if first.whole is None:
            continue
        missing = [_whole(run) - run.whole for run in runs if run.whole is not None]
        residual[first.site.hook] = float(torch.cat(missing).mean()) / gap
    return residual


def _whole(run: SiteRun) -> Float[torch.Tensor, " prompt"]:
    return (run.moved * run.slope).sum((1, 2))


def _tally(runs: Sequence[SiteRun], n: int, per_position: bool) -> Tally:
    """Sums of effects by key."""
    tally = Tally()
    for run in runs:
        if run.site.kind != "feature":
            _add_raw(tally, run, n, per_position)
            continue
        for sign, values in ((1, run.clean), (-1, run.corrupt)):
            acts = values.acts
            assert acts is not None
            slopes = slopes_of_entries(acts, run.site.coder.W_dec, run.slope)
            tally.add(keys_of(acts, per_position), sign * acts.values.to(slopes.dtype) * slopes)
    return tally


def _add_raw(tally: Tally, run: SiteRun, n: int, per_position: bool) -> None:
    """Effects of heads, or of the MLP."""
    product = (run.moved * run.slope).unflatten(2, (n, -1)).sum((0, 3))
    values = product if per_position else product.sum(0)
    tally.add(torch.arange(values.numel()), values.flatten())


def _errors(runs: Sequence[SiteRun], per_position: bool) -> Float[torch.Tensor, " error"]:
    """Effects of errors, by position or of all at once."""
    total: Any = 0
    for run in runs:
        product = (run.error_moved * run.slope).sum((0, 2)).double().cpu()
        total = total + (product if per_position else product.sum(0, keepdim=True))
    return total


def _corrupt_only(runs: Sequence[SiteRun]) -> dict[str, int]:
    """Features, and entries, that are active in corrupted runs and not in clean ones."""
    entries, clean, corrupt = 0, [], []
    for run in runs:
        assert run.clean.acts is not None and run.corrupt.acts is not None
        tokens = [
            acts.rows * acts.d_sae + acts.indices for acts in (run.clean.acts, run.corrupt.acts)
        ]
        entries += _missing(tokens[1], tokens[0])
        clean.append(run.clean.acts.indices)
        corrupt.append(run.corrupt.acts.indices)
    return {
        "features": _missing(torch.cat(corrupt).unique(), torch.cat(clean).unique()),
        "entries": entries,
    }


def _missing(indices: Int64[torch.Tensor, " n"], others: Int64[torch.Tensor, " m"]) -> int:
    return int((~torch.isin(indices, others)).sum())


def site_summary(sites: Sequence[TaskSite]) -> dict[str, Any]:
    """Sites as a circuit's metadata keep them: hook to kind and number of features."""
    return {site.hook: (site.kind, site.d_sae) for site in sites}
