"""The quickstart's world: short documents of simple sentences that hide a few one-word facts.

A document has `chunks` chunks of `sentences` sentences. Four of its words are facts, each from a
category of its own; the question asks for two of them, the other two distract. Everything else is
filler. The vocabulary has about 220 words, so a model of 0.1 M parameters can learn it.

Train and test documents come from generators seeded with (seed, split, index), so a task is the same
whoever asks for it and the splits share no seed. They share their vocabulary: "held out" here means
fresh random documents, not new words.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memfactory.environments.base import Split
from memfactory.episode import Evidence, Probe, Task
from memfactory.errors import RecipeError

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": ("dog", "cat", "horse", "fox", "owl", "crow", "toad", "goat", "wolf", "hare"),
    "fruit": ("apple", "pear", "plum", "fig", "lime", "peach", "grape", "melon", "mango", "quince"),
    "city": ("paris", "rome", "cairo", "lima", "oslo", "quito", "delhi", "kyiv", "tunis", "perth"),
    "tool": ("hammer", "saw", "drill", "file", "wrench", "chisel", "pliers", "axe", "spade", "rake"),
    "drink": ("tea", "coffee", "milk", "cider", "juice", "cocoa", "water", "beer", "wine", "soda"),
    "metal": ("iron", "gold", "tin", "zinc", "lead", "copper", "silver", "nickel", "cobalt", "brass"),
}
_ADJECTIVES = tuple(
    "old new big small red blue green quiet loud warm cold bright dark soft hard round flat tall short clean "
    "dusty heavy light plain".split()
)
_NOUNS = tuple(
    "house river table window garden street bridge tower forest market school station field mountain lake road "
    "wall door chair lamp book letter box basket wheel boat train clock mirror carpet".split()
)
_VERBS = tuple(
    "stood lay waited rested moved turned stayed slept fell rolled leaned sat hung shone faded grew dropped "
    "rose sank passed".split()
)
_PREPOSITIONS = tuple("near behind under over beside inside above below across around".split())
_FUNCTION_WORDS = (
    "the",
    ".",
    "?",
    ":",
    "which",
    "and",
    "question",
    "memory",
    "section",
    "write",
    "answer",
    "none",
)


@dataclass(frozen=True)
class FactWords:
    """Environment of the quickstart.

    Chunks look like ``the old dog stood near the wall .``, the question like
    ``which animal and which fruit ?``, the gold answer like ``animal dog fruit apple``.
    """

    seed: int = 0
    chunks: int = 4
    """Chunks per document."""
    sentences: int = 3
    """Sentences per chunk, eight words each."""
    targets: int = 2
    """Facts the question asks for."""
    distractors: int = 2
    """Facts of other categories that it does not ask for."""
    forget: float = 0.7
    """Chance that the warm-up teacher drops everything it had noted when it reads the next chunk."""

    def __post_init__(self) -> None:
        facts = self.targets + self.distractors
        if not 1 <= self.targets <= facts <= min(len(CATEGORIES), self.chunks * self.sentences):
            raise RecipeError(
                "environment fact_words",
                f"{self.targets} targets and {self.distractors} distractors do not fit",
                f"together they need at most {len(CATEGORIES)} categories and one sentence each",
            )

    def tasks(self, split: Split, count: int | None = None) -> Sequence[Task]:
        if count is None:
            raise RecipeError(
                f"environment.{split}_tasks: missing",
                "fact_words generates without end",
                f"say how many tasks, e.g. {split}_tasks: 256",
            )
        return [self._task(split, index) for index in range(count)]

    def _task(self, split: Split, index: int) -> Task:
        rng = seeded(self.seed, split, index)
        categories = rng.sample(sorted(CATEGORIES), self.targets + self.distractors)
        words = {category: rng.choice(CATEGORIES[category]) for category in categories}
        slots = rng.sample(range(self.chunks * self.sentences), len(categories))
        at = dict(zip(slots, categories, strict=True))
        total = self.chunks * self.sentences
        sentences = [self._sentence(rng, words[at[slot]] if slot in at else None) for slot in range(total)]
        stream = tuple(
            " ".join(sentences[start : start + self.sentences]) for start in range(0, len(sentences), self.sentences)
        )
        asked = categories[: self.targets]
        chunk_of = {category: slot // self.sentences for slot, category in at.items()}
        return Task(
            id=f"fact_words/{split}/{self.seed}/{index}",
            stream=stream,
            probes=(
                Probe(
                    question=" and ".join(f"which {category}" for category in asked) + " ?",
                    answers=(" ".join(f"{category} {words[category]}" for category in asked),),
                    evidence=tuple(Evidence(words[category], chunk_of[category]) for category in asked),
                ),
            ),
            metadata={"asked": asked, "facts": words, "chunk_of": chunk_of},
        )

    @staticmethod
    def _sentence(rng: random.Random, fact: str | None) -> str:
        subject = fact if fact is not None else rng.choice(_NOUNS)
        return (
            f"the {rng.choice(_ADJECTIVES)} {subject} {rng.choice(_VERBS)} {rng.choice(_PREPOSITIONS)} "
            f"the {rng.choice(_NOUNS)} ."
        )

    def vocabulary(self) -> list[str]:
        """Every word a task, a prompt of the ``words`` set or an answer can hold, in a fixed order."""
        facts = [word for category, words in CATEGORIES.items() for word in (category, *words)]
        return list(dict.fromkeys([*_FUNCTION_WORDS, *facts, *_ADJECTIVES, *_NOUNS, *_VERBS, *_PREPOSITIONS]))

    def teacher(self, task: Task, seed: int) -> Iterator[str]:
        """What a forgetful teacher writes on `task`, turn by turn: one memory per chunk, then the answer.

        It notes every asked fact it reads, and drops all older notes with chance `forget` at every chunk.
        """
        rng = seeded(self.seed, "teacher", seed)
        asked, words, chunk_of = (task.metadata[key] for key in ("asked", "facts", "chunk_of"))
        noted: set[str] = set()
        for chunk in range(len(task.stream)):
            if rng.random() < self.forget:
                noted.clear()
            noted |= {category for category in asked if chunk_of[category] == chunk}
            kept = [f"{category} {words[category]}" for category in asked if category in noted]
            yield " . ".join(kept) or "none"
        yield " ".join(f"{category} {words[category] if category in noted else 'none'}" for category in asked)


def seeded(*parts: object) -> random.Random:
    """A generator determined by `parts`, the same in every process and Python version."""
    return random.Random(hashlib.sha256("/".join(map(str, parts)).encode()).digest())
