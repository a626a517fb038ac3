"""Circuits of features: scores every node, keeps the best, joins them by edges.

The method is that of sparse feature circuits (Marks et al., arXiv 2403.19647), with four differences:

1. Integrated gradients at midpoints, one site at a time, of the raw tensor: features and errors write
   it linearly, so no dictionary runs in the loop (``causes/gradient/site_slopes.py``).
2. Nothing is dense over a dictionary: nodes are the features that are active anywhere.
3. Transcoders, and raw heads and MLPs where no dictionary is, are sites as SAEs are.
4. What the scores of each site miss of its whole effect is in ``metadata["residual"]``.

Nodes are ranked; edges join kept nodes and are not ranked.

Cost: see ``site_runs.py`` for nodes and ``feature_edges.py`` for edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, get_args

import torch

from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.check_task import check_task
from gemmascope_plugin.causes.gradient.site_runs import (
    PartRun,
    run_sites,
    site_footprint,
)
from gemmascope_plugin.causes.gradient.site_slopes import METHODS, SiteMethod
from gemmascope_plugin.causes.gradient.task_site import Site, sites_of
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.method import pick
from gemmascope_plugin.causes.metrics import KLDivergence
from gemmascope_plugin.causes.task import BoundTask
from gemmascope_plugin.circuits.feature_edges import find_edges
from gemmascope_plugin.circuits.feature_scoring import (
    ScoredNodes,
    residuals,
    score_nodes,
    site_summary,
)
from gemmascope_plugin.circuits.select import threshold, top_n
from gemmascope_plugin.errors import TaskError, check_choice
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.graphs.conservation import checked_share
from gemmascope_plugin.graphs.graph import Graph, Rank
from gemmascope_plugin.models.check_model import check_model
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.origin import weights_of
from gemmascope_plugin.models.points import n_heads
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.check_saes import check_saes

SIZE = 60
"""Nodes kept by default, at most."""
MAX_ROWS = 256
"""Rows of a pass by default."""
OPTIONS = ("per_position", "errors", "edges", "level", "labels", "max_rows")
"""What only circuits of features have."""


@gate(model=check_model, task=check_task, saes=check_saes)
def discover_features(
    model: HookedModel,
    task: Task,
    *,
    saes: Any,
    raw: Sequence[str] = (),
    method: str = "ig",
    size: int | None = None,
    tau: float | None = None,
    rank: Rank = "absolute",
    steps: int | None = None,
    per_position: bool = False,
    errors: bool = True,
    edges: bool = True,
    level: int | None = None,
    labels: Any = None,
    max_rows: int = MAX_ROWS,
    memory_budget: int | str = "2 GB",
    progress: bool = False,
) -> Circuit:
    """A circuit of features, errors, heads and MLPs; see :func:`gemmascope_plugin.discover`.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        task: Clean and corrupted prompts and a metric.
        saes: Dictionaries, at most one at each place; a :class:`HookedSAE` keeps its own level and
            excluded tokens.
        raw: ``head``, ``mlp`` or both: also these, where no dictionary is.
        method: ``ig`` or ``atp``.
        size: How many nodes to keep; 60 by default, or all if there are fewer.
        tau: Keep the nodes with a score, as ``rank`` has it, of at least this instead.
        rank: By ``absolute`` score, those for the metric first (``positive``), or those against it
            (``negative``).
        steps: Midpoints, for ``ig`` alone; 10 by default.
        per_position: Whether each position has nodes of its own; prompts of one length only.
        errors: Whether errors are nodes. They are part of every dictionary's site in any case.
        edges: Whether to join the kept nodes.
        level: Prefix of Matryoshka dictionaries and trees: 0 for the coarsest, -1 for the whole.
        labels: What features mean, see :meth:`Circuit.with_labels`.
        max_rows: Most rows in one pass.
        memory_budget: Bytes, or ``"2 GB"``.
        progress: Show a progress bar.

    Raises:
        UnknownNameError: An unknown method or rank, no dictionary, two at one place, no such level.
        TaskError: Prompts that cannot be compared, of several lengths with ``per_position``, or a
            metric without a gradient.
        EmptySelectionError: No feature is active, or ``size`` exceeds the number of nodes.
        WidthMismatchError: A dictionary of another width than the tensor at its site.
        MissingHookError: The model lacks a dictionary's hook.
        ModelError: A dictionary over several layers, or of a tensor that is not added to the stream.
        GemmaScopeError: A model with hooks of its own, or a memory budget too small for one prompt.
    """
    chosen = pick(METHODS, method, steps=steps)
    check_choice("rank", rank, get_args(Rank))
    _refuse(task, method, size, tau)
    sites = sites_of(model, saes, raw, level=level)
    bound = task.bind(model)
    if per_position:
        refuse_lengths(bound)
    limit = Limit(max_rows, memory_budget)
    parts = run_sites(model, bound, sites, method=chosen, limit=limit, progress=progress)
    details = _details(bound, parts, sites, chosen, per_position, level)
    details |= {"rank": rank, "weights": weights_of(model)}
    scored = score_nodes(parts, n_heads=n_heads(model), per_position=per_position, errors=errors)
    circuit = _selected(scored, details, size, tau, rank)
    if edges:
        rows = limit.rows(site_footprint(model, bound, sites))
        circuit = _joined(model, parts, scored, circuit, method == "ig", rows)
    return circuit if labels is None else circuit.with_labels(labels)


def refuse_lengths(bound: BoundTask) -> None:
    """Refuses prompts of several lengths, whose positions mean different things.

    Raises:
        TaskError: With the lengths.
    """
    lengths = bound.prompt_lengths.unique().tolist()
    if len(lengths) > 1:
        raise TaskError(
            f"The prompts have {len(lengths)} different lengths, {lengths[0]} to {lengths[-1]} tokens, "
            "and nodes at positions need prompts that agree on them",
            fix="per_position=False, or prompts of one template and length",
        )


def _refuse(task: Task, method: str, size: int | None, tau: float | None) -> None:
    """Refuses what would give zeros or nonsense.

    Raises:
        TaskError: With what to do instead.
    """
    if size is not None and tau is not None:
        raise TaskError(f"Both size={size} and tau={tau} say what to keep", fix="one of them")
    if method == "atp" and isinstance(task.asked, KLDivergence):
        raise TaskError(
            f"The gradient of {task.asked.name} is zero on the clean run, where atp takes it",
            fix='method="ig", or metric=logit_diff(answer, wrong)',
        )


def _details(
    bound: BoundTask,
    parts: Sequence[PartRun],
    sites: Sequence[Site],
    method: SiteMethod,
    per_position: bool,
    level: int | None,
) -> dict[str, Any]:
    """What the circuit says of itself."""
    clean, corrupt = (
        float(torch.cat(values).mean())
        for values in zip(*((p.metric_clean, p.metric_corrupt) for p in parts), strict=True)
    )
    ends = bound.metric_values(clean, corrupt)
    residual = residuals(parts, clean - corrupt)
    dictionaries = [site.hooked for site in sites if site.hooked is not None]
    exclude = [token for hooked in dictionaries for token in hooked.exclude]
    details = {
        "task": bound.name,
        "metric": bound.metric.metric.name,
        "logits": bound.logits,
        "method": method.name,
        "sites": site_summary(sites),
        "per_position": per_position,
        "n_pos": int(bound.prompt_lengths[0]) if per_position else None,
        "level": level,
        "n_prompts": bound.n_prompts,
        "exclude": tuple(dict.fromkeys(exclude)),
        **ends,
    }
    if residual:
        details |= {
            **asdict(method),
            "residual": residual,
            "residual_max": checked_share(max(map(abs, residual.values()))),
        }
    return details


def _selected(
    scored: ScoredNodes,
    details: dict[str, Any],
    size: int | None,
    tau: float | None,
    rank: Rank,
) -> Circuit:
    nodes = [node for site in scored.layout for node in site.nodes()]
    more = {"corrupt_only": scored.corrupt_only}
    graph = Graph.of_nodes(nodes, scored.scores, {**details, **more})
    if tau is not None:
        return threshold(graph, tau, rank=rank)
    return top_n(graph, min(SIZE, len(nodes)) if size is None else size, rank=rank)


def _joined(
    model: HookedModel,
    parts: Sequence[PartRun],
    scored: ScoredNodes,
    circuit: Circuit,
    secant: bool,
    rows: int,
) -> Circuit:
    """The circuit with edges between its nodes."""
    found = find_edges(model, parts, scored.layout, circuit.is_kept, secant=secant, rows=rows)
    graph = circuit.graph
    joined = replace(
        graph,
        source=found.source,
        target=found.target,
        port=torch.zeros(len(found.source), dtype=torch.uint8),
        edge_scores=found.scores,
        ranked="node",
        metadata={**graph.metadata, "blind": found.blind},
    )
    return replace(circuit, graph=joined)
