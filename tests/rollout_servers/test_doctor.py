"""`memfactory doctor RECIPE` against a server that fails as told; against a real one: `test_server.py`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from faulty import FaultyServer

from memfactory.doctor.check import Level
from memfactory.policy.vllm_needs import SERVED


def test_a_version_that_was_not_tested_is_told(make_serving, tmp_path):
    with FaultyServer() as server:
        server.version = "0.20.1rc2"
        (check,) = make_serving().doctor(tmp_path, f"rollout.vllm.base_urls=[{server.url}]").checks()
    assert check.level is Level.WRONG
    assert "runs vLLM 0.20.1rc2" in check.found
    assert "memfactory[gpu]" in check.fix


def test_nothing_is_left_behind_where_scoring_fails(make_serving, tmp_path):
    def fault(server: FaultyServer, path: str, body: dict[str, Any], number: int) -> int | None:
        return 500 if "prompt_logprobs" in body else None

    with FaultyServer(fault) as server:
        urls = f"rollout.vllm.base_urls=[{server.url}]"
        fits, sync, agreement = make_serving().doctor(tmp_path, urls, "rollout.vllm.attempts=1").checks()
        loads = [path for path, _ in server.seen if path == "/v1/load_lora_adapter"]
        assert loads
        assert not server.adapters
    assert fits.level is Level.NOTE, "it does not show its flags"
    assert (sync.level, agreement.level) == (Level.WRONG, Level.WRONG)
    assert not (tmp_path / "run").exists()


class Whole(FaultyServer):
    """One that is sent all weights. As vLLM 0.31 it is of no use after a failed attempt, until one succeeds."""

    broken = False

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/weight_info":
            return 200, {"weight_version": "default"}
        if path == "/collective_rpc":
            self.broken = "/adapters/" in body["kwargs"]["weights_path"]  # a folder that it does not see
            return (500, {"error": {"message": "Cannot find any model weights"}}) if self.broken else (200, {})
        if path in ("/pause", "/resume", "/reset_prefix_cache", "/update_weight_version"):
            return 200, {"success": True}
        if self.broken:
            return 500, {"error": {"message": "EngineDeadError"}}
        return super()._answer(path, body)


def test_a_server_that_does_not_see_the_folder_of_weights_is_told_and_left_as_it_was(make_serving, tmp_path):
    serving = make_serving()
    serving.lora = False
    (tmp_path / "run").mkdir()
    shutil.copytree(serving.folder / "base", tmp_path / "run" / SERVED)
    with Whole() as server:
        doctor = serving.doctor(tmp_path, f"rollout.vllm.base_urls=[{server.url}]", "rollout.vllm.attempts=1")
        _, sync, agreement = doctor.checks()
        loaded = [body["kwargs"]["weights_path"] for path, body in server.seen if path == "/collective_rpc"]
    assert sync.level is Level.WRONG
    assert "rollout.vllm.adapters" in sync.fix
    assert Path(loaded[0]).parent == tmp_path / "run" / "adapters"
    assert loaded[1:] == [str(tmp_path / "run" / SERVED)], "the weights it had are not given back"
    assert "nats apart" in agreement.found, "it could not be scored any more"
    assert not (tmp_path / "run" / "adapters").exists()
