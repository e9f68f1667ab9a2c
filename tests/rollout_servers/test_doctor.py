"""`memfactory doctor RECIPE` against a server that fails as told; against a real one: `test_server.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from faulty import FaultyServer

from memfactory.doctor.check import Level


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
