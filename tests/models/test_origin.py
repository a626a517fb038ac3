"""Results and pages say where the weights of the model come from."""

from __future__ import annotations

import copy

import pytest

import gemmascope_plugin as gs
from gemmascope_plugin.models.chat import stop_ids
from gemmascope_plugin.models.protocol import weights_of
from gemmascope_plugin.pages import circuit_html, effects_html, trace_html
from tests.factories import tiny_model

PLACE = "gemma-2-tiny, the model that ships with this package"


@pytest.fixture(scope="module")
def suite():
    return gs.tiny()


@pytest.fixture(scope="module")
def task(suite):
    return suite.task("ioi", n=4)


def test_effects_and_their_pages(suite, task) -> None:
    exact = gs.activation_patching(suite.model, task, "z")
    assert exact.metadata["weights"] == PLACE
    assert PLACE in effects_html(exact)
    assert gs.edge_attribution(suite.model, task).metadata["weights"] == PLACE
    assert gs.direct_logit_attribution(suite.model, task).metadata["weights"] == PLACE


@pytest.mark.parametrize("options", [{"method": "eap"}, {"method": "atp", "nodes": ("head",)}])
def test_circuits(suite, task, options) -> None:
    circuit = gs.discover(suite.model, task, size=5, **options)
    assert circuit.metadata["weights"] == PLACE
    assert PLACE in circuit_html(circuit)


def test_graphs(suite) -> None:
    transcoders = [suite.load("transcoder", layer) for layer in range(4)]
    graph = gs.trace(suite.model, suite.task("ioi", n=1).clean[0], transcoders)
    assert graph.metadata["weights"] == PLACE
    assert PLACE in trace_html(graph)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_models_made_elsewhere_say_nothing(backend) -> None:
    model = tiny_model("gemma2", backend)
    assert weights_of(model) is None and stop_ids(model) == [1]
    copied = copy.deepcopy(model) if backend == "hooked" else model
    copied.tokenizer, tokenizer = None, copied.tokenizer
    assert stop_ids(copied) == [1]  # as the generation config says
    copied.tokenizer = tokenizer
