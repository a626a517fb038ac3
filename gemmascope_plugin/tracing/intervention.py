"""Interventions on the nodes of an attribution graph: what it predicts, and what the model does.

1. **Constrained**: attention patterns, norm scales and everything that MLPs write are held as recorded,
   but for the changed nodes. A target then moves by ``sum_s A_ts (factor_s - 1)``: the graph's direct
   effects, exactly.
2. **Free**: nothing is held; changed features get their new values in the real model, in which
   attention, norms, MLPs and errors respond. The prediction follows all paths of the graph: an explained
   feature that moves by ``d`` counts as a source that is changed by ``d / a``. How far it is from what
   happens says how much of the mechanism the graph holds.

A factor of 0 ablates a node, 2 doubles it, -1 flips its sign. Features get ``factor`` times their
recorded value whatever else is changed.

Cost: two forward passes, one more where everything is held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes.gradient.slopes import ignore_bridge_norm_warning
from gemmascope_plugin.errors import EmptySelectionError, InputError, UnknownNameError
from gemmascope_plugin.files.stored_result import TABLE, StoredResult
from gemmascope_plugin.graphs.frames import SHOWN
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import check_graph
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model, describe
from gemmascope_plugin.models.tokens import token_strings
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes
from gemmascope_plugin.tracing.changed_run import (
    RunValues,
    change_hooks,
    freeze_hooks,
    run_values,
)
from gemmascope_plugin.tracing.traced_prompt import TracedPrompt

if TYPE_CHECKING:
    import pandas as pd

    from gemmascope_plugin.figures.fragments import Figure

KINDS_CHANGED = ("feature", "error", "token")


@dataclass(frozen=True, eq=False, repr=False)
class Intervention(StoredResult):
    """Predicted and measured change of each target node."""

    noun = "intervention"

    frame: pd.DataFrame = field(metadata=TABLE)
    """One row per explained node of the graph: ``id, kind, label, layer, pos, before, predicted,
    actual``; the last two are changes of its pre-activation."""
    top_tokens: pd.DataFrame = field(metadata=TABLE)
    """The likeliest next tokens at the end of the prompt: ``token, before, after``."""
    changes: Mapping[str, float]
    constrained: bool

    @property
    def targets(self) -> pd.DataFrame:
        """The rows of logits, differences and directions."""
        return self.frame.query("kind == 'target'").reset_index(drop=True)

    @property
    def correlation(self) -> float:
        """Of predicted and actual changes over all explained nodes; NaN where one of them is constant."""
        predicted, actual = (self.frame[name].to_numpy() for name in ("predicted", "actual"))
        if len(predicted) < 2 or not predicted.std() or not actual.std():
            return float("nan")
        return float(np.corrcoef(predicted, actual)[0, 1])

    @property
    def largest_gap(self) -> float:
        """Largest difference of predicted and actual change."""
        return float((self.frame["predicted"] - self.frame["actual"]).abs().max())

    def to_frame(self) -> pd.DataFrame:
        """One row per explained node: ``id, kind, label, layer, pos, before, predicted, actual``."""
        return self.frame.copy()

    def plot(self) -> Figure:
        """Predicted against actual changes, the largest ones, as bars."""
        frame = self.frame.reindex(self.frame["actual"].abs().sort_values(ascending=False).index)
        frame = frame.head(2 * SHOWN)
        return figures.bars(
            frame["label"].astype(str).tolist(),
            frame["actual"].tolist(),
            title=repr(self),
            x_title="change of the pre-activation",
        )

    def __repr__(self) -> str:
        kind = "constrained" if self.constrained else "free"
        names = ", ".join(f"{name} x {factor:g}" for name, factor in list(self.changes.items())[:3])
        more = "" if len(self.changes) <= 3 else f" and {len(self.changes) - 3} more"
        return (
            f"Intervention({kind}: {names}{more}; correlation of predicted and actual "
            f"{self.correlation:.3f})"
        )

    def _repr_html_(self) -> str:
        tables = [
            figures.frame_html(self.targets, SHOWN),
            figures.frame_html(self.top_tokens, SHOWN),
        ]
        return f"<p>{escape(repr(self))}</p>{''.join(tables)}"


@gate(model=check_model, graph=check_graph, saes=check_saes)
def intervene(
    model: HookedModel,
    graph: Graph,
    saes: Saes,
    changes: Mapping[str, float],
    *,
    constrained: bool = False,
    memory_budget: int | str = "4 GB",
) -> Intervention:
    """Changes nodes of a graph in the model and compares with what the graph says.

    Args:
        model: The model that was traced.
        graph: Its graph, whole or pruned; the prediction follows the edges that it has.
        saes: Those that it was traced with.
        changes: Node ids (features, errors, tokens) to factors.
        constrained: Hold everything but the changed nodes.
        memory_budget: Bytes, or ``"4 GB"``.

    Returns:
        Predicted and actual changes of all explained nodes, and the likeliest tokens before and after.

    Raises:
        EmptySelectionError: No change.
        UnknownNameError: A node that the graph or the prompt does not have, or that cannot be changed.
        TaskError: A graph of several prompts, or a direction as its target.

    Example:
        >>> suite = gs.tiny()
        >>> saes = [suite.load("transcoder", layer) for layer in range(4)]
        >>> graph = gs.trace(suite.model, "the capital of the state containing dallas is", saes)
        >>> feature = graph.prune(0.5).nodes.query("kind == 'feature'").id.iloc[0]
        >>> gs.intervene(suite.model, graph, saes, {feature: 0.0})
        Intervention(free: blocks.1.hook_mlp_out/211@8 x 0; correlation of predicted and actual
          -0.016)
    """
    if not changes:
        raise EmptySelectionError("No change is given", fix="{graph.nodes.id[i]: 0.0}")
    traced = TracedPrompt.of_graph(model, graph, saes, memory_budget)
    before = run_values(traced, [], is_frozen=constrained)
    with ignore_bridge_norm_warning():
        hooks = freeze_hooks(traced) if constrained else []
    places = traced.places(graph)
    hooks += change_hooks(traced, _by_node(graph, places, changes), recorded=constrained)
    after = run_values(traced, hooks, is_frozen=constrained)
    factors = {graph.find(name): factor for name, factor in changes.items()}
    predicted = (direct if constrained else through)(graph, factors)
    return Intervention(
        _frame(graph, places, before, after, predicted),
        _top_tokens(model, before, after),
        dict(changes),
        constrained,
    )


def direct(graph: Graph, factors: Mapping[int, float]) -> Float[np.ndarray, " row"]:
    """Changes of explained nodes by direct effects, from factors by place in the graph."""
    relative = np.zeros(len(graph.nodes))
    relative[list(factors)] = np.array(list(factors.values())) - 1
    return graph.rows.matrix @ relative


def through(graph: Graph, factors: Mapping[int, float]) -> Float[np.ndarray, " row"]:
    """Changes of explained nodes over all paths of the graph, from factors by place in the graph."""
    edges = graph.rows
    relative = np.zeros(len(graph.nodes))
    relative[list(factors)] = np.array(list(factors.values())) - 1
    values = graph.nodes["activation"].to_numpy()
    changes = np.zeros(len(edges.nodes))
    for start, stop in edges.levels:
        nodes = edges.nodes[start:stop]
        changes[start:stop] = edges.run(start, stop) @ relative
        is_free = ~np.isin(nodes, list(factors)) & graph.where("feature")[nodes]
        relative[nodes[is_free]] = changes[start:stop][is_free] / values[nodes[is_free]]
    return changes


def _by_node(
    graph: Graph, places: Int64[np.ndarray, " place"], changes: Mapping[str, float]
) -> dict[int, float]:
    """Changes by node of the layout."""
    if not isinstance(changes, Mapping):
        raise InputError(
            f"{describe(changes)} does not say what is changed",
            fix="changes={node id: factor}, 0.0 for off; ids are those of graph.nodes.id",
        )
    factors = {}
    for name, factor in changes.items():
        if not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise InputError(
                f"The factor of {name!r} is {factor!r}", fix=f"changes={{{name!r}: 0.0}} for off"
            )
        place = graph.find(name)
        kind = str(graph.nodes["kind"].iloc[place])
        if kind not in KINDS_CHANGED:
            raise UnknownNameError(
                f"{name!r} is a {kind} and cannot be changed", exists=", ".join(KINDS_CHANGED)
            )
        factors[int(places[place])] = float(factor)
    return factors


def _frame(
    graph: Graph,
    places: Int64[np.ndarray, " place"],
    before: RunValues,
    after: RunValues,
    predicted: Float[np.ndarray, " row"],
) -> pd.DataFrame:
    seeds = {int(place): i for i, place in enumerate(np.flatnonzero(graph.where("target")))}
    rows = graph.rows.nodes.tolist()

    def measured(run: RunValues) -> Float[np.ndarray, " row"]:
        return np.array(
            [
                run.seeds[seeds[row]] if row in seeds else run.features[int(places[row])]
                for row in rows
            ]
        )

    frame = graph.nodes.iloc[rows][["id", "kind", "label", "layer", "pos"]].reset_index(drop=True)
    start, end = measured(before), measured(after)
    return frame.assign(before=start, predicted=predicted, actual=end - start)


def _top_tokens(model: HookedModel, before: RunValues, after: RunValues) -> pd.DataFrame:
    import pandas as pd

    old, new = (run.logits.float().softmax(-1) for run in (before, after))
    best = torch.maximum(old, new).topk(min(SHOWN, len(old))).indices
    values = {"before": old[best].tolist(), "after": new[best].tolist()}
    return pd.DataFrame({"token": token_strings(model, best), **values})
