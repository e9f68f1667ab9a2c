"""A step whose rows share prefixes is the step of separate rows, whatever the loss and the cut."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from memfactory.episode import Episode, StopReason, Task, Turn
from memfactory.policy import prefix_sharing
from memfactory.train.micro_batches import Positions
from memfactory.train.trainer import EpisodeGRPOTrainer
from tests.train.test_invariance import LOSSES, OFF_POLICY, Engine

ADAPTER = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
OPTIONS = {
    **{loss: {"loss_type": loss} for loss in LOSSES},
    "off-policy": OFF_POLICY,
    "an adapter, and KL to the model without it": {"beta": 0.1, "peft_config": ADAPTER},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


def make_episodes(seed: int, *, chunks: int = 3) -> list[Episode]:
    """Two groups of three whose turns begin with instructions, a question and a chunk, and end in their own memory."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [rng.randint(5, 47) for _ in range(rng.randint(low, high))]

    instructions = words(4, 8)
    episodes = []
    for group in ("g0", "g1"):
        question = words(2, 4)
        text = [words(6, 14) for _ in range(chunks)]
        for reward in (0.0, 1.0, rng.random()):
            turns = []
            for number, chunk in enumerate(text):
                prompt = instructions + question + chunk + (words(1, 6) if number else [])
                completion = words(1, 8)
                logprobs = [-3.5 + rng.gauss(0, 0.3) for _ in completion]
                turns.append(Turn("write", prompt, completion, logprobs, "", StopReason.STOP, prefix_key=group))
            episode = Episode(Task(group, (), ()), turns, group=group)
            episode.reward = reward
            episodes.append(episode)
    return episodes


@pytest.fixture(scope="module")
def engines(bench, tokenizer, tmp_path_factory):
    made = {}

    def get(**options):
        key = str(sorted(options.items()))
        if key not in made:
            made[key] = [
                Engine(bench, tokenizer, tmp_path_factory.mktemp("engine"), share_prefix=share, **options)
                for share in (True, False)
            ]
        return made[key]

    return get


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_of_separate_rows(bench, engines, name):
    shared, separate = engines(**OPTIONS[name])

    @settings(max_examples=5, deadline=None)
    @given(seed=st.integers(0, 10**6), budget=st.integers(1, 400))
    def check(seed, budget):
        episodes = make_episodes(seed)
        one, other = shared(episodes, budget), separate(episodes)
        assert bench.relative(one[1], other[1]) < 1e-5
        assert one[0] == pytest.approx(other[0], rel=1e-4, abs=2e-6)

    check()


def test_fewer_positions_are_computed_and_the_log_says_so(engines):
    shared, separate = engines(loss_type="dapo")
    episodes = make_episodes(1)
    counted = []
    for engine in (shared, separate):
        engine.trainer._positions = Positions()
        engine(episodes)
        counted.append((engine.trainer._positions.real, engine.trainer._positions.computed))
    (real, unique), (same, padded) = counted
    assert real == same
    rows = [turn.prompt_ids + turn.completion_ids for episode in episodes for turn in episode.turns]
    assert real == sum(map(len, rows))
    assert unique == len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})
    assert unique < 0.7 * real <= 0.7 * padded


def test_rows_that_share_nothing_are_computed_as_before(engines, monkeypatch):
    """Packing is not even tried where it saves too little."""
    shared, _ = engines(loss_type="dapo")
    monkeypatch.setattr(prefix_sharing, "LEAST", 10_000)
    monkeypatch.setattr(prefix_sharing.Plan, "attend", lambda *_, **__: pytest.fail("packed"))
    shared(make_episodes(2))


def test_the_recipes_switch_reaches_trainer_and_policy(bench, tokenizer, tmp_path):
    for share in (True, False):
        _, trainer = bench.ours(
            bench.groups(1, 4),
            bench.make_model(),
            tokenizer,
            tmp_path / str(share),
            share_prefix=share,
            per_device_train_batch_size=4,
            num_generations=4,
        )
        assert isinstance(trainer, EpisodeGRPOTrainer)
        assert trainer._scorer.sharing.available == share
        assert trainer.policy.trained.share_prefix == share
