"""How well scores find a known circuit, and how stable the best edges are.

* ``auroc``: the chance that an edge of the circuit scores above one outside it (ties count half), by
ranks.
* ``mib_auroc``: MIB's variant, from ten circuits grown from the logits: true and false positive rates at
  these, the latter divided by its last value, no point at (0, 0).
* ``jaccard``: overlap of two sets.
* ``bootstrap_stability``: mean overlap of the best ``k`` edges between resamples of the prompts.

Cost: sorts.
"""

from __future__ import annotations

from itertools import combinations

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes.edge_effects import EdgeEffects
from gemmascope_plugin.circuits.mib import sizes_of, trapezoid
from gemmascope_plugin.circuits.select import greedy
from gemmascope_plugin.errors import EmptySelectionError, TaskError
from gemmascope_plugin.graphs.graph import Graph


def auroc(scores: Float[torch.Tensor, " unit"], truth: Bool[torch.Tensor, " unit"]) -> float:
    """Area under the ROC curve of absolute scores.

    Args:
        scores: One score per unit; their absolute values rank.
        truth: True for the units of the known circuit.

    Raises:
        EmptySelectionError: All units are in the circuit, or none.
    """
    n_true, n_false = int(truth.sum()), int((~truth).sum())
    if not n_true or not n_false:
        raise EmptySelectionError(f"The known circuit has {n_true} of {len(truth)} units")
    import pandas as pd

    ranks = pd.Series(scores.detach().abs().cpu().tolist()).rank().to_numpy()
    above = float(ranks[truth.cpu().numpy()].sum()) - n_true * (n_true + 1) / 2
    return above / (n_true * n_false)


def mib_auroc(graph: Graph, truth: Bool[torch.Tensor, " edge"]) -> float:
    """MIB's area under the ROC curve: greedy circuits at its ten sizes.

    Args:
        graph: A graph with edges.
        truth: True for the edges of the known circuit.

    Raises:
        EmptySelectionError: All edges are in the circuit, or none.
    """
    if bool(truth.all()) or not bool(truth.any()):
        raise EmptySelectionError(f"The known circuit has {int(truth.sum())} of {len(truth)} edges")
    circuits = [greedy(graph, n).is_kept for n in sizes_of(graph.n_edges)]
    found = [float((kept & truth).sum() / truth.sum()) for kept in circuits]
    wrong = [float((kept & ~truth).sum() / (~truth).sum()) for kept in circuits]
    return trapezoid([rate / wrong[-1] for rate in wrong], found)


def jaccard(one: Bool[torch.Tensor, " unit"], other: Bool[torch.Tensor, " unit"]) -> float:
    """Size of the intersection over size of the union; 1 for two empty sets."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def bootstrap_stability(
    effects: EdgeEffects, k: int, *, n: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Mean and smallest Jaccard overlap of the best ``k`` edges between resamples of the prompts.

    Args:
        effects: Edge effects with ``by_prompt``.
        k: How many edges.
        n: Resamples.
        seed: Of the resampling.

    Raises:
        TaskError: The effects of single prompts were not kept, or there is only one prompt.
        EmptySelectionError: ``k`` is not among 1 to the number of edges.
    """
    by_prompt = effects.by_prompt
    if by_prompt is None or len(by_prompt) < 2:
        raise TaskError(
            f"{effects!r} has no effects of several prompts",
            fix="edge_attribution(..., by_prompt=True) on two prompts or more",
        )
    flat = by_prompt[:, effects.edges.mask].cpu()
    if not 1 <= k <= flat.shape[1]:
        raise EmptySelectionError(f"The best {k} edges", exists=f"1 to {flat.shape[1]} edges")
    generator = torch.Generator().manual_seed(seed)
    best = torch.zeros(n, flat.shape[1], dtype=torch.bool)
    for row in best:
        draw = torch.randint(len(flat), (len(flat),), generator=generator)
        row[flat[draw].mean(0).abs().topk(k).indices] = True
    overlaps = [jaccard(best[i], best[j]) for i, j in combinations(range(n), 2)]
    return sum(overlaps) / len(overlaps), min(overlaps)
