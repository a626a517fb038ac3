"""Circuits of features under ablation: equal to the definition, exact at both ends."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemmascope_plugin.causes import Task, logit_diff
from gemmascope_plugin.causes.gradient.task_site import sites_of
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.circuits import Scores, discover, evaluate, evaluate_features
from gemmascope_plugin.circuits.ablation_values import ablation_values
from gemmascope_plugin.circuits.ablator import ablator
from gemmascope_plugin.circuits.feature_nodes import layout_of_graph
from gemmascope_plugin.graphs import Circuit
from tests.causes.tasks import CLEAN, CORRUPT, RIGHT, TASK, WRONG
from tests.circuits.feature_slow import ablated_metric, caches, dictionaries, metric
from tests.graphs.graphs import equal
from tests.support.rounding import TINY
from tests.tiny_models import FIRST_WORD_ID

ALL = ("features", "head", "mlp")


def found(model, **options) -> Circuit:
    """A circuit with every node that there is."""
    arguments = {
        "nodes": "features",
        "saes": dictionaries(model),
        "steps": 2,
        "edges": False,
        **options,
    }
    return discover(model, TASK, **arguments)


def run(
    circuit: Circuit, model, is_kept, rest=None, *, max_rows: int = 64, **options
) -> torch.Tensor:
    rest = torch.zeros(len(is_kept), dtype=torch.bool) if rest is None else rest
    limit = Limit(max_rows, "2 GB")
    with ablator(circuit.graph, model, dictionaries(model), limit=limit, **options) as ablate:
        return ablate(TASK.bind(model), is_kept, rest)


def masks(circuit: Circuit, n: int) -> torch.Tensor:
    """Everything, nothing, and random circuits."""
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(n, circuit.n_units, generator=generator) < 0.5
    everything = torch.ones(1, circuit.n_units, dtype=torch.bool)
    return torch.cat([everything, ~everything, random])


def test_everything_is_the_clean_run_and_nothing_the_corrupted_one(model) -> None:
    circuit = found(model, nodes=ALL, per_position=True)
    values = run(circuit, model, masks(circuit, 0))
    with torch.no_grad():
        clean, corrupt = metric(model(CLEAN)), metric(model(CORRUPT))
    assert torch.allclose(values[0], clean, atol=1e-5)
    assert torch.allclose(values[1], corrupt, atol=1e-5)
    assert float((clean - corrupt).abs().min()) > 0.01


@pytest.mark.parametrize("per_position", [False, True])
def test_any_circuit_is_what_the_definition_says(hooked2, per_position: bool) -> None:
    circuit = found(hooked2, per_position=per_position)
    is_kept = masks(circuit, 3)
    sites = sites_of(hooked2, dictionaries(hooked2))
    values = run(circuit, hooked2, is_kept)
    for mask, value in zip(is_kept, values, strict=True):
        features, errors = {}, {}
        for site in sites:
            features[site.hook] = torch.zeros(CLEAN.shape[1], site.d_sae, dtype=torch.bool)
            errors[site.hook] = torch.zeros(CLEAN.shape[1], dtype=torch.bool)
        for node, keep in zip(circuit.graph.components, mask.tolist(), strict=True):
            at = slice(None) if node.pos is None else node.pos
            if node.kind == "error":
                errors[node.site][at] = keep
            else:
                features[node.site][at, node.index] = keep
        expected = ablated_metric(hooked2, sites, CLEAN, CORRUPT, features, errors)
        assert torch.allclose(value, expected, atol=1e-5)
    assert len(values.mean(1).unique()) == len(is_kept)


def test_errors_kept_and_ablated(hooked2) -> None:
    circuit = found(hooked2, nodes=ALL)
    errors = torch.tensor([node.kind == "error" for node in circuit.graph.components])
    is_kept = masks(circuit, 2)[2:]
    assert torch.allclose(
        run(circuit, hooked2, is_kept, errors="kept"), run(circuit, hooked2, is_kept | errors)
    )
    assert torch.allclose(
        run(circuit, hooked2, is_kept, errors="ablated"), run(circuit, hooked2, is_kept & ~errors)
    )
    without = found(hooked2, nodes=ALL, errors=False)
    assert without.n_units == circuit.n_units - int(errors.sum())
    for treatment in ("as-circuit", "ablated"):
        values = run(without, hooked2, is_kept[:, ~errors], errors=treatment)
        assert torch.allclose(values, run(circuit, hooked2, is_kept & ~errors))


def test_features_that_are_in_no_graph_are_outside_and_in_the_complement_inside(hooked2) -> None:
    """A graph that lost half of its features is the whole one with these never kept, or always."""
    circuit = found(hooked2)
    is_left = torch.tensor(
        [node.kind == "error" or node.index % 2 == 0 for node in circuit.graph.components]
    )
    graph = circuit.graph
    half = replace(graph, columns={n: c[is_left.numpy()] for n, c in graph.columns.items()})
    part = Circuit(half, torch.ones(len(half), dtype=torch.bool))
    is_kept = masks(circuit, 2)[2:]
    for rest in (False, True):
        others = torch.full((2,), rest)
        values = run(part, hooked2, is_kept[:, is_left], others)
        whole = (is_kept & is_left) | (~is_left if rest else torch.zeros_like(is_left))
        assert torch.allclose(values, run(circuit, hooked2, whole, others), atol=TINY)


def test_rows_and_parts_do_not_matter(hooked2) -> None:
    circuit = found(hooked2, nodes=ALL)
    is_kept = masks(circuit, 1)
    for replacement in ("other", "mean"):
        at_once = run(circuit, hooked2, is_kept, replacement=replacement)
        row_by_row = run(circuit, hooked2, is_kept, replacement=replacement, max_rows=1)
        assert torch.allclose(row_by_row, at_once, atol=1e-5)


@pytest.mark.parametrize("replacement", ["zero", "mean", "overall_mean"])
def test_what_stands_in(hooked2, replacement) -> None:
    """Features and errors sum to the tensor, and special tokens are left alone."""
    sites = sites_of(hooked2, dictionaries(hooked2), ("head", "mlp"))
    (values,) = ablation_values(hooked2, [TASK.bind(hooked2)], sites, replacement)
    keep = CORRUPT >= FIRST_WORD_ID
    real = caches(hooked2, [site for site in sites if site.kind == "feature"], CORRUPT)
    for site in sites:
        other = values[site.hook]
        if site.kind != "feature":
            continue
        y, acts, _ = real[site.hook]
        assert other.acts is not None and other.leaves is not None
        assert torch.equal(other.leaves, CLEAN < FIRST_WORD_ID)
        if replacement == "zero":
            assert not other.acts.to_dense().any()
            bias = site.coder.bias(acts).expand(y.flatten(2).shape)
            assert torch.allclose(other.y.flatten(2), bias)
            continue
        axes = (0,) if replacement == "mean" else (0, 1)
        weight = keep[..., None].float()
        count = weight.sum(axes, True).clamp(min=1)
        for actual, expected in ((other.y.flatten(2), y.flatten(2)), (other.acts.to_dense(), acts)):
            mean = ((expected * weight).sum(axes, True) / count).expand_as(actual)
            chosen = keep if replacement == "mean" else torch.ones_like(keep)
            assert torch.allclose(actual[chosen], mean[chosen], atol=1e-5)


def test_evaluation(hooked2, tmp_path: Path) -> None:
    circuit = found(hooked2, size=8)
    options = {"saes": dictionaries(hooked2), "n_random": 1, "sizes": [circuit.n_units]}
    scores = evaluate_features(hooked2, circuit, TASK, minimality=True, **options)
    with torch.no_grad():
        clean, corrupt = (
            float(metric(hooked2(CLEAN)).mean()),
            float(metric(hooked2(CORRUPT)).mean()),
        )
    assert scores.metric_full == pytest.approx(clean, abs=1e-5)
    assert scores.metric_empty == pytest.approx(corrupt, abs=1e-5)
    assert scores.faithfulness_by_size[-1] == pytest.approx(1, abs=1e-4)
    assert scores.by_errors["kept"].metric_full == pytest.approx(clean, abs=1e-5)
    assert scores.by_errors["ablated"].metric_full == pytest.approx(clean, abs=1e-5)
    assert scores.by_errors["kept"].metadata["errors"] == "kept"
    assert scores.by_errors["as-circuit"].faithfulness == scores.faithfulness
    frame = scores.errors_to_frame()
    assert list(frame.index) == ["kept", "as-circuit", "ablated"]
    assert frame.loc["kept", "faithfulness"] == scores.by_errors["kept"].faithfulness
    assert frame["minimal"].between(0, 1).all()
    assert re.search(
        r"faithfulness \S+, \S+ with errors kept, \S+ with errors ablated", repr(scores)
    )
    assert "</table>" in scores._repr_html_() and "as-circuit" in scores._repr_html_()
    loaded = Scores.load(scores.save(tmp_path / "scores"))
    assert loaded.errors_to_frame().equals(frame) and equal(loaded.circuit, circuit)
    assert loaded.by_errors["ablated"].interval() == scores.by_errors["ablated"].interval()
    assert [*scores.to_json()["by_errors"]] == list(frame.index)
    # the complement of everything is nothing
    whole = evaluate(hooked2, circuit.top(circuit.n_units), TASK, **options)
    assert whole.completeness == pytest.approx(0, abs=1e-4)


def test_positions_of_a_template_hold_on_other_prompts(hooked2) -> None:
    circuit = found(hooked2, per_position=True, size=20)
    other = Task(CLEAN.flip(0), CORRUPT.flip(0), logit_diff(RIGHT[::-1], WRONG[::-1]))
    options = {"saes": dictionaries(hooked2), "n_random": 0, "sizes": []}
    first, second = (evaluate(hooked2, circuit, task, **options) for task in (TASK, other))
    assert first.faithfulness == pytest.approx(second.faithfulness, abs=1e-4)
    layout = layout_of_graph(circuit.graph, hooked2, dictionaries(hooked2))
    assert [node for site in layout for node in site.nodes()] == list(circuit.graph.components)
