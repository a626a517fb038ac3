"""Forests over features: what is one, how deep it is, and how far siblings overlap.

1. A forest is a tensor ``parent [d_sae]``, ``ROOT`` for features below none; following it from any
   feature ends there.
2. An edge is judged where the child is active on at least ``min_tokens`` tokens.
3. Overlap of siblings (Tree SAE, arXiv 2605.07922, section 6.3): ``|A & B| / |A | B|`` of their token
   sets, the mean over all pairs of children of one feature; children of the root are not siblings.

Cost: a pass over the features per level of depth; the overlap the meetings of siblings.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int, Int64

from gemmascope_plugin.errors import ModelError, WidthMismatchError
from gemmascope_plugin.features.cooccurrence import (
    CELLS,
    active_only,
    entries,
    meetings,
    token_counts,
)
from gemmascope_plugin.saes import SparseActs

ROOT = -1
"""Parent of features below no other, as in a Tree SAE."""


def check_forest(parent: torch.Tensor, d_sae: int) -> None:
    """Refuses what is not a forest."""
    if tuple(parent.shape) != (d_sae,):
        raise WidthMismatchError(
            f"The forest has shape {list(parent.shape)}, the dictionary has {d_sae} features",
            fix=f"one parent for each feature, {ROOT} for none",
        )
    if parent.is_floating_point() or parent.is_complex() or parent.dtype == torch.bool:
        raise ModelError(f"The forest has type {parent.dtype}", exists="integers", fix=".long()")
    wrong = ((parent < ROOT) | (parent >= d_sae)).nonzero()
    if len(wrong):
        child = int(wrong[0, 0])
        raise ModelError(
            f"Feature {child} has parent {int(parent[child])}, which does not exist",
            exists=f"features 0 to {d_sae - 1}, and {ROOT} for none",
        )
    reached = parent.long()
    for _ in range(d_sae.bit_length()):  # each time twice as far up
        reached = torch.where(reached == ROOT, ROOT, reached[reached])
    if bool((reached != ROOT).any()):
        inside = int(reached[reached != ROOT][0])
        raise ModelError(f"Feature {inside} is among its own ancestors", fix="a forest: no cycles")


def depth(parent: Int[torch.Tensor, " d_sae"]) -> Int64[torch.Tensor, " d_sae"]:
    """Number of ancestors of each feature of a forest."""
    line, ancestors = parent.long(), torch.zeros_like(parent, dtype=torch.long)
    while bool((line != ROOT).any()):
        ancestors += line != ROOT
        line = torch.where(line == ROOT, ROOT, parent[line])
    return ancestors


def judged_edges(
    parent: Int[torch.Tensor, " d_sae"], counts: Int64[torch.Tensor, " d_sae"], min_tokens: int
) -> Int64[torch.Tensor, " edge"]:
    """The children of the edges that are judged, ascending."""
    return ((parent != ROOT) & (counts >= max(min_tokens, 1))).nonzero()[:, 0]


def sibling_overlap(
    acts: SparseActs,
    parent: Int[torch.Tensor, " d_sae"],
    *,
    min_tokens: int = 20,
    cells: int = CELLS,
) -> float:
    """Mean overlap of the token sets of siblings, step 3 at the top of this file.

    Args:
        acts: Activations at all tokens.
        parent: The forest.
        min_tokens: Tokens on which a sibling must be active.
        cells: Meetings of entries at a time.

    Returns:
        Between 0 and 1; NaN where no feature has two children.
    """
    acts = active_only(acts)
    counts = token_counts(acts)
    child = judged_edges(parent, counts, min_tokens)
    family = torch.bincount(parent[child], minlength=acts.d_sae)
    n_pairs = int((family * (family - 1)).sum()) // 2
    if not n_pairs:
        return math.nan
    chosen = torch.zeros_like(counts, dtype=torch.bool)
    chosen[child] = True
    acts = entries(acts, chosen[acts.indices])
    a, b, both = _joint_siblings(acts, parent, cells)
    return float((both / (counts[a] + counts[b] - both)).sum()) / n_pairs


def _joint_siblings(
    acts: SparseActs, parent: Int[torch.Tensor, " d_sae"], cells: int
) -> tuple[
    Int64[torch.Tensor, " pair"], Int64[torch.Tensor, " pair"], Int64[torch.Tensor, " pair"]
]:
    """Pairs of siblings that meet anywhere, and on how many tokens."""
    families = acts.rows * acts.d_sae + parent[acts.indices]
    order = families.argsort(stable=True)  # within a family features stay ascending
    _, size = families[order].unique_consecutive(return_counts=True)
    place = torch.arange(len(order), device=order.device)
    later = size.cumsum(0).repeat_interleave(size) - place - 1
    features, tables = acts.indices[order], [place.new_zeros(0, 2)]
    for i, j in meetings(place + 1, later, cells):
        keys, both = (features[i] * acts.d_sae + features[j]).unique(return_counts=True)
        tables.append(torch.stack([keys, both], dim=1))
    keys, both = torch.cat(tables).unbind(1)
    keys, index = keys.unique(return_inverse=True)
    both = torch.zeros_like(keys).index_add_(0, index, both)
    return keys // acts.d_sae, keys % acts.d_sae, both
