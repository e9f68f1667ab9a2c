"""A store or an endpoint that fails makes an episode unscorable. It ends no run, trains nothing, is in no baseline."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tenacity import wait_random

sys.path.insert(0, str(Path(__file__).parents[1]))  # `servers` is shared by folders of tests

from servers import ChatServer, Reply

from memfactory.agents import BankAgent
from memfactory.agents.running import run_episodes
from memfactory.endpoints import endpoint as http
from memfactory.episode import Episode, Evidence, Message, Operation, Probe, StopReason, Task, Turn
from memfactory.errors import DataError, EngineError, RewardError, ServiceError, StoreError
from memfactory.memory.sqlite import SqliteStore
from memfactory.policy.endpoint import EndpointPolicy
from memfactory.policy.routing import RoutedPolicy
from memfactory.recipe import PolicySection
from memfactory.reward.catalogue import WeightedDimension, load_dimension
from memfactory.reward.system import RewardSystem

AGENT = BankAgent(
    extract={"kind": "lines"}, update={"kind": "words"}, retrieve={"kind": "search", "k": 1}, answer={"kind": "words"}
)
STREAM = ("ann : my pet is dog .", "ann : my drink is tea .", "ann : my home is rome .")
PROBES = (Probe("what is the pet of ann ?", ("dog",), (Evidence("dog", 0),)),)
EXACT = WeightedDimension("answer.exact_match", load_dimension("answer.exact_match"))


def task(number: int, stream: tuple[str, ...] = STREAM) -> Task:
    return Task(f"t{number}", stream, PROBES)


class Manager:
    """Adds every fact; answers with the last word it is shown."""

    greedy = False

    async def generate(self, messages: list[Message], *, module: str, max_tokens: int) -> Turn:
        await asyncio.sleep(0)
        text = messages[0]["content"].split(" question : ")[0].split()[-2] if module == "answer" else "ADD"
        return Turn(module, [1], [2], [-0.5], text, StopReason.STOP, messages)

    def split(self, text: str, max_tokens: int) -> list[str]:
        return [text]


class OnDisk:
    """`AGENT` on banks of stores on disk: which one is asked for each run anew."""

    def __init__(self, store_of: Callable[[int], SqliteStore]) -> None:
        self.store_of, self.runs = store_of, 0

    async def run(self, task: Task, policy: Any, store: Any = None) -> Episode:
        number, self.runs = self.runs, self.runs + 1
        return await AGENT.run(task, policy, self.store_of(number).bank(f"{task.id}/{number}"))


def failed(episodes: list[Episode]) -> list[bool]:
    return [bool(episode.failed) for episode in episodes]


def assess(episodes: list[Episode], limit: float):
    system = RewardSystem([EXACT])
    return system.assess(episodes, system.begin().finish(episodes), max_failed_share=limit)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(tmp_path / "good.sqlite") as good:
        yield good


@pytest.fixture
def full(tmp_path: Path) -> Iterator[SqliteStore]:
    """A store whose file has room for a bank and an entry or two, and then no more."""
    with SqliteStore(tmp_path / "full.sqlite") as store:
        (pages,) = store.connection().execute("PRAGMA page_count").fetchone()
        store.connection().execute(f"PRAGMA max_page_count = {pages + 1}")  # SQLite then says SQLITE_FULL
        yield store


# ---- stores ------------------------------------------------------------------------------------


def test_a_full_disk_costs_the_episode_that_met_it(store: SqliteStore, full: SqliteStore):
    long = tuple(f"ann : my note is {letter * 3000} ." for letter in "abcdefgh")
    done: list[Episode] = []
    tasks = [task(0), task(1, long), task(2)]
    episodes = run_episodes(OnDisk(lambda n: full if n == 1 else store), tasks, Manager(), done.append)
    assert [episode.task for episode in episodes] == tasks
    assert failed(episodes) == [False, True, False]
    assert episodes[1].failed.startswith("store: ")
    assert "full" in episodes[1].failed
    assert "fix:" in episodes[1].failed
    assert (episodes[1].turns, episodes[1].answers, episodes[1].group) == ([], [], "t1")
    assert len(full.bank("t1/1").entries()) > 0, "it failed in the middle"
    assert all(len(episode.turns) == 4 and episode.answer.text == "dog" for episode in (episodes[0], episodes[2]))
    assert len(done) == 3, "a failed episode is done, too"


def test_a_file_that_another_program_holds(store: SqliteStore, tmp_path: Path):
    path = tmp_path / "held.sqlite"
    with SqliteStore(path, busy_seconds=0.05) as held:
        for number in range(2):
            held.bank(f"t{number}/{number}")
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        episodes = run_episodes(OnDisk(lambda n: held if n < 2 else store), [task(n) for n in range(3)], Manager())
        assert failed(episodes) == [True, True, False]
        assert "locked" in episodes[0].failed
        other.execute("ROLLBACK")
        other.close()
        again = run_episodes(OnDisk(lambda n: held), [task(n) for n in range(3)], Manager())
        assert failed(again) == [False] * 3, "well again for the next"


# ---- endpoints ---------------------------------------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RoutedPolicy]]:
    """``endpoint(server, **recipe_keys)``: a policy that asks `server` for answers and `Manager` for the rest."""
    monkeypatch.setattr(http, "BACKOFF", wait_random(0, 0.02))
    made: list[EndpointPolicy] = []

    def make(server: ChatServer, **keys: Any) -> RoutedPolicy:
        made.append(EndpointPolicy(PolicySection(**{"base_url": server.url, "model": "big", "attempts": 2, **keys})))
        return RoutedPolicy(Manager(), {"answer": made[-1]})

    yield make
    for policy in made:
        policy.close()


def test_an_endpoint_that_dies_in_the_middle(endpoint):
    with ChatServer() as server:

        def answer(request, number) -> Reply:
            if number == 3:
                server.die()
            return Reply("dog")

        server.answer = answer
        episodes = run_episodes(AGENT, [task(0)] * 8, endpoint(server, concurrency=1))
    assert sorted(failed(episodes)) == [False] * 3 + [True] * 5
    for episode in episodes:
        if episode.failed:
            assert episode.failed.startswith("service: the endpoint of 'big' gave no reply to module 'answer'")
            assert episode.turns == []
        else:
            assert [turn.trainable for turn in episode.turns] == [True, True, True, False]
    with pytest.raises(
        ServiceError, match="5 of 8 episodes could not be scored, 5 by a fault of the service"
    ) as error:
        assess(episodes, limit=0.25)
    assert "base_url" in str(error.value)
    assert "rollout.max_failed_share" in error.value.fix
    assert assess(episodes, limit=0.7).failed == 5


def test_an_endpoint_that_refuses_one_prompt_fails_one_episode(endpoint):
    with ChatServer(
        lambda r, n: Reply(status=400) if "tea" in r["messages"][0]["content"] else Reply("dog")
    ) as server:
        tasks = [task(0, STREAM[:1]), Task("t1", STREAM[1:2], (Probe("what is the drink of ann ?", ("tea",)),))]
        episodes = run_episodes(AGENT, tasks, endpoint(server))
    assert failed(episodes) == [False, True]
    assert len(server.requests) == 2, "asking again would not mend it"


# ---- which errors ------------------------------------------------------------------------------


class Raises:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def run(self, task: Task, policy: Any, store: Any = None) -> Episode:
        await asyncio.sleep(0)
        if task.id == "t1":
            raise self.error
        return Episode(task, [Turn("m", [1], [2], [-0.5], "x", StopReason.STOP)])


@pytest.mark.parametrize("error", [DataError("d"), EngineError("e"), RewardError("r"), ValueError("v"), KeyError("k")])
def test_every_other_error_ends_the_run_as_before(error):
    with pytest.raises(type(error)):
        run_episodes(Raises(error), [task(0), task(1)], Manager())


def test_an_agent_with_a_task_group_fails_alike():
    class Grouped:
        def __init__(self, *errors: Exception) -> None:
            self.errors = errors

        async def run(self, task: Task, policy: Any, store: Any = None) -> Episode:
            async def fail(error: Exception) -> None:
                raise error

            async with asyncio.TaskGroup() as group:
                for error in self.errors:
                    group.create_task(fail(error))
            return Episode(task)

    (episode,) = run_episodes(Grouped(StoreError("away"), ServiceError("gone")), [task(0)], Manager())
    assert episode.failed == "store: away"
    with pytest.raises(ExceptionGroup):
        run_episodes(Grouped(StoreError("away"), ValueError("a bug")), [task(0)], Manager())


# ---- what is made of it ------------------------------------------------------------------------


def test_an_evaluation_counts_it_and_leaves_it_out(store: SqliteStore, full: SqliteStore):
    pytest.importorskip("torch")
    from memfactory.evaluate.run import EvalOptions, evaluate_agent

    policy = Manager()
    policy.drawing = lambda sampling, seed: contextlib.nullcontext()
    for size in (3000, 300, 30, 1):  # to the last byte
        with contextlib.suppress(StoreError):
            for _ in range(1000):
                full.bank("somebody").apply(Operation("ADD", text="x" * size))
    agent = OnDisk(lambda n: full if n % 3 == 2 else store)
    result = evaluate_agent(agent, [task(n) for n in range(6)], policy, EvalOptions(RewardSystem([EXACT])))
    for kind in ("sampled", "greedy"):
        assert result.metrics[f"{kind}_em"] == 1.0
        assert result.metrics[f"{kind}_failed"] == 2
        assert result.metrics[f"{kind}_faults/store"] == 2
    assert [episode.reward for episode in result.episodes["eval"]].count(None) == 2
    strict = EvalOptions(RewardSystem([EXACT]), max_failed_share=0.25)
    with pytest.raises(StoreError, match="2 of 6 episodes could not be run, 2 by a fault of the store"):
        evaluate_agent(agent, [task(n) for n in range(6)], policy, strict)


def test_the_record_keeps_why():
    from memfactory.runs import episode_from_record, episode_record

    episode = Episode(task(0), failed="service: nobody there: refused\n  fix: start it")
    record = episode_record(episode)
    assert episode_from_record(record).failed == episode.failed
    del record["failed"]
    assert episode_from_record(record).failed == "", "older records lack it"
