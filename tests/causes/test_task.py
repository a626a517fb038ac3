"""Tasks and metrics: what is compared, and what cannot be."""

from __future__ import annotations

import math

import pytest
import torch

from gemmascope_plugin.causes import (
    Task,
    activation_patching,
    cross_entropy,
    custom,
    kl_divergence,
    logit_diff,
    margin,
    probability,
)
from gemmascope_plugin.errors import EmptySelectionError, TaskError, UnknownNameError
from tests.causes.tasks import CLEAN, CORRUPT, TASK
from tests.factories import unchecked

LOGITS = torch.tensor([[[0.0, 1.0, 2.0, 4.0]], [[3.0, 1.0, 0.0, 0.0]]])


def bound(metric, model):
    return metric.bind(model, 2)


def test_logit_diff_is_a_difference_of_logits(hooked2) -> None:
    metric = bound(logit_diff([3, 0], [1, 1]), hooked2)
    assert metric(LOGITS).tolist() == [3.0, 2.0]


def test_a_set_of_answers_counts_with_its_log_sum_exp(hooked2) -> None:
    metric = bound(logit_diff([[2, 3], [0]], [0, 1]), hooked2)
    assert metric(LOGITS).tolist() == pytest.approx([math.log(math.exp(2) + math.exp(4)), 2.0])


def test_probability_of_a_set_minus_that_of_another(hooked2) -> None:
    p = LOGITS[:, -1].softmax(-1)
    metric = bound(probability([[2, 3], [0, 1]]), hooked2)
    assert metric(LOGITS).tolist() == pytest.approx([float(p[0, 2:].sum()), float(p[1, :2].sum())])
    metric = bound(probability([[2, 3], [0]], [1, [1, 2]]), hooked2)
    expected = [float(p[0, 2:].sum() - p[0, 1]), float(p[1, 0] - p[1, 1:3].sum())]
    assert metric(LOGITS).tolist() == pytest.approx(expected, rel=1e-5)


def test_margin_is_the_distance_to_the_best_other_token(hooked2) -> None:
    metric = bound(margin([3, [1, 2]]), hooked2)
    assert metric(LOGITS).tolist() == [2.0, -2.0]
    # the padding of a narrower set points at token 0, which stays a rival
    narrow = torch.tensor([[[9.0, 1.0, 2.0, 4.0]], [[3.0, 1.0, 0.0, 0.0]]])
    assert bound(margin([3, [0, 2]]), hooked2)(narrow).tolist() == [-5.0, 2.0]


def test_cross_entropy_is_a_log_probability(hooked2) -> None:
    log_p = LOGITS[:, -1].log_softmax(-1)
    metric = bound(cross_entropy([3, [0, 1]]), hooked2)
    expected = [float(log_p[0, 3]), float(log_p[1, :2].logsumexp(-1))]
    assert metric(LOGITS).tolist() == pytest.approx(expected, rel=1e-5)


def test_divergence_is_that_of_torch(model) -> None:
    task = Task(CLEAN, CORRUPT, kl_divergence()).bind(model)
    with torch.no_grad():
        p, q = (
            torch.distributions.Categorical(logits=model(tokens)[:, -1])
            for tokens in (CLEAN, CORRUPT)
        )
        expected = -torch.distributions.kl_divergence(p, q)
        assert torch.allclose(task.measure(model, CORRUPT), expected, atol=1e-5)
        assert task.measure(model, CLEAN).abs().max() < 1e-5
    assert expected.max() < -1e-3


def test_any_function_of_the_logits_is_a_metric(hooked2) -> None:
    right = torch.tensor([10, 20])

    def largest(logits, prompts):
        return logits.gather(1, right[prompts][:, None])[:, 0]

    named = Task(CLEAN, CORRUPT, custom(largest, name="largest"))
    effects = activation_patching(hooked2, named, "z")
    assert effects.metadata["metric"] == "largest"
    assert torch.equal(
        effects.values, activation_patching(hooked2, Task(CLEAN, CORRUPT, largest), "z").values
    )
    bad = Task(CLEAN, CORRUPT, custom(lambda logits, prompts: logits))
    with pytest.raises(TaskError, match="gave .2, 256. for logits .2, 256.*one number per prompt"):
        activation_patching(hooked2, bad, "z")
    with pytest.raises(TaskError, match="The metric of task 'task' is 3"):
        Task(CLEAN, CORRUPT, 3)


@pytest.mark.parametrize("before_cap", [False, True])
def test_logits_before_and_after_the_cap(model, before_cap: bool) -> None:
    metric = logit_diff([10, 20], [30, 40], before_cap=before_cap)
    task = Task(CLEAN, CORRUPT, metric).bind(model)
    hook = {"names_filter": ["unembed.hook_out"]}
    with torch.no_grad():
        after, cache = model.run_with_cache(CLEAN, **hook)
        logits = cache["unembed.hook_out"] if before_cap else after
        expected = [
            float(row[-1, r] - row[-1, w])
            for row, r, w in zip(logits, (10, 20), (30, 40), strict=True)
        ]
        assert task.measure(model, CLEAN).tolist() == pytest.approx(expected, abs=1e-5)
    where = activation_patching(model, Task(CLEAN, CORRUPT, metric), "mlp_out", layers=[2])
    assert where.metadata["logits"].startswith("before" if before_cap else "after")
    # both ends of a late start are read the same way
    whole = activation_patching(
        model, Task(CLEAN, CORRUPT, metric), "resid_pre", per_position=False
    )
    assert whole.values.tolist() == pytest.approx([whole.gap] * 3, abs=1e-5)


def test_each_prompt_has_its_own_position(hooked2) -> None:
    metric = logit_diff([10, 20], [30, 40], position=[3, -2])
    with torch.no_grad():
        logits = hooked2(CLEAN)
        expected = [
            float(logits[0, 3, 10] - logits[0, 3, 30]),
            float(logits[1, 6, 20] - logits[1, 6, 40]),
        ]
        task = Task(CLEAN, CORRUPT, metric).bind(hooked2)
        assert task.measure(hooked2, CLEAN).tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(TaskError, match="1 positions for 2 prompts"):
        Task(CLEAN, CORRUPT, logit_diff([1, 2], [3, 4], position=[0])).bind(hooked2)


def test_copies_of_the_prompts_get_the_same_answers(hooked2) -> None:
    metric = bound(logit_diff([3, 0], [1, 1]), hooked2)
    assert metric(LOGITS.repeat(3, 1, 1)).tolist() == [3.0, 2.0] * 3


def test_the_position_is_the_one_asked_for(hooked2) -> None:
    metric = logit_diff([3], [1], position=0).bind(hooked2, 1)
    logits = torch.stack([LOGITS[0, 0], LOGITS[1, 0]])[None]
    assert metric(logits).tolist() == [3.0]


def test_words_and_ids_mean_the_same(hooked2) -> None:
    by_word = Task(
        ["w5 w6 w7", "w8 w9 w7"],
        ["w5 w9 w7", "w8 w6 w7"],
        logit_diff(["w10", "w11"], ["w12", "w13"]),
    )
    by_id = Task(
        torch.tensor([[2, 5, 6, 7], [2, 8, 9, 7]]),
        torch.tensor([[2, 5, 9, 7], [2, 8, 6, 7]]),
        logit_diff([10, 11], [12, 13]),
    )
    from_words, from_ids = (
        activation_patching(hooked2, task, "z").values for task in (by_word, by_id)
    )
    assert torch.equal(from_words, from_ids)
    assert by_word.first(1).clean == ["w5 w6 w7"]
    assert len(by_word) == len(by_id) == 2


def test_a_task_of_one_prompt_may_be_a_string(hooked2) -> None:
    task = Task("w5 w6", "w7 w6", logit_diff(["w10"], ["w11"]), name="one")
    assert len(task) == 1
    assert task.first(1) == task
    assert repr(task) == "Task('one', 1 prompts, logit difference, first 'w5 w6')"
    assert activation_patching(hooked2, task, "z").values.shape == (3, 4)


METRIC = logit_diff([10, 20], [30, 40])
BAD = {
    "numbers differ": (CLEAN, CORRUPT[:1], METRIC, "2 clean and 1 corrupted"),
    "lengths differ": (
        CLEAN,
        CORRUPT[:, :5],
        METRIC,
        "Prompt 0 has 8 tokens clean and 5 corrupted",
    ),
    "a pair of two lengths": (
        ["w5 w6", "w5"],
        ["w7", "w5"],
        METRIC,
        "Prompt 0 has 3 tokens clean and 2",
    ),
    "no difference": (CLEAN, CLEAN, METRIC, "are the same tokens"),
    "few answers": (CLEAN, CORRUPT, logit_diff([10], [30]), "1 entries in answer for 2 prompts"),
    "few wrong answers": (CLEAN, CORRUPT, logit_diff([1, 2], [3]), "1 entries in wrong for 2"),
    "an empty answer": (CLEAN, CORRUPT, logit_diff([[], 2], [3, 4]), "Prompt 0 has an empty set"),
    "far position": (
        CLEAN,
        CORRUPT,
        logit_diff([1, 2], [3, 4], position=8),
        "position 8 .* prompt 0 of 8 tok",
    ),
    "no gap": (CLEAN, CORRUPT, logit_diff([9, 9], [9, 9]), "0.000000 on clean.*another metric"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_compared_is_an_error(hooked2, case: str) -> None:
    clean, corrupt, metric, text = BAD[case]
    with pytest.raises(TaskError, match=text):
        activation_patching(hooked2, Task(clean, corrupt, metric), "z")


def test_an_unknown_answer_is_an_error(hooked2) -> None:
    with pytest.raises(UnknownNameError, match="'w999x' is not a single token"):
        activation_patching(hooked2, Task(CLEAN, CORRUPT, logit_diff(["w999x", 1], [2, 3])), "z")


@pytest.mark.parametrize("token", [-1, 256])
def test_an_answer_outside_the_vocabulary_is_an_error(hooked2, token: int) -> None:
    with pytest.raises(UnknownNameError, match=f"Token id {token} .*0 to 255"):
        activation_patching(hooked2, Task(CLEAN, CORRUPT, logit_diff([token, 1], [2, 3])), "z")


def test_an_empty_prompt_is_an_error(hooked2) -> None:
    with pytest.raises(EmptySelectionError, match="The prompt is empty"):
        activation_patching(hooked2, Task("", "w5", logit_diff([1], [2])), "z")


def test_the_first_prompts_of_a_task() -> None:
    first = TASK.first(1)
    assert torch.equal(first.clean, CLEAN[:1])
    assert first.metric.answer == [10]
    assert first.metric.wrong == [30]
    assert first.name == "random"


def test_answers_may_be_of_any_integers(hooked2) -> None:
    """Arrays, tensors, numpy's integers and a single answer for a single prompt all mean the same."""
    import numpy as np

    plain = logit_diff([10, 20], [[30, 31], 40])
    for right in (np.array([10, 20]), torch.tensor([10, 20]), (np.int64(10), torch.tensor(20))):
        other = logit_diff(right, [torch.tensor([30, 31]), np.int32(40)])
        assert (other.answer, other.wrong) == (plain.answer, plain.wrong)
    task = Task("w5 w6", "w7 w6", logit_diff("w10", torch.tensor(11)))
    assert task.metric.answer == ["w10"] and task.metric.wrong == [11]
    metadata = activation_patching(hooked2, task, "z").metadata
    assert metadata["answers"] == "'w10' (10) against 'w11' (11)"
    assert "first prompt 'w10' (10) against 'w11' (11)" in repr(
        activation_patching(hooked2, task, "z")
    )


@pytest.mark.parametrize("wrong", [1.5, None, {"a": 1}, [1.5], [[1, None]], b"x"])
def test_what_is_neither_a_word_nor_an_id_is_an_error(wrong) -> None:
    with pytest.raises(TaskError, match="neither a word nor a token id"):
        unchecked(logit_diff)(wrong, [1])
