"""Questions of HotpotQA over many documents: RULER-HQA, on which MemAgent is measured (arXiv 2507.02259).

Yang et al., EMNLP 2018 (arXiv 1809.09600). The data is CC BY-SA 4.0 and does not come with MemFactory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memfactory.environments.base import Split
from memfactory.environments.dialogue_files import gold_text, need, read_records
from memfactory.environments.fact_words import seeded
from memfactory.environments.rows import Row, collect, content_id
from memfactory.episode import Evidence, Probe, Task
from memfactory.errors import DataError, RecipeError

SOURCE = (
    "download hotpot_dev_distractor_v1.json of hotpotqa.github.io (licence CC BY-SA 4.0) "
    "and set environment.path to it"
)


@dataclass(frozen=True)
class HotpotQADocuments:
    """One task for each question: a document of `documents` numbered paragraphs, which an agent with ``chunk_tokens``
    cuts.

    The paragraphs that hold the answer come first, then those that the dataset gives as distractors of the question,
    then paragraphs of other questions, as many as are asked for; then all are shuffled. The published evaluation files
    of MemAgent were drawn in the same way with other random numbers, so documents differ from theirs.

    ``Probe.category`` is HotpotQA's `type` (bridge, comparison). Evidence are the supporting sentences.
    """

    path: str = ""
    """``hotpot_dev_distractor_v1.json``, or a file of the same form: `_id`, `question`, `answer`, `context`,
    `supporting_facts`."""
    documents: int = 50
    """Paragraphs in each task. MemAgent: 50, 100, ... 6400; about 140 tokens each."""
    seed: int = 4
    """Of draws and order; MemAgent's is 4, too."""

    def __post_init__(self) -> None:
        if self.documents < 2:
            raise RecipeError(
                f"environment.documents: {self.documents} are too few", "a question needs two", "50, for example"
            )

    def tasks(self, split: Split, count: int | None = None) -> Sequence[Task]:
        """The first `count` questions of the file.

        Raises:
            RecipeError: the training split was asked for; the file of a recipe is for measuring.
            DataError: the file is missing, rows are wrong, or there are not enough paragraphs.
        """
        if split is Split.TRAIN:
            raise RecipeError("environment hotpotqa", "it has no training split", "train on hotpotqa-memfactory-train")
        rows = list(read_records(self.path, "path", SOURCE))
        paragraphs: dict[str, str] = {}
        for where, row in rows:
            if not isinstance(row, DataError):
                paragraphs |= _paragraphs(where, row)
        titles = sorted(paragraphs)
        if len(titles) < self.documents:
            raise DataError(
                self.path, f"{len(titles)} paragraphs are fewer than environment.documents", "ask for fewer documents"
            )

        def task(where: str, row: Row) -> Task:
            return self._task(where, row, paragraphs, titles)

        return collect(rows[:count], task, self.path)

    def _task(self, where: str, row: Row, paragraphs: dict[str, str], titles: list[str]) -> Task:
        question, answer = need(where, row, "question", str), gold_text(where, row.get("answer"))
        own = _paragraphs(where, row)
        facts = need(where, row, "supporting_facts", list, "each fact is [title, number of the sentence]")
        gold = list(dict.fromkeys(str(title) for title, _ in facts))
        lost = [title for title in gold if title not in own]
        if lost:
            raise DataError(where, f"the supporting paragraph '{lost[0]}' is not in its context", "check the row")
        random = seeded("hotpotqa", self.seed, row.get("_id", question))
        distractors = [title for title in own if title not in gold]
        random.shuffle(distractors)
        chosen = (gold + distractors)[: max(self.documents, len(gold))]
        taken = set(chosen)
        while len(chosen) < self.documents:
            title = titles[random.randrange(len(titles))]
            if title not in taken:
                taken.add(title)
                chosen.append(title)
        random.shuffle(chosen)
        texts = own | {title: paragraphs[title] for title in chosen if title not in own}
        document = "\n\n".join(f"Document {n}:\n{title}\n{texts[title]}" for n, title in enumerate(chosen, 1))
        sentences = {str(title): list(lines) for title, lines in row["context"]}
        evidence = [
            Evidence(text, 0)
            for title, number in facts
            if isinstance(number, int)
            and number < len(sentences[title])  # a few facts of the published file name no sentence
            and (text := str(sentences[title][number]).strip())
        ]
        return Task(
            content_id((document,), question),
            (document,),
            (Probe(question, (answer,), tuple(evidence), str(row.get("type", ""))),),
            {"source": where, "match": "any", "columns": {"_id": str(row.get("_id"))}, "titles": gold},
        )


def _paragraphs(where: str, row: Row) -> dict[str, str]:
    """Text by title of the paragraphs that stand in the row.

    Raises:
        DataError: its `context` is no list of [title, sentences].
    """
    context: Any = need(where, row, "context", list, "it must be a list of [title, [sentence, ...]]")
    try:
        return {str(title): "".join(sentences).strip() for title, sentences in context}
    except (TypeError, ValueError) as error:
        raise DataError(
            where, "`context` is no list of [title, [sentence, ...]]", "use the distractor file"
        ) from error
