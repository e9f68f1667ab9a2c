"""Rewards on the memory itself: what it holds, and how well it is kept.

Those that look at form alone are best on a memory that says nothing. They give an empty memory 0 where they can; a
word is not empty, so put `memory.evidence_recall` or an answer reward beside them, or a gate in front.
"""

import re
from collections import Counter

from memfactory import Episode, Score, Turn, reward
from memfactory.modules import WRITERS
from memfactory.reward import matching

Value = float | Score
_ENTRY_END = re.compile(r"\n|[.;!?](?:\s|$)")


@reward(missing="drop")
def evidence_recall(episode: Episode) -> Value:
    """|evidence in the final memory| / |evidence|, in [0, 1]; None for a task that names no evidence.

    Distinct texts of all questions' `Probe.evidence`, each as whole words after normalisation.
    Source: the coverage side of Mem-alpha's reward (arXiv 2509.25911), with gold evidence in place of questions.
    Gaming: copy everything. Put `within_budget` in front; where evidence is one short word, a list of likely words
    also works, and `grounding.supported` is the gate.
    """
    return _or_none(_held(episode, episode.memory))


@reward(scope="turn", role="shaping", missing="drop")
def evidence_held(episode: Episode, turn: Turn) -> Value:
    """Potential Phi = |evidence in the memory after this turn| / |evidence|, in [0, 1]; None for a task without.

    Counts evidence of chunks still to come, so that Phi rises when a fact is taken in and falls when it is lost.
    Source: potential-based shaping (Ng et al., ICML 1999), which credit applies as differences.
    Gaming: none in the long run, because potentials do not change what is best; noise where evidence is one word.
    """
    return _or_none(_held(episode, turn.memory_after))


@reward
def compression(episode: Episode) -> Value:
    """1 - words of the final memory / words of the stream, clipped to [0, 1]; 0 for an empty memory.

    Source: Mem-alpha (arXiv 2509.25911), with weight .05 in its scripts.
    Gaming: a memory of one word gets nearly 1. Keep the weight small, or use `within_budget` as a gate, and put
    `evidence_recall` or an answer reward beside it.
    """
    read = sum(len(chunk.split()) for chunk in episode.task.stream)
    kept = len(episode.memory.split())
    if not read:
        return Score(None, "the task has nothing to read")
    return max(0.0, 1 - kept / read) if kept else 0.0


@reward
def redundancy(episode: Episode, *, n: int = 3) -> float:
    """Freedom from repetition, in [0, 1]; 1 repeats nothing, 0 for an empty memory.

    The smaller of distinct n-grams / n-grams over words and distinct entries / entries, where an entry is a line or a
    sentence: n-grams find repetition inside long notes, entries that of short ones. Fewer than `n` words are counted
    one by one. Source: distinct-n (arXiv 1510.03055).
    Gaming: short or reworded notes repeat little. Put `evidence_recall` or an answer reward beside it.
    """
    entries = [entry for entry in map(matching.normalise, _ENTRY_END.split(episode.memory)) if entry]
    words = matching.normalise(episode.memory).split()
    shares = matching.distinct_ngrams(words, n), matching.distinct_ngrams(entries, 1)
    return min(share or 0.0 for share in shares)


@reward(role="gate")
def within_budget(episode: Episode, *, words: int = 200, tokens: int | None = None) -> Value:
    """1 while the memory has at most `words` words, then linear to 0 at twice as many, in [0, 1].

    The largest memory of the episode counts, so that an overflow on the way is not forgiven. With `tokens`, the limit
    is on the completions of turns that read chunks, in tokens of the policy; None where the record holds no tokens.
    Gaming: an empty memory is within every budget, so this is a gate and no objective.
    """
    if tokens is None:
        texts = [episode.memory, *(turn.memory_after for turn in episode.turns)]
        return _ramp(max(len(text.split()) for text in texts), words)
    sizes = [len(turn.completion_ids) for turn in episode.turns if turn.chunk is not None]
    return _ramp(max(sizes), tokens) if any(sizes) else Score(None, "no tokens of turns that read chunks are recorded")


@reward(module=WRITERS)
def churn(episode: Episode, turn: Turn) -> float:
    """Stability of one rewrite, |before & after| / |before | after| over word multisets (Jaccard), in [0, 1].

    1: nothing changed; 0: nothing stayed. The first note counts as stable (1); a turn that leaves nothing is 0.
    For the turns of modules that write memory, and on those turns alone.
    Gaming: never change the first note. It also punishes corrections: keep the weight small, put `evidence_recall` or
    an answer reward beside it, and prefer `evidence_held` where tasks name evidence.
    """
    before, after = (Counter(matching.normalise(text).split()) for text in (turn.memory_before, turn.memory_after))
    if not before or not after:
        return float(bool(after))
    return (before & after).total() / (before | after).total()


def _held(episode: Episode, memory: str) -> float | None:
    return matching.share_held(memory, (e.text for probe in episode.task.probes for e in probe.evidence))


def _or_none(share: float | None) -> Value:
    return Score(None, "the task names no evidence") if share is None else share


def _ramp(size: int, limit: int) -> float:
    """1 up to `limit`, 0 from twice `limit` on, linear between."""
    return min(1.0, max(0.0, 2 - size / limit)) if limit > 0 else float(size <= 0)
