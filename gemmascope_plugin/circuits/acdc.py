"""ACDC: takes edges away one by one, for good where the model hardly notices.

Conmy et al., arXiv 2304.14997, algorithm 1:

1. Readers from the logits backwards; of each reader, its edges from the latest writer to the earliest.
2. An edge is removed if that raises the divergence ``D`` by less than ``tau``; else it stays.
3. ``D`` is the divergence of the next-token distribution from the clean run's, summed over the
   vocabulary. :func:`acdc` takes any metric, whose fall counts.

Most edges go, so the next edges are tried as if all before them had gone: a chain of circuits on the
batch axis of one pass. What is found before the first edge that stays is what trying one by one finds,
and the chain begins anew behind it.

The result depends on the order, and differs between divergence and metric: never *the* circuit.

Cost: one row per prompt and tried circuit, each edge being tried once, or again after an edge that stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.metrics import divergence_at
from gemmascope_plugin.circuits.circuit_methods import CircuitMethod, Options
from gemmascope_plugin.circuits.edge_ablation import EdgeAblation
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.graphs.edge_map import EdgeMap, places_in
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.models.protocol import HookedModel, weights_of

TAU = 0.01
"""Rise of the divergence, in nats, that an edge must make to stay."""
_MAX_ROWS = 512


@dataclass(frozen=True)
class Acdc(CircuitMethod):
    """Keeps what ACDC leaves; the score of an edge is the rise of the divergence when it was tried."""

    def find(self, model: HookedModel, task: Task, options: Options) -> Circuit:
        """The edges that stay."""
        tau = TAU if options.tau is None else options.tau
        metric = divergence_at(task.question)
        bound = replace(task, metric=metric).bind(model)
        ablation = EdgeAblation(model, bound, options.replacement, Limit(_MAX_ROWS, options.memory))
        pruned = acdc(ablation, tau, progress=options.progress)
        details = {
            "task": task.name,
            "metric": metric.name,
            "method": self.name,
            "tau": tau,
            "replacement": options.replacement,
            "n_prompts": bound.n_prompts,
            "weights": weights_of(model),
            "circuits_run": pruned.n_rows,
        }
        graph = Graph.of_edges(ablation.edges, pruned.rise, details)
        rows, columns = places_in(graph, ablation.edges)
        return Circuit(graph, pruned.is_kept[rows, columns])


@dataclass(frozen=True)
class Pruned:
    """What ACDC leaves."""

    is_kept: Bool[torch.Tensor, "writer reader"]
    rise: Float[torch.Tensor, "writer reader"]
    """How much removing the edge raised the divergence when it was tried."""
    n_rows: int
    """Circuits that were run."""


def acdc(ablation: EdgeAblation, tau: float, *, chain: int = 16, progress: bool = False) -> Pruned:
    """Removes every edge whose removal lowers the metric by less than ``tau``, ``chain`` in a pass."""
    from tqdm.auto import tqdm

    edges = ablation.edges
    is_kept, rise, n_rows = edges.mask.clone(), torch.zeros(edges.mask.shape), 1
    now = float(ablation.metric(is_kept[None]).mean())
    waiting = list(_order(edges))
    with tqdm(total=len(waiting), desc="ACDC", disable=not progress) as bar:
        while waiting:
            tried = waiting[:chain]
            values = ablation.metric(_chain(is_kept, tried)).mean(1).tolist()
            n_rows += len(tried)
            done = 0
            for (row, column), value in zip(tried, values, strict=True):
                done += 1
                rise[row, column] = now - value
                if now - value >= tau:
                    break
                is_kept[row, column] = False
                now = value
            waiting = waiting[done:]
            bar.update(done)
    return Pruned(is_kept, rise, n_rows)


def _order(edges: EdgeMap) -> Iterator[tuple[int, int]]:
    """Edges from the logits backwards, of each reader the latest writer first."""
    for column in reversed(range(len(edges.readers))):
        for row in edges.mask[:, column].nonzero().flatten().flip(0).tolist():
            yield row, column


def _chain(
    is_kept: Bool[torch.Tensor, "writer reader"], tried: list[tuple[int, int]]
) -> Bool[torch.Tensor, "circuit writer reader"]:
    """Circuits without the first, the first two, the first three ... of the edges."""
    chain = is_kept.repeat(len(tried), 1, 1)
    for i, (row, column) in enumerate(tried):
        chain[i:, row, column] = False
    return chain


ACDC = Acdc(
    "acdc",
    "edges",
    frozenset({"units", "tau", "replacement", "memory_budget"}),
    "Conmy et al., arXiv 2304.14997",
    "one row of prompts per edge, and more after each edge that stays",
)
