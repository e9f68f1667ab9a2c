"""`LinearReranker`: it draws by the definition, and its update is the formula."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats

from memfactory.episode import Answer, Choice, Episode, Probe, StopReason, Task, Turn
from memfactory.errors import EngineError, RecipeErrors
from memfactory.memory.entries import Entry
from memfactory.modules import KINDS, build_module, linear_reranker
from memfactory.modules.linear_reranker import FILE, Features, Lesson, LinearReranker, log_terms
from memfactory.search.build import EmbedderOptions
from memfactory.search.dense import DenseSearcher
from memfactory.search.embedding import CachedEmbedder
from memfactory.train.learners import Learner, Learners


class Hashed:
    """Unit vectors that depend on the text alone: no model, and equal texts are equal vectors."""

    def __init__(self, width: int = 6) -> None:
        self.width, self.asked = width, list[str]()

    def embed(self, texts: list[str]) -> np.ndarray:
        self.asked += texts
        rows = np.stack([np.random.default_rng(list(text.encode())).normal(size=self.width) for text in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def embedder(monkeypatch: pytest.MonkeyPatch) -> Hashed:
    hashed = Hashed()
    cached = CachedEmbedder(hashed)
    monkeypatch.setattr("memfactory.modules.linear_reranker.build_embedder", lambda options: cached)
    return hashed


def entries(count: int) -> list[Entry]:
    return [Entry(id=f"e{n}", owner="", text=f"text {n}") for n in range(1, count + 1)]


def with_weights(query: Any, entry: Any, **options: Any) -> LinearReranker:
    reranker = LinearReranker(**options)
    reranker._take(torch.as_tensor(query), torch.as_tensor(entry))
    return reranker


def weights(reranker: LinearReranker) -> tuple[np.ndarray, np.ndarray]:
    assert reranker._weights is not None
    query, entry = reranker._weights
    return query.detach().numpy().copy(), entry.detach().numpy().copy()


def lesson(q: Any, m: Any, noise: Any, chosen: Any, credit: Any) -> Lesson:
    features = Features(*(np.asarray(values, dtype=np.float32) for values in (q, m, noise)))
    return Lesson(features, tuple(chosen), tuple(credit), 0)


def by_definition(
    query: np.ndarray, entry: np.ndarray, q: np.ndarray, m: np.ndarray, noise: np.ndarray, tau: float
) -> np.ndarray:
    """(s + g) / tau, written as the paper writes it: K candidates moved one by one, float64."""
    moved = q + query @ q
    scores = np.array([moved @ (candidate + entry @ candidate) for candidate in m])
    return (scores + noise) / tau


def draw_logprobs(logits: np.ndarray, chosen: Any) -> list[float]:
    """log p(c_j | c_1 ... c_j-1): p, with what is taken removed."""
    p = np.exp(logits - logits.max())
    left, terms = set(range(len(p))), []
    for place in chosen:
        terms.append(math.log(p[place] / sum(p[other] for other in sorted(left))))
        left.remove(place)
    return terms


# ---- the update ----------------------------------------------------------------------------------


def test_the_update_on_a_case_worked_by_hand() -> None:
    """d = 2, K = 3, M = 2, weights at zero, noise 0, tau = 1/2.

    q = (1, 0) and m = (1, 0), (0, 1), (0, 0), so s = (1, 0, 0) and logits = s / tau = (2, 0, 0).
    Drawn: first entry 0, cited (R - b = 1 - .5 = .5); then entry 1, not cited (R - b = -1 - .5 = -1.5).

      p(0)     = e^2 / (e^2 + 2) = .786986      d log p(0) / d logits     = (1 - .786986, -.106507, -.106507)
      p(1 | 0) = 1 / 2                          d log p(1 | 0) / d logits = (0, .5, -.5)

      c = .5 (.213014, -.106507, -.106507) - 1.5 (0, .5, -.5) = (.106507, -.803253, .696747)
      and by s instead of logits twice that: (.213014, -1.606507, 1.393493)

    d s_i / d W_q = m'_i q^T and d s_i / d W_m = q' m_i^T, so with sum_i c_i m_i = (.213014, -1.606507):

      d W_q = lr (.213014, -1.606507) (1, 0)^T        d W_m = lr (1, 0) (.213014, -1.606507)^T
    """
    reranker = with_weights(np.zeros((2, 2)), np.zeros((2, 2)), lr=0.1)
    logged = reranker.learn([lesson([1, 0], [[1, 0], [0, 1], [0, 0]], [0, 0, 0], [0, 1], [0.5, -1.5])])
    query, entry = weights(reranker)
    assert query == pytest.approx(np.array([[0.0213014, 0], [-0.1606507, 0]]), abs=1e-7)
    assert entry == pytest.approx(np.array([[0.0213014, -0.1606507], [0, 0]]), abs=1e-7)
    assert logged["logprob"] == pytest.approx(math.log(0.786986 / 2), abs=1e-5)


numbers = st.floats(-2, 2, width=32)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    d, k = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    m = draw(st.integers(1, k))

    def array(*shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        return np.array(draw(st.lists(numbers, min_size=size, max_size=size))).reshape(shape)

    return {
        "query": array(d, d) / 4,
        "entry": array(d, d) / 4,
        "q": array(d),
        "m": array(k, d),
        "noise": array(k),
        "chosen": draw(st.permutations(range(k)))[:m],
        "credit": [draw(st.sampled_from([0.5, -1.5, 1.0, 0.0])) for _ in range(m)],
        "tau": draw(st.sampled_from([0.25, 0.5, 1.0, 2.0])),
    }


@settings(max_examples=80, deadline=None)
@given(cases())
def test_the_update_is_lr_times_the_gradient_by_finite_differences(case: dict[str, Any]) -> None:
    """sum_j (R_j - b) log p(c_j | ...) at weights moved by h in each coordinate, in float64, by the definition."""

    def objective(query: np.ndarray, entry: np.ndarray) -> float:
        logits = by_definition(query, entry, case["q"], case["m"], case["noise"], case["tau"])
        return float(np.dot(case["credit"], draw_logprobs(logits, case["chosen"])))

    h, expected = 1e-5, []
    for moving in (0, 1):
        start = [case["query"], case["entry"]]
        gradient = np.zeros_like(start[moving])
        for place in np.ndindex(*gradient.shape):
            sides = []
            for sign in (1, -1):
                matrices = [matrix.copy() for matrix in start]
                matrices[moving][place] += sign * h
                sides.append(objective(*matrices))
            gradient[place] = (sides[0] - sides[1]) / (2 * h)
        expected.append(gradient)
    reranker = with_weights(case["query"], case["entry"], lr=1.0, tau=case["tau"])
    before = weights(reranker)
    reranker.learn([lesson(case["q"], case["m"], case["noise"], case["chosen"], case["credit"])])
    for old, new, gradient in zip(before, weights(reranker), expected, strict=True):
        assert new - old == pytest.approx(gradient, abs=2e-4 * max(1.0, float(np.abs(gradient).max())))


def test_a_batch_is_one_step_with_the_mean_and_the_last_one_may_be_smaller() -> None:
    rng = np.random.default_rng(0)
    lessons = [
        lesson(rng.normal(size=3), rng.normal(size=(4, 3)), rng.normal(size=4), [2, 0], [0.5, -1.5]) for _ in range(6)
    ]
    together = with_weights(np.zeros((3, 3)), np.zeros((3, 3)), lr=0.1, batch=4)
    together.learn(lessons)

    alone = with_weights(np.zeros((3, 3)), np.zeros((3, 3)), lr=0.1)
    for part in (lessons[:4], lessons[4:]):
        start = weights(alone)
        steps = []
        for one in part:
            fresh = with_weights(*start, lr=0.1)
            fresh.learn([one])
            steps.append([new - old for new, old in zip(weights(fresh), start, strict=True)])
        alone._take(
            *(
                torch.as_tensor(old + np.mean(own, axis=0))
                for old, own in zip(start, zip(*steps, strict=True), strict=True)
            )
        )
    for ours, theirs in zip(weights(together), weights(alone), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_nothing_to_learn_from_changes_nothing() -> None:
    reranker = with_weights(np.ones((2, 2)), np.ones((2, 2)))
    assert reranker.learn([]) == {"questions": 0.0}
    assert (weights(reranker)[0] == 1).all()


# ---- what the update estimates -------------------------------------------------------------------


def expected_update(useful: Any, m_drawn: int, credit: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Over every draw of `m_drawn` from 4 with fixed noise: the mean of our update, the gradient of the expected sum
    of R, and the gradient of sum_j E[R_j] when what was taken before each draw is held as it was."""
    rng = np.random.default_rng(5)
    d, k = 2, 4
    q, m, noise = rng.normal(size=d), rng.normal(size=(k, d)), rng.gumbel(size=k)
    start = rng.normal(size=(2, d, d)) / 4
    draws = list(itertools.permutations(range(k), m_drawn))
    features = (np.float32(q).astype(float), np.float32(m).astype(float), np.float32(noise).astype(float))

    def terms(matrices: np.ndarray) -> list[list[float]]:
        logits = by_definition(*matrices, *features, tau=0.5)
        return [draw_logprobs(logits, draw) for draw in draws]

    at_start = terms(start)
    rewards = [[1.0 if useful(place, draw) else -1.0 for place in draw] for draw in draws]

    def true_objective(matrices: np.ndarray) -> float:
        return sum(math.exp(sum(own)) * sum(r) for own, r in zip(terms(matrices), rewards, strict=True))

    def short_sighted(matrices: np.ndarray) -> float:
        """Each factor moved on its own, the others as at the start."""
        total = 0.0
        for old, new, r in zip(at_start, terms(matrices), rewards, strict=True):
            chance = math.exp(sum(old))
            total += sum(chance * math.exp(new[j] - old[j]) * r[j] for j in range(m_drawn))
        return total

    def gradient(objective: Any) -> np.ndarray:
        found, h = np.zeros_like(start), 1e-5
        for place in np.ndindex(*start.shape):
            step = np.zeros_like(start)
            step[place] = h
            found[place] = (objective(start + step) - objective(start - step)) / (2 * h)
        return found

    mean = np.zeros_like(start)
    for draw, own, r in zip(draws, at_start, rewards, strict=True):
        reranker = with_weights(*start, lr=1.0, credit=credit, m=m_drawn)
        before = np.stack(weights(reranker))
        reranker.learn([lesson(q, m, noise, draw, reranker._credit([value > 0 for value in r], 0.0))])
        mean += math.exp(sum(own)) * (np.stack(weights(reranker)) - before)
    return mean, gradient(true_objective), gradient(short_sighted)


def cites_what_helps(place: int, draw: Any) -> bool:
    return place in (1, 3)


def cites_the_lowest_alone(place: int, draw: Any) -> bool:
    """What is cited depends on what else is there."""
    return place == min(draw)


@pytest.mark.parametrize("useful", [cites_what_helps, cites_the_lowest_alone])
def test_credit_per_entry_follows_the_expected_reward_of_each_draw_on_its_own(useful: Any) -> None:
    ours, true, short_sighted = expected_update(useful, 2, "item")
    assert ours == pytest.approx(short_sighted, abs=1e-5)
    assert np.abs(ours - true).max() > 0.01, "with M = 2 the two differ, and the docstring says so"


def test_credit_per_entry_is_unbiased_where_one_entry_is_drawn() -> None:
    ours, true, short_sighted = expected_update(cites_what_helps, 1, "item")
    assert ours == pytest.approx(true, abs=1e-5)
    assert true == pytest.approx(short_sighted, abs=1e-8)


@pytest.mark.parametrize("useful", [cites_what_helps, cites_the_lowest_alone])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_credit_per_draw_is_unbiased_for_the_expected_sum(useful: Any, m: int) -> None:
    ours, true, _ = expected_update(useful, m, "draw")
    assert ours == pytest.approx(true, abs=1e-5)


# ---- the draw ------------------------------------------------------------------------------------


def test_draws_are_as_frequent_as_the_definition_says(embedder: Hashed) -> None:
    """Frequencies of ordered pairs of 3 against noise, softmax and two draws by numpy's own choice."""
    reranker, three, rounds = LinearReranker(m=2, tau=0.5, draw_seed=3), entries(3), 6000
    ours = Counter(reranker.choose("who", three, greedy=False).choice.chosen for _ in range(rounds))

    greedy = reranker.choose("who", three, greedy=True)
    assert greedy.choice is not None
    q, m = reranker._vectors("who", three)
    scores, rng = m.astype(float) @ q, np.random.default_rng(4)
    theirs = Counter()
    for _ in range(rounds):
        logits = (scores - np.log(-np.log(rng.random(3)))) / 0.5
        p = np.exp(logits - logits.max())
        theirs[tuple(rng.choice(3, size=2, replace=False, p=p / p.sum()).tolist())] += 1
    pairs = list(itertools.permutations(range(3), 2))
    found = stats.chi2_contingency([[ours[pair] for pair in pairs], [theirs[pair] for pair in pairs]])
    assert found.pvalue > 0.001
    # and it is no other distribution: the best two come first more often than chance, and not always
    best = ours[greedy.choice.chosen]
    assert rounds / 6 * 1.2 < best < rounds * 0.9


def test_given_its_noise_a_draw_is_from_softmax_without_replacement(
    embedder: Hashed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the first noise held fixed, every ordered pair comes as often as exp(logprob) says, exactly."""
    reranker, three, rounds = LinearReranker(m=2, draw_seed=1), entries(3), 8000
    fixed, drawn = np.array([0.3, -0.2, 0.1]), linear_reranker._gumbel
    calls = itertools.count()

    def first_fixed(count: int, generator: Any) -> np.ndarray:
        return fixed if next(calls) % 2 == 0 else drawn(count, generator)

    monkeypatch.setattr(linear_reranker, "_gumbel", first_fixed)
    turns = [reranker.choose("who", three, greedy=False) for _ in range(rounds)]
    choices = [turn.choice for turn in turns if turn.choice is not None]
    counts, chance = Counter(c.chosen for c in choices), {c.chosen: math.exp(c.logprob) for c in choices}
    assert sum(chance.values()) == pytest.approx(1)
    pairs = sorted(chance)
    assert stats.chisquare([counts[p] for p in pairs], [rounds * chance[p] for p in pairs]).pvalue > 0.001
    logits = by_definition(np.zeros((6, 6)), np.zeros((6, 6)), *reranker._vectors("who", three), fixed, 0.5)
    for pair, share in chance.items():
        assert share == pytest.approx(math.exp(sum(draw_logprobs(logits, pair))), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-600, 600), min_size=1, max_size=8), st.data())
def test_log_terms_stay_finite_and_right(logits: list[float], data: st.DataObject) -> None:
    chosen = data.draw(st.permutations(range(len(logits))))[: data.draw(st.integers(1, len(logits)))]
    found = log_terms(torch.tensor(logits, dtype=torch.float64, requires_grad=True), chosen)
    found.sum().backward()
    assert (found <= 1e-9).all()
    assert torch.isfinite(found).all()
    left = list(range(len(logits)))
    for place, term in zip(chosen, found.tolist(), strict=True):
        assert term == pytest.approx(logits[place] - np.logaddexp.reduce([logits[n] for n in left]), abs=1e-6)
        left.remove(place)


def test_untrained_it_ranks_as_dense_search_does(embedder: Hashed) -> None:
    many = entries(40)
    searcher = DenseSearcher(embedder)
    searcher.put(many)
    hits = searcher.search("which one", 40)
    turn = LinearReranker(m=40).choose("which one", many, greedy=True)
    assert turn.text.split() == [hit.entry.id for hit in hits]
    q, m = LinearReranker()._vectors("which one", [hit.entry for hit in hits])
    assert LinearReranker()._scores(q, m).tolist() == [hit.score for hit in hits]


def test_greedy_draws_nothing_and_keeps_nothing(embedder: Hashed) -> None:
    reranker = LinearReranker(m=2)
    before = reranker.state_dict()["generator"].clone()
    one, two = (reranker.choose("who", entries(5), greedy=True) for _ in range(2))
    assert one.choice is not None
    assert (one.text, one.choice.features) == (two.text, None)
    assert math.isnan(one.choice.logprob)
    assert torch.equal(before, reranker.state_dict()["generator"])


def test_a_turn_says_what_was_drawn(embedder: Hashed) -> None:
    turn = LinearReranker(m=3).choose("who", entries(5), greedy=False)
    choice = turn.choice
    assert choice is not None
    assert (turn.module, turn.trainable, turn.stop) == ("rerank", False, StopReason.STOP)
    assert (turn.prompt_ids, turn.completion_ids, turn.logprobs) == ([], [], [])
    assert turn.text == " ".join(choice.candidates[place] for place in choice.chosen)
    assert choice.candidates == ("e1", "e2", "e3", "e4", "e5")
    assert [(part.shape, part.dtype) for part in choice.features] == [
        ((6,), np.float32),
        ((5, 6), np.float32),
        ((5,), np.float32),
    ]


@pytest.mark.parametrize("greedy", [True, False])
def test_few_candidates_none_and_blank_ones(embedder: Hashed, greedy: bool) -> None:
    reranker = LinearReranker(m=4)
    assert sorted(reranker.choose("who", entries(2), greedy=greedy).text.split()) == ["e1", "e2"]
    nothing = reranker.choose("who", [], greedy=greedy)
    assert (nothing.text, nothing.choice) == ("", Choice((), (), nothing.choice.logprob))
    blank = [Entry(id="e1", owner="", text=""), *entries(3)[1:]]
    assert len(reranker.choose("", blank, greedy=greedy).text.split()) == 3
    assert LinearReranker(m=1).choose(" ", blank[:1], greedy=greedy).text == "e1"


def test_prefixes_go_before_what_is_embedded(embedder: Hashed) -> None:
    options = EmbedderOptions(query_prefix="query: ", entry_prefix="passage: ")
    LinearReranker(embedder=options).choose("who", [Entry(id="e1", owner="", text="x", tags=("anna",))], greedy=True)
    assert embedder.asked == ["query: who", "passage: x (anna)"]


# ---- from episodes to updates --------------------------------------------------------------------


def episode(reranker: LinearReranker, cites: Any, *, error: str = "", question: str = "who") -> Episode:
    """A question, a draw of two from four, and a reply that cites those of the drawn ids that `cites` says."""
    turn = reranker.choose(question, entries(4), greedy=False)
    drawn = turn.text.split()
    reply = Turn("answer", [1], [2], [0.0], "", StopReason.STOP, cited=[id for id in drawn if cites(id, drawn)])
    reply.error = error
    task = Task("t", (), (Probe(question, ("x",)),))
    return Episode(task, [turn, reply], [Answer(task.probes[0], "x", turn=1)])


def credits(reranker: LinearReranker, *episodes: Episode) -> list[tuple[float, ...]]:
    return [one.credit for one in reranker.experience(list(episodes))]


def test_cited_entries_are_worth_one_and_others_minus_one(embedder: Hashed) -> None:
    reranker = LinearReranker(m=2)
    first = episode(reranker, lambda id, drawn: id == drawn[0])
    none = episode(reranker, lambda id, drawn: False)
    assert credits(reranker, first, none) == [(0.5, -1.5), (-1.5, -1.5)]


def test_ids_that_were_not_drawn_earn_nothing(embedder: Hashed) -> None:
    reranker = LinearReranker(m=2)
    one = episode(reranker, lambda id, drawn: False)
    one.turns[1].cited = ["e99", "e0"]
    assert credits(reranker, one) == [(-1.5, -1.5)]


def test_a_reply_that_cannot_be_read_teaches_nothing(embedder: Hashed) -> None:
    reranker = LinearReranker(m=2)
    assert credits(reranker, episode(reranker, lambda id, drawn: True, error="no answer")) == []


def test_vectors_are_gone_after_they_were_used(embedder: Hashed) -> None:
    reranker = LinearReranker(m=2)
    one = episode(reranker, lambda id, drawn: True)
    reranker.learn(reranker.experience([one]))
    assert one.turns[0].choice is not None
    assert one.turns[0].choice.features is None
    assert reranker.experience([one]) == []


def test_credit_of_the_draw_and_by_advantage(embedder: Hashed) -> None:
    draw = LinearReranker(m=2, credit="draw", baseline=0)
    assert credits(draw, episode(draw, lambda id, drawn: id == drawn[0])) == [(0.0, 0.0)]
    assert credits(draw, episode(draw, lambda id, drawn: True)) == [(2.0, 2.0)]
    group = LinearReranker(m=2, reward="advantage")
    one = episode(group, lambda id, drawn: True, error="no answer")
    one.turns[0].advantage = -0.7
    assert credits(group, one) == [(-0.7, -0.7)]


def test_shuffling_keeps_how_many_were_cited_and_forgets_in_which_draw(embedder: Hashed) -> None:
    reranker = LinearReranker(m=2, shuffle_citations=True)
    found = Counter[tuple[float, ...]]()
    for _ in range(200):
        both = episode(reranker, lambda id, drawn: True), episode(reranker, lambda id, drawn: False)
        first, second = credits(reranker, *both)
        assert sorted(first + second) == [-1.5, -1.5, 0.5, 0.5]
        found[first] += 1
    # the first draw, of which everything was cited, keeps all of it one time in six
    assert set(found) == {(0.5, 0.5), (0.5, -1.5), (-1.5, 0.5), (-1.5, -1.5)}
    assert found[0.5, 0.5] < 70


def test_a_draw_without_a_reply_is_the_agents_fault(embedder: Hashed) -> None:
    reranker = LinearReranker(m=2)
    one = episode(reranker, lambda id, drawn: True)
    with pytest.raises(EngineError, match="no turn follows"):
        reranker.experience([replace(one, turns=one.turns[:1])])


def test_citations_teach_it_to_rank(embedder: Hashed) -> None:
    """The entry that is cited comes last at first; afterwards it is drawn first."""
    reranker = LinearReranker(m=1, lr=0.2, draw_seed=2)
    order = LinearReranker(m=4).choose("who", entries(4), greedy=True).text.split()
    for _ in range(80):
        reranker.learn(reranker.experience([episode(reranker, lambda id, drawn: id == order[-1]) for _ in range(4)]))
    assert reranker.choose("who", entries(4), greedy=True).text == order[-1]


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resumed_is_uninterrupted_to_the_bit(embedder: Hashed, tmp_path: Path, optimizer: Any) -> None:
    def rounds(reranker: LinearReranker, count: int) -> list[str]:
        texts = []
        for number in range(count):
            batch = [episode(reranker, lambda id, drawn: id in ("e1", "e2"), question=f"q{number}") for _ in range(6)]
            texts += [one.turns[0].text for one in batch]
            reranker.learn(reranker.experience(batch))
        return texts

    options: dict[str, Any] = {"m": 2, "optimizer": optimizer, "lr": 0.05, "shuffle_citations": True}
    whole, cut = LinearReranker(**options), LinearReranker(**options)
    for one in (whole, cut):
        one.seed(11)
        rounds(one, 3)
    torch.save(cut.state_dict(), tmp_path / "state.pt")
    went_on = rounds(whole, 3)

    resumed = LinearReranker(**options)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert rounds(resumed, 3) == went_on
    for ours, theirs in zip(weights(resumed), weights(whole), strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_the_state_of_one_that_has_done_nothing(embedder: Hashed) -> None:
    fresh, other = LinearReranker(m=2, draw_seed=5), LinearReranker(m=2)
    other.choose("who", entries(3), greedy=False)
    other.load_state_dict(fresh.state_dict())
    assert other._weights is None
    drawn = [one.choose("who", entries(3), greedy=False).text for one in (fresh, other)]
    assert drawn[0] == drawn[1]


def test_a_state_is_a_copy(embedder: Hashed) -> None:
    reranker = LinearReranker(m=2, optimizer="adam")
    reranker.learn(reranker.experience([episode(reranker, lambda id, drawn: True)]))
    state = reranker.state_dict()
    kept = state["weights"][0].clone(), state["optimizer"]["state"][0]["exp_avg"].clone()
    reranker.learn(reranker.experience([episode(reranker, lambda id, drawn: True)]))
    assert torch.equal(state["weights"][0], kept[0])
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], kept[1])


def test_the_same_seed_draws_the_same(embedder: Hashed) -> None:
    def draws(seed: int) -> list[str]:
        reranker = LinearReranker(m=2)
        reranker.seed(seed)
        return [reranker.choose("who", entries(6), greedy=False).text for _ in range(8)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_ranks_with_draws_of_their_own_end_with_the_same_weights(embedder: Hashed) -> None:
    class Agent:
        def __init__(self) -> None:
            self.modules = [LinearReranker(m=2, lr=0.1)]

    ranks = [Learners(Agent()), Learners(Agent())]
    for _ in range(3):
        sent = []
        for number, learners in enumerate(ranks):
            learners.seed(number)
            own = learners.all["rerank"]
            assert isinstance(own, LinearReranker)
            sent += own.experience([episode(own, lambda id, drawn: id == "e1") for _ in range(3)])
        logged = [learners.learn([], gather=lambda own, sent=sent: sent) for learners in ranks]
        assert logged[0] == logged[1]
        assert logged[0]["rerank/questions"] == 6
    first, second = (weights(learners.all["rerank"]) for learners in ranks)
    assert all(ours.tobytes() == theirs.tobytes() for ours, theirs in zip(first, second, strict=True))


def test_what_is_saved_is_loaded(embedder: Hashed, tmp_path: Path) -> None:
    reranker = LinearReranker(m=2, lr=0.3)
    reranker.learn(reranker.experience([episode(reranker, lambda id, drawn: True)]))
    reranker.save(tmp_path)
    assert set(load_file(tmp_path / FILE)) == {"query", "entry"}
    other = LinearReranker(m=2)
    other.load(tmp_path)
    for ours, theirs in zip(weights(other), weights(reranker), strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_one_that_was_never_asked_is_saved_at_zero(embedder: Hashed, tmp_path: Path) -> None:
    LinearReranker().save(tmp_path / "new")
    assert not load_file(tmp_path / "new" / FILE)["query"].any()


def test_loading_says_what_is_wrong(embedder: Hashed, tmp_path: Path) -> None:
    reranker = LinearReranker(m=2)
    with pytest.raises(EngineError, match=r"no such file(.|\n)*checkpoint"):
        reranker.load(tmp_path)
    (tmp_path / FILE).write_bytes(b"no safetensors")
    with pytest.raises(EngineError, match=r"not the weights(.|\n)*train anew"):
        reranker.load(tmp_path)
    save_file({"query": torch.zeros(3, 3), "entry": torch.zeros(3, 2)}, tmp_path / FILE)
    with pytest.raises(EngineError, match=r"must be \(d, d\)"):
        reranker.load(tmp_path)
    save_file({"query": torch.zeros(3, 3), "entry": torch.zeros(3, 3)}, tmp_path / FILE)
    reranker.load(tmp_path)
    with pytest.raises(EngineError, match=r"for 3 numbers, the embedder use gives 6(.|\n)*train anew"):
        reranker.choose("who", entries(3), greedy=True)
    header = {"embedder": json.dumps({"name": "transformers", "model": "x", "query_prefix": "", "entry_prefix": ""})}
    save_file({"query": torch.zeros(6, 6), "entry": torch.zeros(6, 6)}, tmp_path / FILE, header)
    with pytest.raises(EngineError, match="another embedder"):
        reranker.load(tmp_path)


def test_it_is_a_learner_and_a_kind_of_reranker() -> None:
    built = build_module(
        "rerank", {"kind": "linear", "m": 3, "embedder": {"name": "use", "cache": 10}, "optimizer": "adam"}
    )
    assert isinstance(built, Learner)
    assert (built.m, built.embedder.cache, built.optimizer) == (3, 10, "adam")
    assert KINDS["rerank"]["linear"].endswith("LinearReranker")


def test_wrong_options_are_refused_together() -> None:
    with pytest.raises(RecipeErrors) as caught:
        build_module("rerank", {"kind": "linear", "m": 0, "tau": 0, "lr": -1, "batch": 0})
    text = str(caught.value)
    assert all(f"agent.rerank.{key}" in text for key in ("m", "tau", "lr", "batch"))
    with pytest.raises(RecipeErrors, match="optimizer"):
        build_module("rerank", {"kind": "linear", "optimizer": "lion"})


def test_memfactory_is_imported_without_torch() -> None:
    script = "import sys; import memfactory.modules.linear_reranker; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
