"""The hand-built circuits are what they say: found by patching every edge and node, one at a time."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from gemmascope_plugin.graphs.node import Node
from tests.ground_truth import suppression
from tests.ground_truth.brute import Brute
from tests.ground_truth.build import ATTENTION_CAP, HARD, LOGIT_CAP
from tests.ground_truth.cases import CASES, Case

CLEAR, NOTHING = 0.05, 1e-4
"""Shares of the gap between clean and corrupted metric: a true edge has more, any other less."""
BY_NAME = {case.name: case for case in CASES}
BACKENDS = ("hooked", "bridge")


@lru_cache
def brute(name: str, backend: str, denoising: bool = False) -> Brute:
    case = BY_NAME[name]
    return Brute(case.make(backend), case.task, denoising=denoising)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_solves_the_task(case: Case, backend: str) -> None:
    model, task = case.make(backend), case.task.bind(case.make(backend))
    with torch.no_grad():
        clean, corrupt = (task.metric(model(tokens)) for tokens in (task.clean, task.corrupt))
    assert clean.min() > 2
    assert corrupt.max() < -2


@pytest.mark.parametrize("denoising", [False, True], ids=["noising", "denoising"])
def test_the_true_edges_and_no_others_matter(case: Case, denoising: bool) -> None:
    check(brute(case.name, "hooked", denoising).edges, case.true_edges)


@pytest.mark.parametrize("name", ["induction", "gate"])
def test_the_true_edges_on_the_bridge(name: str) -> None:
    check(brute(name, "bridge").edges, BY_NAME[name].true_edges)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_true_nodes_and_no_others_matter(case: Case, backend: str) -> None:
    effects = brute(case.name, backend).nodes
    assert effects[Node.embed()] == pytest.approx(1)
    check(effects, case.true_nodes)


def test_all_noise_at_once_has_no_effect_and_the_circuit_has_all(case: Case) -> None:
    run = brute(case.name, "hooked")
    assert abs(run.together(set(run.nodes) - case.true_nodes)) < NOTHING
    assert run.together(case.true_nodes - {Node.embed()}) == pytest.approx(1, abs=NOTHING)


def check(effects: dict, true: frozenset) -> None:
    assert true < effects.keys()
    for unit, effect in effects.items():
        assert abs(effect) > CLEAR if unit in true else abs(effect) < NOTHING, (unit, effect)


def test_the_brake_has_the_other_sign() -> None:
    effects = brute("suppression", "hooked").edges
    negative = {edge for edge, effect in effects.items() if effect < -CLEAR}
    assert negative == suppression.NEGATIVE


def test_noise_is_no_smaller_than_the_circuit(case: Case) -> None:
    """Whoever ranks by how much an output differs goes wrong."""
    run = brute(case.name, "hooked")
    sizes = {node: float(run.difference(node).norm()) for node in run.nodes}
    noise = {node: size for node, size in sizes.items() if node not in case.true_nodes}
    alive = [node for node, size in noise.items() if size > 0.1]
    assert len(alive) >= len(noise) - 2  # constant heads
    assert max(noise.values()) > min(sizes[node] for node in case.true_nodes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_of_head_outputs_is_normed_away(case: Case, backend: str) -> None:
    model, tokens = case.build(backend), case.task.clean
    before = model(tokens)
    outputs = [p for n, p in model.named_parameters() if "W_O" in n or "o_proj" in n]
    assert len(outputs) == model.cfg.n_layers
    with torch.no_grad():
        for weight in outputs:
            weight.mul_(10)
    torch.testing.assert_close(model(tokens), before, atol=1e-5, rtol=0)


def test_both_soft_caps_are_felt(case: Case) -> None:
    run = brute(case.name, "hooked").base
    scores = torch.cat([v.flatten() for k, v in run.items() if k.endswith("attn_scores")])
    assert 0.8 * ATTENTION_CAP < scores.max() < ATTENTION_CAP < HARD
    assert run["unembed.hook_out"].max() > LOGIT_CAP / 5


def test_heads_look_where_they_should() -> None:
    """Hard by position; softly by content, so that gradients reach queries and keys."""
    run = brute("induction", "hooked").base
    previous, induction = (run[f"blocks.{i}.attn.hook_pattern"] for i in range(2))
    assert previous[:, 1].diagonal(-1, 1, 2).min() > 1 - 1e-6
    to_b = induction[:, 2, -1, 2]
    assert 0.8 < to_b.min() <= to_b.max() < 0.98
