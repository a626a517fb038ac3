"""Finds a circuit: scores the nodes or the edges of a model for a task, keeps the best.

* ``exact``, of nodes or edges: how far the metric falls if the unit alone is corrupted;
* ``atp``, ``ig``, ``atp*``, ``relp``, of nodes: first-order estimates of that, ``attribution_patching``;
* ``eap``, ``eap-ig``, ``eap-ig-activations``, ``clean-corrupted``, of edges: ``edge_attribution``;
* ``acdc``, of edges: the rise of the divergence when the edge was tried; kept is what ACDC leaves;
* ``ig``, ``atp``, of a circuit of features (``nodes="features"``): features, errors, and raw heads and
  MLPs, joined by edges that are not ranked, see ``feature_circuits``.

Nodes are attention heads and MLPs, at all positions at once, and features of dictionaries.  Positive
scores support the metric.  A ranking is a hypothesis: :func:`evaluate` checks it on other prompts.

Cost: that of the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from gemmascope_plugin.causes import Effects, Task, activation_patching, attribution_patching
from gemmascope_plugin.causes.check_task import check_task
from gemmascope_plugin.causes.edge_effects import EdgeEffects
from gemmascope_plugin.causes.exact.edge_patching import edge_patching
from gemmascope_plugin.causes.gradient.edge_attribution import METHODS as EDGE_METHODS
from gemmascope_plugin.causes.gradient.edge_attribution import edge_attribution
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.metrics import kl_divergence
from gemmascope_plugin.causes.replace import Replacement
from gemmascope_plugin.circuits.acdc import acdc
from gemmascope_plugin.circuits.edge_ablation import EdgeAblation
from gemmascope_plugin.circuits.feature_discovery import OPTIONS, discover_features
from gemmascope_plugin.circuits.select import greedy, threshold, top_n
from gemmascope_plugin.errors import TaskError, check_choice
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.graphs.edge_positions import places_in
from gemmascope_plugin.graphs.graph import MAGNITUDES, Graph, Rank
from gemmascope_plugin.graphs.node import Node, check_kinds
from gemmascope_plugin.models.check_model import check_model
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.origin import weights_of
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.check_saes import check_saes

Units = Literal["nodes", "edges"]
Selection = Literal["top", "greedy"]
NODE_METHODS = ("exact", "atp", "ig", "atp*", "relp")
METHODS = tuple(dict.fromkeys((*NODE_METHODS, *EDGE_METHODS, "acdc")))
FEATURES = "features"
"""Among ``nodes``: a circuit of features."""
_COMPONENT = {"head": "z", "mlp": "mlp_out", "feature": "feature"}
STEPPED = ("ig", "eap-ig", "eap-ig-activations")
"""Methods that follow a line."""
_MAX_ROWS = 512
_MEMORY = "2 GB"


@gate(model=check_model, task=check_task, saes=check_saes)
def discover(
    model: HookedModel,
    task: Task,
    *,
    nodes: str | Sequence[str] = ("head", "mlp"),
    saes: Any = None,
    method: str | None = None,
    units: Units | None = None,
    size: int | None = None,
    tau: float | None = None,
    select: Selection = "top",
    rank: Rank = "absolute",
    steps: int | None = None,
    replacement: Replacement = "other",
    memory_budget: int | str | None = None,
    progress: bool = False,
    **features: Any,
) -> Circuit:
    """A circuit for a task: all units ranked, the best of them kept.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        task: Clean and corrupted prompts and a metric.
        nodes: Node kinds, for circuits of nodes: ``head``, ``mlp``, ``feature``. With ``features`` among
            them a circuit of features, errors, and raw ``head`` and ``mlp`` where no dictionary is.
        saes: Dictionaries, when features are among the nodes.
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
        memory_budget: Bytes, or ``"2 GB"``, the default, for edges and features; for ``exact`` nodes as
            :func:`~gemmascope_plugin.activation_patching` has it.
        progress: Show a progress bar.
        **features: For circuits of features: ``per_position``, ``errors``, ``edges``, ``level``,
            ``labels``, ``max_rows``, as :func:`~gemmascope_plugin.circuits.discover_features` has them.

    Returns:
        The circuit; :func:`evaluate` checks it by ablation.

    Raises:
        UnknownNameError: An unknown node kind, method, unit, selection, rank or replacement.
        TaskError: A method that does not score these units, an option that plays no part, or prompts
            that cannot be compared.
        EmptySelectionError: ``size`` exceeds the number of units.
    """
    if _asks_for_features(nodes, features):
        _refuse_choice(units, select, replacement)
        return discover_features(
            model,
            task,
            saes=saes,
            raw=_raw(nodes),
            method="ig" if method is None else method,
            size=size,
            tau=tau,
            rank=rank,
            steps=steps,
            memory_budget=_MEMORY if memory_budget is None else memory_budget,
            progress=progress,
            **features,
        )
    kinds, method = check_kinds(nodes), "exact" if method is None else method
    check_choice("method", method, METHODS)
    check_choice("selection", select, get_args(Selection))
    check_choice("rank", rank, get_args(Rank))
    scored = _units(method, units)
    _refuse_unused(
        scored,
        {
            "nodes": scored == "edges" and (kinds != ("head", "mlp") or saes is not None),
            "saes": scored == "nodes" and saes is not None and "feature" not in kinds,
            "select": select != "top" and (scored == "nodes" or method == "acdc"),
            "replacement": scored == "nodes" and replacement != "other",
            "size": method == "acdc" and size is not None,
            "rank": method in ("acdc", "atp*") and rank != "absolute",
            "steps": method not in STEPPED and steps is not None,
            "memory_budget": scored == "nodes" and method != "exact" and memory_budget is not None,
        },
        method,
    )
    if scored == "nodes":
        exact = {"memory_budget": memory_budget, "progress": progress}
        asked = exact if method == "exact" else {"method": method, "steps": steps}
        graph = _node_graph(model, task, kinds, saes, rank, asked)
        return _selected(graph, size, tau, "top", rank, len(graph.nodes) // 2)
    options: dict[str, Any] = {
        "replacement": replacement,
        "memory_budget": _MEMORY if memory_budget is None else memory_budget,
        "progress": progress,
    }
    if method == "acdc":
        return _acdc(model, task, 0.01 if tau is None else tau, options)
    graph = _edge_graph(model, task, method, steps, rank, options)
    return _selected(graph, size, tau, select, rank, graph.n_edges // 10)


def _edge_graph(
    model: HookedModel,
    task: Task,
    method: Any,
    steps: int | None,
    rank: Rank,
    options: dict[str, Any],
) -> Graph:
    if method == "exact":
        graph = graph_of(edge_patching(model, task, **options))
    else:
        graph = graph_of(edge_attribution(model, task, method=method, steps=steps, **options))
    return replace(graph, metadata={**graph.metadata, "rank": rank})


def _asks_for_features(nodes: str | Sequence[str], options: dict[str, Any]) -> bool:
    """Whether a circuit of features is wanted.

    Raises:
        UnknownNameError: An option that there is not.
        TaskError: Options of such circuits for another one.
    """
    for option in options:
        check_choice("option", option, OPTIONS)
    if FEATURES in ((nodes,) if isinstance(nodes, str) else nodes):
        return True
    if options:
        raise TaskError(
            f"{next(iter(options))} plays no part in circuits of {nodes!r}",
            fix='nodes="features", or without it',
        )
    return False


def _raw(nodes: str | Sequence[str]) -> tuple[str, ...]:
    """The raw components beside features.

    Raises:
        UnknownNameError: Another kind.
    """
    kinds = () if isinstance(nodes, str) else tuple(dict.fromkeys(nodes))
    for kind in kinds:
        check_choice(f"node kind beside {FEATURES!r}", kind, (FEATURES, "head", "mlp"))
    return tuple(kind for kind in kinds if kind != FEATURES)


def _refuse_choice(units: str | None, select: str, replacement: str) -> None:
    """Options of other circuits.

    Raises:
        TaskError: With the option.
    """
    unused = {
        "units": units not in (None, "nodes"),
        "select": select != "top",
        "replacement": replacement != "other",
    }
    for option, bad in unused.items():
        if bad:
            raise TaskError(
                f"{option} plays no part in circuits of features, whose nodes are ranked by "
                "corrupting them",
                fix=f"without {option}=",
            )


def graph_of(effects: EdgeEffects) -> Graph:
    """Edges with the fall of the metric as their score, whichever run was patched.

    Args:
        effects: From ``edge_attribution`` or ``edge_patching``.
    """
    sign = -1 if effects.metadata["mode"] == "noising" else 1
    known = (
        "task",
        "metric",
        "method",
        "mode",
        "replacement",
        "writer_delta",
        "steps",
        "conservation",
        "n_prompts",
        "weights",
    )
    details = {key: effects.metadata[key] for key in known if key in effects.metadata}
    return Graph.of_edges(effects.edges, sign * effects.values, details)


def _refuse_unused(scored: Units, unused: dict[str, bool], method: str) -> None:
    """Options that would change nothing are mistakes.

    Raises:
        TaskError: With the option.
    """
    for option, bad in unused.items():
        if bad:
            what = "nodes and saes choose" if option == "nodes" else f"{option} plays"
            raise TaskError(
                f"{what} no part in circuits of {scored} by {method!r}",
                fix="tau=0.01 sets what ACDC keeps" if option == "size" else f"without {option}=",
            )


def _units(method: str, asked: str | None) -> Units:
    """What is scored.

    Raises:
        UnknownNameError: Neither nodes nor edges.
        TaskError: The method does not score them.
    """
    if asked is not None:
        check_choice("units", asked, get_args(Units))
    if method == "exact":
        return "edges" if asked == "edges" else "nodes"
    scored: Units = "nodes" if method in NODE_METHODS else "edges"
    if asked not in (None, scored):
        others = [m for m in METHODS if m == "exact" or (m in NODE_METHODS) == (asked == "nodes")]
        raise TaskError(
            f"method={method!r} scores {scored}, not {asked}",
            exists=f"{', '.join(others)} for {asked}",
        )
    return scored


def _selected(
    graph: Graph,
    size: int | None,
    tau: float | None,
    select: Selection,
    rank: Rank,
    default: int,
) -> Circuit:
    if size is not None and tau is not None:
        raise TaskError(f"Both size={size} and tau={tau} say what to keep", fix="one of them")
    if tau is not None:
        return threshold(graph, tau, rank=rank)
    wanted = default if size is None else size
    choose = greedy if select == "greedy" else top_n
    return choose(graph, wanted, rank=rank)


def _acdc(model: HookedModel, task: Task, tau: float, options: dict[str, Any]) -> Circuit:
    asked = task.asked
    metric = kl_divergence(position=asked.position, before_cap=asked.before_cap)
    bound = Task(task.clean, task.corrupt, metric, task.name, task.mask).bind(model)
    limit = Limit(_MAX_ROWS, options["memory_budget"])
    ablation = EdgeAblation(model, bound, options["replacement"], limit)
    pruned = acdc(ablation, tau, progress=options["progress"])
    details = {
        "task": task.name,
        "metric": metric.name,
        "method": "acdc",
        "tau": tau,
        "replacement": options["replacement"],
        "n_prompts": bound.n_prompts,
        "weights": weights_of(model),
        "circuits_run": pruned.n_rows,
    }
    graph = Graph.of_edges(ablation.edges, pruned.rise, details)
    rows, columns = places_in(graph, ablation.edges)
    return Circuit(graph, pruned.kept[rows, columns])


def _node_graph(
    model: HookedModel,
    task: Task,
    kinds: tuple[str, ...],
    saes: Any,
    rank: Rank,
    options: dict[str, Any],
) -> Graph:
    """Nodes of some kinds, scored exactly or, with ``method`` among the options, by an estimate."""
    method, patch = options.get("method", "exact"), attribution_patching
    if method == "exact":
        patch = activation_patching
    scored: list[tuple[Node, float]] = []
    more: dict[str, Any] = {}
    for kind in kinds:
        dictionaries = {"saes": saes} if kind == "feature" else {}
        asked: dict[str, Any] = {"mode": "noising", "per_position": False, **dictionaries}
        effects = patch(model, task, _COMPONENT[kind], **asked, **options)
        scored += _drops(kind, effects, method == "atp*")  # which says sizes only
        if "residual_max" in effects.metadata:
            worst = max(more.get("residual_max", 0.0), effects.metadata["residual_max"])
            more |= {"steps": effects.metadata["steps"], "residual_max": worst}
    details = {"task": task.name, "metric": task.asked.name, "method": method, "kinds": kinds}
    details |= {"rank": rank, **more, "weights": weights_of(model)}
    details |= {"sign": MAGNITUDES} if method == "atp*" else {}
    return Graph.of_nodes([node for node, _ in scored], [drop for _, drop in scored], details)


def _drops(kind: str, effects: Effects, magnitudes: bool) -> list[tuple[Node, float]]:
    """Each node with the fall of the metric when it is corrupted, or the size of its change."""
    drops = effects.values.abs() if magnitudes else -effects.values
    if kind == "feature":
        features = effects.labels["feature"]
        return [(Node.of_feature(f), float(v)) for f, v in zip(features, drops, strict=True)]
    if kind == "mlp":
        return [(Node.mlp(layer), float(v)) for layer, v in enumerate(drops)]
    return [
        (Node.head(layer, head), float(value))
        for layer, row in enumerate(drops)
        for head, value in enumerate(row)
    ]
