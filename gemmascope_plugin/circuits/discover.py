"""Finds a circuit: scores the nodes or the edges of a model for a task, keeps the best.

* ``exact``, of nodes or edges: how far the metric falls if the unit alone is corrupted;
* ``atp``, ``ig``, ``atp*``, ``relp``, of nodes: first-order estimates of that, ``attribution_patching``;
* ``eap``, ``eap-ig``, ``eap-ig-activations``, ``clean-corrupted``, of edges: ``edge_attribution``;
* ``acdc``, of edges: the rise of the divergence when the edge was tried; kept is what ACDC leaves;
* ``ig``, ``atp``, of a circuit of features (``nodes="features"``): features, errors, and raw heads and
  MLPs, joined by edges that are not ranked, see ``feature_method.py``.

Nodes are attention heads and MLPs, at all positions at once, and features of dictionaries.  Positive
scores support the metric.  A ranking is a hypothesis: :func:`evaluate` checks it on other prompts.

Cost: that of the method, ``METHODS`` says it of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.replace import Replacement
from gemmascope_plugin.causes.task import check_task
from gemmascope_plugin.circuits.acdc import ACDC
from gemmascope_plugin.circuits.circuit_methods import (
    COMPONENTS,
    CircuitMethod,
    Options,
    Selection,
    Units,
)
from gemmascope_plugin.circuits.feature_method import FEATURE_METHODS, FEATURES
from gemmascope_plugin.circuits.scored_methods import EDGE_METHODS, NODE_METHODS
from gemmascope_plugin.errors import EmptySelectionError, TaskError, check_choice
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.graphs.graph_arrays import Labels, Rank
from gemmascope_plugin.graphs.node import check_kinds
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes

METHODS: tuple[CircuitMethod, ...] = (*NODE_METHODS, *EDGE_METHODS, ACDC, *FEATURE_METHODS)
"""All methods; what is not among these does not exist."""


@gate(model=check_model, task=check_task, saes=check_saes)
def discover(
    model: HookedModel,
    task: Task,
    *,
    nodes: str | Sequence[str] = COMPONENTS,
    saes: Saes = None,
    method: str | None = None,
    units: Units | None = None,
    size: int | None = None,
    tau: float | None = None,
    select: Selection = "top",
    rank: Rank = "absolute",
    steps: int | None = None,
    replacement: Replacement = "other",
    per_position: bool = False,
    errors: bool = True,
    edges: bool = True,
    level: int | None = None,
    labels: Labels | None = None,
    max_rows: int | None = None,
    memory_budget: int | str | None = None,
    progress: bool = False,
) -> Circuit:
    """A circuit for a task: all units ranked, the best of them kept.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        task: Clean and corrupted prompts and a metric.
        nodes: Node kinds, for circuits of nodes: ``head``, ``mlp``, ``feature``. With ``features`` among
            them a circuit of features, errors, and raw ``head`` and ``mlp`` where no dictionary is.
        saes: Dictionaries, when features are among the nodes; in circuits of features at most one at
            each place, and a :class:`HookedSAE` keeps its own level and excluded tokens.
        method: How units are scored; ``exact`` by default, ``ig`` (or ``atp``) for circuits of features.
        units: ``nodes`` or ``edges``; None for what the method scores, nodes for ``exact``.
        size: How many units to keep; half of the nodes, a tenth of the edges, 60 nodes of a circuit of
            features by default.
        tau: Keep the units with a score, as ``rank`` has it, of at least this instead; for ``acdc`` the
            bar of the divergence, .01 by default.
        select: ``top`` scores, or, of edges, ``greedy`` growth from the logits.
        rank: Which units count as the best: those of the largest ``absolute`` score, those that
            support the metric most (``positive``) or those that work against it most (``negative``).
            Tables, figures and the text of a circuit say of each unit which it does.
        steps: Points on the line, for integrated gradients alone; 10 by default.
        replacement: What stands in for a removed writer, for edges: the ``other`` (corrupted) run,
            ``zero``, ``mean`` or ``overall_mean``.
        per_position: Of features: whether each position has nodes of its own; prompts of one length
            only.
        errors: Of features: whether errors are nodes. They are part of every dictionary's site in any
            case.
        edges: Of features: whether to join the kept nodes.
        level: Of features: prefix of Matryoshka dictionaries and trees, 0 for the coarsest, -1 for the
            whole.
        labels: Of features: what they mean, see :meth:`Circuit.with_labels`.
        max_rows: Of features: most rows in one pass; 256 by default.
        memory_budget: Bytes, or ``"2 GB"``, the default, for edges and features; for ``exact`` nodes as
            :func:`~gemmascope_plugin.activation_patching` has it.
        progress: Show a progress bar.

    Returns:
        The circuit; :func:`evaluate` checks it by ablation.

    Raises:
        UnknownNameError: An unknown node kind, method, unit, selection, rank or replacement; of features
            no dictionary, two at one place, or no such level.
        TaskError: A method that does not score these units, an option that plays no part, prompts that
            cannot be compared, or a metric without a gradient.
        EmptySelectionError: ``size`` exceeds the number of units, or no feature is active.
        WidthMismatchError: A dictionary of another width than the tensor at its site.
        MissingHookError: The model lacks a dictionary's hook.
        ModelError: A dictionary over several layers, or of a tensor that is not added to the stream.
        GemmaScopeError: A model with hooks of its own, or a memory budget too small for one prompt.

    Example:
        >>> suite = gs.tiny()
        >>> task = suite.task("agreement", n=8)
        >>> circuit = gs.discover(suite.model, task, method="eap-ig", steps=5, size=20)
        >>> circuit
        Circuit(agreement, 20 of 343 edges by eap-ig: +MLP3->logits, +embed->L2KV1.k,
          +embed->MLP0, +embed->MLP1, +MLP1->L2KV1.k, +L2H3->MLP2, and 14 more)
    """
    kinds = (nodes,) if isinstance(nodes, str) else tuple(dict.fromkeys(nodes))
    of_features = FEATURES in kinds
    check_choice("selection", select, get_args(Selection))
    check_choice("rank", rank, get_args(Rank))
    options = Options(
        nodes=kinds if of_features else check_kinds(nodes),
        saes=saes,
        units=None if of_features and units == "nodes" else units,
        size=size,
        tau=tau,
        select=select,
        rank=rank,
        steps=steps,
        replacement=replacement,
        per_position=per_position,
        errors=errors,
        edges=edges,
        level=level,
        labels=labels,
        max_rows=max_rows,
        memory_budget=memory_budget,
        progress=progress,
    )
    chosen = find_method(method, units, of_features=of_features)
    chosen.refuse_unused(options, METHODS)
    return chosen.find(model, task, options)


@gate(model=check_model, task=check_task, saes=check_saes)
def discover_levels(
    model: HookedModel, task: Task, *, saes: Saes, levels: Sequence[int], **options: Any
) -> dict[int, Circuit]:
    """From coarse to fine: the circuit of a task in each level of nested dictionaries.

    A Matryoshka dictionary (arXiv 2503.17547) or a tree reconstructs from a prefix of its features. The
    prefixes are dictionaries of their own, coarse ones with few general features, so the same question
    asked level by level shows what a coarse feature is split into and what was left to errors.

    Args:
        model: The model.
        task: The task.
        saes: Nested dictionaries with these levels.
        levels: 0 for the coarsest, -1 for the whole.
        **options: As :func:`discover` has them for circuits of features, ``level`` aside.

    Returns:
        Level to circuit, in the order of ``levels``.

    Raises:
        EmptySelectionError: No level.
        UnknownNameError: A dictionary has no such level.
    """
    if not len(levels):
        raise EmptySelectionError("No level is named", fix="levels=(0, -1)")
    options = {"nodes": FEATURES, **options}
    return {level: discover(model, task, saes=saes, level=level, **options) for level in levels}


def find_method(name: str | None, units: str | None, *, of_features: bool) -> CircuitMethod:
    """The method of a name that scores the units, or an error that lists those that do."""
    if of_features:
        name = "ig" if name is None else name
        check_choice("method", name, [method.name for method in FEATURE_METHODS])
        return next(method for method in FEATURE_METHODS if method.name == name)
    name = "exact" if name is None else name
    methods = [method for method in METHODS if method.scores != FEATURES]
    check_choice("method", name, dict.fromkeys(method.name for method in methods))
    if units is not None:
        check_choice("units", units, get_args(Units))
    for method in methods:
        if method.name == name and units in (None, method.scores):
            return method
    scored = next(method.scores for method in methods if method.name == name)
    names = [method.name for method in methods if method.scores == units]
    raise TaskError(
        f"method={name!r} scores {scored}, not {units}", exists=f"{', '.join(names)} for {units}"
    )
