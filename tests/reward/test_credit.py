"""Credit: statistics over episodes, whatever the number of their turns; checked against numpy, TRL and a toy."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from memfactory.episode import Episode, StopReason, Task, Turn
from memfactory.recipe import CreditSection
from memfactory.reward.advantage import GroupState, group_advantages, shuffled
from memfactory.reward.aggregate import WeightedSum
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.dimension import RewardDimension
from memfactory.reward.system import RewardSystem
from memfactory.reward.table import codes
from memfactory.train.rows import build_rows

TASK = Task("t", (), ())
OURS = {"group": "standardized", "none": "centered", "batch": "batch"}
"""TRL's `scale_rewards` and what we call it."""
scales = st.sampled_from(list(OURS))


def episode(turns, reward, group="g"):
    made = [Turn("write", [number], [7], [-1.0], "", StopReason.STOP) for number in range(turns)]
    return Episode(TASK, made, group=group, reward=reward)


def credit(episodes, scale="group", assigner="broadcast", seed=0, **options):
    """Credit for the rewards the episodes have, by way of one dimension that repeats them."""
    given = {id(e): e.reward for e in episodes}
    repeat = RewardDimension("given", lambda e: given[id(e)], -math.inf, math.inf)
    section = CreditSection(assigner=assigner, **options)
    system = RewardSystem([WeightedDimension("given", repeat)], WeightedSum(), section)
    system.begin().finish(episodes)
    return system.assess(episodes, scale_rewards=scale, seed=seed)


# ---- one episode counts once -------------------------------------------------------------------


def test_statistics_are_over_episodes_not_turns():
    """Rewards [1, 0, 0, 0] with 4, 1, 1, 1 calls: A = [1.5, -.5, -.5, -.5], not what seven flat rows give."""
    episodes = [episode(calls, reward) for calls, reward in zip([4, 1, 1, 1], [1.0, 0.0, 0.0, 0.0], strict=True)]
    credit(episodes)
    std = 0.5  # of [1, 0, 0, 0], Bessel-corrected
    exact = [0.75 / (std + 1e-4)] + [-0.25 / (std + 1e-4)] * 3
    assert [e.advantage for e in episodes] == pytest.approx(exact, rel=1e-12)
    assert [e.advantage for e in episodes] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=4e-4)
    flat = np.array([1.0] * 4 + [0.0] * 3)
    flattened = (flat - flat.mean()) / flat.std(ddof=1)
    assert flattened[[0, -1]] == pytest.approx([0.80, -1.07], abs=5e-3)  # the bug, as published
    for e in episodes:
        assert {turn.advantage for turn in e.turns} == {e.advantage}
        assert e.advantage not in flattened
    assert [a for row in build_rows(episodes) for a in row.advantages] == [episodes[0].advantage] * 4 + [
        e.advantage for e in episodes[1:]
    ]


def test_last_turn_trains_the_last_turn_alone():
    episodes = [episode(3, 1.0), episode(2, 0.0)]
    credit(episodes, assigner="last_turn")
    for e in episodes:
        assert [turn.trainable for turn in e.turns] == [False] * (len(e.turns) - 1) + [True]
        assert [turn.advantage for turn in e.turns] == [0.0] * (len(e.turns) - 1) + [e.advantage]
    assert [sum(row.trained) for row in build_rows(episodes)] == [1, 1]


# ---- against numpy and TRL ---------------------------------------------------------------------

ESTIMATORS = ("standardized", "centered", "rloo", "batch", "none")
rewards_of_groups = st.lists(
    st.lists(st.one_of(st.none(), st.floats(-10, 10).map(lambda x: round(x, 3))), min_size=4, max_size=4),
    min_size=1,
    max_size=6,
)


def flat(groups):
    return [r for group in groups for r in group], [f"g{i}" for i, group in enumerate(groups) for _ in group]


@given(rewards_of_groups, st.sampled_from(ESTIMATORS), st.randoms(use_true_random=False))
def test_advantages_equal_numpy_in_any_order(groups, estimator, order):
    rewards, names = flat(groups)
    everything = [r for r in rewards if r is not None]
    expected = []
    for group in groups:
        own = np.array([r for r in group if r is not None])
        usable = len(own) >= 2 and np.ptp(own) > 0
        for reward in group:
            if reward is None or not usable:
                expected.append(reward or 0.0 if estimator == "none" else 0.0)
                continue
            if estimator == "rloo":
                expected.append(reward - (own.sum() - reward) / (len(own) - 1))
                continue
            divisor = {
                "centered": 1.0,
                "standardized": own.std(ddof=1) + 1e-4,
                "batch": np.std(everything, ddof=1) + 1e-4,
            }
            expected.append(reward if estimator == "none" else (reward - own.mean()) / divisor[estimator])
    assert group_advantages(rewards, names, estimator).values == pytest.approx(expected, rel=1e-9, abs=1e-9)

    places = list(range(len(rewards)))
    order.shuffle(places)  # groups need not stand together
    mixed = group_advantages([rewards[i] for i in places], [names[i] for i in places], estimator)
    assert mixed.values == pytest.approx([expected[i] for i in places], rel=1e-9, abs=1e-9)


@given(rewards_of_groups, scales)
def test_advantages_equal_trl(groups, scale):
    """TRL 1.16 `_generate_and_score_completions`, sum_then_normalize, NaN for None."""
    assume(all(sum(r is not None for r in group) != 1 for group in groups))  # TRL's std of one value is NaN
    values = torch.tensor([[math.nan if r is None else r for r in group] for group in groups], dtype=torch.float64)
    advantages = values - torch.nanmean(values, dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (nanstd(values, dim=1)[:, None] + 1e-4)
    elif scale == "batch":
        advantages = advantages / (nanstd(values.flatten()) + 1e-4)
    expected = torch.nan_to_num(advantages, nan=0.0).flatten().tolist()
    assert group_advantages(*flat(groups), OURS[scale]).values == pytest.approx(expected, abs=1e-6)


@given(rewards_of_groups, st.floats(-100, 100), scales)
def test_adding_a_constant_to_every_reward_changes_nothing(groups, constant, scale):
    rewards, names = flat(groups)
    shifted = [None if r is None else r + constant for r in rewards]
    before, after = (group_advantages(r, names, OURS[scale]) for r in (rewards, shifted))
    assert after.values == pytest.approx(before.values, abs=1e-6)
    assert after.dead_share == before.dead_share


@given(rewards_of_groups)
def test_advantages_of_a_group_sum_to_zero_and_none_gets_none(groups):
    for estimator in ("standardized", "centered", "rloo", "batch"):
        values = group_advantages(*flat(groups), estimator).values
        for i, group in enumerate(groups):
            own = values[4 * i : 4 * i + 4]
            assert math.fsum(own) == pytest.approx(0, abs=1e-6)
            assert all(value == 0 for value, reward in zip(own, group, strict=True) if reward is None)


def test_a_failed_measurement_is_not_a_zero():
    """[1, 1, None]: with the None as 0 the two good ones would be rewarded; without it there is nothing to learn."""
    advantages = group_advantages([1.0, 1.0, None], ["g"] * 3)
    assert advantages.values.tolist() == [0.0, 0.0, 0.0]
    assert group_advantages([1.0, 0.0, None], ["g"] * 3).values == pytest.approx(
        [*group_advantages([1.0, 0.0], ["g"] * 2).values, 0.0]
    )


# ---- groups without signal ---------------------------------------------------------------------


def test_states_of_groups():
    rewards = {
        "signal": [0.0, 1.0],
        "solved": [1.0, 1.0],
        "failed": [0.0, 0.0],
        "tied": [0.5, 0.5],
        "one measured": [0.7, None],
        "none measured": [None, None],
    }
    result = group_advantages([r for own in rewards.values() for r in own], [n for n in rewards for _ in range(2)])
    assert dict(zip(rewards, result.states, strict=True)) == {
        "signal": GroupState.SIGNAL,
        "solved": GroupState.SOLVED,
        "failed": GroupState.FAILED,
        "tied": GroupState.TIED,
        "one measured": GroupState.UNMEASURED,
        "none measured": GroupState.UNMEASURED,
    }
    assert result.dead_share == pytest.approx(5 / 6)
    assert result.share(GroupState.SOLVED, GroupState.FAILED) == pytest.approx(2 / 6)
    assert all(math.isfinite(value) for value in result.values)


def test_a_batch_of_zeros_failed_and_a_batch_of_ones_is_solved():
    assert group_advantages([0.0, 0.0], ["a", "a"]).states == [GroupState.FAILED]
    assert group_advantages([1.0, 1.0], ["a", "a"]).states == [GroupState.SOLVED]


def test_rounding_is_no_signal():
    """0.1 + 0.2 and 0.3 are the same reward; divided by a std of 1e-17 they would not be."""
    assert group_advantages([0.1 + 0.2, 0.3], ["g", "g"]).values.tolist() == [0.0, 0.0]


def test_no_episodes_at_all():
    nothing = group_advantages([], [])
    assert (nothing.values.tolist(), nothing.states) == ([], [])
    assert math.isfinite(nothing.dead_share)


# ---- the shuffled control ----------------------------------------------------------------------


@given(rewards_of_groups, st.integers(0, 2**62))
def test_shuffle_keeps_the_rewards_of_each_group(groups, seed):
    rewards, names = flat(groups)
    episodes = [episode(1, reward, name) for reward, name in zip(rewards, names, strict=True)]
    credit(episodes, seed=seed, shuffle_rewards=True)
    for name in set(names):
        before = Counter(r for r, n in zip(rewards, names, strict=True) if n == name)
        assert Counter(e.reward for e in episodes if e.group == name) == before
    again = [episode(1, reward, name) for reward, name in zip(rewards, names, strict=True)]
    credit(again, seed=seed, shuffle_rewards=True)
    assert [e.reward for e in again] == [e.reward for e in episodes]
    # what is learned from is what is shown
    expected = group_advantages([e.reward for e in episodes], names)
    assert [e.advantage for e in episodes] == expected.values.tolist()


def test_shuffled_rewards_say_nothing_about_the_episode():
    """Over 4000 seeds the best of eight episodes keeps its reward one time in eight."""
    rewards, groups = np.arange(8) == 7, codes(["g"] * 8)
    kept = sum(shuffled(rewards.astype(float), groups, seed)[7] == 1.0 for seed in range(4000))
    assert kept / 4000 == pytest.approx(1 / 8, abs=0.02)  # 3.8 standard errors


# ---- it learns ---------------------------------------------------------------------------------


class Recurrent:
    """Six chunks, one of them with the fact (one of eight); memory holds one symbol or none.

    Two policies that share nothing: `write` chooses what the memory becomes from (memory, chunk), `answer`
    chooses a fact from the memory. A right answer needs a writer that keeps the fact over up to five chunks
    of noise, so the reward of the last call must reach the first.
    """

    FACTS, CHUNKS = 8, 6

    def __init__(self, seed):
        self.random = random.Random(seed)
        states = self.FACTS + 1  # the last is "nothing": an empty memory, a chunk of noise
        self.write = torch.zeros(states, states, 2, requires_grad=True)  # keep the memory, or take the chunk
        self.answer = torch.zeros(states, self.FACTS, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.write, self.answer], lr=0.1)

    def episodes(self, groups, size):
        """Every turn records (state, choice) as prompt and completion ids."""
        write, answer = self.write.softmax(-1).tolist(), self.answer.softmax(-1).tolist()
        result = []
        for group in range(groups):
            fact, place = self.random.randrange(self.FACTS), self.random.randrange(self.CHUNKS)
            for _ in range(size):
                turns, memory = [], self.FACTS
                for number in range(self.CHUNKS):
                    chunk = fact if number == place else self.FACTS
                    take = int(self.random.random() < write[memory][chunk][1])
                    turns.append(Turn("write", [memory, chunk], [take], [0.0], "", StopReason.STOP))
                    memory = chunk if take else memory
                (choice,) = self.random.choices(range(self.FACTS), answer[memory])
                turns.append(Turn("answer", [memory], [choice], [0.0], "", StopReason.STOP))
                result.append(Episode(TASK, turns, group=f"g{group}", reward=float(choice == fact)))
        return result

    def step(self, assigner):
        episodes = self.episodes(groups=8, size=16)
        credit(episodes, "group", assigner)
        self.optimizer.zero_grad()
        for module, policy in (("write", self.write), ("answer", self.answer)):
            turns = [t for e in episodes for t in e.turns if t.module == module and t.trainable]
            if turns:
                taken = torch.tensor([[*turn.prompt_ids, *turn.completion_ids] for turn in turns])
                logp = policy.log_softmax(-1)[tuple(taken.T)]
                (-(torch.tensor([turn.advantage for turn in turns]) * logp).sum() / len(episodes)).backward()
        self.optimizer.step()

    def success(self):
        return sum(e.reward for e in self.episodes(groups=1000, size=1)) / 1000


@pytest.mark.parametrize("seed", range(3))
def test_broadcast_credit_teaches_the_writer_and_last_turn_credit_cannot(seed):
    toy = Recurrent(seed)
    assert toy.success() <= 0.35  # chance is 0.125
    for _ in range(100):
        toy.step("broadcast")
    assert toy.success() >= 0.95

    control = Recurrent(seed)
    for _ in range(100):
        control.step("last_turn")
    assert not control.write.any()  # never touched
    assert control.success() <= 0.35  # a random writer keeps the fact .164 of the time: .164 + .836 / 8 = .27
