"""Exact edges: equal to brute force, and exact on hand-built circuits."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.causes.exact.edge_patching import edge_patching
from gemmascope_plugin.errors import EmptySelectionError, GemmaScopeError, UnknownNameError
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.graphs.node import Node, Reader
from tests.causes.tasks import TASK
from tests.factories import n_hooks, unchecked
from tests.ground_truth.brute import Brute
from tests.ground_truth.cases import CASES
from tests.support.rounding import TINY

EDGES = EdgeMap(3, 4, 2)
SOME = [
    (Node.embed(), Reader(Node.head(0, 1), "q")),
    (Node.head(0, 2), Reader(Node.kv(1, 1), "k")),
    (Node.mlp(0), Reader(Node.kv(2, 0), "v")),
    (Node.head(1, 3), Reader(Node.mlp(1))),
    (Node.head(1, 0), Reader(Node.mlp(2))),
    (Node.mlp(2), Reader(Node.logits())),
    (Node.head(2, 1), Reader(Node.logits())),
]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_edges_equal_brute_force(model, direction: str) -> None:
    brute = Brute(model, TASK, denoising=direction == "denoising")
    got = edge_patching(model, TASK, edges=SOME, direction=direction)
    for writer, reader in SOME:
        expected = brute._change([brute._edge(writer, reader)]) * brute.gap
        value = got.values[EDGES.writer(writer), EDGES.reader(reader)]
        assert float(value) == pytest.approx(expected, abs=TINY), (writer.label, reader.label)
    assert int((got.values != 0).sum()) == len(SOME)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_true_edges_of_hand_built_circuits(case) -> None:
    got = edge_patching(case.make("hooked"), case.task)
    places = got.edges.mask.nonzero().tolist()
    large_edges = {
        (got.edges.writers[u], got.edges.readers[v])
        for u, v in places
        if abs(float(got.values[u, v])) > 0.05 * abs(got.gap)
    }
    assert large_edges == case.true_edges
    rest = [abs(v) for v in got.flat.tolist() if abs(v) <= 0.05 * abs(got.gap)]
    assert max(rest) < 1e-5 * abs(got.gap)


def test_batches_and_parts_do_not_matter(hooked2) -> None:
    whole = edge_patching(hooked2, TASK)
    single = edge_patching(hooked2, TASK, max_rows=1)
    assert torch.allclose(whole.values, single.values, atol=TINY)
    assert torch.allclose(whole.values_by_prompt, single.values_by_prompt, atol=TINY)
    assert torch.allclose(whole.values_by_prompt.mean(-1), whole.values, atol=TINY)


def test_zero_and_mean_ablation(hooked2) -> None:
    kinds = ("zero", "overall_mean", "mean")
    results = [edge_patching(hooked2, TASK, replacement=kind).values for kind in kinds]
    assert all(float(r.abs().max()) > 1e-3 for r in results)
    assert not torch.allclose(results[1], results[2], atol=1e-4)


def test_the_model_is_left_alone_and_the_result_says_what_it_is(model) -> None:
    with torch.no_grad():
        model(TASK.clean)  # the bridge sets up hooks of its own in its first pass
    before = n_hooks(model)
    got = edge_patching(model, TASK, edges=SOME[:2])
    assert n_hooks(model) == before
    assert got.metadata["n_patched"] == 2
    assert repr(got).startswith("Effects(edges, exact, noising, 190 edges, 2 prompts, metric clean")
    frame = got.top(2)
    assert list(frame.columns) == ["source", "target", "port", "effect", "share"]
    assert set(frame["source"]) == {"embed", "L0H2"}


def test_bad_input(hooked2) -> None:
    with pytest.raises(UnknownNameError, match="no edge from MLP2 to MLP0.*190 edges"):
        edge_patching(hooked2, TASK, edges=[(Node.mlp(2), Reader(Node.mlp(0)))])
    with pytest.raises(EmptySelectionError, match="No edge is named"):
        edge_patching(hooked2, TASK, edges=[])
    with pytest.raises(UnknownNameError, match="Unknown replacement 'men'.*Did you mean"):
        unchecked(edge_patching)(hooked2, TASK, replacement="men")
    with pytest.raises(GemmaScopeError, match="memory budget.*too small"):
        edge_patching(hooked2, TASK, memory_budget=1000)
