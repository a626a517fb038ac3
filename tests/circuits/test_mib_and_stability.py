"""CPR, CMD, AUROC and stability, from numbers made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gemmascope_plugin.causes import edge_attribution
from gemmascope_plugin.circuits import bootstrap_stability, discover, evaluate_ranking
from gemmascope_plugin.circuits.mib import SHARES, Curve, MibScores, sizes_of, trapezoid
from gemmascope_plugin.circuits.scored_methods import graph_of
from gemmascope_plugin.errors import EmptySelectionError, TaskError
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.graphs.graph import Graph
from tests.causes.tasks import TASK
from tests.ground_truth.cases import CASES
from tests.support.recovery import auroc, mib_auroc


def curve(*heights: float) -> Curve:
    sizes = tuple(sizes_of(1000))
    return Curve(sizes, sizes, heights, 1000)


def test_mibs_areas_of_known_curves() -> None:
    perfect = curve(*[1.0] * 10)
    scores = MibScores(perfect, perfect)
    assert scores.cpr == pytest.approx(0.999)
    assert scores.cmd == 0
    assert scores.log_cpr == pytest.approx(1)
    straight = curve(*SHARES)
    assert straight.area(distance=False) == pytest.approx((1 - 0.001**2) / 2)
    assert straight.area(distance=True) == pytest.approx(0.999**2 / 2)
    over = MibScores(curve(*[2.0] * 10), curve(*[2.0] * 10))
    assert over.cpr == pytest.approx(1.998) and over.cmd == pytest.approx(0.999)
    assert trapezoid([0.0, 1.0, 3.0], [0.0, 2.0, 2.0]) == 5
    assert sizes_of(343) == [0, 0, 1, 3, 6, 17, 34, 68, 171, 343]
    assert math.isnan(Curve((0,), (0,), (1.0,), 5).log_area(distance=True))
    assert len(scores.to_frame()) == 10 and "CPR 0.999" in repr(scores)
    assert scores.plot().layout.title.text == "CPR 0.999, CMD 0.000"


def test_auroc_by_hand() -> None:
    scores = torch.tensor([3.0, -2.0, 1.0, 0.5])
    truth = torch.tensor([True, False, True, False])
    assert auroc(scores, truth) == 0.75  # pairs: 3>2, 3>.5, 1<2, 1>.5
    assert auroc(torch.ones(4), truth) == 0.5
    assert auroc(-scores, truth) == 0.75
    with pytest.raises(EmptySelectionError, match="has 0 of 4 units"):
        auroc(scores, torch.zeros(4).bool())


def test_mibs_auroc_of_right_and_wrong_rankings() -> None:
    edges = EdgeMap(6, 6, 6)
    truth = torch.zeros(edges.n_edges, dtype=torch.bool)
    truth[:100] = True
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(edges.n_edges, generator=generator)

    def graph(values: torch.Tensor) -> Graph:
        matrix = torch.zeros(edges.mask.shape)
        matrix[edges.mask] = values
        return Graph.of_edges(edges, matrix)

    right, random = mib_auroc(graph(truth + noise), truth), mib_auroc(graph(noise + 1), truth)
    assert right > 0.9
    assert random == pytest.approx(0.5, abs=0.1)
    with pytest.raises(EmptySelectionError):
        mib_auroc(graph(noise), torch.ones_like(truth))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hand_built_circuits_have_auroc_one(case) -> None:
    effects = edge_attribution(case.make("hooked"), case.task, method="eap-ig", steps=3)
    places = effects.edges.mask.nonzero().tolist()
    pairs = [(effects.edges.writers[u], effects.edges.readers[v]) for u, v in places]
    truth = torch.tensor([pair in case.true_edges for pair in pairs])
    assert auroc(effects.flat, truth) == 1
    graph = graph_of(effects)
    mib = evaluate_ranking(case.make("hooked"), graph, case.task)
    assert mib.by_size.faithfulness[-1] == pytest.approx(1, abs=1e-4)
    assert mib.by_size.faithfulness[0] == pytest.approx(0, abs=1e-4)


def test_stability_over_prompts(hooked2) -> None:
    effects = edge_attribution(hooked2, TASK, method="eap", by_prompt=True)
    mean, least = bootstrap_stability(effects, 10, n=20)
    assert 0 <= least <= mean <= 1
    again = bootstrap_stability(effects, 10, n=20)
    assert again == (mean, least)
    assert bootstrap_stability(effects, effects.edges.n_edges, n=3) == (1, 1)
    with pytest.raises(EmptySelectionError, match="1 to 190 edges"):
        bootstrap_stability(effects, 0)
    with pytest.raises(TaskError, match="by_prompt=True"):
        bootstrap_stability(edge_attribution(hooked2, TASK, method="eap"), 5)


def test_rankings_of_nodes_have_areas_too(hooked2) -> None:
    mib = evaluate_ranking(hooked2, discover(hooked2, TASK).graph, TASK)
    assert mib.by_size.sizes == tuple(sizes_of(15))
    assert mib.by_size.true_sizes == mib.by_size.sizes
    assert mib.by_size.faithfulness[-1] == pytest.approx(1, abs=1e-5)
