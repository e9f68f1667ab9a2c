"""Rewards on form: could the answer be read, did every turn end by itself."""

from memfactory import Episode, StopReason, reward


@reward
def answered(episode: Episode) -> float:
    """Share of questions with an extractable answer (a closed box where the recipe asks for one)."""
    return sum(a.text is not None for a in episode.answers) / len(episode.answers)


@reward
def stopped(episode: Episode) -> float:
    """Share of turns that ended by themselves and not at the token limit."""
    return sum(t.stop is StopReason.STOP for t in episode.turns) / len(episode.turns)
