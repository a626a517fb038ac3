"""Tasks from a sentence and lists: what is drawn, what is dropped, and mistakes."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest

import gemmascope_plugin as gs
from gemmascope_plugin.errors import EmptySelectionError, InputError, TaskError, UnknownNameError
from tests.causes.builtin.words import Words

WORDS: Any = Words()
NAMES = ["Mary", "John", "Anna", "Tom"]
SENTENCE = "When {A} and {B} went to the {place}, {B} gave a {thing} to"
FILL: Any = {"A": NAMES, "B": NAMES, "place": ["park", "store"], "thing": ["book"]}


def made(**changes: Any) -> gs.Task:
    options: dict[str, Any] = {"answer": " {A}", "wrong": " {B}", "corrupt": {"A": "B", "B": "A"}}
    options |= {"fill": FILL, **changes}
    return gs.Task.from_template(WORDS, options.pop("template", SENTENCE), **options)


def text(token: int) -> str:
    return WORDS.tokenizer.decode([token])


def test_every_combination_is_drawn_once() -> None:
    task = made()
    assert len(task) == len(set(task.clean)) == 4 * 3 * 2
    for clean, corrupt, right, wrong in zip(
        task.clean, task.corrupt, task.metric.answer, task.metric.wrong, strict=True
    ):
        names = re.fullmatch(r"When (\w+) and (\w+) went to the \w+, (\w+) gave a book to", clean)
        assert names and names[2] == names[3] != names[1]
        assert (text(right[0]), text(wrong[0])) == (f" {names[1]}", f" {names[2]}")
        assert corrupt == clean.translate(str.maketrans({})).replace(names[1], "@").replace(
            names[2], names[1]
        ).replace("@", names[2])
    assert made(n=5, seed=1).clean == made(n=5, seed=1).clean != made(n=5, seed=2).clean
    assert made().metric.wrong == made(wrong=None).metric.wrong


def test_a_corruption_may_be_a_template_or_another_filler() -> None:
    swapped = made(corrupt="When {A} and {B} went to the {place}, {A} gave a {thing} to")
    assert all(
        c.endswith("book to") and c != d
        for c, d in zip(swapped.clean, swapped.corrupt, strict=True)
    )
    other = made(corrupt={"A": "other"}, wrong=" {other A}")
    assert other.metric.wrong == made(corrupt={"A": "other"}, wrong=None).metric.wrong
    for clean, corrupt, wrong in zip(other.clean, other.corrupt, other.metric.wrong, strict=True):
        assert corrupt.split()[1] == text(wrong[0]).strip() not in clean
        assert corrupt.split()[2:] == clean.split()[2:]
    third = made(corrupt="When {A} and {B} went to the {place}, {other B} gave a {thing} to")
    assert len(third) == 24


def test_rows_belong_together() -> None:
    facts = [("France", "Paris"), ("Japan", "Tokyo"), ("Italy", "Rome")]
    task = gs.Task.from_template(
        WORDS,
        "The capital of {country} is",
        answer=" {capital}",
        corrupt={"country": "other", "capital": "other"},
        fill={("country", "capital"): facts},
    )
    assert len(task) == 3
    for clean, corrupt, right, wrong in zip(
        task.clean, task.corrupt, task.metric.answer, task.metric.wrong, strict=True
    ):
        for prompt, token in ((clean, right), (corrupt, wrong)):
            assert (prompt.split()[3], text(token[0]).strip()) in facts


def test_what_does_not_fit_is_dropped_and_counted() -> None:
    fill = {**FILL, "A": [*NAMES, "Xylophonia"]}
    task = made(fill=fill)
    assert len(task) == 24 and task.origin is not None and task.origin.n_dropped == 8
    with pytest.raises(TaskError, match=r"Only 24 of 30 prompts of 'When .* fit.*8 were dropped"):
        made(fill=fill, n=30)
    with pytest.raises(TaskError, match="Only 0 of 64 prompts"):
        made(fill={**FILL, "A": ["Xylophonia"]})
    whole = made(fill=fill, metric=gs.sequence_logprob, corrupt={"place": "other"})
    assert len(whole) == 32
    assert {len(ids) for ids in whole.metric.answer} > {1}


@pytest.mark.parametrize("metric", [gs.margin, gs.cross_entropy, gs.probability])
def test_metrics_may_do_without_wrong_answers(metric: Any) -> None:
    task = made(metric=metric, wrong=None, corrupt={"place": "other"})
    assert len(task) == 24
    assert task.question == metric(task.metric.answer)
    swapped = made(metric=metric, wrong=None)  # the answer to the corrupted prompt is only compared
    assert (swapped.metric.wrong is None) == (metric is not gs.probability)


def test_a_metric_may_have_its_options() -> None:
    task = made(metric=partial(gs.logit_diff, before_cap=True))
    assert task.question.before_cap and task.metric.wrong == made().metric.wrong
    long = {**FILL, "A": ["Xylophonia"]}
    whole = made(metric=partial(gs.sequence_logprob), fill=long, corrupt={"place": "other"})
    assert all(len(ids) > 1 for ids in whole.metric.answer)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no list": (
        {"template": "{A} {B} {plce} {thing}"},
        UnknownNameError,
        "'plce'.*Did you mean 'place'",
    ),
    "no slot": ({"fill": {**FILL, "verb": ["gave"]}}, UnknownNameError, "a list for 'verb'"),
    "answer": ({"answer": " {C}"}, UnknownNameError, "the slot 'C' of answer"),
    "corrupt": ({"corrupt": {"C": "A"}}, UnknownNameError, "the slot 'C' of corrupt"),
    "source": (
        {"corrupt": {"A": "swap"}},
        UnknownNameError,
        "'swap' is neither a slot nor 'other'.*slots A, B, place, thing.*{'A': 'other'}",
    ),
    "near source": ({"corrupt": {"A": "othr"}}, UnknownNameError, "Did you mean 'other'"),
    "fill of numbers": ({"fill": {**FILL, "A": [3]}}, InputError, "fill.'A'. has the entry 3"),
    "fill of None": ({"fill": {**FILL, "A": None}}, InputError, "fill.'A'. is None, not a list"),
    "fill list": ({"fill": []}, InputError, "fill=A list of nothing has no slots.*Try: fill={"),
    "fill None": ({"fill": None}, InputError, "fill=None has no slots"),
    "slot": ({"fill": {**FILL, 3: ["a"]}}, InputError, "fill has the slot 3"),
    "row": ({"fill": {**FILL, ("x", "y"): [("a", 3)]}}, InputError, "has the entry 3"),
    "answer 3": ({"answer": 3}, InputError, 'answer=3 is not a text.*answer=" {A}"'),
    "wrong 3": ({"wrong": 3}, InputError, "wrong=3 is not a text"),
    "template 3": ({"template": 3}, InputError, "template=3 is not a text"),
    "corrupt 3": ({"corrupt": 3}, InputError, "corrupt=3 says no change.*Try: corrupt={"),
    "corrupt None": ({"corrupt": None}, InputError, "corrupt=None says no change"),
    "corrupt value": ({"corrupt": {"A": 3}}, InputError, "corrupt has 'A': 3"),
    "n half": ({"n": 1.5}, InputError, "n=1.5 is not a whole number"),
    "seed": ({"seed": "a"}, InputError, "seed='a' is not a whole number"),
    "metric text": ({"metric": "logit_diff"}, TaskError, "is a text.*Try: metric=.*logit_diff"),
    "metric made": (
        {"metric": gs.logit_diff(["a"], ["b"])},
        TaskError,
        "has its answers already.*without a call",
    ),
    "no answers": ({"metric": gs.kl_divergence}, TaskError, "kl_divergence does not ask for ans"),
    "custom": ({"metric": gs.custom}, TaskError, "custom does not ask for answers"),
    "of logits": ({"metric": lambda logits: logits[:, 3]}, TaskError, "does not ask for answers"),
    "no metric": ({"metric": lambda answer, wrong: 3}, TaskError, "gave 3 for answers"),
    "wrong for none": (
        {"metric": gs.margin},
        TaskError,
        "margin does not compare.*logit_diff, probability, sequence_logprob",
    ),
    "blank": (
        {"answer": "{A}", "wrong": "{B}"},
        TaskError,
        "dropped: .* without a blank.*Try: answer=' {A}', wrong=' {B}', with the blank",
    ),
    "same": ({"wrong": " {A}"}, TaskError, "wrong=' {A}' is the answer itself"),
    "same by words": (
        {"fill": {**FILL, "C": NAMES}, "answer": " Tom", "wrong": " {C}", "n": 999},
        TaskError,
        "for right and wrong answers of the same token",
    ),
    "nothing": ({"corrupt": {}}, TaskError, "corrupt changes nothing"),
    "empty list": ({"fill": {**FILL, "place": []}}, TaskError, r"fill\['place'\] is \[\]"),
    "text": ({"fill": {**FILL, "place": "park"}}, TaskError, "is 'park'"),
    "no fill": ({"fill": {}}, TaskError, "fill is empty"),
    "rows": ({"fill": {**FILL, ("x", "y"): [("a",)]}}, TaskError, "for 2 slots"),
    "braces": ({"template": SENTENCE + "{"}, TaskError, "cannot be read"),
    "n": ({"n": 0}, EmptySelectionError, "n=0 leaves no prompt"),
    "no wrong": (
        {"wrong": None, "corrupt": {"place": "other"}},
        TaskError,
        "nothing to compare ' {A}' with",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes(case: str) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        made(**changes)
