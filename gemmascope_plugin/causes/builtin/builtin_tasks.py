"""Causal questions for any tokenizer, by name.

=============== ==================================================== ===============================
name            clean prompt ... answer                              corruption
=============== ==================================================== ===============================
``ioi``         When Mary and John went to the park, John gave a     Mary gives
                book to ... Mary
``greater_than``  The war lasted from the year 1732 to the year      the span starts in 1701
                17 ... 40 (or 4)
``agreement``   The keys near the cabinet ... are                    the key
``agreement_es``  Las llaves cerca de la mesa ... están              La llave
``capitals``    (two examples) The capital of France is ... Paris    another country
``city_state``  (two examples) Chicago is a city in the state of     another city
                ... Illinois
``successors``  Monday, Tuesday, Wednesday, ... Thursday             another three
``induction``   river chair ... river ... chair                      another word before
``antonyms``    (two examples) The opposite of hot is ... cold       another word
``pronouns``    Mary went home early because ... she                 John
``two_hop``     (two examples) The Alhambra is in a country whose    another landmark
                capital is ... Madrid, not Granada
=============== ==================================================== ===============================

Splits share no words and no templates (``drafts.py``). A model may bring its own prompts for these names:
a floor above registers them (``register_tasks``). The bundled suite, whose 462 words make no English
sentence, does so when it is imported.

Cost: the tokenizer, and, when it is printed, one pass over the clean prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Literal, NamedTuple, get_args

from gemmascope_plugin.causes.builtin.drafts import Draft, Half, fit, too_few
from gemmascope_plugin.causes.builtin.facts import (
    antonyms,
    capitals,
    city_state,
    greater_than,
    induction,
    successors,
    two_hop,
)
from gemmascope_plugin.causes.builtin.sentences import agreement, agreement_es, ioi, pronouns
from gemmascope_plugin.causes.builtin.template import Template
from gemmascope_plugin.causes.metric import Metric
from gemmascope_plugin.causes.metrics import logit_diff, probability
from gemmascope_plugin.errors import EmptySelectionError, InputError, TaskError, check_choice
from gemmascope_plugin.models.protocol import HookedModel, describe, is_model

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)
_MOST = 64


class _Recipe(NamedTuple):
    draw: Callable[[Random, Half], Iterator[Draft]]
    ask: Callable[..., Any] = logit_diff


RECIPES = {
    "ioi": _Recipe(ioi),
    # later years are a matter of probability mass, not of one token
    "greater_than": _Recipe(greater_than, probability),
    "agreement": _Recipe(agreement),
    "agreement_es": _Recipe(agreement_es),
    "capitals": _Recipe(capitals),
    "city_state": _Recipe(city_state),
    "successors": _Recipe(successors),
    "induction": _Recipe(induction),
    "antonyms": _Recipe(antonyms),
    "pronouns": _Recipe(pronouns),
    "two_hop": _Recipe(two_hop),
}
TASKS = tuple(RECIPES)
"""Names of the built-in tasks."""


def check_task_name(name: object, call: str) -> None:
    """Refuses what is not a text."""
    if not isinstance(name, str):
        order = f'{call}: the name comes first: Task.builtin("ioi", model)'
        problem = "The model stands where the name of a task belongs"
        raise InputError(
            problem if is_model(name) else f"{describe(name)} is not the name of a task", fix=order
        )


class Built(NamedTuple):
    """What a task is made of."""

    clean: list[str]
    corrupt: list[str]
    metric: Any
    n_dropped: int


def build_from_template(
    template: Template, model: HookedModel, ask: Callable[..., Any], n: int | None, seed: int
) -> Built:
    """Prompts and a metric from a sentence and lists."""
    if n is not None and n < 1:
        raise EmptySelectionError(f"n={n} leaves no prompt", fix="n=64")
    n_wanted = _MOST if n is None else n
    tries = 500 + 50 * n_wanted
    fitting = fit(model, template.drafts(Random(seed), tries), n_wanted, tries)
    if len(fitting.pairs) < (1 if n is None else n):
        sides = (("answer", template.answer), ("wrong", template.wrong))
        raise too_few(fitting, n_wanted, template.clean, sides)
    clean, corrupt, metric = fitting.columns(ask)
    if not isinstance(metric, Metric):
        raise TaskError(
            f"metric={ask!r} gave {describe(metric)} for answers", fix="metric=logit_diff"
        )
    return Built(clean, corrupt, metric, fitting.n_dropped)


def build(name: str, model: HookedModel, *, n: int, split: Split, seed: int) -> Built:
    """Prompts and a metric of a built-in task."""
    check_choice("task", name, TASKS)
    check_choice("split", split, SPLITS)
    if n < 1:
        raise EmptySelectionError(f"n={n} leaves no prompt", fix="n=64")
    if (entry := tasks_of(model)) is not None:
        check_choice(f"task of {entry.model}", name, entry.names)
        clean, corrupt, metric = entry.make(name, n, split, seed)
        return Built(clean, corrupt, metric, 0)
    recipe = RECIPES[name]
    drafts = recipe.draw(Random(f"{name} {split} {seed}"), Half(SPLITS.index(split)))
    fitting = fit(model, drafts, n, tries=500 + 50 * n)
    if len(fitting.pairs) < n:
        raise too_few(fitting, n, name)
    return Built(*fitting.columns(recipe.ask), fitting.n_dropped)


class ModelTasks(NamedTuple):
    """Prompts of one model."""

    model: str
    """Its name."""
    knows: Callable[[HookedModel], bool]
    """Whether a model is that one."""
    names: tuple[str, ...]
    """The built-in tasks that it has."""
    make: Callable[[str, int, str, int], tuple[list[str], list[str], Any]]
    """Name, number, split, seed to clean prompts, corrupted ones and metric."""


_REGISTERED: list[ModelTasks] = []


def register_tasks(tasks: ModelTasks) -> None:
    """Makes a model's own prompts known; the last of a name counts."""
    _REGISTERED[:] = [entry for entry in _REGISTERED if entry.model != tasks.model]
    _REGISTERED.append(tasks)


def tasks_of(model: HookedModel) -> ModelTasks | None:
    """The prompts that a model brings; None for all others."""
    return next((entry for entry in _REGISTERED if entry.knows(model)), None)
