"""What is inserted: zeros, means without padding, other prompts."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.causes import Task, activation_patching, logit_diff
from gemmascope_plugin.causes.replace import partners, replaced
from gemmascope_plugin.errors import TaskError
from tests import factories
from tests.causes.tasks import CLEAN, CORRUPT, TASK, metric_under, values_at

X = torch.arange(2 * 3 * 2.0).reshape(2, 3, 2)
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_means_leave_padding_out() -> None:
    by_position = replaced(X, MASK, "mean")
    assert torch.equal(by_position[0], by_position[1])
    assert torch.equal(by_position[0, 1], (X[0, 1] + X[1, 1]) / 2)
    assert torch.equal(by_position[0, 2], X[0, 2])
    whole = replaced(X, MASK, "overall_mean")
    assert torch.allclose(whole, X[MASK].mean(0).expand_as(X))


def test_positions_of_a_pattern_are_queries() -> None:
    pattern = torch.rand(2, 4, 3, 3)
    mean = replaced(pattern, MASK, "mean", pos_axis=2)
    assert torch.allclose(mean[0, :, 1], pattern[:, :, 1].mean(0))
    assert torch.allclose(mean[1, :, 2], pattern[0, :, 2])


@pytest.mark.parametrize("seed", range(5))
def test_partners_are_others_of_the_same_length(seed: int) -> None:
    lengths = torch.tensor([3, 5, 3, 3, 5, 3])
    partner = partners(lengths, seed)
    assert sorted(partner.tolist()) == list(range(6))
    assert not (partner == torch.arange(6)).any()
    assert torch.equal(lengths[partner], lengths)
    assert torch.equal(partner, partners(lengths, seed))


def test_seeds_differ() -> None:
    lengths = torch.full((8,), 4)
    assert len({tuple(partners(lengths, seed).tolist()) for seed in range(4)}) > 1


@pytest.mark.parametrize("replacement", ["zero", "mean", "overall_mean", "resample"])
def test_the_sweep_inserts_it_into_the_base_run(model, replacement: str) -> None:
    name = "blocks.1.attn.hook_z"
    acts = values_at(model, CORRUPT, name)
    value = {
        "zero": torch.zeros_like(acts),
        "mean": acts.mean(0, keepdim=True).expand_as(acts),
        "overall_mean": acts.mean((0, 1), keepdim=True).expand_as(acts),
        "resample": acts.flip(0),  # of two prompts
    }[replacement]

    def patch(x):
        x = x.clone()
        x[:, :, 2] = value[:, :, 2]
        return x

    got = activation_patching(model, TASK, "z", direction="noising", replacement=replacement)
    expected = metric_under(model, CLEAN, {name: patch}) - metric_under(model, CLEAN, {})
    assert float(got.values[1, 2]) == pytest.approx(expected, abs=1e-5)
    assert got.metadata["replacement"] == replacement
    assert got.metadata.get("seed") == (0 if replacement == "resample" else None)


def test_the_middle_of_the_stream_can_be_a_mean(hooked2) -> None:
    name = "blocks.2.hook_resid_mid"
    got = activation_patching(
        hooked2, TASK, "resid_mid", replacement="mean", axes=("layer",), layers=[2]
    )
    mean = values_at(hooked2, CLEAN, name).mean(0, keepdim=True)
    expected = metric_under(hooked2, CORRUPT, {name: lambda x: mean.expand_as(x)})
    expected -= metric_under(hooked2, CORRUPT, {})
    assert float(got.values[0]) == pytest.approx(expected, abs=1e-5)


def test_zero_ablates_the_features_that_are_active(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    name = sae.cfg.metadata.hook_name
    got = activation_patching(hooked2, TASK, "feature", saes=sae, replacement="zero")
    acts = sae.encode(values_at(hooked2, CORRUPT, name))[:, 1:]
    active = acts.flatten(0, 1).any(0).nonzero().flatten().tolist()
    assert [f.feature for f in got.labels["feature"]] == active


def test_what_has_no_meaning_is_an_error(hooked2) -> None:
    alone = Task(CLEAN[:1], CORRUPT[:1], logit_diff([10], [30]))
    with pytest.raises(TaskError, match="Prompt 0 is the only one of 8 tokens.*other"):
        activation_patching(hooked2, alone, "z", replacement="resample")
    with pytest.raises(TaskError, match="cannot divide by zero"):
        activation_patching(hooked2, TASK, "ln1_scale", replacement="zero")
    with pytest.raises(TaskError, match="what rounding leaves of zero.*resid_post"):
        activation_patching(hooked2, TASK, "resid_mid", replacement="zero")
    with pytest.raises(TaskError, match="different lengths.*per position"):
        activation_patching(hooked2, TASK, "pattern", replacement="overall_mean")
