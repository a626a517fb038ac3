"""Ranks heads, MLPs and features of a model by their effect on a task.

1. Each node's effect is measured by noising: how much the metric falls when the node alone gets its
   corrupted value, exactly (``method="exact"``) or by one backward pass (``"attribution"``).
2. The nodes are ranked by the size of that effect; the circuit keeps the first ``size``.

Cost: that of :func:`activation_patching` or :func:`attribution_patching` per node kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemmascope_plugin.attribution import attribution_patching
from gemmascope_plugin.circuits.circuit import Circuit
from gemmascope_plugin.circuits.node import Node, check_kinds
from gemmascope_plugin.errors import check_choice
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.patching import Effects, Task, activation_patching

METHODS = ("exact", "attribution")
_COMPONENT = {"head": "z", "mlp": "mlp_out", "feature": "feature"}


def discover(
    model: HookedModel,
    task: Task,
    *,
    nodes: str | Sequence[str] = ("head", "mlp"),
    saes: Any = None,
    method: str = "exact",
    size: int | None = None,
) -> Circuit:
    """A ranked circuit for a task.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        task: Clean and corrupted prompts and a metric.
        nodes: Node kinds: ``head``, ``mlp``, ``feature``.
        saes: Dictionaries, when features are among the nodes.
        method: ``exact`` or ``attribution``.
        size: How many nodes to keep; half of them by default.

    Returns:
        The circuit; :func:`evaluate` checks it by ablation.

    Raises:
        UnknownNameError: An unknown node kind or method.
        EmptySelectionError: ``size`` exceeds the number of nodes.
    """
    kinds = check_kinds(nodes)
    check_choice("method", method, METHODS)
    measure = activation_patching if method == "exact" else attribution_patching
    found: list[tuple[Node, float]] = []
    for kind in kinds:
        effects = measure(
            model, task, _COMPONENT[kind], mode="noising", saes=saes, per_position=False
        )
        found += _drops(kind, effects)
    found.sort(key=lambda pair: -abs(pair[1]))
    metadata = {"task": task.name, "metric": task.metric.name, "method": method, "kinds": kinds}
    ranking, scores = zip(*found, strict=True)
    circuit = Circuit(ranking, scores, 0, metadata)
    return circuit.top(len(ranking) // 2 if size is None else size)


def _drops(kind: str, effects: Effects) -> list[tuple[Node, float]]:
    """Each node with the fall of the metric when it is corrupted."""
    drops = -effects.values
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
