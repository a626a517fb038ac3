"""How well scores find a known circuit.

* ``auroc``: the chance that an edge of the circuit scores above one outside it (ties count half), by
  ranks.
* ``mib_auroc``: MIB's variant, from ten circuits grown from the logits: true and false positive rates at
  these, the latter divided by its last value, no point at (0, 0).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.circuits import greedy
from gemmascope_plugin.circuits.mib import sizes_of, trapezoid
from gemmascope_plugin.errors import EmptySelectionError
from gemmascope_plugin.graphs import Graph


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
    right = [float((circuit & truth).sum() / truth.sum()) for circuit in circuits]
    wrong = [float((circuit & ~truth).sum() / (~truth).sum()) for circuit in circuits]
    return trapezoid([rate / wrong[-1] for rate in wrong], right)
