"""The edges of a forest as a table: what holds along them, what they stand for, which were hit.

1. Activation coverage ``S_cov(p, c) = n_pc / n_c`` (Tree SAE, arXiv 2605.07922, equation 4): the share of
   the child's tokens on which the parent is active; exactly 1 where the parent gates the child.
2. Masked cosine similarity (``masked_cosine.py``).
3. Where known, the concepts at both ends (``tree_recovery.py``) and the probes' hits (``probe.py``).

Cost: a few look-ups in the active entries per active entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int, Int64

from gemmascope_plugin.features.cooccurrence import active_only, at_same_token, token_counts
from gemmascope_plugin.measures.forest import check_forest, judged_edges
from gemmascope_plugin.measures.masked_cosine import Similarity, parent_similarity
from gemmascope_plugin.measures.probe import ProbedEdges
from gemmascope_plugin.measures.tree_recovery import ConceptOrder
from gemmascope_plugin.saes import SparseActs


def edge_frame(
    acts: SparseActs,
    parent: Int[torch.Tensor, " d_sae"],
    *,
    similarity: Similarity = "cosine",
    min_tokens: int = 20,
) -> Any:
    """What holds along the edges of a forest, steps 1 and 2 at the top of this file.

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
    there = at_same_token(acts, parent[acts.indices]) > 0
    covered = torch.zeros_like(counts).index_add_(0, acts.indices, there.long())
    child = judged_edges(parent, counts, min_tokens)
    own = parent[child]
    columns = {
        "parent": own,
        "child": child,
        "n_parent": counts[own],
        "n_child": counts[child],
        "coverage": covered[child].double() / counts[child],
        "mcs": parent_similarity(acts, parent, similarity=similarity)[child],
    }
    return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})


def add_concepts(
    edges: Any, order: ConceptOrder | None, stands: Int64[torch.Tensor, " d_sae"] | None
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
    edges["is_ancestor"] = _booleans([above[p][c] if min(p, c) >= 0 else None for p, c in pairs])


def add_hits(edges: Any, probed: ProbedEdges | None) -> None:
    """Adds ``hit``, whether an edge meets the reconstruction condition; NA where it was not probed."""
    found: dict[int, bool] = {}
    if probed is not None:
        found = dict(zip(probed.child.tolist(), probed.hits.tolist(), strict=True))
    edges["hit"] = _booleans([found.get(child) for child in edges["child"]])


def _booleans(values: Sequence[bool | None]) -> Any:
    """A column of Booleans, some of them NA."""
    import pandas as pd

    return pd.array(list(values), dtype="boolean")
