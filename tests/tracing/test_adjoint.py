"""The adjoint sweep against autograd through the frozen model, for every kind of site."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from gemmascope_plugin.tracing.linear.targets import (
    Logit,
    LogitDifference,
    Readout,
    StreamDirection,
)
from gemmascope_plugin.tracing.linear.tracer import Tracer
from tests import factories
from tests.splice.cross_layer_reference import clt
from tests.splice.gained_transcoders import gained_transcoder
from tests.support.rounding import TINY
from tests.tiny_models import random_tokens
from tests.tracing.frozen_reference import FrozenModel, with_attention_biases

TOKENS = random_tokens(batch=1, length=20, seed=5)
LAYERS = range(3)
SETS = ("plain", "affine", "mixed", "all", "clt", "affine clt", "mlp")


def dictionaries(name: str, model: Any, hf: Any) -> list[Any]:
    plain = [factories.transcoder(model, layer, seed=layer) for layer in LAYERS]
    affine = [gained_transcoder(hf, layer, skip=layer != 1, seed=layer) for layer in LAYERS]
    if name == "plain":
        return plain
    if name == "affine":
        return affine
    if name == "mixed":
        return [*affine, factories.residual(model, 1), factories.attention(model, 2)]
    if name == "all":
        sites = (factories.residual, factories.attention)
        return [*plain, *(make(model, layer) for make in sites for layer in LAYERS)]
    if name == "mlp":
        return [*plain[:2], factories.mlp(model, 2)]
    return [clt(hf, affine=name.startswith("affine"))]


def tracer_of(model: Any, saes: Any, **options: Any) -> Tracer:
    return Tracer.of(model, TOKENS, saes, exclude=("bos",), budget=2**28, **options)


def seeds_of(tracer: Tracer) -> list[Any]:
    readout = Readout(tracer.record)
    vector = torch.linspace(-1, 1, tracer.record.anatomy.d_model)
    return [
        *readout.top(3, 0.99, -1),
        readout.difference(LogitDifference(10, 11, 7)),
        readout.direction(StreamDirection(vector, 1, 12)),
    ]


def reference_rows(
    frozen: FrozenModel, tracer: Tracer, seeds: list[Any], features: list[int]
) -> np.ndarray:
    end = frozen.seen["end"][0] if "end" in frozen.seen else None
    assert end is not None
    rows = []
    for node in features:
        site = int(tracer.sites_of(np.array([node]))[0])
        target = frozen.pre_activation(site, node - tracer.layout.starts[site])
        rows.append(frozen.effects(target))
    W_U = tracer.record.anatomy.W_U
    for seed in seeds:
        if seed.label == "direction":
            continue
        column = W_U @ _question(seed, W_U)
        rows.append(frozen.effects(end[seed.position] @ column))
    return np.stack(rows)


def _question(seed: Any, W_U: torch.Tensor) -> torch.Tensor:
    question = torch.zeros(W_U.shape[1])
    if seed.token >= 0:
        question[seed.token] = 1.0
        return question - 1 / W_U.shape[1]
    question[10], question[11] = 1.0, -1.0
    return question


@pytest.mark.parametrize("name", SETS)
def test_rows_equal_autograd(name: str, model: Any, hf: Any) -> None:
    tracer = tracer_of(model, dictionaries(name, model, hf))
    seeds = seeds_of(tracer)
    known = tracer.rows(seeds, [], np.zeros(tracer.layout.n_nodes + len(seeds)), None, False)
    rows = known.matrix.toarray()
    features = known.nodes[known.nodes < tracer.layout.n_nodes]
    rng = np.random.default_rng(0)
    chosen = sorted(rng.choice(features, min(10, len(features)), replace=False).tolist())
    expected = reference_rows(FrozenModel(model, tracer), tracer, seeds, chosen)
    own = tracer.layout.own
    got = rows[[*known.row_of[chosen], *range(len(features), len(features) + 4)]]
    got = got[:, : tracer.layout.n_nodes].copy()
    got[:, own] = 0
    scale = np.abs(expected).max(1, keepdims=True)
    np.testing.assert_allclose(got / scale, expected / scale, atol=TINY)


@pytest.mark.parametrize("name", SETS)
def test_rows_sum_to_pre_activations(name: str, model: Any, hf: Any) -> None:
    tracer = tracer_of(model, dictionaries(name, model, hf))
    seeds = seeds_of(tracer)
    known = tracer.rows(seeds, [], np.zeros(tracer.layout.n_nodes + len(seeds)), None, False)
    targets = [one for one in tracer.layout.activities if one.site.is_target]
    acts = np.concatenate([one.acts.values.numpy() for one in targets])
    values = np.concatenate([acts, [seed.value for seed in seeds]])
    sums = np.asarray(known.matrix.sum(1)).ravel()
    np.testing.assert_allclose(sums, values, atol=1e-5 * np.abs(values).max())


def test_attention_biases_are_sources() -> None:
    plain = factories.tiny_model("gemma2", "hooked")
    model = with_attention_biases(copy.deepcopy(plain))
    saes = [factories.transcoder(plain, layer) for layer in LAYERS]
    saes.append(factories.attention(plain, 1))
    tracer = tracer_of(model, saes)
    seeds = seeds_of(tracer)
    known = tracer.rows(seeds, [], np.zeros(tracer.layout.n_nodes + len(seeds)), None, False)
    acts = np.concatenate([one.acts.values.numpy() for one in tracer.layout.activities])
    values = np.concatenate([acts, [seed.value for seed in seeds]])
    sums = np.asarray(known.matrix.sum(1)).ravel()
    np.testing.assert_allclose(sums, values, atol=1e-5 * np.abs(values).max())
    layout = tracer.layout
    for layer in (0, 1):
        assert np.abs(known.matrix[:, [layout.attention_bias(layer)]].toarray()).max() > 1e-3


def test_chunks_do_not_matter(hooked2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saes = [factories.transcoder(hooked2, layer) for layer in LAYERS]
    whole = tracer_of(hooked2, saes)
    weights = np.zeros(whole.layout.n_nodes)
    expected = whole.rows([], [], weights, None, False).matrix.toarray()
    monkeypatch.setattr("gemmascope_plugin.tracing.linear.tracer.MAX_TARGETS", 3)
    got = tracer_of(hooked2, saes).rows([], [], weights, None, False).matrix.toarray()
    np.testing.assert_allclose(got, expected, atol=TINY)


def test_chunks_of_one_token_are_the_same(hooked2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saes = [factories.transcoder(hooked2, layer) for layer in LAYERS]
    tracer = tracer_of(hooked2, saes)
    weights = np.zeros(tracer.layout.n_nodes)
    module = "gemmascope_plugin.tracing.linear.tracer"
    found = []
    for small, least in ((float("inf"), 1), (0, 1)):
        monkeypatch.setattr(f"{module}.SMALL", small)
        monkeypatch.setattr(f"{module}.MIN_CHUNK", least)
        nodes = tracer._feature_nodes(tracer.layout.at[5])
        entry = tracer.entry(tracer.layout.at[5], nodes)
        spans = [len(part.positions.unique()) for part in tracer.chunks(entry, 1)]
        assert max(spans) == 1 if small == 0 else len(spans) == 1
        found.append(tracer.rows([], [], weights, None, False).matrix.toarray())
    np.testing.assert_allclose(found[0], found[1], atol=TINY)


def test_tokens_read_behind_and_below_the_first_attention_are_the_same(hooked2: Any) -> None:
    saes = [factories.transcoder(hooked2, layer) for layer in LAYERS]
    tracer = tracer_of(hooked2, saes)
    weights = np.zeros(tracer.layout.n_nodes)
    assert tracer.sweep._tokens is not None
    expected = tracer.rows([], [], weights, None, False).matrix.toarray()
    tracer.sweep.__dict__["_tokens"] = None
    got = tracer.rows([], [], weights, None, False).matrix.toarray()
    np.testing.assert_allclose(got, expected, atol=TINY)


def test_rows_gathered_at_every_use_are_the_same(hooked2: Any) -> None:
    saes = [factories.transcoder(hooked2, layer) for layer in LAYERS]
    tracer = tracer_of(hooked2, saes)
    weights = np.zeros(tracer.layout.n_nodes)
    expected = tracer.rows([], [], weights, None, False).matrix.toarray()
    for written in tracer.sweep._written:
        written._budget = 0
        written.__dict__.pop("_held", None)
    got = tracer.rows([], [], weights, None, False).matrix.toarray()
    np.testing.assert_array_equal(got, expected)


def test_the_most_influential_features_come_first(hooked2: Any) -> None:
    saes = [factories.transcoder(hooked2, layer) for layer in LAYERS]
    tracer = tracer_of(hooked2, saes)
    seed = Readout(tracer.record).logit(Logit(10))
    weights = np.zeros(tracer.layout.n_nodes + 1)
    weights[-1] = 1.0
    whole = tracer.rows([seed], [], weights, None, False)
    counted = tracer.counted(whole.n_nodes)
    influence = whole.restricted(counted).normalised.influence(weights)
    few = tracer.rows([seed], [], weights, 16, False)
    assert len(few.nodes) == 17
    chosen = few.nodes[:-1]
    best = np.argsort(-np.where(np.isin(np.arange(len(weights)), whole.nodes), influence, -1))[:16]
    # influence is found from the rows known so far, so the choice may differ near the end
    assert len(set(chosen) & set(best.tolist())) >= 10
    rows = whole.matrix[whole.row_of[few.nodes]]
    np.testing.assert_allclose(few.matrix.toarray(), rows.toarray(), atol=TINY)


def test_small_shares_are_dropped(hooked2: Any) -> None:
    saes = [factories.transcoder(hooked2, layer) for layer in LAYERS]
    weights = np.zeros(tracer_of(hooked2, saes).layout.n_nodes)
    whole = tracer_of(hooked2, saes).rows([], [], weights, None, False).matrix.toarray()
    few = tracer_of(hooked2, saes, min_share=0.01).rows([], [], weights, None, False).matrix
    keep = np.abs(whole) >= 0.01 * np.abs(whole).sum(1, keepdims=True)
    np.testing.assert_array_equal(few.toarray() != 0, keep & (whole != 0))


def test_threads_do_not_matter(hooked2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemmascope_plugin.tracing.linear.tracer.MIN_TARGETS", 4)
    saes = [factories.transcoder(hooked2, layer) for layer in LAYERS]
    tracer = tracer_of(hooked2, saes)
    weights = np.zeros(tracer.layout.n_nodes)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(tracer.rows([], [], weights, None, False).matrix.toarray())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(found[0], found[1], atol=TINY)
