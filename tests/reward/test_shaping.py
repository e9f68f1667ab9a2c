"""Potentials: what they may change (the variance) and what they may not (what is best); exact over all episodes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.episode import Episode, Score, StopReason, Task, Turn
from memfactory.recipe import CreditSection
from memfactory.reward.advantage import group_advantages
from memfactory.reward.aggregate import WeightedSum
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.credit import CreditBatch, broadcast, turn_advantages
from memfactory.reward.dimension import RewardDimension, Role, Scope
from memfactory.reward.shaping import shaped_returns
from memfactory.reward.system import RewardSystem

potentials = st.lists(st.floats(0, 1), min_size=1, max_size=12)
discounts = st.floats(0.5, 1.0)


# ---- the formula -------------------------------------------------------------------------------


def test_hand_numbers():
    """Phi after the turns .5, .8, 1; outcome 1. With lambda 1: outcome minus the potential the turn began in."""
    assert shaped_returns(1.0, [0.5, 0.8, 1.0]) == pytest.approx([1.0, 0.5, 0.2])
    # lambda 0: each turn gets its own step; the last its outcome minus where it began
    assert shaped_returns(1.0, [0.5, 0.8, 1.0], lam=0.0) == pytest.approx([0.5, 0.3, 0.2])
    # gamma .9: delta = (.45, .72 - .5, 1 - .8)
    assert shaped_returns(1.0, [0.5, 0.8, 1.0], gamma=0.9, lam=0.0) == pytest.approx([0.45, 0.22, 0.2])
    assert shaped_returns(1.0, [0.5, 0.8, 1.0], gamma=0.9) == pytest.approx([0.81, 0.9 - 0.5, 1 - 0.8])
    assert shaped_returns(2.0, [0.7]) == pytest.approx([2.0])


@given(st.floats(-2, 2), potentials, discounts, st.floats(0, 1))
def test_it_is_the_sum_of_discounted_steps(outcome, after, gamma, lam):
    phi = [0.0, *after[:-1], 0.0]  # of the states turns begin in, and of the end
    last = len(after) - 1
    delta = [gamma * phi[t + 1] - phi[t] + (outcome if t == last else 0) for t in range(len(after))]
    expected = [
        math.fsum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(after))) for t in range(len(after))
    ]
    assert shaped_returns(outcome, after, gamma, lam) == pytest.approx(expected, abs=1e-12)


@given(potentials, discounts)
def test_the_terms_telescope(after, gamma):
    """sum_t gamma^t F_t = gamma^T Phi_T - Phi_0, for every part of an episode; over the whole it is 0."""
    terms = shaped_returns(0.0, after, gamma, lam=0.0)  # with lambda 0 each return is its own term F_t
    phi = [0.0, *after[:-1], 0.0]
    for end in range(1, len(after) + 1):
        total = math.fsum(gamma**t * terms[t] for t in range(end))
        assert total == pytest.approx(gamma**end * phi[end] - phi[0], abs=1e-12)


@given(st.floats(-2, 2), potentials)
def test_with_lambda_1_a_potential_is_only_a_baseline(outcome, after):
    assert shaped_returns(outcome, after) == pytest.approx(outcome - np.array([0.0, *after[:-1]]), abs=1e-12)


# ---- over whole episodes it changes nothing ----------------------------------------------------

REWARDS = [0.0, 1.0, 0.25, 0.5, 1.0, 0.0, 0.75, 0.0]
ENDS = [0.9, 0.1, 0.5, 0.7, 0.3, 0.8, 0.2, 0.6]


@given(st.lists(potentials, min_size=8, max_size=8))
def test_advantages_of_episodes_are_unchanged(after):
    plain = group_advantages(REWARDS, ["g"] * 8).values
    shaped = [shaped_returns(reward, own)[0] for reward, own in zip(REWARDS, after, strict=True)]
    assert group_advantages(shaped, ["g"] * 8).values == pytest.approx(plain, abs=1e-12)


def test_without_zero_at_the_end_they_would_change():
    plain = group_advantages(REWARDS, ["g"] * 8).values
    kept = [reward + end for reward, end in zip(REWARDS, ENDS, strict=True)]  # + gamma^T Phi_T - Phi_0
    assert np.abs(group_advantages(kept, ["g"] * 8).values - plain).max() > 0.5
    zeroed = [shaped_returns(reward, [0.4, end])[0] for reward, end in zip(REWARDS, ENDS, strict=True)]
    assert group_advantages(zeroed, ["g"] * 8).values == pytest.approx(plain, abs=1e-12)


# ---- per turn: exact enumeration ---------------------------------------------------------------

TURNS = 6
EPISODES = np.array(list(itertools.product([0, 1], repeat=TURNS)))  # all 64, equally likely under a fair policy
OUTCOME = (EPISODES.sum(axis=1) >= 4).astype(float)


def exact_potential():
    """(64, 6): the chance of success in the state after each turn."""
    result = np.zeros((64, TURNS))
    for t in range(TURNS):
        for prefix in itertools.product([0, 1], repeat=t + 1):
            own = (EPISODES[:, : t + 1] == prefix).all(axis=1)
            result[own, t] = OUTCOME[own].mean()
    return result


def noisy(seed):
    """The exact one, wrong by up to .2 in every state."""
    draw, result = np.random.default_rng(seed), exact_potential()
    for t in range(TURNS):
        for prefix in itertools.product([0, 1], repeat=t + 1):
            own = (EPISODES[:, : t + 1] == prefix).all(axis=1)
            result[own, t] += draw.uniform(-0.2, 0.2)
    return result


def gradients(potential, lam=1.0):
    """Of each turn's logit in each episode, (64, 6): the shipped credit times the score a - 1/2.

    All 64 episodes are one group, so what is subtracted are exact means.
    """
    flat = np.full(64 * TURNS, np.nan) if potential is None else potential.ravel()
    batch = CreditBatch(
        OUTCOME,
        OUTCOME - OUTCOME.mean(),
        np.ones(64),
        np.zeros(64, dtype=np.int64),
        np.repeat(np.arange(64), TURNS),
        ["write"] * (64 * TURNS),
        np.tile(np.arange(TURNS), 64),
        np.tile(np.arange(TURNS) == TURNS - 1, 64),
        np.full(64 * TURNS, np.nan),
        flat,
    )
    credit = turn_advantages(batch, CreditSection(lam=lam), "centered", broadcast, mixed=False)
    return credit.reshape(64, TURNS) * (EPISODES - 0.5)


def mean_and_variance(gradient):
    return gradient.mean(axis=0), float(gradient.var(axis=0).sum())


PLAIN, VARIANCE = mean_and_variance(gradients(None))


def test_the_plain_gradient():
    """Success is 22 of 64. A turn counts when the other five hold exactly three: 10 of 32, times 1/4."""
    assert OUTCOME.mean() == 22 / 64
    assert (PLAIN == 10 / 32 / 4).all()
    assert pytest.approx(TURNS * (22 / 64 * 42 / 64) / 4 - TURNS * (10 / 128) ** 2) == VARIANCE


def test_an_exact_potential_keeps_the_mean_and_lowers_the_variance():
    mean, variance = mean_and_variance(gradients(exact_potential()))
    assert mean == pytest.approx(PLAIN, abs=1e-15)
    assert (VARIANCE, variance) == pytest.approx((0.302, 0.200), abs=5e-4)


@pytest.mark.parametrize("seed", range(5))
def test_a_wrong_potential_keeps_the_mean_too(seed):
    mean, variance = mean_and_variance(gradients(noisy(seed)))
    assert mean == pytest.approx(PLAIN, abs=1e-15)
    exact = mean_and_variance(gradients(exact_potential()))[1]
    assert exact < variance < VARIANCE


def test_a_potential_that_means_nothing_still_keeps_the_mean():
    nonsense = np.random.default_rng(0).uniform(-5, 5, (64, TURNS))
    for t in range(TURNS):  # of the state: the same for all episodes that are in it
        for prefix in itertools.product([0, 1], repeat=t + 1):
            own = (EPISODES[:, : t + 1] == prefix).all(axis=1)
            nonsense[own, t] = nonsense[own, t][0]
    mean, variance = mean_and_variance(gradients(nonsense))
    assert mean == pytest.approx(PLAIN, abs=1e-14)
    assert variance > VARIANCE  # it costs variance and nothing else


def test_below_lambda_1_a_wrong_potential_biases_and_an_exact_one_does_not():
    def bias(potential, lam):
        return float(np.abs(mean_and_variance(gradients(potential, lam))[0] - PLAIN).max())

    for lam in (0.0, 0.5, 0.9):
        assert bias(exact_potential(), lam) < 1e-15
    for seed in range(5):
        steps = [bias(noisy(seed), lam) for lam in (0.0, 0.9, 1.0)]
        assert steps[0] > 0.01
        assert steps[0] > 3 * steps[1] > 0
        assert steps[2] < 1e-15
    variances = [mean_and_variance(gradients(exact_potential(), lam))[1] for lam in (0.0, 0.5, 0.9, 1.0)]
    assert variances == sorted(variances)  # what the bias is traded for


# ---- from the recipe to the turns --------------------------------------------------------------


def turn(module="write", potential=0.0):
    made = Turn(module, [1], [2], [-1.0], "", StopReason.STOP)
    made.memory_after = str(potential)
    return made


def episode(reward, turns, group="g"):
    return Episode(Task("t", (), ()), turns, id=str(reward), group=group, memory=str(reward))


def value(text):
    return Score(None, "no potential") if text == "None" else float(text)


OUTCOME_OF = WeightedDimension("outcome", RewardDimension("outcome", lambda e: value(e.memory)))


def potential(weight=1.0, module=None):
    made = RewardDimension(
        "phi",
        lambda e, t: value(t.memory_after),
        scope=Scope.MODULE if module else Scope.TURN,
        role=Role.SHAPING,
        modules=(module,) if module else (),
    )
    return WeightedDimension("phi", made, weight)


def assess(episodes, *dimensions, scale="none", **credit):
    system = RewardSystem([OUTCOME_OF, *dimensions], WeightedSum(), CreditSection(**credit))
    system.begin().finish(episodes)
    return system.assess(episodes, scale_rewards=scale)


def two_episodes():
    good = episode(1.0, [turn(potential=p) for p in (0.5, 0.8, 1.0)])
    bad = episode(0.0, [turn(potential=p) for p in (0.1, 0.4, 0.0)])
    return [good, bad]


def advantages_of(episodes):
    return [[t.advantage for t in e.turns] for e in episodes]


def test_hand_numbers_through_the_system():
    """Centred: +-.5, plus (S - mean of the slot) with S = -Phi before: (0, -.5, -.8) and (0, -.1, -.4)."""
    episodes = two_episodes()
    result = assess(episodes, potential())
    assert result.rewards.tolist() == [1.0, 0.0]  # a potential never enters the reward
    assert [e.advantage for e in episodes] == [0.5, -0.5]
    assert advantages_of(episodes)[0] == pytest.approx([0.5, 0.5 - 0.2, 0.5 - 0.2])
    assert advantages_of(episodes)[1] == pytest.approx([-0.5, -0.5 + 0.2, -0.5 + 0.2])


def test_weight_gamma_and_lambda_reach_it():
    episodes = two_episodes()
    assess(episodes, potential(weight=0.5), gamma=0.9, lam=0.0)
    # delta of good .9 * .25 = .225, .36 - .25, 1 - .4; of bad .045, .18 - .05, -.2; S = delta - outcome
    good = np.array([0.225 - 1, 0.11 - 1, 0.6 - 1])
    bad = np.array([0.045, 0.13, -0.2])
    mean = (good + bad) / 2
    assert advantages_of(episodes)[0] == pytest.approx((0.5 + good - mean).tolist())
    assert advantages_of(episodes)[1] == pytest.approx((-0.5 + bad - mean).tolist())


def test_it_is_divided_by_what_rewards_are_divided_by():
    plain, scaled = two_episodes(), two_episodes()
    assess(plain, potential())
    assess(scaled, potential(), scale="group")
    divisor = math.sqrt(0.5) + 1e-4
    for one, other in zip(advantages_of(plain), advantages_of(scaled), strict=True):
        assert other == pytest.approx([a / divisor for a in one])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("others", [[], [1.0, 0.0], [1.0, 1.0]], ids=["alone", "beside-signal", "beside-solved"])
def test_a_group_without_spread_does_not_blow_up(scale, others):
    """All failed, potentials differ: what is left is of the size of potentials, not of potentials over 1e-4."""
    group = [episode(0.0, [turn(potential=p), turn()]) for p in (0.1, 0.9)]
    assess([*group, *(episode(r, [turn(), turn()], "h") for r in others)], potential(), scale=scale)
    for own in advantages_of(group):
        assert max(abs(a) for a in own) <= 1.0
    assert group[1].turns[1].advantage < 0 < group[0].turns[1].advantage


def test_an_episode_whose_potential_is_unknown_is_not_shaped_and_disturbs_nobody():
    lost = episode(0.5, [turn(potential=0.3), turn(potential=None), turn(potential=0.2)])
    episodes, pair = [*two_episodes(), lost], two_episodes()
    assess(episodes, potential())
    assess(pair, potential())
    for own, expected in zip(episodes, advantages_of(pair), strict=False):  # the mean reward is .5 in both
        assert [t.advantage for t in own.turns] == pytest.approx(expected)
    assert advantages_of(episodes)[2] == [lost.advantage] * 3 == [0.0] * 3


def test_an_episode_without_a_reward_is_not_shaped():
    episodes = [*two_episodes(), episode(None, [turn(potential=p) for p in (0.9, 0.9, 0.9)])]
    pair = two_episodes()
    assess(episodes, potential())
    assess(pair, potential())
    assert advantages_of(episodes) == [*advantages_of(pair), [0.0] * 3]


def test_a_turn_the_potential_does_not_speak_about_leaves_it_where_it_was():
    """write .5, search (nothing to say), write .8, answer: turns begin in 0, .5, .5, .8."""
    long = episode(1.0, [turn("write", 0.5), turn("search", 0.99), turn("write", 0.8), turn("answer", 0.99)])
    still = episode(0.0, [turn("write", 0.0), turn("search", 0.0), turn("write", 0.0), turn("answer", 0.0)])
    assess([long, still], potential(module="write"))
    steps = [0.5 - a for a in advantages_of([long])[0]]
    assert steps == pytest.approx([0.0, 0.25, 0.25, 0.4])  # half of it: the slot's mean is half way to 0


def test_every_episode_begins_at_zero():
    """Search, write, answer in both: the second turn of the second begins in 0, not where the first episode ended."""
    episodes = [episode(r, [turn("search"), turn("write", p), turn("answer")]) for r, p in ((1.0, 0.75), (0.0, 0.25))]
    assess(episodes, potential(module="write"))
    assert advantages_of(episodes) == [[0.5, 0.5, 0.25], [-0.5, -0.5, -0.25]]


def test_nothing_is_shaped_at_weight_zero_or_without_potentials():
    plain, silent = two_episodes(), two_episodes()
    assess(plain)
    assess(silent, potential(weight=0.0))
    assert advantages_of(silent) == advantages_of(plain) == [[0.5] * 3, [-0.5] * 3]


def test_shaping_keeps_the_sum_of_every_slot():
    episodes = [
        episode(r, [turn(potential=p), turn(potential=1 - p), turn()]) for r, p in ((1, 0.3), (0, 0.6), (1, 1))
    ]
    assess(episodes, potential(), lam=0.7)
    for slot in zip(*advantages_of(episodes), strict=True):
        assert math.fsum(slot) == pytest.approx(0, abs=1e-12)


def test_a_flat_bonus_changes_who_is_best_and_a_potential_does_not():
    """+.1 per search: A with one search and .50 against B with three and .35 becomes .60 against .65."""

    def pair():
        return [
            episode(0.50, [turn("search", 0.3), turn("answer", 0.3)]),
            episode(0.35, [turn("search", 0.1), turn("search", 0.2), turn("search", 0.3), turn("answer", 0.3)]),
        ]

    calls = RewardDimension("calls", lambda e: sum(t.module == "search" for t in e.turns), 0, 9, role=Role.BONUS)
    bonus, shaped = pair(), pair()
    assert assess(bonus, WeightedDimension("calls", calls, 0.1)).rewards.tolist() == pytest.approx([0.60, 0.65])
    assert bonus[0].advantage < 0 < bonus[1].advantage
    assert assess(shaped, potential()).rewards.tolist() == [0.50, 0.35]
    assert shaped[0].advantage == pytest.approx(0.075)
    # each episode's shaping adds up to nothing before the slot's mean is taken: loitering earns nothing
    for e in shaped:
        assert shaped_returns(e.reward, [float(t.memory_after) for t in e.turns])[0] == pytest.approx(e.reward)
