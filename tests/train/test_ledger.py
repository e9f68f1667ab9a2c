"""Every prompt that is issued ends once, whatever batches, updates and kills there are."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.reward.advantage import GroupState
from memfactory.train.ledger import REASONS, Ledger, Played, play, reason


def played(**changes: Any) -> Played:
    values = {"prompt": 0, "group": "a", "scored": True, "fault": "", "steps": (), "cut": False, "trainable": True}
    return Played(**(values | changes))


@pytest.mark.parametrize(
    ("episodes", "state", "rules", "expected"),
    [
        ([played(), played(steps=(1,))], GroupState.SIGNAL, {}, ""),
        # credit of turns can teach where the outcomes are all equal
        ([played(steps=(0,)), played()], GroupState.TIED, {}, ""),
        ([played(), played()], GroupState.SOLVED, {}, "solved"),
        ([played(), played()], GroupState.FAILED, {}, "failed"),
        ([played(), played()], GroupState.TIED, {}, "tied"),
        ([played(), played(scored=False, fault="judge: away")], GroupState.UNMEASURED, {}, "unscored"),
        ([played(cut=True), played()], GroupState.SIGNAL, {"masked": True}, "truncated"),
        ([played(cut=True), played()], GroupState.SIGNAL, {"masked": False}, "zero"),
        ([played(trainable=False)] * 2, GroupState.SIGNAL, {}, "frozen"),
        ([played(trainable=False)] * 2, GroupState.SIGNAL, {"learned": True}, ""),
        ([played(trainable=False)] * 2, GroupState.SOLVED, {"learned": True}, "solved"),
        ([played()], GroupState.UNMEASURED, {"enough": 1}, "zero"),
    ],
)
def test_why_a_prompt_is_dropped(
    episodes: list[Played], state: GroupState, rules: dict[str, Any], expected: str
) -> None:
    found = reason(episodes, state, **rules)
    assert found == expected
    assert not found or found in REASONS


def test_episodes_of_one_prompt_can_be_on_two_ranks_and_rerolls_count_for_their_prompt() -> None:
    batch = [
        played(prompt=2, group="c", steps=(1,)),
        played(prompt=0, group="a", scored=False, fault="judge: away"),
        played(prompt=0, group="a", scored=False),
        played(prompt=2, group="c", steps=(0,)),
        played(prompt=1, group="b"),
        played(prompt=1, group="b"),
        played(prompt=1, group="b/reroll", steps=(0,)),
    ]
    states = {"c": GroupState.SIGNAL, "a": GroupState.UNMEASURED, "b": GroupState.TIED, "b/reroll": GroupState.SIGNAL}
    why, steps, faults = play(batch, states, ["a", "b", "c"])
    assert why == {0: "unscored"}
    assert steps == {2: [0, 1], 1: [0]}
    assert faults == {"a": "judge: away"}


class Run:
    """A run that only keeps its ledger: batches drawn from passes, fates drawn at random, a checkpoint per update."""

    def __init__(self, tasks: int, per_batch: int, per_generation: int, per_update: int, iterations: int, seed: int):
        self.tasks, self.per_batch, self.seed = tasks, per_batch, seed
        self.per_generation, self.per_update, self.iterations = per_generation, per_update, iterations
        self.lines: list[dict[str, Any]] = []
        self.ledger = Ledger([f"t{i}" for i in range(tasks)], per_batch, self.lines.append)
        self.micro = self.step = 0

    def state(self) -> str:
        return json.dumps({"ledger": self.ledger.state_dict(), "micro": self.micro, "step": self.step})

    def resume(self, state: str) -> None:
        data = json.loads(state)
        self.lines[:] = [line for line in self.lines if line["step"] <= data["step"]]
        self.ledger = Ledger([f"t{i}" for i in range(self.tasks)], self.per_batch, self.lines.append)
        self.ledger.load_state_dict(data["ledger"])
        self.micro, self.step = data["micro"], data["step"]

    def training_step(self, last_step: int) -> bool:
        """Whether an update was made."""
        if self.micro % (self.per_generation * self.iterations) == 0:
            batch = self.micro // (self.per_generation * self.iterations)
            draw = random.Random(f"{self.seed}/{batch}")
            number, place = divmod(batch, self.ledger.per_pass)
            order = list(range(self.tasks))
            random.Random(f"{self.seed}/pass/{number}").shuffle(order)
            prompts = order[place * self.per_batch : (place + 1) * self.per_batch]
            self.ledger.issue(self.step + 1, [prompt for prompt in prompts for _ in range(2)])
            dead = {prompt: draw.choice(["solved", "failed", "unscored"]) for prompt in prompts if draw.random() < 0.4}
            steps = {
                prompt: sorted(draw.sample(range(self.per_generation), draw.randint(1, self.per_generation)))
                for prompt in prompts
                if prompt not in dead
            }
            self.ledger.finish(self.step + 1, dead, steps, episodes=2 * len(prompts))
        self.ledger.enter(self.micro % self.per_generation)
        self.micro += 1
        if self.micro % self.per_update:
            return False
        self.step += 1
        self.ledger.update(self.step, last=self.step == last_step)
        return True

    def go(self, last_step: int, kills: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        saved, made = self.state(), 0
        while self.step < last_step:
            if self.training_step(last_step):
                saved = self.state()
            made += 1
            if made in kills:
                self.resume(saved)


@settings(deadline=None, max_examples=150)
@given(
    tasks=st.integers(2, 9),
    per_batch=st.integers(1, 4),
    per_generation=st.integers(1, 4),
    per_update=st.integers(1, 4),
    iterations=st.integers(1, 2),
    last_step=st.integers(1, 12),
    kills=st.sets(st.integers(1, 40), max_size=5),
    seed=st.integers(0, 99),
)
def test_every_prompt_ends_once_and_kills_change_nothing(
    tasks: int,
    per_batch: int,
    per_generation: int,
    per_update: int,
    iterations: int,
    last_step: int,
    kills: set[int],
    seed: int,
) -> None:
    shape = tasks, min(per_batch, tasks), per_generation, per_update, iterations, seed
    whole, killed = Run(*shape), Run(*shape)
    whole.go(last_step)
    killed.go(last_step, kills)
    assert killed.lines == whole.lines
    assert killed.ledger.totals() == whole.ledger.totals()

    issued: Counter[tuple[int, str]] = Counter()
    waiting: Counter[tuple[int, str]] = Counter()
    for line in whole.lines:
        for prompt in line.get("prompts", ()):
            if line["event"] == "issued":
                issued[line["pass"], prompt] += 1
                waiting[line["pass"], prompt] += 1
            else:
                waiting[line["pass"], prompt] -= 1
            assert waiting[line["pass"], prompt] >= 0, "a prompt ended twice"
    assert set(issued.values()) == {1}
    assert not +waiting, "a prompt did not end"
    passes = Counter(number for number, _ in issued)
    assert all(count == tasks for number, count in passes.items() if number < max(passes))
    totals = whole.ledger.totals()
    assert totals["issued"] == totals["trained"] + sum(totals["dropped"].values()) == issued.total()
    assert "repeated" not in totals


def test_a_prompt_that_comes_twice_in_a_pass_is_counted() -> None:
    ledger = Ledger(["a", "b", "c", "d"], 2)
    ledger.issue(1, [0, 1])
    ledger.issue(2, [1, 2])
    assert ledger.totals()["repeated"] == 1


def test_its_state_does_not_grow_with_the_run() -> None:
    run = Run(tasks=8, per_batch=2, per_generation=2, per_update=1, iterations=1, seed=1)
    run.go(4)
    size = len(run.state())
    run.go(400)
    assert len(run.state()) < 1.5 * size
