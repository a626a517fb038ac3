"""Results of one call on models of different types, as named numbers that can be compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import gemmascope_plugin as gs

Keyed = dict[Any, float]


def check_close(
    name: str, got: dict[str, Keyed], expected: dict[str, Keyed], share: float, of_gap: float
) -> None:
    """Numbers agree in norm.

    Args:
        name: Of the call.
        got: Part to numbers.
        expected: The same of the reference.
        share: Of the reference's own norm that may differ.
        of_gap: Share of the unit that each number may be off, however small it is.
    """
    assert got.keys() == expected.keys()
    for part, values in got.items():
        keys = sorted({*values, *expected[part]}, key=repr)
        # a feature at its threshold may be active in one of both only: then its part is small
        x, y = (np.array([d.get(key, 0.0) for key in keys]) for d in (values, expected[part]))
        assert np.isfinite(x).all() and np.isfinite(y).all(), f"{part} is not finite"
        allowed = share * np.linalg.norm(y) + of_gap * np.sqrt(len(keys)) * unit(name, y)
        assert np.linalg.norm(x - y) <= allowed, f"{part}: {np.linalg.norm(x - y)} > {allowed}"


def unit(name: str, values: np.ndarray) -> float:
    """What a result is measured in: for effects the gap of the metric, else its own size."""
    if name.split("/")[0] in ("evaluate", "evaluate_features", "evaluate_ranking", "stability"):
        return 1.0
    effects = (
        "_patching",
        "edge_attribution",
        "discover",
        "verify_top",
        "false_negative",
        "logit_attr",
    )
    return 20.0 if any(word in name for word in effects) else float(np.abs(values).max(initial=0))


def compared(name: str, result: Any) -> dict[str, Keyed]:
    """What is compared of a result: named numbers, each with a key of its own."""
    if name == "supernodes":
        return {}  # which features are grouped is a matter of thresholds
    if isinstance(result, gs.Graph) and result.is_trace:
        return {"targets": _edges_to_targets(result)}
    if isinstance(result, gs.tracing.Intervention):
        rows = result.targets
        return {"before": _by(rows["label"], rows["before"]), "after": _after(result)}
    if isinstance(result, gs.Graph):
        labels = result.edge_labels if result.ranks_edges else list(result.labels)
        return {"scores": _by(labels, result.unit_scores.tolist())}
    if name == "discover_levels":
        return {
            str(level): compared("", circuit.graph)["scores"] for level, circuit in result.items()
        }
    if name == "head_loadings":
        return {"whole": {"sum": float(np.abs(result.values.sum((1, 2)) / result.weights).sum())}}
    if name.startswith("qk"):
        return {"score": {"score": result.score, "capped": result.capped}}
    if hasattr(result, "faithfulness_by_size"):
        return {"faithfulness": dict(enumerate(result.faithfulness_by_size))}
    return {part: dict(enumerate(_flat(value))) for part, value in _values(result).items()}


def _edges_to_targets(graph: gs.Graph) -> Keyed:
    ids = graph.nodes["id"].to_numpy()
    dense = graph.adjacency.tocsr()
    rows = graph.where("target").nonzero()[0]
    return {
        (ids[row], ids[column]): float(dense[row, column])
        for row in rows
        for column in dense[[row], :].nonzero()[1]
    }


def _after(result: gs.tracing.Intervention) -> Keyed:
    table = result.top_tokens
    likely = table[table["after"] > 0.01]
    return _by(likely["token"], likely["after"])


def _by(keys: Any, values: Any) -> Keyed:
    return dict(zip(list(keys), map(float, values), strict=True))


def _flat(value: Any) -> list[float]:
    return np.asarray(value, dtype=np.float64).ravel().tolist()


def _values(result: Any) -> dict[str, Any]:
    """The numbers of other results."""
    if isinstance(result, torch.Tensor):
        return {"logits": result.float().softmax(-1)}
    if hasattr(result, "losses"):
        return {"losses": [getattr(result.losses, n) for n in ("clean", "spliced")]}
    names = ("values", "probabilities", "bound")
    if hasattr(result, "columns"):
        return {c: result[c].fillna(0) for c in result.columns if c in ("fvu", "l0", "f1")}
    fields = {n: getattr(result, n) for n in names if hasattr(result, n)}
    return {n: v.float() if isinstance(v, torch.Tensor) else v for n, v in fields.items()}
