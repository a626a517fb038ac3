"""The five tasks of the bundled suite as clean and corrupted prompts of equal length.

========== ======================================================= =================================
task       clean prompt ... answer                                 corruption
========== ======================================================= =================================
ioi        when A and B went to the store , B gave a drink to ... A  the giver is A
agreement  today the keys near the cabinet ... are                  the other number of the subject
years      the war lasted from the year c17 32 to the year c17 ...   the start year is 01
induction  sing ka lo mi pu te ro sa again ka lo mi ... pu           another word in pu's first place
two_hop    the capital of the state containing dallas is ... austin  a city of another state
========== ======================================================= =================================

Held-out prompts use only combinations that the corpus never contains, see ``grammar``.

``Task.builtin`` gives them for the suite's model, ``years`` under its usual name ``greater_than``.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import gemmascope_plugin.demo.grammar as grammar
import gemmascope_plugin.demo.lexicon as lex
from gemmascope_plugin.causes import Task, logit_diff, probability
from gemmascope_plugin.causes.builtin import SPLITS, ModelTasks, Split, register_tasks
from gemmascope_plugin.errors import check_choice
from gemmascope_plugin.models.protocol import HookedModel

LIST_LENGTH, REPEATED = 7, 4
"""Words of a nonsense list in the induction task, and how many are said again in the prompt."""


class Pair(NamedTuple):
    """One clean prompt, its corruption, and the answer to each."""

    clean: str
    corrupt: str
    answer: str | list[str]
    wrong: str | list[str]


def _ioi(rng: Random, held_out: bool) -> Pair:
    first, second = grammar.name_pair(rng, held_out=held_out)
    giver, receiver = rng.sample((first, second), 2)
    seed = rng.random()
    clean, corrupt = (
        grammar.ioi(Random(seed), first, second, name, with_object=False).text
        for name in (giver, receiver)
    )
    return Pair(clean, corrupt, receiver, giver)


def _agreement(rng: Random, held_out: bool) -> Pair:
    subject, attractor = grammar.noun_pair(rng, held_out=held_out)
    plural, past = rng.random() < 0.5, rng.random() < 0.5
    seed = rng.random()
    clean, corrupt = (
        grammar.agreement(
            Random(seed),
            subject,
            attractor,
            plural=number,
            attractor_plural=not plural,
            past=past,
            with_verb=False,
        ).text
        for number in (plural, not plural)
    )
    verbs = ("was", "were") if past else ("is", "are")
    return Pair(clean, corrupt, verbs[plural], verbs[not plural])


def _years(rng: Random, held_out: bool) -> Pair:
    event, century, start = grammar.year_start(rng, held_out=held_out)
    clean = grammar.years(event, century, start, None).text
    corrupt = grammar.years(event, century, 1, None).text
    return Pair(clean, corrupt, list(lex.YEARS[start + 1 :]), list(lex.YEARS[: start + 1]))


def _induction(rng: Random, held_out: bool) -> Pair:
    words = grammar.nonsense_list(rng, held_out=held_out, length=LIST_LENGTH)
    other = rng.choice([word for word in lex.NONSENSE if word not in words])
    changed = [*words[:REPEATED], other, *words[REPEATED + 1 :]]
    clean, corrupt = (grammar.induction(w, REPEATED).text for w in (words, changed))
    return Pair(clean, corrupt, words[REPEATED], other)


def _two_hop(rng: Random, held_out: bool) -> Pair:
    cities = [c for c in lex.STATE_OF if grammar.is_held_out_fact(c, "capital") == held_out]
    city = rng.choice(cities)
    state = lex.STATE_OF[city]
    other = rng.choice([c for c in lex.STATE_OF if lex.STATE_OF[c] is not state])
    clean, corrupt = (grammar.two_hop(c, "capital", with_answer=False).text for c in (city, other))
    return Pair(clean, corrupt, state.facts["capital"], lex.STATE_OF[other].facts["capital"])


_MAKERS: dict[str, Callable[[Random, bool], Pair]] = {
    "ioi": _ioi,
    "agreement": _agreement,
    "years": _years,
    "induction": _induction,
    "two_hop": _two_hop,
}
TASK_NAMES = tuple(_MAKERS)


def make_task(name: str, *, split: Split = "held_out", n: int = 64, seed: int = 0) -> Task:
    """A task with ``n`` prompts; the same arguments give the same prompts.

    Args:
        name: One of ``TASK_NAMES``.
        split: ``held_out`` prompts never occur in the corpus, ``train`` ones may.
        n: Number of prompts.
        seed: Seed of the draw.

    Raises:
        UnknownNameError: An unknown task.
    """
    check_choice("task", name, TASK_NAMES)
    check_choice("split", split, SPLITS)
    rng = Random(f"{name} {split.replace('_', '-')} {seed}")
    pairs = [_MAKERS[name](rng, split == "held_out") for _ in range(n)]
    # Greater-than is a matter of probability mass: of the greater years minus that of the others.
    ask = probability if name == "years" else logit_diff
    metric = ask([p.answer for p in pairs], [p.wrong for p in pairs])
    return Task([p.clean for p in pairs], [p.corrupt for p in pairs], metric, name)


_MODEL = "gemma-2-tiny"
_USUAL = {"greater_than": "years"}
"""Names of built-in tasks that are others here."""


def _is_bundled(model: HookedModel) -> bool:
    """Whether a model reads the suite's words and no others."""
    size, tokenizer = len(lex.vocabulary()), model.tokenizer
    if tokenizer is None or len(tokenizer) != size:
        return False
    return tokenizer.get_vocab().keys() == set(lex.vocabulary())


def _make(name: str, n: int, split: Any, seed: int) -> tuple[Any, Any, Any]:
    task = make_task(_USUAL.get(name, name), split=split, n=n, seed=seed)
    return task.clean, task.corrupt, task.metric


NAMES = tuple({"years": "greater_than"}.get(name, name) for name in TASK_NAMES)
"""The built-in tasks that there are for the suite's model."""
register_tasks(ModelTasks(_MODEL, _is_bundled, NAMES, _make))
