"""The built-in tasks on the real Gemma 3 270M: which it does, and that it does not do two hops."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.causes.builtin import SPLITS, TASKS
from gemmascope_plugin.errors import TaskError

N = 8
LEAST_RIGHT = {"agreement": 0.75, "agreement_es": 0.75, "successors": 0.8, "antonyms": 0.9}
"""Share of prompts whose answer has to be preferred to the wrong one; .95 where nothing is said.

Of the 16 prompts of both splits 12 or more are right by guessing with 4 %, 15 or more with .03 %.
"""

pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", [name for name in TASKS if name != "two_hop"])
def test_the_model_is_above_chance(real_model: Any, name: str) -> None:
    tasks = [gs.Task.builtin(name, real_model, n=N, split=split) for split in SPLITS]
    assert not set(tasks[0].clean) & set(tasks[1].clean)
    figures = [task.figures(real_model) for task in tasks]
    right = sum(float(f.accuracy or 0) for f in figures) / 2
    print(name, *figures)
    assert right >= LEAST_RIGHT.get(name, 0.95)
    assert sum(f.mean for f in figures) / 2 > (0.5 if name == "greater_than" else 1.0)
    assert f"{N} train prompts" in repr(tasks[0]) and "on gemma-3-270m" in repr(tasks[0])


def test_two_hops_are_not_done(real_model: Any) -> None:
    """It says the landmark's own city, on more than half of the prompts."""
    shares = [
        gs.Task.builtin("two_hop", real_model, n=N, split=split).figures(real_model).accuracy
        for split in SPLITS
    ]
    print("two_hop", shares)
    assert sum(float(s or 0) for s in shares) / 2 < 0.5


def test_answers_of_several_tokens(real_model: Any) -> None:
    """Against a loop over tokens, with answers and prompts of several lengths."""
    prompts = ["The largest city of the United States is", "The Golden Gate Bridge is in"]
    corrupt = ["The largest city of the United Kingdom is", "The Golden Temple Bridge is in"]
    answers, wrong = [" New York City", " San Francisco"], [" London", " Amritsar"]
    task = gs.Task(prompts, corrupt, gs.sequence_logprob(answers, wrong))
    bound = task.bind(real_model)
    with torch.no_grad():
        metric = bound.fold(bound.measure(real_model, bound.clean)).tolist()
    expected = [
        _slow(real_model, prompt, right) - _slow(real_model, prompt, other)
        for prompt, right, other in zip(prompts, answers, wrong, strict=True)
    ]
    assert metric == pytest.approx(expected, abs=2e-3)
    glued = gs.Task(prompts, corrupt, gs.sequence_logprob(["New York City", " San Francisco"]))
    with pytest.raises(
        TaskError, match="answer 0 is 'New York City', which would run into .*' is'"
    ):
        glued.bind(real_model)


@torch.no_grad()
def _slow(model: Any, prompt: str, answer: str) -> float:
    encode = model.tokenizer
    ids = [encode.bos_token_id, *encode(prompt, add_special_tokens=False)["input_ids"]]
    total = 0.0
    for token in encode(answer, add_special_tokens=False)["input_ids"]:
        logits = model(torch.tensor([ids]))[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        ids.append(token)
    return total


def test_a_sentence_and_lists(real_model: Any) -> None:
    names = ["Mary", "John", "Anna", "Tom", "Wilhelmina"]
    task = gs.Task.from_template(
        real_model,
        "When {A} and {B} went to the {place}, {B} gave a {thing} to",
        answer=" {A}",
        wrong=" {B}",
        corrupt={"A": "B", "B": "A"},
        fill={"A": names, "B": names, "place": ["park"], "thing": ["book"]},
    )
    assert len(task) == 12 and task.origin is not None and task.origin.n_dropped == 8
    filtered = task.filtered(real_model)
    assert len(filtered) >= 11
    assert (filtered.figures(real_model).metric > 0).all()


def test_the_sentence_of_the_readme(real_model: Any) -> None:
    """The task that the README makes from a sentence, as it stands there."""
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "from_template" in b)
    lines = [line for line in ast.parse(block).body if "from_template" in ast.unparse(line)]
    names: dict[str, Any] = {"gs": gs, "model": real_model}
    exec(compile(ast.Module(lines, []), "README.md", "exec"), names)
    task = names["mine"]
    assert len(task) == 8
    assert task.figures(real_model).accuracy == 1
