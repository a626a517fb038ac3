"""Faithfulness by ablation equals one forward pass of the bare model per circuit."""

from __future__ import annotations

from random import Random

import pytest
import torch

from gemmascope_plugin.causes import FeatureId, Task, logit_diff
from gemmascope_plugin.causes.components import patchable
from gemmascope_plugin.circuits import discover, evaluate, top_n
from gemmascope_plugin.circuits.ablator import node_metric
from gemmascope_plugin.errors import EmptySelectionError, TaskError, UnknownNameError
from gemmascope_plugin.graphs import Circuit, Graph
from gemmascope_plugin.graphs.node import Node
from gemmascope_plugin.models import flatten_heads
from tests import factories
from tests.causes.tasks import CLEAN, CORRUPT, TASK, metric_under, score, values_at, with_features
from tests.factories import n_hooks
from tests.splice.reference import features

SITE = "blocks.0.hook_resid_post"
HEADS = [Node.head(layer, head) for layer in range(3) for head in range(4)]
MLPS = [Node.mlp(layer) for layer in range(3)]
FEATURES = [Node.of_feature(FeatureId(SITE, i)) for i in range(0, 96, 3)]
NODES = (*HEADS, *MLPS, *FEATURES)


def slow(model, members: list[Node], sae=None, nodes=NODES) -> float:
    """The metric on clean prompts with every other node at its corrupted value."""
    out = [node for node in nodes if node not in members]
    hooks = {}
    for node in (node for node in out if node.kind != "feature"):
        corrupt = values_at(model, CORRUPT, node.hook)
        hooks.setdefault(node.hook, []).append((node, corrupt))
    functions = {name: replacing(parts) for name, parts in hooks.items()}
    indices = [node.index for node in out if node.kind == "feature"]
    if indices:
        wanted = features(sae, flatten_heads(values_at(model, CORRUPT, SITE)))
        functions[SITE] = with_features(sae, indices, wanted, CLEAN)
    return metric_under(model, CLEAN, functions)


def replacing(parts):
    def change(x):
        x = x.clone()
        for node, corrupt in parts:
            if node.kind == "mlp":
                x[:] = corrupt
            else:
                x[:, :, node.index] = corrupt[:, :, node.index]
        return x

    return change


def circuit(nodes=NODES, size: int = 0) -> Circuit:
    return top_n(Graph.of_nodes(nodes, [float(len(nodes) - i) for i in range(len(nodes))]), size)


def random_circuits(n: int) -> list[list[Node]]:
    rng = Random(0)
    return [rng.sample(NODES, rng.randrange(1, len(NODES))) for _ in range(n)]


def test_random_circuits_equal_one_pass_each(model) -> None:
    sae = factories.residual(model, 0)
    circuits = [[], list(NODES), list(FEATURES), [*HEADS, *MLPS], *random_circuits(4)]
    masks = torch.tensor([[node in members for node in NODES] for members in circuits])
    with torch.no_grad(), patchable(model, "feature", sae) as runner:
        got = node_metric(runner, TASK.bind(model), NODES, masks, max_rows=64).mean(1)
    expected = [slow(model, members, sae) for members in circuits]
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05


@pytest.mark.parametrize("max_rows", [1, 4, 512])
def test_faithfulness_puts_the_metric_on_a_scale(hooked2, max_rows: int) -> None:
    nodes = (*HEADS[::-1], *MLPS)
    scores = evaluate(hooked2, circuit(nodes, 5), TASK, n_random=3, max_rows=max_rows)
    full, empty = slow(hooked2, list(nodes), nodes=nodes), slow(hooked2, [], nodes=nodes)
    assert scores.metric_full == pytest.approx(full, abs=1e-5)
    assert scores.metric_empty == pytest.approx(empty, abs=1e-5)
    for n in (0, 1, 5, 14, 15):
        share = (slow(hooked2, list(nodes[:n]), nodes=nodes) - empty) / (full - empty)
        got = scores.faithfulness_by_size[scores.sizes.index(n)]
        assert got == pytest.approx(share, abs=1e-4)
    assert scores.faithfulness == scores.faithfulness_by_size[5]
    assert len(scores.random) == 3


def test_all_nodes_are_the_clean_run_and_none_is_measured_too(model) -> None:
    scores = evaluate(model, circuit((*HEADS, *MLPS), 15), TASK, sizes=[0], n_random=2)
    with torch.no_grad():
        assert scores.metric_full == pytest.approx(score(model(CLEAN)), abs=1e-5)
    assert scores.sizes == (0, 15)
    assert scores.faithfulness_by_size == pytest.approx((0.0, 1.0), abs=1e-5)
    assert scores.random_by_size == ((pytest.approx(0.0),) * 2, (pytest.approx(1.0),) * 2)


def test_random_circuits_are_reproducible(hooked2) -> None:
    first, again, other = (
        evaluate(hooked2, circuit((*HEADS, *MLPS), 5), TASK, sizes=[5], seed=seed)
        for seed in (0, 0, 1)
    )
    assert first.random == again.random
    assert first.random != other.random
    assert len(first.random) == 20


def test_circuits_that_are_there_twice_run_once(hooked2, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[torch.Tensor] = []

    def counted(runner, bound, nodes, is_kept, **options):
        ran.append(is_kept)
        return node_metric(runner, bound, nodes, is_kept, **options)

    monkeypatch.setattr("gemmascope_plugin.circuits.ablator.node_metric", counted)
    scores = evaluate(hooked2, circuit((*HEADS, *MLPS), 15), TASK, sizes=[0, 15], n_random=3)
    assert [len(is_kept) for is_kept in ran] == [2, 1]  # all and nothing; the divergence
    assert scores.faithfulness_by_size == (0, 1)
    assert scores.random_by_size == ((0, 0, 0), (1, 1, 1))


def test_both_classes_agree() -> None:
    nodes = (*HEADS, *MLPS, *FEATURES)
    sae = factories.residual(factories.tiny_model("gemma3", "hooked"), 0)
    first, other = (
        evaluate(
            factories.tiny_model("gemma3", backend),
            circuit(nodes, 9),
            TASK,
            saes=sae,
            sizes=[3, 9],
            n_random=2,
        )
        for backend in ("hooked", "bridge")
    )
    assert first.faithfulness_by_size == pytest.approx(other.faithfulness_by_size, abs=1e-4)


def test_nothing_is_left_behind(model) -> None:
    hooks = n_hooks(model)
    evaluate(model, circuit(size=3), TASK, saes=factories.residual(model, 0), sizes=[3], n_random=1)
    assert n_hooks(model) == hooks


@pytest.mark.parametrize("size", [-1, 16])
def test_a_size_that_does_not_exist_is_an_error(hooked2, size: int) -> None:
    with pytest.raises(EmptySelectionError, match=f"circuit of {size} nodes.*15 nodes"):
        evaluate(hooked2, circuit((*HEADS, *MLPS), 5), TASK, sizes=[size])


def test_features_need_their_dictionaries(hooked2) -> None:
    with pytest.raises(UnknownNameError, match=r"has features.*saes=\[the same dictionaries\]"):
        evaluate(hooked2, circuit(size=3), TASK)


def test_nodes_without_any_effect_are_an_error(hooked2) -> None:
    late = Task(CLEAN, CORRUPT, logit_diff([10, 20], [30, 40], position=0))
    with pytest.raises(TaskError, match="with everything and .* with nothing kept"):
        evaluate(hooked2, circuit((*HEADS, *MLPS), 3), late)


def test_completeness_divergence_minimality_and_an_interval(hooked2) -> None:
    """Each from its definition, on the bare model."""
    nodes = (*HEADS, *MLPS)
    scores = evaluate(hooked2, circuit(nodes, 4), TASK, sizes=[4], n_random=0, minimality=True)
    full, empty = slow(hooked2, list(nodes), nodes=nodes), slow(hooked2, [], nodes=nodes)
    rest = (slow(hooked2, list(nodes[4:]), nodes=nodes) - empty) / (full - empty)
    assert scores.completeness == pytest.approx(rest, abs=1e-4)
    alone = slow(hooked2, list(nodes[:4]), nodes=nodes)
    without = [
        slow(hooked2, [n for n in nodes[:4] if n != node], nodes=nodes) for node in nodes[:4]
    ]
    expected = [abs((value - alone) / (full - empty)) for value in without]
    assert list(scores.minimality) == pytest.approx(expected, abs=1e-4)
    low, high = scores.interval(n=200)
    assert low <= scores.faithfulness <= high
    parts: dict = {}
    for node in nodes[4:]:
        parts.setdefault(node.hook, []).append((node, values_at(hooked2, CORRUPT, node.hook)))
    functions = {name: replacing(pairs) for name, pairs in parts.items()}
    with torch.no_grad():
        hooks = [(name, lambda x, hook, fn=fn: fn(x.clone())) for name, fn in functions.items()]
        with hooked2.hooks(fwd_hooks=hooks):
            q = torch.distributions.Categorical(logits=hooked2(CLEAN)[:, -1])
        p = torch.distributions.Categorical(logits=hooked2(CLEAN)[:, -1])
    kl = float(torch.distributions.kl_divergence(p, q).mean())
    assert scores.kl == pytest.approx(kl, abs=1e-5)


@pytest.mark.parametrize("replacement", ["zero", "mean", "overall_mean"])
def test_other_replacements(hooked2, replacement: str) -> None:
    nodes = (*HEADS, *MLPS)
    scores = evaluate(hooked2, circuit(nodes, 4), TASK, sizes=[4], replacement=replacement)
    values = {name: values_at(hooked2, CORRUPT, name) for name in {n.hook for n in nodes}}
    axes = {"zero": None, "mean": (0,), "overall_mean": (0, 1)}[replacement]
    means = {
        name: torch.zeros_like(x) if axes is None else x.mean(axes, keepdim=True).expand_as(x)
        for name, x in values.items()
    }
    hooks = {
        name: replacing([(node, x) for node in nodes[4:] if node.hook == name])
        for name, x in means.items()
    }
    metric = metric_under(
        hooked2, CLEAN, {name: lambda x, fn=fn: fn(x) for name, fn in hooks.items()}
    )
    share = (metric - scores.metric_empty) / (scores.metric_full - scores.metric_empty)
    assert scores.faithfulness == pytest.approx(share, abs=1e-4)


def test_circuits_of_edges_are_evaluated_as_well(model) -> None:
    edges = discover(model, TASK, method="eap", size=40)
    scores = evaluate(model, edges, TASK, n_random=3)
    assert scores.sizes[0] == 0 and scores.sizes[-1] == 190 and 40 in scores.sizes
    assert scores.faithfulness_by_size[-1] == pytest.approx(1, abs=1e-4)
    assert scores.faithfulness_by_size[0] == pytest.approx(0, abs=1e-4)
    assert repr(scores).startswith("Scores(random, 40 of 190 edges, faithfulness")
    pruned = evaluate(model, edges.pruned(), TASK, sizes=[], n_random=0)
    assert pruned.faithfulness == pytest.approx(scores.faithfulness, abs=1e-4)


def test_an_edge_circuit_of_another_model_is_an_error(hooked2) -> None:
    from tests.ground_truth.cases import CASES

    edges = discover(CASES[0].make("hooked"), CASES[0].task, method="eap", size=3)
    other = CASES[1]
    with pytest.raises(UnknownNameError, match="The model has no edge.*discovered in"):
        evaluate(other.make("hooked"), edges, other.task)
