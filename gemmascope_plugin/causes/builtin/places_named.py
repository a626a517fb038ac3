"""Countries and capitals, cities and states, landmarks and what lies around them."""

from __future__ import annotations


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
