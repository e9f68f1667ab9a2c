"""Ids, log-probabilities and stops are recorded as they were sampled, and are what the trainer computes again."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from transformers import GenerationConfig

from memfactory.agents.running import run_episodes
from memfactory.episode import Episode, StopReason, Task
from memfactory.errors import DataError, EngineError
from memfactory.policy import decoding
from memfactory.policy.base import Sampling
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.train.rows import build_rows, collate
from memfactory.train.scoring import CompletionScorer

END = 2


def prompts(count, seed=0, longest=60):
    """User messages of very different lengths."""
    rng = random.Random(seed)
    lengths = [1, longest, *(rng.randint(1, longest) for _ in range(count - 2))]
    return [" ".join(f"w{rng.randrange(43)}" for _ in range(length)) for length in lengths[:count]]


def generate(policy, texts, max_tokens=24, **each):
    """Turns for `texts`, asked for at the same time; `max_tokens` may be one per text."""
    limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(texts)

    async def everything():
        return await asyncio.gather(
            *(
                policy.generate([{"role": "user", "content": text}], module="write", max_tokens=limit)
                for text, limit in zip(texts, limits, strict=True)
            )
        )

    return asyncio.run(everything())


@torch.no_grad()
def logprobs_again(model, turn, temperature):
    """Of the completion, by one fresh forward pass without a cache."""
    logits = model(input_ids=torch.tensor([turn.prompt_ids + turn.completion_ids])).logits[0].float()
    logp = (logits / temperature).log_softmax(-1)[len(turn.prompt_ids) - 1 : -1]
    return logp.gather(1, torch.tensor(turn.completion_ids)[:, None]).squeeze(1)


def check(model, turns, temperature=1.0, limits=None):
    for number, turn in enumerate(turns):
        assert len(turn.logprobs) == len(turn.completion_ids) >= 1
        torch.testing.assert_close(
            torch.tensor(turn.logprobs), logprobs_again(model, turn, temperature), atol=1e-4, rtol=0
        )
        assert END not in turn.completion_ids[:-1]
        assert (turn.completion_ids[-1] == END) == (turn.stop is StopReason.STOP)
        if limits is not None:
            assert len(turn.completion_ids) <= limits[number]
            if turn.stop is StopReason.LENGTH:
                assert len(turn.completion_ids) == limits[number]


SAMPLINGS = {
    "plain": Sampling(),
    "T=0.7": Sampling(0.7),
    "top_p": Sampling(0.7, top_p=0.6),
    "top_k": Sampling(1.3, top_k=3),
    "min_p": Sampling(1.0, min_p=0.2),
    "penalty": Sampling(1.0, repetition_penalty=1.7),
    "everything": Sampling(0.8, top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.2),
    "greedy": Sampling(0.0),
}


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_log_probs_are_those_of_a_fresh_forward_pass(bench, tokenizer, kind, name):
    sampling = SAMPLINGS[name]
    model = bench.make_model(kind, len(tokenizer))
    policy = TransformersPolicy(model, tokenizer, sampling=sampling, seed=1)
    limits = [1 + 3 * (i % 9) for i in range(48)]
    turns = generate(policy, prompts(48), limits)
    check(model, turns, sampling.temperature or 1.0, limits)
    stops = {turn.stop for turn in turns}
    assert StopReason.LENGTH in stops
    if name in ("plain", "T=0.7"):  # filters can keep the end of sequence from ever being drawn
        assert StopReason.STOP in stops
    assert policy.generated_tokens == sum(len(turn.completion_ids) for turn in turns)


@pytest.mark.parametrize("compact_at", [0.01, 0.25, 1.0])
def test_compaction_moves_no_sequence_into_another(bench, tokenizer, monkeypatch, compact_at):
    """Compacting after every end, or never, gives the same greedy tokens and log-probs."""
    monkeypatch.setattr(decoding, "_COMPACT_AT", compact_at)
    model = bench.make_model("qwen3", len(tokenizer))
    limits = [1 + i for i in range(30)]
    turns = generate(TransformersPolicy(model, tokenizer, sampling=Sampling(0.0)), prompts(30, seed=3), limits)
    check(model, turns, 1.0, limits)
    for text, limit, turn in zip(prompts(30, seed=3), limits, turns, strict=True):
        (alone,) = generate(TransformersPolicy(model, tokenizer, sampling=Sampling(0.0)), [text], limit)
        assert (alone.prompt_ids, alone.completion_ids, alone.stop) == (
            turn.prompt_ids,
            turn.completion_ids,
            turn.stop,
        )


@pytest.mark.parametrize("budget", [1, 150, 100_000])
def test_batching_by_budget_changes_no_greedy_token(bench, tokenizer, budget):
    model = bench.make_model("llama", len(tokenizer))
    texts = prompts(12, seed=4)
    expected = generate(TransformersPolicy(model, tokenizer, sampling=Sampling(0.0)), texts)
    turns = generate(TransformersPolicy(model, tokenizer, sampling=Sampling(0.0), token_budget=budget), texts)
    assert [turn.completion_ids for turn in turns] == [turn.completion_ids for turn in expected]


@pytest.mark.parametrize("penalty", [1.0, 1.6])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_greedy_is_what_transformers_generates(bench, tokenizer, kind, penalty):
    model = bench.make_model(kind, len(tokenizer))
    texts = prompts(10, seed=5)
    turns = generate(
        TransformersPolicy(model, tokenizer, sampling=Sampling(0.0, repetition_penalty=penalty)), texts, 20
    )
    for turn in turns:
        reference = model.generate(
            torch.tensor([turn.prompt_ids]),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=20, eos_token_id=END, pad_token_id=0, repetition_penalty=penalty
            ),
        )[0, len(turn.prompt_ids) :].tolist()
        assert turn.completion_ids == reference


def test_draws_have_the_distribution_of_the_model(bench, tokenizer):
    """First tokens of 6000 draws against the softmax at T 0.7, cut to its top 5: chi-squared, 4 degrees."""
    model = bench.make_model("qwen3", len(tokenizer), spread=0.15)
    turns = generate(TransformersPolicy(model, tokenizer, sampling=Sampling(0.7, top_k=5)), ["w1 w2 w3"] * 6000, 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([turns[0].prompt_ids])).logits[0, -1]
    top = (logits / 0.7).topk(5)
    expected = top.values.softmax(-1) * 6000
    seen = torch.tensor([sum(turn.completion_ids == [i] for turn in turns) for i in top.indices.tolist()])
    assert seen.sum() == 6000
    assert float(((seen - expected) ** 2 / expected).sum()) < 23.5  # exceeded once in 10 000 seeds


def test_the_models_own_generation_config_does_not_leak(bench, tokenizer):
    plain, loaded = (bench.make_model("qwen3", len(tokenizer), spread=0.1) for _ in range(2))
    loaded.generation_config = GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=5.0, max_new_tokens=2, eos_token_id=9
    )
    expected, turns = (
        generate(TransformersPolicy(model, tokenizer, seed=7), ["w1 w2 w3"] * 40) for model in (plain, loaded)
    )
    assert [turn.completion_ids for turn in turns] == [turn.completion_ids for turn in expected]
    assert len({turn.completion_ids[0] for turn in turns}) > 10  # top_k = 1 would leave one


def test_repetition_penalty_does_not_see_the_padding(bench, tokenizer):
    """Where the pad token is the end token, as TRL sets it, a short prompt in a batch must not be forbidden to end."""
    tokenizer = bench.merging_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # no end token in the prompt
    tokenizer.pad_token = tokenizer.eos_token
    model = bench.make_model("llama", len(tokenizer), spread=0.2)
    sampling = Sampling(0.0, repetition_penalty=3.0)
    texts = ["a", "c", "b", "a b c " * 20]
    together = generate(TransformersPolicy(model, tokenizer, sampling=sampling), texts)
    alone = [generate(TransformersPolicy(model, tokenizer, sampling=sampling), [text])[0] for text in texts]
    assert [turn.completion_ids for turn in together] == [turn.completion_ids for turn in alone]


def test_seed_decides_the_draws(bench, tokenizer):
    model = bench.make_model("qwen3", len(tokenizer))
    one, same, other = (
        [turn.completion_ids for turn in generate(TransformersPolicy(model, tokenizer, seed=seed), prompts(8))]
        for seed in (1, 1, 2)
    )
    assert one == same != other


# ---- text is a view ----------------------------------------------------------------------------


class TwoTurns:
    """Writes, then answers with what was written in the prompt, as text: the context is rewritten."""

    def __init__(self, limit=12):
        self.limit = limit

    async def run(self, task, policy, store=None):
        episode = Episode(task)
        for module in ("write", "answer"):
            memory = episode.turns[-1].text if episode.turns else task.stream[0]
            turn = await policy.generate(
                [{"role": "user", "content": memory or "a"}], module=module, max_tokens=self.limit
            )
            episode.turns.append(turn)
        return episode


def test_trained_ids_are_the_sampled_ones_where_text_encodes_to_others(bench):
    """The model spells with pieces that the tokenizer would merge, and draws ids that have no text."""
    tokenizer = bench.merging_tokenizer()
    model = bench.make_model("qwen3", len(tokenizer), spread=0.2)
    policy = TransformersPolicy(model, tokenizer, seed=3)
    tasks = [Task(f"t{i}", ("abc aab c b a" * (1 + i % 5),), ()) for i in range(20)]
    episodes = run_episodes(TwoTurns(), tasks, policy)

    turns = [turn for episode in episodes for turn in episode.turns]
    check(model, turns)
    changed = [t for t in turns if tokenizer(t.text, add_special_tokens=False)["input_ids"] != t.completion_ids]
    assert len(changed) > len(turns) / 2, "the tokenizer gives the ids back, so the test says nothing"

    for number, turn in enumerate(turns):
        turn.advantage = 1.0 + number
    rows = build_rows(episodes)
    assert len(rows) == len(turns)
    micro = collate(rows, [1.0] * len(rows), tokenizer.pad_token_id)
    for i, turn in enumerate(turns):
        trained = micro["tool_mask"][i] > 0
        assert micro["completion_ids"][i][trained].tolist() == turn.completion_ids
        assert micro["prompt_ids"][i][micro["prompt_mask"][i] > 0].tolist() == turn.prompt_ids
        torch.testing.assert_close(micro["sampling_per_token_logps"][i][trained], torch.tensor(turn.logprobs))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainers_log_probs_are_the_recorded_ones(bench, tokenizer, kind, temperature):
    """The scorer (left-shifted rows, head on completions only) against the sampler (left padding, cache)."""
    from trl.trainer.utils import add_fused_lm_head

    model = bench.make_model(kind, len(tokenizer))
    policy = TransformersPolicy(model, tokenizer, sampling=Sampling(temperature, top_p=0.8), seed=5)
    texts = prompts(16, seed=6)
    turns = generate(policy, texts, [1 + i for i in range(16)])
    for turn in turns:
        turn.advantage = 1.0
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    scorer = CompletionScorer(model)
    rows = build_rows([Episode(Task("t", (), ()), [turn]) for turn in turns])
    micro = collate(rows, [1.0] * len(rows), 0, len(rows) + 2)
    ids = torch.cat([micro["prompt_ids"], micro["completion_ids"]], 1)
    mask = torch.cat([micro["prompt_mask"], micro["completion_mask"]], 1)
    with torch.no_grad():
        logp, entropy, _ = scorer.score(model, ids, mask, micro["completion_ids"].shape[1])
    torch.testing.assert_close(logp[:16], micro["sampling_per_token_logps"][:16], atol=1e-4, rtol=0)
    assert entropy.shape == logp.shape
    # the hook is out of the way again
    again = generate(
        TransformersPolicy(model, tokenizer, sampling=policy.sampling, seed=5), texts, [1 + i for i in range(16)]
    )
    assert [turn.completion_ids for turn in again] == [turn.completion_ids for turn in turns]


# ---- errors and order --------------------------------------------------------------------------


def test_prompt_and_new_tokens_must_fit_the_positions(bench, tokenizer):
    model = bench.make_model("llama", len(tokenizer), positions=32)
    policy = TransformersPolicy(model, tokenizer, sampling=Sampling(0.0))
    used = len(generate(policy, ["w1 w2"], 1)[0].prompt_ids)
    assert len(generate(policy, ["w1 w2"], 32 - used)[0].completion_ids) <= 32 - used
    with pytest.raises(EngineError, match=rf"{used} prompt tokens \+ {33 - used} new ones > 32") as error:
        generate(policy, ["w1 w2"], 33 - used)
    assert "chunk_tokens" in error.value.fix


def test_a_template_that_cannot_render_is_an_engine_error(bench):
    tokenizer = bench.merging_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only one message') }}"
    with pytest.raises(EngineError, match=r"module 'write'.*only one message"):
        generate(TransformersPolicy(bench.make_model("qwen3", len(tokenizer)), tokenizer), ["a"])


class Fails(torch.nn.Module):
    """A hook that makes the model's `at`-th forward pass fail, once."""

    def __init__(self, model, at):
        super().__init__()
        self.left = at
        model.register_forward_pre_hook(self)

    def forward(self, module, args):
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("no memory left")


@pytest.mark.parametrize("at", [1, 4])
def test_a_failure_reaches_every_waiting_episode_and_the_next_call_works(bench, tokenizer, at):
    model = bench.make_model("qwen3", len(tokenizer))
    policy = TransformersPolicy(model, tokenizer, token_budget=200)  # several batches: later ones must not hang
    Fails(model, at)

    async def everything():
        calls = [policy.generate([{"role": "user", "content": t}], module="m", max_tokens=9) for t in prompts(20)]
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        again = await asyncio.wait_for(
            policy.generate([{"role": "user", "content": "w1"}], module="m", max_tokens=9), 60
        )
        return results, again

    results, again = asyncio.run(everything())
    failed = [result for result in results if isinstance(result, Exception)]
    assert failed
    assert all(isinstance(error, EngineError) and "no memory left" in str(error) for error in failed)
    assert isinstance(failed[0].__cause__, torch.OutOfMemoryError)
    check(model, [again, *(result for result in results if not isinstance(result, Exception))])
    check(model, generate(policy, prompts(5)))  # also in another event loop


class Unlucky(TwoTurns):
    """Like `TwoTurns`, but the episode of task t3 raises after its first turn."""

    async def run(self, task, policy, store=None):
        if task.id == "t3":
            await policy.generate([{"role": "user", "content": "w1"}], module="write", max_tokens=1)
            raise DataError("task t3", "is broken")
        return await super().run(task, policy, store)


def test_an_episode_that_fails_does_not_spoil_the_next_rollout(bench, tokenizer):
    """Requests of a cancelled rollout are forgotten: a notebook's next call gets its own tokens."""
    model = bench.make_model("qwen3", len(tokenizer))
    policy = TransformersPolicy(model, tokenizer)
    tasks = [Task(f"t{i}", ("w1 w2 w3",), ()) for i in range(8)]
    for _ in range(2):
        with pytest.raises(DataError, match="task t3"):
            run_episodes(Unlucky(limit=30), tasks, policy)
        episodes = run_episodes(TwoTurns(), tasks, policy)
        assert [len(episode.turns) for episode in episodes] == [2] * 8
        check(model, [turn for episode in episodes for turn in episode.turns])


def test_one_caller_that_gives_up_does_not_fail_the_others(bench, tokenizer):
    model = bench.make_model("qwen3", len(tokenizer))
    policy = TransformersPolicy(model, tokenizer, eos_ids=[len(tokenizer)])  # no id ends a turn

    async def everything():
        def call(limit):
            return asyncio.ensure_future(
                policy.generate([{"role": "user", "content": "w1 w2"}], module="m", max_tokens=limit)
            )

        short, *others = [call(2), *(call(40) for _ in range(5))]
        await short  # so decoding has begun
        others[0].cancel()
        later = call(3)  # waits for the next batch
        await asyncio.sleep(0)
        later.cancel()
        return await asyncio.gather(short, *others[1:]), [others[0], later]

    turns, given_up = asyncio.run(everything())
    assert all(call.cancelled() for call in given_up)
    assert [len(turn.completion_ids) for turn in turns] == [2, 40, 40, 40, 40]


def test_an_episode_goes_on_while_others_are_still_decoded(bench, tokenizer):
    model = bench.make_model("qwen3", len(tokenizer))
    policy = TransformersPolicy(model, tokenizer, eos_ids=[len(tokenizer)])  # no id ends a turn
    events = []

    async def episode(name, limit):
        await policy.generate([{"role": "user", "content": "w1"}], module="m", max_tokens=limit)
        events.append(name)

    async def everything():
        await asyncio.gather(episode("long", 30), episode("short", 2), episode("middle", 10))

    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(len(events)))
    asyncio.run(everything())
    assert events == ["short", "middle", "long"]
    assert forwards.count(0) == 2  # the short episode went on after two passes,
    assert len(forwards) == 30  # not after the thirty of the long one


def test_a_prompt_that_a_group_shares_is_computed_once_and_drawn_from_by_each(bench, tokenizer):
    model = bench.make_model("llama", len(tokenizer))
    sizes = []
    model.register_forward_hook(lambda module, args, output: sizes.append(output.logits.shape[0]))
    texts = [text for text in prompts(3, seed=8) for _ in range(8)]
    random.Random(0).shuffle(texts)
    turns = generate(TransformersPolicy(model, tokenizer, seed=4), texts, 12)
    assert sizes[0] == 3
    assert sizes[1] > 3
    check(model, turns)
    for text in set(texts):
        assert len({tuple(t.completion_ids) for t, own in zip(turns, texts, strict=True) if own == text}) > 4


def test_calls_of_all_episodes_are_decoded_together(bench, tokenizer):
    """20 episodes of two turns take the passes of two batches, not of forty."""
    model = bench.make_model("qwen3", len(tokenizer))
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(output.logits.shape[0]))
    episodes = run_episodes(
        TwoTurns(limit=5), [Task(f"t{i}", (f"w{i} w2",), ()) for i in range(20)], TransformersPolicy(model, tokenizer)
    )
    assert passes[0] == 20
    assert len(passes) <= 5 + 5 * 5
    assert sum(len(episode.turns) for episode in episodes) == 40


def test_where_not_all_fit_the_first_go_on_to_their_end(bench, tokenizer):
    """So that their scoring overlaps with the generation of the rest; no pass more is needed for it."""
    model = bench.make_model("qwen3", len(tokenizer))
    tasks = [Task(f"t{i}", (f"w{i} w2",), ()) for i in range(8)]
    passes, done = [], []
    model.register_forward_hook(lambda *_: passes.append(len(done)))
    policy = TransformersPolicy(model, tokenizer, eos_ids=[len(tokenizer)], token_budget=60)  # no id ends a turn
    run_episodes(TwoTurns(limit=5), tasks, policy, done.append)
    batches = len(passes) / 5
    assert batches >= 4  # eight episodes of two turns, and not all fit at once
    assert passes[len(passes) // 2] >= 1, "an episode was complete after half of the passes"
    assert passes[-1] >= len(tasks) // 2
    assert len(done) == len(tasks)


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_split_loses_nothing_and_keeps_the_limit(bench, tokenizer, limit):
    policy = TransformersPolicy(bench.make_model("qwen3", len(tokenizer)), tokenizer)
    for text in [*prompts(6, seed=9), "  w1  w2\n\nw3 \t", "", "w1 unknown w2"]:
        pieces = policy.split(text, limit)
        assert "".join(pieces) == text
        assert all(len(tokenizer(piece, add_special_tokens=False)["input_ids"]) <= limit for piece in pieces)
