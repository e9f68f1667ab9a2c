"""Synthetic long documents in the manner of RULER (arXiv 2404.06654), written anew.

Lengths are in words: the environment knows no tokenizer. English filler makes about 1.3 tokens a word,
coined words three or more.

Every task has a generator seeded with (options, split, index), so it is the same in every process. The
splits are disjoint by construction: keys, values, variable names and coined words belong to train or to
test by one bit of their hash, so nothing that is asked or answered in one split occurs in the other.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from memfactory.environments.base import Split
from memfactory.environments.fact_words import seeded
from memfactory.environments.rows import Match
from memfactory.episode import Evidence, Probe, Task
from memfactory.errors import RecipeError


class RulerTask(StrEnum):
    """What is hidden in the document."""

    NIAH_SINGLE = "niah_single"
    """One needle: the access code of one thing."""
    NIAH_MULTIKEY = "niah_multikey"
    """`needles` codes of as many things; one is asked."""
    NIAH_MULTIVALUE = "niah_multivalue"
    """`needles` codes of one thing; all are asked."""
    VARIABLE_TRACKING = "variable_tracking"
    """A chain of `needles` variables, each set to the one before; all that hold the value are asked. A
    chain of the same length with another value runs beside it."""
    COMMON_WORDS = "common_words"
    """`needles` words that occur ten times as often as the others; all are asked."""
    FREQUENT_WORDS = "frequent_words"
    """Counts fall as 1/rank^2; the `needles` most frequent words are asked."""


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_NEEDLES = {
    RulerTask.NIAH_SINGLE: 1,
    RulerTask.NIAH_MULTIKEY: 4,
    RulerTask.NIAH_MULTIVALUE: 4,
    RulerTask.VARIABLE_TRACKING: 5,
    RulerTask.COMMON_WORDS: 10,
    RulerTask.FREQUENT_WORDS: 3,
}
_MOST_KEYS = 1000
"""Below half of the pairs of an adjective and a noun, so that drawing new ones stays quick."""
_ADJECTIVES = _list(
    "amber ancient bitter brave bright broken calm clever copper crimson curious dusty eager early empty faded "
    "fierce frozen gentle golden grey hidden hollow humble icy idle ivory jolly keen lazy little lonely lost "
    "loud lucky mellow misty modest narrow noble pale patient polite proud quick quiet rapid rusty scarlet "
    "secret sharp shy silent silver simple sleepy slender solid stormy sturdy sudden sunny tender tiny velvet "
    "violet wandering wicked wild wooden young"
)
_NOUNS = _list(
    "anchor arrow badger barrel beacon bishop bridge candle canyon castle cellar comet compass cradle cricket "
    "crown dagger desert dragon eagle engine falcon feather ferry fiddle forest fountain garden glacier goblet "
    "hammer harbour heron island jacket kettle ladder lantern library lizard magnet meadow mirror monkey needle "
    "orchard otter palace parrot pebble pigeon pillow pirate planet pocket pony prairie puzzle rabbit raven "
    "ribbon river rocket saddle sailor shadow spider statue temple thunder ticket tower trumpet tunnel turtle "
    "valley village violin wagon walnut willow window wizard"
)
_WHO = ("the mayor", "a tall stranger", "my aunt", "the night watchman", "her brother", "a retired captain")
_DID = ("painted", "described", "forgot", "admired", "carried home", "searched for", "wrote about", "sold")
_WHAT = ("an old map", "the winter coat", "a basket of plums", "the narrow boat", "a worn piano", "the last train")
_THEN = ("before the rain came", "without a word", "as everyone expected", "for the third time", "at the fair")
_LINKS = ("Meanwhile", "Later that day", "In those years", "As a rule", "On the way back", "Nobody knows why, but")
_SYLLABLES = tuple(f"{a}{b}{c}" for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "l", "n", "r"))


class _Draft(NamedTuple):
    """A document before it is cut: units are sentences or single words and stay whole."""

    units: list[str]
    question: str
    answers: list[str]
    evidence: list[tuple[str, int]]
    """Text, and the index of the unit that holds it."""


@dataclass(frozen=True)
class RulerTasks:
    """Environment of the synthetic tasks.

    When several answers are required, ``Probe.answers`` holds one canonical answer, the parts joined by
    ", ", ``metadata["match"]`` is ``all`` and ``metadata["required"]`` lists the parts. Evidence names
    needles and assignments. The word counting tasks have none: their answer stands in no single place.
    """

    task: RulerTask = RulerTask.NIAH_SINGLE
    length: int = 1000
    """Words of a document: at most this many, and fewer by less than one sentence (17 words)."""
    needles: int | None = None
    """Needles, variables or words, see :class:`RulerTask`. Absent: 4 for niah_multikey and
    niah_multivalue, 5 for variable_tracking, 10 for common_words, 3 for frequent_words. niah_single has 1."""
    seed: int = 0
    words_per_chunk: int | None = None
    """Cut the document between sentences into chunks of at most this many words. Absent: one document,
    which an agent with ``chunk_tokens`` cuts."""

    def __post_init__(self) -> None:
        needles = self._needles
        if needles < 1 or (self.task == RulerTask.NIAH_SINGLE and needles != 1):
            raise RecipeError(
                f"environment.needles: {needles} needles in {self.task}",
                "niah_single has exactly 1, the other tasks at least 1",
                "for several needles use niah_multikey (one is asked) or niah_multivalue (all are asked)",
            )
        if self.task == RulerTask.NIAH_MULTIKEY and needles > _MOST_KEYS:
            raise RecipeError(
                f"environment.needles: {needles} are too many", f"there are names for {_MOST_KEYS} keys", "use fewer"
            )
        # the words of the hidden sentences and one sentence of filler; for the counting tasks, enough
        # words to keep the asked ones strictly ahead of the others
        least = {
            RulerTask.VARIABLE_TRACKING: 12 * needles + 17,
            RulerTask.COMMON_WORDS: 8 * needles,
            RulerTask.FREQUENT_WORDS: 2 * needles**2 + 20 * needles,
        }.get(self.task, 9 * needles + 17)
        if self.length < least:
            raise RecipeError(
                f"environment.length: {self.length} words are too few",
                f"{self.task} with {needles} needles needs {least}",
                f"set length to {least} or more, or fewer needles",
            )
        if self.words_per_chunk is not None and self.words_per_chunk < 20:
            raise RecipeError(
                "environment.words_per_chunk: too small",
                f"{self.words_per_chunk} words do not always hold a sentence",
                "use 20 or more",
            )

    @property
    def _needles(self) -> int:
        return _NEEDLES[RulerTask(self.task)] if self.needles is None else self.needles

    def tasks(self, split: Split, count: int | None = None) -> Sequence[Task]:
        """Tasks 0 .. `count` - 1 of `split`.

        Raises:
            RecipeError: `count` is None; the environment generates without end.
        """
        if count is None:
            raise RecipeError(
                f"environment.{split}_tasks: missing",
                "ruler generates without end",
                f"say how many tasks, e.g. {split}_tasks: 128",
            )
        return [self._task(Split(split), index) for index in range(count)]

    def _task(self, split: Split, index: int) -> Task:
        name = f"ruler/{self.task}-{self._needles}/{self.length}/{split}/{self.seed}/{index}"
        draw = _Draw(seeded(name), split)
        draft = _MAKERS[self.task](draw, self.length, self._needles)
        stream, chunk_of = _cut(draft.units, self.words_per_chunk)
        match = Match.ANY if len(draft.answers) == 1 else Match.ALL
        return Task(
            id=name,
            stream=stream,
            probes=(
                Probe(
                    question=draft.question,
                    answers=(", ".join(draft.answers),),
                    evidence=tuple(Evidence(text, chunk_of[unit]) for text, unit in draft.evidence),
                ),
            ),
            metadata={"match": str(match)} | ({"required": draft.answers} if match == Match.ALL else {}),
        )


class _Draw:
    """Random choices for one task. What can be asked or answered is drawn from the half of all words
    that belongs to the task's split, and never twice."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.bit = int(split == Split.TEST)
        self._used: set[str] = set()

    def fresh(self, make: Callable[[], str]) -> str:
        """The first new word from `make` that belongs to the split."""
        while True:
            word = make()
            if word not in self._used and hashlib.sha256(word.encode()).digest()[0] & 1 == self.bit:
                self._used.add(word)
                return word

    def key(self) -> str:
        return self.fresh(lambda: f"{self.rng.choice(_ADJECTIVES)} {self.rng.choice(_NOUNS)}")

    def number(self, digits: int) -> str:
        return self.fresh(lambda: str(self.rng.randrange(10 ** (digits - 1), 10**digits)))

    def variable(self) -> str:
        return self.fresh(lambda: "".join(self.rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5)))

    def coined(self) -> str:
        return self.fresh(lambda: "".join(self.rng.choice(_SYLLABLES) for _ in range(3)))

    def filler(self) -> str:
        """A sentence of at most 17 words without digits."""
        rng = self.rng
        body = f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)}"
        if rng.random() < 0.5:
            body = f"{body} {rng.choice(_THEN)}"
        return f"{rng.choice(_LINKS)} {body}." if rng.random() < 0.3 else f"{body[0].upper()}{body[1:]}."

    def hide(self, hidden: list[str], length: int) -> tuple[list[str], list[int]]:
        """Filler of `length` words in all with the `hidden` sentences at random places, in their order.

        Returns the sentences and the index of each hidden one.
        """
        left = length - sum(_words(sentence) for sentence in hidden)
        filler: list[str] = []
        while True:
            sentence = self.filler()
            left -= _words(sentence)
            if left < 0:
                break
            filler.append(sentence)
        places = sorted(self.rng.sample(range(len(filler) + len(hidden)), len(hidden)))
        units = filler
        for place, sentence in zip(places, hidden, strict=True):
            units.insert(place, sentence)
        return units, places


def _code(key: str, value: str) -> str:
    return f"The access code of the {key} is {value}."


def _niah_keys(draw: _Draw, length: int, needles: int) -> _Draft:
    codes = {draw.key(): draw.number(7) for _ in range(needles)}
    hidden = [_code(key, value) for key, value in codes.items()]
    units, places = draw.hide(hidden, length)
    asked = draw.rng.randrange(needles)
    key, value = list(codes.items())[asked]
    return _Draft(units, f"What is the access code of the {key}?", [value], [(hidden[asked], places[asked])])


def _niah_values(draw: _Draw, length: int, needles: int) -> _Draft:
    key = draw.key()
    values = [draw.number(7) for _ in range(needles)]
    hidden = [_code(key, value) for value in values]
    units, places = draw.hide(hidden, length)
    question = f"What are all the access codes of the {key}? Give every one of them, separated by commas."
    return _Draft(units, question, values, list(zip(hidden, places, strict=True)))


def _variable_tracking(draw: _Draw, length: int, needles: int) -> _Draft:
    chains, values = [], []
    for _ in range(2):
        names, value = [draw.variable() for _ in range(needles)], draw.number(5)
        steps = [f"Set variable {names[0]} to {value}."]
        steps += [f"Set variable {after} to variable {before}." for before, after in pairwise(names)]
        chains.append((names, steps))
        values.append(value)
    # the chains interleave at random, each keeping its order
    turns = draw.rng.sample([0] * needles + [1] * needles, 2 * needles)
    steps_of = [iter(steps) for _, steps in chains]
    units, places = draw.hide([next(steps_of[turn]) for turn in turns], length)
    names, steps = chains[0]
    asked = [place for place, turn in zip(places, turns, strict=True) if turn == 0]
    question = f"Which variables hold the value {values[0]}? Give every one of them, separated by commas."
    return _Draft(units, question, names, list(zip(steps, asked, strict=True)))


def _common_words(draw: _Draw, length: int, needles: int) -> _Draft:
    # RULER's 30 against 3 where the document has room for it, the same ratio on a smaller scale where not
    often = max(4, min(30, length // (2 * needles)))
    rarely = max(1, often // 10)
    common = [draw.coined() for _ in range(needles)]
    others = [draw.coined() for _ in range((length - often * needles) // rarely)]
    units = common * often + others * rarely
    draw.rng.shuffle(units)
    question = (
        f"Which {needles} words are the most common in the document? Give every one of them, separated by commas."
        if needles > 1
        else "Which word is the most common in the document?"
    )
    return _Draft(units, question, common, [])


def _frequent_words(draw: _Draw, length: int, needles: int) -> _Draft:
    # count of rank r: length / (zeta(2) r^2), and one more for the asked words, so that no tie can arise
    counts = [math.floor(length * 6 / math.pi**2 / rank**2) + 1 for rank in range(1, needles + 1)]
    rank = needles
    while (left := length - sum(counts)) > 0:
        rank += 1
        counts.append(min(left, max(1, math.floor(length * 6 / math.pi**2 / rank**2))))
    words = [draw.coined() for _ in counts]
    units = [word for word, number in zip(words, counts, strict=True) for _ in range(number)]
    draw.rng.shuffle(units)
    question = (
        f"Which {needles} words are the most frequent in the document? Give every one of them, separated by commas."
        if needles > 1
        else "Which word is the most frequent in the document?"
    )
    return _Draft(units, question, words[:needles], [])


_MAKERS: dict[RulerTask, Callable[[_Draw, int, int], _Draft]] = {
    RulerTask.NIAH_SINGLE: _niah_keys,
    RulerTask.NIAH_MULTIKEY: _niah_keys,
    RulerTask.NIAH_MULTIVALUE: _niah_values,
    RulerTask.VARIABLE_TRACKING: _variable_tracking,
    RulerTask.COMMON_WORDS: _common_words,
    RulerTask.FREQUENT_WORDS: _frequent_words,
}


def _words(text: str) -> int:
    return text.count(" ") + 1


def _cut(units: list[str], words_per_chunk: int | None) -> tuple[tuple[str, ...], list[int]]:
    """Chunks of whole units, and the chunk of each unit."""
    chunks: list[list[str]] = [[]]
    chunk_of, size = [], 0
    for unit in units:
        size += _words(unit)
        if words_per_chunk is not None and size > words_per_chunk and chunks[-1]:
            chunks.append([])
            size = _words(unit)
        chunks[-1].append(unit)
        chunk_of.append(len(chunks) - 1)
    return tuple(" ".join(chunk) for chunk in chunks), chunk_of
