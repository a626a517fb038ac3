"""Prompts of several lengths together are what each is alone."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.causes import Task, activation_patching, custom, kl_divergence, logit_diff
from gemmascope_plugin.errors import EmptySelectionError, TaskError, UnknownNameError
from gemmascope_plugin.models.prompts import padded, right_padded
from tests import factories
from tests.tiny_models import PAD_ID

CLEAN = ["w5 w6 w7 w8 w9", "w10 w11", "w12 w13 w14"]
CORRUPT = ["w5 w20 w7 w8 w9", "w21 w11", "w12 w22 w14"]
ANSWERS = {"answer": [30, 31, 32], "wrong": [40, 41, 42]}
TASK = Task(CLEAN, CORRUPT, logit_diff(**ANSWERS))


def alone(i: int) -> Task:
    metric = logit_diff([ANSWERS["answer"][i]], [ANSWERS["wrong"][i]])
    return Task([CLEAN[i]], [CORRUPT[i]], metric)


def test_padding_stands_behind_the_prompts(model) -> None:
    tokens, lengths = padded(model, CLEAN)
    assert lengths.tolist() == [6, 3, 4]
    assert tokens[1].tolist() == [2, 10, 11, PAD_ID, PAD_ID, PAD_ID]


def as_alone(model, component: str, **options) -> None:
    """Each prompt's effects in the batch are those of the prompt in a task of its own."""
    whole = activation_patching(model, TASK, component, **options)
    for i in range(3):
        single = activation_patching(model, alone(i), component, **options)
        got = whole.values_by_prompt[..., i]
        if whole.axes[-1] == "pos":
            got, behind = got.split([n := single.values.shape[-1], got.shape[-1] - n], dim=-1)
            assert not behind.abs().gt(1e-6).any()
        assert torch.allclose(got, single.values, atol=1e-5)
    assert whole.values.abs().max() > 1e-4


def test_each_prompt_is_as_alone(model) -> None:
    as_alone(model, "pattern", axes=("head", "layer", "pos"), layers=[1], heads=[0, 3])


@pytest.mark.parametrize("component", ["resid_mid", "z", "v"])
def test_components_of_each_prompt_are_as_alone(hooked2, component: str) -> None:
    as_alone(hooked2, component)


def test_features_of_each_prompt_are_as_alone(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    whole = activation_patching(hooked2, TASK, "feature", saes=sae)
    for i in range(3):
        features = whole.labels["feature"]
        single = activation_patching(hooked2, alone(i), "feature", saes=sae, features=features)
        assert torch.allclose(whole.values_by_prompt[:, i], single.values, atol=1e-5)


def test_means_are_over_prompts_that_reach_a_position(hooked2) -> None:
    """At the last position of the longest prompt the mean is its own activation."""
    got = activation_patching(hooked2, TASK, "mlp_out", replacement="mean", direction="noising")
    other = activation_patching(hooked2, alone(0), "mlp_out", direction="noising")
    assert torch.allclose(got.values_by_prompt[:, 5, 0], other.values[:, 5], atol=1e-5)


def test_resampling_needs_two_of_a_length(hooked2) -> None:
    with pytest.raises(TaskError, match="only one of . tokens"):
        activation_patching(hooked2, TASK, "z", replacement="resample")


def test_positions_lie_inside_the_longest_prompt(hooked2) -> None:
    with pytest.raises(UnknownNameError, match="Position 6 .*0 to 5"):
        activation_patching(hooked2, TASK, "resid_pre", positions=[6])


@pytest.mark.parametrize("front", [[0, 3, 2], [0, 0, 0], [0, 1, 2]])
def test_ids_with_a_mask_are_the_texts(model, front: list[int]) -> None:
    """Padding in front, behind and on both sides."""
    mask = torch.zeros(3, 6, dtype=torch.bool)
    batches = []
    for texts in (CLEAN, CORRUPT):
        tokens = torch.full((3, 6), PAD_ID)
        for i, text in enumerate(texts):
            row = padded(model, text)[0][0]
            mask[i, front[i] : front[i] + len(row)] = True
            tokens[i, front[i] : front[i] + len(row)] = row
        batches.append(tokens)
    by_id = Task(batches[0], batches[1], logit_diff(**ANSWERS), mask=mask).bind(model)
    by_text = TASK.bind(model)
    assert torch.equal(by_id.clean, by_text.clean)
    assert torch.equal(by_id.corrupt, by_text.corrupt)
    assert torch.equal(by_id.lengths, by_text.lengths)


@pytest.mark.parametrize("position", [-1, -2, 1, [4, 2, -3]])
def test_positions_of_metrics_count_from_each_prompt(model, position) -> None:
    def metric(rows, places):
        answers = {name: [each[i] for i in rows] for name, each in ANSWERS.items()}
        return logit_diff(**answers, position=places)

    bound = Task(CLEAN, CORRUPT, metric(range(3), position)).bind(model)
    with torch.no_grad():
        together = bound.measure(model, bound.clean)
        for i in range(3):
            place = position if isinstance(position, int) else position[i]
            task = Task([CLEAN[i]], [CORRUPT[i]], metric([i], place)).bind(model)
            assert float(task.measure(model, task.clean)) == pytest.approx(
                float(together[i]), abs=1e-5
            )


def test_the_reference_of_a_divergence_is_each_prompts_own(model) -> None:
    bound = Task(CLEAN, CORRUPT, kl_divergence()).bind(model)
    with torch.no_grad():
        assert bound.measure(model, bound.clean).abs().max() < 1e-6
        part = bound.part(torch.tensor([2, 0]))
        assert part.measure(model, part.clean).abs().max() < 1e-6
        assert bound.measure(model, bound.corrupt).max() < -1e-4


def test_parts_of_a_task_keep_what_belongs_to_them(model) -> None:
    seen = []

    def score(logits, prompts):
        seen.append(prompts.tolist())
        return logits[:, 30] + prompts

    bound = Task(CLEAN, CORRUPT, custom(score)).bind(model)
    with torch.no_grad():
        whole = bound.measure(model, bound.corrupt)
        parts = [part.measure(model, part.corrupt) for part in bound.parts(2)]
    assert seen == [[0, 1, 2], [0, 1], [2]]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)
    assert bound.mask.sum(1).tolist() == bound.lengths.tolist() == [6, 3, 4]


def test_bad_masks_are_errors(hooked2) -> None:
    tokens = torch.arange(2, 10).reshape(2, 4)
    hole = torch.tensor([[True, True, True, True], [True, False, True, True]])
    with pytest.raises(TaskError, match="mask of prompt 1 has a hole"):
        right_padded(hooked2, tokens, hole)
    with pytest.raises(EmptySelectionError, match="Prompt 0 has no tokens"):
        right_padded(hooked2, tokens, torch.zeros(2, 4, dtype=torch.bool))
    for prompts in (tokens[:, :3], CLEAN[:2]):
        with pytest.raises(TaskError, match="mask has shape .2, 4."):
            Task(prompts, prompts, logit_diff([1, 2], [3, 4]), mask=hole).bind(hooked2)
    with pytest.raises(EmptySelectionError, match="no prompt"):
        padded(hooked2, [])
