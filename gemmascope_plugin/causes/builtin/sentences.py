"""Tasks of grammar: who gets something, which pronoun stands for whom, which verb agrees with what.

* ``ioi`` (Wang et al., arXiv 2211.00593): two people, in both orders; one of them gives, so the other one
  gets. Corrupted: the other one gives.
* ``pronouns``: a name and a gap. Corrupted: a name of the other kind.
* ``agreement``, ``agreement_es``: verbs that agree with their subject, and not with the noun next to
  them, in English and Spanish. The noun in between, the attractor, has the other number than the clean
  prompt's subject. Corrupted: the subject has the other number, and all else is the same.
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


NOUNS = """
    key cabinet door window teacher doctor student farmer king picture letter book car boat horse
    dog bird house tower bridge garden river road lamp table chair box bottle plate knife artist
    writer singer guard soldier pilot engineer lawyer manager actor student player driver worker
    neighbor friend brother sister daughter flower tree rock mountain island building school hotel
    museum computer camera phone machine engine train plane ship
""".split()
PLACED = (
    "The {subject} near the {attractor}",
    "The {subject} behind the {attractor}",
    "Yesterday I heard that the {subject} beside the {attractor}",
    "It is known that the {subject} next to the {attractor}",
    "They said that the {subject} by the {attractor}",
    "In the evening the {subject} in front of the {attractor}",
)
VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))

MASCULINE = """
    libro coche perro gato barco puente edificio camino jardín cuadro hermano amigo médico maestro
    niño soldado vecino museo teatro río plato vaso zapato cuchillo teléfono bosque palacio
    caballo pueblo barrio
""".split()
FEMININE = """
    casa mesa silla puerta ventana llave carta iglesia escuela calle torre caja botella lámpara
    cámara hermana amiga maestra niña vecina planta piedra montaña isla máquina camisa tienda
    ciudad flor radio
""".split()
PLACED_ES = (
    "{subject} cerca de {attractor}",
    "{subject} detrás de {attractor}",
    "Ayer supe que {subject} junto a {attractor}",
    "Todos saben que {subject} al lado de {attractor}",
)
VERBS_ES = ((" está", " están"), (" es", " son"), (" era", " eran"), (" fue", " fueron"))


def agreement(rng: Random, half: Half) -> Iterator[Draft]:
    """Number and tense are drawn."""
    nouns, templates = half(list(dict.fromkeys(NOUNS))), half(PLACED)
    while True:
        subject, attractor = rng.sample(nouns, 2)
        plural, template, verbs = rng.random() < 0.5, rng.choice(templates), rng.choice(VERBS)
        beside = _plural(attractor, not plural)
        clean, corrupt = (
            template.format(subject=_plural(subject, number), attractor=beside)
            for number in (plural, not plural)
        )
        yield Draft(clean, corrupt, (verbs[plural],), (verbs[not plural],))


def agreement_es(rng: Random, half: Half) -> Iterator[Draft]:
    """Articles say the number as well."""
    nouns = [(noun, "el los") for noun in half(MASCULINE)]
    nouns += [(noun, "la las") for noun in half(FEMININE)]
    templates = half(PLACED_ES)
    while True:
        subject, attractor = rng.sample(nouns, 2)
        plural, template, verbs = rng.random() < 0.5, rng.choice(templates), rng.choice(VERBS_ES)
        beside = _spanish(*attractor, not plural).replace("de el ", "del ")
        clean, corrupt = (
            _sentence(template.format(subject=_spanish(*subject, number), attractor=beside))
            for number in (plural, not plural)
        )
        yield Draft(clean, corrupt, (verbs[plural],), (verbs[not plural],))


def _plural(noun: str, plural: bool) -> str:
    if not plural:
        return noun
    if noun.endswith("fe"):
        return f"{noun[:-2]}ves"
    return f"{noun}es" if noun.endswith(("x", "s", "ch")) else f"{noun}s"


def _spanish(noun: str, articles: str, plural: bool) -> str:
    article = articles.split()[plural]
    if not plural:
        return f"{article} {noun}"
    ending = "s" if noun[-1] in "aeioué" else "es"
    return f"{article} {noun.replace('í', 'i') if noun == 'jardín' else noun}{ending}"


def _sentence(text: str) -> str:
    """Contractions, and a capital in front."""
    text = text.replace(" de el ", " del ").replace(" a el ", " al ")
    return text[0].upper() + text[1:]
