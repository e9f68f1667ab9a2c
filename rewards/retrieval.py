"""Rewards on what was looked up in the memory to answer, and on what the answer says it used.

An entry is relevant if it holds one of the question's evidence texts, as whole words after normalisation. The turn
that gave the answer counts (`Answer.turn`). Where that is not recorded, turns that read no chunk do: turns that write
look entries up to edit them. Where there are as many as questions, the n-th belongs to the n-th question; otherwise
each is compared with the evidence of all questions.

All are None where nothing was retrieved, which an empty memory also brings about: put an answer reward or
`memory.evidence_recall` beside them.
"""

from collections.abc import Callable

from memfactory import Episode, Retrieved, Score, Turn, reward
from memfactory.reward import matching

Value = float | Score


@reward(missing="drop")
def recall_at_k(episode: Episode, *, k: int = 5) -> Value:
    """|evidence texts in the first k entries| / |evidence texts|, in [0, 1]; mean over the questions.

    Source: Recall@K as RMM reports it (arXiv 2503.08026).
    Gaming: one entry that holds everything. Put `memory.within_budget` in front.
    """

    def recall(turn: Turn, facts: list[str]) -> float:
        distinct = {matching.normalise(fact) for fact in facts}
        return sum(bool(_relevant(turn.retrieved[:k], [fact])) for fact in distinct) / len(distinct)

    return _mean(episode, recall)


@reward(missing="drop")
def precision_at_k(episode: Episode, *, k: int = 5) -> Value:
    """|relevant among the first k entries| / |first k entries|, in [0, 1]; mean over the questions.

    Divided by the entries that were shown, not by k, so that a small memory is not punished. A second entry with the
    same text is not relevant.
    Gaming: show one sure entry. Put `recall_at_k` beside it.
    """

    def precision(turn: Turn, facts: list[str]) -> float:
        shown = turn.retrieved[:k]
        distinct = {matching.normalise(entry.text): entry for entry in shown}
        return len(_relevant(list(distinct.values()), facts)) / len(shown) if shown else 0.0

    return _mean(episode, precision)


@reward(missing="drop")
def citation(episode: Episode) -> Value:
    """F1 = 2 |cited & relevant| / (|cited| + |relevant|) over ids, in [0, 1]; mean over the questions.

    Ids never shown count as wrong. A question where nothing relevant was shown and nothing cited is left out.
    Source: citation precision, recall and F1 of RMM (arXiv 2503.08026).
    Gaming: answer without a look and cite what resembles the question. Put an answer reward beside it.
    """

    def f1(turn: Turn, facts: list[str]) -> float | None:
        cited, relevant = set(turn.cited), _relevant(turn.retrieved, facts)
        return 2 * len(cited & relevant) / (len(cited) + len(relevant)) if cited or relevant else None

    return _mean(episode, f1)


def _mean(episode: Episode, score: Callable[[Turn, list[str]], float | None]) -> Value:
    """Mean of `score` over the turns that answer and the evidence of their questions."""
    pairs = [(answer.turn, answer.probe) for answer in episode.answers]
    if pairs and all(place is not None for place, _ in pairs):
        turns = [episode.turns[place] for place, _ in pairs if place is not None]
        by_probe = [[evidence.text for evidence in probe.evidence] for _, probe in pairs]
    else:
        turns = [turn for turn in episode.turns if turn.chunk is None]
        by_probe = [[evidence.text for evidence in probe.evidence] for probe in episode.task.probes]
    if not any(turn.retrieved for turn in turns):
        return Score(None, "nothing was retrieved to answer")
    if len(turns) != len(by_probe):
        turns = [turn for turn in turns if turn.retrieved]
        by_probe = [[text for texts in by_probe for text in texts]] * len(turns)
    values = [score(turn, facts) for turn, facts in zip(turns, by_probe, strict=True) if facts]
    known = [value for value in values if value is not None]
    if not known:
        return Score(None, "nothing relevant was shown and nothing cited" if values else "the task names no evidence")
    return sum(known) / len(known)


def _relevant(entries: list[Retrieved], facts: list[str]) -> set[str]:
    """Ids of the entries that hold one of `facts`."""
    return {entry.id for entry in entries if matching.contains(entry.text, facts)}
