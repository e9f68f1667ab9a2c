"""MemAgent end to end: what it asks, what it keeps, and that nothing a model prints can stop it."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from memfactory import Episode, Probe, StopReason, Task, Turn
from memfactory.agents import MemAgent, Overflow, build_agent
from memfactory.agents.running import run_episodes
from memfactory.errors import DataError, EngineError, RecipeError, RecipeErrors
from memfactory.memory import TextMemory
from memfactory.policy.tiny import tiny_tokenizer
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.reward.catalogue import WeightedDimension, load_dimension
from memfactory.reward.system import RewardSystem
from memfactory.train.rows import build_rows

REWARDS = (
    "answer.exact_match",
    "answer.containment",
    "answer.token_f1",
    "answer.number_match",
    "format.answered",
    "format.stopped",
)


class Scripted:
    """A policy that says what `reply` returns for (module, number of the call, prompt text)."""

    def __init__(self, reply, stop=StopReason.STOP):
        self.reply = reply
        self.stop = stop
        self.calls: list[tuple[str, str, int]] = []

    async def generate(self, messages, *, module, max_tokens):
        await asyncio.sleep(0)
        (message,) = messages
        assert message["role"] == "user"
        text = self.reply(module, len(self.calls), message["content"])
        self.calls.append((module, message["content"], max_tokens))
        ids = [ord(c) for c in text[:50]] or [2]
        prompt = [ord(c) for c in message["content"]]
        return Turn(module, prompt, ids, [-1.0] * len(ids), text, self.stop, messages)

    def split(self, text, max_tokens):
        return [text[i : i + max_tokens] for i in range(0, len(text), max_tokens)]


def task(chunks=3, questions=1, stream=None):
    return Task(
        "t",
        tuple(stream or (f"chunk {i}" for i in range(chunks))),
        tuple(Probe(f"Question {i}?", (f"gold{i}",)) for i in range(questions)),
    )


def run(agent, task, policy, store=None) -> Episode:
    return asyncio.run(agent.run(task, policy, store))


# ---- the loop ----------------------------------------------------------------------------------


def test_reads_chunk_by_chunk_and_answers_from_memory_alone():
    policy = Scripted(lambda module, call, prompt: f"notes {call}" if module == "write" else "so \\boxed{gold0}")
    agent = MemAgent(max_memory_tokens=11, max_answer_tokens=22)
    episode = run(agent, task(3), policy)
    assert [turn.module for turn in episode.turns] == ["write", "write", "write", "answer"]
    assert [turn.chunk for turn in episode.turns] == [0, 1, 2, None]
    assert [limit for _, _, limit in policy.calls] == [11, 11, 11, 22]
    assert [(t.memory_before, t.memory_after) for t in episode.turns] == [
        ("", "notes 0"),
        ("notes 0", "notes 1"),
        ("notes 1", "notes 2"),
        ("notes 2", "notes 2"),
    ]
    for i, (_, prompt, _) in enumerate(policy.calls[:3]):
        assert f"chunk {i}" in prompt
        assert "Question 0?" in prompt
        assert not any(f"chunk {j}" in prompt for j in range(3) if j != i)
    answer_prompt = policy.calls[3][1]
    assert "notes 2" in answer_prompt
    assert "chunk" not in answer_prompt
    assert "gold0" not in "".join(prompt for _, prompt, _ in policy.calls)
    assert (episode.answer.text, episode.memory) == ("gold0", "notes 2")
    assert len(build_rows([episode])) == 4  # every rewrite is a new context


def test_every_question_is_known_while_reading_and_answered_on_its_own():
    policy = Scripted(
        lambda module, call, prompt: "m" if module == "write" else f"\\boxed{{{prompt.count('Question 1?')}}}"
    )
    episode = run(MemAgent(), task(2, questions=3), policy)
    assert all(f"Question {i}?" in policy.calls[0][1] for i in range(3))
    assert [answer.text for answer in episode.answers] == ["0", "1", "0"]
    assert [turn.prefix_key for turn in episode.turns] == [
        "t/write/0",
        "t/write/1",
        "t/answer/0",
        "t/answer/1",
        "t/answer/2",
    ]


def test_wiped_memory_is_empty_at_the_answer_and_a_store_is_written_to():
    policy = Scripted(lambda module, call, prompt: "gold0" if module == "write" else prompt)
    store = TextMemory()
    episode = run(MemAgent(wipe_memory=True, answer_format="plain"), task(2), policy, store)
    assert "gold0" not in policy.calls[-1][1]
    assert (episode.memory, store.text, store.writes) == ("", "", [0, 1, 1])
    dimension = WeightedDimension("c", load_dimension("answer.containment"))
    RewardSystem([dimension]).score([episode])
    assert episode.reward == 0.0
    honest = run(MemAgent(answer_format="plain"), task(2), policy)
    RewardSystem([dimension]).score([honest])
    assert honest.reward == 1.0


def test_a_restored_memory_is_where_reading_goes_on():
    store = TextMemory("what was known")
    policy = Scripted(lambda module, call, prompt: "more")
    episode = run(MemAgent(), task(1), policy, store)
    assert "what was known" in policy.calls[0][1]
    assert episode.turns[0].memory_before == "what was known"
    assert store.text == "more"


def test_episodes_running_together_share_no_memory():
    def reply(module, call, prompt):
        name = prompt.split("Name ")[1][:2]
        return name if module == "write" else f"\\boxed{{{prompt.split('<notes>')[1].split()[0]}}}"

    tasks = [Task(f"t{i}", (f"Name n{i}", "Name n" + str(i)), (Probe(f"Name n{i}?", (f"n{i}",)),)) for i in range(9)]
    episodes = run_episodes(MemAgent(), tasks * 2, Scripted(reply))
    assert [episode.answer.text for episode in episodes] == [f"n{i}" for i in range(9)] * 2
    assert [episode.group for episode in episodes] == [f"t{i}" for i in range(9)] * 2


# ---- whatever a model prints ---------------------------------------------------------------------

OUTPUTS = {
    "null": "null",
    "five": "5",
    "nothing": "",
    "white space": " \n\t ",
    "unclosed tag": "<think> hmm",
    "closed tag only": "</think>",
    "empty box": "\\boxed{}",
    "open box": "\\boxed{gold0",
    "100 kB of open braces": "{" * 100_000,
    "100 kB of boxes": "\\boxed{" * 14_000,
    "100 kB of tags": "<think></think>" * 7_000,
    "json": '{"memory": null, "answer": ["gold"]}',
    "template": "{{ 7 * 7 }} {% raw %} {{ memory }}",
    "nul": "\x00\ud800",
    "question back": "<question>Question 0?</question>",
}


@pytest.mark.parametrize("answer_format", ["boxed", "plain"])
@pytest.mark.parametrize("order", ["shared", "paper"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_bad_output_costs_reward_and_never_stops_the_run(name, order, answer_format):
    text = OUTPUTS[name]
    began = time.process_time()
    agent = MemAgent(order=order, answer_format=answer_format)
    episode = run(agent, task(3), Scripted(lambda *_: text, stop=StopReason.LENGTH))
    assert len(episode.turns) == 4
    dimensions = [WeightedDimension(reward, load_dimension(reward)) for reward in REWARDS]
    faults = RewardSystem(dimensions).score([episode])
    assert faults.count == {}
    values = {reward: episode.scores[reward].value for reward in REWARDS}
    assert values["answer.exact_match"] == values["format.stopped"] == 0.0
    assert values["answer.containment"] <= 1 / 3
    assert values["format.answered"] == float(episode.answer.text is not None)
    assert (episode.answer.text is None) == bool(episode.turns[-1].error)
    assert time.process_time() - began < 2.0


def test_an_unusable_rewrite_leaves_the_memory_as_it_was():
    replies = ["good notes", "<think> never closed", "", "\\boxed{gold0}"]
    policy = Scripted(lambda module, call, prompt: replies[call])
    episode = run(MemAgent(), task(3), policy)
    assert [turn.memory_after for turn in episode.turns] == ["good notes", "good notes", "", ""]
    assert [bool(turn.error) for turn in episode.turns] == [False, True, False, False]
    assert "never closed" in episode.turns[1].error
    assert episode.answer.text == "gold0"


def test_what_the_model_writes_is_no_template():
    """Text from one turn goes into the next prompt as it is, even when it looks like Jinja."""
    evil = "{{ question }}{% for x in range(3) %}x{% endfor %}"
    policy = Scripted(lambda module, call, prompt: evil if module == "write" else "\\boxed{x}")
    run(MemAgent(), task(2), policy)
    assert evil in policy.calls[1][1]
    assert evil in policy.calls[2][1]
    assert "xxx" not in policy.calls[2][1]


@settings(max_examples=40)
@given(st.lists(st.text(max_size=40), min_size=4, max_size=4), st.sampled_from(["shared", "paper"]))
def test_any_texts_make_a_consistent_episode(replies, order):
    policy = Scripted(lambda module, call, prompt: replies[call])
    episode = run(MemAgent(order=order), task(3), policy)
    memory = ""
    for turn, reply in zip(episode.turns, replies, strict=True):
        assert turn.text == reply
        assert turn.memory_before == memory
        memory = turn.memory_after
    assert episode.memory == memory
    RewardSystem([WeightedDimension("em", load_dimension("answer.exact_match"))]).score([episode])
    assert 0.0 <= episode.reward <= 1.0


# ---- what a group shares -------------------------------------------------------------------------


def common_start(one, other):
    return one[
        : next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    ]


@pytest.mark.parametrize(("order", "shares_chunk"), [("shared", True), ("paper", False)])
def test_what_prompts_of_a_group_share(order, shares_chunk):
    """Two episodes whose memories differ from the first write on."""
    chunks = [f"section {i} " + "word " * 80 for i in range(3)]
    agent = MemAgent(order=order)
    policies = [Scripted(lambda *_, own=own: own) for own in ("alpha notes", "omega notes")]
    episodes = [run(agent, task(stream=chunks), policy) for policy in policies]
    rows = build_rows(episodes)
    by_turn = list(zip(rows[:4], rows[4:], strict=True))
    for number, (one, other) in enumerate(by_turn[:3]):
        common = common_start(policies[0].calls[number][1], policies[1].calls[number][1])
        assert one.prefix_key == other.prefix_key == f"t/write/{number}"
        assert one.shared_prefix == other.shared_prefix == len(common)  # scripted ids are characters
        assert "Question 0?" in common
        if number > 0:  # at the first chunk the memories are both empty
            assert (chunks[number].strip() in common) == shares_chunk
    assert by_turn[0][0].shared_prefix == len(by_turn[0][0].prompt_ids)


# ---- long documents ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "limit", "kept"),
    [
        (Overflow.TRUNCATE_END, 3, [0, 1, 2]),
        (Overflow.TRUNCATE_CENTER, 3, [0, 1, 6]),
        (Overflow.TRUNCATE_CENTER, 4, [0, 1, 5, 6]),
        (Overflow.TRUNCATE_CENTER, 1, [0]),
        (Overflow.TRUNCATE_END, 1, [0]),
        (Overflow.TRUNCATE_END, 7, list(range(7))),
        (Overflow.TRUNCATE_CENTER, 7, list(range(7))),
        (Overflow.ERROR, 7, list(range(7))),
        (Overflow.ERROR, None, list(range(7))),
    ],
)
def test_overflow(policy, limit, kept):
    agent = MemAgent(max_chunks=limit, on_overflow=policy)
    assert agent.chunks(task(7), Scripted(str)) == [f"chunk {i}" for i in kept]


def test_too_many_chunks_are_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match=r"7 chunks, more than agent\.max_chunks = 6") as error:
        run(MemAgent(max_chunks=6), task(7), Scripted(str))
    assert "truncate_center" in error.value.fix
    with pytest.raises(DataError, match="its document is empty"):
        run(MemAgent(), Task("t", (), (Probe("Q", ("a",)),)), Scripted(str))
    with pytest.raises(DataError, match="its document is empty"):
        run(MemAgent(chunk_tokens=5), task(stream=("",)), Scripted(str))


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.integers(1, 9))
def test_cutting_by_tokens_loses_nothing(texts, size):
    pieces = [p for text in texts for p in Scripted(str).split(text, size)]
    agent = MemAgent(chunk_tokens=size)
    if pieces:
        assert "".join(agent.chunks(task(stream=texts), Scripted(str))) == "".join(texts)


# ---- built from a recipe, with a real model ------------------------------------------------------


def test_options_are_checked_all_together():
    with pytest.raises(RecipeErrors) as error:
        build_agent("memagent", {"ordr": "paper", "max_chunks": "many", "on_overflow": "drop"})
    text = str(error.value)
    assert all(word in text for word in ("agent.ordr", "order", "agent.max_chunks", "agent.on_overflow"))
    with pytest.raises(RecipeError, match="memagent"):
        build_agent("memagnt", {})
    assert build_agent("memagent", {"order": "paper"}).order == "paper"


def test_with_a_real_untrained_model():
    """Random words: no answer is right, every turn is recorded, and nothing fails."""
    words = [f"w{i}" for i in range(20)] + "question : memory section write answer none".split()
    tokenizer = tiny_tokenizer(words)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=64,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()
    agent = MemAgent(prompt="words", answer_format="plain", max_memory_tokens=6, max_answer_tokens=3, chunk_tokens=4)
    tasks = [Task(f"t{i}", ("w1 w2 w3 w4 w5 w6",), (Probe("w7", ("gold",)),)) for i in range(6)]
    episodes = run_episodes(agent, tasks, TransformersPolicy(model, tokenizer))
    RewardSystem([WeightedDimension("em", load_dimension("answer.exact_match"))]).score(episodes)
    assert [episode.reward for episode in episodes] == [0.0] * 6
    for episode in episodes:
        assert [turn.module for turn in episode.turns] == ["write", "write", "answer"]
        assert all(len(turn.completion_ids) <= limit for turn, limit in zip(episode.turns, (6, 6, 3), strict=True))
    with pytest.raises(EngineError, match="does not fit the model"):
        run_episodes(MemAgent(prompt="words"), tasks, TransformersPolicy(model, tokenizer))
