"""Facts by analogy: two examples, and a question of the same form.

* ``capitals``, ``city_state``, ``antonyms``: one step. Corrupted: another country, city, word.
* ``two_hop``: landmarks that lie outside the capital of their country. Right is the capital, wrong the
  city that the landmark stands in: a model that knows the city and not the way to the capital fails,
  which easy landmarks hide. Small models do fail. Corrupted: a landmark of another country.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from gemmascope_plugin.causes.builtin.drafts import Draft, Half
from gemmascope_plugin.causes.builtin.places_named import CAPITALS, LANDMARKS, STATES

ANTONYMS = """
    hot cold|big small|old young|fast slow|high low|happy sad|good bad|rich poor|strong weak|early late
    open closed|light dark|long short|hard soft|wet dry|full empty|near far|up down|left right|true false
    black white|day night|love hate|war peace|life death|friend enemy|north south|east west|begin end
    buy sell|win lose|push pull|clean dirty|thick thin|wide narrow|deep shallow|loud quiet|sweet bitter
    safe dangerous|easy difficult|cheap expensive|front back|inside outside|first last|always never
    more less|above below|before after|success failure|victory defeat|male female|ancient modern
    positive negative|public private|major minor|simple complex|same different|heavy light
"""
SHOTS = 2

CAPITAL = ("The capital of {} is", "Q: What is the capital of {}? A:")
STATE = ("The city of {} is in the state of", "{} is a city in the state of")
OPPOSITE = ("The opposite of {} is", "{} is the opposite of")
LANDMARK = ("The {} is in a country whose capital is", "The capital of the country with the {} is")


def capitals(rng: Random, half: Half) -> Iterator[Draft]:
    """Two examples with other capitals."""
    return _asked(rng, half(CAPITALS), half(CAPITAL))


def city_state(rng: Random, half: Half) -> Iterator[Draft]:
    """Two examples from other states."""
    return _asked(rng, half(STATES), half(STATE))


def antonyms(rng: Random, half: Half) -> Iterator[Draft]:
    """Both directions of a pair belong to one split."""
    pairs = [
        tuple(pair.split())
        for line in ANTONYMS.split("\n")
        for pair in line.split("|")
        if pair.strip()
    ]
    both = [(a, b) for one, other in half(pairs) for a, b in ((one, other), (other, one))]
    return _asked(rng, both, half(OPPOSITE))


def two_hop(rng: Random, half: Half) -> Iterator[Draft]:
    """The answer is the capital, the wrong answer the landmark's own city."""
    landmarks, templates = half(LANDMARKS), half(LANDMARK)
    while True:
        template = rng.choice(templates)
        names = rng.sample(landmarks, SHOTS + 2)
        (landmark, capital, city), (other, elsewhere, _) = names[:2]
        if len({capital, elsewhere, *(where for _, where, _ in names[2:])}) < 3:
            continue  # an example must not give the answer away
        start = _examples(template, [(name, where) for name, where, _ in names[2:]])
        clean, corrupt = (start + template.format(name) for name in (landmark, other))
        yield Draft(clean, corrupt, (f" {capital}",), (f" {city}",))


def _asked(
    rng: Random, facts: Sequence[tuple[str, str]], templates: Sequence[str]
) -> Iterator[Draft]:
    while True:
        template = rng.choice(templates)
        chosen = rng.sample(facts, SHOTS + 2)
        (subject, answer), (other, wrong) = chosen[:2]
        texts = {text for fact in chosen for text in fact}
        if len(texts) < 2 * len(chosen):
            continue  # an example must not give the answer away
        start = _examples(template, chosen[2:])
        clean, corrupt = (start + template.format(name) for name in (subject, other))
        yield Draft(clean, corrupt, (f" {answer}",), (f" {wrong}",))


def _examples(template: str, facts: Sequence[tuple[str, str]]) -> str:
    return "".join(f"{template.format(subject)} {answer}. " for subject, answer in facts)
