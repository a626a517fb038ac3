"""Integrated gradients sum to the change that they explain."""

from __future__ import annotations

import copy

import pytest
import torch

from gemmascope_plugin.causes import Task, attribution_patching, custom, kl_divergence
from gemmascope_plugin.causes.experiment import experiment
from gemmascope_plugin.causes.gradient.integrated import integrated_activations
from gemmascope_plugin.causes.gradient.slopes import parts_of
from gemmascope_plugin.errors import InputError, TaskError, UnknownNameError
from gemmascope_plugin.models import gradients
from gemmascope_plugin.models.arithmetic import Arithmetic
from gemmascope_plugin.models.load_model import bridge_from_hf, hooked_from_hf
from tests import factories
from tests.causes.tasks import CLEAN, CORRUPT, LATE, TASK, metric_under, values_at
from tests.factories import n_hooks, tiny_hf, tiny_model, tiny_tokenizer
from tests.support.rounding import TINY

NAME = "blocks.1.hook_resid_pre"


def slow(model, alphas: list[float]) -> torch.Tensor:
    """Effects by position at one hook, one backward pass per step."""
    corrupt, clean = values_at(model, CORRUPT, NAME), values_at(model, CLEAN, NAME)
    metric = TASK.bind(model).metric
    slope = torch.zeros_like(corrupt)
    for alpha in alphas:
        point = corrupt + alpha * (clean - corrupt)
        hook = (NAME, lambda x, hook, point=point: x + (point - x).detach())
        with model.hooks(fwd_hooks=[hook]):
            slope += gradients(model, CORRUPT, lambda logits: metric(logits).mean(), [NAME])[NAME]
    return (slope / len(alphas) * (clean - corrupt)).sum((0, 2))


@pytest.mark.parametrize(("method", "direction"), [("ig", "noising"), ("ig-inputs", "denoising")])
def test_effects_sum_to_the_change_of_the_metric(model, method: str, direction: str) -> None:
    effects = attribution_patching(model, TASK, "resid_pre", method=method, direction=direction)
    change = effects.gap if direction == "denoising" else -effects.gap
    shares = (effects.values.sum(1) - change) / effects.gap
    if method == "ig":
        assert float(shares.abs().max()) < 0.01
        assert list(effects.metadata["residual"].values()) == pytest.approx(
            shares.tolist(), abs=1e-4
        )
    assert effects.metadata["residual_max"] < 0.01
    assert effects.metadata["steps"] == 10


def test_the_residual_of_inputs_is_that_of_the_embedding(double) -> None:
    """The stream before the first block is the embedding."""
    inputs = attribution_patching(double, TASK, "resid_pre", method="ig-inputs")
    at_nodes = attribution_patching(double, TASK, "resid_pre", method="ig")
    assert torch.allclose(inputs.values[0], at_nodes.values[0])
    assert inputs.metadata["residual"]["hook_embed"] == pytest.approx(
        at_nodes.metadata["residual"]["blocks.0.hook_resid_pre"], abs=1e-9
    )
    assert not torch.allclose(inputs.values[1], at_nodes.values[1], rtol=1e-3)


def test_batched_midpoints_equal_one_pass_per_step(double) -> None:
    expected = slow(double, [1 / 6, 1 / 2, 5 / 6])
    for max_rows in (1, 5, 64):
        got = attribution_patching(
            double, TASK, "resid_pre", method="ig", steps=3, layers=[1], max_rows=max_rows
        )
        assert torch.allclose(got.values[0], expected, atol=1e-12)


def test_the_error_falls_with_the_square_and_a_left_sum_is_worse(double) -> None:
    def residual(steps: int) -> float:
        effects = attribution_patching(double, TASK, "resid_pre", method="ig", steps=steps)
        return abs(effects.metadata["residual"][NAME])

    assert residual(10) / residual(20) == pytest.approx(4, rel=0.25)
    gap = metric_under(double, CLEAN, {}) - metric_under(double, CORRUPT, {})
    left = slow(double, [k / 10 for k in range(10)]).sum()
    assert abs(float(left) - gap) / abs(gap) > 10 * residual(10)


@pytest.mark.parametrize(
    "component", ["resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "neuron"]
)
def test_every_component_explains_what_moving_its_layer_does(double, component: str) -> None:
    effects = attribution_patching(double, TASK, component, method="ig", steps=20)
    hooks = list(effects.metadata["residual"])
    assert len(hooks) == 3
    assert effects.metadata["residual_max"] < 3e-3
    by_layer = effects.values.sum(1)
    for layer, name in enumerate(hooks):
        if component == "resid_mid":
            continue  # what is written is not what the other run has at that hook
        clean = values_at(double, CLEAN, name)
        exact = metric_under(double, CORRUPT, {name: lambda x, clean=clean: clean})
        change = exact - metric_under(double, CORRUPT, {})
        assert float(by_layer[layer]) == pytest.approx(change, abs=3e-3 * abs(effects.gap))


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_features_and_errors_are_moved_site_by_site(backend: str) -> None:
    model = tiny_model("gemma2", backend)
    saes = factories.four_dictionaries(model)
    features = attribution_patching(model, TASK, "feature", method="ig", saes=saes)
    errors = attribution_patching(model, TASK, "error", method="ig", saes=saes)
    for effects in (features, errors):
        assert len(effects.metadata["residual"]) == 4
        assert effects.metadata["residual_max"] < 0.02
    some = features.labels["feature"][:2]
    alone = attribution_patching(model, TASK, "feature", method="ig", saes=saes, features=some)
    assert torch.allclose(alone.values, features.values[:2], atol=TINY)


def test_a_task_in_parts_gives_the_same(double) -> None:
    whole = attribution_patching(double, TASK, "z", method="ig-inputs")
    parts = attribution_patching(double, TASK, "z", method="ig-inputs", max_rows=1)
    assert torch.allclose(whole.values, parts.values)
    assert whole.metadata["residual_max"] == pytest.approx(parts.metadata["residual_max"])
    assert parts.values_by_prompt is not None
    assert torch.allclose(parts.values_by_prompt.mean(-1), parts.values)


def test_where_the_gradient_vanishes_integrated_gradients_do_not(hooked2) -> None:
    task = Task(CLEAN, CORRUPT, kl_divergence())
    for method in ("atp", "atp*", "relp"):
        with pytest.raises(
            TaskError, match=r"gradient of minus KL divergence is zero.*method=\"ig\""
        ):
            attribution_patching(hooked2, task, "z", method=method, direction="noising")
    effects = attribution_patching(hooked2, task, "resid_pre", method="ig", direction="noising")
    assert effects.metadata["residual_max"] < 0.02
    assert float(attribution_patching(hooked2, task, "z").values.abs().max()) > 1e-4


def test_mistakes_are_errors(hooked2) -> None:
    def hits(logits: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        return (logits[:, 0] > logits[:, 1]).float() + prompts * logits.detach()[:, 2]

    with pytest.raises(TaskError, match="'hits' has no gradient.*activation_patching"):
        attribution_patching(hooked2, Task(CLEAN, CORRUPT, custom(hits, name="hits")), "z")
    constant = Task(CLEAN, CORRUPT, custom(lambda logits, prompts: 0 * prompts.float() + 1))
    with pytest.raises(TaskError, match="metric is 1.000000 on clean and 1.000000 on corrupted"):
        attribution_patching(hooked2, constant, "z")
    with pytest.raises(InputError, match="steps=0 is out of range"):
        attribution_patching(hooked2, TASK, "z", method="ig", steps=0)
    with pytest.raises(TaskError, match="ig-inputs moves the embedding.*replacement='zero'"):
        attribution_patching(hooked2, TASK, "z", method="ig-inputs", replacement="zero")
    with pytest.raises(
        UnknownNameError, match="Unknown method 'ig-input'.*Did you mean 'ig-inputs'"
    ):
        factories.unchecked(attribution_patching)(hooked2, TASK, "z", method="ig-input")


def test_nothing_is_left_behind(model) -> None:
    hooks = n_hooks(model)
    with (
        pytest.raises(RuntimeError, match="stop"),
        experiment(model, TASK, "z", direction="denoising") as run,
    ):
        (part,) = parts_of(run, 10)
        integrated_activations(part, 2, 10)
        raise RuntimeError("stop")
    assert n_hooks(model) == hooks
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("component", ["z", "k", "pattern", "resid_mid", "mlp_out", "neuron"])
def test_late_passes_give_what_whole_ones_do(component: str, backend: str, monkeypatch) -> None:
    """Prompts begin to differ at several positions; whole passes are those of the model's modules."""
    build = {"hooked": hooked_from_hf, "bridge": bridge_from_hf}[backend]
    half = build(copy.deepcopy(tiny_hf("gemma3")).to(torch.bfloat16), tiny_tokenizer(), "half")
    options = {"method": "ig-inputs", "steps": 3, "max_rows": 8}
    for model, share in ((tiny_model("gemma3", backend), 1e-5), (half, 0.1)):
        late = attribution_patching(model, LATE, component, **options)
        with monkeypatch.context() as patched:
            patched.setattr(Arithmetic, "of", lambda *args: None)
            whole = attribution_patching(model, LATE, component, **options)
        assert late.values_by_prompt is not None and whole.values_by_prompt is not None
        difference = late.values_by_prompt - whole.values_by_prompt
        assert float(difference.norm()) < share * float(whole.values_by_prompt.norm())
        assert late.metadata["residual_max"] == pytest.approx(
            whole.metadata["residual_max"], abs=share
        )
