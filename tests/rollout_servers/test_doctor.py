"""`memfactory doctor RECIPE` against servers: a real one, one of another model, and one that fails as told."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from faulty import FaultyServer
from vllm_serving import SHAPE, WORDS

from memfactory.doctor.check import Level
from memfactory.doctor.served import Served
from memfactory.policy.tiny import tiny_model, tiny_tokenizer
from memfactory.policy.vllm_needs import BASE
from memfactory.policy.vllm_policy import LOOP
from memfactory.policy.vllm_server import VLLMServer
from memfactory.train.prepare import prepare


def looked(serving: Any, folder: Path, *overrides: str) -> Served:
    """At the servers of a recipe, by way of its file."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(serving.recipe().dump()))
    options = [f"output_dir={folder / 'run'}", *overrides]
    return Served(prepare(recipe, options, splits=()), "recipe.yaml")


def held(url: str, serving: Any) -> list[str]:
    server = VLLMServer(url, serving.recipe().rollout.vllm)
    return [model["id"] for model in LOOP.start(server.models()).result()]


@pytest.mark.slow
def test_a_server_that_fits_agrees_and_takes_an_adapter(serving, tmp_path):
    fits, sync, agreement = looked(serving, tmp_path).checks()
    assert [check.level for check in (fits, sync, agreement)] == [Level.OK] * 3, (fits, sync, agreement)
    assert "vLLM 0." in fits.found
    assert "up to 512 positions" in fits.found
    assert "zeros" in sync.found
    assert "here" in agreement.found
    assert "there" in agreement.found
    assert held(serving.url, serving) == [BASE]
    assert not (tmp_path / "run").exists(), "folders it made are left"


@pytest.mark.slow
def test_a_server_of_another_model_is_told(serving, tmp_path):
    (check,) = looked(serving, tmp_path, "model.name=org/other").checks()
    assert check.level is Level.WRONG
    assert "serves another model" in check.found
    assert "--model org/other" in check.fix


@pytest.mark.slow
def test_a_server_of_other_weights_is_told_by_its_log_probs(serving, tmp_path):
    """The folder has the right name, and other weights than the server loaded from it."""
    base, kept = serving.folder / "base", serving.folder / "kept"
    base.rename(kept)
    try:
        shutil.copytree(kept, base)
        tiny_model(SHAPE, tiny_tokenizer(WORDS), 1).save_pretrained(base)
        fits, sync, agreement = looked(serving, tmp_path).checks()
    finally:
        shutil.rmtree(base)
        kept.rename(base)
    assert (fits.level, sync.level, agreement.level) == (Level.OK, Level.OK, Level.WRONG)
    assert "canary_tolerance" in agreement.fix
    assert held(serving.url, serving) == [BASE]


def test_a_version_that_was_not_tested_is_told(make_serving, tmp_path):
    serving = make_serving()
    with FaultyServer() as server:
        server.version = "0.20.1rc2"
        (check,) = looked(serving, tmp_path, f"rollout.vllm.base_urls=[{server.url}]").checks()
    assert check.level is Level.WRONG
    assert "runs vLLM 0.20.1rc2" in check.found
    assert "memfactory[gpu]" in check.fix


def test_nothing_is_left_behind_where_scoring_fails(make_serving, tmp_path):
    def fault(server: FaultyServer, path: str, body: dict[str, Any], number: int) -> int | None:
        return 500 if "prompt_logprobs" in body else None

    serving = make_serving()
    with FaultyServer(fault) as server:
        urls = f"rollout.vllm.base_urls=[{server.url}]"
        fits, sync, agreement = looked(serving, tmp_path, urls, "rollout.vllm.attempts=1").checks()
        loads = [path for path, _ in server.seen if path == "/v1/load_lora_adapter"]
        assert loads
        assert not server.adapters
    assert fits.level is Level.NOTE, "it does not show its flags"
    assert (sync.level, agreement.level) == (Level.WRONG, Level.WRONG)
    assert not (tmp_path / "run").exists()
