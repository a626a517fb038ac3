"""Attribution patching is the derivative of the metric along each patch."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.causes import activation_patching, attribution_patching
from gemmascope_plugin.errors import UnknownNameError
from gemmascope_plugin.models import flatten_heads, gradients, restore_heads
from gemmascope_plugin.splice import splice
from tests import factories
from tests.causes.tasks import CLEAN, CORRUPT, TASK, metric_under, values_at
from tests.factories import n_hooks, tiny_model
from tests.splice.reference import features
from tests.tiny_models import FIRST_WORD_ID

RUNS = {"denoising": (CORRUPT, CLEAN), "noising": (CLEAN, CORRUPT)}
EPS = 1e-4


def slope(model, tokens: torch.Tensor, name: str, direction: torch.Tensor) -> float:
    """Central difference of the metric along a direction at one hook."""
    ends = [
        metric_under(model, tokens, {name: lambda x, s=s: x + s * EPS * direction}) for s in (1, -1)
    ]
    return (ends[0] - ends[1]) / (2 * EPS)


@pytest.mark.parametrize("direction", RUNS)
@pytest.mark.parametrize("component", ["resid_pre", "attn_out", "mlp_out", "z"])
def test_estimates_are_slopes_towards_the_other_run(double, component: str, direction: str) -> None:
    base, other = RUNS[direction]
    effects = attribution_patching(double, TASK, component, direction=direction)
    for layer, column in [(0, 3), (1, 2), (2, 3)]:
        middle = "attn.hook_z" if component == "z" else f"hook_{component}"
        name = f"blocks.{layer}.{middle}"
        step = values_at(double, other, name) - values_at(double, base, name)
        place = (..., column, slice(None)) if component == "z" else (slice(None), column)
        direction = torch.zeros_like(step)
        direction[place] = step[place]
        expected = slope(double, base, name, direction)
        assert float(effects.values[layer, column]) == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("direction", RUNS)
def test_feature_estimates_are_slopes_of_the_bare_model(double, direction: str) -> None:
    """Two dictionaries, one below the other, and no dictionary in the reference."""
    base, other = RUNS[direction]
    saes = {
        "blocks.0.hook_resid_post": factories.residual(double, 0),
        "blocks.1.attn.hook_z": factories.attention(double, 1),
    }
    effects = attribution_patching(double, TASK, "feature", direction=direction, saes=saes)
    keep = (base >= FIRST_WORD_ID)[..., None]
    for site, sae in saes.items():
        before, after = (values_at(double, tokens, site) for tokens in (base, other))
        step = (features(sae, flatten_heads(after)) - features(sae, flatten_heads(before))) * keep
        for i, (where, index) in enumerate(effects.labels["feature"]):
            if where == site:
                direction = restore_heads(step[..., [index]] * sae.W_dec[index], before)
                expected = slope(double, base, site, direction)
                assert float(effects.values[i]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_estimate_becomes_exact_as_the_corruption_shrinks(double) -> None:
    """Interpolated prompts: halving the step divides the gap to the exact effect by about four."""
    name = "blocks.1.hook_resid_pre"
    corrupt, clean = values_at(double, CORRUPT, name), values_at(double, CLEAN, name)
    estimate = attribution_patching(double, TASK, "resid_pre", per_position=False)
    base = metric_under(double, CORRUPT, {})
    gaps = []
    for share in (0.02, 0.01):
        step = share * (clean - corrupt)
        exact = metric_under(double, CORRUPT, {name: lambda x, step=step: x + step}) - base
        gaps.append(abs(exact - share * float(estimate.values[1])))
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.2)


def test_features_and_error_share_out_the_estimate_of_the_stream(model) -> None:
    sae = factories.residual(model, 0)
    site = "blocks.0.hook_resid_post"
    of_features = attribution_patching(model, TASK, "feature", saes=sae).values.sum()
    with splice(model, sae) as spliced:
        name = f"{site}.hook_sae_error"
        metric = TASK.bind(model).metric
        slopes = gradients(spliced, CORRUPT, lambda logits: metric(logits).mean(), [name])
        errors = [
            spliced.run_with_cache(tokens, names_filter=name)[1][name]
            for tokens in (CLEAN, CORRUPT)
        ]
    of_error = (slopes[name] * (errors[0] - errors[1])).sum()
    stream = attribution_patching(model, TASK, "resid_pre", per_position=False).values[1]
    assert float(of_features + of_error) == pytest.approx(float(stream), rel=1e-3, abs=1e-5)


def test_exact_and_estimate_have_the_same_form(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    for component, saes in (("z", None), ("mlp_out", None), ("feature", sae)):
        exact = activation_patching(hooked2, TASK, component, saes=saes)
        estimate = attribution_patching(hooked2, TASK, component, saes=saes)
        assert exact.axes == estimate.axes
        assert exact.labels == estimate.labels
        assert exact.gap == pytest.approx(estimate.gap)
        assert estimate.metadata["method"] == "attribution"


@pytest.mark.parametrize("component", ["resid_pre", "z", "feature"])
def test_both_classes_agree(component: str) -> None:
    saes = factories.four_dictionaries(tiny_model("gemma2", "hooked"))
    hooked, bridge = (
        attribution_patching(
            tiny_model("gemma2", backend),
            TASK,
            component,
            saes=saes if component == "feature" else None,
        ).values
        for backend in ("hooked", "bridge")
    )
    assert torch.allclose(hooked, bridge, atol=1e-5)


def test_nothing_is_left_behind(model) -> None:
    hooks = n_hooks(model)
    sae = factories.residual(model, 1)
    attribution_patching(model, TASK, "feature", saes=sae)
    assert n_hooks(model) == hooks
    assert all(p.grad is None for p in (*model.parameters(), *sae.parameters()))


def test_unknown_names_are_errors(hooked2) -> None:
    with pytest.raises(UnknownNameError, match="'heads'.*There is: resid_pre"):
        attribution_patching(hooked2, TASK, "heads")
    with pytest.raises(UnknownNameError, match="needs dictionaries"):
        attribution_patching(hooked2, TASK, "feature")
