"""The judge that asks a model: cache first, then an identical question under way, then the endpoint."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial

from memfactory.episode import Score
from memfactory.errors import JudgeError
from memfactory.loops import PerLoop
from memfactory.recipe import JudgeSection
from memfactory.reward.judge.base import PREFERENCES, Rubric, check_fields
from memfactory.reward.judge.cache import VerdictCache
from memfactory.reward.judge.endpoint import Endpoint
from memfactory.reward.judge.pairwise import check_pair, compared
from memfactory.reward.judge.prompt import Question, Verdict, comparison, grading
from memfactory.reward.judge.tally import Tally


@dataclass(slots=True)
class _Flight:
    """A question under way, and how many callers wait for it."""

    task: asyncio.Task[Verdict]
    waiting: int = 0


class ModelJudge:
    """A model behind an OpenAI-compatible endpoint, e.g. vLLM's server. All numbers come from the recipe."""

    def __init__(self, section: JudgeSection) -> None:
        self.section = section
        self._tally = Tally(section.price_per_million)
        self._endpoint = Endpoint(section, self._tally)
        self._cache = VerdictCache(section.cache, section.model) if section.cache else None
        self._flights: PerLoop[dict[str, _Flight]] = PerLoop(dict)

    async def grade(self, rubric: Rubric, /, **fields: str) -> Score:
        """See :meth:`memfactory.reward.judge.Judge.grade`."""
        check_fields(rubric, fields)
        verdict = await self._verdict(grading(rubric, fields))
        return Score(float(rubric.labels[verdict.label]), verdict.reason)

    async def prefer(self, rubric: Rubric, first: str, second: str, /, **fields: str) -> int:
        """See :meth:`memfactory.reward.judge.Judge.prefer`."""
        check_pair(rubric, first, second, fields)
        verdict = await self._verdict(comparison(rubric, first, second, fields))
        return PREFERENCES[verdict.label]

    async def compare(self, rubric: Rubric, first: str, second: str, /, **fields: str) -> int:
        """See :meth:`memfactory.reward.judge.Judge.compare`. Equal texts tie without a question."""
        check_pair(rubric, first, second, fields)
        if first == second:
            return 0
        return await compared(self, self._tally, rubric, first, second, fields)

    def metrics(self) -> dict[str, float]:
        return self._tally.take()

    async def aclose(self) -> None:
        for flight in (self._flights.pop() or {}).values():
            flight.task.cancel()
        await self._endpoint.aclose()
        if self._cache is not None:
            await asyncio.to_thread(self._cache.close)

    async def _verdict(self, question: Question) -> Verdict:
        """The verdict on `question`, shared with every caller who asks the same meanwhile."""
        self._tally.add(asked=1)
        key = question.key(self.section.model, self.section.temperature)
        flights = self._flights.get()
        flight = flights.get(key)
        if flight is None:
            flight = flights[key] = _Flight(asyncio.create_task(self._fetch(key, question)))
            flight.task.add_done_callback(partial(_landed, flights, key, flight))
        else:
            self._tally.add(coalesced=1)
        flight.waiting += 1
        try:
            # shielded: a caller that gives up must not take the others' verdict along
            return await asyncio.shield(flight.task)
        except JudgeError:
            self._tally.add(failed=1)
            raise
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                _forget(flights, key, flight)
                flight.task.cancel()

    async def _fetch(self, key: str, question: Question) -> Verdict:
        if self._cache is not None:
            stored = await self._cache.get(key)
            if stored is not None and stored.label in question.labels:
                self._tally.add(cached=1)
                return stored
        verdict = await self._endpoint.ask(question)
        if self._cache is not None:
            self._cache.put(key, question, verdict)
        return verdict


def _landed(flights: dict[str, _Flight], key: str, flight: _Flight, task: asyncio.Task[Verdict]) -> None:
    _forget(flights, key, flight)
    if not task.cancelled():
        task.exception()  # looked at here too: every caller may have given up in the same moment


def _forget(flights: dict[str, _Flight], key: str, flight: _Flight) -> None:
    """Take `flight` off the board, unless a newer one has its place."""
    if flights.get(key) is flight:
        del flights[key]
