"""Answers of several tokens: equal to a slow loop over tokens, and additive, wherever a task may go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.causes import Task, sequence_logprob
from gemmascope_plugin.errors import TaskError
from tests.support.rounding import TINY
from tests.tiny_models import random_tokens

CLEAN = random_tokens(batch_size=3, length=7, seed=5)
CORRUPT = CLEAN.clone()
CORRUPT[:, 2:4] = random_tokens(batch_size=3, length=3, seed=6)[:, 1:]
LENGTHS = (7, 5, 7)
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
ANSWERS = [[10, 11, 12], [20], [31, 32]]
WRONG = [[40], [41, 42], [43, 44, 45]]
TASK = Task(CLEAN, CORRUPT, sequence_logprob(ANSWERS, WRONG), mask=MASK)
ONE = Task(CLEAN, CORRUPT, sequence_logprob(ANSWERS), mask=MASK)


@torch.no_grad()
def slow(model: Any, prompt: torch.Tensor, answer: list[int], hooks: Any = ()) -> float:
    """``log p(answer | prompt)``, a pass over a longer text for every token."""
    total, text = 0.0, prompt
    for token in answer:
        with model.hooks(fwd_hooks=list(hooks)):
            logits = model(text[None])[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
        text = torch.cat([text, torch.tensor([token])])
    return total


def metrics(
    model: Any, tokens: torch.Tensor, hooks: Any = (), *, wrong: bool = True
) -> list[float]:
    rows = [row[:n] for row, n in zip(tokens, LENGTHS, strict=True)]
    right = [slow(model, row, answer, hooks) for row, answer in zip(rows, ANSWERS, strict=True)]
    if not wrong:
        return right
    others = [slow(model, row, answer, hooks) for row, answer in zip(rows, WRONG, strict=True)]
    return [a - b for a, b in zip(right, others, strict=True)]


@pytest.mark.parametrize("wrong", [True, False])
def test_it_is_the_sum_over_the_tokens_of_an_answer(model: Any, wrong: bool) -> None:
    bound = (TASK if wrong else ONE).bind(model)
    assert len(bound) == (6 if wrong else 3) and bound.n_prompts == 3
    with torch.no_grad():
        for tokens, rows in ((CLEAN, bound.clean), (CORRUPT, bound.corrupt)):
            values = bound.measure(model, rows)
            expected = metrics(model, tokens, wrong=wrong)
            assert bound.fold(values).tolist() == pytest.approx(expected, abs=1e-4)
            assert float(values.mean()) == pytest.approx(sum(expected) / 3, abs=1e-4)
            # copies, parts, and any order of rows
            twice = bound.measure(model, rows.repeat(2, 1))
            assert torch.allclose(twice, values.repeat(2), atol=1e-5)
            order = torch.tensor([2, 0, 2])
            assert torch.allclose(
                bound.part(order).measure(model, rows[order]), values[order], atol=1e-5
            )
    assert bound.prompt_lengths.tolist() == [n for n in LENGTHS for _ in range(len(bound) // 3)]


def test_one_token_is_a_logit_difference(model: Any) -> None:
    right, wrong = [10, 20, 30], [40, 50, 60]
    sequences = sequence_logprob([[i] for i in right], [[i] for i in wrong])
    tasks = [Task(CLEAN, CORRUPT, m) for m in (sequences, gs.logit_diff(right, wrong))]
    by_sequence, by_logits = (gs.activation_patching(model, task, "z") for task in tasks)
    assert torch.allclose(by_sequence.values, by_logits.values, atol=1e-5)
    assert torch.allclose(by_sequence.values_by_prompt, by_logits.values_by_prompt, atol=1e-5)
    assert by_sequence.metadata["n_prompts"] == 3
    assert by_sequence.metadata["metric"] == "sequence log-probability"


def test_an_answer_of_two_tokens_is_a_sum_of_two_questions(model: Any) -> None:
    """``log p(ab) = log p(a) + log p(b | a)``, and so are the effects of every patch."""
    whole = Task(CLEAN, CORRUPT, sequence_logprob([[10, 11]] * 3))
    first = Task(CLEAN, CORRUPT, gs.cross_entropy([10] * 3))
    longer = [torch.cat([x, torch.full((3, 1), 10)], 1) for x in (CLEAN, CORRUPT)]
    second = Task(longer[0], longer[1], gs.cross_entropy([11] * 3))
    for method in (gs.activation_patching, gs.attribution_patching):
        a, b, c = (method(model, t, "mlp_out", per_position=False) for t in (whole, first, second))
        assert torch.allclose(a.values, b.values + c.values, atol=2e-5)
        assert torch.allclose(
            a.values_by_prompt, b.values_by_prompt + c.values_by_prompt, atol=2e-5
        )


def _put(pos: int, value: torch.Tensor) -> Any:
    def hook_fn(x: Any, hook: Any) -> torch.Tensor:
        if x.shape[1] > pos:
            x = x.clone()
            x[0, pos] = value
        return x

    return hook_fn


def test_patching_is_that_of_a_loop(model: Any) -> None:
    effects = gs.activation_patching(model, TASK, "mlp_out", direction="noising", layers=[1])
    bound = TASK.bind(model)
    with torch.no_grad():
        other = model.run_with_cache(bound.corrupt)[1]["blocks.1.hook_mlp_out"]
    base = metrics(model, CLEAN)
    for pos in (3, 5):
        expected = []
        for prompt in range(3):
            text, values = CLEAN[prompt, : LENGTHS[prompt]], []
            for i, answer in enumerate((ANSWERS[prompt], WRONG[prompt])):
                hook = ("blocks.1.hook_mlp_out", _put(pos, other[2 * prompt + i, pos]))
                values.append(slow(model, text, answer, [hook]))
            expected.append(values[0] - values[1] - base[prompt])
        effect = effects.values_by_prompt[0, pos].tolist()
        assert effect == pytest.approx(expected, abs=1e-4)
    # position 6 is the answer's in the second prompt and the prompt's in the others
    assert effects.axes == ("layer", "pos") and effects.values.shape[1] == 9


@pytest.mark.parametrize("method", ["atp", "ig", "ig-inputs", "atp*", "relp"])
def test_estimates_know_it(model: Any, method: Any) -> None:
    line = {"steps": 4} if method.startswith("ig") else {}
    effects = gs.attribution_patching(model, TASK, "z", method=method, **line)
    assert effects.values_by_prompt.shape == (3, 4, 3)
    assert torch.allclose(effects.values_by_prompt.mean(-1), effects.values, atol=TINY)
    # parts of one row at most: those of a prompt stay together
    small = gs.attribution_patching(model, TASK, "z", method=method, max_rows=3, **line)
    assert torch.allclose(small.values_by_prompt, effects.values_by_prompt, atol=1e-4)


def test_magnitudes_are_those_of_differences(hooked2: Any) -> None:
    """Both answers of a prompt move together here, so that its metric and all magnitudes are zero."""
    same = sequence_logprob([[10, 11]] * 3, [[10, 11]] * 3)
    bound = Task(CLEAN, CORRUPT, same).bind(hooked2)
    with torch.no_grad():
        assert bound.fold(bound.measure(hooked2, bound.clean)).abs().max() < 1e-5
    half = [[10, 11], [10, 11], [12, 13]]
    task = Task(CLEAN, CORRUPT, sequence_logprob([[10, 11]] * 3, half))
    effects = gs.attribution_patching(hooked2, task, "z", method="atp*")
    assert effects.values_by_prompt[..., :2].abs().max() < 1e-4
    assert effects.values_by_prompt[..., 2].abs().max() > 1e-3


def test_edges_and_paths_know_it(model: Any) -> None:
    exact = gs.edge_patching(model, TASK)
    assert exact.values_by_prompt.shape[-1] == 3
    assert torch.allclose(exact.values_by_prompt.mean(-1), exact.values, atol=1e-5)
    paths = gs.path_patching(model, TASK, ["embed", "L0H1"], ["logits"], direction="noising")
    assert exact.edges.readers[-1].node.kind == "logits"
    columns = {writer.label: i for i, writer in enumerate(exact.edges.writers)}
    for i, name in enumerate(("embed", "L0H1")):
        expected = exact.values[columns[name], -1]
        assert float(paths.values[i, 0]) == pytest.approx(float(expected), abs=1e-4)
    assert paths.values_by_prompt.shape == (2, 1, 3)
    each = gs.edge_attribution(model, TASK, method="eap-ig", steps=24, by_prompt=True)
    assert each.values_by_prompt.shape[-1] == 3
    assert abs(each.metadata["conservation"]) < 0.05


@pytest.mark.parametrize("method", ["eap", "eap-ig", "clean-corrupted", "eap-ig-activations"])
def test_edges_are_estimated_prompt_by_prompt(hooked2: Any, method: Any) -> None:
    line = {"steps": 2} if "-ig" in method else {}
    means = gs.edge_attribution(hooked2, TASK, method=method, **line)
    each = gs.edge_attribution(hooked2, TASK, method=method, by_prompt=True, max_rows=3, **line)
    places = gs.edge_attribution(hooked2, TASK, method=method, per_position=True, **line)
    assert each.values_by_prompt.shape[-1] == 3
    assert torch.allclose(each.values, means.values, atol=1e-4)
    assert torch.allclose(places.values.sum(-1), means.values, atol=1e-4)


def test_tasks_side_by_side_count_prompt_by_prompt(hooked2: Any) -> None:
    other = Task(CLEAN, CORRUPT, gs.cross_entropy([1, 2, 3]))
    both = gs.edge_attribution(hooked2, [TASK, other], method="eap")
    single = [gs.edge_attribution(hooked2, t, method="eap") for t in (TASK, other)]
    assert torch.allclose(both.values, (single[0].values + single[1].values) / 2, atol=1e-5)


@pytest.mark.parametrize("method", ["exact", "atp", "eap-ig", "acdc"])
def test_circuits_are_found_and_evaluated(model: Any, method: str) -> None:
    circuit = gs.discover(model, TASK, method=method)
    scores = gs.evaluate(model, circuit, TASK, n_random=1, sizes=[0, circuit.n_units])
    assert scores.by_prompt.shape == (3, 3)
    assert scores.by_prompt[1].tolist() == pytest.approx(metrics(model, CLEAN), abs=1e-4)
    assert scores.faithfulness_by_size[-1] == pytest.approx(1, abs=1e-4)
    assert scores.metadata["n_prompts"] == 3


def test_resampling_takes_another_prompt_s_answer(hooked2: Any) -> None:
    equal = [[10, 11], [12, 13], [14, 15]]
    task = Task(CLEAN, CORRUPT, sequence_logprob(equal, equal[::-1]))
    effects = gs.activation_patching(hooked2, task, "z", replacement="resample")
    assert effects.values.abs().max() > 1e-4
    with pytest.raises(TaskError, match="Prompt 1 is the only one of 5 and 6 tokens"):
        gs.activation_patching(hooked2, TASK, "z", replacement="resample")


def test_words_are_taken_as_they_stand(hooked2: Any) -> None:
    texts = Task(["w5 w6", "w8 w9"], ["w7 w6", "w8 w4"], sequence_logprob(["w10 w11", " w12"]))
    bound = texts.bind(hooked2)
    assert bound.clean.tolist() == [[2, 5, 6, 10], [2, 8, 9, 0]]
    assert bound.lengths.tolist() == [4, 3]
    assert texts.take([1]).question.answer == [" w12"]


BAD = {
    "too few": ([[1]], None, "has 1 entries in answer for 3 prompts"),
    "too few wrong": ([[1]] * 3, [[1]], "has 1 entries in wrong for 3 prompts"),
    "empty": ([[1], [], [1]], None, "answer 1 is empty"),
    "no such id": ([[1], [256], [1]], None, "Token id 256 of answer 1 .*0 to 255"),
    "unknown": ([[1], "w999", [1]], None, "'w999' has a part that this tokenizer does not know"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_answer_is_an_error(hooked2: Any, case: str) -> None:
    answer, wrong, text = BAD[case]
    with pytest.raises(TaskError, match=text):
        Task(CLEAN, CORRUPT, sequence_logprob(answer, wrong)).bind(hooked2)
