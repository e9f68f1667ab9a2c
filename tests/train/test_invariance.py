"""The step depends on episodes, rewards and options, and not on how they are cut into rows and micro-batches.

Models, trainer and loss are real. Most tests compare whole gradients of a two-layer Qwen3; those about
splitting take its attention away (output projections zero and frozen), so that a turn's log-probs do not
depend on where its row begins and any difference is the weighting's.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.episode import Episode, StopReason, Task, Turn
from memfactory.recipe import RolloutSection
from memfactory.reward.credit import build_assigner
from memfactory.train.config import check_train
from memfactory.train.rows import build_rows, collate, loss_weights

LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "vespo")
TOLERANCE = 1e-5
LENGTH = 16  # max_completion_length, dr_grpo's constant


class Engine:
    """One trainer, asked again and again for the gradient it makes of a list of episodes."""

    def __init__(self, bench, tokenizer, folder, *, context_free=False, **options):
        model = bench.make_model(seed=1)
        if context_free:
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.requires_grad_(False).zero_()
        groups = bench.groups(1, 4, dead=1)
        options = {"per_device_train_batch_size": 4, "num_generations": 4, "learning_rate": 0.0} | options
        _, self.trainer = bench.ours(groups, model, tokenizer, folder, **options)
        self.model = self.trainer.model
        self.model.train()

    def assess(self, episodes):
        """Advantages and credit from the rewards that `episodes` have."""
        rewards = [episode.reward for episode in episodes]
        for episode, reward in zip(episodes, rewards, strict=True):
            episode.memory = str(reward)  # where the recorded reward is read from
        self.trainer._assess(episodes, self.trainer.parts.rewards.begin())
        assert [episode.reward for episode in episodes] == rewards

    def __call__(self, episodes, budget=100_000, assigner="broadcast"):
        """Loss and gradient of `episodes`, whose reward and group are set, cut by `budget`."""
        self.trainer.parts.rollout = RolloutSection(train_token_budget=budget)
        self.trainer.parts.rewards.assigner = build_assigner(assigner)
        episodes = copy.deepcopy(episodes)
        self.assess(episodes)
        return self.of_micro_batches([micro for step in self.trainer._micro_batches(episodes) for micro in step])

    def of_micro_batches(self, micro_batches):
        self.model.zero_grad()
        self.count = len(micro_batches)
        self.rows = sum(micro["advantages"].shape[0] for micro in micro_batches)
        loss = torch.zeros(())
        for micro in micro_batches:
            part = self.trainer._compute_loss(self.model, micro)
            part.backward()
            loss += part.detach()
        return loss.item(), self.gradient()

    def gradient(self):
        return torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().clone() for p in self.model.parameters()]
        )


@pytest.fixture(scope="module")
def engine(bench, tokenizer, tmp_path_factory):
    made = {}

    def get(**options):
        key = str(sorted(options.items()))
        if key not in made:
            made[key] = Engine(bench, tokenizer, tmp_path_factory.mktemp("engine"), **options)
        return made[key]

    return get


def word(rng):
    return rng.randint(5, 47)


def words(rng, low, high):
    return [word(rng) for _ in range(rng.randint(low, high))]


def make_episodes(seed, *, episodes=6, append=0.5, logp=-3.5):
    """Episodes of 1 to 4 turns in groups of 3; a turn continues the last one or starts a new context."""
    rng = random.Random(seed)
    result = []
    for number in range(episodes):
        group = f"g{number // 3}"
        turns: list[Turn] = []
        for _ in range(rng.randint(1, 4)):
            if turns and rng.random() < append:
                prompt = turns[-1].prompt_ids + turns[-1].completion_ids + words(rng, 1, 4)
            else:
                prompt = words(rng, 1, 12)
            completion = words(rng, 1, 8)
            logprobs = [logp + rng.gauss(0, 0.3) for _ in completion]
            turns.append(Turn("write", prompt, completion, logprobs, "", StopReason.STOP, prefix_key=f"{group}/0"))
        episode = Episode(Task(group, (), ()), turns, group=group)
        episode.reward = [0.0, 1.0, rng.random()][number % 3]
        result.append(episode)
    return result


def same(bench, one, other, tolerance=TOLERANCE):
    assert bench.relative(one[1], other[1]) < tolerance
    assert one[0] == pytest.approx(other[0], rel=1e-4, abs=2e-6)


# ---- the whole path against the formula, turn by turn ----------------------------------------


def by_hand(model, episodes, loss, assigner, epsilon_high=0.2):
    """Gradient at ratio 1, one plain forward pass per turn, straight from the definition of each loss."""
    model.zero_grad()
    rewards = {}
    for episode in episodes:
        rewards.setdefault(episode.group, []).append(episode.reward)
    used = {id(e): (e.turns if assigner == "broadcast" else e.turns[-1:]) for e in episodes}
    length = {key: sum(len(turn.completion_ids) for turn in turns) for key, turns in used.items()}
    total, count = sum(length.values()), len(episodes)
    for episode in episodes:
        own = torch.tensor(rewards[episode.group], dtype=torch.float64)
        advantage = float((episode.reward - own.mean()) / (own.std() + 1e-4))
        share = {
            "dapo": 1 / total,
            "bnpo": 1 / total,
            "vespo": 1 / total,
            "cispo": epsilon_high / total,
            "grpo": 1 / (count * length[id(episode)]),
            "dr_grpo": 1 / (count * LENGTH),
            "luspo": 1 / count,
        }[loss]
        for turn in used[id(episode)]:
            whole = torch.tensor([turn.prompt_ids + turn.completion_ids])
            logits = model(input_ids=whole).logits[0, len(turn.prompt_ids) - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, torch.tensor(turn.completion_ids)[:, None])
            (-share * advantage * logp.sum()).backward()
    return torch.cat([p.grad.flatten().clone() for p in model.parameters()])


@pytest.mark.parametrize("assigner", ["broadcast", "last_turn"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_the_formula(bench, engine, loss, assigner):
    """Rows, padding, scorer, weights and TRL's loss together give the loss's definition over episodes."""
    machine = engine(loss_type=loss)
    for seed in range(4):
        episodes = make_episodes(seed)
        _, ours = machine(episodes, budget=60, assigner=assigner)
        assert bench.relative(ours, by_hand(machine.model, episodes, loss, assigner)) < TOLERANCE


# ---- micro-batches ---------------------------------------------------------------------------

OFF_POLICY = {"num_iterations": 2, "beta": 0.0, "epsilon_high": 0.3}
OPTIONS = [
    *({"loss_type": loss} for loss in LOSSES),
    *({"loss_type": loss} | OFF_POLICY for loss in LOSSES),
    {"loss_type": "dapo", "importance_sampling_level": "sequence"},
    {"loss_type": "dr_grpo", "importance_sampling_level": "sequence"} | OFF_POLICY,
    {"loss_type": "dapo", "off_policy_mask_threshold": 0.1} | OFF_POLICY,
    {"loss_type": "grpo", "off_policy_mask_threshold": 0.1} | OFF_POLICY,
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_micro_batches_and_order_change_nothing(bench, engine, options):
    machine = engine(**options)

    @settings(max_examples=4)
    @given(seed=st.integers(0, 10**6), budget=st.integers(1, 200), order=st.randoms(use_true_random=False))
    def check(seed, budget, order):
        episodes = make_episodes(seed)
        reference = machine(episodes)
        assert machine.count == 1
        same(bench, machine(episodes, budget), reference)
        shuffled = list(episodes)
        order.shuffle(shuffled)
        same(bench, machine(shuffled, budget), reference)

    check()


def test_one_row_per_micro_batch_is_really_many_passes(engine):
    machine = engine(loss_type="dapo")
    machine(make_episodes(0), budget=1)
    assert machine.count == machine.rows > 5


@pytest.mark.parametrize(
    ("option", "others"),
    [
        ({"entropy_coef": 0.01}, {}),
        ({"use_adaptive_entropy": True}, {"entropy_coef": 0.01, "entropy_target": 10.0}),
        ({"top_entropy_quantile": 0.5}, {}),
    ],
)
def test_options_that_depend_on_micro_batches_are_refused(bench, engine, option, others):
    """TRL computes them per pass, so the token budget, which must change speed alone, would change the result."""
    message = "\n".join(map(str, check_train(option)))
    assert "micro-batch" in message
    assert next(iter(option)) in message
    machine = engine(loss_type="grpo", **option, **others)
    episodes = make_episodes(0)
    difference = bench.relative(machine(episodes)[1], machine(episodes, 1)[1])
    assert difference > 1e-4, "TRL computes it over the batch now: it need not be refused any more"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("extra", [1, 5])
def test_padding_rows_change_nothing(bench, engine, loss, extra):
    machine = engine(loss_type=loss)
    episodes = make_episodes(5)
    machine.assess(episodes)
    rows = build_rows(episodes)
    tokens = [sum(len(turn.completion_ids) for turn in episode.turns) for episode in episodes]
    weights = loss_weights(rows, tokens, loss, LENGTH)
    results = []
    for size in (None, len(rows) + extra):
        micro = collate(rows, weights, 0, size) | {"num_items_in_batch": torch.tensor(float(sum(tokens)))}
        assert micro["advantages"].shape[0] == (size or len(rows))
        results.append(machine.of_micro_batches([micro]))
    same(bench, *results)
    only_padding = collate([], [], 0, 2) | {"num_items_in_batch": torch.tensor(float(sum(tokens)))}
    loss_value, gradient = machine.of_micro_batches([only_padding])
    assert loss_value == 0
    assert not gradient.any()


# ---- rows ------------------------------------------------------------------------------------


def split_contexts(episodes, seed, share):
    """The same turns, but `share` of those that continue a row now start one (same last context token)."""
    rng = random.Random(seed)
    episodes = copy.deepcopy(episodes)
    for episode in episodes:
        for turn in episode.turns[1:]:
            if rng.random() < share:
                turn.prompt_ids = [*words(rng, 0, 6), 4, turn.prompt_ids[-1]]  # 4 is in no other context
    return episodes


@pytest.mark.parametrize(
    "options",
    [*({"loss_type": loss} for loss in LOSSES)]
    + [{"loss_type": loss} | OFF_POLICY for loss in LOSSES if loss != "vespo"],  # vespo's ratio is one per row
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_more_rows_per_episode_change_nothing(bench, engine, options):
    machine = engine(context_free=True, **options)

    @settings(max_examples=4)
    @given(seed=st.integers(0, 10**6), share=st.sampled_from([0.5, 1.0]), budget=st.integers(1, 300))
    def check(seed, share, budget):
        episodes = make_episodes(seed, append=1.0)
        reference = machine(episodes)
        assert machine.rows == len(episodes)  # one append-only row each
        divided = split_contexts(episodes, seed, share)
        result = machine(divided, budget)
        if share == 1.0:
            assert machine.rows == sum(len(episode.turns) for episode in episodes)
        same(bench, result, reference)

    check()


def test_the_context_free_model_is_context_free_and_the_other_is_not(bench, engine):
    """Otherwise the test above would prove nothing or fail for the wrong reason."""
    episodes = make_episodes(3, append=1.0)
    divided = split_contexts(episodes, 3, 1.0)
    for context_free in (True, False):
        machine = engine(context_free=context_free, loss_type="dapo")
        difference = bench.relative(machine(episodes)[1], machine(divided)[1])
        assert (difference < TOLERANCE) == context_free


def test_an_episode_of_many_turns_weighs_as_much_as_one_of_few(bench, engine):
    """grpo: doubling every turn of one episode doubles no one's weight (its mean stays its mean)."""
    machine = engine(context_free=True, loss_type="grpo")
    episodes = make_episodes(9, append=0.0)
    doubled = copy.deepcopy(episodes)
    doubled[1].turns += copy.deepcopy(doubled[1].turns)
    same(bench, machine(doubled), machine(episodes))
    machine = engine(context_free=True, loss_type="dapo")  # dapo is a mean over tokens: there it must change
    assert bench.relative(machine(doubled)[1], machine(episodes)[1]) > 1e-2


def test_unmeasured_episode_is_as_if_it_had_not_run(bench, engine):
    for loss in LOSSES:
        machine = engine(loss_type=loss)
        episodes = make_episodes(11)
        without = [episode for episode in episodes if episode is not episodes[2]]
        episodes[2].reward = None
        same(bench, machine(episodes), machine(without))


def test_dead_group_counts_in_the_mean_and_costs_no_pass(bench, engine):
    """As in TRL, where its rows are computed and give nothing."""
    machine = engine(loss_type="dapo")
    episodes = make_episodes(12)
    live = machine(episodes[:3])
    for episode in episodes[3:]:
        episode.reward = 0.5
    both = machine(episodes)
    tokens = [sum(len(turn.completion_ids) for turn in episode.turns) for episode in episodes]
    share = sum(tokens[:3]) / sum(tokens)
    assert machine.rows == len(build_rows(episodes[:3]))
    assert bench.relative(both[1], live[1] * share) < TOLERANCE
