"""Circuits of features: scores every node, keeps the best, joins them by edges.

The method is that of sparse feature circuits (Marks et al., arXiv 2403.19647), with four differences:

1. Integrated gradients at midpoints, one site at a time, of the raw tensor: features and errors write
   it linearly, so no dictionary runs in the loop (``causes/gradient/site_runs.py``).
2. Nothing is dense over a dictionary: nodes are the features that are active anywhere.
3. Transcoders, and raw heads and MLPs where no dictionary is, are sites as SAEs are.
4. What the scores of each site miss of its whole effect is in ``metadata["residual"]``.

Nodes are ranked; edges join kept nodes and are not ranked.

Cost: see ``site_runs.py`` for nodes and ``feature_edges.py`` for edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.gradient.integrated import checked_share
from gemmascope_plugin.causes.gradient.site_runs import (
    METHODS,
    PartRun,
    SiteMethod,
    run_sites,
    site_footprint,
)
from gemmascope_plugin.causes.gradient.task_site import TaskSite, sites_of
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.method import pick
from gemmascope_plugin.causes.metrics import KLDivergence
from gemmascope_plugin.circuits.circuit_methods import (
    COMPONENTS,
    SELECTING,
    CircuitMethod,
    Options,
    refuse_size_and_tau,
    select_units,
)
from gemmascope_plugin.circuits.feature_edges import find_edges
from gemmascope_plugin.circuits.feature_nodes import (
    ScoredNodes,
    residuals,
    score_nodes,
    site_summary,
)
from gemmascope_plugin.errors import TaskError, check_choice
from gemmascope_plugin.graphs.adjacency import EdgeList
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.models.points import n_heads
from gemmascope_plugin.models.protocol import HookedModel, weights_of

FEATURES = "features"
"""Among ``nodes``: a circuit of features."""
SIZE = 60
"""Nodes kept by default, at most."""
MAX_ROWS = 256
"""Rows of a pass by default."""


@dataclass(frozen=True)
class FeatureCircuits(CircuitMethod):
    """Scores features and errors of dictionaries, and raw heads and MLPs where none is."""

    def find(self, model: HookedModel, task: Task, options: Options) -> Circuit:
        """By default 60 nodes, or all if there are fewer."""
        refuse_size_and_tau(options)
        if self.name == "atp" and isinstance(task.question, KLDivergence):
            raise TaskError(
                f"The gradient of {task.question.name} is zero on the clean run, where atp takes it",
                fix='method="ig", or metric=logit_diff(answer, wrong)',
            )
        sites = sites_of(model, options.saes, _raw(options.nodes), level=options.level)
        bound = task.bind(model)
        if options.per_position:
            refuse_lengths(bound)
        limit = Limit(MAX_ROWS if options.max_rows is None else options.max_rows, options.memory)
        method = pick(METHODS, self.name, steps=options.steps)
        parts = run_sites(
            model, bound, sites, method=method, limit=limit, progress=options.progress
        )
        scored = score_nodes(
            parts,
            n_heads=n_heads(model),
            per_position=options.per_position,
            errors=options.errors,
        )
        details = {
            **_details(bound, parts, sites, method, options),
            "rank": options.rank,
            "weights": weights_of(model),
            "corrupt_only": scored.corrupt_only,
        }
        nodes = [node for site in scored.layout for node in site.nodes()]
        graph = Graph.of_nodes(nodes, scored.scores, details)
        circuit = select_units(graph, options, min(SIZE, len(nodes)))
        if options.edges:
            rows = limit.rows(site_footprint(model, bound, sites))
            circuit = _joined(model, parts, scored, circuit, self.name == "ig", rows)
        return circuit if options.labels is None else circuit.with_labels(options.labels)


def _raw(nodes: Sequence[str]) -> tuple[str, ...]:
    """The raw components beside features."""
    for kind in nodes:
        check_choice(f"node kind beside {FEATURES!r}", kind, (FEATURES, *COMPONENTS))
    return tuple(kind for kind in nodes if kind != FEATURES)


def refuse_lengths(bound: BoundTask) -> None:
    """Refuses prompts of several lengths, whose positions mean different things."""
    lengths = bound.prompt_lengths.unique().tolist()
    if len(lengths) > 1:
        raise TaskError(
            f"The prompts have {len(lengths)} different lengths, {lengths[0]} to {lengths[-1]} tokens, "
            "and nodes at positions need prompts that agree on them",
            fix="per_position=False, or prompts of one template and length",
        )


def _details(
    bound: BoundTask,
    parts: Sequence[PartRun],
    sites: Sequence[TaskSite],
    method: SiteMethod,
    options: Options,
) -> dict[str, Any]:
    """What the circuit says of itself."""
    clean, corrupt = (
        float(torch.cat(values).mean())
        for values in zip(*((p.metric_clean, p.metric_corrupt) for p in parts), strict=True)
    )
    residual = residuals(parts, clean - corrupt)
    dictionaries = [site.hooked for site in sites if site.hooked is not None]
    exclude = [token for hooked in dictionaries for token in hooked.exclude]
    details = {
        "task": bound.name,
        "metric": bound.metric.metric.name,
        "logits": bound.logits,
        "method": method.name,
        "sites": site_summary(sites),
        "per_position": options.per_position,
        "n_pos": int(bound.prompt_lengths[0]) if options.per_position else None,
        "level": options.level,
        "n_prompts": bound.n_prompts,
        "exclude": tuple(dict.fromkeys(exclude)),
        **bound.metric_values(clean, corrupt),
    }
    if residual:
        details |= {
            **asdict(method),
            "residual": residual,
            "residual_max": checked_share(max(map(abs, residual.values()))),
        }
    return details


def _joined(
    model: HookedModel,
    parts: Sequence[PartRun],
    scored: ScoredNodes,
    circuit: Circuit,
    finite_differences: bool,
    rows: int,
) -> Circuit:
    """The circuit with edges between its nodes."""
    edges = find_edges(
        model,
        parts,
        scored.layout,
        circuit.is_kept,
        finite_differences=finite_differences,
        rows=rows,
    )
    graph = circuit.graph
    joined = replace(
        graph,
        edges=EdgeList.of(edges.source, edges.target, edges.scores),
        ranked="node",
        metadata={**graph.metadata, "n_unreachable": edges.n_unreachable},
    )
    return replace(circuit, graph=joined)


_OPTIONS = SELECTING | {
    *("nodes", "saes", "per_position", "errors", "edges", "level", "labels"),
    *("max_rows", "memory_budget"),
}
FEATURE_METHODS: tuple[FeatureCircuits, ...] = tuple(
    replace(
        FeatureCircuits.by(method, FEATURES, _OPTIONS),
        cost=f"{method.cost}; for edges one of both per kept node",
    )
    for method in METHODS.values()
)
