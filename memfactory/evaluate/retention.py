"""Does the memory take a fact in, and does it keep it? Two numbers behind the accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from memfactory.episode import Episode
from memfactory.reward.matching import contains


def capture_and_retention(episodes: Sequence[Episode]) -> tuple[float | None, float | None]:
    """Capture and retention over all facts (`Probe.evidence`) of `episodes`.

    Capture is the share of facts that stand in the memory right after their own chunk was read. Retention
    is P(fact in memory after the next chunk | it was there before), over all later chunks.

    Episodes whose chunks are not those of the task's stream are left out: the evidence does not say
    where their facts are.

    Returns:
        (capture, retention), each None where nothing could be counted.
    """
    captured = facts = kept = chances = 0
    for episode in episodes:
        last = {turn.chunk: turn for turn in episode.turns if turn.chunk is not None}  # the last turn on each chunk
        if sorted(last) != list(range(len(episode.task.stream))):
            continue
        writes = [last[chunk] for chunk in sorted(last)]
        for evidence in (e for probe in episode.task.probes for e in probe.evidence):
            held = [contains(turn.memory_after, [evidence.text]) for turn in writes]
            first = max(evidence.chunk, 0)  # before 0: it stands in the memory that the task begins with
            if evidence.chunk >= 0:
                facts += 1
                captured += held[first]
            for before, after in zip(held[first:], held[first + 1 :], strict=False):
                chances += before
                kept += before and after
    return captured / facts if facts else None, kept / chances if chances else None
