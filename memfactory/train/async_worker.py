"""The worker that samples while training goes on: our agents' episodes, measured, credited, as samples of TRL's.

A thread of the trainer's process with an event loop. The work is elsewhere: turns are sampled by servers, judges
answer from theirs. Generation batches are begun ahead of training and handed over in order. How far ahead decides how
old they are when they are trained: batch b (from 0) is what update b + 1 is made from, so it is trained by weights
with b updates behind them, and is begun when the servers have weights with

    v >= b - max_staleness

behind them (the admission rule of AReaL, arXiv 2505.24298, by batches). So no turn of it is older than
`max_staleness` updates, and nothing has to be sampled to be thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from memfactory.agents.base import Agent
from memfactory.agents.running import episodes_of
from memfactory.episode import Episode, StopReason, Task
from memfactory.errors import EngineError
from memfactory.policy.routing import RoutedPolicy
from memfactory.reward.measure import Measuring
from memfactory.reward.system import Assessment, RewardSystem
from memfactory.train.folding import Folded, fold
from memfactory.train.rows import build_rows, loss_weights


@dataclass(frozen=True)
class Rules:
    """What decides which rows an episode becomes, and how they count."""

    loss_type: str
    scale_rewards: str
    max_length: int
    """TRL's `max_completion_length`."""
    mask_truncated: bool
    max_failed_share: float
    max_staleness: int
    seed: Callable[..., int]
    """A seed from any values, different for each."""


@dataclass
class RolloutBatch:
    """A generation batch: everything one update is made from."""

    number: int
    prompts: list[int]
    """Index of the task of each episode."""
    episodes: list[Episode]
    assessment: Assessment
    samples: list[Folded]
    tokens: int
    """Trained tokens of all measured episodes, those without signal included: what a token's share is taken of."""
    rows: int
    rows_trained: int
    """Those that have an advantage. Of each there are as many samples as it has different ones."""
    rewards_state: dict[str, Any]
    """Of stateful parts of rewards, as this batch left them: later ones may be measured by the time it is trained."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Between its beginning and the last episode's end, and for what was left to measure then."""


class EpisodeRolloutWorker:
    """Implements TRL's ``RolloutWorkerProtocol``; its queue has whole batches.

    Args:
        agent: runs the episodes.
        tasks: all training tasks.
        rewards: measures and credits them.
        rules: see there.
        order: indexes of the tasks of a batch, by its number, each as often as it has episodes.
        last: how many batches there are in all.
    """

    def __init__(
        self,
        agent: Agent,
        tasks: Sequence[Task],
        rewards: RewardSystem,
        rules: Rules,
        order: Callable[[int], list[int]],
        last: int,
    ) -> None:
        self.agent, self.tasks, self.rewards, self.rules = agent, tasks, rewards, rules
        self.order, self.last = order, last
        self.policy: RoutedPolicy | None = None
        """Set before `start`; each batch draws from a copy of it."""
        self.first = 0
        """Number of the batch to begin with: a resumed run does not begin with 0."""
        self.rollout_buffer: queue.Queue[RolloutBatch] = queue.Queue()
        self.metrics_queue: queue.Queue[dict[str, float]] = queue.Queue()
        """Stays empty: what is measured of a batch is logged with the update that it is for."""
        self._version = -1
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._moved: asyncio.Event | None = None
        self._ready = threading.Event()

    # ---- what TRL calls, from the trainer's thread -------------------------------------------

    def start(self) -> None:
        """Begin to sample."""
        self._error = None
        self._thread = threading.Thread(target=self._run, name="memfactory-rollouts", daemon=True)
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """End what is under way, and wait until it has ended. Nothing happens where nothing was started."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._main is not None:
            self._tell(self._main.cancel)
        thread.join()

    def update_model_version(self, model_version: int) -> None:
        """The servers have the weights after `model_version` updates."""
        self._version = model_version
        if self._moved is not None:
            self._tell(self._moved.set)

    def _tell(self, call: Callable[[], object]) -> None:
        """Make `call` in the worker's loop; when all batches were made, there is none any more."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

    def check_health(self, stale_after_s: float) -> None:
        """See that there will be another batch. `stale_after_s` is not used: every request and every measurement has a
        deadline of its own, and says what it waited for when that is over.

        Raises:
            Exception: what ended the worker, as it was raised there.
        """
        if self._error is not None:
            raise self._error
        if (self._thread is None or not self._thread.is_alive()) and self.rollout_buffer.empty():
            raise EngineError(
                "nothing is sampled any more, and an update waits for episodes",
                f"batches {self.first} to {self.last - 1} were made",
                "go on with --resume, and report this",
            )

    # ---- in the worker's thread ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._produce())
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as several:
            self._error = several.exceptions[0]
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _produce(self) -> None:
        self._loop, self._main, self._moved = asyncio.get_running_loop(), asyncio.current_task(), asyncio.Event()
        self._ready.set()
        begun: asyncio.Queue[asyncio.Task[_Generated]] = asyncio.Queue()
        with ThreadPoolExecutor(1, "memfactory-rewards") as measuring:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._hand_over(begun, measuring))
                for number in range(self.first, self.last):
                    await self._admitted(number)
                    begun.put_nowait(group.create_task(self._generate(number)))

    async def _admitted(self, number: int) -> None:
        assert self._moved is not None
        while self._version < number - self.rules.max_staleness:
            self._moved.clear()
            if self._version < number - self.rules.max_staleness:  # it may have moved in between
                await self._moved.wait()

    async def _generate(self, number: int) -> _Generated:
        assert self.policy is not None
        prompts, policy = self.order(number), self.policy.apart()
        policy.seed(self.rules.seed(number))
        measuring, start = self.rewards.begin(), time.perf_counter()
        tasks = [self.tasks[prompt] for prompt in prompts]
        episodes = await episodes_of(self.agent, tasks, policy, measuring.submit)
        for place, episode in enumerate(episodes):
            episode.id = f"{number}/0/{place}"
        return _Generated(number, prompts, episodes, measuring, time.perf_counter() - start)

    async def _hand_over(self, begun: asyncio.Queue[asyncio.Task[_Generated]], measuring: ThreadPoolExecutor) -> None:
        """Measure batches in their order, one at a time: parts of rewards that have a state see them as they would
        without any hurry."""
        assert self._loop is not None
        for _ in range(self.first, self.last):
            generated = await (await begun.get())
            self.rollout_buffer.put(await self._loop.run_in_executor(measuring, self.assess, generated))

    def assess(self, generated: _Generated) -> RolloutBatch:
        """Scores, rewards, credit, rows and samples of a batch.

        Raises:
            MemFactoryError: too many of its episodes could not be run or scored.
        """
        rules, episodes, start = self.rules, generated.episodes, time.perf_counter()
        assessment = self.rewards.assess(
            episodes,
            generated.measuring.finish(episodes),
            scale_rewards=rules.scale_rewards,
            seed=rules.seed("shuffle", generated.number),
            max_failed_share=rules.max_failed_share,
        )
        if rules.mask_truncated:
            for turn in (turn for episode in episodes for turn in episode.turns):
                turn.trainable &= turn.stop is not StopReason.LENGTH
        measured = [place for place, episode in enumerate(episodes) if episode.reward is not None]
        all_rows = build_rows([episodes[place] for place in measured])
        tokens = [0] * len(measured)
        for row in all_rows:
            tokens[row.episode] += row.trained_tokens
        # groups without spread count in every mean, and are in no pass
        rows = [row for row in all_rows if any(row.advantages)]
        weights = loss_weights(rows, tokens, rules.loss_type, rules.max_length)
        group_of = {name: place for place, name in enumerate(dict.fromkeys(episode.group for episode in episodes))}
        samples = fold(rows, weights, [group_of[episodes[place].group] for place in measured])
        return RolloutBatch(
            generated.number,
            generated.prompts,
            episodes,
            assessment,
            [Folded(own.sample, measured[own.episode]) for own in samples],
            sum(tokens),
            len(all_rows),
            len(rows),
            copy.deepcopy(self.rewards.state_dict()),
            {"generate": generated.seconds, "reward": time.perf_counter() - start},
        )


@dataclass
class _Generated:
    """A batch whose episodes are complete."""

    number: int
    prompts: list[int]
    episodes: list[Episode]
    measuring: Measuring
    seconds: float
