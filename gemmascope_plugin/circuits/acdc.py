"""ACDC: takes edges away one by one, for good where the model hardly notices.

Conmy et al., arXiv 2304.14997, algorithm 1:

1. Readers from the logits backwards; of each reader, its edges from the latest writer to the earliest.
2. An edge is removed if that raises the divergence ``D`` by less than ``tau``; else it stays.
3. ``D`` is the divergence of the next-token distribution from the clean run's, summed over the
vocabulary,
   or, with ``measure="metric"``, how far the metric falls.

Most edges go, so the next edges are tried as if all before them had gone: a chain of circuits on the
batch axis of one pass. What is found before the first edge that stays is what trying one by one finds,
and the chain begins anew behind it.

The result depends on the order, and differs between divergence and metric: never *the* circuit.

Cost: one row per prompt and tried circuit, each edge being tried once, or again after an edge that stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.circuits.edge_ablation import EdgeAblation
from gemmascope_plugin.graphs.edge_map import EdgeMap


@dataclass(frozen=True)
class Pruned:
    """What ACDC leaves."""

    kept: Bool[torch.Tensor, "writer reader"]
    rise: Float[torch.Tensor, "writer reader"]
    """How much removing the edge raised the divergence when it was tried."""
    n_rows: int
    """Circuits that were run."""


def acdc(ablation: EdgeAblation, tau: float, *, chain: int = 16, progress: bool = False) -> Pruned:
    """Removes every edge whose removal raises the divergence by less than ``tau``.

    Args:
        ablation: The task; its metric is what is watched: ``kl_divergence`` (minus the
            divergence), or any other, whose fall counts.
        tau: The bar, in units of the metric.
        chain: Edges tried in one pass.
        progress: Show a progress bar.
    """
    from tqdm.auto import tqdm

    edges = ablation.edges
    kept, rise, n_rows = edges.mask.clone(), torch.zeros(edges.mask.shape), 1
    now = float(ablation.metric(kept[None]).mean())
    waiting = list(_order(edges))
    with tqdm(total=len(waiting), desc="ACDC", disable=not progress) as bar:
        while waiting:
            tried = waiting[:chain]
            values = ablation.metric(_chain(kept, tried)).mean(1).tolist()
            n_rows += len(tried)
            done = 0
            for (row, column), value in zip(tried, values, strict=True):
                done += 1
                rise[row, column] = now - value
                if now - value >= tau:
                    break
                kept[row, column] = False
                now = value
            waiting = waiting[done:]
            bar.update(done)
    return Pruned(kept, rise, n_rows)


def _order(edges: EdgeMap) -> Iterator[tuple[int, int]]:
    """Edges from the logits backwards, of each reader the latest writer first."""
    for column in reversed(range(len(edges.readers))):
        for row in edges.mask[:, column].nonzero().flatten().flip(0).tolist():
            yield row, column


def _chain(
    kept: Bool[torch.Tensor, "writer reader"], tried: list[tuple[int, int]]
) -> Bool[torch.Tensor, "circuit writer reader"]:
    """Circuits without the first, the first two, the first three ... of the edges."""
    chain = kept.repeat(len(tried), 1, 1)
    for i, (row, column) in enumerate(tried):
        chain[i:, row, column] = False
    return chain
