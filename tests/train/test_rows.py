"""Rows: what is trained is what was sampled, in the context it was sampled in, once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfactory.episode import Episode, StopReason, Task, Turn
from memfactory.train.rows import Row, build_rows, collate, loss_weights

TASK = Task("t", (), ())
token = st.integers(0, 3)  # few ids, so that prefixes coincide by chance too
tokens = st.lists(token, min_size=1, max_size=5)


@st.composite
def histories(draw):
    """Turns that continue the sequence, repeat a context, or start a new one; some are not trainable."""
    turns: list[Turn] = []
    number = 0.0
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["continue", "continue exactly", "rewrite", "same prompt"]))
        if not turns or kind == "rewrite":
            prompt = draw(tokens)
        elif kind == "same prompt":
            prompt = list(turns[-1].prompt_ids)
        else:
            prompt = turns[-1].prompt_ids + turns[-1].completion_ids
            prompt = prompt + (draw(tokens) if kind == "continue" else [])
        completion = draw(tokens)
        number += 1
        turn = Turn("write", prompt, completion, [], "", StopReason.STOP, prefix_key=draw(st.sampled_from("abc")))
        turn.logprobs = [-number - i / 16 for i in range(len(completion))]  # tells every sampled id apart
        turn.advantage = number
        turn.trainable = draw(st.booleans()) or draw(st.booleans())
        turns.append(turn)
    return Episode(TASK, turns)


@given(st.lists(histories(), max_size=5))
def test_every_trainable_id_is_trained_once_in_the_context_it_was_sampled_in(episodes):
    rows = build_rows(episodes)
    for row in rows:
        assert len(row.completion_ids) == len(row.trained) == len(row.advantages) == len(row.logprobs)
        assert row.length == len(row.prompt_ids) + len(row.completion_ids)
        assert all(a == p == 0 for a, p, t in zip(row.advantages, row.logprobs, row.trained, strict=True) if not t)
    for index, episode in enumerate(episodes):
        found = [
            (row.prompt_ids + row.completion_ids[:i], row.completion_ids[i], row.logprobs[i], row.advantages[i])
            for row in rows
            if row.episode == index
            for i in range(len(row.completion_ids))
            if row.trained[i]
        ]
        sampled = [
            (turn.prompt_ids + turn.completion_ids[:i], turn.completion_ids[i], turn.logprobs[i], turn.advantage)
            for turn in episode.turns
            if turn.trainable
            for i in range(len(turn.completion_ids))
        ]
        assert found == sampled  # context, id, log-prob, advantage; all of them, in order


@given(st.lists(histories(), max_size=4))
def test_rows_are_as_few_as_contexts_allow(episodes):
    """A new row exactly where a trainable turn's prompt does not continue everything before it."""
    rows = build_rows(episodes)
    for index, episode in enumerate(episodes):
        expected, sequence = 0, None
        for turn in episode.turns:
            if turn.trainable:
                if sequence is None or turn.prompt_ids[: len(sequence)] != sequence:
                    expected += 1
                sequence = turn.prompt_ids + turn.completion_ids
        assert sum(row.episode == index for row in rows) == expected


def test_append_only_turns_merge_and_a_rewritten_context_starts_a_row():
    turns = [
        Turn("a", [1, 2], [3, 4], [-0.1, -0.2], "", StopReason.STOP, advantage=2.0),
        Turn("b", [1, 2, 3, 4, 9], [5], [-0.3], "", StopReason.STOP, advantage=-1.0),
        Turn("c", [7, 8], [6], [-0.4], "", StopReason.STOP, advantage=0.5),
    ]
    first, second = build_rows([Episode(TASK, turns)])
    assert (first.prompt_ids, first.completion_ids) == ([1, 2], [3, 4, 9, 5])
    assert first.trained == [1, 1, 0, 1]
    assert first.advantages == [2.0, 2.0, 0.0, -1.0]
    assert first.logprobs == [-0.1, -0.2, 0.0, -0.3]
    assert (second.prompt_ids, second.completion_ids, second.trained) == ([7, 8], [6], [1])
    assert turns[0].completion_ids == [3, 4]  # the record is not touched


def test_a_turn_that_is_not_trained_still_stands_as_context():
    turns = [
        Turn("a", [1], [2], [-0.1], "", StopReason.STOP, advantage=1.0),
        Turn("b", [1, 2], [3], [-0.2], "", StopReason.STOP, advantage=1.0, trainable=False),
        Turn("c", [1, 2, 3], [4], [-0.3], "", StopReason.STOP, advantage=1.0),
    ]
    (row,) = build_rows([Episode(TASK, turns)])
    assert (row.prompt_ids + row.completion_ids, row.trained) == ([1, 2, 3, 4], [1, 0, 1])


@given(st.lists(histories(), max_size=6))
def test_shared_prefix_is_the_common_prefix_of_all_prompts_with_the_key(episodes):
    rows = build_rows(episodes)
    for row in rows:
        others = [other for other in rows if other.prefix_key == row.prefix_key]
        if len(others) < 2:
            assert row.shared_prefix == 0
            continue
        expected = 0
        shortest = min(len(other.prompt_ids) for other in others)
        while expected < shortest and len({other.prompt_ids[expected] for other in others}) == 1:
            expected += 1
        assert row.shared_prefix == expected


lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), max_size=40)


def rows_of(sizes):
    return [Row(i, [1] * p, [2] * t, [1] * t, [1.0] * t, [0.0] * t) for i, (p, t) in enumerate(sizes)]


@given(lengths.filter(bool), st.integers(0, 5), st.integers(0, 3))
def test_collate_holds_every_token_mask_and_weight(sizes, extra, pad_id):
    rows = rows_of(sizes)
    for i, row in enumerate(rows):
        row.prompt_ids = [10 + (i + j) % 7 for j in range(len(row.prompt_ids))]
        row.trained = [(i + j) % 2 for j in range(len(row.trained))]
        row.advantages = [float(i)] * len(row.trained)
        row.logprobs = [-0.5 * j for j in range(len(row.trained))]
    weights = [1.0 + 0.25 * i for i in range(len(rows))]
    micro = collate(rows, weights, pad_id, len(rows) + extra)
    assert {tensor.shape[0] for tensor in micro.values()} == {len(rows) + extra}
    for i, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        prompt, completion = micro["prompt_mask"][i].bool(), micro["completion_mask"][i].bool()
        assert micro["prompt_ids"][i][prompt].tolist() == row.prompt_ids
        assert micro["completion_ids"][i][completion].tolist() == row.completion_ids
        assert micro["tool_mask"][i][completion].tolist() == [weight * t for t in row.trained]
        assert micro["advantages"][i][completion].tolist() == row.advantages
        assert micro["sampling_per_token_logps"][i][completion].tolist() == row.logprobs
        assert prompt.tolist() == sorted(prompt.tolist())  # padding on the left
        assert completion.tolist() == sorted(completion.tolist(), reverse=True)  # padding on the right
        assert (micro["prompt_ids"][i][~prompt] == pad_id).all()
        assert (micro["completion_ids"][i][~completion] == pad_id).all()
        assert not micro["tool_mask"][i][~completion].any()
    assert not micro["tool_mask"][len(rows) :].any()
    assert (micro["completion_mask"].sum(1) >= 1).all()
    assert (micro["prompt_mask"].sum(1) >= 1).all()
    assert micro["prompt_ids"].dtype == micro["completion_ids"].dtype == torch.long


@given(lengths.filter(bool), st.integers(1, 64))
def test_loss_weights_are_each_loss_own_normalisation(sizes, longest):
    """sum over tokens of w / N: 1 for means over tokens, the mean share for the others."""
    rows = rows_of(sizes)
    half = (len(rows) + 1) // 2
    for number, row in enumerate(rows):
        row.episode = number % half
    per_episode = [sum(r.trained_tokens for r in rows if r.episode == e) for e in range(half)]
    n = sum(per_episode)

    def share(loss, episode):
        weights = loss_weights(rows, per_episode, loss, longest)
        return sum(w * r.trained_tokens / n for w, r in zip(weights, rows, strict=True) if r.episode == episode)

    for episode in range(half):
        assert share("dapo", episode) == pytest.approx(per_episode[episode] / n)
        assert share("grpo", episode) == pytest.approx(1 / half)  # every episode weighs the same
        assert share("dr_grpo", episode) == pytest.approx(per_episode[episode] / (half * longest))
        assert share("luspo", episode) == pytest.approx(per_episode[episode] / half)
        for loss in ("bnpo", "cispo", "vespo"):
            assert share(loss, episode) == share("dapo", episode)


def test_loss_weights_over_ranks_are_those_of_one():
    """Two ranks with half the rows each, told N and E of both, weigh as one rank with all of them."""
    rows = rows_of([(1, 3), (1, 5), (1, 2), (1, 9)])
    tokens_of = [3, 5, 2, 9]
    for loss in ("dapo", "grpo", "bnpo", "dr_grpo", "luspo"):
        alone = loss_weights(rows, tokens_of, loss, 16)
        left = loss_weights(rows[:2], [3, 5, 0, 0], loss, 16, total=19, episodes=4)
        right = loss_weights(rows[2:], [0, 0, 2, 9], loss, 16, total=19, episodes=4)
        assert left + right == pytest.approx(alone)
