"""Which token an answer is, where words exist with a space in front and without."""

from __future__ import annotations

from typing import Any

import pytest

import gemmascope_plugin as gs
from gemmascope_plugin.errors import TaskError, UnknownNameError
from tests.support import real_like

PROMPTS = [real_like.PROMPT, real_like.OTHER]


@pytest.fixture(scope="module")
def lifelike() -> Any:
    return real_like.real_like()


def answers(model: Any, right: Any, wrong: Any, prompts: Any = None) -> list[str]:
    clean = PROMPTS if prompts is None else prompts
    task = gs.Task(clean, clean[::-1], gs.logit_diff(right, wrong))
    metric = task.bind(model).metric
    names = model.tokenizer.convert_ids_to_tokens
    return [names(int(side.ids[0, 0])) for side in (metric.right, metric.wrong)]


def test_signs_are_what_stands_there(lifelike: Any) -> None:
    assert answers(lifelike, [".", "."], [",", ","]) == [".", ","]
    assert answers(lifelike, [" .", "."], [")", ","]) == ["\u2581.", ")"]


def test_a_space_is_part_of_the_answer(lifelike: Any) -> None:
    assert answers(lifelike, [" Paris"] * 2, ["giver"] * 2) == ["\u2581Paris", "\u2581giver"]
    with pytest.raises(UnknownNameError, match=r"'Paris' may be the token 'Paris' \(id .*' Paris'"):
        answers(lifelike, ["Paris"] * 2, [" Rome"] * 2)


def test_the_prompt_decides(lifelike: Any) -> None:
    lines = ["The city\n", "The book\n"]
    assert answers(lifelike, ["The"] * 2, ["Yes"] * 2, lines) == ["The", "Yes"]


def test_a_long_answer_does_not_run_into_its_prompt(lifelike: Any) -> None:
    glued = gs.Task(PROMPTS, PROMPTS[::-1], gs.sequence_logprob(["New York", " Paris"]))
    with pytest.raises(TaskError, match="answer 0 is 'New York', which would run into .*' is'"):
        glued.bind(lifelike)
    right = gs.Task(PROMPTS, PROMPTS[::-1], gs.sequence_logprob([" New York", " Paris"]))
    assert right.bind(lifelike).lengths.tolist() == [7, 6]
