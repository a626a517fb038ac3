"""Verified effects are the exact ones; the bound on missed ones is Welch's."""

from __future__ import annotations

import math

import pytest
import torch

from gemmascope_plugin.causes import Task, activation_patching, attribution_patching, logit_diff
from gemmascope_plugin.causes.gradient.false_negative_bound import (
    false_negative_bound,
    subset_effects,
    upper_bounds,
)
from gemmascope_plugin.causes.gradient.verify_top import reopened, verify_top
from gemmascope_plugin.errors import TaskError
from tests import factories
from tests.causes.tasks import CLEAN, CORRUPT, RIGHT, TASK, WRONG, metric_under, values_at
from tests.factories import tiny_model
from tests.support.rounding import TINY


@pytest.mark.parametrize(
    ("component", "options"),
    [
        ("z", {}),
        ("k", {"axes": ("layer", "pos", "head"), "direction": "noising"}),
        ("mlp_out", {"per_position": False}),
        ("neuron", {"layers": [1, 2], "positions": [3, 7]}),
        ("v", {"replacement": "mean"}),
        ("feature", {}),
        ("error", {}),
        ("ln1_scale", {}),
    ],
)
def test_the_top_is_exact_and_the_rest_estimated(component: str, options) -> None:
    model = tiny_model("gemma3", "bridge")
    saes = factories.four_dictionaries(model) if component in ("feature", "error") else None
    guess = attribution_patching(model, TASK, component, saes=saes, **options)
    exact = activation_patching(model, TASK, component, saes=saes, **options)
    got = verify_top(model, TASK, guess, 3, saes=saes)
    at = torch.tensor(got.metadata["exact_at"])
    assert at.tolist() == guess.values.flatten().abs().argsort(descending=True)[:3].tolist()
    expected = guess.values.flatten().clone()
    expected[at] = exact.values.flatten()[at]
    assert torch.allclose(got.values.flatten(), expected, atol=1e-5)
    assert not torch.allclose(guess.values.flatten(), expected, atol=1e-5)
    assert got.values_by_prompt is not None
    assert torch.allclose(got.values_by_prompt.mean(-1), got.values, atol=TINY)
    assert got.metadata["n_exact"] == 3
    assert got.metadata["method"] == "attribution, top 3 exact"
    assert got.metadata["estimates"] == pytest.approx(guess.values.flatten()[at].tolist())


def test_the_rank_correlation_is_that_of_all_nodes_when_all_are_verified(hooked2) -> None:
    for method in ("ig", "atp*"):
        guess = attribution_patching(hooked2, TASK, "z", method=method)
        exact = activation_patching(hooked2, TASK, "z")
        got = verify_top(hooked2, TASK, guess, 12)
        magnitudes = exact.values.abs() if method == "atp*" else exact.values
        pairs = torch.stack([guess.values.flatten(), magnitudes.flatten()])
        ranks = pairs.argsort(-1).argsort(-1).double()
        assert got.metadata["rank_correlation"] == pytest.approx(float(torch.corrcoef(ranks)[0, 1]))
    assert verify_top(hooked2, TASK, guess, 1).metadata["rank_correlation"] is None


def test_effects_of_something_else_are_refused(hooked2) -> None:
    guess = attribution_patching(hooked2, TASK, "z")
    with pytest.raises(TaskError, match="k=13 nodes cannot be taken of 12"):
        verify_top(hooked2, TASK, guess, 13)
    other = Task(CLEAN, CORRUPT, logit_diff(WRONG, RIGHT), name="another")
    with pytest.raises(TaskError, match="does not come from task 'another'"):
        verify_top(hooked2, other, guess, 2)
    with pytest.raises(TaskError, match="part of a result"):
        verify_top(hooked2, TASK, guess.at(layer=1), 2)
    some = guess.at(layer=[0, 2])
    assert verify_top(hooked2, TASK, some, 2).labels["layer"] == (0, 2)


@pytest.mark.parametrize("component", ["z", "attn_out", "v"])
def test_subsets_are_patched_together(component: str) -> None:
    model = tiny_model("gemma2", "bridge")
    effects = attribution_patching(model, TASK, component, layers=[0, 2])
    places = torch.arange(effects.values.numel())
    inside = torch.rand(5, len(places), generator=torch.Generator().manual_seed(1)) < 0.5
    with reopened(model, TASK, effects, None, 4) as run:
        got = subset_effects(
            run,
            places,
            inside,
        )
    name = "blocks.{}.attn.hook_" if component in ("z", "v") else "blocks.{}.hook_"
    before = metric_under(model, CORRUPT, {})
    for row, value in zip(inside.reshape(5, 2, -1), got, strict=True):
        hooks = {}
        for layer, chosen in zip((0, 2), row, strict=True):
            hook = f"{name.format(layer)}{component}"
            clean = values_at(model, CLEAN, hook)

            def put(x, chosen=chosen, clean=clean):
                x = x.clone()
                axis = 1 if component == "attn_out" else 2
                at = chosen.nonzero().flatten()
                x.index_copy_(axis, at, clean.index_select(axis, at))
                return x

            hooks[hook] = put
        assert float(value) == pytest.approx(metric_under(model, CORRUPT, hooks) - before, abs=1e-5)


def test_bounds_are_those_of_welch() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(60, 4, generator=generator) < 0.5
    values = inside.float() @ torch.tensor([0.5, -1.0, 0.0, 0.1])
    values += 0.1 * torch.randn(60, generator=generator)
    got = upper_bounds(inside, values, 0.975)
    for node in range(4):
        groups = [values[inside[:, node]], values[~inside[:, node]]]
        errors = [float(g.var()) / len(g) for g in groups]
        freedom = sum(errors) ** 2 / sum(
            e**2 / (len(g) - 1) for e, g in zip(errors, groups, strict=True)
        )
        assert 40 < freedom < 60
        quantile = 2.0010 + (60 - freedom) * (2.0211 - 2.0010) / 20  # from tables: 60 and 40
        difference = abs(float(groups[0].mean() - groups[1].mean()))
        assert float(got[node]) == pytest.approx(
            difference + quantile * math.sqrt(sum(errors)), abs=2e-3
        )
    always = torch.ones(60, 1, dtype=torch.bool)
    assert upper_bounds(always, values, 0.95).isinf().all()


def test_the_bound_covers_what_was_left_out_and_shrinks(hooked2) -> None:
    guess = attribution_patching(hooked2, TASK, "mlp_out")
    exact = activation_patching(hooked2, TASK, "mlp_out").values.flatten().abs()
    wide = false_negative_bound(hooked2, TASK, guess, 5, n_subsets=50)
    narrow = false_negative_bound(hooked2, TASK, guess, 5, n_subsets=800)
    outside = guess.values.flatten().abs().argsort(descending=True)[5:]
    assert float(exact[outside].max()) * 0.5 < narrow.bound < wide.bound
    # a node changes where its token comes after the first that the prompts do not share, in any of them:
    # said by the tokens, not by the last bit of an activation or of an effect
    first = int((CLEAN != CORRUPT).any(0).nonzero()[0])
    assert narrow.n_nodes == int((outside % CLEAN.shape[1] >= first).sum())
    assert "with 95% confidence" in repr(narrow) and "outside the top 5" in repr(narrow)
    assert narrow == false_negative_bound(hooked2, TASK, guess, 5, n_subsets=800)
    sure = false_negative_bound(hooked2, TASK, guess, 5, n_subsets=800, confidence=0.99)
    assert sure.bound > narrow.bound and "with 99% confidence" in repr(sure)
    with pytest.raises(TaskError, match="n_subsets=3"):
        false_negative_bound(hooked2, TASK, guess, 5, n_subsets=3)
