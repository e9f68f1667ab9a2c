"""The quickstart's task in plain English, for pretrained models: who has which code number.

Documents are a few everyday sentences with ``The code of Leo is 25.`` among them and the codes of other
people beside it. The question asks for one person. The usual failure of an untrained model is to
overwrite its note with somebody else's code.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from memfactory.environments.base import Split
from memfactory.environments.fact_words import seeded
from memfactory.episode import Evidence, Probe, Task
from memfactory.errors import RecipeError

_NAMES = tuple("Anna Leo Mia Tom Sara Ben Nina Paul Ella Max Ruth Hugo Vera Carl Lucy Omar Ida Finn Rosa Ivan".split())
_SUBJECTS = (
    "The baker",
    "A teacher",
    "The old gardener",
    "My neighbour",
    "The bus driver",
    "A young painter",
    "The librarian",
    "Our postman",
    "The farmer",
    "A tired nurse",
)
_ACTIONS = (
    "opened the window",
    "closed the shop early",
    "read a long letter",
    "walked to the station",
    "bought fresh bread",
    "repaired the fence",
    "waited for the train",
    "cleaned the kitchen",
    "watered the flowers",
    "looked for the keys",
    "carried a heavy box",
    "talked about the weather",
)
_WHEN = ("in the morning", "after lunch", "before dinner", "on Monday", "last week", "at noon", "in the rain", "again")


@dataclass(frozen=True)
class PeopleCodes:
    """Environment of the SmolLM2 recipe. Codes are whole numbers from 10 to 99, all different in a task."""

    seed: int = 0
    chunks: int = 2
    sentences: int = 5
    """Sentences per chunk."""
    distractors: int = 1
    """Codes of other people in the document."""

    def __post_init__(self) -> None:
        if not 0 <= self.distractors < min(len(_NAMES), self.chunks * self.sentences):
            raise RecipeError(
                "environment people_codes",
                f"{self.distractors} distractors do not fit",
                "use fewer distractors or more sentences",
            )

    def tasks(self, split: Split, count: int | None = None) -> Sequence[Task]:
        if count is None:
            raise RecipeError(
                f"environment.{split}_tasks: missing",
                "people_codes generates without end",
                f"say how many tasks, e.g. {split}_tasks: 48",
            )
        return [self._task(split, index) for index in range(count)]

    def _task(self, split: Split, index: int) -> Task:
        rng = seeded(self.seed, split, index)
        names = rng.sample(_NAMES, 1 + self.distractors)
        codes = rng.sample(range(10, 100), len(names))
        facts = [f"The code of {name} is {code}." for name, code in zip(names, codes, strict=True)]
        total = self.chunks * self.sentences
        slots = rng.sample(range(total), len(facts))
        at = dict(zip(slots, facts, strict=True))
        sentences = [at.get(slot) or self._filler(rng) for slot in range(total)]
        stream = tuple(" ".join(sentences[i : i + self.sentences]) for i in range(0, total, self.sentences))
        return Task(
            id=f"people_codes/{split}/{self.seed}/{index}",
            stream=stream,
            probes=(
                Probe(
                    question=f"What is the code of {names[0]}?",
                    answers=(str(codes[0]), facts[0]),
                    evidence=(Evidence(str(codes[0]), slots[0] // self.sentences),),
                ),
            ),
        )

    @staticmethod
    def _filler(rng: random.Random) -> str:
        return f"{rng.choice(_SUBJECTS)} {rng.choice(_ACTIONS)} {rng.choice(_WHEN)}."
