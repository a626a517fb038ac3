"""Tasks about people: who is given something (``ioi``), and which pronoun stands for whom (``pronouns``).

* ``ioi`` (Wang et al., arXiv 2211.00593): two people, in both orders; one of them gives, so the other one
  gets. Corrupted: the other one gives.
* ``pronouns``: a name and a gap. Corrupted: a name of the other kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from gemmascope_plugin.causes.builtin.drafts import Draft, Half

WOMEN = """
    Mary Anna Alice Emma Sarah Laura Julia Maria Lisa Kate Jane Lucy Rachel Emily Grace Susan
    Linda Helen Karen Nancy Sandra Diana Amy Rose Claire Ruth Sophie Olivia Hannah Rebecca
    Jennifer Jessica Elizabeth Victoria Caroline Margaret Barbara Patricia Michelle Nicole
""".split()
MEN = """
    John Tom James Paul Mark David Peter Robert Daniel Michael George William Charles Henry Jack
    Adam Ben Simon Kevin Brian Steven Thomas Richard Joseph Edward Frank Eric Matthew Andrew Luke
    Philip Martin Anthony Patrick Stephen Scott Jason Alex Sam Max
""".split()
PLACES = """
    store park school office garden restaurant station library market hospital museum beach hotel
    farm theater house church airport bank bakery
""".split()
THINGS = """
    drink book letter ring ball key map gift pen ticket phone cake coat bag hat box picture basket
    bottle flower
""".split()

IOI = (
    "When {x} and {y} went to the {place}, {s} gave a {thing} to",
    "Then, {x} and {y} had a long talk at the {place}. Afterwards {s} handed a {thing} to",
    "After {x} and {y} had left the {place}, {s} passed a {thing} to",
    "While {x} and {y} were working at the {place}, {s} wanted to give a {thing} to",
    "{x} and {y} met at the {place} in the morning. Later {s} offered a {thing} to",
    "The day {x} and {y} visited the {place}, {s} brought a {thing} to",
    "Friends {x} and {y} found a {thing} at the {place}. Then {s} gave it to",
    "On Monday {x} and {y} drove to the {place}, where {s} showed a {thing} to",
)
PRONOUNS = (
    "{name} went home early because",
    "{name} was very happy when",
    "Everybody likes {name} because",
    "{name} did not come to the meeting because",
    "{name} could not sleep last night because",
    "I have known {name} since",
    "{name} opened the door, and then",
    "We asked {name} whether",
)


def ioi(rng: Random, half: Half) -> Iterator[Draft]:
    """Both orders of every pair come up."""
    names, templates = half(WOMEN) + half(MEN), half(IOI)
    places, things = half(PLACES), half(THINGS)
    while True:
        x, y = rng.sample(names, 2)
        giver, receiver = rng.sample((x, y), 2)
        template = rng.choice(templates)
        filled = {"x": x, "y": y, "place": rng.choice(places), "thing": rng.choice(things)}
        clean, corrupt = (template.format(**filled, s=name) for name in (giver, receiver))
        yield Draft(clean, corrupt, (f" {receiver}",), (f" {giver}",))


def pronouns(rng: Random, half: Half) -> Iterator[Draft]:
    """Answers are ``she`` and ``he``."""
    kinds = ((half(WOMEN), " she"), (half(MEN), " he"))
    templates = half(PRONOUNS)
    while True:
        (these, answer), (others, wrong) = rng.sample(kinds, 2)
        template = rng.choice(templates)
        clean, corrupt = (template.format(name=rng.choice(names)) for names in (these, others))
        yield Draft(clean, corrupt, (answer,), (wrong,))
