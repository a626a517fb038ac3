"""Tasks about order: which years are later (``greater_than``), what comes next (``successors``), and what
came next the last time (``induction``).

* ``greater_than`` (Hanna et al., arXiv 2305.00586): a span that starts in year ``ccyy`` and ends in
  ``cc``. Right are the next tokens that only later years begin with, wrong those that only years up to
  ``yy`` do: whole years where two digits are one token, single digits where each is one. Corrupted: the
  span starts in ``cc01``.
* ``successors`` (Gould et al., arXiv 2312.09230): three in a row of days, months, number words or
  letters. Corrupted: another three of them.
* ``induction``: unrelated words, the first of them again. Corrupted: another word stood where the answer
  did.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from gemmascope_plugin.causes.builtin.drafts import Draft, Half

EVENTS = """
    war siege project reign trial journey expedition strike festival drought famine plague
    rebellion crisis dispute conflict treaty mission campaign alliance occupation construction
    experiment study tour truce blockade contract marriage partnership friendship feud custom
    programme
""".split()
SPANS = (
    "The {event} lasted from the year {century}{year:02d} to the year {century}",
    "The {event} began in the year {century}{year:02d} and ended in the year {century}",
)
FIRST_YEAR, LAST_YEAR = 20, 79

DOMAINS = {
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "months": """January February March April May June July August September October November
        December""".split(),
    "numbers": """one two three four five six seven eight nine ten eleven twelve thirteen fourteen
        fifteen sixteen seventeen eighteen nineteen twenty""".split(),
    "letters": list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
CYCLES = ("days", "months")
ROWS = (
    "{}, {}, {},",
    "In order: {}, {}, {},",
    "{} {} {}",
    "The list goes on: {}, {}, {},",
)

WORDS = """
    apple river chair green stone paper horse music window bread cloud table silver bridge winter
    doctor orange forest mirror engine summer pencil rabbit castle hammer yellow island button
    copper planet guitar carpet dragon turtle velvet marble pepper ladder temple basket coffee
    tunnel saddle kitten rocket walnut violin desert canyon anchor blanket lemon tiger purple
    needle candle wagon shadow harvest pirate elbow magnet salmon thunder valley mountain garden
    kitchen monkey cherry ocean finger police market soldier history letter animal dinner science
    picture number village family bottle camera engine artist winter bishop cotton dollar empire
    father ghost hotel insect jacket knight lawyer mother nation office parent queen rain school
    teacher uncle virus water youth zebra brain clock
""".split()
FIRST_TIME, AGAIN = 16, 8
"""Words of a list, and how many of them are said again."""


def greater_than(rng: Random, half: Half) -> Iterator[Draft]:
    """Continuations are whole years; the fitting keeps the first token of each."""
    events = half(EVENTS)
    while True:
        event, century, year = rng.choice(events), rng.randint(11, 18), _year(rng)
        span = rng.choice(SPANS)
        clean, corrupt = (span.format(event=event, century=century, year=y) for y in (year, 1))
        years = [f"{y:02d}" for y in range(100)]
        yield Draft(clean, corrupt, tuple(years[year + 1 :]), tuple(years[: year + 1]), "first")


def _year(rng: Random) -> int:
    return rng.randint(FIRST_YEAR, LAST_YEAR)


def successors(rng: Random, half: Half) -> Iterator[Draft]:
    """As many of each domain as of the others."""
    templates, domains = half(ROWS), list(DOMAINS)
    while True:
        rng.shuffle(domains)
        for domain in domains:
            members = DOMAINS[domain]
            ends = range(len(members)) if domain in CYCLES else range(3, len(members))
            template = rng.choice(templates)
            end, other = rng.sample(half(ends), 2)
            clean, corrupt = (
                template.format(*(members[e - i] for i in (3, 2, 1))) for e in (end, other)
            )
            yield Draft(clean, corrupt, (f" {members[end]}",), (f" {members[other]}",))


def induction(rng: Random, half: Half) -> Iterator[Draft]:
    """Words are in no order, so that nothing but the first time says what comes next."""
    words = half(list(dict.fromkeys(WORDS)))
    while True:
        row = rng.sample(words, FIRST_TIME + 1)
        other, row = row[-1], row[:-1]
        changed = [*row[:AGAIN], other, *row[AGAIN + 1 :]]
        clean, corrupt = (" ".join([*first, *row[:AGAIN]]) for first in (row, changed))
        yield Draft(clean, corrupt, (f" {row[AGAIN]}",), (f" {other}",))
