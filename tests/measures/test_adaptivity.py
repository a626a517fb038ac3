"""Active features per token and what they follow: against slow counts and ranks by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.measures import Adaptivity, adaptivity
from gemmascope_plugin.measures.adaptivity import ranks, spearman
from gemmascope_plugin.saes import SoftSAE, SoftSAEConfig
from tests import factories
from tests.factories import activations, unchecked
from tests.splice.reference import features
from tests.splice.test_rank_splice import K as TOP_K
from tests.splice.test_rank_splice import dictionary, units
from tests.splice.test_tree_splice import K as TREE_K
from tests.splice.test_tree_splice import tree
from tests.tiny_models import FIRST_WORD_ID, PAD_ID, random_tokens

TOKENS = random_tokens(batch_size=6)
TOKENS[3, 14:] = PAD_ID
KEEP = TOKENS >= FIRST_WORD_ID
CONCEPTS = torch.stack([TOKENS < 200, TOKENS < 130, TOKENS % 3 == 0], -1)
NAMES = ["below 200", "below 130", "third"]


def slow_spearman(a: list[float], b: list[float]) -> float:
    """Ranks counted one by one, and Pearson's formula."""

    def rank(values: list[float]) -> list[float]:
        return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]

    x, y = rank(a), rank(b)
    mean = (len(a) + 1) / 2
    top = sum((p - mean) * (q - mean) for p, q in zip(x, y, strict=True))
    return top / math.sqrt(sum((p - mean) ** 2 for p in x) * sum((q - mean) ** 2 for q in y))


@torch.no_grad()
@pytest.mark.parametrize("make", [factories.residual, factories.attention, factories.transcoder])
def test_counts_equal_a_slow_count(model, make) -> None:
    sae = make(model, 1)
    result = adaptivity(model, sae, TOKENS, CONCEPTS, NAMES, batch_size=4)
    x = activations(model, TOKENS, sae.cfg.metadata.hook_name)[KEEP]
    expected = [int((row > 0).sum()) for row in features(sae, x)]
    assert result.k.tolist() == expected and result.n_tokens == len(expected)
    mean = sum(expected) / len(expected)
    assert result.mean == pytest.approx(mean)
    assert result.std == pytest.approx(
        math.sqrt(sum((k - mean) ** 2 for k in expected) / len(expected))
    )
    row = result.row()
    assert (row["k_min"], row["k_max"]) == (min(expected), max(expected))
    holds = [int(marks.sum()) for marks in CONCEPTS[KEEP]]
    assert result.n_concepts is not None and result.n_concepts.tolist() == holds
    assert row["k_spearman"] == pytest.approx(slow_spearman(expected, holds))
    assert math.isnan(row["budget_mean"]) and math.isnan(row["budget_spearman"])


def test_ranks_by_hand() -> None:
    values = torch.tensor([30, 10, 20, 20, 10, 20])
    assert ranks(values).tolist() == [6, 1.5, 4, 4, 1.5, 4]
    up = torch.tensor([1.0, 2, 3, 4])
    assert spearman(up, up**3) == pytest.approx(1)
    assert spearman(up, -up) == pytest.approx(-1)
    assert spearman(torch.tensor([1, 2, 2, 3]), torch.tensor([1, 1, 2, 2])) == pytest.approx(
        slow_spearman([1, 2, 2, 3], [1, 1, 2, 2])
    )
    assert math.isnan(spearman(up, torch.ones(4)))
    assert math.isnan(spearman(up[:1], up[:1]))


def test_a_fixed_number_has_no_spread_and_no_correlation(hooked2) -> None:
    sae = copy.deepcopy(dictionary("topk"))
    sae.b_enc.data.fill_(99)  # all are positive, so that the largest K are active everywhere
    result = adaptivity(hooked2, sae, TOKENS, CONCEPTS, NAMES)
    assert result.std == 0 and result.mean == TOP_K
    assert math.isnan(result.k_spearman)


def test_a_tree_has_at_most_the_k_of_its_layers(hooked2) -> None:
    result = adaptivity(hooked2, tree(), TOKENS)
    assert result.k.max() <= sum(TREE_K) and result.std > 0
    assert math.isnan(result.k_spearman) and result.n_concepts is None


def soft_at_heads(d_in: int) -> SoftSAE:
    sae = SoftSAE(SoftSAEConfig(d_in=d_in, d_sae=40, k=TOP_K, reshape_activations="hook_z"))
    sae.cfg.metadata.hook_name = "blocks.1.attn.hook_z"
    rng = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) / 6
    return sae


@torch.no_grad()
@pytest.mark.parametrize("name", ["soft", "soft, standardised", "heads"])
def test_a_soft_dictionary_says_its_budget(hooked2, name: str) -> None:
    sae = soft_at_heads(48) if name == "heads" else dictionary(name)
    x = activations(hooked2, TOKENS, sae.cfg.metadata.hook_name)[KEEP]
    result = adaptivity(hooked2, sae, TOKENS, CONCEPTS, NAMES, batch_size=4)
    mean, std = units(sae, x)
    seen = (x - mean) / std - sae.b_dec * sae.cfg.apply_b_dec_to_input
    expected = (2 * TOP_K * sae.k_estimator(seen)[:, 0]).clamp(min=1)
    assert result.budget is not None
    assert torch.allclose(result.budget, expected, atol=1e-3)
    assert (result.k <= result.budget).all() and result.k.unique().numel() > 2
    row = result.row()
    assert row["budget_mean"] == pytest.approx(float(result.budget.mean()), rel=1e-5)
    holds = [int(marks.sum()) for marks in CONCEPTS[KEEP]]
    assert row["budget_spearman"] == pytest.approx(slow_spearman(result.budget.tolist(), holds))
    assert "budget" in repr(result)


def by_hand(**fields: Any) -> Adaptivity:
    subject = {"hook_in": "a", "hook_out": "a", "d_sae": 9, "level": None, "exclude": ("bos",)}
    k = torch.tensor([2, 4, 5, 5])
    return Adaptivity(
        **{**subject, "n_tokens": 4, "k": k, "budget": None, "n_concepts": None, **fields}
    )


def test_means_by_number_of_concepts_and_their_picture() -> None:
    result = by_hand(n_concepts=torch.tensor([0, 2, 2, 3]))
    frame = result.by_concepts()
    assert frame.to_dict("list") == {
        **{"n_concepts": [0, 2, 3], "n_tokens": [1, 2, 1]},
        **{"mean": [2.0, 4.5, 5.0], "std": [0.0, 0.5, 0.0]},
    }
    low, high, mean = result.plot(title="k").data
    assert (list(low.y), list(high.y)) == ([2.0, 4.0, 5.0], [2.0, 5.0, 5.0])
    assert (list(mean.x), list(mean.y)) == ([0, 2, 3], [2.0, 4.5, 5.0])
    assert result.k_spearman == pytest.approx(slow_spearman([2, 4, 5, 5], [0, 2, 2, 3]))


def test_without_concepts_the_picture_is_a_histogram() -> None:
    result = by_hand()
    (line,) = result.plot().data
    assert (list(line.x), list(line.y)) == ([2, 4, 5], [0.25, 0.25, 0.5])
    assert len(result.by_concepts()) == 0
    assert "<table" in result._repr_html_() and len(result.to_frame()) == 1
    assert "9 features, 4 tokens, excluded ('bos',): 4.0 active, deviation 1.2, 2 to 5)" in repr(
        result
    )


def test_what_cannot_be_measured_is_an_error(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    with pytest.raises(ModelError, match="There are concepts and no names.*Try: both"):
        unchecked(adaptivity)(hooked2, sae, TOKENS, CONCEPTS)
    with pytest.raises(ModelError, match=r"given for \[6, 19\] tokens"):
        unchecked(adaptivity)(hooked2, sae, TOKENS, CONCEPTS[:, 1:], NAMES)
