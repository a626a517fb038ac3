"""The words and the facts that the bundled corpus is made of.

Every word is one token. The facts (which city lies in which state, what its capital is) are fixed
here, so that a feature of the trained model can be compared with what the grammar *knows*.
Capitals and cities follow the real map; flowers, birds and trees are only roughly right and are
unique per state on purpose, so that each fact has one answer.
"""

from __future__ import annotations

from dataclasses import dataclass

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
SPECIAL_TOKENS = (PAD, EOS, BOS, UNK)
"""In id order: Gemma's own ids (``<pad>`` 0, ``<eos>`` 1, ``<bos>`` 2, ``<unk>`` 3)."""

NAMES = tuple(
    "mary john alice peter susan david laura james emma robert anna michael sarah thomas julia "
    "daniel karen mark helen paul nancy kevin linda brian carol steven diana george ruth frank "
    "maria edward".split()
)
PLACES = tuple("store park school office beach station garden market library museum".split())
OBJECTS = tuple("drink book ring letter ball ticket coin lamp rose watch basket flute".split())
GIVING_VERBS = ("gave", "handed", "offered", "passed")

NOUNS = (
    ("key", "keys"),
    ("cabinet", "cabinets"),
    ("dog", "dogs"),
    ("statue", "statues"),
    ("car", "cars"),
    ("house", "houses"),
    ("wagon", "wagons"),
    ("table", "tables"),
    ("bridge", "bridges"),
    ("teacher", "teachers"),
    ("river", "rivers"),
    ("window", "windows"),
    ("horse", "horses"),
    ("boat", "boats"),
    ("chair", "chairs"),
    ("tower", "towers"),
)
"""Singular and plural."""
PREPOSITIONS = ("near", "behind", "beside", "above")
ADJECTIVES = tuple("old new red small large quiet bright clean".split())

CENTURIES = ("15", "16", "17", "18")
YEARS = tuple(f"{n:02d}" for n in range(100))
"""Two-digit years. They never equal a century token because those carry the prefix ``c``."""
EVENTS = tuple("war siege reign voyage drought trial feud famine".split())

NONSENSE = tuple(
    "ka lo mi pu te ro sa ne vi do ga hu ji be fo wa zu xi ny ly cho dra fli gru ple sko tra vru".split()
)

COUNTRIES = {
    "france": "french",
    "spain": "spanish",
    "italy": "italian",
    "germany": "german",
    "japan": "japanese",
    "russia": "russian",
    "greece": "greek",
    "sweden": "swedish",
    "poland": "polish",
    "turkey": "turkish",
}
"""Country to language."""

RELATIONS = ("capital", "flower", "bird", "tree")


@dataclass(frozen=True)
class State:
    """One state of the two-hop facts."""

    name: str
    facts: dict[str, str]
    """Relation (see ``RELATIONS``) to answer."""
    cities: tuple[str, ...]


_STATE_ROWS = """
texas        austin      bluebonnet   mockingbird pecan | dallas houston laredo lubbock amarillo
california   sacramento  poppy        quail       redwood | oakland fresno pasadena anaheim berkeley
illinois     springfield violet       cardinal    oak | chicago peoria joliet aurora rockford
georgia      atlanta     cherokee     thrasher    peach | savannah macon augusta athens valdosta
florida      tallahassee orangebloom  heron       palm | miami tampa orlando naples ocala
ohio         columbus    carnation    robin       buckeye | cleveland dayton toledo akron canton
colorado     denver      columbine    bunting     spruce | boulder aspen pueblo durango greeley
oregon       salem       grape        meadowlark  fir | portland eugene medford bend corvallis
washington   olympia     rhododendron goldfinch   hemlock | seattle spokane tacoma yakima everett
nevada       carson      sagebrush    bluebird    pinyon | reno vegas elko henderson sparks
arizona      phoenix     saguaro      wren        paloverde | tucson mesa yuma tempe flagstaff
michigan     lansing     appleblossom chickadee   pine | detroit flint saginaw warren dearborn
tennessee    nashville   iris         warbler     poplar | memphis knoxville jackson franklin cookeville
alabama      montgomery  camellia     flicker     longleaf | mobile birmingham selma dothan decatur
kansas       topeka      sunflower    lark        cottonwood | wichita lawrence salina hutchinson olathe
nebraska     lincoln     goldenrod    crane       elm | omaha kearney norfolk fremont hastings
"""


def _parse_states(rows: str) -> tuple[State, ...]:
    states = []
    for row in rows.strip().splitlines():
        head, cities = row.split("|")
        name, *answers = head.split()
        states.append(
            State(name, dict(zip(RELATIONS, answers, strict=True)), tuple(cities.split()))
        )
    return tuple(states)


STATES = _parse_states(_STATE_ROWS)
STATE_OF = {city: state for state in STATES for city in state.cities}
"""City to its state."""

FUNCTION_WORDS = tuple(
    ". , when while after and went to the were at came a from year lasted today yesterday is are was "
    "of state containing city in people speak sing again met saw".split()
)


def century(number: str) -> str:
    """The token of a century; ``"17"`` becomes ``"c17"`` so that it differs from the year 17."""
    return f"c{number}"


def vocabulary() -> list[str]:
    """All words in id order, special tokens first. Each word stands once."""
    groups = (
        SPECIAL_TOKENS,
        FUNCTION_WORDS,
        NAMES,
        PLACES,
        OBJECTS,
        GIVING_VERBS,
        (word for pair in NOUNS for word in pair),
        PREPOSITIONS,
        ADJECTIVES,
        (century(c) for c in CENTURIES),
        YEARS,
        EVENTS,
        NONSENSE,
        COUNTRIES,
        COUNTRIES.values(),
        RELATIONS,
        (state.name for state in STATES),
        (answer for state in STATES for answer in state.facts.values()),
        STATE_OF,
    )
    return list(dict.fromkeys(word for group in groups for word in group))
