"""Built-in tasks on a tokenizer whose words differ by a blank, and on the bundled suite."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

import gemmascope_plugin as gs
from gemmascope_plugin.causes.builtin import SPLITS, TASKS, build
from gemmascope_plugin.causes.builtin.drafts import PATIENCE, Draft, fit
from gemmascope_plugin.errors import EmptySelectionError, InputError, TaskError, UnknownNameError
from tests.causes.builtin.words import Words, drafts
from tests.factories import unchecked

WORDS: Any = Words()
WORD_PAIRS = ["Mary", "John", "Anna", "Tom", "Paul"]


def ids(text: str) -> list[int]:
    return WORDS.tokenizer(text, add_special_tokens=False)["input_ids"]


def as_set(entry: Any) -> set[int]:
    return {entry} if isinstance(entry, int) else set(entry)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TASKS)
def test_prompts_fit_the_tokenizer(name: str, split: Any) -> None:
    built = build(name, WORDS, n=24, split=split, seed=3)
    assert len(set(zip(built.clean, built.corrupt, strict=True))) == 24
    metric = built.metric
    for clean, corrupt, answer, wrong in zip(
        built.clean, built.corrupt, metric.answer, metric.wrong, strict=True
    ):
        assert len(ids(clean)) == len(ids(corrupt)) and clean != corrupt
        right, other = as_set(answer), as_set(wrong)
        assert right and other and not right & other
        for token in right | other:
            # the text of the answer behind its prompt is read as the prompt and this token
            longer = clean + WORDS.tokenizer.decode([token])
            assert ids(longer) == [*ids(clean), token]
    again = build(name, WORDS, n=24, split=split, seed=3)
    assert (again.clean, again.corrupt, again.metric) == (built.clean, built.corrupt, metric)
    assert build(name, WORDS, n=24, split=split, seed=4).clean != built.clean


@pytest.mark.parametrize("name", TASKS)
def test_splits_have_no_prompt_in_common(name: str) -> None:
    train, held_out = (
        {text for seed in range(3) for d in drafts(name, split, 60, seed) for text in d[:2]}
        for split in SPLITS
    )
    assert not train & held_out


def test_names_templates_and_nouns_are_split() -> None:
    for name in ("ioi", "pronouns", "agreement", "induction", "capitals", "antonyms", "two_hop"):
        answers = [
            {d.answer for seed in range(4) for d in drafts(name, split, 100, seed)}
            for split in SPLITS
        ]
        if name not in ("pronouns", "agreement", "two_hop"):  # she, are, Madrid
            assert not answers[0] & answers[1]
        starts = [{d.clean.split(" and ")[0] for d in drafts(name, s, 200)} for s in SPLITS]
        assert not starts[0] & starts[1]


def test_both_orders_of_names_come_up() -> None:
    first = [
        draft.clean.index(draft.answer[0].strip()) < draft.clean.index(draft.wrong[0].strip())
        for draft in drafts("ioi", "train", 200)
    ]
    assert 60 < sum(first) < 140


def test_years_are_read_by_their_first_token() -> None:
    """Each digit is a token here: the digit of the start's own decade is neither right nor wrong."""
    built = build("greater_than", WORDS, n=12, split="train", seed=0)
    for clean, right, wrong in zip(
        built.clean, built.metric.answer, built.metric.wrong, strict=True
    ):
        year = int("".join(d for d in clean if d.isdigit())[2:4])
        decade = year // 10
        texts = [{int(WORDS.tokenizer.decode([i])) for i in as_set(s)} for s in (right, wrong)]
        # where the span starts in 39, all years of its decade are too early
        assert texts == [set(range(decade + 1, 10)), set(range((year + 1) // 10))]
    assert built.metric.name == "probability"


def test_what_does_not_fit_is_dropped_and_counted() -> None:
    built = build("two_hop", WORDS, n=24, split="train", seed=0)
    assert built.n_dropped > 0  # landmarks of different lengths in tokens
    coarse: Any = Words(300)  # letters, nearly
    with pytest.raises(TaskError, match=r"Only 0 of 2 prompts of 'capitals' fit.*\d+ were dropped"):
        build("capitals", coarse, n=2, split="train", seed=0)


def test_mistakes_name_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match="Unknown task 'IOI'.*Did you mean 'ioi'"):
        gs.Task.builtin("IOI", WORDS)
    with pytest.raises(UnknownNameError, match="Unknown split 'test'. There is: train, held_out"):
        unchecked(build)("ioi", WORDS, n=2, split="test", seed=0)
    with pytest.raises(EmptySelectionError, match="n=0 leaves no prompt"):
        gs.Task.builtin("ioi", WORDS, n=0)
    with pytest.raises(TaskError, match=r"Only \d+ of 900 prompts of 'successors' fit"):
        gs.Task.builtin("successors", WORDS, n=900)


@pytest.mark.parametrize("n", [2.5, "4", None, True])
def test_a_number_of_prompts_is_a_whole_number(n: Any) -> None:
    with pytest.raises(InputError, match=f"n={n!r} is not a whole number. Try: n=64"):
        gs.Task.builtin("ioi", WORDS, n=n)
    with pytest.raises(InputError, match="is not a whole number"):
        gs.tiny().task("ioi", n=n)
    assert len(gs.Task.builtin("ioi", WORDS, n=4.0)) == 4  # pyright: ignore[reportArgumentType]


@pytest.mark.untyped
def test_the_name_of_a_task_comes_first() -> None:
    message = r"The model stands where the name.*Task.builtin\(name, model\): the name comes first"
    task: Any = gs.tiny().task
    builtin: Any = gs.Task.builtin
    with pytest.raises(InputError, match=message):
        builtin(WORDS, "ioi")
    with pytest.raises(InputError, match="^3 is not the name of a task"):
        builtin(3, WORDS)
    with pytest.raises(InputError, match="'ioi' is not a model"):
        builtin("ioi", "ioi")
    with pytest.raises(InputError, match="^name=A HookedTransformer is not a text"):
        task(gs.tiny().model)
    with pytest.raises(UnknownNameError, match=r"^Unknown split \(a HookedTransformer\)"):
        builtin("ioi", WORDS, split=gs.tiny().model)


def test_drafting_ends_where_nothing_new_is_drawn() -> None:
    """Of few drafts all come up, and the number of draws does not grow with what is asked for."""
    n_draws = 0

    def draws() -> Iterator[Draft]:
        nonlocal n_draws
        rng = Random(0)
        while True:
            n_draws += 1
            first, second = rng.sample(WORD_PAIRS, 2)
            yield Draft(f"I saw {first} and", f"I saw {second} and", (" John",), (" Mary",))

    fitting = fit(WORDS, draws(), 10**6, 10**9)
    n = len(WORD_PAIRS) * (len(WORD_PAIRS) - 1)
    assert len(fitting.pairs) + fitting.n_dropped == n and n_draws < 10 * PATIENCE[0]


def test_fitting_in_batches_is_fitting_one_by_one() -> None:
    for name in TASKS:
        rows = list({draft[:2]: draft for draft in drafts(name, "train", 150)}.values())
        several, single = (fit(WORDS, iter(rows), n, 150) for n in (150, 1))
        assert several.pairs[:1] == single.pairs
        alone = [fit(WORDS, iter([draft]), 1, 1) for draft in rows]
        assert several.pairs == tuple(pair for fitting in alone for pair in fitting.pairs)
        assert several.n_dropped == sum(fitting.n_dropped for fitting in alone)


def test_a_model_without_a_tokenizer_is_an_error() -> None:
    bare: Any = Words(300)
    bare.tokenizer = None
    with pytest.raises(gs.GemmaScopeError, match="The model has no tokenizer"):
        gs.Task.builtin("ioi", bare)


@pytest.fixture(scope="module")
def suite() -> Any:
    return gs.tiny()


@pytest.mark.parametrize(
    ("name", "suite_name"),
    [("ioi", "ioi"), ("greater_than", "years"), ("induction", "induction"), ("two_hop", "two_hop")],
)
def test_the_bundled_suite_gives_its_own(suite: Any, name: str, suite_name: str) -> None:
    task = gs.Task.builtin(name, suite.model, n=6, split="held_out", seed=2)
    expected = suite.task(suite_name, n=6, seed=2)
    assert (task.clean, task.corrupt, task.metric) == (
        expected.clean,
        expected.corrupt,
        expected.metric,
    )
    assert (
        gs.Task.builtin(name, suite.model, n=6).clean
        == suite.task(suite_name, n=6, split="train").clean
    )
    assert gs.activation_patching(suite.model, task, "z").metadata["task"] == name


def test_the_bundled_suite_says_what_it_has(suite: Any) -> None:
    with pytest.raises(
        UnknownNameError, match="Unknown task of gemma-2-tiny 'capitals'.*greater_than"
    ):
        gs.Task.builtin("capitals", suite.model)
    with pytest.raises(UnknownNameError, match="Unknown task 'IOI'.*Did you mean 'ioi'"):
        suite.tasks["IOI"]


def test_the_repr_says_how_good_the_model_is(suite: Any) -> None:
    task = gs.Task.builtin("ioi", suite.model, n=20, split="held_out")
    figures = task.figures(suite.model)
    values = gs.Task(task.clean, task.corrupt, task.metric).bind(suite.model)
    metric = values.measure(suite.model, values.clean)
    assert figures.metric.tolist() == pytest.approx(metric.tolist(), abs=1e-4)
    assert figures.accuracy == float((metric > 0).float().mean())
    assert repr(task).startswith(
        f"Task('ioi', 20 held_out prompts, logit difference {figures.mean:+.2f}, "
        f"{figures.accuracy:.2f} right, {figures.top1:.2f} first on "
    )
    many = gs.Task.builtin("ioi", suite.model, n=70)
    shown = many.first(64).figures(suite.model)
    assert f"difference {shown} on {suite.model.cfg.model_name} on its first 64, first" in repr(
        many
    )
    half = task.take([0, 1, 2])
    assert "3 held_out prompts" in repr(half)
    years = gs.Task.builtin("greater_than", suite.model, n=20)
    assert years.figures(suite.model).accuracy > 0.9


def test_prompts_that_the_model_gets_right_are_kept(suite: Any) -> None:
    task = gs.Task.builtin("ioi", suite.model, n=10)
    mixed = gs.Task(
        task.clean,
        task.corrupt,
        gs.logit_diff(
            [*task.metric.answer[:4], *task.metric.wrong[4:]],
            [*task.metric.wrong[:4], *task.metric.answer[4:]],
        ),
    )
    assert mixed.filtered(suite.model).clean == task.clean[:4]
    with pytest.raises(TaskError, match="gets none of the 6 prompts of 'task' right"):
        mixed.take(range(4, 10)).filtered(suite.model)
    with pytest.raises(TaskError, match="minus KL divergence does not say which prompts are right"):
        gs.Task(task.clean, task.corrupt, gs.kl_divergence()).filtered(suite.model)
    likeliest = gs.Task(task.clean, task.corrupt, gs.cross_entropy(mixed.metric.answer))
    assert likeliest.filtered(suite.model).clean == task.clean[:4]
