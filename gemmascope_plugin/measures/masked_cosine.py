"""Masked cosine similarity of features, and the forest that it gives.

Sources: Tree SAE, arXiv 2605.07922, appendix I; the scaled form is that of Matryoshka SAEs, arXiv
2503.17547.

1. ``MCS(p, c)`` is the cosine of the activations of ``p`` and ``c`` over the tokens where ``c`` is
   active. ``"scaled"``: times ``min(max_c, max_p) / max_p`` of the largest activations; ``"binary"``: of
   activations replaced by 1, which is ``sqrt(S_cov)``, the paper's choice.
2. The parent of ``c`` is its candidate with the largest MCS, the lowest index of equals, if that is at
   least ``min_mcs``. Candidates are the features of earlier levels; without levels those that are active
   on more tokens than ``c``. Hence there are no cycles.

The paper lists the best children of each parent; here each child has one parent, as in its trees.

Cost: the meetings and tables of ``joint_sums`` (``cooccurrence.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float64, Int, Int64

from gemmascope_plugin.errors import check_choice
from gemmascope_plugin.features.cooccurrence import (
    CELLS,
    active_only,
    at_same_token,
    entries,
    joint_sums,
    token_counts,
)
from gemmascope_plugin.measures.forest import ROOT
from gemmascope_plugin.saes import SparseActs

Similarity = Literal["cosine", "scaled", "binary"]
SIMILARITIES = ("cosine", "scaled", "binary")


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
    for own, (dot, power) in joint_sums(children, acts, factors, cells=cells):
        score = _cosine(dot, power, norms[own, None])
        if similarity == "scaled":
            score *= _shrink(largest[own, None], largest)
        score.masked_fill_(rank >= rank[own, None], -math.inf)
        best = score.max(-1)
        found = (best.values >= min_mcs) & (best.values > 0)
        parent[own] = torch.where(found, best.indices, ROOT)
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
    found = _cosine(_sums(acts, above * acts.values), _sums(acts, above.square()), _norms(acts))
    if similarity == "scaled":
        largest = _largest(acts)
        found *= _shrink(largest, largest[parent])
    return found


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
