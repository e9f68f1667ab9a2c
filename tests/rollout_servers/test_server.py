"""A real vLLM server samples from the weights that are trained: exactly those, and nothing else without an error."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

from vllm_serving import SHAPE, WORDS, ask, fresh_logprobs, prompts

from memfactory.doctor.check import Level
from memfactory.episode import StopReason
from memfactory.errors import EngineError
from memfactory.evaluate.job import Asked, run_evaluation
from memfactory.policy.base import Sampling
from memfactory.policy.models import load_checkpoint
from memfactory.policy.tiny import tiny_model, tiny_tokenizer
from memfactory.policy.vllm_needs import BASE
from memfactory.policy.vllm_policy import LOOP
from memfactory.policy.vllm_pool import Canary, Weights
from memfactory.policy.vllm_server import VLLMServer
from memfactory.train.callbacks import progress_bar
from memfactory.train.prepare import prepare
from memfactory.train.serving import served
from memfactory.train.start import load_policy
from memfactory.train.weight_sync import AdapterSync, canary_ids, score

pytestmark = pytest.mark.slow


def held(serving: Any) -> set[str]:
    """Names of what the server serves."""
    return {
        model["id"] for model in LOOP.start(VLLMServer(serving.url, serving.recipe().rollout.vllm).models()).result()
    }


def test_every_version_is_sampled_as_it_is(serving):
    """Adapters follow each other; log-probs are those of a fresh forward pass, and old adapters are gone."""
    policy = serving.policy("versions")
    seen = set()
    for version in range(3):
        model = serving.model(seed=version)
        policy.use(model, version)
        policy.seed(version)
        turns = ask(policy, prompts(4) * 2)
        apart = [(torch.tensor(turn.logprobs) - fresh_logprobs(model, turn)).abs().max() for turn in turns]
        assert max(apart) < 1e-4
        assert {turn.policy_version for turn in turns} == {version}
        assert any(turn.stop is StopReason.LENGTH for turn in turns)
        for turn in turns:
            ended = turn.completion_ids[-1] == policy.eos_ids[0]
            assert ended == (turn.stop is StopReason.STOP)
        own = held(serving) - {BASE}
        assert len(own) == 1, "adapters of earlier versions are still loaded"
        assert not own & seen, "a name is used twice: a cache may answer for the older adapter"
        seen |= own
    # the base model for what is frozen on the weights from before training, at the same server
    base = policy.beside(Sampling(1.0), base=True)
    plain = serving.model(seed=None)
    for turn in ask(base, prompts(2)):
        assert (torch.tensor(turn.logprobs) - fresh_logprobs(plain, turn)).abs().max() < 1e-4
    policy.close()
    assert held(serving) == {BASE}


def test_the_canary_of_another_temperature_is_drawn_at_it(serving):
    """And what vLLM reports of draws are the log-probs at that temperature: those that are trained."""
    policy = serving.policy("warm", temperature=0.6)
    model = serving.model(seed=1)
    policy.use(model, 0)
    assert policy.pool.canary.prefixes.temperature == 0.6
    assert len(policy.pool.canary.prefixes.lengths) > 4
    assert 0 < policy.pool.difference < 1e-4
    turn = ask(policy, prompts(1))[0]
    with torch.no_grad():
        ids = torch.tensor([[*turn.prompt_ids, *turn.completion_ids]])
        logits = model(input_ids=ids).logits[0, len(turn.prompt_ids) - 1 : -1] / 0.6
    ours = logits.log_softmax(-1).gather(1, torch.tensor(turn.completion_ids)[:, None])[:, 0]
    assert (torch.tensor(turn.logprobs) - ours).abs().max() < 1e-4
    policy.close()


def test_nothing_is_sent_twice(serving):
    policy = serving.policy("twice")
    policy.use(serving.model(1), 5)
    first = held(serving)
    policy.use(serving.model(1), 5)
    assert held(serving) == first
    policy.close()


def test_draws_follow_seed_prompt_and_repeat_not_the_order_of_requests(serving):
    policy = serving.policy("seeds")
    policy.use(serving.model(3), 0)
    asked = prompts(5)
    policy.seed(7)
    first = [turn.completion_ids for turn in ask(policy, [*asked, asked[0]])]
    assert first[0] != first[-1], "the same prompt twice is drawn twice"
    policy.seed(7)
    again = [turn.completion_ids for turn in ask(policy, [*reversed(asked), asked[0]])]
    assert again[:5] == first[4::-1]
    policy.seed(8)
    assert [turn.completion_ids for turn in ask(policy, asked)] != first[:5]
    policy.close()


def test_shared_prefixes_come_from_the_cache(serving):
    """Members of a group whose prompts begin alike are prefilled once."""
    policy = serving.policy("prefix")
    policy.use(serving.model(2), 0)
    server = VLLMServer(serving.url, serving.recipe().rollout.vllm)
    before = LOOP.start(server.counters()).result()
    long = prompts(1, words=300)[0][0]["content"]
    for member in range(4):  # one after another, so that the first is in the cache
        ask(policy, [[{"role": "user", "content": f"{long} w{member}"}]], max_tokens=2)
    after = LOOP.start(server.counters()).result()
    hits = after["prefix_cache_hits_total"] - before["prefix_cache_hits_total"]
    queries = after["prefix_cache_queries_total"] - before["prefix_cache_queries_total"]
    assert queries >= 4 * 300
    assert hits >= 3 * 256, "two whole blocks of 128 tokens for each of the three that came later"
    policy.close()


def test_a_group_that_asks_at_once_is_prefilled_once_and_the_log_tells(serving):
    """vLLM finds the beginning that a request of the same moment has just been given blocks for."""
    policy = serving.policy("group")
    policy.use(serving.model(2), 0)
    policy.metrics()  # counts from here on
    long = prompts(1, words=310)[0][0]["content"][::-1].replace("w", "")  # of no other test
    words = " ".join(f"w{int(number) % 200}" for number in long.split())
    ask(policy, [[{"role": "user", "content": f"{words} w{member}"}] for member in range(8)], max_tokens=2)
    measured = policy.metrics()["prefix_cache_hit_rate"]
    # the beginning is some 312 tokens, of which whole blocks of 32 can be found: seven of eight find 9 of 9.8 blocks
    assert 7 / 8 * 288 / 330 < measured < 7 / 8
    policy.close()


# ---- never the wrong weights -------------------------------------------------------------------


def test_an_adapter_that_is_one_update_old_is_told(serving, tmp_path):
    """The server reads an old folder under the new name, as with a file system that lags behind."""
    policy = serving.policy("stale")
    sync = policy.push
    assert isinstance(sync, AdapterSync)
    policy.use(serving.model(4), 0)
    old = policy.pool.weights
    assert old is not None
    model = serving.model(4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data *= 1.002  # a small update: far below the tolerance
    ids = canary_ids(policy.tokenizer)
    now, before = score(model, ids), score(serving.model(4), ids)
    canary = Canary(ids, now, before, tolerance=0.05)
    shutil.copytree(old.path, tmp_path / "new")
    with pytest.raises(EngineError, match="from those before the update") as caught:
        LOOP.start(policy.pool.publish(Weights(f"{policy.pool.family}new", str(tmp_path / "new")), canary)).result()
    assert "rollout.vllm.adapters" in str(caught.value)
    policy.close()


def test_other_weights_stop_the_run_with_both_numbers(serving):
    policy = serving.policy("wrong", canary_tolerance=0.01)
    model = serving.model(5)
    with torch.no_grad():
        model.base_model.model.lm_head.weight.mul_(1.1)  # the trainer's base is not the server's
    with pytest.raises(EngineError, match=r"log-probs differ by [0-9.e-]+ on average.*there.*here") as caught:
        policy.use(model, 0)
    assert "serve-rollouts" in str(caught.value)
    policy.close()


def test_spoilt_weights_are_not_sent(serving):
    policy = serving.policy("nan")
    model = serving.model(6)
    next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] = float("nan")
    with pytest.raises(EngineError, match="holds NaN or infinity"):
        policy.use(model, 0)
    assert held(serving) == {BASE}
    policy.close()


def test_an_adapter_of_too_high_a_rank_names_the_flag(serving):
    policy = serving.policy("rank")
    with pytest.raises(EngineError, match="--max-lora-rank"):
        policy.use(serving.model(0, rank=32), 0)
    policy.close()


def test_a_folder_the_server_does_not_see_names_the_setting(serving, tmp_path):
    policy = serving.policy("missing")
    gone = Weights(f"{policy.pool.family}gone", str(tmp_path / "not there"))
    with pytest.raises(EngineError, match=r"rollout\.vllm\.adapters"):
        LOOP.start(policy.pool.publish(gone, None)).result()
    policy.close()


def test_leftovers_of_an_earlier_life_are_cleared_and_others_left_alone(serving, tmp_path):
    first = serving.policy("killed")
    first.use(serving.model(7), 3)
    assert first.pool.weights is not None
    server = VLLMServer(serving.url, serving.recipe().rollout.vllm)
    LOOP.start(server.load("somebody-elses", first.pool.weights.path)).result()
    leftover = first.pool.weights.name  # the trainer is killed here and unloads nothing
    second = serving.policy("killed")
    second.use(serving.model(8), 3)
    assert leftover not in held(serving)
    assert "somebody-elses" in held(serving)
    second.close()
    LOOP.start(server.unload("somebody-elses")).result()
    assert held(serving) == {BASE}


# ---- a server that does not fit ----------------------------------------------------------------


def changed(recipe: Any, **model: Any) -> Any:
    data = recipe.dump()
    data["model"] |= model
    return type(recipe).model_validate(data)


def test_a_server_of_another_model_is_told_before_anything_is_sampled(serving, tmp_path):
    inner = serving.policy("check")
    with pytest.raises(EngineError, match="serves another model") as caught:
        served(changed(serving.recipe(), name="org/other"), inner, tmp_path)
    assert "--model org/other" in str(caught.value)
    with pytest.raises(EngineError, match="--max-lora-rank 64"):
        served(changed(serving.recipe(), lora={"r": 48}), inner, tmp_path)


def test_a_prompt_longer_than_the_server_takes_is_refused_here(serving):
    policy = serving.policy("long")
    policy.use(serving.model(0), 0)
    assert policy.max_positions == 512
    with pytest.raises(EngineError, match=r"does not fit the model.*> 512 positions"):
        ask(policy, prompts(1, words=510))
    policy.close()


def test_nobody_there_says_what_to_type(serving, make_serving, tmp_path):
    nobody = make_serving()
    with pytest.raises(EngineError, match="memfactory serve-rollouts RECIPE"):
        served(nobody.recipe(outage=0), serving.policy("nobody"), tmp_path)


def test_adapters_on_disk_do_not_pile_up(serving):
    policy = serving.policy("disk")
    for version in range(4):
        policy.use(serving.model(version), version)
    folder = serving.folder / "disk" / "adapters"
    left = sorted(place.name for place in folder.iterdir())
    assert len(left) == 2
    assert all(json.loads((folder / name / "adapter_config.json").read_text())["r"] == 8 for name in left)
    policy.close()


# ---- evaluation --------------------------------------------------------------------------------


def test_an_evaluation_asks_for_the_weights_of_its_checkpoint(serving, tmp_path):
    """As `memfactory eval` does; without them the server would answer as the base model."""
    model = serving.model(9)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(serving.recipe().dump() | {"output_dir": str(tmp_path)}))
    routed = load_policy(prepare(tmp_path / "recipe.yaml", splits=()), tmp_path / "model")
    turns = ask(routed, prompts(3))
    assert max((torch.tensor(t.logprobs) - fresh_logprobs(model, t)).abs().max() for t in turns) < 1e-4
    routed.close()


def test_an_evaluation_of_the_base_model_samples_from_it(serving, tmp_path):
    """A recipe with adapters, and weights without one: a server of other weights would be told."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(serving.recipe().dump() | {"output_dir": str(tmp_path)}))
    routed = load_policy(prepare(tmp_path / "recipe.yaml", splits=()), None)
    base = load_checkpoint(serving.folder / "base", serving.recipe().model).eval()
    turns = ask(routed, prompts(3))
    assert max((torch.tensor(t.logprobs) - fresh_logprobs(base, t)).abs().max() for t in turns) < 1e-4
    routed.close()


def test_an_endpoint_writes_what_the_same_weights_write_here(serving, tmp_path):
    """`memfactory eval --endpoint`: the server as any OpenAI-compatible one, beside transformers in the same table."""
    told = serving.recipe().dump() | {"rollout": {}}
    told["model"]["lora"] = None
    told["environment"] |= {"train_tasks": 4, "test_tasks": 6}
    told["agent"] = {"name": "memagent", "prompt": "words", "answer_format": "plain"}
    told["agent"] |= {"max_memory_tokens": 12, "max_answer_tokens": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(told))
    asked = Asked(
        tmp_path / "recipe.yaml", endpoint=f"{serving.url}/v1", model=BASE, checkpoints=[serving.folder / "base"]
    )
    with progress_bar(Console(quiet=True)) as progress:
        done = run_evaluation(asked, tmp_path / "eval", progress)
    # three of one name: the recipe's model, the folder of the served one as a checkpoint, and the server's
    here, there = (row for row in done.rows if row.mode == "greedy" and row.candidate in ("base (2)", "base (3)"))
    texts: dict[str, dict[str, list[str]]] = {}
    for line in map(json.loads, (tmp_path / "eval" / "episodes.jsonl").read_text().splitlines()):
        if line["mode"] == "greedy":
            # an endpoint gives text, with the space before its first word
            said = [turn["text"].strip() for turn in line["turns"]]
            texts.setdefault(line["candidate"], {})[line["task"]["id"]] = said
    assert texts[here.candidate] == texts[there.candidate]
    assert any(text for turns in texts[here.candidate].values() for text in turns)
    assert (here.mean, here.failed) == (there.mean, 0)


def test_nothing_is_sampled_before_weights_were_sent(serving):
    policy = serving.policy("early")
    with pytest.raises(EngineError, match="before any weights were sent"):
        ask(policy, prompts(1))
    policy.close()


# ---- as `memfactory doctor` sees it --------------------------------------------------------------


def test_a_server_that_fits_agrees_and_takes_an_adapter(serving, tmp_path):
    fits, sync, agreement = serving.doctor(tmp_path).checks()
    assert [check.level for check in (fits, sync, agreement)] == [Level.OK] * 3, (fits, sync, agreement)
    assert "vLLM 0." in fits.found
    assert "up to 512 positions" in fits.found
    assert "zeros" in sync.found
    assert "here" in agreement.found
    assert "there" in agreement.found
    assert held(serving) == {BASE}
    assert not (tmp_path / "run").exists(), "folders it made are left"


def test_a_server_of_another_model_is_told(serving, tmp_path):
    (check,) = serving.doctor(tmp_path, "model.name=org/other").checks()
    assert check.level is Level.WRONG
    assert "serves another model" in check.found
    assert "--model org/other" in check.fix


def test_a_server_of_other_weights_is_told_by_its_log_probs(serving, tmp_path):
    """The folder has the right name, and other weights than the server loaded from it."""
    base, kept = serving.folder / "base", serving.folder / "kept"
    base.rename(kept)
    try:
        shutil.copytree(kept, base)
        tiny_model(SHAPE, tiny_tokenizer(WORDS), 1).save_pretrained(base)
        fits, sync, agreement = serving.doctor(tmp_path).checks()
    finally:
        shutil.rmtree(base)
        kept.rename(base)
    assert (fits.level, sync.level, agreement.level) == (Level.OK, Level.OK, Level.WRONG)
    assert "canary_tolerance" in agreement.fix
    assert held(serving) == {BASE}
