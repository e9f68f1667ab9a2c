"""Recorded episodes, and one real optimizer step on them by our trainer or by TRL's own."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOTrainer

from memfactory.episode import Episode, StopReason, Task, Turn
from memfactory.policy import prefix_sharing
from memfactory.policy.tiny import tiny_tokenizer
from memfactory.recipe import CreditSection, RolloutSection
from memfactory.reward.aggregate import WeightedSum
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.dimension import RewardDimension, reward
from memfactory.reward.system import RewardSystem
from memfactory.train.config import EpisodeGRPOConfig
from memfactory.train.trainer import EpisodeGRPOTrainer, Parts

VOCABULARY = [f"w{i}" for i in range(43)]
FIRST, LAST = 5, 47  # ids of ordinary words


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices here are so small that a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def prefixes_are_shared(monkeypatch):
    """Rows here are short; this way those of a group are packed in every test that does not say otherwise."""
    monkeypatch.setattr(prefix_sharing, "LEAST", 1)


@pytest.fixture(scope="session", autouse=True)
def cheap_collections():
    """`Trainer.train` collects garbage; without the imported libraries in it that takes no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer(VOCABULARY)


def make_model(kind: str = "qwen3", seed: int = 0) -> Any:
    sizes = {
        "vocab_size": len(VOCABULARY) + 5,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    return Qwen3ForCausalLM(Qwen3Config(head_dim=16, **sizes))


@torch.no_grad()
def fill_in_logprobs(groups: dict[str, list[Episode]], model: Any, temperature: float = 1.0) -> None:
    """Set the log-probs that `model` gives to what every turn says it sampled."""
    for episode in (episode for episodes in groups.values() for episode in episodes):
        for turn in episode.turns:
            whole = torch.tensor([turn.prompt_ids + turn.completion_ids])
            logp = (model(whole).logits[0] / temperature).log_softmax(-1)
            at = range(len(turn.prompt_ids) - 1, whole.shape[1] - 1)
            turn.logprobs = [logp[i, token].item() for i, token in zip(at, turn.completion_ids, strict=True)]


def ids(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randint(FIRST, LAST) for _ in range(rng.randint(low, high))]


def single_turn(task: Task, rng: random.Random, prompt: list[int], reward: float) -> Episode:
    """An episode as it comes from a rollout; its reward is carried in `memory`."""
    completion = ids(rng, 1, 9)
    turn = Turn("answer", list(prompt), completion, [-1.0] * len(completion), "", StopReason.STOP)
    return Episode(task, [turn], memory=str(reward))


def recorded_groups(
    tasks: int, generations: int, seed: int = 0, *, dead: int = 0, begin: Sequence[int] = ()
) -> dict[str, list[Episode]]:
    """Single-turn episodes by task id; in the last `dead` groups all rewards are equal. Prompts begin with `begin`."""
    rng = random.Random(seed)
    groups = {}
    for number in range(tasks):
        task = Task(f"w{number}", (), ())
        prompt = [*begin, *ids(rng, 3, 12)]
        rewards = [rng.choice([0.0, 0.25, 1.0]) for _ in range(generations - 2)] + [0.0, 1.0]
        if number >= tasks - dead:
            rewards = [1.0] * generations
        groups[task.id] = [single_turn(task, rng, prompt, reward) for reward in rewards]
    return groups


class ReplayAgent:
    """An agent that returns recorded episodes, one after another for each task.

    `skip` are the episodes of the very first task that another rank replays.
    """

    def __init__(self, groups: dict[str, list[Episode]], skip: int = 0) -> None:
        self.groups = groups
        self.next: dict[str, int] = defaultdict(int)
        self.skip = skip

    async def run(self, task: Task, policy: Any, store: Any = None) -> Episode:
        own = self.groups[task.id]
        if not self.next:
            self.next[task.id] = self.skip
        episode = copy.deepcopy(own[self.next[task.id] % len(own)])
        self.next[task.id] += 1
        return episode


def recorded_reward() -> WeightedDimension:
    function = RewardDimension(
        "recorded", lambda e: None if e.memory == "None" else float(e.memory), float("-inf"), float("inf")
    )
    return WeightedDimension("recorded", function, 1.0)


@reward(scope="group")
def rank_in_group(episodes: list[Episode]) -> list[float]:
    """Share of the group that has less: right only where the whole group is seen."""
    values = [float(episode.memory) for episode in episodes]
    return [sum(other < value for other in values) / len(values) for value in values]


@reward(scope="turn")
async def brevity(episode: Episode, turn: Turn) -> float:
    await asyncio.sleep(0)
    return 1 / len(turn.completion_ids)


EVERY_SCOPE = [WeightedDimension("rank", rank_in_group, 0.5), WeightedDimension("brevity", brevity, 1.0)]


class KeepGradients(TrainerCallback):
    """Copies the gradient of every optimizer step, just before the optimizer uses it."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if p.grad is None else p.grad).detach().flatten().clone()
                    for p in model.parameters()
                    if p.requires_grad
                ]
            )
        )


def config(folder: Any, **options: Any) -> EpisodeGRPOConfig:
    values = {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_completion_length": 16,
        "seed": 3,
    }
    return EpisodeGRPOConfig(**(values | options))


class Ours(EpisodeGRPOTrainer):
    """Ours, unchanged; only the list of losses is kept."""

    losses: list[float]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


class Theirs(GRPOTrainer):
    """TRL's, unchanged; only the list of losses is kept."""

    losses: list[float]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


def step_of_ours(
    groups: dict[str, list[Episode]],
    model: Any,
    tokenizer: Any,
    folder: Any,
    *,
    budget: int = 16384,
    assigner: str = "broadcast",
    dimensions: Sequence[WeightedDimension] = (),
    peft_config: Any = None,
    **options: Any,
) -> tuple[list[torch.Tensor], Ours]:
    """Gradients of the optimizer steps our trainer makes on recorded episodes, and the trainer."""
    tasks = [episodes[0].task for episodes in groups.values()]
    args, generations = config(folder, **options), options["num_generations"]
    parts = Parts(
        ReplayAgent(groups, skip=int(os.environ.get("RANK", 0)) * args.per_device_train_batch_size % generations),
        tasks,
        tasks[:1],
        RewardSystem([recorded_reward(), *dimensions], WeightedSum(), CreditSection(assigner=assigner)),
        rollout=RolloutSection(train_token_budget=budget, max_failed_share=1.0),
    )
    keep = KeepGradients()
    trainer = Ours(
        parts,
        model,
        args,
        processing_class=tokenizer,
        callbacks=[keep],
        peft_config=peft_config,
    )
    trainer.train()
    return keep.steps, trainer


def step_of_trl(
    groups: dict[str, list[Episode]],
    model: Any,
    tokenizer: Any,
    folder: Any,
    *,
    peft_config: Any = None,
    **options: Any,
) -> tuple[list[torch.Tensor], Theirs]:
    """The same by `trl.GRPOTrainer`, fed through its own `rollout_func`. Single-turn episodes only."""
    turn_of: dict[str, int] = defaultdict(int)

    def rollout(prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        episodes = []
        for prompt in prompts:
            episodes.append(groups[prompt][turn_of[prompt] % len(groups[prompt])])
            turn_of[prompt] += 1
        return {
            "prompt_ids": [list(e.turns[0].prompt_ids) for e in episodes],
            "completion_ids": [list(e.turns[0].completion_ids) for e in episodes],
            "logprobs": None,
            "value": [float(e.memory) for e in episodes],
        }

    def reward(completions: Any, value: list[float], **columns: Any) -> list[float]:
        return value

    keep = KeepGradients()
    trainer = Theirs(
        model=model,
        reward_funcs=[reward],
        args=config(folder, **options),
        train_dataset=Dataset.from_dict({"prompt": list(groups)}),
        processing_class=tokenizer,
        rollout_func=rollout,
        callbacks=[keep],
        peft_config=peft_config,
    )
    trainer.train()
    return keep.steps, trainer


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Length of the difference over the length of the longer one: covers norm and direction."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / torch.maximum(a.norm(), b.norm()))


def step_alone(case: dict[str, Any], tokenizer: Any, folder: Any) -> torch.Tensor:
    """Gradient of one process on all episodes of a case of `rank_jobs`."""
    options = dict(case["options"])
    options["per_device_train_batch_size"] *= 2
    steps, _ = step_of_ours(
        recorded_groups(**case["groups"]),
        make_model(),
        tokenizer,
        folder,
        budget=case["budget"],
        dimensions=EVERY_SCOPE if case["every_scope"] else (),
        **options,
    )
    return steps[0]


class Bench:
    """The functions above, handed to tests as one fixture."""

    make_model = staticmethod(make_model)
    groups = staticmethod(recorded_groups)
    ours = staticmethod(step_of_ours)
    trl = staticmethod(step_of_trl)
    alone = staticmethod(step_alone)
    relative = staticmethod(relative)
    config = staticmethod(config)
    ids = staticmethod(ids)
    fill_in_logprobs = staticmethod(fill_in_logprobs)
    ReplayAgent = ReplayAgent
    KeepGradients = KeepGradients
    recorded_reward = staticmethod(recorded_reward)
    every_scope = EVERY_SCOPE


class Pairs:
    """Results of the pairs of processes, each started when a test first asks for it."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self.folders = folders
        self._done: dict[str, tuple[Path, dict[str, Any] | BaseException]] = {}

    def __getitem__(self, pair: str) -> tuple[Path, dict[str, Any]]:
        """Folder of the pair's runs, and what each job came to, by name."""
        from tests.engines import engine_python
        from tests.train.launching import run_jobs
        from tests.train.rank_jobs import JOBS

        if pair not in self._done:
            python = engine_python("deepspeed") if pair == "zero" else sys.executable
            folder = self.folders.mktemp(pair)
            try:
                self._done[pair] = folder, run_jobs(JOBS[pair], pair, folder, python)
            except BaseException as error:
                self._done[pair] = folder, error  # for every test of this pair, which is not started again
        folder, results = self._done[pair]
        if isinstance(results, BaseException):
            raise results
        return folder, results


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(tmp_path_factory)


@pytest.fixture(scope="session")
def bench() -> type[Bench]:
    return Bench
