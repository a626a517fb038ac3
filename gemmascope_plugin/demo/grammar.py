"""The grammar of the bundled corpus: random sentences whose latent concepts are known per token.

Each sentence kind is one function ``rng -> Sentence``. A sentence is a list of words and, for each
word, the set of concepts that hold *at* it, given what a left-to-right reader knows by then: the
role of the word (``giver``, ``indirect_object``), what must come next (``next_is_plural_verb``) and
facts (``in_texas`` at ``dallas``).

Held-out material: a stable checksum puts about one fifth of the name pairs, year spans, noun pairs,
nonsense lists and two-hop questions aside. The corpus never contains a held-out combination, so
tasks built from them measure generalisation.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import gemmascope_plugin.demo.lexicon as lex

HELD_OUT_SHARE = 5
"""One combination in this many is held out."""


def is_held_out(*words: str) -> bool:
    """Whether this combination of words is kept out of the corpus; the order does not matter."""
    return zlib.crc32(" ".join(sorted(words)).encode()) % HELD_OUT_SHARE == 0


@dataclass
class Sentence:
    """Words with the concepts that hold at each of them."""

    words: list[str] = field(default_factory=list)
    concepts: list[frozenset[str]] = field(default_factory=list)

    def add(self, text: str, *concepts: str) -> Sentence:
        """Appends the words of ``text``; the concepts hold at each of them. Returns itself."""
        for word in text.split():
            self.words.append(word)
            self.concepts.append(frozenset(concepts))
        return self

    def mark(self, index: int, *concepts: str) -> Sentence:
        """Adds concepts to the word at ``index``. Returns itself."""
        self.concepts[index] = self.concepts[index] | frozenset(concepts)
        return self

    @property
    def text(self) -> str:
        """The words as one string."""
        return " ".join(self.words)


# --------------------------------------------------------------------------- giving (IOI)
IOI_OPENINGS = (
    ("when", "went to the"),
    ("while", "were at the"),
    ("after", "came to the"),
)


def ioi(rng: Random, first: str, second: str, giver: str, *, with_object: bool = True) -> Sentence:
    """``when mary and john went to the store , john gave a drink to mary``: the giver is named again.

    Prompts end before the closing indirect object.
    """
    receiver = first if giver == second else second
    opening, motion = rng.choice(IOI_OPENINGS)
    s = Sentence().add(opening, "giving_sentence")
    s.add(first, "giving_sentence", "name", "first_name", "name_is_new")
    s.add("and", "giving_sentence", "next_is_name", "next_is_new_name")
    s.add(second, "giving_sentence", "name", "second_name", "name_is_new")
    s.add(motion, "giving_sentence", "after_both_names")
    s.add(rng.choice(lex.PLACES), "giving_sentence", "place", "after_both_names")
    s.add(",", "giving_sentence", "next_is_name", "next_is_old_name")
    s.add(giver, "giving_sentence", "name", "giver", "repeated_name")
    s.add(rng.choice(lex.GIVING_VERBS), "giving_sentence", "giving_verb", "after_giver")
    s.add("a", "giving_sentence", "after_giver", "next_is_object")
    s.add(rng.choice(lex.OBJECTS), "giving_sentence", "object", "after_giver")
    s.add("to", "giving_sentence", "next_is_name", "next_is_indirect_object", f"say_{receiver}")
    if with_object:
        s.add(receiver, "giving_sentence", "name", "indirect_object", "repeated_name")
    return s


def random_ioi(rng: Random) -> Sentence:
    """An IOI sentence about two names that are not held out."""
    first, second = name_pair(rng, held_out=False)
    return ioi(rng, first, second, rng.choice((first, second)))


def name_pair(rng: Random, *, held_out: bool) -> tuple[str, str]:
    """Two different names whose pair is, or is not, held out."""
    while True:
        first, second = rng.sample(lex.NAMES, 2)
        if is_held_out(first, second) == held_out:
            return first, second


def meeting(rng: Random) -> Sentence:
    """``today mary met john in france``: names and countries outside the giving frame."""
    first, second = rng.sample(lex.NAMES, 2)
    s = Sentence().add(rng.choice(("today", "yesterday")), "time_cue")
    s.add(first, "name", "name_is_new")
    s.add(rng.choice(("met", "saw")), "next_is_name", "next_is_new_name")
    s.add(second, "name", "name_is_new")
    s.add("in", "next_is_country")
    return s.add(rng.choice(tuple(lex.COUNTRIES)), "country")


# --------------------------------------------------------------------------- agreement
def agreement(
    rng: Random,
    subject: int,
    attractor: int | None,
    *,
    plural: bool,
    attractor_plural: bool = False,
    past: bool = False,
    with_verb: bool = True,
) -> Sentence:
    """``today the keys near the cabinet are old``; the verb follows the subject, not the attractor.

    Nouns are indices into ``NOUNS``; the attractor may be None. Prompts end before the verb.
    """
    number = "plural" if plural else "singular"
    tense = "past" if past else "present"
    s = Sentence().add("yesterday" if past else "today", "time_cue", f"{tense}_cue")
    s.add("the", f"{tense}_clause")
    s.add(lex.NOUNS[subject][plural], "noun", f"{number}_noun", f"{number}_subject")
    if attractor is not None:
        s.add(rng.choice(lex.PREPOSITIONS), "preposition", f"{number}_subject_phrase")
        s.add("the", f"{number}_subject_phrase", "attractor_next")
        word = lex.NOUNS[attractor][attractor_plural]
        other = "plural" if attractor_plural else "singular"
        s.add(word, "noun", f"{other}_noun", f"{other}_attractor", f"{number}_subject_phrase")
        s.mark(-1, "next_is_verb", f"next_is_{number}_verb", f"next_is_{number}_{tense}_verb")
        s.mark(-1, "attractor")
    if with_verb:
        verb = (("is", "are"), ("was", "were"))[past][plural]
        s.add(verb, "verb", f"{number}_verb", f"{tense}_verb", "next_is_adjective")
        s.add(rng.choice(lex.ADJECTIVES), "adjective")
    return s


def random_agreement(rng: Random) -> Sentence:
    """An agreement sentence, with an attractor three times in four."""
    plural, attractor_plural, past = (rng.random() < 0.5 for _ in range(3))
    if rng.random() < 0.25:
        return agreement(rng, rng.randrange(len(lex.NOUNS)), None, plural=plural, past=past)
    subject, attractor = noun_pair(rng, held_out=False)
    return agreement(
        rng, subject, attractor, plural=plural, attractor_plural=attractor_plural, past=past
    )


def noun_pair(rng: Random, *, held_out: bool) -> tuple[int, int]:
    """Two different noun indices whose pair is, or is not, held out."""
    while True:
        subject, attractor = rng.sample(range(len(lex.NOUNS)), 2)
        if is_held_out(lex.NOUNS[subject][0], lex.NOUNS[attractor][0]) == held_out:
            return subject, attractor


# --------------------------------------------------------------------------- years
def years(event: str, century: str, start: int, end: int | None) -> Sentence:
    """``the war lasted from the year c17 32 to the year c17 58``: the end year is the greater one.

    Years are within the century; prompts have no end year.
    """
    decade = f"start_decade_{start // 10}"
    s = Sentence().add("the").add(event, "event", "year_sentence")
    s.add("lasted from the year", "year_sentence").mark(-1, "next_is_century")
    s.add(lex.century(century), "century", "year_sentence", f"century_{century}")
    s.mark(-1, "next_is_start_year")
    s.add(lex.YEARS[start], "year", "start_year", "year_sentence", decade)
    s.add("to the year", "year_sentence", "after_start_year", decade)
    s.mark(-1, f"next_is_century_{century}")
    s.add(lex.century(century), "century", "repeated_century", "year_sentence", decade)
    s.mark(-1, "next_is_end_year", f"century_{century}")
    if end is not None:
        s.add(lex.YEARS[end], "year", "end_year", "year_sentence")
    return s


def random_years(rng: Random) -> Sentence:
    """A year sentence whose span is not held out; the end is uniform above the start."""
    event, century, start = year_start(rng, held_out=False)
    return years(event, century, start, rng.randint(start + 1, 99))


def year_start(rng: Random, *, held_out: bool) -> tuple[str, str, int]:
    """Event, century and start year (2 to 98) whose combination is, or is not, held out."""
    while True:
        event, century = rng.choice(lex.EVENTS), rng.choice(lex.CENTURIES)
        start = rng.randint(2, 98)
        if is_held_out(event, lex.century(century), str(start)) == held_out:
            return event, century, start


# --------------------------------------------------------------------------- induction
def induction(words: list[str], repeated: int) -> Sentence:
    """``sing ka lo mi pu again ka lo mi``: a nonsense list and the first words of its repetition."""
    s = Sentence().add("sing", "nonsense_sentence", "next_is_nonsense")
    for word in words:
        s.add(word, "nonsense", "nonsense_first_time", "nonsense_sentence", "next_is_nonsense")
    s.add("again", "nonsense_sentence", "next_is_nonsense", f"say_{words[0]}")
    for i, word in enumerate(words[:repeated]):
        s.add(word, "nonsense", "nonsense_repeated", "nonsense_sentence")
        if i + 1 < len(words):
            s.mark(-1, "next_is_nonsense", "next_is_induced", f"say_{words[i + 1]}")
    return s


def random_induction(rng: Random) -> Sentence:
    """A complete nonsense sentence that is not held out."""
    words = nonsense_list(rng, held_out=False)
    return induction(words, len(words))


def nonsense_list(rng: Random, *, held_out: bool, length: int | None = None) -> list[str]:
    """Five to nine (or ``length``) nonsense words whose set is, or is not, held out."""
    while True:
        words: list[str] = list(rng.sample(lex.NONSENSE, length or rng.randint(5, 9)))
        if is_held_out(*words) == held_out:
            return words


# --------------------------------------------------------------------------- facts
def in_state(rng: Random) -> Sentence:
    """``dallas is a city in texas``."""
    state = rng.choice(lex.STATES)
    s = Sentence().add(rng.choice(state.cities), "city", f"in_{state.name}")
    s.add("is a city in", "city_sentence", f"in_{state.name}").mark(-1, "next_is_state")
    return s.add(state.name, "state", f"is_{state.name}")


def one_hop(rng: Random) -> Sentence:
    """``the capital of texas is austin``."""
    state, relation = rng.choice(lex.STATES), rng.choice(lex.RELATIONS)
    s = Sentence().add("the").add(relation, "relation", f"relation_{relation}", "fact_sentence")
    s.add("of", "fact_sentence", f"asked_{relation}")
    s.add(state.name, "state", "fact_sentence", f"is_{state.name}", f"asked_{relation}")
    return _answer(s, state, relation)


def two_hop(city: str, relation: str, *, with_answer: bool = True) -> Sentence:
    """``the capital of the state containing dallas is austin``; prompts end before the answer."""
    state = lex.STATE_OF[city]
    s = Sentence().add("the").add(relation, "relation", f"relation_{relation}", "fact_sentence")
    s.add("of the state containing", "fact_sentence", "two_hop", f"asked_{relation}")
    s.mark(-1, "next_is_city")
    s.add(city, "city", "fact_sentence", "two_hop", f"in_{state.name}", f"asked_{relation}")
    return _answer(s, state, relation, with_answer=with_answer)


def _answer(s: Sentence, state: lex.State, relation: str, *, with_answer: bool = True) -> Sentence:
    s.add("is", "fact_sentence", f"asked_{relation}", f"asked_about_{state.name}")
    s.mark(-1, f"next_is_{relation}")
    if with_answer:
        s.add(state.facts[relation], "fact_answer", f"{relation}_answer", f"of_{state.name}")
    return s


def random_two_hop(rng: Random) -> Sentence:
    """A two-hop fact that is not held out."""
    while True:
        city, relation = rng.choice(tuple(lex.STATE_OF)), rng.choice(lex.RELATIONS)
        if not is_held_out_fact(city, relation):
            return two_hop(city, relation)


def is_held_out_fact(city: str, relation: str) -> bool:
    """Only capitals are held out, so every city is seen in a two-hop question of another kind."""
    return relation == "capital" and is_held_out(city, relation)


def language(rng: Random) -> Sentence:
    """``in france people speak french``."""
    country = rng.choice(tuple(lex.COUNTRIES))
    s = Sentence().add("in", "next_is_country").add(country, "country", "language_sentence")
    s.add("people speak", "language_sentence", f"in_{country}").mark(-1, "next_is_language")
    return s.add(lex.COUNTRIES[country], "language")


SENTENCE_KINDS: dict[str, tuple[Callable[[Random], Sentence], float]] = {
    "ioi": (random_ioi, 0.22),
    "agreement": (random_agreement, 0.14),
    "years": (random_years, 0.18),
    "induction": (random_induction, 0.18),
    "two_hop": (random_two_hop, 0.14),
    "one_hop": (one_hop, 0.05),
    "in_state": (in_state, 0.06),
    "language": (language, 0.03),
    "meeting": (meeting, 0.04),
}
"""Kind to its generator and its share of the sentences."""


def random_sentence(rng: Random) -> Sentence:
    """One sentence of a random kind, without its full stop."""
    generators, weights = zip(*SENTENCE_KINDS.values(), strict=True)
    return rng.choices(generators, weights)[0](rng)
