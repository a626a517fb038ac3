"""Tasks of facts, by analogy from two examples, and of order: later years, what comes next.

* ``capitals``, ``city_state``, ``antonyms``: one step. Corrupted: another country, city, word.
* ``two_hop``: landmarks that lie outside the capital of their country. Right is the capital, wrong the
  city that the landmark stands in: a model that knows the city and not the way to the capital fails,
  which easy landmarks hide. Small models do fail. Corrupted: a landmark of another country.
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

from collections.abc import Iterator, Sequence
from random import Random

from gemmascope_plugin.causes.builtin.drafts import Draft, Half

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
    return _analogies(rng, half(CAPITALS), half(CAPITAL))


def city_state(rng: Random, half: Half) -> Iterator[Draft]:
    """Two examples from other states."""
    return _analogies(rng, half(STATES), half(STATE))


def antonyms(rng: Random, half: Half) -> Iterator[Draft]:
    """Both directions of a pair belong to one split."""
    pairs = [
        tuple(pair.split())
        for line in ANTONYMS.split("\n")
        for pair in line.split("|")
        if pair.strip()
    ]
    both = [(a, b) for first, second in half(pairs) for a, b in ((first, second), (second, first))]
    return _analogies(rng, both, half(OPPOSITE))


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


def _analogies(
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


def _pairs(text: str) -> list[tuple[str, str]]:
    rows = (
        entry.strip().split(":")
        for line in text.splitlines()
        for entry in line.split(",")
        if ":" in entry
    )
    return [(name.strip(), where.strip()) for name, where in rows]


CAPITALS = _pairs("""
    France:Paris, Japan:Tokyo, Italy:Rome, Germany:Berlin, Spain:Madrid, England:London,
    Russia:Moscow, China:Beijing, Egypt:Cairo, Greece:Athens, Poland:Warsaw, Austria:Vienna,
    Portugal:Lisbon, Ireland:Dublin, Sweden:Stockholm, Norway:Oslo, Finland:Helsinki,
    Denmark:Copenhagen, Hungary:Budapest, Belgium:Brussels, Cuba:Havana, Canada:Ottawa, Iran:Tehran,
    Iraq:Baghdad, Turkey:Ankara, Thailand:Bangkok, Vietnam:Hanoi, Indonesia:Jakarta, Kenya:Nairobi,
    Peru:Lima, Chile:Santiago, Ukraine:Kyiv, Lebanon:Beirut, Syria:Damascus, Pakistan:Islamabad,
    Afghanistan:Kabul, Bangladesh:Dhaka, Nepal:Kathmandu, Romania:Bucharest, Bulgaria:Sofia,
    Serbia:Belgrade, Croatia:Zagreb, Switzerland:Bern, Netherlands:Amsterdam, Australia:Canberra,
    Morocco:Rabat, Libya:Tripoli, Ghana:Accra, Nigeria:Abuja, Ecuador:Quito, Venezuela:Caracas,
    Colombia:Bogota, Bolivia:Sucre, Jordan:Amman, Qatar:Doha, Taiwan:Taipei, Philippines:Manila,
    Mongolia:Ulaanbaatar, Estonia:Tallinn, Latvia:Riga
""")

STATES = _pairs("""
    Chicago:Illinois, Houston:Texas, Miami:Florida, Phoenix:Arizona, Detroit:Michigan,
    Seattle:Washington, Boston:Massachusetts, Denver:Colorado, Atlanta:Georgia, Portland:Oregon,
    Cleveland:Ohio, Milwaukee:Wisconsin, Philadelphia:Pennsylvania, Minneapolis:Minnesota,
    Nashville:Tennessee, Baltimore:Maryland, Omaha:Nebraska, Tulsa:Oklahoma, Indianapolis:Indiana,
    Louisville:Kentucky, Honolulu:Hawaii, Anchorage:Alaska, Boise:Idaho, Birmingham:Alabama,
    Sacramento:California, Dallas:Texas, Orlando:Florida, Tucson:Arizona, Cincinnati:Ohio,
    Pittsburgh:Pennsylvania, Memphis:Tennessee, Savannah:Georgia, Oakland:California,
    Spokane:Washington, Wichita:Kansas, Austin:Texas, Tampa:Florida, Madison:Wisconsin,
    Eugene:Oregon, Knoxville:Tennessee, Boulder:Colorado, Montgomery:Alabama, Topeka:Kansas,
    Hartford:Connecticut, Burlington:Vermont, Reno:Nevada, Jackson:Mississippi,
    Billings:Montana, Fresno:California
""")

LANDMARKS = [
    tuple(part.strip() for part in line.split(":"))
    for line in """
    Alhambra : Madrid : Granada
    Sagrada Familia : Madrid : Barcelona
    Leaning Tower : Rome : Pisa
    Hagia Sophia : Ankara : Istanbul
    Taj Mahal : Delhi : Agra
    Sydney Opera House : Canberra : Sydney
    Rialto Bridge : Rome : Venice
    Ponte Vecchio : Rome : Florence
    La Scala opera : Rome : Milan
    CN Tower : Ottawa : Toronto
    Golden Pavilion : Tokyo : Kyoto
    Fushimi Inari Shrine : Tokyo : Kyoto
    Cavern Club : London : Liverpool
    Old Trafford stadium : London : Manchester
    Wawel Castle : Warsaw : Krakow
    Bund : Beijing : Shanghai
    Oriental Pearl Tower : Beijing : Shanghai
    Park Guell : Madrid : Barcelona
    Camp Nou : Madrid : Barcelona
    Giralda : Madrid : Seville
    Old Port with the Chateau d'If : Paris : Marseille
    Palace of the Popes : Paris : Avignon
    Jet d'Eau fountain : Bern : Geneva
    Grossmunster church : Bern : Zurich
    Gateway of India : Delhi : Mumbai
    Charminar : Delhi : Hyderabad
    Howrah Bridge : Delhi : Kolkata
    Blue Mosque : Ankara : Istanbul
    Grand Bazaar : Ankara : Istanbul
    Topkapi Palace : Ankara : Istanbul
    Galata Tower : Ankara : Istanbul
    Hassan II Mosque : Rabat : Casablanca
    Willis Tower : Washington : Chicago
    Space Needle : Washington : Seattle
    Fenway Park stadium : Washington : Boston
    Liberty Bell : Washington : Philadelphia
    Bondi Beach : Canberra : Sydney
    Federation Square : Canberra : Melbourne
    Stanley Park : Ottawa : Vancouver
    Livraria Lello bookshop : Lisbon : Porto
    Dom Luis Bridge : Lisbon : Porto
    Bryggen wharf : Oslo : Bergen
    Elbphilharmonie : Berlin : Hamburg
    Zwinger Palace : Berlin : Dresden
    Frauenkirche : Berlin : Dresden
    Uffizi Gallery : Rome : Florence
    Doge's Palace : Rome : Venice
    """.splitlines()
    if ":" in line
]


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
