"""Facts that are widely known, of several kinds, written for this project: 371 questions with short answers (data).

One line a kind: the question with a gap, and `what: answer` pairs; answers that are also right follow after `/`. A
check looks for one of them as a word of its own, in any case. Nothing here changes with the news.
"""

from __future__ import annotations

import re

from secondnature.evidence.packs.made import Made

__all__ = ["facts"]

_CAPITALS = """France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon; Austria: Vienna;
Poland: Warsaw; Hungary: Budapest; Greece: Athens; Norway: Oslo; Sweden: Stockholm; Finland: Helsinki; Denmark:
Copenhagen; Ireland: Dublin; Belgium: Brussels; Romania: Bucharest; Bulgaria: Sofia; Croatia: Zagreb; Serbia:
Belgrade; Iceland: Reykjavik/Reykjavík; Russia: Moscow; Ukraine: Kyiv/Kiev; Turkey: Ankara; Egypt: Cairo; Kenya:
Nairobi; Ethiopia: Addis Ababa; Ghana: Accra; Senegal: Dakar; Morocco: Rabat; Tunisia: Tunis; Algeria: Algiers;
Iran: Tehran/Teheran; Iraq: Baghdad; Syria: Damascus; Lebanon: Beirut; Jordan: Amman; Saudi Arabia: Riyadh; Qatar:
Doha; Japan: Tokyo; China: Beijing; South Korea: Seoul; Thailand: Bangkok; Vietnam: Hanoi; the Philippines:
Manila; India: New Delhi/Delhi; Nepal: Kathmandu; Pakistan: Islamabad; Bangladesh: Dhaka; Afghanistan: Kabul;
Mongolia: Ulaanbaatar/Ulan Bator; Cuba: Havana; Mexico: Mexico City; Canada: Ottawa; Brazil: Brasilia/Brasília;
Argentina: Buenos Aires; Chile: Santiago; Peru: Lima; Colombia: Bogota/Bogotá; Ecuador: Quito; Venezuela: Caracas;
Uruguay: Montevideo; Paraguay: Asuncion/Asunción; Australia: Canberra; New Zealand: Wellington; the United
Kingdom: London; the United States: Washington; the Netherlands: Amsterdam; the Czech Republic: Prague; Slovakia:
Bratislava; Slovenia: Ljubljana; Estonia: Tallinn; Latvia: Riga; Lithuania: Vilnius; Switzerland: Bern/Berne"""

_CONTINENTS = """France: Europe; Germany: Europe; Spain: Europe; Poland: Europe; Sweden: Europe; Greece: Europe;
Japan: Asia; India: Asia; China: Asia; Thailand: Asia; Vietnam: Asia; Nepal: Asia; Kenya: Africa; Nigeria: Africa;
Ghana: Africa; Ethiopia: Africa; Senegal: Africa; Uganda: Africa; Brazil: South America; Peru: South America;
Chile: South America; Bolivia: South America; Canada: North America; Mexico: North America"""

_SYMBOLS = """hydrogen: H; helium: He; carbon: C; nitrogen: N; oxygen: O; fluorine: F; neon: Ne; sodium: Na;
magnesium: Mg; aluminium: Al; silicon: Si; phosphorus: P; sulfur: S; chlorine: Cl; potassium: K; calcium: Ca;
iron: Fe; copper: Cu; zinc: Zn; silver: Ag; tin: Sn; gold: Au; mercury: Hg; lead: Pb; uranium: U; nickel: Ni;
titanium: Ti; lithium: Li"""

_AUTHORS = """Hamlet: Shakespeare; Romeo and Juliet: Shakespeare; Macbeth: Shakespeare; Don Quixote: Cervantes;
War and Peace: Tolstoy; Anna Karenina: Tolstoy; Crime and Punishment: Dostoevsky/Dostoyevsky; Pride and Prejudice:
Austen; Oliver Twist: Dickens; A Christmas Carol: Dickens; Moby-Dick: Melville; Frankenstein: Shelley; Dracula:
Stoker; The Odyssey: Homer; Faust: Goethe; The Divine Comedy: Dante; Les Misérables: Hugo; Robinson Crusoe: Defoe;
Jane Eyre: Brontë/Bronte; Ulysses: Joyce; The Adventures of Tom Sawyer: Twain; Alice's Adventures in Wonderland:
Carroll; The Jungle Book: Kipling; The Time Machine: Wells; Treasure Island: Stevenson; 1984: Orwell; Animal Farm:
Orwell; The Metamorphosis: Kafka"""

_OPPOSITES = """hot: cold; big: small/little; tall: short; long: short; fast: slow; up: down; left: right; light:
dark/heavy; day: night; black: white; open: closed/shut/close; full: empty; rich: poor; young: old; new: old;
happy: sad/unhappy; hard: soft/easy; wet: dry; clean: dirty; early: late; loud: quiet/soft; strong: weak; true:
false; good: bad/evil; first: last; inside: outside; above: below; before: after; love: hate; win: lose; buy:
sell; begin: end/finish; high: low; thick: thin; wide: narrow; deep: shallow; sweet: sour/bitter; north: south;
east: west; in: out"""

_PLURALS = """child: children; man: men; woman: women; foot: feet; tooth: teeth; mouse: mice; goose: geese; ox:
oxen; knife: knives; leaf: leaves; wolf: wolves; city: cities; baby: babies; box: boxes; bus: buses; potato:
potatoes; person: people; shelf: shelves"""

_PASTS = """go: went; eat: ate; see: saw; take: took; give: gave; come: came; run: ran; write: wrote; speak:
spoke; drive: drove; fly: flew; know: knew; begin: began; break: broke; buy: bought; bring: brought; think:
thought; teach: taught; catch: caught; find: found; keep: kept; sleep: slept; swim: swam; sing: sang; drink:
drank; make: made; say: said; tell: told; sell: sold"""

_YOUNG = """dog: puppy/pup; cat: kitten; cow: calf; horse: foal/colt; sheep: lamb; pig: piglet; lion: cub; bear:
cub; duck: duckling; hen: chick; goat: kid; deer: fawn; goose: gosling; frog: tadpole; kangaroo: joey"""

_NEXT = """Monday: Tuesday; Tuesday: Wednesday; Wednesday: Thursday; Thursday: Friday; Friday: Saturday; Saturday:
Sunday; Sunday: Monday; January: February; February: March; March: April; April: May; May: June; June: July; July:
August; August: September; September: October; October: November; November: December; December: January"""

_LANGUAGES = """France: French; Germany: German; Italy: Italian; Spain: Spanish; Japan: Japanese; Russia: Russian;
Poland: Polish; Turkey: Turkish; Greece: Greek; Hungary: Hungarian; Sweden: Swedish; Portugal: Portuguese; Brazil:
Portuguese; Mexico: Spanish; Argentina: Spanish; Austria: German; Vietnam: Vietnamese; Thailand: Thai; Finland:
Finnish; Denmark: Danish; Romania: Romanian"""

_COUNTS = """legs does a spider have: 8/eight; legs does an insect have: 6/six; legs does a dog have: 4/four; days
are in a week: 7/seven; months are in a year: 12/twelve; hours are in a day: 24/twenty-four; minutes are in an
hour: 60/sixty; seconds are in a minute: 60/sixty; sides does a triangle have: 3/three; sides does a square have:
4/four; sides does a hexagon have: 6/six; wheels does a bicycle have: 2/two; letters are in the English alphabet:
26/twenty-six; players are in a football (soccer) team on the field: 11/eleven; strings does a violin have:
4/four; cents are in a dollar: 100/hundred; centimetres are in a metre: 100/hundred; metres are in a kilometre:
1000/1,000/thousand; grams are in a kilogram: 1000/1,000/thousand; years are in a century: 100/hundred; years are
in a decade: 10/ten; arms does an octopus have: 8/eight; degrees are in a right angle: 90/ninety; planets are in
the Solar System: 8/eight; faces does a cube have: 6/six; fingers are on one hand: 5/five; eggs are in a dozen:
12/twelve; colours does the flag of France have: 3/three"""

_MIXED = """What is the largest planet of the Solar System?: Jupiter; Which planet is closest to the Sun?:
Mercury; Which planet is known as the red planet?: Mars; Which planet is famous for its rings?: Saturn; What does
the Earth orbit?: Sun; What orbits the Earth and shines at night?: Moon; What is the largest ocean?: Pacific; What
is the highest mountain on Earth?: Everest; What is the largest land animal?: elephant; What is the tallest
animal?: giraffe; What is the largest animal on Earth?: whale; Which animal is called the king of the jungle?:
lion; What do bees make?: honey; What do cows give us to drink?: milk; What is frozen water called?: ice; At how
many degrees Celsius does water boil?: 100/hundred; At how many degrees Celsius does water freeze?: 0/zero; Which
gas do plants take in?: carbon dioxide/CO2; Which gas do we need to breathe?: oxygen; What is the chemical formula
of water?: H2O/H₂O; Who painted the Mona Lisa?: Leonardo/Vinci; Who painted The Starry Night?: Gogh; Who proposed
the theory of relativity?: Einstein; Who wrote the theory of evolution?: Darwin; Who was the first president of
the United States?: Washington; Who was the first human on the Moon?: Armstrong; In which city is the Eiffel
Tower?: Paris; In which city is the Colosseum?: Rome; In which city is Big Ben?: London; In which country are the
pyramids of Giza?: Egypt; In which country is the Taj Mahal?: India; In which country is the Great Wall?: China;
What colour is the sky on a clear day?: blue; What colour is grass?: green; What colour is a ripe banana?: yellow;
What colour is snow?: white; What colour is blood?: red; Which colour do you get from blue and yellow?: green;
Which colour do you get from red and white?: pink; Which season comes after winter?: spring; Which season comes
after summer?: autumn/fall; Which organ pumps blood?: heart; Which organ do we think with?: brain; Which sense do
we use our ears for?: hearing/hear/sound; What do we use to cut paper?: scissors; What instrument measures
temperature?: thermometer; What instrument do we use to look at stars?: telescope"""

_KINDS: list[tuple[str, str, str]] = [
    ("capitals", "What is the capital of {}?", _CAPITALS),
    ("continents", "On which continent is {}?", _CONTINENTS),
    ("symbols", "What is the chemical symbol of {}?", _SYMBOLS),
    ("authors", "Who wrote “{}”?", _AUTHORS),
    ("opposites", "What is the opposite of “{}”?", _OPPOSITES),
    ("plurals", "What is the plural of “{}”?", _PLURALS),
    ("pasts", "What is the past tense of “{}”?", _PASTS),
    ("young", "What is the young of a {} called?", _YOUNG),
    ("order", "What comes after {}?", _NEXT),
    ("languages", "Which language do most people in {} speak?", _LANGUAGES),
    ("counts", "How many {}?", _COUNTS),
    ("mixed", "{}", _MIXED),
]


def facts() -> list[Made]:
    """Every fact, in the order of the kinds."""
    return [
        Made(
            prompt=question.format(what),
            tag=tag,
            check={"matches": _pattern(answers, exact=tag == "symbols")},
            right=f"It is {answers[0]}.",
            wrong="I am not sure about that one.",
            max_tokens=32,
        )
        for tag, question, pairs in _KINDS
        for what, answers in _read(pairs)
    ]


def _read(pairs: str) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for pair in pairs.replace("\n", " ").split(";"):
        what, _, answers = pair.strip().rpartition(": ")
        found.append((what, answers.split("/")))
    return found


def _pattern(answers: list[str], *, exact: bool) -> str:
    """One of the answers as a word of its own; a symbol in its own case, and no article `I` or `a`."""
    words = "|".join(re.escape(a) for a in answers)
    return rf"(?<![\w.])(?:{words})(?!\w)" if exact else rf"(?i)(?<!\w)(?:{words})(?!\w)"
