"""Rewards on length, in tokens of the policy (in words where a record holds no tokens)."""

from memfactory import Episode, Score, reward
from memfactory.reward import matching

Value = float | Score


@reward(scope="group", low=-1.0, high=0.0, role="bonus")
def group_relative(
    episodes: list[Episode], *, p_max: float = 0.5, tau_share: float = 0.5, correct: str = "answer.exact_match"
) -> list[Value]:
    """-p_max * clip((L_ref - L) / (tau_share * L_ref), 0, 1) for an incorrect episode, else 0; in [-1, 0].

    L is the length of the episode's turns, L_ref its mean over the correct episodes of the group; without any, all get
    0. Correct is a full score (1) of the dimension `correct`, which the recipe lists before this one;
    `answer.exact_match` needs not be listed. `p_max` is at most 1. Aggregators that multiply want `transform: unit`.

    Source: the length term of HARMO (arXiv 2510.05283, eq. 3), relative to correct samples so that short wrong answers
    do not pay; its exact curve is not published, this one is ours.
    Gaming: wrong answers at the length of right ones cost nothing, so it needs a reward on the answer beside it.
    """
    right = [_is_correct(episode, correct) for episode in episodes]
    sizes = [_length(episode) for episode in episodes]
    reference = [size for size, ok in zip(sizes, right, strict=True) if ok]
    mean = sum(reference) / len(reference) if reference else 0.0
    values: list[Value] = []
    for size, ok in zip(sizes, right, strict=True):
        if ok is None:
            values.append(Score(None, f"'{correct}' was not measured"))
        else:
            values.append(0.0 if ok or size >= mean else -p_max * _ramp(mean - size, tau_share * mean))
    return values


@reward
def within(episode: Episode, *, limit: int = 1024, margin: int = 256) -> Value:
    """Mean over turns of clip((limit - L) / margin, 0, 1), in [0, 1], with L the length of the turn.

    1 up to limit - margin, then linear to 0 at `limit`. Source: soft overlong punishment of DAPO (arXiv 2503.14476,
    eq. 13), raised by 1; limit and margin are its L_max and L_cache.
    Gaming: say nothing. Keep the weight small beside a reward on the answer, or make it a gate.
    """
    if not episode.turns:
        return Score(None, "the episode has no turn")
    sizes = _sizes(episode)
    return sum(_ramp(limit - size, margin) for size in sizes) / len(sizes)


def _ramp(left: float, margin: float) -> float:
    """left / margin, clipped to [0, 1]; a step at 0 without a margin."""
    return min(1.0, max(0.0, left / margin)) if margin > 0 else float(left >= 0)


def _is_correct(episode: Episode, correct: str) -> bool | None:
    if correct in episode.scores:
        value = episode.scores[correct].value
        return None if value is None else value >= 1.0
    if correct != "answer.exact_match":
        return None
    answers = episode.answers
    return bool(answers) and all(a.text is not None and matching.exact_match(a.text, a.probe.answers) for a in answers)


def _length(episode: Episode) -> int:
    return sum(_sizes(episode))


def _sizes(episode: Episode) -> list[int]:
    if any(turn.completion_ids for turn in episode.turns):
        return [len(turn.completion_ids) for turn in episode.turns]
    return [len(turn.text.split()) for turn in episode.turns]
