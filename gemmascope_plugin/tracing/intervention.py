"""Interventions on the nodes of an attribution graph: what it predicts, and what the model does.

1. **Constrained**: attention patterns, norm scales and everything that MLPs write are held as recorded,
   but for the changed nodes. A target then moves by ``sum_s A_ts (factor_s - 1)``: the graph's direct
   effects, exactly.
2. **Free**: nothing is held; changed features get their new values in the real model, in which
   attention, norms, MLPs and errors respond. The prediction follows all paths of the graph: an explained
   feature that moves by ``d`` counts as a source that is changed by ``d / a``. How far it is from what
   happens says how much of the mechanism the graph holds.

A factor of 0 ablates a node, 2 doubles it, -1 turns it round. Features get ``factor`` times their
recorded value whatever else is changed.

Cost: two forward passes, one more where everything is held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes.gradient.slopes import ignore_bridge_norm_warning
from gemmascope_plugin.errors import EmptySelectionError
from gemmascope_plugin.graphs.frames import SHOWN
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import check_graph
from gemmascope_plugin.models.check_model import check_model
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import token_strings
from gemmascope_plugin.splice.check_saes import check_saes
from gemmascope_plugin.tracing.changed_nodes import change_hooks
from gemmascope_plugin.tracing.freeze_hooks import held_hooks
from gemmascope_plugin.tracing.run_values import Seen, observe
from gemmascope_plugin.tracing.traced_prompt import Replay

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    """What became of the explained nodes."""

    frame: pd.DataFrame
    """One row per explained node of the graph: ``id, kind, label, layer, pos, before, predicted,
    actual``; the last two are changes of its pre-activation."""
    top_tokens: pd.DataFrame
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

    def plot(self) -> Any:
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


@gate(model=check_model, graph=check_graph, dictionaries=check_saes)
def intervene(
    model: HookedModel,
    graph: Graph,
    dictionaries: Any,
    changes: Mapping[str, float],
    *,
    constrained: bool = False,
    memory_budget: int | str = "4 GB",
) -> Intervention:
    """Changes nodes of a graph in the model and compares with what the graph says.

    Args:
        model: The model that was traced.
        graph: Its graph, whole or pruned; the prediction follows the edges that it has.
        dictionaries: Those that it was traced with.
        changes: Node ids (features, errors, tokens) to factors.
        constrained: Hold everything but the changed nodes.
        memory_budget: Bytes, or ``"4 GB"``.

    Returns:
        Predicted and actual changes of all explained nodes, and the likeliest tokens before and after.

    Raises:
        EmptySelectionError: No change.
        UnknownNameError: A node that the graph or the prompt does not have, or that cannot be changed.
        TaskError: A graph of several prompts, or a direction as its target.
    """
    if not changes:
        raise EmptySelectionError("No change is given", fix="{graph.nodes.id[i]: 0.0}")
    replay = Replay.of(model, graph, dictionaries, memory_budget)
    before = observe(replay, [], frozen=constrained)
    with ignore_bridge_norm_warning():
        hooks = held_hooks(replay) if constrained else []
    hooks += change_hooks(replay, replay.sources(changes), recorded=constrained)
    after = observe(replay, hooks, frozen=constrained)
    factors = {graph.find(name): factor for name, factor in changes.items()}
    predicted = (direct if constrained else through)(graph, factors)
    return Intervention(
        _frame(replay, before, after, predicted),
        _top_tokens(replay, before, after),
        dict(changes),
        constrained,
    )


def direct(graph: Graph, factors: Mapping[int, float]) -> np.ndarray:
    """Changes of explained nodes by direct effects, ``[row]``.

    Args:
        graph: The graph.
        factors: By place in the graph.
    """
    relative = np.zeros(len(graph.nodes))
    relative[list(factors)] = np.array(list(factors.values())) - 1
    return graph.rows.matrix @ relative


def through(graph: Graph, factors: Mapping[int, float]) -> np.ndarray:
    """Changes of explained nodes over all paths of the graph, ``[row]``.

    Args:
        graph: The graph.
        factors: By place in the graph.
    """
    edges = graph.rows
    relative = np.zeros(len(graph.nodes))
    relative[list(factors)] = np.array(list(factors.values())) - 1
    values = graph.nodes["activation"].to_numpy()
    changes = np.zeros(len(edges.nodes))
    for start, stop in edges.levels:
        own = edges.nodes[start:stop]
        changes[start:stop] = edges.run(start, stop) @ relative
        free = ~np.isin(own, list(factors)) & graph.where("feature")[own]
        relative[own[free]] = changes[start:stop][free] / values[own[free]]
    return changes


def _frame(replay: Replay, before: Seen, after: Seen, predicted: np.ndarray) -> pd.DataFrame:
    graph = replay.graph
    seeds = dict(zip(replay.seed_nodes.tolist(), range(len(replay.seeds)), strict=True))
    rows = graph.rows.nodes.tolist()

    def values(seen: Seen) -> np.ndarray:
        found = [
            seen.seeds[seeds[row]] if row in seeds else seen.features[int(replay.place[row])]
            for row in rows
        ]
        return np.array(found)

    frame = graph.nodes.iloc[rows][["id", "kind", "label", "layer", "pos"]].reset_index(drop=True)
    start, end = values(before), values(after)
    return frame.assign(before=start, predicted=predicted, actual=end - start)


def _top_tokens(replay: Replay, before: Seen, after: Seen) -> pd.DataFrame:
    import pandas as pd

    old, new = (seen.logits.float().softmax(-1) for seen in (before, after))
    best = torch.maximum(old, new).topk(min(SHOWN, len(old))).indices
    words = token_strings(replay.record.model, best)
    values = {"before": old[best].tolist(), "after": new[best].tolist()}
    return pd.DataFrame({"token": words, **values})
