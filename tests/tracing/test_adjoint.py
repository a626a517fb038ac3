"""The adjoint sweep against autograd through the frozen model, for every kind of site."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from gemmascope_plugin.graphs.adjacency import Adjacency
from gemmascope_plugin.tracing.linear.rows import matrix
from gemmascope_plugin.tracing.linear.sweep import chunks
from gemmascope_plugin.tracing.linear.targets import (
    Logit,
    LogitDifference,
    StreamDirection,
)
from gemmascope_plugin.tracing.traced_prompt import TracedPrompt
from tests import factories
from tests.splice.cross_layer_reference import clt
from tests.splice.gained_transcoders import gained_transcoder
from tests.support.rounding import TINY
from tests.tiny_models import random_tokens
from tests.tracing.frozen_reference import FrozenModel, with_attention_biases

TOKENS = random_tokens(batch_size=1, length=20, seed=5)
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


def traced_of(model: Any, saes: Any) -> TracedPrompt:
    return TracedPrompt.of(model, TOKENS, saes, exclude=("bos",), memory_budget=2**28)


def rows_of(
    traced: TracedPrompt,
    seeds: Any = (),
    n: int | None = None,
    weights: Any = None,
    min_share: float = 0.0,
) -> Adjacency:
    if weights is None:
        weights = np.zeros(traced.layout.n_nodes + len(seeds))
    options = {"max_features": n, "min_share": min_share, "progress": False}
    return matrix(traced.sweep, seeds, [], weights, **options)


def seeds_of(traced: TracedPrompt) -> list[Any]:
    readout = traced.readout
    vector = torch.linspace(-1, 1, traced.frozen.anatomy.d_model)
    return [
        *readout.top(3, 0.99, -1),
        readout.difference(LogitDifference(10, 11, 7)),
        readout.direction(StreamDirection(vector, 1, 12)),
    ]


def reference_rows(
    frozen: FrozenModel, traced: TracedPrompt, seeds: list[Any], features: list[int]
) -> np.ndarray:
    end = frozen.seen["end"][0] if "end" in frozen.seen else None
    assert end is not None
    rows = []
    for node in features:
        site = int(traced.layout.sites_of(np.array([node]))[0])
        target = frozen.pre_activation(site, node - traced.layout.starts[site])
        rows.append(frozen.effects(target))
    W_U = traced.frozen.anatomy.W_U
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
    traced = traced_of(model, dictionaries(name, model, hf))
    seeds = seeds_of(traced)
    edges = rows_of(traced, seeds)
    rows = edges.matrix.toarray()
    features = edges.nodes[edges.nodes < traced.layout.n_nodes]
    rng = np.random.default_rng(0)
    chosen = sorted(rng.choice(features, min(10, len(features)), replace=False).tolist())
    expected = reference_rows(FrozenModel(model, traced), traced, seeds, chosen)
    constant = traced.layout.constant
    got = rows[[*edges.row_of[chosen], *range(len(features), len(features) + 4)]]
    got = got[:, : traced.layout.n_nodes].copy()
    got[:, constant] = 0
    scale = np.abs(expected).max(1, keepdims=True)
    np.testing.assert_allclose(got / scale, expected / scale, atol=TINY)


@pytest.mark.parametrize("name", SETS)
def test_rows_sum_to_pre_activations(name: str, model: Any, hf: Any) -> None:
    traced = traced_of(model, dictionaries(name, model, hf))
    seeds = seeds_of(traced)
    edges = rows_of(traced, seeds)
    targets = [activity for activity in traced.layout.activities if activity.site.is_target]
    acts = np.concatenate([activity.acts.values.numpy() for activity in targets])
    values = np.concatenate([acts, [seed.value for seed in seeds]])
    sums = np.asarray(edges.matrix.sum(1)).ravel()
    np.testing.assert_allclose(sums, values, atol=1e-5 * np.abs(values).max())


def test_attention_biases_are_sources() -> None:
    plain = factories.tiny_model("gemma2", "hooked")
    model = with_attention_biases(copy.deepcopy(plain))
    saes = [factories.transcoder(plain, layer) for layer in LAYERS]
    saes.append(factories.attention(plain, 1))
    traced = traced_of(model, saes)
    seeds = seeds_of(traced)
    edges = rows_of(traced, seeds)
    acts = np.concatenate([activity.acts.values.numpy() for activity in traced.layout.activities])
    values = np.concatenate([acts, [seed.value for seed in seeds]])
    sums = np.asarray(edges.matrix.sum(1)).ravel()
    np.testing.assert_allclose(sums, values, atol=1e-5 * np.abs(values).max())
    layout = traced.layout
    for layer in (0, 1):
        assert np.abs(edges.matrix[:, [layout.attention_bias(layer)]].toarray()).max() > 1e-3


def test_chunks_do_not_matter(hooked2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = traced_of(hooked2, [factories.transcoder(hooked2, layer) for layer in LAYERS])
    expected = rows_of(traced).matrix.toarray()
    monkeypatch.setattr("gemmascope_plugin.tracing.linear.sweep.MAX_TARGETS", 3)
    got = rows_of(traced).matrix.toarray()
    np.testing.assert_allclose(got, expected, atol=TINY)


def test_chunks_of_one_token_are_the_same(hooked2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = traced_of(hooked2, [factories.transcoder(hooked2, layer) for layer in LAYERS])
    module = "gemmascope_plugin.tracing.linear.sweep"
    matrices = []
    for small, least in ((float("inf"), 1), (0, 1)):
        monkeypatch.setattr(f"{module}.SMALL", small)
        monkeypatch.setattr(f"{module}.MIN_CHUNK", least)
        site = traced.layout.at[5]
        features = traced.layout.features(site)
        entry = traced.sweep.feature_entry(site, np.arange(features.start, features.stop))
        spans = [len(part.positions.unique()) for part in chunks(traced.sweep, entry, 1)]
        assert max(spans) == 1 if small == 0 else len(spans) == 1
        matrices.append(rows_of(traced).matrix.toarray())
    np.testing.assert_allclose(matrices[0], matrices[1], atol=TINY)


def test_tokens_read_behind_and_below_the_first_attention_are_the_same(hooked2: Any) -> None:
    traced = traced_of(hooked2, [factories.transcoder(hooked2, layer) for layer in LAYERS])
    assert traced.sweep._tokens is not None
    expected = rows_of(traced).matrix.toarray()
    traced.sweep.__dict__["_tokens"] = None
    got = rows_of(traced).matrix.toarray()
    np.testing.assert_allclose(got, expected, atol=TINY)


def test_rows_gathered_at_every_use_are_the_same(hooked2: Any) -> None:
    traced = traced_of(hooked2, [factories.transcoder(hooked2, layer) for layer in LAYERS])
    expected = rows_of(traced).matrix.toarray()
    for writes in traced.sweep._writes:
        assert writes._gathered is not None
        writes._budget = 0
        del writes.__dict__["_gathered"]
    got = rows_of(traced).matrix.toarray()
    assert all(writes._gathered is None for writes in traced.sweep._writes)
    np.testing.assert_array_equal(got, expected)


def test_the_most_influential_features_come_first(hooked2: Any) -> None:
    traced = traced_of(hooked2, [factories.transcoder(hooked2, layer) for layer in LAYERS])
    seed = traced.readout.logit(Logit(10))
    weights = np.zeros(traced.layout.n_nodes + 1)
    weights[-1] = 1.0
    whole = rows_of(traced, [seed], weights=weights)
    is_counted = np.ones(whole.n_nodes, dtype=bool)
    is_counted[traced.layout.n_pos : traced.layout.n_fixed] = False
    influence = whole.restricted(is_counted).normalised.influence(weights)
    few = rows_of(traced, [seed], 16, weights)
    assert len(few.nodes) == 17
    chosen = few.nodes[:-1]
    best = np.argsort(-np.where(np.isin(np.arange(len(weights)), whole.nodes), influence, -1))[:16]
    # influence is found from the rows made so far, so the choice may differ near the end
    assert len(set(chosen) & set(best.tolist())) >= 10
    rows = whole.matrix[whole.row_of[few.nodes]]
    np.testing.assert_allclose(few.matrix.toarray(), rows.toarray(), atol=TINY)


def test_small_shares_are_dropped(hooked2: Any) -> None:
    traced = traced_of(hooked2, [factories.transcoder(hooked2, layer) for layer in LAYERS])
    whole = rows_of(traced).matrix.toarray()
    few = rows_of(traced, min_share=0.01).matrix
    keep = np.abs(whole) >= 0.01 * np.abs(whole).sum(1, keepdims=True)
    np.testing.assert_array_equal(few.toarray() != 0, keep & (whole != 0))


def test_threads_do_not_matter(hooked2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemmascope_plugin.tracing.linear.sweep.MIN_TARGETS", 4)
    traced = traced_of(hooked2, [factories.transcoder(hooked2, layer) for layer in LAYERS])
    before = torch.get_num_threads()
    matrices = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            matrices.append(rows_of(traced).matrix.toarray())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(matrices[0], matrices[1], atol=TINY)
