"""Every public function that runs a model runs in bfloat16, and says what the float32 model says.

The reference is the float32 model with the *same* weights, those of the bfloat16 one.  What differs is
then the rounding of activations alone.  A bfloat16 number has 8 binary digits, a rounding error of
``2^-9`` at most; a block rounds about a dozen times on the way of its stream (norms, projections,
softmax, products, two additions), four blocks and the unembedding some 50 times.  Errors that all point
one way add up to

    ``R = 50 * 2^-9``, about a tenth,

of a result's own norm.  An exact effect is a difference of two metrics, each a difference of logits that
are rounded themselves: however small it is, it carries ``A = 2^-8`` of the metric's gap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import gemmascope_plugin as gs
from tests.support.calls import CALLS, Scene, bundled

R, A = 50 * 2.0**-9, 2.0**-8
Keyed = dict[Any, float]
KINDS = {"hooked": torch.float32, "bridge": torch.bfloat16}
"""Model class to the type of the dictionaries beside a bfloat16 model."""


def rounded(scene: Scene) -> Scene:
    """A float32 scene with the weights of a bfloat16 one."""
    with torch.no_grad():
        for module in (scene.model, *scene.saes.values()):
            for parameter in module.parameters():
                parameter.data = parameter.data.bfloat16().float()
    return scene


@pytest.fixture(scope="module")
def reference() -> Scene:
    return rounded(bundled("hooked"))


@pytest.fixture(scope="module", params=list(KINDS))
def half(request: pytest.FixtureRequest, reference: Scene) -> Scene:
    scene = bundled(request.param, torch.bfloat16, KINDS[request.param])
    # the same circuits are evaluated in both
    for name in ("circuit", "edge_circuit", "feature_circuit"):
        scene.results[name] = getattr(reference, name)
    return scene


@pytest.mark.parametrize("name", list(CALLS))
def test_bfloat16_says_what_float32_says(name: str, half: Scene, reference: Scene) -> None:
    got, expected = (answer(name, scene) for scene in (half, reference))
    assert got.keys() == expected.keys()
    for part, values in got.items():
        keys = sorted({*values, *expected[part]}, key=repr)
        # a feature at its threshold may be active in one of both only: then its part is small
        x, y = (np.array([d.get(key, 0.0) for key in keys]) for d in (values, expected[part]))
        assert np.isfinite(x).all() and np.isfinite(y).all(), f"{part} is not finite"
        allowed = R * np.linalg.norm(y) + A * np.sqrt(len(keys)) * unit(name, y)
        assert np.linalg.norm(x - y) <= allowed, f"{part}: {np.linalg.norm(x - y)} > {allowed}"


def answer(name: str, scene: Scene) -> dict[str, Keyed]:
    """What a call gives, made once a scene."""
    return scene.once(f"answer {name}", lambda: compared(name, CALLS[name](scene)))


def unit(name: str, values: np.ndarray) -> float:
    """What a result is measured in: for effects the gap of the metric, else its own size."""
    if name.split("/")[0] in ("evaluate", "evaluate_features", "evaluate_ranking", "stability"):
        return 1.0
    effects = ("_patching", "edge_attribution", "discover", "verify_top", "missed", "logit_attr")
    return 20.0 if any(word in name for word in effects) else float(np.abs(values).max(initial=0))


def compared(name: str, result: Any) -> dict[str, Keyed]:
    """What is compared of a result: named numbers, each with a key of its own."""
    if name == "supernodes":
        return {}  # which features are grouped is a matter of thresholds
    if isinstance(result, gs.AttributionGraph):
        return {"targets": _edges_to_targets(result)}
    if isinstance(result, gs.Intervention):
        rows = result.targets
        return {"before": _by(rows["label"], rows["before"]), "after": _after(result)}
    if isinstance(result, gs.Graph):
        labels = result.edge_labels if result.ranks_edges else [n.label for n in result.nodes]
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


def _edges_to_targets(graph: gs.AttributionGraph) -> Keyed:
    ids = graph.nodes["id"].to_numpy()
    dense = graph.adjacency.tocsr()
    rows = graph.where("target").nonzero()[0]
    return {
        (ids[row], ids[column]): float(dense[row, column])
        for row in rows
        for column in dense[[row], :].nonzero()[1]
    }


def _after(result: gs.Intervention) -> Keyed:
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
    found = {n: getattr(result, n) for n in names if hasattr(result, n)}
    return {n: v.float() if isinstance(v, torch.Tensor) else v for n, v in found.items()}
