"""Rewards on the final answer: exact match, containment, token F1."""

import re

from memfactory import Episode, reward
from memfactory.reward import matching


@reward
def exact_match(episode: Episode) -> float:
    """Share of questions whose extracted answer equals a gold alias (MemAgent's verifier, arXiv 2507.02259)."""
    return _mean(episode, lambda text, gold: float(matching.exact_match(text, gold)))


@reward
def containment(episode: Episode) -> float:
    """Share of questions whose answer holds a gold alias as whole words (sub-EM of RULER-HQA)."""
    return _mean(episode, lambda text, gold: float(matching.contains(text, gold)))


@reward
def token_f1(episode: Episode) -> float:
    """Mean word-overlap F1 with the best alias (the SQuAD convention)."""
    return _mean(episode, matching.token_f1)


@reward
def all_parts(episode: Episode) -> float:
    """Share of the required parts that the answer holds, in any order (several needles, frequent words).

    A task without `metadata["required"]` has one part: any of its aliases.
    """
    parts = episode.task.metadata.get("required")
    if parts is None:
        return _mean(episode, lambda text, gold: float(matching.contains(text, gold)))
    return _mean(episode, lambda text, gold: sum(matching.contains(text, [part]) for part in parts) / len(parts))


def _mean(episode, score):
    """Mean of `score` over the questions; an answer that could not be extracted scores 0."""
    values = [0.0 if a.text is None else score(a.text, a.probe.answers) for a in episode.answers]
    return sum(values) / len(values)


@reward
def number_match(episode: Episode) -> float:
    """Share of questions whose answer names the gold number and no other number."""
    return _mean(episode, lambda text, gold: float(set(re.findall(r"\d+", text)) == {gold[0]}))
