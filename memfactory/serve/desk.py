"""`Desk`: one request after the other for each owner, all owners at the same time.

Both doors lead here, the server and the terminal. The agent runs in an event loop of its own thread, so that who waits
stays responsive while the model decodes; what is pending there is decoded together. The memory file has a thread of
its own, because a flush to the disk blocks.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from memfactory.agents.bank_agent import text_of
from memfactory.draws import of_episode
from memfactory.episode import Episode, Probe, StopReason, Task
from memfactory.errors import StoreError
from memfactory.loops import BackgroundLoop
from memfactory.memory.bank import EntryBank
from memfactory.memory.text import TextMemory
from memfactory.policy.base import Sampling
from memfactory.serve.drawing import Drawing, Watched
from memfactory.serve.loading import Served
from memfactory.serve.memories import Memories
from memfactory.serve.transcript import ChatMessage, Exchange, Plan, marks_of, plan

ResultT = TypeVar("ResultT")

Progress = Callable[[str], None]
"""Told what the agent does, in words. Called from another thread."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request."""

    owner: str
    """See :func:`owner_of`."""
    messages: Sequence[ChatMessage]
    """The last one is the question."""
    sampling: Sampling
    seed: int | None = None
    max_tokens: int | None = None
    """Longest answer, where the agent allows as much."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    memory: bool = False
    """Whether the episode is to hold the memory as text; of a bank that takes time in proportion to its size."""


@dataclass(frozen=True, slots=True)
class Replied:
    """An answer, which is on the disk."""

    text: str
    cut: bool
    """Whether it reached its token limit."""
    episode: Episode

    @property
    def prompt_tokens(self) -> int:
        """Over all turns; those of another endpoint have none."""
        return sum(len(turn.prompt_ids) for turn in self.episode.turns)

    @property
    def completion_tokens(self) -> int:
        return sum(len(turn.completion_ids) for turn in self.episode.turns)


def owner_of(user: str, end_user: str = "") -> str:
    """Whose memory a request works on.

    Args:
        user: who has the token.
        end_user: whom they ask for; each has a memory apart.
    """
    return json.dumps([user, end_user] if end_user else [user], ensure_ascii=True)  # no two pairs look alike


@dataclass
class Desk:
    """Takes requests to a trained agent.

    Args:
        served: the agent and its model.
        memories: what owners remember; None: every request begins with an empty memory and leaves nothing.
    """

    served: Served
    memories: Memories | None
    under_way: int = 0
    """Requests that are not answered yet."""
    _locks: dict[str, tuple[asyncio.Lock, list[None]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._drawing = Drawing(self.served.policy)
        self._loop = BackgroundLoop("memfactory-agent")
        self._disk = ThreadPoolExecutor(1, "memfactory-memory")

    async def answer(self, asked: Asked, progress: Progress) -> Replied:
        """Have the agent read what is new and answer; memory and answer are on the disk when it returns.

        Cancelled before, it leaves everything as it was.

        Raises:
            MemFactoryError: what went wrong; nothing is changed.
        """
        self.under_way += 1
        try:
            async with self._turn_of(asked.owner):
                if self.memories is None:
                    store = EntryBank("served") if self.served.keeps_bank else TextMemory()
                    return (await self._run(asked, plan(asked.messages), store, progress))[0]
                return await self._with_memory(self.memories, asked, progress)
        finally:
            self.under_way -= 1

    async def shown(self, owner: str) -> str:
        """What `owner` remembers, as text."""
        # not in the thread of the file, where others wait: it only reads, and a bank may be large
        return await asyncio.to_thread(self.memories.shown, owner) if self.memories is not None else ""

    async def forget(self, owner: str) -> None:
        """Remove everything of `owner`, once what they asked before is answered."""
        if self.memories is not None:
            async with self._turn_of(owner):
                await self._on_disk(self.memories.forget, owner)

    def close(self) -> None:
        """Let go of the model and of the memory file."""
        self._disk.shutdown()
        self.served.policy.close()
        if self.memories is not None:
            self.memories.close()

    async def _with_memory(self, memories: Memories, asked: Asked, progress: Progress) -> Replied:
        draft = await self._on_disk(memories.begin, asked.owner, marks_of(asked.messages), undo=memories.drop)
        try:
            planned = plan(asked.messages, draft.read, draft.last)
            replied, exchange = await self._run(asked, planned, draft.store, progress)
            await self._on_disk(memories.keep, draft, planned, exchange, final=True)
        except BaseException:
            with suppress(StoreError):  # the file is gone or full: what went wrong first is what is told
                await self._on_disk(memories.drop, draft)
            raise
        return replied

    async def _run(self, asked: Asked, planned: Plan, store: Any, progress: Progress) -> tuple[Replied, Exchange]:
        task = Task("served", planned.stream, (Probe(planned.question.content, ()),))
        drawing, served = self._drawing, self.served
        draws = f"seed {asked.seed}" if asked.seed is not None else secrets.token_hex(16)

        async def episode_of() -> Episode:
            # in the agent's own loop, where the policies are made and used
            inner = drawing.policy(asked.sampling)
            told = _reading(served, task, inner, progress)
            with of_episode(draws):
                return await served.agent.run(task, Watched(inner, served.answering, asked.max_tokens, told), store)

        episode = await asyncio.wrap_future(self._loop.start(episode_of()))
        if asked.memory and served.keeps_bank and not episode.memory:
            episode.memory = await asyncio.to_thread(text_of, store)
        answer = episode.answer
        assert answer is not None
        text = answer.text if answer.text is not None else answer.raw  # what no parser could read is shown as it is
        found = [place for stop in asked.stop if (place := text.find(stop)) >= 0]
        text = text[: min(found)] if found else text
        last = episode.turns[answer.turn if answer.turn is not None else -1]
        cut = last.stop is StopReason.LENGTH and not found
        return Replied(text, cut, episode), planned.answered(text)

    async def _on_disk(
        self,
        function: Callable[..., ResultT],
        *arguments: Any,
        undo: Callable[[ResultT], None] | None = None,
        final: bool = False,
    ) -> ResultT:
        """Call `function` in the thread of the memory file. Cancelled, it waits for its end.

        Args:
            undo: called with what came of a cancelled `function`.
            final: what is done is done: cancelled, it gives the result all the same.
        """
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._disk, function, *arguments)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            if final:
                return work.result()
            if undo is not None and work.exception() is None:
                await asyncio.wait([loop.run_in_executor(self._disk, undo, work.result())])
            raise

    @asynccontextmanager
    async def _turn_of(self, owner: str) -> AsyncIterator[None]:
        """Inside, nobody else works for `owner`; who waits comes in the order of asking."""
        lock, waiting = self._locks.setdefault(owner, (asyncio.Lock(), []))
        waiting.append(None)
        try:
            async with lock:
                yield
        finally:
            waiting.pop()
            if not waiting:
                del self._locks[owner]


def _reading(served: Served, task: Task, policy: Any, progress: Progress) -> Callable[[str, int], None]:
    """Tells `progress` which chunk is read, or where chunks are not read one by one, which module is asked."""
    chunks: Any = getattr(served.agent, "chunks", None)
    total = 0 if served.keeps_bank or chunks is None or not task.stream else len(chunks(task, policy))

    def told(module: str, turn: int) -> None:
        if total and module != served.answering:
            progress(f"reading chunk {turn} of {total}")
        else:
            progress(f"turn {turn}: {module}")

    return told
