"""Credit: from rewards of episodes to an advantage per turn, before any row exists.

Group statistics are over episodes. An episode of four turns counts once, exactly like one of two, so
splitting work into more turns changes nobody's baseline.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from memfactory.episode import Episode

_EPSILON = 1e-4
"""Added to the standard deviation, as in TRL 1.16."""


class GroupState(StrEnum):
    """What a group can teach, and if nothing, why."""

    SIGNAL = "signal"
    SOLVED = "solved"
    """All episodes reached the best reward seen in the batch."""
    FAILED = "failed"
    """All episodes got the worst reward seen in the batch."""
    TIED = "tied"
    """All equal, somewhere in between."""
    UNMEASURED = "unmeasured"
    """Fewer than two episodes could be scored."""


@dataclass(slots=True)
class Advantages:
    """Result of :func:`group_advantages`."""

    values: list[float]
    """Advantage per episode; 0 where the reward is None or the group has no spread."""
    groups: dict[str, GroupState]

    def share(self, *states: GroupState) -> float:
        """Share of groups in any of `states`."""
        return sum(state in states for state in self.groups.values()) / max(len(self.groups), 1)

    @property
    def dead_share(self) -> float:
        """Share of groups that carry no signal."""
        return 1 - self.share(GroupState.SIGNAL)


def group_advantages(rewards: Sequence[float | None], groups: Sequence[str], scale: str = "group") -> Advantages:
    """Advantage of each episode against the other episodes of its group.

    Args:
        rewards: one per episode, None where it could not be measured.
        groups: group key of each episode.
        scale: TRL's `scale_rewards`. ``group``: A = (r - mean) / (std + 1e-4) with the group's mean and
            Bessel-corrected std (GRPO, arXiv 2402.03300, eq. 3). ``none``: A = r - mean (MemAgent; Dr. GRPO,
            arXiv 2503.20783). ``batch``: centred per group, divided by the std over the batch.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    measured = [reward for reward in rewards if reward is not None]
    best, worst = max(measured, default=0.0), min(measured, default=0.0)
    batch_std = _std(measured)

    values = [0.0] * len(rewards)
    states: dict[str, GroupState] = {}
    for group, indices in members.items():
        scored = [(index, reward) for index in indices if (reward := rewards[index]) is not None]
        if len(scored) < 2:
            states[group] = GroupState.UNMEASURED
            continue
        own = [reward for _, reward in scored]
        if max(own) - min(own) <= 1e-9 * max(1.0, abs(best), abs(worst)):
            states[group] = (
                GroupState.TIED
                if not (own[0] == best or own[0] == worst)
                else GroupState.SOLVED
                if own[0] == best and own[0] > 0
                else GroupState.FAILED
            )
            continue
        states[group] = GroupState.SIGNAL
        mean = math.fsum(own) / len(own)
        divisor = {"none": 1.0, "group": _std(own) + _EPSILON, "batch": batch_std + _EPSILON}[scale]
        for index, reward in scored:
            values[index] = (reward - mean) / divisor
    return Advantages(values, states)


def _std(values: Sequence[float]) -> float:
    """Bessel-corrected standard deviation; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def shuffle_within_groups(episodes: Sequence[Episode], seed: int) -> None:
    """Control experiment: permute the rewards inside each group, so they say nothing about the episode."""
    members: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        members[episode.group].append(episode)
    for group, own in members.items():
        rewards = [episode.reward for episode in own]
        random.Random(f"{seed}/{group}").shuffle(rewards)
        for episode, reward in zip(own, rewards, strict=True):
            episode.reward = reward


def assign_credit(episodes: Sequence[Episode], advantages: Sequence[float], assigner: str = "broadcast") -> None:
    """Set the advantage of every episode and turn.

    ``broadcast`` copies the episode's advantage to each of its turns (MemAgent, arXiv 2507.02259, sec. 3).
    ``last_turn`` gives it to the last turn alone and marks the others as not trainable.
    """
    for episode, advantage in zip(episodes, advantages, strict=True):
        episode.advantage = advantage
        for turn in episode.turns:
            if assigner == "last_turn" and turn is not episode.turns[-1]:
                turn.advantage, turn.trainable = 0.0, False
            else:
                turn.advantage = advantage
