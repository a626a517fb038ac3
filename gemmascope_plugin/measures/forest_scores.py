"""How far a forest over features is the hierarchy of known concepts, and how far siblings overlap.

1. Known concepts: those that hold on at least ``min_tokens`` tokens, concepts with the same tokens taken
   as one. ``P`` is above ``C`` where every token of ``C`` is one of ``P`` and ``P`` has more tokens.
2. A feature stands for the concept with the best F1, if that is at least ``min_f1``
   (``features/cooccurrence.py``).
3. Precision: of the judged edges with a concept at both ends, the share whose parent's concept is above
   the child's. ``edge_recovery``: of all judged edges, an end without a concept counting as a miss.
4. Recall: of the concepts that some feature stands for and that have a concept above them that some
   feature stands for, the share for which a feature of the one is an ancestor, at any distance, of a
   feature of the other.
5. Chance: the same after every judged edge is given a parent drawn from the parents of all judged edges,
   among those that could be the child's (of an earlier level, or more frequent); mean of several draws.
6. Overlap of siblings (Tree SAE, arXiv 2605.07922, section 6.3): ``|A & B| / |A | B|`` of their token
   sets, the mean over all pairs of children of one feature; children of the root are not siblings.

Cost: the meetings of features and concepts, of concepts, and of siblings (``cooccurrence.py``); each draw
a few passes over the features per level of depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int, Int64

from gemmascope_plugin.features.cooccurrence import (
    CELLS,
    active_only,
    entries,
    joint_counts,
    meetings,
    token_counts,
)
from gemmascope_plugin.features.stream import check_names
from gemmascope_plugin.measures.forest import ROOT, judged_edges
from gemmascope_plugin.saes import SparseActs

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class ConceptOrder:
    """Known concepts and which is above which."""

    names: tuple[str, ...]
    holds: Bool[torch.Tensor, "token concept"]
    above: Bool[torch.Tensor, "concept concept"]
    """``above[P, C]``: the tokens of ``C`` are some of the tokens of ``P``."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Agreement of a forest with the order of concepts; NaN where there is nothing to agree with."""

    precision: float
    recall: float
    edge_recovery: float
    n_labelled: float | int
    """Judged edges with a concept at both ends; a mean over draws for the chance level."""
    n_children: int
    """Concepts that recall is about."""

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 where no edge is right."""
        if math.isnan(self.recall):
            return math.nan
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both > 0 else 0.0


def concept_order(
    concepts: Bool[torch.Tensor, "token concept"], names: Sequence[str], *, min_tokens: int = 20
) -> ConceptOrder:
    """The known concepts and their partial order, step 1 at the top of this file.

    Args:
        concepts: Where each concept holds.
        names: One name per concept; of equal concepts the first one's is kept.
        min_tokens: Tokens on which a concept must hold.

    Raises:
        ModelError: Names and concepts differ in number.
    """
    check_names(concepts, names)
    marks = SparseActs.from_dense(concepts.float())
    both = torch.zeros(len(names), len(names), dtype=torch.long, device=concepts.device)
    for features, counts in joint_counts(marks, marks):
        both[features] = counts
    n = both.diagonal()
    within = both == n  # [P, C]: all tokens of C are tokens of P
    first = (within & within.T).long().argmax(0)
    is_first = (n >= max(min_tokens, 1)) & (first == torch.arange(len(n), device=n.device))
    above = (within & (n[:, None] > n))[is_first][:, is_first]
    labels = [name for name, stays in zip(names, is_first.tolist(), strict=True) if stays]
    return ConceptOrder(tuple(labels), concepts[:, is_first], above)


def tree_recovery(
    parent: Int[torch.Tensor, " d_sae"],
    judged: Int64[torch.Tensor, " edge"],
    concept: Int64[torch.Tensor, " d_sae"],
    above: Bool[torch.Tensor, "concept concept"],
) -> Recovery:
    """Precision and recall of a forest, steps 3 and 4 at the top of this file.

    Args:
        parent: The forest.
        judged: Children of the edges that are judged.
        concept: What each feature stands for, -1 for nothing.
        above: The order of concepts.
    """
    right, labelled = _right(parent, judged, concept, above)
    stands = concept.unique()
    stands = stands[stands >= 0]
    is_needed = torch.zeros(len(above), dtype=torch.bool, device=above.device)
    is_needed[stands] = above[stands][:, stands].any(0)
    is_recalled = _recalled(parent, concept, above) & is_needed
    n_right, n_labelled = int(right.sum()), int(labelled.sum())
    return Recovery(
        precision=_share(n_right, n_labelled),
        recall=_share(int(is_recalled.sum()), int(is_needed.sum())),
        edge_recovery=_share(n_right, len(judged)),
        n_labelled=n_labelled,
        n_children=int(is_needed.sum()),
    )


def chance_recovery(
    parent: Int[torch.Tensor, " d_sae"],
    judged: Int64[torch.Tensor, " edge"],
    concept: Int64[torch.Tensor, " d_sae"],
    above: Bool[torch.Tensor, "concept concept"],
    rank: Int64[torch.Tensor, " d_sae"],
    *,
    n_draws: int = 20,
    seed: int = 0,
) -> Recovery:
    """The same with random parents, step 5 at the top of this file.

    Args:
        parent: The forest.
        judged: Children of the edges that are judged.
        concept: What each feature stands for, -1 for nothing.
        above: The order of concepts.
        rank: A feature could be the parent of those with a larger rank.
        n_draws: Forests drawn.
        seed: Of the draws.
    """
    rng = torch.Generator().manual_seed(seed)
    draws = [
        tree_recovery(redrawn(parent, judged, rank, rng), judged, concept, above)
        for _ in range(n_draws)
    ]

    def mean(name: str) -> float:
        values: list[float] = [getattr(draw, name) for draw in draws]
        numbers = [value for value in values if not math.isnan(value)]
        return sum(numbers) / len(numbers) if numbers else math.nan

    return Recovery(
        precision=mean("precision"),
        recall=mean("recall"),
        edge_recovery=mean("edge_recovery"),
        n_labelled=mean("n_labelled"),
        n_children=draws[0].n_children,
    )


def redrawn(
    parent: Int[torch.Tensor, " d_sae"],
    judged: Int64[torch.Tensor, " edge"],
    rank: Int64[torch.Tensor, " d_sae"],
    rng: torch.Generator,
) -> Int64[torch.Tensor, " d_sae"]:
    """The forest with each judged edge's parent drawn from those of all that have a smaller rank."""
    pool = parent[judged].long()
    pool = pool[rank[pool].argsort(stable=True)]
    possible = torch.searchsorted(rank[pool].contiguous(), rank[judged].contiguous())
    assert bool((possible > 0).all()), "an edge's own parent has a smaller rank"
    share = torch.rand(len(judged), generator=rng, dtype=torch.float64).to(pool.device)
    drawn = parent.long().clone()
    drawn[judged] = pool[(share * possible).long()]
    return drawn


def _right(
    parent: Int[torch.Tensor, " d_sae"],
    child: Int64[torch.Tensor, " edge"],
    concept: Int64[torch.Tensor, " d_sae"],
    above: Bool[torch.Tensor, "concept concept"],
) -> tuple[Bool[torch.Tensor, " edge"], Bool[torch.Tensor, " edge"]]:
    """Where a parent's concept is above its child's, and where both have one."""
    high, low = concept[parent[child]], concept[child]
    labelled = (high >= 0) & (low >= 0)
    right = labelled.clone()
    right[labelled] = above[high[labelled], low[labelled]]
    return right, labelled


def _recalled(
    parent: Int[torch.Tensor, " d_sae"],
    concept: Int64[torch.Tensor, " d_sae"],
    above: Bool[torch.Tensor, "concept concept"],
) -> Bool[torch.Tensor, " concept"]:
    """Concepts with a feature that has an ancestor whose concept is above them."""
    is_recalled = torch.zeros(len(above), dtype=torch.bool, device=above.device)
    line = parent.long()
    while bool((line != ROOT).any()):
        feature = ((line != ROOT) & (concept >= 0)).nonzero()[:, 0]
        high, low = concept[line[feature]], concept[feature]
        low, high = low[high >= 0], high[high >= 0]
        is_recalled[low[above[high, low]]] = True
        line = torch.where(line == ROOT, ROOT, parent[line])
    return is_recalled


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def add_concepts(
    edges: DataFrame, order: ConceptOrder | None, stands: Int64[torch.Tensor, " d_sae"] | None
) -> None:
    """Adds ``parent_concept``, ``child_concept`` (None for none) and ``is_ancestor`` (NA then)."""
    import pandas as pd

    names: Sequence[str] = () if order is None else order.names
    above: list[list[bool]] = [] if order is None else order.above.tolist()
    of = {} if stands is None else dict(enumerate(stands.tolist()))
    pairs = [
        (of.get(p, -1), of.get(c, -1)) for p, c in zip(edges["parent"], edges["child"], strict=True)
    ]
    for place, column in enumerate(("parent_concept", "child_concept")):
        values = [names[pair[place]] if pair[place] >= 0 else None for pair in pairs]
        edges[column] = pd.Series(values, dtype=object)
    edges["is_ancestor"] = pd.array(
        [above[p][c] if min(p, c) >= 0 else None for p, c in pairs], dtype="boolean"
    )


def sibling_overlap(
    acts: SparseActs,
    parent: Int[torch.Tensor, " d_sae"],
    *,
    min_tokens: int = 20,
    cells: int = CELLS,
) -> float:
    """Mean overlap of the token sets of siblings, step 6 at the top of this file.

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
