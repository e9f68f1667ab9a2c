"""`rollout.engine: async` on a CPU: TRL's asynchronous trainer and a real vLLM server that samples meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from vllm_serving import ask, fresh_logprobs, prompts

from memfactory.policy.vllm_needs import BASE
from memfactory.policy.vllm_policy import LOOP
from memfactory.policy.vllm_server import VLLMServer

pytestmark = pytest.mark.slow

STEPS = 4
REWARD = '''"""A reward that tells episodes of an untrained model apart."""

from memfactory import reward


@reward
def even(episode):
    """Share of tokens with an even id."""
    ids = [id for turn in episode.turns for id in turn.completion_ids]
    return sum(id % 2 == 0 for id in ids) / len(ids)
'''


def test_a_turn_ends_with_the_adapter_it_began_with(serving: Any) -> None:
    """Two adapters at a real server at once: log-probs of each turn are those of the version it carries."""
    models = [serving.model(seed=version) for version in range(2)]
    with closing(serving.policy("beside")) as policy:  # what it leaves would be in the way of other tests
        policy.pool.beside = True
        with ThreadPoolExecutor(1) as threads:
            for before in (0, 2, 4, 6):  # on a busy machine the update may come late
                policy.use(models[0], before)
                old_name = policy.pool.weights.name
                old = threads.submit(ask, policy.apart(), prompts(96), 450)  # they take longer than the update
                while not policy.pool._places[0].under_way[old_name]:
                    time.sleep(0.01)
                policy.use(models[1], before + 1)
                if policy.pool._places[0].under_way[old_name]:
                    break
                old.result()
            else:
                pytest.fail("nothing of the old version was under way any more")
            new = ask(policy, prompts(4), 20)
            turns = [*old.result(), *new]
        assert {turn.policy_version for turn in new} == {before + 1}
        assert {turn.policy_version for turn in turns[:96]} == {before}
        for turn in turns:
            apart = torch.tensor(turn.logprobs) - fresh_logprobs(models[turn.policy_version % 2], turn)
            assert apart.abs().max() < 1e-4
        assert policy.pool.difference < 1e-4
        policy.use(models[0], before + 2)
        held = LOOP.start(policy.pool.servers[0].models()).result()
        assert old_name not in {model["id"] for model in held}, "nobody needs it any more"


def recipe_for(serving: Any, folder: Path) -> Path:
    (folder / "even.py").write_text(REWARD)
    data = serving.recipe().dump()
    data |= {
        "agent": {"name": "memagent", "prompt": "words", "answer_format": "plain"}
        | {"max_memory_tokens": 6, "max_answer_tokens": 4},
        "environment": {"name": "fact_words", "train_tasks": 8, "test_tasks": 2},
        "rewards": [{"name": f"{folder / 'even.py'}:even"}],
        "eval": {"metric": "answer.exact_match", "greedy": False},
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "max_grad_norm": 1.0,
        },
        "output_dir": str(folder / "run"),
    }
    data["rollout"] |= {"engine": "async", "async_grpo": {"max_staleness": 1}, "train_token_budget": 512}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_training_while_a_server_samples(serving: Any, tmp_path: Path) -> None:
    """Ratios are 1 where nothing has changed since, no turn is older than asked, every server shows the weights."""
    script = Path(__file__).with_name("async_on_cpu.py")
    done = subprocess.run(
        [sys.executable, str(script), "train", str(recipe_for(serving, tmp_path))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["stopped"], summary["steps"]) == ("finished", STEPS)
    assert {"before", "after"} <= summary.keys()
    lines: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["values"] for line in lines if line["phase"] == "train"]
    assert len(steps) == STEPS
    for step in steps:
        assert step["sample/staleness_max"] <= 1
        assert step["sample/dropped_stale_total"] == 0
        assert 0 < step["server/canary_difference"] < 1e-4, "drawn from the weights that are trained"
        assert step["server/requests"] > 0
        assert step["grad_norm"] > 0
    first, *later = steps
    assert first["sample/staleness_max"] == 0
    assert abs(first["ratio"] - 1) < 1e-3
    assert abs(first["kl"]) < 1e-6
    assert any(step["sample/staleness_mean"] > 0 for step in later), "nothing was sampled while it trained"
    assert any(abs(step["kl"]) > 1e-7 for step in later), "weights that did not move show nothing"
    ledger = summary["ledger"]
    assert ledger["issued"] == ledger["trained"] + sum(ledger["dropped"].values()) == 2 * STEPS
    episodes = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    assert {episode["step"] for episode in episodes if episode["split"] == "train"} == {1, 2, 3, 4}
    assert (run / "report.html").is_file()
    assert (run / "model" / "adapter_config.json").is_file()
    models = LOOP.start(VLLMServer(serving.url, serving.recipe().rollout.vllm).models()).result()
    assert [model["id"] for model in models] == [BASE], "adapters of the run are still loaded"
