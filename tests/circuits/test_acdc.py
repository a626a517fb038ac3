"""ACDC in chains equals ACDC one edge at a time, and finds hand-built circuits."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.causes import Task, kl_divergence
from gemmascope_plugin.circuits import discover
from gemmascope_plugin.circuits.acdc import acdc
from gemmascope_plugin.circuits.edge_ablation import EdgeAblation
from tests.ground_truth.cases import CASES


def one_by_one(ablation: EdgeAblation, tau: float) -> torch.Tensor:
    is_kept = ablation.edges.mask.clone()
    now = float(ablation.metric(is_kept[None]).mean())
    for column in reversed(range(is_kept.shape[1])):
        for row in reversed(range(is_kept.shape[0])):
            if not ablation.edges.mask[row, column]:
                continue
            is_kept[row, column] = False
            value = float(ablation.metric(is_kept[None]).mean())
            if now - value >= tau:
                is_kept[row, column] = True
            else:
                now = value
    return is_kept


def test_chains_are_one_by_one() -> None:
    case = CASES[3]
    model = case.make("hooked")
    task = Task(case.task.clean, case.task.corrupt, kl_divergence())
    ablation = EdgeAblation(model, task.bind(model))
    expected = one_by_one(ablation, 1e-9)
    got = acdc(ablation, 1e-9, chain=8)
    assert torch.equal(got.is_kept & ablation.edges.mask, expected)
    assert 3 < int(expected.sum()) < 80
    assert bool((got.rise[expected] >= 1e-9).all())
    assert got.n_rows >= ablation.edges.n_edges


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hand_built_circuits_are_what_is_left(case) -> None:
    circuit = discover(case.make("hooked"), case.task, method="acdc")
    assert set(circuit.edges) == case.true_edges
    assert circuit.metadata["tau"] == 0.01
    assert circuit.metadata["circuits_run"] >= circuit.n_units
