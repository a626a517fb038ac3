"""Forests over features: what is one, the one that activations give, and the table of its edges.

A forest is a tensor ``parent [d_sae]``, ``ROOT`` for features below none; following it from any feature
ends there. An edge is judged where the child is active on at least ``min_tokens`` tokens.

**Masked cosine similarity** (Tree SAE, arXiv 2605.07922, appendix I; its scaled form is that of
Matryoshka SAEs, arXiv 2503.17547):

1. ``MCS(p, c)`` is the cosine of the activations of ``p`` and ``c`` over the tokens where ``c`` is
   active. ``"scaled"``: times ``min(max_c, max_p) / max_p`` of the largest activations; ``"binary"``: of
   activations replaced by 1, which is ``sqrt(S_cov)``, the paper's choice.
2. The parent of ``c`` is its candidate with the largest MCS, the lowest index of equals, if that is at
   least ``min_mcs``. Candidates are the features of earlier levels; without levels those that are active
   on more tokens than ``c``. Hence there are no cycles.

The paper lists the best children of each parent; here each child has one parent, as in its trees.

**The table of edges**: what holds along them.

1. Activation coverage ``S_cov(p, c) = n_pc / n_c`` (equation 4 of the same paper): the share of the
   child's tokens on which the parent is active; exactly 1 where the parent gates the child.
2. Masked cosine similarity.
3. Where known, ``forest_scores.py`` adds the concepts at both ends, ``probe.py`` the probes' hits.

Cost: the meetings and tables of ``joint_sums`` (``cooccurrence.py``). The table: a few look-ups in the
active entries per active entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float64, Int, Int64

from gemmascope_plugin.errors import ModelError, WidthMismatchError, check_choice
from gemmascope_plugin.features.cooccurrence import (
    CELLS,
    active_only,
    at_same_token,
    entries,
    joint_sums,
    token_counts,
)
from gemmascope_plugin.saes import SparseActs

Similarity = Literal["cosine", "scaled", "binary"]
SIMILARITIES = ("cosine", "scaled", "binary")

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


def mcs_parents(
    acts: SparseActs,
    *,
    levels: Sequence[int] | None = None,
    similarity: Similarity = "cosine",
    min_tokens: int = 20,
    min_mcs: float = 0.5,
    cells: int = CELLS,
) -> Int64[torch.Tensor, " d_sae"]:
    """Parents by masked cosine similarity, definitions at the top of this file.

    Args:
        acts: Activations at all tokens.
        levels: Prefix sizes of a nested dictionary, the last one ``d_sae``; None for no levels.
        similarity: Which MCS.
        min_tokens: Tokens on which a feature must be active to get a parent.
        min_mcs: With no candidate from here on it gets none.
        cells: Most cells of a table, and meetings of entries, held at a time.

    Returns:
        The parent of each feature, ``ROOT`` for none.

    Raises:
        UnknownNameError: There is no such similarity.
    """
    acts = _compared(acts, similarity)
    counts, rank = token_counts(acts), candidate_rank(acts, levels)
    norms, largest = _norms(acts), _largest(acts)
    children = entries(acts, counts[acts.indices] >= min_tokens)
    mask = torch.ones_like(children.values)
    factors = [(children.values, acts.values), (mask, acts.values.double().square())]
    parent = torch.full_like(counts, ROOT)
    for block, (dot, power) in joint_sums(children, acts, factors, cells=cells):
        score = _cosine(dot, power, norms[block, None])
        if similarity == "scaled":
            score *= _shrink(largest[block, None], largest)
        score.masked_fill_(rank >= rank[block, None], -math.inf)
        best = score.max(-1)
        is_similar = (best.values >= min_mcs) & (best.values > 0)
        parent[block] = torch.where(is_similar, best.indices, ROOT)
    return parent


def candidate_rank(acts: SparseActs, levels: Sequence[int] | None) -> Int64[torch.Tensor, " d_sae"]:
    """A feature may be the parent of those with a larger rank: of later levels, or rarer ones."""
    if levels is not None and len(levels) > 1:
        bounds = torch.tensor(list(levels), device=acts.indices.device)
        features = torch.arange(acts.d_sae, device=bounds.device)
        return torch.bucketize(features, bounds, right=True)
    return (-token_counts(acts)).unique(return_inverse=True)[1]


def parent_similarity(
    acts: SparseActs, parent: Int[torch.Tensor, " d_sae"], *, similarity: Similarity = "cosine"
) -> Float64[torch.Tensor, " d_sae"]:
    """``MCS`` of each feature with its parent; 0 where they never meet, or there is no parent."""
    acts = _compared(acts, similarity)
    above = at_same_token(acts, parent[acts.indices]).double()
    similar = _cosine(_sums(acts, above * acts.values), _sums(acts, above.square()), _norms(acts))
    if similarity == "scaled":
        largest = _largest(acts)
        similar *= _shrink(largest, largest[parent])
    return similar


def _compared(acts: SparseActs, similarity: str) -> SparseActs:
    """Active entries with the numbers that a similarity compares."""
    check_choice("similarity", similarity, SIMILARITIES)
    acts = active_only(acts.detach())
    return acts.with_values(torch.ones_like(acts.values)) if similarity == "binary" else acts


def _cosine(
    dot: Float64[torch.Tensor, "*pairs"],
    power: Float64[torch.Tensor, "*pairs"],
    norm: Float64[torch.Tensor, "*#pairs"],
) -> Float64[torch.Tensor, "*pairs"]:
    """0 where the parent is silent on all of the child's tokens."""
    return torch.where(power > 0, dot / (norm * power.sqrt()), 0)


def _shrink(
    child: Float64[torch.Tensor, "*#pairs"], parent: Float64[torch.Tensor, "*#pairs"]
) -> Float64[torch.Tensor, "*pairs"]:
    """What the scaled similarity multiplies by; 0 for a parent that is never active."""
    return torch.where(parent > 0, torch.minimum(child, parent) / parent, 0)


def _norms(acts: SparseActs) -> Float64[torch.Tensor, " d_sae"]:
    return _sums(acts, acts.values.double().square()).sqrt()


def _largest(acts: SparseActs) -> Float64[torch.Tensor, " d_sae"]:
    values = acts.values.double()
    return values.new_zeros(acts.d_sae).scatter_reduce_(0, acts.indices, values, "amax")


def _sums(
    acts: SparseActs, values: Float64[torch.Tensor, " active"]
) -> Float64[torch.Tensor, " d_sae"]:
    """Sums over the entries of each feature."""
    return values.new_zeros(acts.d_sae).index_add_(0, acts.indices, values)


def edge_frame(
    acts: SparseActs,
    parent: Int[torch.Tensor, " d_sae"],
    *,
    similarity: Similarity = "cosine",
    min_tokens: int = 20,
) -> Any:
    """What holds along the edges of a forest; the table at the top of this file.

    Args:
        acts: Activations at all tokens.
        parent: The forest.
        similarity: Which masked cosine similarity.
        min_tokens: Tokens on which the child must be active.

    Returns:
        A DataFrame, one row per judged edge, by child: ``parent``, ``child``, ``n_parent`` and
        ``n_child`` (tokens on which they are active), ``coverage`` (``S_cov``) and ``mcs``.

    Raises:
        UnknownNameError: There is no such similarity.
        WidthMismatchError: Not one parent for each feature.
        ModelError: Not a forest.
    """
    import pandas as pd

    check_forest(parent, acts.d_sae)
    acts, parent = active_only(acts), parent.long()
    counts = token_counts(acts)
    is_covered = at_same_token(acts, parent[acts.indices]) > 0
    covered = torch.zeros_like(counts).index_add_(0, acts.indices, is_covered.long())
    child = judged_edges(parent, counts, min_tokens)
    parents = parent[child]
    columns = {
        "parent": parents,
        "child": child,
        "n_parent": counts[parents],
        "n_child": counts[child],
        "coverage": covered[child].double() / counts[child],
        "mcs": parent_similarity(acts, parent, similarity=similarity)[child],
    }
    return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
