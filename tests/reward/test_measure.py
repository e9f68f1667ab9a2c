"""Measuring: every shape a reward function may have, every way it may fail, and that a failure costs itself alone."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import signal
import threading
import time

import numpy as np
import pytest
import torch

from memfactory.episode import Answer, Episode, Probe, Score, StopReason, Task, Turn
from memfactory.errors import JudgeError, RewardError
from memfactory.recipe import RewardSection
from memfactory.reward import catalogue
from memfactory.reward import measure as measuring
from memfactory.reward.aggregate import WeightedSum
from memfactory.reward.catalogue import WeightedDimension, build_dimension, load_dimension
from memfactory.reward.dimension import RewardDimension, Scope, reward
from memfactory.reward.measure import MAX_HANGS, Measuring, measure, measure_one
from memfactory.reward.system import RewardSystem


def turn(module="write", text="0.5"):
    return Turn(module, [1], [2, 3], [-1.0, -1.0], text, StopReason.STOP, messages=[{"role": "user", "content": "?"}])


def episode(number=0.5, group="g", turns=("write", "answer")):
    probe = Probe("How much?", (f"{number}", "gold"))
    task = Task(f"task-{number}", (), (probe,), {"level": 3})
    made = [turn(module, f"{number}") for module in turns]
    return Episode(task, made, [Answer(probe, f"{number}")], id=f"e{number}", group=group, memory=f"{number}")


def batch(size=6):
    return [episode(i / 10, group="gh"[i % 2]) for i in range(size)]


def weigh(function, name="it", **options):
    return WeightedDimension(name, RewardDimension(name, function, **options))


def good(e):
    return float(e.memory)


def values(episodes, name="it"):
    return [e.scores[name].value for e in episodes]


@pytest.fixture
def release():
    """Hung calls wait for this; it is set when the test ends, so that no thread outlives it."""
    event = threading.Event()
    yield event
    event.set()


# ---- every shape of a function -----------------------------------------------------------------


async def async_good(e):
    await asyncio.sleep(0)
    return float(e.memory)


class Object:
    def __call__(self, e):
        return float(e.memory)


class AsyncObject:
    async def __call__(self, e):
        await asyncio.sleep(0)
        return float(e.memory)


class Bound:
    def method(self, e):
        return float(e.memory)

    async def async_method(self, e):
        return float(e.memory)


def with_option(e, *, plus=0.0):
    return float(e.memory) + plus


async def async_batched(episodes):
    return [float(e.memory) for e in episodes]


SHAPES = {
    "function": (good, {}),
    "async function": (async_good, {}),
    "lambda": (lambda e: float(e.memory), {}),
    "partial": (functools.partial(with_option, plus=0.0), {}),
    "partial of async": (functools.partial(async_good), {}),
    "object": (Object(), {}),
    "async object": (AsyncObject(), {}),
    "partial of object": (functools.partial(Object()), {}),
    "partial of async object": (functools.partial(AsyncObject()), {}),
    "method": (Bound().method, {}),
    "async method": (Bound().async_method, {}),
    "batched": (lambda episodes: [float(e.memory) for e in episodes], {"batched": True}),
    "batched, numpy": (lambda episodes: np.array([float(e.memory) for e in episodes]), {"batched": True}),
    "batched, torch": (
        lambda episodes: torch.tensor([float(e.memory) for e in episodes], dtype=torch.float64),
        {"batched": True},
    ),
    "batched, tuple": (lambda episodes: tuple(float(e.memory) for e in episodes), {"batched": True}),
    "batched, generator": (lambda episodes: (float(e.memory) for e in episodes), {"batched": True}),
    "batched, async": (async_batched, {"batched": True}),
    "group": (lambda episodes: [float(e.memory) for e in episodes], {"scope": Scope.GROUP}),
    "group, async": (async_batched, {"scope": Scope.GROUP}),
    "turn": (lambda e, t: float(t.text), {"scope": Scope.TURN}),
    "module": (lambda e, t: float(t.text), {"scope": Scope.MODULE, "modules": ("write",)}),
    "no deadline": (good, {"deadline": None}),
}
shapes = pytest.mark.parametrize(("function", "options"), SHAPES.values(), ids=[n.replace(" ", "-") for n in SHAPES])


@shapes
def test_every_shape_of_function(function, options):
    episodes = batch()
    faults = measure(episodes, [weigh(function, **options)])
    assert values(episodes) == pytest.approx([i / 10 for i in range(6)])
    assert (faults.count, faults.by_dimension) == ({}, {})
    alone = episode(0.3)
    assert measure_one(RewardDimension("it", function, **options), alone).value == pytest.approx(0.3)


def test_turns_have_scores_of_their_own_and_the_episode_their_mean():
    one = episode(0.5, turns=("write", "answer", "write"))
    for t, text in zip(one.turns, ("0.2", "0.9", "0.4"), strict=True):
        t.text = text
    measure([one], [weigh(lambda e, t: float(t.text), scope=Scope.MODULE, modules=("write",))])
    assert [t.scores["it"].value if "it" in t.scores else None for t in one.turns] == [0.2, None, 0.4]
    assert one.scores["it"].value == pytest.approx(0.3)


def test_an_episode_with_a_turn_that_could_not_be_measured_has_no_mean():
    one = episode(turns=("write", "write"))
    one.turns[1].text = "x"
    faults = measure([one], [weigh(lambda e, t: float(t.text), scope=Scope.TURN)])
    assert one.turns[0].scores["it"].value == 0.5
    assert one.turns[1].scores["it"].value is None
    assert one.scores["it"].value is None
    assert "could not convert" in one.scores["it"].reason
    assert "turn 1" in faults.examples[0]


def test_no_episodes_and_episodes_without_turns():
    assert measure([], [weigh(good), weigh(async_batched, "b", batched=True)]).count == {}
    bare = episode(turns=())
    measure([bare], [weigh(good), weigh(lambda e, t: 1.0, "own", scope=Scope.TURN)])
    assert bare.scores["it"].value == 0.5
    assert "no turn" in bare.scores["own"].reason


MODULE = """
def plain(episode):
    return float(episode.memory)

class Counter:
    async def __call__(self, episode):
        return float(episode.memory)

made = Counter()
number = 3

def trl_style(completions, **kwargs):
    return [float(c[0]["content"]) for c in completions]
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "their_rewards_0.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["plain", "made", "trl_style"])
@pytest.mark.parametrize("by_path", [False, True])
def test_by_the_name_of_a_module(user_module, name, by_path):
    source = str(user_module / "their_rewards_0.py") if by_path else "their_rewards_0"
    weighted = build_dimension(RewardSection(name=f"{source}:{name}", label="it"))
    episodes = batch()
    assert measure(episodes, [weighted]).examples == []
    assert values(episodes) == pytest.approx([i / 10 for i in range(6)])


def test_what_is_no_function_is_refused(user_module):
    with pytest.raises(Exception, match="it is a int, not a function"):
        load_dimension("their_rewards_0:number")


# ---- TRL's functions ---------------------------------------------------------------------------


def narrow(completions, answers):
    return [float(a[0]) for a in answers]


async def trl_async(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [float(text) for text in kwargs["answer"]]


class TRLObject:
    def __call__(self, prompts, completions, **kwargs):
        return [float(c[0]["content"]) for c in completions]


def ids_alone(completion_ids, **kwargs):
    """As TRL's own punishment of overlong completions is written."""
    return [float(text) for text in kwargs["answer"]]


def everything(prompts, completions, completion_ids, level, solution, trainer_state, log_extra, log_metric, **rest):
    assert level == [3] * len(prompts)
    assert prompts[0] == [{"role": "user", "content": "?"}]
    assert completion_ids[0] == [2, 3]
    log_extra("column", solution)
    log_metric("metric", 1.0)
    return [float(c[0]["content"]) for c in completions]


@pytest.mark.parametrize(
    "function", [narrow, trl_async, TRLObject(), ids_alone, everything], ids=lambda f: type(f).__name__
)
def test_trl_functions_unchanged(function, monkeypatch):
    monkeypatch.setattr(catalogue, "resolve", lambda name: function)
    dimension = load_dimension("their:function")
    assert (dimension.low, dimension.high, dimension.batched) == (-np.inf, np.inf, True)
    episodes = batch()
    assert measure(episodes, [WeightedDimension("it", dimension)]).examples == []
    assert values(episodes) == pytest.approx([i / 10 for i in range(6)])


def test_a_trl_function_may_abstain_on_some():
    dimension = measuring_of_trl(lambda completions, **kw: [None, 1.0, None])
    episodes = batch(3)
    assert measure(episodes, [WeightedDimension("it", dimension)]).count == {}
    assert values(episodes) == [None, 1.0, None]


def measuring_of_trl(function):
    from memfactory.reward.trl import from_trl

    return from_trl(function, "theirs")


def test_rewards_that_ship_with_trl():
    from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

    thinking, plain = episode(0.1), episode(0.2)
    thinking.turns[-1].text = "<think>a b c d</think> 4"
    plain.turns[-1].text = "a b a b a b"
    plain.turns[-1].completion_ids = [8, 9, 8, 9, 8, 9]
    episodes = [thinking, plain]
    names = {
        "format": think_format_reward,
        "length": get_soft_overlong_punishment(max_completion_len=2, soft_punish_cache=1),
        "repetition": get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0),
    }
    made = [WeightedDimension(name, measuring_of_trl(function)) for name, function in names.items()]
    faults = measure(episodes, made)
    assert faults.examples == []
    assert values(episodes, "format") == [1.0, 0.0]
    assert values(episodes, "length") == [-1.0, -1.0]
    assert values(episodes, "repetition") == pytest.approx([0.0, -0.6])  # 2 of 5 pairs of words are new


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math_verify")
def test_accuracy_reward_of_trl_uses_signals_and_so_needs_the_main_thread():
    from dataclasses import replace

    from trl.rewards import accuracy_reward

    dimension = measuring_of_trl(accuracy_reward)
    episodes = [episode(0.5)]
    measure(episodes, [WeightedDimension("it", replace(dimension, deadline=None))])
    assert values(episodes) == [1.0]


def alarmed(e):
    """What libraries with time limits of their own do, math_verify among them."""
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, before)
    return float(e.memory)


def test_functions_that_use_signals_run_without_a_deadline():
    episodes = batch(2)
    faults = measure(episodes, [weigh(alarmed)])
    assert "main thread" in episodes[0].scores["it"].reason  # a limit of ours means a thread
    assert faults.by_dimension == {"it": 2}
    assert measure(episodes, [weigh(alarmed, deadline=None)]).count == {}
    assert values(episodes) == [0.0, 0.1]


def test_deadline_0_in_a_recipe_means_none(user_module):
    section = RewardSection(name="their_rewards_0:plain", deadline=0)
    assert build_dimension(section).dimension.deadline is None


# ---- every way to fail -------------------------------------------------------------------------


def on(number, do):
    """A function that does `do` on one episode and is good on the others."""

    def function(e):
        return do() if e.memory == f"{number}" else float(e.memory)

    return function


def on_async(number, do):
    async def function(e):
        return await do() if e.memory == f"{number}" else float(e.memory)

    return function


def throw(error):
    raise error


def returns(result):
    return lambda: result


async def async_throw(error):
    raise error


WRONG = {
    "raises": (lambda: throw(KeyError("answer")), "KeyError"),
    "raises without text": (lambda: throw(ValueError()), "ValueError"),
    "exits": (lambda: throw(SystemExit(3)), "SystemExit"),
    "text": (returns("good"), "'good'"),
    "number as text": (returns("0.5"), "'0.5'"),
    "nan": (returns(float("nan")), "nan"),
    "infinite": (returns(float("inf")), "inf"),
    "too high": (returns(1.5), "outside its range"),
    "too low": (returns(-0.1), "outside its range"),
    "a list": (returns([0.5]), r"[0.5]"),
    "a dictionary": (returns({"score": 1}), "score"),
    "two numbers": (returns(torch.tensor([0.1, 0.2])), "0.1"),
    "huge": (returns(10**400), "1000"),
    "a bad Score": (lambda: Score(float("nan")), "ValueError"),
    "a Score out of range": (lambda: Score(7.0), "outside its range"),
}
wrong = pytest.mark.parametrize(("do", "says"), WRONG.values(), ids=[name.replace(" ", "-") for name in WRONG])


@wrong
def test_a_failure_costs_its_own_score_alone(do, says):
    episodes = batch()
    faults = measure(episodes, [weigh(on(0.2, do), deadline=5.0), weigh(good, "other")])
    assert values(episodes) == [0.0, 0.1, None, 0.3, 0.4, 0.5]
    assert values(episodes, "other") == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert says in episodes[2].scores["it"].reason
    assert faults.count == {"reward": 1}
    assert faults.by_dimension == {"it": 1}
    assert "task-0.2" in faults.examples[0]
    assert "test_measure.py:" in faults.examples[0]
    assert "fix:" in faults.examples[0]
    with pytest.raises(RewardError):
        measure_one(RewardDimension("it", on(0.2, do)), episode(0.2))


ASYNC_WRONG = {
    "raises": (lambda: async_throw(KeyError("answer")), "KeyError"),
    "exits": (lambda: async_throw(SystemExit(3)), "SystemExit"),
    "times out by itself": (lambda: async_throw(TimeoutError("theirs")), "theirs"),
    "is cancelled": (lambda: async_throw(asyncio.CancelledError()), "Cancelled"),
    "hangs": (lambda: asyncio.sleep(30), "no answer within 0.2 s"),
    "nan": (lambda: asyncio.sleep(0, float("nan")), "nan"),
    "nothing": (lambda: asyncio.sleep(0, None), "returned None"),
}


@pytest.mark.parametrize(("do", "says"), ASYNC_WRONG.values(), ids=[name.replace(" ", "-") for name in ASYNC_WRONG])
def test_an_async_failure_costs_its_own_score_alone(do, says):
    episodes = batch()
    faults = measure(episodes, [weigh(on_async(0.2, do), deadline=0.2), weigh(good, "other")])
    assert values(episodes) == [0.0, 0.1, None, 0.3, 0.4, 0.5]
    assert values(episodes, "other") == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert says in episodes[2].scores["it"].reason
    assert faults.count == ({} if says == "returned None" else {"reward": 1})  # the function may say so


WRONG_LISTS = {
    "too short": (lambda es: [0.5] * (len(es) - 1), "values"),
    "too long": (lambda es: [0.5] * (len(es) + 1), "values"),
    "a number": (lambda es: 0.5, "0.5"),
    "None": (lambda es: None, "None"),
    "text": (lambda es: "x" * len(es), "xx"),
    "a dictionary": (lambda es: dict.fromkeys(range(len(es)), 1.0), "1.0"),
    "raises": (lambda es: throw(KeyError("k")), "KeyError"),
    "a generator that raises": (lambda es: (throw(KeyError("k")) for _ in es), "KeyError"),
}
wrong_lists = pytest.mark.parametrize(
    ("do", "says"), WRONG_LISTS.values(), ids=[n.replace(" ", "-") for n in WRONG_LISTS]
)


@pytest.mark.parametrize("shape", ["batched", "batched async", "group", "trl"])
@wrong_lists
def test_a_function_of_lists_that_fails(do, says, shape):
    async def later(episodes):
        return do(episodes)

    made = {
        "batched": weigh(do, batched=True),
        "batched async": weigh(later, batched=True),
        "group": weigh(do, scope=Scope.GROUP),
        "trl": WeightedDimension("it", measuring_of_trl(lambda completions, **kw: do(completions))),
    }
    episodes = batch(4)
    faults = measure(episodes, [made[shape], weigh(good, "other")])
    assert values(episodes) == [None] * 4
    assert values(episodes, "other") == [0.0, 0.1, 0.2, 0.3]
    assert all(says in e.scores["it"].reason for e in episodes)
    assert faults.by_dimension == {"it": 4}
    assert faults.count == {"reward": 2 if shape == "group" else 1}  # failed calls


def test_one_bad_value_in_a_list_costs_one_episode():
    episodes = batch(4)
    faults = measure(episodes, [weigh(lambda es: [0.5, "x", None, 2.0], batched=True)])
    assert values(episodes) == [0.5, None, None, None]
    assert faults.count == {"reward": 2}
    assert faults.by_dimension == {"it": 2}
    assert "task-0.1" in faults.examples[0]


def test_a_group_that_fails_costs_that_group():
    def picky(episodes):
        return [1.0] * len(episodes) if episodes[0].group == "g" else throw(ValueError("no"))

    episodes = batch(4)
    measure(episodes, [weigh(picky, scope=Scope.GROUP)])
    assert values(episodes) == [1.0, None, 1.0, None]


def test_faults_are_classed_by_their_own_class():
    def judged(e):
        raise JudgeError("the judge", "no answer", "start it")

    async def judged_later(e):
        raise JudgeError("the judge", "no answer", "start it")

    episodes = batch(2)
    dimensions = [weigh(judged, "now"), weigh(judged_later, "later"), weigh(on(0.1, lambda: 1 / 0), "mine")]
    faults = measure(episodes, dimensions)
    assert faults.count == {"judge": 4, "reward": 1}
    assert faults.by_dimension == {"now": 2, "later": 2, "mine": 1}


def test_the_traceback_names_the_line_that_raised():
    def deep():
        raise LookupError("deep inside")

    line = deep.__code__.co_firstlineno + 1
    faults = measure(batch(1), [weigh(lambda e: deep())])
    assert f"test_measure.py:{line}" in faults.examples[0]
    assert f"line {line}, in deep" in faults.tracebacks[0]
    assert "deep inside" in faults.tracebacks[0]


def test_a_dimension_of_turns_that_fails_on_every_turn_failed_on_one_episode():
    episodes = [episode(i / 10, turns=["write"] * 5) for i in range(4)]
    faults = measure(episodes, [weigh(lambda e, t: 1 / float(t.text), scope=Scope.TURN, high=100.0)])
    assert faults.count == {"reward": 5}
    assert faults.by_dimension == {"it": 1}


# ---- hanging -----------------------------------------------------------------------------------


def test_a_call_that_hangs_is_left_behind(release):
    called = []

    def function(e):
        called.append(e.memory)
        if e.memory == "0.2":
            release.wait(30)
        return float(e.memory)

    episodes = batch()
    begun = time.monotonic()
    faults = measure(episodes, [weigh(function, deadline=0.1), weigh(good, "other")])
    assert time.monotonic() - begun < 10
    assert values(episodes) == [0.0, 0.1, None, 0.3, 0.4, 0.5]
    assert called == [e.memory for e in episodes]
    assert values(episodes, "other") == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert "no answer within 0.1 s" in episodes[2].scores["it"].reason
    assert faults.count == {"reward": 1}


def test_what_a_call_that_was_left_behind_returns_later_changes_nothing(release):
    finished = threading.Event()

    def function(e):
        if e.memory == "0.0":
            release.wait(30)
            finished.set()
        return 1.0

    episodes = batch(3)
    measure(episodes, [weigh(function, deadline=0.1)])
    before = values(episodes)
    release.set()
    assert finished.wait(30)
    assert values(episodes) == before == [None, 1.0, 1.0]


def test_after_three_the_rest_is_not_called(release):
    called = []

    def function(e):
        called.append(e.memory)
        release.wait(30)

    episodes = batch(10)
    begun = time.monotonic()
    faults = measure(episodes, [weigh(function, deadline=0.1), weigh(good, "other")])
    assert time.monotonic() - begun < 10
    assert len(called) == MAX_HANGS == 3
    assert values(episodes) == [None] * 10
    assert "not called" in episodes[9].scores["it"].reason
    assert values(episodes, "other") == pytest.approx([i / 10 for i in range(10)])
    assert faults.by_dimension == {"it": 10}


def test_slow_is_not_hung():
    """The limit is for one call: many that take half of it each are fine."""

    def function(e):
        time.sleep(0.1)
        return 1.0

    episodes = batch(6)
    assert measure(episodes, [weigh(function, deadline=0.4)]).count == {}
    assert values(episodes) == [1.0] * 6


def test_async_calls_hang_together():
    """All ten wait at once: ten limits of .3 s do not take 3 s."""
    waiting, most = 0, 0

    async def function(e):
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await asyncio.sleep(30)

    episodes = batch(10)
    begun = time.monotonic()
    faults = measure(episodes, [weigh(function, deadline=0.3), weigh(good, "other")])
    assert time.monotonic() - begun < 10
    assert most == 10
    assert faults.by_dimension == {"it": 10}
    assert values(episodes, "other") == pytest.approx([i / 10 for i in range(10)])


def test_an_async_call_that_will_not_be_cancelled_is_left_behind(release):
    """`except:` around a retry swallows the cancellation too."""

    async def stubborn(e):
        while not release.is_set():
            try:
                await asyncio.sleep(0.05)
            except BaseException:
                continue
        return 1.0

    episodes = batch(2)
    begun = time.monotonic()
    faults = measure(episodes, [weigh(stubborn, deadline=0.2)])
    assert time.monotonic() - begun < 10
    assert values(episodes) == [None, None]
    assert faults.by_dimension == {"it": 2}


def test_an_async_function_that_blocks_the_loop_is_left_behind_with_the_loop(release, monkeypatch):
    monkeypatch.setattr(measuring, "_POLL", 0.1)
    blocked = []

    async def blocks(e):
        if not release.is_set():
            blocked.append(e.id)
            release.wait(30)  # time.sleep, requests.get, a lock
        return 1.0

    system = RewardSystem([weigh(blocks, deadline=0.2), weigh(good, "other")], WeightedSum())
    episodes = batch(3)
    begun = time.monotonic()
    faults = system.begin().finish(episodes)
    assert time.monotonic() - begun < 10
    assert len(blocked) == 1
    assert values(episodes) == [None] * 3
    assert "blocks the event loop" in episodes[0].scores["it"].reason
    assert values(episodes, "other") == [0.0, 0.1, 0.2]
    assert faults.by_dimension == {"it": 3}

    release.set()  # and the next batch has a loop that works
    episodes = batch(3)
    assert system.begin().finish(episodes).count == {}
    assert values(episodes) == [1.0] * 3


def test_a_short_block_is_forgiven():
    async def sleeps(e):
        time.sleep(0.05)
        return float(e.memory)

    episodes = batch(4)
    assert measure(episodes, [weigh(sleeps, deadline=5.0)]).count == {}
    assert values(episodes) == [0.0, 0.1, 0.2, 0.3]


# ---- async work begins when an episode is complete ---------------------------------------------


def test_judges_work_while_others_are_generated():
    """Each judge call ends before the next episode is submitted: none waited for the batch, nor for `finish`."""
    ended = {f"e{i / 10}": threading.Event() for i in range(6)}

    async def judge(e):
        await asyncio.sleep(0.01)
        ended[e.id].set()
        return float(e.memory)

    work = Measuring([weigh(judge), weigh(good, "other")])
    episodes = batch()
    for e in episodes:
        work.submit(e)
        assert ended[e.id].wait(20)
    assert work.finish(episodes).count == {}
    assert values(episodes) == values(episodes, "other") == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]


def test_submitting_does_not_wait_and_judges_run_together():
    """No call can end before all 64 have begun, and all begin while episodes still come in."""
    begun, gate = [], asyncio.Event()

    async def judge(e):
        begun.append(e.id)
        if len(begun) == 64:
            gate.set()
        await gate.wait()
        return 1.0

    work, episodes = Measuring([weigh(judge, deadline=30.0)]), [episode(i) for i in range(64)]
    for e in episodes:
        work.submit(e)
    faults = work.finish(episodes)
    assert faults.count == {}
    assert len(begun) == 64
    assert values(episodes) == [1.0] * 64


def test_nothing_is_measured_twice_and_what_was_not_submitted_is_measured_too():
    calls = []

    async def judge(e):
        calls.append(e.id)
        return 1.0

    work, episodes = Measuring([weigh(judge)]), batch(4)
    for e in (episodes[2], episodes[0]):
        work.submit(e)
    work.finish(episodes)
    assert sorted(calls) == [e.id for e in episodes]
    assert values(episodes) == [1.0] * 4


def test_ordinary_functions_wait_until_all_episodes_are_there():
    seen = []
    work, episodes = Measuring([weigh(lambda e: seen.append(e.id) or 1.0)]), batch(3)
    for e in episodes:
        work.submit(e)
    assert seen == []
    work.finish(episodes)
    assert seen == [e.id for e in episodes]


def test_ordinary_functions_run_while_judges_still_wait():
    """The judge answers only after the ordinary function has been called: waiting in turn would hang."""
    called = threading.Event()

    async def judge(e):
        while not called.is_set():
            await asyncio.sleep(0.005)
        return 1.0

    def ordinary(e):
        called.set()
        return 1.0

    episodes = batch(2)
    assert measure(episodes, [weigh(judge, deadline=20.0), weigh(ordinary, "other")]).count == {}


def test_submit_is_safe_from_many_threads():
    async def judge(e):
        await asyncio.sleep(0)
        return float(e.memory) / 64

    work, episodes = Measuring([weigh(judge)]), [episode(i) for i in range(64)]
    threads = [threading.Thread(target=work.submit, args=(e,)) for e in episodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert work.finish(episodes).count == {}
    assert values(episodes) == [i / 64 for i in range(64)]


# ---- thresholds --------------------------------------------------------------------------------


def assess(dimensions, episodes, limit):
    system = RewardSystem(dimensions, WeightedSum())
    faults = system.begin().finish(episodes)
    return system.assess(episodes, faults, max_failed_share=limit)


def test_a_run_stops_when_too_many_episodes_have_no_reward():
    function = on(0.1, lambda: 1 / 0)
    assert assess([weigh(function)], batch(4), 0.25).failed == 1
    with pytest.raises(RewardError, match="1 of 4 episodes could not be scored") as error:
        assess([weigh(function)], batch(4), 0.2)
    assert "ZeroDivisionError" in str(error.value)
    assert "rollout.max_failed_share" in str(error.value)


def test_a_run_stops_when_one_function_fails_too_often_even_if_rewards_are_there():
    """A dimension that is only watched, or a gate, leaves rewards; its faults count all the same."""
    watched = WeightedDimension("watched", RewardDimension("watched", on(0.1, lambda: 1 / 0)), weight=0.0)
    assert assess([weigh(good), watched], batch(4), 0.25).failed == 0
    with pytest.raises(RewardError, match="reward 'watched' failed"):
        assess([weigh(good), watched], batch(4), 0.2)


def test_many_turns_of_one_episode_are_one_episode():
    episodes = [episode(i / 10, turns=["write"] * 9) for i in range(4)]
    own = weigh(lambda e, t: 1 / float(t.text), "own", scope=Scope.TURN, high=100.0)
    assert assess([weigh(good), own], episodes, 0.25).failed == 0


def test_none_that_a_function_returns_counts_for_the_reward_and_not_as_a_fault():
    with pytest.raises(RewardError, match="their dimensions returned None"):
        assess([weigh(lambda e: None)], batch(4), 0.9)
    assert assess([weigh(lambda e: None)], batch(4), 1.0).failed == 4
    watched = WeightedDimension("watched", RewardDimension("watched", lambda e: None), weight=0.0)
    assert assess([weigh(good), watched], batch(4), 0.0).failed == 0


# ---- over ranks --------------------------------------------------------------------------------


def test_groups_spread_over_ranks_are_measured_whole(on_ranks):
    parts = [
        [episode(0.0, "a"), episode(0.1, "a"), episode(0.2, "b")],
        [episode(0.3, "b"), episode(0.4, "b"), episode(0.5, "c")],
    ]
    sizes = weigh(lambda episodes: [float(len(episodes))] * len(episodes), scope=Scope.GROUP, high=9.0)
    on_ranks(parts, lambda rank, own, gather: Measuring([sizes]).finish(own, gather))
    assert [values(part) for part in parts] == [[2.0, 2.0, 3.0], [3.0, 3.0, 1.0]]


def test_a_fault_of_a_spread_group_counts_each_episode_once(on_ranks):
    parts = [[episode(0.0, "a"), episode(0.1, "a")], [episode(0.2, "a"), episode(0.3, "b")]]
    bad = weigh(lambda episodes: throw(ValueError("no")), scope=Scope.GROUP)
    faults = on_ranks(parts, lambda rank, own, gather: Measuring([bad]).finish(own, gather))
    assert [f.by_dimension for f in faults] == [{"it": 2}, {"it": 2}]


def test_every_rank_sees_a_spread_group_in_the_same_order(on_ranks):
    parts = [[episode(0.0, "a"), episode(0.1, "a")], [episode(0.2, "b"), episode(0.3, "a")]]
    place = weigh(lambda episodes: [float(i) for i in range(len(episodes))], scope=Scope.GROUP, high=9.0)
    on_ranks(parts, lambda rank, own, gather: Measuring([place]).finish(own, gather))
    assert [values(part) for part in parts] == [[0.0, 1.0], [0.0, 2.0]]


def test_an_async_dimension_can_be_called_where_an_event_loop_runs():
    @reward
    async def later(episode):
        return 0.5

    async def notebook():
        return later(episode())

    assert asyncio.run(notebook()).value == 0.5
