"""A server that does not fit the recipe is told before a model is loaded, with what to type."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from faulty import FaultyServer

from memfactory.cli.recipes import find_recipe
from memfactory.errors import EngineError
from memfactory.policy.vllm_server import VLLMServer
from memfactory.train.prepare import prepare
from memfactory.train.run import train
from memfactory.train.serving import check


class Root(FaultyServer):
    """One that also says which model it serves."""

    def __init__(self, root: str, **changes: Any) -> None:
        super().__init__(**changes)
        self.root = root

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = super()._answer(path, body)
        if path == "/v1/models":
            answer["data"][0]["root"] = self.root
        return status, answer


def started(server: FaultyServer, folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
    """What a run says that finds `server`."""
    monkeypatch.setattr("memfactory.train.run.load_tokenizer", lambda *_: pytest.fail("a model is loaded"))
    asked = [f"output_dir={folder}", f"rollout.vllm.base_urls=[{server.url}]", *overrides]
    with pytest.raises(EngineError) as caught:
        train(prepare(find_recipe("memagent/quickstart-vllm"), asked))
    assert not (folder / "recipe.yaml").exists()
    return str(caught.value)


def test_too_few_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyServer() as server:
        told = started(server, tmp_path / "run", monkeypatch, "rollout.vllm.max_model_len=1024")
    assert "takes 512 positions" in told
    assert "--max-model-len 1024" in told


def test_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Root("org/other") as server:
        told = started(server, tmp_path / "run", monkeypatch)
    assert "org/other" in told
    assert f"--model {tmp_path / 'run' / 'initial'}" in told


@pytest.mark.parametrize("version", ["0.25.1", "0.32.0", "1.0"])
def test_a_version_that_was_not_tested(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyServer() as server:
        server.version = version
        told = started(server, tmp_path / "run", monkeypatch)
    assert f"runs vLLM {version}" in told
    assert "pip install" in told


FITS = {"lora_config": {"max_lora_rank": 16}, "model_config": {"logprobs_mode": "LogprobsMode.PROCESSED_LOGPROBS"}}


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"model_config": {"logprobs_mode": "raw_logprobs"}}, "--logprobs-mode processed_logprobs"),
        ({"lora_config": None}, "--enable-lora --max-lora-rank 16"),
        ({"lora_config": {"max_lora_rank": 8}}, "--max-lora-rank 16"),
    ],
)
def test_a_flag_that_is_missing(
    changes: dict[str, Any], flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyServer() as server:
        server.info = FITS | changes
        told = started(server, tmp_path / "run", monkeypatch, "model.lora={r: 16}")
    assert f"missing: {flag}" in told


def test_too_few_places_for_the_adapters_of_an_asynchronous_run() -> None:
    recipe = prepare(find_recipe("memagent/quickstart-vllm"), ["rollout.engine=async"], splits=()).recipe
    with FaultyServer() as server:
        server.info = FITS | {"lora_config": {"max_lora_rank": 64, "max_loras": 2}}
        with pytest.raises(EngineError, match="missing: --max-loras 6"):
            check(VLLMServer(server.url, recipe.rollout.vllm), recipe, Path())


def test_whole_weights_and_a_server_without_its_development_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyServer() as server:
        told = started(server, tmp_path / "run", monkeypatch, "model.lora=null")
    assert "start it with VLLM_SERVER_DEV_MODE=1" in told


def test_a_server_of_several_engines_says_so() -> None:
    recipe = prepare(find_recipe("memagent/quickstart-vllm"), [], splits=()).recipe
    with FaultyServer() as server:
        server.engines = 3
        assert check(VLLMServer(server.url, recipe.rollout.vllm), recipe, Path()).engines == 3
