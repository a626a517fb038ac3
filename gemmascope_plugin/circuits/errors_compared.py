"""A circuit of features with errors kept, as the circuit has them, and with none, side by side.

Reconstruction errors carry what dictionaries miss. Keeping all of them flatters a circuit, ablating them
asks of its features what they cannot do alone; so both are reported, and between them the circuit as it
is, whose error nodes count as nodes (Marks et al., arXiv 2403.19647, section 4). Each has its own zero:
the same treatment of errors, and nothing else kept.

Cost: three evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.check_task import check_task
from gemmascope_plugin.circuits.evaluate import evaluate
from gemmascope_plugin.circuits.feature_ablation import Errors
from gemmascope_plugin.circuits.scores import Scores
from gemmascope_plugin.graphs.check_graph import check_circuit
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.models.check_model import check_model
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.check_saes import check_saes

MINIMAL = 0.01
"""A node counts where leaving it out changes faithfulness by at least this."""


@dataclass(frozen=True)
class FeatureScores:
    """How faithful a circuit of features is, under each treatment of errors."""

    kept: Scores
    """All errors kept."""
    as_circuit: Scores
    """Errors kept where the circuit has their nodes."""
    ablated: Scores
    """All errors replaced."""

    @property
    def circuit(self) -> Circuit:
        """The circuit."""
        return self.kept.circuit

    def to_frame(self) -> Any:
        """A DataFrame, one row per treatment: faithfulness, completeness, minimality, divergence, ends.

        ``minimal`` is the share of nodes whose loss changes faithfulness by ``MINIMAL`` or more; NaN
        where that was not measured.
        """
        import pandas as pd

        rows = {
            "kept": self.kept,
            "as the circuit has them": self.as_circuit,
            "ablated": self.ablated,
        }
        return pd.DataFrame({name: _row(scores) for name, scores in rows.items()}).T.rename_axis(
            "errors"
        )

    def __repr__(self) -> str:
        shares = ", ".join(
            f"{name} {scores.faithfulness:.3f}"
            for name, scores in (
                ("kept", self.kept),
                ("as the circuit has them", self.as_circuit),
                ("ablated", self.ablated),
            )
        )
        return f"FeatureScores({self.circuit.size} nodes, faithfulness with errors {shares})"

    def _repr_html_(self) -> str:
        return self.to_frame().round(3).to_html()


@gate(circuit=check_circuit, model=check_model, task=check_task, saes=check_saes)
def evaluate_features(
    circuit: Circuit, model: HookedModel, task: Task, *, saes: Any, **options: Any
) -> FeatureScores:
    """:func:`gemmascope_plugin.evaluate` under each treatment of errors.

    Args:
        circuit: From ``discover(..., nodes="features")``.
        model: The model.
        task: Held-out prompts.
        saes: The dictionaries that the circuit was found with.
        **options: As :func:`gemmascope_plugin.evaluate` has them, ``errors`` aside.

    Raises:
        TaskError: The circuit is none of features, or a metric that hardly differs.
        UnknownNameError: Other dictionaries than the circuit's.
    """
    treatments: tuple[Errors, ...] = get_args(Errors)
    found = {
        errors: evaluate(circuit, model, task, saes=saes, errors=errors, **options)
        for errors in treatments
    }
    return FeatureScores(found["kept"], found["as-circuit"], found["ablated"])


def _row(scores: Scores) -> dict[str, float]:
    changes = scores.minimality
    minimal = float("nan")
    if changes:
        minimal = sum(change >= MINIMAL for change in changes) / len(changes)
    return {
        "faithfulness": scores.faithfulness,
        "completeness": scores.completeness,
        "minimal": minimal,
        "KL": scores.kl,
        "metric full": scores.metric_full,
        "metric empty": scores.metric_empty,
    }
