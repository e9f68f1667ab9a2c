"""What a generation batch came to, for the log: numbers over the episodes of all ranks, and some episodes whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from memfactory.episode import Episode, StopReason
from memfactory.reward import statistics
from memfactory.reward.advantage import GroupState
from memfactory.reward.system import Assessment
from memfactory.runs import RunFolder
from memfactory.train.ranks import Ranks


def rollout_metrics(
    episodes: Sequence[Episode], assessment: Assessment, ranks: Ranks, generations: int
) -> dict[str, float]:
    """Numbers over all ranks, by name; every rank must call it.

    Args:
        episodes: of this rank.
        assessment: of the episodes of all ranks.
        generations: episodes in one group.
    """

    def mean(values: Sequence[float]) -> float:
        count = ranks.sum(len(values))
        return ranks.sum(math.fsum(values)) / count if count else float("nan")

    rewards = assessment.rewards[np.isfinite(assessment.rewards)]
    turns = [turn for episode in episodes for turn in episode.turns]
    share = statistics.same_state_share(list(episodes))
    metrics: dict[str, float] = {
        "reward": float(rewards.mean()) if rewards.size else float("nan"),
        "reward_std": float(rewards.std(ddof=1)) if rewards.size > 1 else 0.0,
        **assessment.metrics,
        "turns/per_episode": mean([len(episode.turns) for episode in episodes]),
        "stop/length_share": mean([turn.stop is StopReason.LENGTH for turn in turns]),
        "turns/unusable_share": mean([bool(turn.error) for turn in turns]),
        "completions/mean_length": mean([len(turn.completion_ids) for turn in turns]),
        "groups/same_state_share": mean([] if share is None else [share]),
        "tokens/generated": ranks.sum(sum(len(turn.completion_ids) for turn in turns)),
        "episodes/count": len(assessment.rewards),
        "episodes/failed": assessment.failed,
    }
    advantages = assessment.advantages
    if generations > 1:  # one episode alone is compared with nothing, and nothing is wrong with that
        metrics["groups/count"] = len(advantages.states)
        metrics["groups/dead_share"] = advantages.dead_share
        for state in (GroupState.SOLVED, GroupState.FAILED, GroupState.TIED, GroupState.UNMEASURED):
            metrics[f"groups/{state}_share"] = advantages.share(state)
        metrics["frac_reward_zero_std"] = advantages.dead_share
    return metrics


def over_ranks(measured: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """What all ranks measured of the servers (:meth:`VLLMPolicy.metrics`); every rank must call it.

    Counts are summed. The largest `canary_difference` and `taken_out` are told: all ranks ask the same servers. Means
    and rates are weighted by the requests of each rank.
    """
    every = ranks.gather([dict(measured)])
    told: dict[str, float] = {}
    for name in dict.fromkeys(name for own in every for name in own):
        values = [(own[name], own.get("requests", 0.0)) for own in every if name in own]
        if name in ("canary_difference", "taken_out"):
            told[name] = max(value for value, _ in values)
        elif name in ("latency", "wait") or name.endswith("_rate"):
            weights = sum(weight for _, weight in values)
            told[name] = (
                math.fsum(value * weight for value, weight in values) / weights
                if weights
                else math.fsum(value for value, _ in values) / len(values)
            )
        else:
            told[name] = math.fsum(value for value, _ in values)
    return told


def log_rollout(
    run: RunFolder, ranks: Ranks, step: int, episodes: Sequence[Episode], assessment: Assessment, count: int
) -> None:
    """Write the batch that update `step` is made from to the run folder: the first `count` episodes, those on which
    judges and rules disagree most, and what each reward dimension did. Every rank must call it; the first writes."""
    wanted = {item["episode"] for item in assessment.record["disagreements"]} if count else set()
    shown, others = episodes[:count], [episode for episode in episodes[count:] if episode.id in wanted]
    if ranks.count > 1:  # the widest disagreements can be on any rank
        mine = {episode.id for episode in shown} if ranks.main else set()
        found = ranks.gather([episode for episode in episodes if episode.id in wanted - mine])
        others = [episode for episode in found if episode.id not in {own.id for own in shown}]
    if ranks.main:
        run.log_episodes(step, "train", [*shown, *others])
        run.log_rewards(step, assessment.record)
