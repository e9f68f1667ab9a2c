"""The words of the synthetic dialogues: who speaks, what can be so, and the sentences that say it.

Everything is lower case with spaces around punctuation, so a word-level tokenizer reads it as it stands.
"""

from __future__ import annotations

import random
from datetime import date

from memfactory.environments.base import Split

NAMES = tuple("anna leo mia tom sara ben nina paul ella max ruth hugo".split())
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "pet": tuple("dog cat rabbit parrot turtle hamster goat pony snake frog".split()),
    "job": tuple("baker nurse pilot farmer painter teacher plumber waiter dentist gardener".split()),
    "sport": tuple("tennis football hockey golf rowing boxing judo cricket skiing cycling".split()),
    "instrument": tuple("piano violin guitar flute drums cello harp trumpet oboe banjo".split()),
    "drink": tuple("tea coffee milk cider juice cocoa lemonade beer wine soda".split()),
    "snack": tuple("apple pear plum fig peach grape melon mango toast cheese".split()),
    "coat": tuple("red blue green yellow purple orange pink brown grey white".split()),
    "town": tuple("paris rome cairo lima oslo quito delhi kyiv tunis perth".split()),
}
"""What can be so of a person, one value at a time."""
OCCASIONS = tuple("exam wedding race concert interview picnic".split())
"""What has a date, said relative to the day of the session."""
NOTHING = ("none", "nothing")
"""Accepted where a fact was taken back."""

RELATIVE: dict[int, str] = {
    0: "today",
    1: "tomorrow",
    2: "in two days",
    3: "in three days",
    4: "in four days",
    5: "in five days",
    6: "in six days",
    7: "in one week",
    14: "in two weeks",
}
"""Days from the session to the date, and how it is said."""

MONTHS = tuple("january february march april may june july august september october november december".split())
_OTHERS = tuple("brother sister neighbour cousin boss friend uncle aunt".split())
_CHATTER = (
    "the {thing} was {how} again .",
    "did you see the {thing} ? it is so {how} .",
    "i dreamed of a {how} {thing} .",
    "we talked about the {how} {thing} .",
)
_THINGS = tuple("weather bus garden street movie book river market bridge window clock train".split())
_HOWS = tuple("loud quiet long short strange lovely late cold warm old new funny".split())
_NEW = ("my {fact} is {value} .", "by the way , my {fact} is {value} .", "you should know that my {fact} is {value} .")
_CHANGED = ("my {fact} is now {value} .", "something changed : my {fact} is now {value} .")
_RETRACTED = ("i have no {fact} any more .", "there is no {fact} any more for me .")
_DISTRACTION = ("the {fact} of my {other} is {value} .", "i heard that the {fact} of my {other} is now {value} .")
_QUESTIONS = ("what is the {fact} of {speaker} ?", "on which date is the {fact} of {speaker} ?")
_HEADER = "date : {when} ."


def allowed(split: Split, speaker: str, value: int) -> bool:
    """Whether `speaker` may have value number `value` (a place in its list, or the ordinal of a date) in `split`.

    Speakers and values are paired like the colours of a chessboard: every word is in both splits, and no pair is.
    """
    return (NAMES.index(speaker) + value) % 2 == (split == Split.TEST)


def date_words(day: date) -> str:
    """``12 may 2024``"""
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def header(day: date) -> str:
    return _HEADER.format(when=date_words(day))


def say_new(rng: random.Random, fact: str, value: str) -> str:
    return rng.choice(_NEW).format(fact=fact, value=value)


def say_changed(rng: random.Random, fact: str, value: str) -> str:
    return rng.choice(_CHANGED).format(fact=fact, value=value)


def say_retracted(rng: random.Random, fact: str) -> str:
    return rng.choice(_RETRACTED).format(fact=fact)


def say_distraction(rng: random.Random, fact: str, value: str) -> str:
    """The same kind of fact about somebody who takes no part and is never asked about."""
    return rng.choice(_DISTRACTION).format(fact=fact, value=value, other=rng.choice(_OTHERS))


def chat(rng: random.Random) -> str:
    """A sentence that holds no fact."""
    return rng.choice(_CHATTER).format(thing=rng.choice(_THINGS), how=rng.choice(_HOWS))


def question(speaker: str, fact: str) -> str:
    return _QUESTIONS[fact in OCCASIONS].format(speaker=speaker, fact=fact)


def words(first_year: int, last_year: int) -> list[str]:
    """Every word of the world, in a fixed order, with the numbers of days 1 to 31 and of the years given."""
    texts = [*_NEW, *_CHANGED, *_RETRACTED, *_DISTRACTION, *_QUESTIONS, *_CHATTER, _HEADER, *RELATIVE.values()]
    plain = [word for text in texts for word in text.split() if not word.startswith("{")]
    values = [word for fact, values in ATTRIBUTES.items() for word in (fact, *values)]
    numbers = map(str, [*range(1, 32), *range(first_year, last_year + 1)])
    found = [*plain, *values, *OCCASIONS, *NOTHING, *NAMES, *_OTHERS, *_THINGS, *_HOWS, *MONTHS, *numbers]
    return list(dict.fromkeys(found))
