"""The asynchronous trainer: the same gradient as the other one, whatever the passes; never older turns than asked.

TRL's model, packing, attention and loss are real; its attention kernel, which needs a GPU, is replaced by the one of
`tests/rollout_servers/async_on_cpu.py`. A real server is in `tests/rollout_servers/test_async.py`.
"""

from __future__ import annotations

import asyncio
import copy
import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl.experimental.async_grpo import async_grpo_trainer, packing

from memfactory.checkpoints import damage
from memfactory.cli.recipes import find_recipe
from memfactory.episode import Episode, StopReason, Task, Turn
from memfactory.errors import EngineError, RecipeError, RecipeErrors, RewardError
from memfactory.policy.routing import RoutedPolicy
from memfactory.recipe import AsyncSection, CreditSection, Recipe, RolloutSection
from memfactory.reward.aggregate import WeightedSum
from memfactory.reward.system import RewardSystem
from memfactory.train.async_config import LOSS_TYPES, build_async_config, check_async, check_attention
from memfactory.train.async_trainer import AsyncEpisodeTrainer, _Order
from memfactory.train.async_worker import EpisodeRolloutWorker, Rules
from memfactory.train.folding import fold, pack, passes, split_stale
from memfactory.train.prepare import prepare
from memfactory.train.rows import Row
from memfactory.train.trainer import EpisodeGRPOTrainer, Parts, seed_of
from tests.rollout_servers.async_on_cpu import attention

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    kernel = SimpleNamespace(flash_attn_varlen_func=attention)
    monkeypatch.setattr(packing, "_flash_attn", lambda: kernel)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda accelerator, dtype: None)


def recipe(budget: int = 16384, **asynchronous: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "async",
            "model": {"name": "unused", "lora": {"r": 4}},
            "environment": {"name": "fact_words"},
            "rewards": [{"name": "answer.exact_match"}],
            "rollout": {"engine": "async", "train_token_budget": budget, "async_grpo": asynchronous},
        }
    )


def off_policy_groups(bench, model, seed=0):
    """Groups of episodes with rows of several turns and several advantages, sampled by other weights than `model`."""
    rng = random.Random(seed)
    groups = bench.groups(3, 4, seed=seed, dead=1)
    for episodes in groups.values():
        for episode in episodes:
            for number in range(rng.randint(0, 2)):
                last = episode.turns[-1]
                rewritten = number and rng.random() < 0.5
                seen = [] if rewritten else [*last.prompt_ids, *last.completion_ids]
                ids = bench.ids(rng, 1, 7)
                turn = Turn("answer", [*seen, *bench.ids(rng, 1, 3)], ids, [-1.0] * len(ids), "", StopReason.STOP)
                episode.turns.append(turn)
    bench.fill_in_logprobs(groups, model)
    for turn in (turn for episodes in groups.values() for episode in episodes for turn in episode.turns):
        turn.logprobs = [value + rng.gauss(0, 0.3) for value in turn.logprobs]
    return groups


def parts_of(bench, groups, route, budget):
    return Parts(
        bench.ReplayAgent(groups),
        tasks := [episodes[0].task for episodes in groups.values()],
        tasks[:1],
        # the turns of an episode have advantages of their own
        RewardSystem([bench.recorded_reward(), *bench.every_scope], WeightedSum(), CreditSection(outcome_share=0.5)),
        rollout=RolloutSection(train_token_budget=budget, max_failed_share=1.0),
        route=route,
    )


def step_of_async(bench, tokenizer, folder, groups, budget=16384, **options):
    """Gradient of the one update that the asynchronous trainer makes, and the trainer."""
    bench.make_model().save_pretrained(folder / "model")
    args = bench.config(folder, **options)
    keep = bench.KeepGradients()
    trainer = AsyncEpisodeTrainer(
        parts_of(bench, groups, RoutedPolicy, budget),
        str(folder / "model"),
        build_async_config(args, recipe(budget), len(groups)),
        args,
        processing_class=tokenizer,
        callbacks=[keep],
    )
    trainer.train()
    return keep.steps, trainer


def step_of_sync(bench, tokenizer, folder, groups, **options):
    """The same by the other trainer, which takes ratios against the recorded log-probs too."""

    def elsewhere(trained):
        trained.elsewhere = True
        return RoutedPolicy(trained)

    keep = bench.KeepGradients()
    trainer = EpisodeGRPOTrainer(
        parts_of(bench, groups, elsewhere, 16384),
        bench.make_model(),
        bench.config(folder, **options),
        processing_class=tokenizer,
        callbacks=[keep],
    )
    trainer.train()
    return keep.steps, trainer


@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_gradient_equals_the_other_trainers(bench, tokenizer, tmp_path, loss):
    """Off-policy, with clipping, over rows whose tokens have several advantages, in many passes and in one."""
    options = {"per_device_train_batch_size": 12, "num_generations": 4, "loss_type": loss}
    groups = off_policy_groups(bench, bench.make_model(), seed=2)
    expected, _ = step_of_sync(bench, tokenizer, tmp_path / "sync", groups, **options)
    assert expected[0].norm() > 1e-4
    for budget, most in ((16384, 1), (40, 100)):
        own, trainer = step_of_async(bench, tokenizer, tmp_path / str(budget), groups, budget, **options)
        assert len(own) == 1
        assert bench.relative(own[0], expected[0]) < TOLERANCE
        logged = trainer.state.log_history[-1]
        assert 0 < logged["batch/microbatches_per_step"] <= most
        assert logged["batch/samples_per_step"] > logged["rows/trained"], "rows have several advantages"
        assert logged["clip_ratio/region_mean"] > 0


# ---- samples -----------------------------------------------------------------------------------


def a_row(**values: Any) -> Row:
    return Row(**({"episode": 0, "prompt_ids": [5, 6], "completion_ids": [7, 8, 9], "trained": [1, 0, 1]} | values))


def test_a_row_of_several_advantages_is_a_sample_for_each_and_packed_once():
    row = a_row(advantages=[2.0, 0.0, -1.0], logprobs=[-0.1, 0.0, -0.3])
    samples = fold([row], [0.5], [3])
    assert [own.sample.advantage for own in samples] == [1.0, -0.5]
    assert [own.sample.completion_mask.tolist() for own in samples] == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert all(own.sample.input_ids.tolist() == [5, 6, 7, 8, 9] and own.sample.group_id == 3 for own in samples)
    (only,) = pack(samples, 100)
    assert len(only.tokens) == 5
    packed = only.pack()
    assert packed["advantages"].tolist() == [1.0, -0.5]
    assert packed["old_log_probs"].tolist() == pytest.approx([-0.1, -0.3])


def test_tokens_without_an_advantage_are_in_no_sample():
    assert fold([a_row(advantages=[0.0, 0.0, 0.0], logprobs=[0.0] * 3)], [1.0], [0]) == []


def test_nothing_is_dropped_for_its_length():
    rows = [
        a_row(prompt_ids=list(range(length)), advantages=[1.0, 0.0, 1.0], logprobs=[-1.0, 0.0, -1.0])
        for length in (30, 3, 9)
    ]
    packed = pack(fold(rows, [1.0] * 3, [0]), 12)
    assert sum(len(row.samples) for row in packed) == 3
    assert max(len(row.samples) for row in packed if len(row.tokens) > 12) == 1


def test_every_pass_is_averaged_over_the_whole_batch():
    rows = [a_row(prompt_ids=[n, n], advantages=[1.0, 0.0, 1.0], logprobs=[-1.0, 0.0, -1.0]) for n in range(10, 14)]
    collate = async_grpo_trainer.DataCollatorForRollout(0)
    made = passes(fold(rows, [1.0] * 4, [0]), 10, 17.0, collate)
    assert len(made) == 2
    assert {float(batch["global_n_tokens"][0]) for batch in made} == {17.0}


def test_stale_samples_are_told_apart():
    rows = [a_row(advantages=[1.0, 0.0, 1.0], logprobs=[-1.0, 0.0, -1.0], version=v) for v in (3, 4, 5)]
    fresh, stale = split_stale(fold(rows, [1.0] * 3, [0]), step=6, most=2)
    assert [own.sample.model_version for own in fresh] == [4, 5]
    assert [own.sample.model_version for own in stale] == [3]


def test_the_order_is_that_of_the_other_trainer(bench, tokenizer, tmp_path):
    groups = bench.groups(5, 2, seed=1)
    options = {"per_device_train_batch_size": 4, "num_generations": 2}
    _, trainer = bench.ours(groups, bench.make_model(), tokenizer, tmp_path, **options)
    sampler = trainer._get_train_sampler()
    expected = [index for _ in range(3) for index in sampler]
    order = _Order(5, 2, 2, True, trainer.args.seed)
    assert [index for number in range(6) for index in order(number)] == expected
    assert order(1) == expected[4:8], "an earlier one again"
    with pytest.raises(RecipeError, match="a batch of 6 tasks, and there are 5"):
        _Order(5, 6, 2, True, 0)


# ---- the worker --------------------------------------------------------------------------------


class Asked:
    """A policy that notes what is asked of it."""

    def apart(self) -> Asked:
        return self

    def seed(self, seed: int) -> None: ...


class Waiting:
    """An agent whose episodes end when they may, and that notes at which version they began."""

    def __init__(self) -> None:
        self.version = 0
        self.began: list[int] = []
        self.error: Exception | None = None
        self.forever = False
        self.cancelled = threading.Event()

    async def run(self, task: Task, policy: Any, store: Any = None) -> Episode:
        self.began.append(self.version)
        if self.error is not None:
            raise self.error
        try:
            await asyncio.sleep(3600 if self.forever else 0.01)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        turn = Turn("answer", [5, 6], [7, 8], [-1.0, -1.0], "", StopReason.STOP, policy_version=self.version)
        return Episode(task, [turn], memory=str(len(self.began) % 2))


def worker_of(bench, agent, *, last=6, max_staleness=1, dimensions=None) -> EpisodeRolloutWorker:
    rules = Rules("dapo", "group", 16, False, 1.0, max_staleness, lambda *which: seed_of(0, *which))
    rewards = RewardSystem(dimensions or [bench.recorded_reward()], WeightedSum(), CreditSection())
    tasks = [Task(f"w{number}", (), ()) for number in range(4)]
    worker = EpisodeRolloutWorker(agent, tasks, rewards, rules, lambda number: [number % 4] * 2, last)
    worker.policy = Asked()  # type: ignore[assignment]
    return worker


@pytest.mark.parametrize("most", [0, 1, 3])
def test_no_batch_is_begun_before_it_will_be_young_enough(bench, most):
    agent = Waiting()
    worker = worker_of(bench, agent, last=8, max_staleness=most)
    worker.update_model_version(0)
    worker.start()
    try:
        for step in range(8):
            batch = worker.rollout_buffer.get(timeout=20)
            assert batch.number == step, "batches come in their order"
            assert all(step - own.sample.model_version <= most for own in batch.samples)
            admitted, end = 2 * min(step + most + 1, 8), time.monotonic() + 20
            while len(agent.began) < admitted and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.05)  # for more than that to begin
            assert len(agent.began) == admitted
            agent.version = step + 1
            worker.update_model_version(step + 1)
        ages = [batch // 2 - version for batch, version in enumerate(agent.began)]
        assert max(ages) == most
    finally:
        worker.stop()


def test_what_ends_the_worker_reaches_the_trainer_as_it_was_raised(bench):
    agent = Waiting()
    agent.error = EngineError("no vLLM server answers since 300 s", "gone", "start one")
    worker = worker_of(bench, agent)
    worker.update_model_version(0)
    worker.start()
    try:
        assert worker._thread is not None
        worker._thread.join(20)
        with pytest.raises(EngineError, match="no vLLM server answers") as caught:
            worker.check_health(300)
        assert caught.value.fix == "start one"
    finally:
        worker.stop()


def test_a_reward_that_fails_too_often_ends_the_run_with_its_own_message(bench, tokenizer, tmp_path):
    groups = bench.groups(2, 2, seed=1)
    for episode in (episode for episodes in groups.values() for episode in episodes):
        episode.memory = "None"
    bench.make_model().save_pretrained(tmp_path / "model")
    args = bench.config(tmp_path, per_device_train_batch_size=4, num_generations=2)
    parts = parts_of(bench, groups, RoutedPolicy, 100)
    parts.rewards = RewardSystem([bench.recorded_reward()], WeightedSum(), CreditSection())
    parts.rollout = RolloutSection(max_failed_share=0.25)
    trainer = AsyncEpisodeTrainer(
        parts, str(tmp_path / "model"), build_async_config(args, recipe(), 2), args, processing_class=tokenizer
    )
    with pytest.raises(RewardError):
        trainer.train()
    assert trainer.worker._thread is None, "the worker was ended"


def test_stopping_ends_what_is_under_way(bench):
    agent = Waiting()
    agent.forever = True
    worker = worker_of(bench, agent)
    worker.stop()  # nothing was started
    worker.update_model_version(0)
    worker.start()
    while not agent.began:
        time.sleep(0.01)
    start = time.monotonic()
    worker.stop()
    assert agent.cancelled.is_set()
    assert time.monotonic() - start < 5
    with pytest.raises(EngineError, match="nothing is sampled any more"):
        worker.check_health(300)


def test_state_of_rewards_is_that_of_the_batch_which_is_trained(bench):
    class Counting(WeightedSum):
        count = 0

        def __call__(self, table: Any) -> Any:
            Counting.count += 1
            return super().__call__(table)

    agent = Waiting()
    worker = worker_of(bench, agent, last=4, max_staleness=3)
    worker.rewards.state_dict = lambda: {"measured": np.float64(Counting.count)}  # type: ignore[method-assign]
    worker.rewards.aggregator = Counting()
    worker.update_model_version(0)
    worker.start()
    try:
        states = [worker.rollout_buffer.get(timeout=20).rewards_state["measured"] for _ in range(4)]
    finally:
        worker.stop()
    assert states == [1, 2, 3, 4], "all four were measured before the first was trained"


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"name": "m"}}, "model.lora: absent"),
        ({"train": {"beta": 0.04}}, "no reference model"),
        ({"train": {"num_iterations": 2}}, "max_staleness"),
        ({"train": {"loss_type": "cispo"}}, "not the clipped one"),
        ({"train": {"delta": 3.0}}, "does not have it"),
        ({"train": {"steps_per_generation": 4}}, "a generation batch is one update"),
        ({"train": {"fsdp": True}}, "one training process"),
        ({"rollout": {"engine": "async", "rerolls": {"share": 0.5}}}, "rollout.rerolls"),
        ({"rollout": {"engine": "async", "vllm": {"mode": "colocate"}}}, "shares the trainer's device"),
        (
            {"rollout": {"engine": "async", "async_grpo": {"max_staleness": 1, "weight_sync_steps": 3}}},
            "would wait for each other",
        ),
        ({"policies": {"judge": {"model": "m"}}}, "no base_url"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_cannot_do_is_refused_with_the_fix(change, words):
    asked = Recipe.model_validate(recipe().dump() | change)
    (error,) = check_async(asked)
    assert words in str(error)
    assert error.fix
    plain = asked.model_copy(update={"rollout": RolloutSection()})
    assert check_async(plain) == []


def test_what_learns_beside_the_policy_is_refused():
    changes = ["rollout.engine=async", "model.lora={r: 4}", "train.num_generations=2", "credit.advantage=null"]
    with pytest.raises(RecipeErrors, match=r"rollout\.engine: async with \w+: it learns beside the policy"):
        prepare(find_recipe("rmm/quickstart"), changes, ())


def test_every_field_of_trls_that_a_recipe_may_set_is_passed_on(bench, tmp_path):
    options = {"temperature": 0.7, "epsilon": 0.1, "epsilon_high": 0.3, "learning_rate": 3e-4, "weight_decay": 0.01}
    args = bench.config(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2, **options)
    made = build_async_config(args, recipe(budget=77, max_staleness=3, weight_sync_steps=2), 10)
    assert {name: getattr(made, name) for name in options} == options
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (16, 1)
    assert (made.token_budget, made.max_staleness, made.weight_sync_steps) == (77, 3, 2)
    assert made.fork_threshold_tokens == 0
    by_epochs = copy.copy(args)
    by_epochs.max_steps, by_epochs.num_train_epochs = -1, 3.0
    assert build_async_config(by_epochs, recipe(), 10).max_steps == 15, "3 passes of 5 batches of 2 tasks"
    assert AsyncSection().max_staleness == type(made)(output_dir="x", bf16=False, use_cpu=True).max_staleness


def test_a_machine_without_the_kernel_is_told_before_anything_is_loaded(monkeypatch):
    def missing() -> None:
        raise ImportError("No module named 'kernels'")

    check_attention()
    monkeypatch.setattr(packing, "_flash_attn", missing)
    with pytest.raises(EngineError, match=r"cannot attend on this machine.*kernels") as caught:
        check_attention()
    assert "rollout.engine=vllm" in caught.value.fix


def test_attention_for_tests_is_attention():
    """The stand-in of the kernel equals a plain forward pass: what the other tests here rest on."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, heads, 8) for heads in (4, 2, 2))
    ends = torch.tensor([0, 5])
    own = attention(q, k, v, ends, ends, 5, 5, softmax_scale=8**-0.5, causal=True)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 8**-0.5
    scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), float("-inf"))
    assert torch.allclose(own, torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(2, 1)), atol=1e-6)


# ---- checkpoints -------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    """Saves after step `step`, and stops."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save = control.should_training_stop = state.global_step == self.step
        return control


def test_a_resumed_run_begins_with_the_batches_that_were_not_trained(bench, tokenizer, tmp_path):
    groups = bench.groups(8, 2, seed=4)
    bench.make_model().save_pretrained(tmp_path / "model")
    options = {"per_device_train_batch_size": 4, "num_generations": 2, "max_steps": 4, "save_strategy": "no"}
    args = bench.config(tmp_path / "checkpoints", **options)
    lora = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)

    def build(*callbacks: Any) -> tuple[AsyncEpisodeTrainer, list[Any]]:
        parts = parts_of(bench, groups, RoutedPolicy, 16384)
        trainer = AsyncEpisodeTrainer(
            parts,
            str(tmp_path / "model"),
            build_async_config(args, recipe(max_staleness=3), len(groups)),
            args,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=list(callbacks),
        )
        lines: list[Any] = []
        trainer.ledger._write = lines.append
        return trainer, lines

    first, lines = build(StopAt(2))
    first.train()
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert damage(checkpoint) == ""
    assert first.ledger.totals()["issued"] == 4, "two batches of two tasks; those under way are not in it"
    second, more = build()
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == 4
    issued = [prompt for line in [*lines, *more] if line["event"] == "issued" for prompt in line["prompts"]]
    assert sorted(issued) == sorted(groups), "every task once"
    totals = second.ledger.totals()
    assert totals["issued"] == totals["trained"] + sum(totals["dropped"].values()) == 8
    saved = load_file(checkpoint / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): weight for name, weight in second.model.named_parameters()}
    assert all(not torch.equal(trained[name], weight) for name, weight in saved.items() if "lora_B" in name)


def test_a_checkpoint_of_the_other_trainer_is_refused(bench, tokenizer, tmp_path):
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "save_strategy": "steps", "save_steps": 1}
    bench.ours(bench.groups(1, 4), bench.make_model(), tokenizer, tmp_path / "sync", **options)
    (checkpoint,) = (path for path in (tmp_path / "sync").iterdir() if path.name.startswith("checkpoint"))
    bench.make_model().save_pretrained(tmp_path / "model")
    args = bench.config(tmp_path / "async", **(options | {"max_steps": 2}))
    parts = parts_of(bench, bench.groups(1, 4), RoutedPolicy, 16384)
    asynchronous = build_async_config(args, recipe(), 1)
    trainer = AsyncEpisodeTrainer(parts, str(tmp_path / "model"), asynchronous, args, processing_class=tokenizer)
    with pytest.raises(EngineError, match="not a checkpoint of this trainer"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
