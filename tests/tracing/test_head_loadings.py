"""Head loadings against a frozen model in which paths through heads are cut one by one."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gemmascope_plugin import head_loadings
from gemmascope_plugin.errors import (
    EmptySelectionError,
    GemmaScopeError,
    ModelError,
    TaskError,
    UnknownNameError,
)
from gemmascope_plugin.graphs import Graph
from gemmascope_plugin.tracing import FeatureTarget, trace
from gemmascope_plugin.tracing.linear.head_shares import loadings
from gemmascope_plugin.tracing.linear.targets import (
    Logit,
    LogitDifference,
    StreamDirection,
)
from gemmascope_plugin.tracing.traced_prompt import TracedPrompt
from tests import factories
from tests.support.rounding import TINY
from tests.tracing.frozen_reference import FrozenModel, with_attention_biases
from tests.tracing.test_adjoint import LAYERS, SETS, TOKENS, dictionaries, traced_of

module: Any = importlib.import_module("gemmascope_plugin.tracing.head_loadings")
Cut = list[tuple[str, Callable[..., Any]]]


def end_entry(traced: TracedPrompt) -> Any:
    """A logit at the end of the prompt as a target."""
    seed = traced.readout.logit(Logit(10))
    return traced.sweep.seed_entry(seed.after, [seed])


def entries(traced: TracedPrompt) -> dict[str, Any]:
    """A logit, and the last feature of each kind of site that has targets."""
    entries = {"logit": end_entry(traced)}
    for site, activity in enumerate(traced.layout.activities):
        if activity.site.is_target and activity.n_features:
            last = traced.layout.features(site).stop - 1
            entries[activity.site.kind] = traced.entry(last)
    return entries


def some_of_each(traced: TracedPrompt, entry: Any) -> list[int]:
    """Tokens and biases, and of features and errors a few of each site."""
    layout = traced.layout
    nodes = [*range(layout.constant), *range(layout.constant + 1, layout.n_fixed)]
    for site in range(len(layout.activities)):
        features, errors = layout.features(site), layout.errors(site)
        nodes += [*range(features.start, features.stop, 7), *range(errors.start, errors.stop, 7)]
    return [node for node in nodes if node < entry.n_below]


def without(layer: int, heads: list[int]) -> Cut:
    """No gradient goes through some heads of a layer."""

    def hook_fn(z: torch.Tensor, hook: Any) -> torch.Tensor:
        cut = torch.zeros(z.shape[2], 1, dtype=torch.bool)
        cut[heads] = True
        return torch.where(cut, z.detach(), z)

    return [(f"blocks.{layer}.attn.hook_z", hook_fn)]


def effects(model: Any, traced: TracedPrompt, name: str, entry: Any, cut: Cut) -> np.ndarray:
    """Of every node on a target, by autograd."""
    frozen = FrozenModel(model, traced, cut)
    if name == "logit":
        W_U = traced.frozen.anatomy.W_U
        column = W_U[:, 10] - W_U.mean(1)
        return frozen.effects(frozen.seen["end"][0, -1] @ column)
    site = next(i for i, a in enumerate(traced.layout.activities) if a.site.time == entry.after)
    activity = traced.layout.activities[site]
    return frozen.effects(frozen.pre_activation(site, activity.n_features - 1))


@pytest.mark.parametrize("name", SETS)
def test_heads_carry_what_is_lost_without_them(name: str, model: Any, hf: Any) -> None:
    traced = traced_of(model, dictionaries(name, model, hf))
    n_heads = traced.frozen.anatomy.n_heads
    for kind, entry in entries(traced).items():
        below = some_of_each(traced, entry)
        carriers = loadings(traced.sweep, entry, below)
        whole = effects(model, traced, kind, entry, [])[below]
        scale = np.abs(whole).max()
        np.testing.assert_allclose(carriers.effects / scale, whole / scale, atol=TINY)
        loads = carriers.loads.sum(-1)
        for layer, heads in ((0, [3]), (1, [*range(n_heads)]), (2, [1])):
            if 4 * layer > entry.after:
                assert not loads[:, layer].any()
                continue
            rest = effects(model, traced, kind, entry, without(layer, heads))[below]
            carried = loads[:, layer, heads].sum(1)
            np.testing.assert_allclose(carried / scale, (whole - rest) / scale, atol=TINY)


@pytest.mark.parametrize("name", SETS)
def test_every_layer_sums_to_the_edge(name: str, model: Any, hf: Any) -> None:
    traced = traced_of(model, dictionaries(name, model, hf))
    for entry in entries(traced).values():
        carriers = loadings(traced.sweep, entry, some_of_each(traced, entry))
        assert float(carriers.gaps.max()) <= 1e-6 * float(carriers.effects.abs().max())
        assert carriers.between.any(1)[: traced.layout.n_pos].all()


def test_attention_biases_are_carried_too() -> None:
    plain = factories.tiny_model("gemma2", "hooked")
    model = with_attention_biases(copy.deepcopy(plain))
    saes = [factories.transcoder(plain, layer) for layer in LAYERS]
    traced = traced_of(model, [*saes, factories.attention(plain, 1)])
    entry = end_entry(traced)
    sources = [traced.layout.attention_bias(layer) for layer in LAYERS]
    carriers = loadings(traced.sweep, entry, sources)
    assert float(carriers.gaps.max()) <= 1e-6 * float(carriers.effects.abs().max())
    assert carriers.loads[0, 1:].abs().max() > 1e-3 and not carriers.loads[2].any()


def test_the_token_that_was_read(hooked2: Any) -> None:
    traced = traced_of(hooked2, [factories.transcoder(hooked2, layer) for layer in LAYERS])
    carriers = loadings(traced.sweep, end_entry(traced), [4])
    # the source is the token at 4 alone: below the first layer nothing has left it
    assert carriers.loads[0, 0, :, 4].abs().min() > 0
    assert not carriers.loads[0, 0, :, [i for i in range(20) if i != 4]].any()
    assert not carriers.loads[0, 2, :, :4].any()


def test_few_writes_at_a_time_are_the_same(
    hooked2: Any, monkeypatch: pytest.MonkeyPatch, hf: Any
) -> None:
    traced = traced_of(hooked2, [factories.transcoder(hooked2, layer) for layer in LAYERS])
    entry = end_entry(traced)
    sources = [3, 9, traced.layout.b_dec(0), traced.layout.starts[1], traced.layout.starts[2]]
    whole = loadings(traced.sweep, entry, sources)
    monkeypatch.setattr(type(traced.sweep), "fitting", lambda *args: 2)
    few = loadings(traced.sweep, entry, sources)
    torch.testing.assert_close(few.loads, whole.loads, atol=TINY, rtol=0)
    torch.testing.assert_close(few.bypass, whole.bypass, atol=TINY, rtol=0)


@pytest.fixture(scope="module")
def saes() -> list[Any]:
    model = factories.tiny_model("gemma2", "hooked")
    plain = [factories.transcoder(model, layer, seed=layer) for layer in LAYERS]
    return [*plain, factories.residual(model, 0, seed=3)]


@pytest.fixture(scope="module")
def graph(saes: list[Any]) -> Graph:
    return trace(factories.tiny_model("gemma2", "hooked"), TOKENS, saes)


def test_edges_of_a_graph(graph: Graph, saes: list[Any], hooked2: Any) -> None:
    frame = graph.edge_frame()
    crossing = frame[~frame["source"].str.startswith("bias:b_enc")].head(12)
    result = head_loadings(hooked2, graph, saes, crossing)
    np.testing.assert_allclose(result.weights, crossing["weight"], rtol=1e-4)
    assert result.metadata["residual"] < 1e-6
    rows = result.to_frame()
    assert set(rows) >= {"source", "target", "layer", "head", "load", "share", "key", "token"}
    assert len(rows) == result.between.sum() * result.values.shape[2]
    for i, (source, target) in enumerate(result.edges):
        of_edge = rows[(rows["source"] == source) & (rows["target"] == target)]
        sums = of_edge.groupby("layer")["load"].sum()
        for layer in np.flatnonzero(result.between[i]):
            parts = sums[layer] + result.bypass[i, layer]
            assert parts == pytest.approx(result.weights[i], abs=1e-5)
    assert result.plot(0).data and repr(result).startswith("HeadLoadings(12 edges, 3 layers of 4")
    assert "<table" in result._repr_html_()


def test_targets_that_are_asked_for(saes: list[Any], hooked2: Any) -> None:
    vector = torch.linspace(-1, 1, hooked2.cfg.d_model)
    features = trace(hooked2, TOKENS, saes).nodes.query("kind == 'feature' and layer == 1")
    feature = features.iloc[-1]
    targets = [
        LogitDifference(10, 11, 7),
        StreamDirection(vector, 1, 12),
        FeatureTarget(feature["site"], int(feature["index"]), int(feature["pos"])),
    ]
    graph = trace(hooked2, TOKENS, saes, targets=targets)
    ends = graph.nodes["id"].iloc[graph.targets]
    edges = [("token@1", end) for end in ends]
    result = head_loadings(hooked2, graph, saes, edges, targets=targets)
    dense = graph.adjacency.toarray()
    expected = [dense[graph.find(end), graph.find("token@1")] for end in ends]
    np.testing.assert_allclose(result.weights, expected, atol=1e-5)
    named = head_loadings(hooked2, graph, saes, edges[:2])  # the feature and the difference
    np.testing.assert_allclose(named.values, result.values[:2], atol=TINY)
    with pytest.raises(UnknownNameError, match="targets=\\[StreamDirection"):
        head_loadings(hooked2, graph, saes, edges[2])
    same = head_loadings(hooked2, TOKENS, saes, edges[0], targets=targets)
    np.testing.assert_allclose(same.values[0], result.values[0], atol=TINY)


def test_a_prompt_has_its_likeliest_tokens(graph: Graph, saes: list[Any], hooked2: Any) -> None:
    end = graph.nodes["id"].iloc[-1]
    of_prompt = head_loadings(hooked2, TOKENS, saes, [("token@2", end)])
    of_graph = head_loadings(hooked2, graph, saes, [("token@2", end)])
    np.testing.assert_allclose(of_prompt.by_key, of_graph.by_key, atol=TINY)


@pytest.mark.parametrize(
    ("edge", "error", "words"),
    [
        (("token@99", "end"), UnknownNameError, "no node 'token@99'.*Did you mean"),
        (("end", "token@3"), TaskError, "'token@3' is a source only.*Try: \\('token@3', 'target:"),
        (("bias:b_enc_and_b_U", "end"), TaskError, "its own: no head carries it"),
        (("late", "early"), TaskError, "comes after .* cannot reach it. Try: \\('blocks.0"),
        (("token@12", "early"), TaskError, "'token@12' comes after .* Try: graph.sources_of"),
        (("late", "late"), TaskError, "comes after"),
    ],
)
def test_edges_that_are_none(
    edge: tuple[str, str],
    error: type[Exception],
    words: str,
    graph: Graph,
    saes: list[Any],
    hooked2: Any,
) -> None:
    nodes = graph.nodes
    transcoded = nodes[(nodes["kind"] == "feature") & nodes["site"].str.endswith("mlp_out")]
    names = {
        "end": nodes["id"].iloc[-1],
        "early": transcoded[(transcoded["layer"] == 0) & (transcoded["pos"] < 12)]["id"].iloc[-1],
        "late": transcoded[transcoded["layer"] == 2]["id"].iloc[-1],
    }
    pair = tuple(names.get(node, node) for node in edge)
    with pytest.raises(error, match=words):
        head_loadings(hooked2, graph, saes, [pair])


def test_parts_that_do_not_sum_to_their_edge_are_refused(
    graph: Graph, saes: list[Any], hooked2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = graph.edge_frame()
    nodes = graph.nodes
    early = set(nodes["id"][graph.where("feature") & (nodes["layer"] == 0).to_numpy()])
    ends = set(nodes["id"][graph.where("target")])
    pairs = zip(frame["source"], frame["target"], strict=True)
    edge = next((s, t) for s, t in pairs if s in early and t in ends)
    whole = module.loadings

    def wrong(*args: Any) -> Any:
        result = whole(*args)
        return dataclasses.replace(result, effects=result.effects * 1.01)

    head_loadings(hooked2, graph, saes, [edge])
    monkeypatch.setattr(module, "loadings", wrong)
    with pytest.raises(ModelError, match="What heads carry of the edge .* is off by"):
        head_loadings(hooked2, graph, saes, [edge])


def test_no_edges(graph: Graph, saes: list[Any], hooked2: Any) -> None:
    with pytest.raises(EmptySelectionError, match="No edge was given. Try: graph.edge_frame"):
        head_loadings(hooked2, graph, saes, [])
    with pytest.raises(TaskError, match=r"\('a',\) is not an edge"):
        factories.unchecked(head_loadings)(hooked2, graph, saes, [("a",)])


def test_plots_of_what_there_is(graph: Graph, saes: list[Any], hooked2: Any) -> None:
    end = graph.nodes["id"].iloc[-1]
    last = graph.nodes.query("kind == 'feature' and layer == 2 and pos == 19")["id"].iloc[0]
    result = head_loadings(hooked2, graph, saes, [("token@2", end), (last, end)])
    assert result.plot(("token@2", end)).data
    with pytest.raises(TaskError, match="No attention lies between"):
        result.plot(1)
    with pytest.raises(TaskError, match="2 is not one of these edges. There is: edges 0 to 1"):
        result.plot(2)


def test_special_tokens_and_memory(graph: Graph, saes: list[Any], hooked2: Any) -> None:
    edge = ("token@1", graph.nodes["id"].iloc[-1])
    every = trace(hooked2, TOKENS, saes, exclude=())
    result = head_loadings(hooked2, TOKENS, saes, edge, exclude=())
    weight = every.adjacency[every.find(edge[1]), every.find(edge[0])]
    assert result.weights[0] == pytest.approx(float(weight), abs=1e-6)
    with pytest.raises(GemmaScopeError, match="attention patterns of 20 tokens"):
        head_loadings(hooked2, graph, saes, edge, memory_budget=4000)


def test_graphs_of_several_prompts(graph: Graph, saes: list[Any], hooked2: Any) -> None:
    several = Graph(graph.columns, graph.edges, graph.tokens, {})
    edge = ("token@1", graph.nodes["id"].iloc[-1])
    with pytest.raises(TaskError, match="is not the trace of one prompt"):
        head_loadings(hooked2, several, saes, edge)
