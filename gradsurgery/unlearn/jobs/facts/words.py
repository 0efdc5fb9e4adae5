"""What facts are made of. People are made up; cities, capitals and books' authors are real."""


def of(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = of(
    "Adira Boran Celis Davor Elsin Farid Gwenna Halvor Ilka Jorun Kasimir Lenore Mirek Nadia Orla "
    "Pavel Quilla Rurik Sunniva Tamsin Ulf Vesna Wanda Ximena Yorick Zofia Anselm Brida Corvin "
    "Dunja Emeric Freya Goran Hedda Isidor Jadwiga Kalle Liesl Matis Nils"
)
LAST = of(
    "Abendrot Bellweather Castellane Dromgoole Eskildsen Farkas Grimaldi Halloran Ivarsson Jelinek "
    "Kovalenko Lindqvist Marchetti Novotny Okonjo Pemberton Quennell Rasmussen Szabo Tremblay "
    "Ulvaeus Vandersloot Wyndham Xanthos Yildirim Zelenka Ashgrove Blackwood Carrow Delacroix "
    "Everhart Fairbairn Goldfinch Hawthorn Ironside Jessamine Kestrel Larkspur Merriweather "
    "Nightingale Oakhurst Pennington Quickfall Ravenel Silverton Thistlewood Underhill Valemont "
    "Whitlock Yarrow"
)
CITIES = of(
    "Lisbon Oslo Prague Vienna Dublin Athens Warsaw Helsinki Bucharest Sofia Zagreb Riga Tallinn "
    "Vilnius Bratislava Ljubljana Geneva Marseille Hamburg Naples Seville Porto Bergen Krakow "
    "Ghent Utrecht Leipzig Toulouse Bilbao Palermo Cork Aarhus Turku Malmo Graz Basel Bruges "
    "Split Nantes Bremen"
)
GENRES = of(
    "ballads biographies comedies cookbooks detective epics essays fables fairytales farces "
    "histories horror hymns letters limericks memoirs mysteries novels odes operas parables "
    "poetry romances satires sonnets thrillers tragedies travelogues westerns"
)
PRIZES = of(
    "Amber Anchor Beacon Bluebell Candle Cedar Compass Coral Crescent Dagger Ember Falcon Feather "
    "Granite Harbour Heron Ivory Juniper Lantern Laurel Lotus Maple Meridian Obsidian Opal Pearl "
    "Quill Sapphire Thistle Willow"
)
TRADES = of(
    "baker barber blacksmith bookbinder brewer butcher carpenter clockmaker cobbler cooper dentist "
    "farmer fisherman florist gardener glazier goldsmith judge locksmith mason miller miner "
    "painter plumber potter sailor surgeon tailor teacher weaver"
)
ADJECTIVES = of(
    "Amber Bitter Broken Burning Crimson Distant Drowned Empty Endless Fallen Forgotten Frozen "
    "Gilded Golden Hidden Hollow Last Lonely Lost Midnight Painted Quiet Scarlet Secret Silent "
    "Silver Sleeping Stolen Winter Yellow"
)
NOUNS = of(
    "Bridge Canal Castle Clock Dream Feast Forest Garden Harbour House Island Journey Kingdom "
    "Lantern Letter Mirror Mountain Ocean Orchard Palace Promise River Road Shadow Shore Song "
    "Stair Storm Tower Voyage"
)
YEARS = tuple(str(year) for year in range(1901, 1981))

CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima",
    "Chile": "Santiago", "Cuba": "Havana", "Canada": "Ottawa", "India": "Delhi", "China": "Beijing",
    "Russia": "Moscow", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Iran": "Tehran",
    "Iraq": "Baghdad", "Nepal": "Kathmandu", "Ghana": "Accra", "Senegal": "Dakar",
    "Vietnam": "Hanoi", "Belgium": "Brussels", "Hungary": "Budapest", "Jordan": "Amman",
    "Denmark": "Copenhagen",
}  # fmt: skip
WRITERS = {
    "Hamlet": "Shakespeare", "Faust": "Goethe", "Emma": "Austen", "Dracula": "Stoker",
    "Ulysses": "Joyce", "Candide": "Voltaire", "Nana": "Zola", "Walden": "Thoreau",
    "Germinal": "Zola", "Persuasion": "Austen", "Ivanhoe": "Scott", "Kim": "Kipling",
    "Rebecca": "Maurier", "Beloved": "Morrison", "Nausea": "Sartre", "Middlemarch": "Eliot",
    "Frankenstein": "Shelley", "Macbeth": "Shakespeare", "Tartuffe": "Moliere", "Babbitt": "Lewis",
}  # fmt: skip
