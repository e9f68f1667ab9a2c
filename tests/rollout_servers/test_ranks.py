"""Two training processes and one real vLLM server: both sample from it, one sends, and they end as one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from vllm_serving import START, left_over

from memfactory.policy.vllm_needs import BASE
from memfactory.policy.vllm_policy import LOOP
from memfactory.policy.vllm_server import VLLMServer
from tests.engines import engine_python
from tests.train.launching import job, run_jobs

pytestmark = pytest.mark.slow
STEPS = 2
ENGINES = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def ran(serving: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks saw of their runs under an engine; each pair of processes is started once."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}
    options = [*serving.training(), f"train.max_steps={STEPS}", "train.per_device_train_batch_size=6"]

    def of(engine: str) -> tuple[Path, dict[str, Any]]:
        if engine not in done:
            folder = tmp_path_factory.mktemp(engine)
            jobs = {"run": job("served", engine=engine, overrides=options, folder="run")}
            if engine == "ddp":
                jobs["spoilt"] = job("served", engine=engine, overrides=options, folder="spoilt", spoil=1)
            done[engine] = folder, run_jobs(jobs, engine, folder, sys.executable)
        return done[engine]

    return of


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_samples_from_the_weights_of_now(ran, engine):
    first, second = ran(engine)[1]["run"]
    assert (first["ending"], second["ending"]) == ("none", "none")
    for rank in (first, second):
        assert [step["versions"] for step in rank["steps"]] == [[version] for version in range(STEPS)]
        assert all(step["turns"] for step in rank["steps"])
    for here, there in zip(first["steps"], second["steps"], strict=True):
        assert here["adapter"] == there["adapter"], "the ranks ask for different adapters"
        assert here["turns"] != there["turns"] or here["completions"] != there["completions"]
        assert 0 < here["difference"] < 1e-3, "the canary was not compared, or is far off"
        assert there["difference"] == 0, "the second rank sends, too"
    assert len({step["adapter"] for step in first["steps"]}) == STEPS


@pytest.mark.parametrize("engine", ENGINES)
def test_what_servers_did_for_all_ranks_is_in_the_log(ran, engine):
    folder, results = ran(engine)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["values"] for line in lines if line["phase"] == "train"]
    assert len(steps) == STEPS
    for number, values in enumerate(steps):
        drawn = [ids for rank in results["run"] for ids in rank["steps"][number]["completions"]]
        assert values["server/requests"] >= len(drawn)
        assert values["server/completion_tokens"] >= sum(len(ids) for ids in drawn)
        assert values["server/canary_difference"] == results["run"][0]["steps"][number]["difference"]


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_and_adapters_are_the_same_on_both(ran, engine):
    folder, results = ran(engine)
    first, second = results["run"]
    assert len(first["gradients"]) == STEPS
    for here, there in zip(first["gradients"], second["gradients"], strict=True):
        assert here.norm() > 1e-6
        assert torch.equal(here, there)
    assert first["adapter"].keys() == second["adapter"].keys()
    for name, value in first["adapter"].items():
        assert torch.equal(value, second["adapter"][name]), name
    saved = load_file(folder / "run" / "model" / "adapter_model.safetensors")
    assert all(torch.equal(value, first["adapter"][name]) for name, value in saved.items())
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in saved.items())


def test_an_adapter_the_server_cannot_read_ends_both_ranks_alike(ran, serving):
    first, second = ran("ddp")[1]["spoilt"]
    assert first["ending"] == second["ending"]
    assert first["ending"].startswith("EngineError: ")
    assert "did not load the adapter" in first["ending"]
    assert len(first["steps"]) == 1, "it was not the second adapter"
    server = VLLMServer(serving.url, serving.recipe().rollout.vllm)
    assert [model["id"] for model in LOOP.start(server.models()).result()] == [BASE], "adapters are left"


def test_each_rank_with_a_server_of_its_own(make_serving, tmp_path, monkeypatch):
    """Colocated: the first rank writes the adapter, and both send it, each to its own server."""
    monkeypatch.setenv("MEMFACTORY_VLLM_PYTHON", engine_python("vllm"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # both would take the first core
    options = make_serving().training(mode="colocate", outage=START)
    options += [f"train.max_steps={STEPS}", "train.per_device_train_batch_size=6"]
    jobs = {"run": job("served", engine="ddp", overrides=options, folder="run")}
    first, second = run_jobs(jobs, "ddp", tmp_path, sys.executable)["run"]
    assert (first["ending"], second["ending"]) == ("none", "none")
    for here, there in zip(first["steps"], second["steps"], strict=True):
        assert here["adapter"] == there["adapter"]
        assert here["server"] != there["server"]
        for rank in (here, there):
            assert rank["turns"]
            assert rank["versions"] == [rank["step"]]
            assert 0 < rank["difference"] < 1e-3, "its server was not compared, or is far off"
    for here, there in zip(first["gradients"], second["gradients"], strict=True):
        assert torch.equal(here, there)
    assert not left_over(tmp_path / "run"), "a server is left"
