"""QK attributions against autograd through the model's own queries and keys, with norm scales frozen."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from gemmascope_plugin import qk_attribution, trace
from gemmascope_plugin.errors import EmptySelectionError, GemmaScopeError, TaskError
from tests import factories
from tests.support.rounding import TINY
from tests.tracing.frozen_reference import FrozenModel
from tests.tracing.test_adjoint import LAYERS, TOKENS, dictionaries, traced_of

HEADS = [(0, 1, 19, 6), (1, 3, 17, 2), (2, 0, 19, 4), (2, 2, 9, 9)]
"""Layer, head, query, key: local layers and global ones, both key-value heads, the edge of the window."""
SCALE = 24.0**0.5
"""The root of ``query_pre_attn_scalar``."""


class TurnedModel(FrozenModel):
    """Also keeps queries and keys after the rotation, as functions of what is written."""

    def __init__(self, model: Any, traced: Any, layer: int) -> None:
        self.turned: dict[str, torch.Tensor] = {}
        prefix = f"blocks.{layer}.attn"
        hooks = [(f"{prefix}.hook_rot_{name}", self._keep(name)) for name in "qk"]
        scales = [f"{prefix}.{name}_norm.hook_scale" for name in "qk"]
        hooks += [(n, lambda x, hook: x.detach()) for n in scales if n in model.hook_dict]
        super().__init__(model, traced, hooks)
        self._heads = traced.frozen.anatomy.n_heads

    def _keep(self, name: str) -> Any:
        def hook_fn(x: torch.Tensor, hook: Any) -> None:
            self.turned[name] = x[0]

        return hook_fn

    def parts(self, name: str, head: int, pos: int) -> np.ndarray:
        """Of all nodes in a query or key, ``[node, d_head]``."""
        x = self.turned[name]
        # [pos, head, d_head] on one class, [head, pos, d_head] on the other
        x = x if x.shape[1] == TOKENS.shape[1] else x.transpose(0, 1)
        vector = x[head * len(x) // self._heads, pos]
        return np.stack([self.effects(direction) for direction in vector], 1)


def observed(model: Any, layer: int, head: int, query: int) -> torch.Tensor:
    """The model's own scores of a query, after their soft-cap."""
    name = f"blocks.{layer}.attn.hook_attn_scores"
    _, cache = model.run_with_cache(TOKENS, names_filter=[name])
    return cache[name][0, head, query]


@pytest.mark.parametrize(
    ("name", "place"), [("plain", 0), ("mixed", 1), ("affine clt", 2), ("all", 3)]
)
def test_pairs_equal_autograd(name: str, place: int, model: Any, hf: Any) -> None:
    layer, head, query, key = HEADS[place]
    saes = dictionaries(name, model, hf)
    result = qk_attribution(model, TOKENS, saes, layer, head, query, key)
    assert result.parts is not None
    traced = traced_of(model, saes)
    frozen = TurnedModel(model, traced, layer)
    asked = frozen.parts("q", head, query) / SCALE
    seen = frozen.parts("k", head, key)
    nodes = np.arange(len(result.nodes)) != traced.layout.constant
    for part, expected in zip(result.parts, (asked, seen), strict=True):
        rows = part.numpy()[nodes]
        assert not expected[len(nodes) :].any()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(rows / scale, expected[: len(nodes)][nodes] / scale, atol=TINY)


@pytest.mark.parametrize(("layer", "head", "query", "key"), HEADS)
def test_pairs_sum_to_the_score(
    layer: int, head: int, query: int, key: int, model: Any, hf: Any
) -> None:
    saes = dictionaries("mixed", model, hf)
    result = qk_attribution(model, TOKENS, saes, layer, head, query, key)
    scores = observed(model, layer, head, query)
    scale = float(scores[scores > -1e30].abs().max())
    assert result.parts is not None
    pairs = (result.parts[0].double() @ result.parts[1].double().T).numpy()
    cap = 5.0 if model.cfg.attn_scores_soft_cap == 5.0 else None
    capped = pairs.sum() if cap is None else cap * np.tanh(pairs.sum() / cap)
    assert capped == pytest.approx(float(scores[key]), abs=TINY * scale)
    assert result.capped == pytest.approx(float(scores[key]), abs=TINY * scale)
    assert result.score == pytest.approx(pairs.sum(), abs=TINY * scale)
    assert result.residual < TINY
    for sums, marginal in ((pairs.sum(1), "query"), (pairs.sum(0), "key")):
        np.testing.assert_allclose(getattr(result, f"{marginal}_weights"), sums, atol=TINY * scale)


@pytest.mark.parametrize(("place", "contrast"), [(1, False), (2, False), (2, True)])
def test_marginals_without_pairs(place: int, contrast: bool, model: Any, hf: Any) -> None:
    layer, head, query, key = HEADS[place]
    saes = dictionaries("mixed", model, hf)
    options: Any = {"contrast": contrast}
    whole = qk_attribution(model, TOKENS, saes, layer, head, query, key, **options)
    few = qk_attribution(model, TOKENS, saes, layer, head, query, key, pairs=False, **options)
    scale = max(abs(float(whole.score)), 1.0)
    assert whole.residual < TINY and few.residual < TINY
    np.testing.assert_allclose(few.query_weights, whole.query_weights, atol=TINY * scale)
    np.testing.assert_allclose(few.key_weights, whole.key_weights, atol=TINY * scale)
    assert few.score == pytest.approx(whole.score, abs=TINY * scale)


def test_a_contrast_is_less_the_mean_of_the_keys(hooked2: Any) -> None:
    model, (layer, head, query, key) = hooked2, HEADS[2]
    saes = [factories.transcoder(model, layer) for layer in LAYERS]
    result = qk_attribution(model, TOKENS, saes, layer, head, query, key, contrast=True)
    scores = observed(model, layer, head, query)
    keys = (scores > -1e30).nonzero()[:, 0].tolist()
    assert keys == [*range(4, 20)]  # the window
    each = [qk_attribution(model, TOKENS, saes, layer, head, query, j, pairs=False) for j in keys]
    weights = np.stack([part.key_weights for part in each])
    scale = max(abs(part.score) for part in each)
    expected = weights[keys.index(key)] - weights.mean(0)
    np.testing.assert_allclose(result.key_weights, expected, atol=TINY * scale)
    assert result.residual < TINY and result.capped == pytest.approx(float(scores[key]), abs=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_biases_of_queries_and_keys_are_sources(family: str) -> None:
    plain = factories.tiny_model(family, "hooked")
    model = copy.deepcopy(plain)
    generator = torch.Generator().manual_seed(3)
    for block in model.blocks:
        for name in ("b_Q", "_b_K"):
            bias = getattr(block.attn, name)
            bias.data = torch.randn(bias.shape, generator=generator) * 0.5
    saes = [factories.transcoder(plain, layer) for layer in LAYERS]
    for contrast in (False, True):
        result = qk_attribution(model, TOKENS, saes, 1, 3, 17, 2, contrast=contrast)
        scores = observed(model, 1, 3, 17)
        assert result.capped == pytest.approx(float(scores[2]), abs=1e-5)
        assert result.residual < TINY
        for frame in (result.by_query, result.by_key):
            bias = frame[frame["id"] == "bias:b_Q_and_b_K"]
            assert contrast or abs(float(bias["weight"].iloc[0])) > 1e-3


def test_few_targets_at_a_time_are_the_same(hooked2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saes = [factories.transcoder(hooked2, layer) for layer in LAYERS]
    whole = qk_attribution(hooked2, TOKENS, saes, 2, 1, 19, 5, contrast=True)
    kind = type(traced_of(hooked2, saes).sweep)
    monkeypatch.setattr(kind, "fitting", lambda *args: 5)
    few = qk_attribution(hooked2, TOKENS, saes, 2, 1, 19, 5, contrast=True)
    assert whole.parts is not None and few.parts is not None
    for part, expected in zip(whole.parts, few.parts, strict=True):
        torch.testing.assert_close(part, expected, atol=TINY, rtol=0)


def test_tables_and_figures(hooked2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saes = [factories.transcoder(hooked2, layer) for layer in LAYERS]
    result = qk_attribution(hooked2, trace(hooked2, TOKENS, saes), saes, 2, 1, -1, 5)
    assert result.parts is not None
    monkeypatch.setattr("gemmascope_plugin.tracing.linear.head_queries.ROWS", 7)
    pairs = (result.parts[0] @ result.parts[1].T).double().numpy()
    best = np.sort(np.abs(pairs).ravel())[::-1][:15]
    frame = result.pairs(15)
    np.testing.assert_allclose(frame["weight"].abs(), best, rtol=1e-5)
    ids = result.nodes["id"].tolist()
    for _, row in frame.iterrows():
        value = pairs[ids.index(row["query"]), ids.index(row["key"])]
        assert value == pytest.approx(row["weight"], rel=1e-5)
    assert result.by_key["weight"].sum() == pytest.approx(result.score, abs=1e-5)
    assert result.by_query["weight"].sum() == pytest.approx(result.score, abs=1e-5)
    assert (result.by_key["pos"] <= 5).all() and len(result.pairs(10**9)) == (pairs != 0).sum()
    assert repr(result).startswith("QkAttribution(layer 2 head 1, ") and result.plot(4).data
    assert "<table" in result._repr_html_()
    few = qk_attribution(hooked2, TOKENS, saes, 2, 1, -1, 5, pairs=False)
    assert few.plot(4).data and "<table" in few._repr_html_()
    with pytest.raises(EmptySelectionError, match="Pairs were not asked for.*pairs=True"):
        few.pairs()
    with pytest.raises(EmptySelectionError, match="top=0 leaves no pair"):
        result.pairs(0)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ((3, 0, 5, 2), "There is no layer 3. There is: layers 0 to 2. Did you mean 2"),
        ((-1, 0, 5, 2), "There is no layer -1"),
        ((0, 4, 5, 2), "There is no head 4. There is: heads 0 to 3"),
        (
            (0, 0, 20, 2),
            "Query 20 lies outside the prompt of 20 tokens. There is: positions 0 to 19",
        ),
        ((0, 0, 5, -21), "Key -21 lies outside the prompt"),
        ((0, 0, 2, 5), "Key 5 comes after query 2.*keys 0 to 2.*Try: query=5, key=2"),
    ],
)
def test_heads_and_tokens_that_are_none(
    asked: tuple[int, int, int, int], words: str, hooked2: Any
) -> None:
    saes = [factories.transcoder(hooked2, layer) for layer in LAYERS]
    with pytest.raises(TaskError, match=words):
        qk_attribution(hooked2, TOKENS, saes, *asked)


def test_keys_outside_the_window(model: Any) -> None:
    saes = [factories.transcoder(model, layer) for layer in LAYERS]
    words = "Key 3 lies outside the sliding window of layer 0.*keys 4 to 19.*mean 4"
    with pytest.raises(TaskError, match=words):
        qk_attribution(model, TOKENS, saes, 0, 0, 19, 3)


def test_budgets_that_are_too_small(hooked2: Any) -> None:
    saes = [factories.transcoder(hooked2, layer) for layer in LAYERS]
    with pytest.raises(GemmaScopeError, match="the memory budget is"):
        qk_attribution(hooked2, TOKENS, saes, 2, 1, 19, 5, memory_budget=50_000)
