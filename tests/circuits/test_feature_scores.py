"""Scores of features and errors: equal to the slow definition, conserving, the same in any batches."""

from __future__ import annotations

import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.causes import Task, logit_diff
from gemmascope_plugin.causes.gradient.task_site import sites_of
from gemmascope_plugin.circuits import discover
from gemmascope_plugin.graphs.node import Node
from tests import factories
from tests.causes.tasks import CLEAN, CORRUPT, TASK
from tests.circuits.feature_slow import caches, dictionaries, metric, spliced_effects

OPTIONS = {"nodes": "features", "edges": False, "size": 5}


def by_node(circuit) -> dict[Node, float]:
    return dict(zip(circuit.graph.components, circuit.graph.node_scores.tolist(), strict=True))


def test_integrated_gradients_are_those_of_the_spliced_model(hooked2) -> None:
    saes = dictionaries(hooked2)
    expected = spliced_effects(hooked2, saes, CLEAN, CORRUPT, steps=3)
    scores = by_node(discover(hooked2, TASK, saes=saes, steps=3, per_position=True, **OPTIONS))
    largest = 0.0
    for node, score in scores.items():
        features, errors = expected[node.site]
        chosen = errors if node.kind == "error" else features[..., node.index]
        assert score == pytest.approx(float(chosen[:, node.pos].mean()), abs=1e-5)
        largest = max(largest, abs(score))
    assert largest > 1e-3
    for site, (features, _) in expected.items():
        total = sum(
            score for node, score in scores.items() if node.site == site and node.kind != "error"
        )
        assert total == pytest.approx(float(features.mean(0).sum()), abs=1e-4)


def test_an_affine_skip_belongs_to_the_error() -> None:
    suite = gs.tiny()
    task = suite.task("agreement", n=2)
    saes = [suite.load("skip-transcoder", 1)]
    bound = task.bind(suite.model)
    circuit = discover(suite.model, task, saes=saes, steps=20, **OPTIONS)
    (site,) = sites_of(suite.model, saes)
    base, corrupted = (caches(suite.model, [site], x) for x in (bound.clean, bound.corrupt))
    assert (circuit.metadata["residual_max"]) < 0.01
    # features and error sum to the tensor, the skip of both runs included
    for y, acts, error in (base[site.hook], corrupted[site.hook]):
        assert torch.allclose(acts @ site.coder.W_dec + error, y, atol=1e-4)
    total = sum(by_node(circuit).values())
    assert total == pytest.approx(
        _whole(suite.model, site, bound, corrupted), abs=0.02 * abs(total)
    )


@torch.no_grad()
def _whole(model, site, bound, corrupted) -> float:
    """What replacing the whole tensor costs."""
    hook = (site.hook, lambda y, hook: corrupted[site.hook][0])
    clean = bound.measure(model, bound.clean)
    return float((clean - bound.measure(model, bound.clean, fwd_hooks=[hook])).mean())


@pytest.mark.parametrize(
    ("family", "method"), [("gemma2", "ig"), ("gemma3", "ig"), ("gemma3", "atp")]
)
def test_sites_conserve(family: str, method: str) -> None:
    """Scores of a site sum to its effect; aggregated ones are sums over positions."""
    options = {**OPTIONS, "nodes": ("features", "head", "mlp"), "method": method}
    model = factories.tiny_model(family, "hooked")
    saes = dictionaries(model)
    circuit = discover(model, TASK, saes=saes, **options)
    scores = by_node(circuit)
    assert {node.kind for node in scores} == {"feature", "error", "head", "mlp"}
    assert {node.layer for node in scores if node.kind == "head"} == {0, 2}
    assert {node.layer for node in scores if node.kind == "mlp"} == {0}
    placed = by_node(discover(model, TASK, saes=saes, per_position=True, **options))
    sums = dict.fromkeys(scores, 0.0)
    for node, score in placed.items():
        sums[node.at(None)] += score
    assert list(sums.values()) == pytest.approx(list(scores.values()), abs=1e-5)
    if method == "ig":
        assert circuit.metadata["residual_max"] < 0.05
        assert set(circuit.metadata["residual"]) == set(circuit.metadata["sites"])


def test_batches_do_not_matter(hooked2) -> None:
    saes = dictionaries(hooked2)
    whole = discover(hooked2, TASK, saes=saes, steps=4, **OPTIONS)
    by_row = discover(hooked2, TASK, saes=saes, steps=4, max_rows=1, **OPTIONS)
    assert by_row.graph.components == whole.graph.components
    assert torch.allclose(by_row.graph.node_scores, whole.graph.node_scores, atol=1e-5)
    assert by_row.metadata["corrupt_only"] == whole.metadata["corrupt_only"]


def test_prompts_of_several_lengths(hooked2) -> None:
    """Padding is not a token: the mean of two tasks is that of both."""
    saes = [dictionaries(hooked2)[0]]
    short = Task(CLEAN[:1, :7], CORRUPT[:1, :7], logit_diff([10], [30]))
    long = Task(CLEAN[1:], CORRUPT[1:], logit_diff([20], [40]))
    mask = torch.ones_like(CLEAN, dtype=torch.bool)
    mask[0, 7:] = False
    both = Task(CLEAN, CORRUPT, logit_diff([10, 20], [30, 40]), mask=mask)
    first, second, joint = (
        by_node(discover(hooked2, t, saes=saes, **OPTIONS)) for t in (short, long, both)
    )
    assert set(joint) == set(first) | set(second)
    for node, score in joint.items():
        mean = (first.get(node, 0) + second.get(node, 0)) / 2
        assert score == pytest.approx(mean, abs=1e-5)


def test_features_of_corrupted_runs_are_counted_and_scored(hooked2) -> None:
    (sae,) = saes = [dictionaries(hooked2)[0]]
    (site,) = sites_of(hooked2, saes)
    base, corrupted = (caches(hooked2, [site], tokens)[site.hook][1] for tokens in (CLEAN, CORRUPT))
    circuit = discover(hooked2, TASK, saes=saes, method="atp", **OPTIONS)
    new = (corrupted > 0) & (base == 0)
    features = (corrupted > 0).flatten(0, 1).any(0) & ~(base > 0).flatten(0, 1).any(0)
    assert circuit.metadata["corrupt_only"] == {
        "features": int(features.sum()),
        "entries": int(new.sum()),
    }
    assert int(features.sum()) > 0
    (index,) = features.nonzero().flatten()[:1].tolist()
    node = next(n for n in circuit.graph.components if n.kind == "feature" and n.index == index)
    # -a' <W, dm/dy> on the clean run, from a finite difference in the direction of the decoder row
    step, expected = 1e-2, torch.zeros(2)
    for row in range(2):
        for pos in corrupted[row, :, index].nonzero().flatten().tolist():
            values = []
            for sign in (1, -1):

                def nudge(y, hook, sign=sign, row=row, pos=pos):
                    y = y.clone()
                    y[row, pos] += sign * step * sae.W_dec[index]
                    return y

                with torch.no_grad(), hooked2.hooks(fwd_hooks=[(site.hook, nudge)]):
                    values.append(metric(hooked2(CLEAN))[row])
            slope = (values[0] - values[1]) / (2 * step)
            expected[row] -= corrupted[row, pos, index] * slope
    assert by_node(circuit)[node] == pytest.approx(float(expected.mean()), abs=2e-4)
