"""Sentences for benchmarks of search: distinct facts about people, and questions that are none of them.

Each fact is drawn from 24 forms with words for who, what, where, when and why, so that a word of a question stands
in a few hundredths of the facts at most, a name in a few thousandths, and "the" in most.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

FIRST = (
    "Anna Ben Carla Daniel Elena Farid Grace Hugo Ingrid Jamal Keiko Lars Maria Nadia Oscar Priya Quentin Rosa"
    " Samuel Tara Umar Vera Wei Ximena Yusuf Zoe Agnes Boris Chloe Dmitri Esther Felix Gita Henrik Irene Jonas"
    " Kavita Leo Mona Nils Olga Pablo Ruth Stefan Teresa Ulrich Violet Walter Yara Zane Amara Bruno Celine"
    " Dora Emil Fatima Gustav Hannah Ismail Judith Karim Lucia Marek Noor Otto Petra Rahul Sofia Theo Ursula"
    " Viktor Wanda Yolanda"
).split()
LAST = (
    "Andersen Baker Costa Dubois Eriksen Fischer Garcia Haddad Ivanov Jensen Kowalski Larsen Moreau Nakamura"
    " Okafor Petrov Quinn Rossi Schmidt Tanaka Usman Vargas Weber Xu Yilmaz Zimmer Abbott Bianchi Chandra Diaz"
    " Edwards Fontaine Gupta Hassan Iversen Johansson Kim Lopez Martin Novak Olsen Park Romero Silva Torres"
    " Unger Visser Wong Young"
).split()
PLACES = (
    "Bergen Lisbon Kyoto Nairobi Toronto Valencia Gdansk Lyon Porto Oslo Tampere Ghent Basel Seville Krakow"
    " Izmir Tunis Accra Lima Quito Denver Austin Portland Halifax Leeds Cork Bristol Turin Verona Graz Brno"
    " Malmo Aarhus Tartu Riga Vilnius Split Patras Haifa Amman Muscat Pune Chennai Hanoi Busan Taipei Cebu"
    " Perth Hobart Dunedin Rosario Cusco Cali Leon Merida Tucson Boise Omaha Ottawa Regina Bath York Dundee"
    " Nantes Nice Bonn Kassel Trier Padua Bari"
).split()
THINGS = (
    "violin;camera;sailing boat;winter coat;laptop;mountain bike;coffee grinder;piano;telescope;tent;"
    "blue sofa;gold ring;rare stamp;garden shed;old lamp;chess set;sewing machine;surfboard;kitchen table;"
    "oak desk;guitar;raincoat;pair of boots;silver watch;red scarf;bookshelf;electric kettle;painting;rug;"
    "fishing rod;drone;microscope;cello;typewriter;canoe;motorcycle;greenhouse;wool blanket;cookbook;phone;"
    "backpack;pressure cooker;hammock;record player;toolbox;mirror;umbrella;necklace;tea set;rowing machine;"
    "sleeping bag;heat pump;bread oven;vase;tripod;globe;ladder;wheelbarrow;trumpet;saxophone"
).split(";")
ACTIVITIES = (
    "pottery;Spanish;rock climbing;ballroom dancing;woodwork;calligraphy;beekeeping;swimming;bookkeeping;"
    "photography;yoga;fencing;baking;astronomy;gardening;judo;knitting;sailing;carpentry;chess;welding;"
    "archery;watercolour;singing;cycling;rowing;Mandarin;statistics;first aid;horse riding;skiing;diving;"
    "origami;jazz piano;karate;bird watching;running marathons;brewing beer;programming;sign language"
).split(";")
PEOPLE = (
    "sister;brother;mother;father;neighbour;colleague;landlord;grandmother;cousin;dentist;teacher;manager;"
    "uncle;aunt;roommate;trainer;accountant;lawyer;gardener;doctor;nephew;daughter;son;best friend;"
    "former boss;tutor;plumber"
).split(";")
FOODS = (
    "peanuts;shellfish;mushroom risotto;lamb curry;rye bread;goat cheese;lentil soup;sushi;apple pie;"
    "dark chocolate;pickled herring;mango;aubergine;oysters;figs;blueberry pancakes;tofu;rice noodles;olives;"
    "walnuts;beetroot;strawberries;fried eggs;porridge;pumpkin soup;dumplings;paella;tacos;hummus;falafel"
).split(";")
JOBS = (
    "nurse;bus driver;architect;translator;pharmacist;pilot;librarian;electrician;journalist;chef;vet;"
    "surveyor;baker;midwife;judge;geologist;tailor;paramedic;firefighter;biologist;bookseller;optician;"
    "stonemason;actor;florist"
).split(";")
WHENS = (
    "in January;in February;in March;in April;in May;in June;in July;in August;in September;in October;"
    "in November;in December;last Monday;last Tuesday;on Wednesday;on Thursday evening;on Friday;"
    "at the weekend;two years ago;before the holidays;after the storm;at Easter;during the strike;"
    "in the spring of 2019;in 2021;in the autumn of 2015"
).split(";")
WHYS = (
    "because the old one broke;after a long illness;to save money;on the advice of a friend;"
    "to be near the sea;because the rent went up;as a birthday present;for the wedding;after losing a bet;"
    "to get over the divorce;because of the new job;to feel less lonely;against everyone's advice;for charity;"
    "after reading an article about it;because the children asked;to prepare for the exam;"
    "before the baby comes;out of curiosity;since the flood"
).split(";")

FACTS = (
    "{who} moved from {place} to {place2} {when} {why}",
    "{who} bought a {thing} in {place} {when} {why}",
    "{who} is allergic to {food} and found out {when} in {place}",
    "{who} has been learning {activity} with a {person} in {place} {why}",
    "{who} works as a {job} in {place} and dreams of {activity}",
    "the {person} of {who} lives in {place} and collects one {thing} after another",
    "{who} lent the {thing} to a {person} {when} and never saw it again",
    "{who} quit the job as a {job} {when} {why}",
    "{who} and {who2} met at a class on {activity} in {place}",
    "{who} cooks {food} for the {person} every time they visit from {place}",
    "{who} lost a {thing} on the train to {place} {when}",
    "{who} plans to sell the {thing} {why}",
    "{who} gave {who2} a {thing} {when} {why}",
    "{who} cannot stand {food} but loves {food2}",
    "{who} broke an arm while practising {activity} {when}",
    "{who} is afraid of flying and took the night train to {place} {when}",
    "{who} rents a flat in {place} from a {person} who works as a {job}",
    "{who} was promoted to head {job} {when}, {who2} was not",
    "{who} keeps the spare key with the {person} in {place}",
    "{who} started a small company for {activity} in {place} {when}",
    "{who} has two cats and a {thing} that belonged to the {person}",
    "{who} prefers {food} to {food2} {why}",
    "{who} will marry {who2} in {place} {when}",
    "{who} teaches {activity} to the children of a {job} from {place}",
)
QUESTIONS = (
    "Where does {who} live these days?",
    "What did {who} purchase in {place}?",
    "Which food makes {who} sick?",
    "Who is teaching {who} {activity}?",
    "What does {who} do for a living in {place}?",
    "Where did {who} meet {who2}?",
    "Which present did {who2} receive from {who}?",
    "Why did {who} leave the job as a {job}?",
    "Who has the {thing} that {who} lent out?",
    "How did {who} get hurt, was it {activity}?",
    "What is served when the {person} of {who} comes to dinner?",
    "When is the wedding of {who} and {who2}?",
    "Whom could we ask for the key to the home of {who}?",
    "Does {who} like {food} or rather something else?",
    "How did {who} travel to {place}?",
    "Which of our friends in {place} is good at {activity}?",
    "Is anyone selling a {thing} {when}?",
    "Who knows a {job} near {place}?",
)


def _filled(form: str, draw: random.Random) -> str:
    place, place2 = draw.sample(PLACES, 2)
    food, food2 = draw.sample(FOODS, 2)
    who, who2 = (f"{draw.choice(FIRST)} {draw.choice(LAST)}" for _ in range(2))
    return form.format(
        who=who, who2=who2, place=place, place2=place2, food=food, food2=food2, thing=draw.choice(THINGS),
        activity=draw.choice(ACTIVITIES), person=draw.choice(PEOPLE), job=draw.choice(JOBS), when=draw.choice(WHENS),
        why=draw.choice(WHYS),
    )  # fmt: skip


def _distinct(forms: tuple[str, ...], seed: int) -> Iterator[str]:
    draw, seen = random.Random(seed), set[str]()
    while True:
        text = _filled(draw.choice(forms), draw)
        if text not in seen:
            seen.add(text)
            yield text


def facts(seed: int = 0) -> Iterator[str]:
    """Statements without end, no two alike."""
    return _distinct(FACTS, seed)


def questions(seed: int = 1) -> Iterator[str]:
    """Questions without end, no two alike, none of them a fact."""
    return _distinct(QUESTIONS, seed)
