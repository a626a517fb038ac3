"""The attention fixes equal replacing one query or key by hand; GradDrop equals one pass per layer."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.causes import Task, attribution_patching, logit_diff
from gemmascope_plugin.causes.experiment import experiment
from gemmascope_plugin.causes.gradient.atp_star import (
    MAX_CHANGE,
    attention_fixes,
    key_fix,
    pattern_hook,
)
from gemmascope_plugin.causes.gradient.slopes import by_patch, differences, slopes
from gemmascope_plugin.causes.grid import Choice
from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.models import gradients
from gemmascope_plugin.models.anatomy import Anatomy
from tests import factories, tiny_models
from tests.causes.tasks import CORRUPT, TASK, values_at
from tests.factories import n_hooks, tiny_model
from tests.support.rounding import TINY

LONG_CLEAN = tiny_models.random_tokens(batch_size=2, length=20, seed=5)
LONG_CORRUPT = LONG_CLEAN.clone()
LONG_CORRUPT[:, 2:6] = tiny_models.random_tokens(batch_size=2, length=5, seed=6)[:, 1:]
LONG = Task(LONG_CLEAN, LONG_CORRUPT, logit_diff([10, 20], [30, 40]))
"""Longer than the sliding window."""
LAYER = 0
"""A local one."""


def pattern_slopes(model, task: Task, tokens: torch.Tensor) -> torch.Tensor:
    name = f"blocks.{LAYER}.attn.hook_pattern"
    metric = task.bind(model).metric
    return gradients(model, tokens, lambda logits: metric(logits).mean(), [name])[name]


@torch.no_grad()
def pattern_with(model, tokens: torch.Tensor, name: str, change) -> torch.Tensor:
    """The attention pattern with the activation at one hook changed."""
    wanted, held = f"blocks.{LAYER}.attn.hook_pattern", []
    hooks = [(name, lambda x, hook: change(x)), (wanted, lambda x, hook: held.append(x))]
    with model.hooks(fwd_hooks=hooks):
        model(tokens)
    return held[0]


def by_hand(model, task: Task, port: str, places) -> torch.Tensor:
    """``<change of the pattern, dm/dp>`` with one head's query or key replaced at some positions."""
    name = f"blocks.{LAYER}.attn.hook_{port}"
    clean = values_at(model, LONG_CLEAN, name)
    slope = pattern_slopes(model, task, LONG_CORRUPT)
    before = pattern_with(model, LONG_CORRUPT, name, lambda x: x)
    effects = torch.zeros(len(places), clean.shape[2])
    for i, place in enumerate(places):
        for head in range(clean.shape[2]):

            def put(x, place=place, head=head):
                x = x.clone()
                x[:, place, head] = clean[:, place, head]
                return x

            after = pattern_with(model, LONG_CORRUPT, name, put)
            effects[i, head] = ((after - before) * slope).sum()
    return effects


def fixed(model, port: str, axes: tuple[str, ...]) -> torch.Tensor:
    """What the fixes say of one layer, without GradDrop."""
    with experiment(model, LONG, port, Choice(axes=axes), direction="denoising") as run:
        fixes = attention_fixes(run, Anatomy(model))
        gradient = slopes(run, [pattern_hook(name) for name in fixes])
        products = {name: fix.effects(gradient[pattern_hook(name)]) for name, fix in fixes.items()}
        values = by_patch(run.grid, products)[0].mean(1)
    return values.reshape(run.grid.shape)[LAYER]


@pytest.mark.parametrize("port", ["q", "k"])
def test_fixes_equal_replacing_one_position_by_hand(model, port: str) -> None:
    places = [2, 3, 5, 19]
    expected = by_hand(model, LONG, port, places)
    got = fixed(model, port, ("layer", "pos", "head"))[places]
    assert torch.allclose(got, expected, atol=TINY)
    assert expected.shape[1] == (4 if port == "q" else 2)
    assert float(expected.abs().max()) > 1e-4
    first_order = attribution_patching(model, LONG, port, axes=("layer", "pos", "head"))
    assert float((first_order.values[LAYER, places] - expected).abs().max()) > 1e-4


@pytest.mark.parametrize("port", ["q", "k"])
def test_patches_of_all_positions_replace_them_together(model, port: str) -> None:
    expected = by_hand(model, LONG, port, [slice(None)])[0]
    assert torch.allclose(fixed(model, port, ("layer", "head")), expected, atol=TINY)
    one_by_one = fixed(model, port, ("layer", "pos", "head")).sum(0)
    assert torch.allclose(one_by_one, expected, atol=TINY) == (port == "q")


def test_the_key_fix_survives_saturated_attention() -> None:
    """A pattern of exactly one and score changes of a hundred, in both directions."""
    old = torch.tensor([[0.0, -torch.inf, -torch.inf], [200.0, 0.0, -torch.inf], [0.0, 90.0, 3.0]])
    new = old + torch.tensor([[100.0, 0, 0], [-300.0, 100.0, 0], [90.0, -100.0, -100.0]])
    slope = torch.tensor([[1.0, 0, 0], [0.5, -1.0, 0], [0.25, 1.0, -2.0]])
    got = key_fix(old[None, None], new[None, None], slope[None, None, None])[0, 0, 0]
    expected = torch.zeros(3, dtype=torch.float64)
    for key in range(3):
        changed = old.double()
        changed[key:, key] += (new - old)[key:, key].clamp(-MAX_CHANGE, MAX_CHANGE)
        expected[key] = ((changed.softmax(-1) - old.double().softmax(-1)) * slope).sum()
    assert torch.allclose(got.double(), expected, rtol=1e-5)
    assert float(expected.abs().min()) > 0


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("component", ["z", "mlp_out", "resid_pre", "k"])
def test_grad_drop_equals_one_pass_per_layer(backend: str, component: str) -> None:
    model = tiny_model("gemma2" if backend == "hooked" else "gemma3", backend)
    got = attribution_patching(model, TASK, component, method="atp*")
    with experiment(model, TASK, component, direction="denoising") as run:
        names, deltas = run.grid.hooks, differences(run)
        fixes = attention_fixes(run, Anatomy(model)) if component == "k" else {}
    wanted = [pattern_hook(name) if fixes else name for name in names]
    metric = TASK.bind(model).metric
    expected = torch.zeros_like(got.values)
    for dropped in range(3):
        stop = [
            (f"blocks.{dropped}.{name}", lambda grad, hook: (torch.zeros_like(grad),))
            for name in ("hook_attn_out", "hook_mlp_out")
        ]
        with model.hooks(bwd_hooks=stop):
            grads = gradients(model, CORRUPT, lambda logits: metric(logits).sum(), wanted)
        for layer, (name, at) in enumerate(zip(names, wanted, strict=True)):
            fix = fixes.get(name)
            product = grads[at] * deltas[name] if fix is None else fix.effects(grads[at][None])[0]
            each = (product.sum(1) if product.ndim == 4 else product).sum(-1)
            if layer != dropped or component == "resid_pre":
                expected[layer] += each.abs().mean(0)
    expected /= 3 if component == "resid_pre" else 2
    assert torch.allclose(got.values, expected, atol=TINY)
    assert float(got.values.min()) >= 0
    assert got.metadata["magnitudes"]
    assert got.metadata["sign"] == "magnitude: no direction"


def test_copies_may_be_taken_a_few_at_a_time(hooked2) -> None:
    whole = attribution_patching(hooked2, TASK, "q", method="atp*").values
    for max_rows in (1, 4):
        some = attribution_patching(hooked2, TASK, "q", method="atp*", max_rows=max_rows).values
        assert torch.allclose(some, whole, atol=TINY)


def test_features_have_an_own_layer_where_they_write_inside_one(hooked2) -> None:
    saes = factories.four_dictionaries(hooked2)
    got = attribution_patching(hooked2, TASK, "feature", method="atp*", saes=saes)
    plain = attribution_patching(hooked2, TASK, "feature", saes=saes)
    last = [i for i, f in enumerate(got.labels["feature"]) if f.site == "blocks.2.hook_mlp_out"]
    assert last  # nothing comes after: dropping the layers below changes nothing
    assert plain.values_by_prompt is not None
    expected = plain.values_by_prompt[last].abs().mean(1)
    assert torch.allclose(got.values[last], expected, atol=TINY)


def test_one_layer_cannot_be_dropped() -> None:
    from gemmascope_plugin.models.load_model import hooked_from_hf

    overrides = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    shallow = hooked_from_hf(tiny_models.gemma2(**overrides), factories.tiny_tokenizer(), "tiny")
    hooks = n_hooks(shallow)
    with pytest.raises(ModelError, match='this model has one.*method="atp"'):
        attribution_patching(shallow, TASK, "z", method="atp*")
    assert n_hooks(shallow) == hooks
