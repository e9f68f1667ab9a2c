"""Several vLLM servers as one: requests are spread, a server that fails is taken out, mended and put back.

No server answers for a turn before it holds the weights of now and has shown so: it scores a prompt whose log-probs
the trainer knows (the canary). That holds after every update, and for a server that comes back in the middle of one.

Everything here runs in one event loop, :data:`memfactory.policy.vllm_policy.LOOP`, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from statistics import fmean
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memfactory.endpoints.failures import Failure, RequestFailed
from memfactory.errors import EngineError
from memfactory.loops import together
from memfactory.policy.base import Sampling
from memfactory.policy.vllm_needs import BASE
from memfactory.policy.vllm_server import Draw, Sampled, VLLMServer

Floats = NDArray[np.floating[Any]]
GONE = frozenset({Failure.CONNECTION, Failure.CUT, Failure.SERVER, Failure.TIMEOUT, Failure.GARBAGE})
"""Failures of the server rather than of the request: another one may answer."""
FORSAKEN = 8
"""Servers on which one turn may come to nothing, one after the other, before it is the turn's own fault."""
PROBE = 1.0
"""Seconds between two looks at a server that is out."""
AHEAD = 8
"""How many more requests than the least busy server one may have for the sake of its prefix cache."""
PREFIX = 128
"""Tokens at the beginning of a prompt that decide which server is asked first: a block of vLLM's cache on a CPU."""


@dataclass(frozen=True, slots=True)
class NextToken:
    """What follows a prompt that is long enough to be cached; known for every token, because one of them is drawn."""

    ids: list[int]
    expected: Sequence[float]
    """(V,) log-probs by the trainer's weights of now."""
    before: Sequence[float] | None
    """The same before the last update."""


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What follows some prefixes of a prompt; known for every token, because one is drawn after each.

    Draws are what turns are made of: by their log-probs the server shows that it reports those of the distribution it
    draws from. Scores of prompts are always those of temperature 1.
    """

    lengths: Sequence[int]
    """Tokens of each of the P prefixes."""
    expected: Floats
    """(P, V) log-probs by the trainer's weights of now, at `temperature`."""
    before: Floats | None
    """The same before the last update."""
    temperature: float = 1.0
    """At which turns are drawn."""
    plain: Floats | None = None
    """`expected` at temperature 1; None where that is `temperature`."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A prompt whose log-probs are known."""

    ids: list[int]
    expected: list[float]
    """Log-probs of ``ids[1:]`` by the trainer's weights of now."""
    before: list[float] | None
    """The same by its weights before the last update; None where there was none."""
    tolerance: float
    """Largest mean difference, in nats."""
    following: NextToken | None = None
    """Drawn too, where a server keeps the name of its weights when they change: scores of prompts never come from the
    prefix cache, draws do."""
    prefixes: Prefixes | None = None
    """Of `ids`; a token is drawn after each."""
    scored: bool = True
    """`ids` are scored. Not where turns are under way beside it: vLLM scores prompts with the requests beside it in
    mind (0.31 with adapters: its CPU worker ends, "einsum(): subscript b has size ...")."""

    def check(self, found: Sequence[float], where: str) -> float:
        """Mean difference between the scores `found` and what is expected, in nats.

        Raises:
            EngineError: it is beyond the tolerance, or `found` is what the weights *before* the update say.
        """
        return self._compare(found, self.expected, self.before, where)

    def check_drawn(self, token: int, logprob: float, where: str) -> float:
        """The same for the token that was drawn after `following`."""
        assert self.following is not None
        known = self.following
        before = None if known.before is None else [known.before[token]]
        return self._compare([logprob], [known.expected[token]], before, f"the prefix cache of {where}")

    def check_prefixes(self, tokens: Sequence[int], found: Sequence[float], where: str) -> float:
        """The same for `tokens` that were drawn after the prefixes, by their log-probs there."""
        assert self.prefixes is not None
        known, rows = self.prefixes, range(len(tokens))
        if known.plain is not None:
            now, other = (
                fmean(abs(a - b) for a, b in zip(found, table[rows, tokens], strict=True))
                for table in (known.expected, known.plain)
            )
            apart = float(np.abs(known.expected[rows, tokens] - known.plain[rows, tokens]).mean())
            if other < now / 4 and now > apart / 2:
                raise EngineError(
                    f"{where} does not report the log-probs it draws by",
                    f"those of {len(tokens)} drawn tokens are {other:.3g} from temperature 1, and {now:.3g} from "
                    f"train.temperature {known.temperature:g}",
                    "start it with --logprobs-mode processed_logprobs, as memfactory serve-rollouts does",
                )
        before = None if known.before is None else known.before[rows, tokens].tolist()
        return self._compare(found, known.expected[rows, tokens].tolist(), before, where)

    def _compare(
        self, found: Sequence[float], expected: Sequence[float], before: Sequence[float] | None, where: str
    ) -> float:
        now = fmean(abs(a - b) for a, b in zip(found, expected, strict=True))
        what = f"{where} does not sample from the weights that are trained"
        if not now <= self.tolerance:
            raise EngineError(
                what,
                f"on one prompt its log-probs differ by {now:.3g} on average, rollout.vllm.canary_tolerance is "
                f"{self.tolerance:g} (mean {fmean(found):.4f} there, {fmean(expected):.4f} here)",
                "serve the recipe's own base model in its dtype (memfactory serve-rollouts); with bfloat16 on one "
                "side only, raise the tolerance",
            )
        if before is not None:
            # An update moves little: less than the tolerance. Weights that are one update old are told by being
            # nearer to the old numbers than to the new; where rounding is larger than the update, neither is near.
            old = fmean(abs(a - b) for a, b in zip(found, before, strict=True))
            moved = fmean(abs(a - b) for a, b in zip(expected, before, strict=True))
            if old < now / 4 and now > moved / 2:
                raise EngineError(
                    what,
                    f"its log-probs differ by {now:.3g} from those of now, by {old:.3g} from those before the update",
                    "what it loaded is an update old: check that every server sees rollout.vllm.adapters",
                )
        return now


@dataclass(frozen=True, slots=True)
class Weights:
    """A version of the trained weights."""

    name: str
    path: str
    whole: bool = False
    """They take the place of the base model's; else they are an adapter beside it, asked for by its name."""
    version: int | None = None
    """Optimizer steps behind them, where that is known."""

    @property
    def model(self) -> str:
        """What a request names to be answered by them."""
        return BASE if self.whole else self.name


@dataclass(frozen=True, slots=True)
class Fit:
    """What a server that fits the recipe is."""

    positions: int | None = None
    """Longest prompt and completion together; None where it does not say."""
    engines: int = 1
    """Copies of the model behind its address, each with a cache of its own."""


@dataclass(slots=True)
class _Place:
    server: VLLMServer
    fit: Fit = Fit()
    up: bool = True
    """Whether it may be asked: it answers, and has shown that it holds the weights of now."""
    under_way: Counter[str] = field(default_factory=Counter)
    """Turns that are being sampled, by the model they were asked of."""
    mending: asyncio.Task[None] | None = None
    given: bool = False
    """It is being mended, and just now given the weights."""
    failure: str = ""


@dataclass(slots=True)
class ServerPool:
    """The servers of a run.

    Args:
        servers: at least one.
        family: beginning of the names of all adapters of this run; others' are left alone.
        outage: seconds without any server before a call fails.
        inspect: compares a server with what the recipe needs, whenever it appears: it may have been started anew with
            other flags. Raises EngineError for one that does not fit.
    """

    servers: Sequence[VLLMServer]
    family: str
    outage: float
    inspect: Callable[[VLLMServer], Awaitable[Fit]] | None = None
    weights: Weights | None = None
    """What is sampled from; None: the base model."""
    canary: Canary | None = None
    difference: float = 0.0
    """Largest difference any server showed for the present canary, in nats."""
    taken_out: int = 0
    """How often a server was taken out since the beginning."""
    beside: bool = False
    """Turns are under way while weights change. New ones are loaded and checked beside those of before, which answer
    until then; a turn ends with the weights it began with, and these stay loaded until it has. Adapters only."""
    _places: list[_Place] = field(init=False)
    _counted: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By server, when last asked: ids of prompts it looked up in its prefix cache, and those it found."""
    _change: asyncio.Event = field(default_factory=asyncio.Event)
    _may_give: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether servers that are mended may be given weights."""
    _fatal: EngineError | None = None

    def __post_init__(self) -> None:
        self._places = [_Place(server) for server in self.servers]
        self._may_give.set()

    @property
    def positions(self) -> int | None:
        """Longest prompt and completion together that every server takes which has been seen; None: unknown."""
        return min((place.fit.positions for place in self._places if place.fit.positions), default=None)

    async def start(self) -> None:
        """Look at all servers. Those that do not answer yet are out, and are put in when they do.

        Raises:
            EngineError: none answers for `outage` seconds, or one does not fit.
        """
        await together(self._meet(place) for place in self._places)
        await self._free(())

    async def sample(self, draw: Draw, *, base: bool) -> Sampled:
        """One completion from whichever server is free.

        Args:
            base: from the base model and not from the adapter.

        Raises:
            EngineError: no server was there for `outage` seconds, it refuses the request, or holds other weights; or
                none were sent yet. No reply within `deadline`, and no other server is up or it was late, too. One
                after the other has failed on it.
        """
        if not base and self.weights is None:
            raise EngineError("a turn was asked for before any weights were sent", "", "call `use` first")
        failures, late = 0, False
        while True:
            place = await self._free(draw.prompt_ids)
            weights = None if base else self.weights  # of this attempt: another one may come after an update
            model = BASE if weights is None else weights.model
            place.under_way[model] += 1
            try:
                sampled = await place.server.sample(draw, model=model)
                return sampled if weights is None else replace(sampled, version=weights.version)
            except RequestFailed as failed:
                failures += 1
                # 404: it was started anew since, and has forgotten the adapter
                again = failed.kind in GONE or failed.status == 404
                if failed.kind is Failure.DEADLINE:
                    # it hangs, or the turn is too long for the deadline: another server tells
                    again = not late and any(other.up for other in self._places if other is not place)
                    late = True
                if not again or failures == FORSAKEN:
                    times = f", the {failures}th in a row" if failures > 1 else ""
                    raise EngineError(
                        f"the vLLM server at {place.server.url} gave no turn{times}", failed.why, failed.fix
                    ) from failed
                self._take_out(place, failed.why)
            finally:
                place.under_way[model] -= 1

    async def publish(self, weights: Weights | None, canary: Canary | None) -> float:
        """Make every server sample from `weights` from now on.

        Unless new weights are loaded `beside` the old, no turn may be under way meanwhile.

        Returns:
            largest difference of the canary over the servers, in nats.

        Raises:
            EngineError: a server cannot take it or shows other weights; or none was there for `outage` seconds.
        """
        self.difference = 0.0
        if not self.beside or self.weights is None:
            self.weights, self.canary = weights, canary
        await asyncio.gather(*(self._renew(place, weights, canary) for place in self._places if place.up))
        # a server that came back with the old ones in between does not know the new name, says so, and is mended again
        self.adopt(weights, canary)
        await self._free(())
        return self.difference

    async def hold(self) -> None:
        """Mend no server until :meth:`adopt`: what is mended now would get the weights of before.

        Every training process has a pool of its own, and servers are the same ones: without this, the process that
        publishes new weights may find the old ones loaded over them by another.
        """
        self._may_give.clear()
        await self._cancel([place for place in self._places if place.given])

    def adopt(self, weights: Weights | None, canary: Canary | None) -> None:
        """Sample from `weights`, which were published; servers that are out are mended with them.

        To be called in the pool's loop.
        """
        self.weights, self.canary = weights, canary
        self._may_give.set()
        for place in self._places:
            if not place.up and (place.mending is None or place.mending.done()):
                self._begin_mending(place)

    async def cache_hit_rate(self) -> float | None:
        """Share of the ids of prompts that servers found in their prefix caches since the last call, by their own
        count; other clients' are in it. None: nothing was asked, or no server says."""
        asked = found = 0.0
        for server in [place.server for place in self._places if place.up]:
            try:
                counters = await server.counters()
                now = counters["prefix_cache_queries_total"], counters["prefix_cache_hits_total"]
            except (RequestFailed, KeyError, ValueError):
                continue  # a figure for the log; whatever samples next will tell what is wrong
            before = self._counted.get(server.url, (0.0, 0.0))
            if now[0] < before[0]:  # it was started anew
                before = (0.0, 0.0)
            self._counted[server.url] = now
            asked, found = asked + now[0] - before[0], found + now[1] - before[1]
        return found / asked if asked else None

    async def confirm(self) -> None:
        """See that the servers that are up still hold the weights of now.

        A server that was started anew has forgotten an adapter, and says so; but it answers to the base model's name,
        which is all there is to ask for where whole weights are sent.

        Raises:
            EngineError: one holds others, so turns it has sampled may be of those.
        """
        weights = self.weights
        if weights is None or not weights.whole:
            return
        for place in [place for place in self._places if place.up]:
            try:
                found = await place.server.weight_version()
            except RequestFailed as failed:
                self._take_out(place, failed.why)
                continue
            if found != weights.name:
                raise EngineError(
                    f"the vLLM server at {place.server.url} was started anew in the middle of a batch",
                    f"it holds the weights '{found}' and not '{weights.name}', so turns of this batch may be of those",
                    "nothing was trained on them: the same command goes on from the newest checkpoint",
                )

    async def aclose(self) -> None:
        """Have the servers forget this run's adapters, and close the connections."""
        await self._cancel(self._places)
        await asyncio.gather(*(self._leave(place) for place in self._places))

    async def _cancel(self, places: Collection[_Place]) -> None:
        mending = [place.mending for place in places if place.mending is not None]
        for task in mending:
            task.cancel()
        await asyncio.gather(*mending, return_exceptions=True)

    async def _leave(self, place: _Place) -> None:
        if place.up:
            with contextlib.suppress(RequestFailed):  # it is gone, and with it what it held
                await self._forget(place, ())
        await place.server.aclose()

    # ---- who is asked ------------------------------------------------------------------------

    async def _free(self, prompt_ids: Sequence[int]) -> _Place:
        """A server that is up: the one that has seen prompts of this beginning, unless others wait for work."""
        since = monotonic()
        while True:
            if self._fatal is not None:
                raise self._fatal
            up = [place for place in self._places if place.up]
            if up:
                beginning = repr(list(prompt_ids[:PREFIX])).encode()
                up.sort(key=lambda place: sha256(place.server.url.encode() + beginning).digest())
                least = min(place.under_way.total() for place in up)
                return next(place for place in up if place.under_way.total() <= least + AHEAD)
            left = since + self.outage - monotonic()
            if left <= 0:
                failures = "; ".join(f"{place.server.url}: {place.failure}" for place in self._places)
                raise EngineError(
                    f"no vLLM server answers since {self.outage:g} s",
                    failures,
                    "start one: memfactory serve-rollouts RECIPE, with the same overrides, or check "
                    "rollout.vllm.base_urls; a run goes on with --resume. rollout.vllm.outage says how long to wait",
                )
            self._change.clear()
            try:
                async with asyncio.timeout(min(left, PROBE)):
                    await self._change.wait()
            except TimeoutError:
                continue

    # ---- out and in again --------------------------------------------------------------------

    def _take_out(self, place: _Place, why: str) -> None:
        place.failure = why
        if place.up:
            place.up = False
            self.taken_out += 1
            self._begin_mending(place)

    def _begin_mending(self, place: _Place) -> None:
        place.mending = asyncio.get_running_loop().create_task(self._mend(place))

    async def _meet(self, place: _Place) -> None:
        """See a server for the first time. It is up, or out until it is there."""
        place.up = False
        try:
            place.failure = await place.server.unwell()
            if not place.failure:
                await self._look(place)
                place.up = True
        except RequestFailed as failed:
            place.failure = failed.why
        if not place.up:
            self._begin_mending(place)

    async def _look(self, place: _Place) -> None:
        if self.inspect is not None:
            place.fit = await self.inspect(place.server)

    async def _mend(self, place: _Place) -> None:
        """Wait until the server is there again, give it the weights of now, and put it back."""
        while True:
            unwell = await place.server.unwell()
            if not unwell:
                try:
                    await self._look(place)
                    await self._may_give.wait()
                    weights, place.given = self.weights, True
                    await self._ready(place, weights, self.canary)
                except RequestFailed as failed:
                    place.failure = failed.why
                except EngineError as error:
                    self._fatal = error
                    self._change.set()
                    return
                else:
                    if weights == self.weights:  # else there was an update meanwhile: once more
                        place.up = True
                        self._change.set()
                        return
                finally:
                    place.given = False
            else:
                place.failure = unwell
            await asyncio.sleep(PROBE)

    async def _renew(self, place: _Place, weights: Weights | None, canary: Canary | None) -> None:
        try:
            await self._ready(place, weights, canary)
        except RequestFailed as failed:
            self._take_out(place, failed.why)

    async def _ready(self, place: _Place, weights: Weights | None, canary: Canary | None) -> None:
        """Give a server `weights`, and see that it has them.

        Raises:
            RequestFailed: it does not answer.
            EngineError: it cannot take them, or shows other weights.
        """
        server = place.server
        model = BASE if weights is None else weights.model
        known = await self._forget(place, [own.name for own in (weights, self.weights) if own is not None])
        if weights is None:
            pass
        elif weights.whole:
            if await server.weight_version() != weights.name:
                await server.reload(weights.name, weights.path)
        elif weights.name not in known:
            await server.load(weights.name, weights.path)
        if canary is None:
            return
        engines = place.fit.engines
        for engine in range(engines):
            where = f"the vLLM server at {server.url}" + (f", engine {engine} of {engines}" if engines > 1 else "")
            await self._show(server, model, canary, engine if engines > 1 else None, where)

    async def _show(self, server: VLLMServer, model: str, canary: Canary, engine: int | None, where: str) -> None:
        """See that one engine of a server answers by the weights that the canary is of."""
        if canary.prefixes is not None:
            sampling = Sampling(canary.prefixes.temperature)
            asked = [
                Draw(canary.ids[:length], sampling, max_tokens=1, stop=(), seed=length)
                for length in canary.prefixes.lengths
            ]
            turns = await asyncio.gather(*(server.sample(draw, model=model, engine=engine) for draw in asked))
            own = canary.check_prefixes([turn.ids[0] for turn in turns], [turn.logprobs[0] for turn in turns], where)
            self.difference = max(self.difference, own)
        if canary.scored:
            found = await server.score(canary.ids, model=model, engine=engine)
            self.difference = max(self.difference, canary.check(found, where))
        if canary.following is not None:
            ask = Draw(canary.following.ids, Sampling(), max_tokens=1, stop=(), seed=1)
            drawn = await server.sample(ask, model=model, engine=engine)
            canary.check_drawn(drawn.ids[0], drawn.logprobs[0], where)

    async def _forget(self, place: _Place, kept: Collection[str]) -> set[str]:
        """Unload what this run, or an earlier life of it, has left there; a server has few places for adapters.

        Those that are `kept` stay, and those that turns under way are sampled from. Returns the names it had before.
        """
        names = {str(model["id"]) for model in await place.server.models()}
        for name in sorted(names):
            if name.startswith(self.family) and name not in kept and not place.under_way[name]:
                await place.server.unload(name)
        return names
