"""RelP: relevance is conserved under all rules, values never change."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.causes import Task, attribution_patching, logit_diff
from gemmascope_plugin.causes.gradient.relp import RelpRules
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.models import gradients
from gemmascope_plugin.models.gradients import gradients_of
from tests import factories
from tests.causes.tasks import CLEAN, CORRUPT, RIGHT, TASK, WRONG, values_at
from tests.factories import n_hooks, tiny_model

ALL = RelpRules(pattern=True, caps=True)
STREAM = ["hook_embed", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"]


def relevance(model, rules: RelpRules | None) -> tuple[list[float], float]:
    """Sum of relevance at three points of the stream, and the metric."""
    metric = TASK.bind(model).metric
    with model.hooks(fwd_hooks=[] if rules is None else rules.hooks(model)):
        coefficients = gradients(model, CORRUPT, lambda logits: metric(logits).mean(), STREAM)
        value = float(metric(model(CORRUPT)).mean())
    return [float((coefficients[n] * values_at(model, CORRUPT, n)).sum()) for n in STREAM], value


def test_relevance_sums_to_the_metric_with_all_rules_and_only_then(model) -> None:
    sums, value = relevance(model, ALL)
    assert sums == pytest.approx([value] * 3, rel=1e-4)
    for rules in (RelpRules(), RelpRules(caps=True), None):
        lost = [abs(total - value) / abs(value) for total in relevance(model, rules)[0][:2]]
        assert min(lost) > 0.05, rules
    if getattr(model.cfg, "output_logits_soft_cap", 0) > 0:
        sums, value = relevance(model, RelpRules(pattern=True))
        assert abs(sums[2] - value) / abs(value) > 1e-3


def test_logits_before_the_cap_have_no_cap_to_pass(hooked2) -> None:
    task = Task(CLEAN, CORRUPT, logit_diff(RIGHT, WRONG, before_cap=True))
    bound, name = task.bind(hooked2), "blocks.0.hook_resid_pre"
    with ALL.on(hooked2, hooked2, before_cap=True):
        slope = gradients_of(hooked2, lambda: bound.measure(hooked2, CORRUPT).sum(), [name])[name]
    total = float((slope * values_at(hooked2, CORRUPT, name)).sum())
    assert total == pytest.approx(float(bound.measure(hooked2, CORRUPT).sum()), rel=1e-4)


def test_values_stay_to_the_last_bit_and_the_model_is_left_alone(model) -> None:
    hooks, logits = n_hooks(model), model(CORRUPT)
    for rules in (RelpRules(caps=True), ALL):
        with rules.on(model, model), torch.enable_grad():
            assert torch.equal(model(CORRUPT), logits)
    with pytest.raises(RuntimeError, match="stop"), ALL.on(model, model):
        raise RuntimeError("stop")
    assert n_hooks(model) == hooks
    assert torch.equal(model(CORRUPT), logits)


@pytest.mark.parametrize(
    ("family", "component"),
    [
        ("gemma2", "resid_mid"),
        ("gemma2", "feature"),
        ("gemma3", "v"),
        ("gemma3", "q"),
        ("gemma3", "neuron"),
    ],
)
def test_both_classes_agree(family: str, component: str) -> None:
    saes = factories.four_dictionaries(tiny_model(family, "hooked"))
    hooked, bridge = (
        attribution_patching(
            tiny_model(family, backend),
            TASK,
            component,
            method="relp",
            rules=RelpRules(caps=True),
            saes=saes if component == "feature" else None,
        )
        for backend in ("hooked", "bridge")
    )
    assert torch.allclose(hooked.values, bridge.values, atol=1e-5)
    assert float(hooked.values.abs().max()) > 1e-3
    plain = attribution_patching(
        tiny_model(family, "hooked"),
        TASK,
        component,
        saes=saes if component == "feature" else None,
    )
    assert not torch.allclose(hooked.values, plain.values, rtol=0.05)
    assert (hooked.axes, hooked.labels) == (plain.axes, plain.labels)


def test_constants_get_no_relevance(hooked2) -> None:
    with pytest.raises(TaskError, match=r"no relevance reaches 'q'.*RelpRules\(pattern=False\)"):
        attribution_patching(hooked2, TASK, "q", method="relp", rules=RelpRules(pattern=True))
    with pytest.raises(TaskError, match="no relevance reaches 'ln2_scale'"):
        attribution_patching(hooked2, TASK, "ln2_scale", method="relp")
    effects = attribution_patching(hooked2, TASK, "z", method="relp", rules=ALL)
    assert effects.metadata["pattern_rule"] and effects.metadata["cap_rule"]
    assert effects.metadata["method"] == "RelP"
