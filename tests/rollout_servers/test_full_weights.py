"""All weights are trained: a real vLLM server loads them again after every update, and never answers from others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from vllm_serving import START, WORDS, Serving, ask, fresh_logprobs, prompts

from memfactory.doctor.check import Level
from memfactory.errors import EngineError
from memfactory.policy.models import load_checkpoint
from memfactory.policy.tiny import tiny_tokenizer
from memfactory.policy.vllm_needs import SERVED
from memfactory.policy.vllm_policy import LOOP
from memfactory.policy.vllm_pool import Canary, Weights
from memfactory.policy.vllm_server import STARTED_WITH, VLLMServer
from memfactory.train.start import save_whole
from memfactory.train.weight_sync import FullWeightSync, canary_ids, score

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def full(make_serving) -> Iterator[Serving]:
    """A server of what the trainer saves for servers: the tied base model with a head of its own."""
    made = make_serving()
    made.lora = False
    base = load_checkpoint(made.folder / "base", made.recipe().model)
    assert base.config.tie_word_embeddings
    (made.folder / "run").mkdir()
    save_whole(base, tiny_tokenizer(WORDS), made.folder / "run" / SERVED, untied=True)
    with made.server() as server:
        server.wait_healthy(START)
        yield made


def model_of(serving: Serving, seed: int, scale: float = 0.05) -> Any:
    """The base model after an update that `seed` decides."""
    model = load_checkpoint(serving.folder / "base", serving.recipe().model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * torch.randn(weight.shape, generator=draw)
    return model.eval()


def test_doctor_loads_the_weights_it_was_started_with_once_more(full, tmp_path, monkeypatch):
    """By way of the folder for those to come; with a folder that the server does not see it says what to set."""
    server = VLLMServer(full.url, full.recipe().rollout.vllm)
    LOOP.start(server.reload(STARTED_WITH, str(full.folder / "run" / SERVED))).result()
    doctor = full.doctor(tmp_path, f"output_dir={full.folder / 'run'}")
    fits, sync, agreement = doctor.checks()
    assert [check.level for check in (fits, sync, agreement)] == [Level.OK] * 3, (fits, sync, agreement)
    assert str(full.folder / "run" / "adapters") in sync.found
    assert not list((full.folder / "run").glob("adapters/.doctor*")), "folders it made are left"
    reload = VLLMServer.reload

    def unseen(server: VLLMServer, name: str, path: str) -> Any:
        return reload(server, name, path.replace("/adapters/", "/adapters of another machine/"))

    with monkeypatch.context() as patched:
        patched.setattr(VLLMServer, "reload", unseen)
        _, sync, agreement = doctor.checks()
    assert sync.level is Level.WRONG
    assert "rollout.vllm.adapters" in sync.fix
    assert agreement.level is Level.OK, "the server was spoilt"
    assert [check.level for check in doctor.checks()] == [Level.OK] * 3


def test_doctor_leaves_the_weights_of_a_run_alone(full, tmp_path):
    with closing(full.policy()) as policy:
        policy.use(model_of(full, 3), 0)
        _, sync, _ = full.doctor(tmp_path, f"output_dir={full.folder / 'run'}").checks()
        assert sync.level is Level.NOTE
        assert policy.pool.weights.name in sync.found
        policy.confirm()


def test_every_version_is_sampled_as_it_is(full):
    policy = full.policy()
    server = VLLMServer(full.url, full.recipe().rollout.vllm)
    asked, told = prompts(3, words=300) * 2, []
    for version in range(3):
        model = model_of(full, version)
        policy.use(model, version)
        policy.seed(0)  # the same draws of the same prompts: what is cached would be used again
        turns = ask(policy, asked)
        assert max((torch.tensor(t.logprobs) - fresh_logprobs(model, t)).abs().max() for t in turns) < 1e-4
        assert {turn.policy_version for turn in turns} == {version}
        policy.confirm()
        told.append(LOOP.start(server.weight_version()).result())
        assert policy.pool.difference < 1e-4
    assert len(set(told)) == 3
    assert [file.name for file in (full.folder / "run" / "adapters").iterdir()] == told[-1:], "old weights pile up"
    policy.close()


def test_a_server_that_was_started_anew_between_two_turns_is_told(full):
    """It answers to the same name, with the weights it began with."""
    policy = full.policy()
    policy.use(model_of(full, 4), 0)
    server = VLLMServer(full.url, full.recipe().rollout.vllm)
    LOOP.start(server.reload("default", str(full.folder / "run" / SERVED))).result()
    assert ask(policy, prompts(1)), "nothing in the reply says so"
    with pytest.raises(EngineError, match=r"started anew.*'default' and not 'memfactory-served-"):
        policy.confirm()
    policy.use(model_of(full, 4), 1)
    policy.confirm()
    policy.close()


def test_weights_that_are_one_update_old_are_told(full):
    policy = full.policy()
    policy.use(model_of(full, 5), 0)
    old = policy.pool.weights
    assert old is not None
    ids = canary_ids(policy.tokenizer)
    now, before = (score(model_of(full, 5, scale), ids) for scale in (0.0501, 0.05))
    again = Weights(f"{policy.pool.family}again", old.path, whole=True)
    with pytest.raises(EngineError, match="from those before the update"):
        LOOP.start(policy.pool.publish(again, Canary(ids, now, before, tolerance=0.05))).result()
    policy.close()


def test_a_folder_the_server_does_not_see_names_the_setting(full, tmp_path):
    """And the server, which was paused for it, goes on."""
    policy = full.policy()
    policy.use(model_of(full, 6), 0)
    gone = Weights(f"{policy.pool.family}gone", str(tmp_path / "not there"), whole=True)
    with pytest.raises(EngineError, match=r"rollout\.vllm\.adapters"):
        LOOP.start(policy.pool.publish(gone, None)).result()
    policy.use(model_of(full, 6), 1)
    assert ask(policy, prompts(2))
    policy.close()


def test_a_prefix_cache_that_was_not_emptied_is_told(full, monkeypatch):
    """New weights that are loaded without emptying the cache: scores are right, and turns would be wrong."""

    async def reload(server: VLLMServer, name: str, path: str) -> None:
        wanted = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        await server._quick("POST", "/collective_rpc", wanted)
        await server._quick("POST", "/update_weight_version", {"new_version": name})

    policy = full.policy()
    policy.use(model_of(full, 7), 0)
    with monkeypatch.context() as patched:
        patched.setattr(VLLMServer, "reload", reload)
        with pytest.raises(EngineError, match=r"the prefix cache of .* does not sample from the weights"):
            policy.use(model_of(full, 8), 1)
    policy.close()


def test_a_head_that_stays_behind_its_embedding_is_told(full, monkeypatch):
    """What vLLM 0.31 does with tied weights that are loaded again, and why servers get a head of its own."""
    policy = full.policy()
    policy.use(model_of(full, 9), 0)
    old = model_of(full, 9).state_dict()["lm_head.weight"]
    write = FullWeightSync.write
    behind = lambda own, model, state, folder: write(own, model, state | {"lm_head.weight": old}, folder)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(FullWeightSync, "write", behind)
        with pytest.raises(EngineError, match="does not sample from the weights that are trained"):
            policy.use(model_of(full, 10), 1)
    policy.close()
