"""One call of a reward function: with what, how, and where its values go."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memfactory.episode import Episode, Score, Turn
from memfactory.errors import MemFactoryError, RewardError
from memfactory.reward.catalogue import WeightedDimension
from memfactory.reward.dimension import RewardDimension, Scope
from memfactory.reward.faults import Faults


@dataclass(slots=True)
class Call:
    """One call, and what came of it."""

    weighted: WeightedDimension
    arguments: tuple[Any, ...]
    targets: list[tuple[Episode, Turn | None]]
    """What the values speak about: an episode, or one of its turns."""
    lists: bool = False
    """Whether the function returns a list, with one value for each target."""
    outcome: Any = None
    """What it returned, or the error."""

    @property
    def where(self) -> str:
        episode, turn = self.targets[0]
        name = f"task {episode.task.id}" + (f", episode {episode.id}" if episode.id else "")
        if not self.lists:
            return name if turn is None else f"{name}, turn {_position(episode, turn)}"
        return f"{len(self.targets)} {'turns' if turn else 'episodes'} from {name}"

    def run(self) -> Any:
        try:
            return self.weighted.dimension.function(*self.arguments)
        except MemFactoryError as error:  # the judge's: classed by its own fault
            return error
        except (Exception, SystemExit) as error:
            return self.weighted.dimension.failure(error, self.where)

    async def run_async(self) -> Any:
        task = asyncio.ensure_future(self._await())
        done, _ = await asyncio.wait([task], timeout=self.weighted.dimension.deadline)
        if not done:
            task.cancel()  # and not waited for: a bare `except:` in the function swallows it
            return self.hung()
        return task.result()

    async def _await(self) -> Any:
        try:
            return await self.weighted.dimension.function(*self.arguments)
        except MemFactoryError as error:
            return error
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            return self.weighted.dimension.failure(error, self.where)

    def hung(self, why: str = "") -> RewardError:
        dimension = self.weighted.dimension
        return RewardError(
            f"reward '{dimension.name}' ({dimension.place}) on {self.where}",
            why or f"no answer within {dimension.deadline:g} s",
            "make it faster, or raise its deadline: @reward(deadline=...) or `deadline:` in the recipe",
        )

    def store(self, faults: Faults) -> list[Episode]:
        """Put the scores on episodes or turns, or None and the reason.

        Returns:
            the episodes on which it failed.
        """
        dimension, name = self.weighted.dimension, self.weighted.name
        try:
            values = self.values()
        except MemFactoryError as error:
            faults.add(error, name)
            for episode, turn in self.targets:
                (episode if turn is None else turn).scores[name] = Score(None, error.why or error.what)
            return [episode for episode, _ in self.targets]
        wrong = []
        for (episode, turn), value in zip(self.targets, values, strict=True):
            scores = (episode if turn is None else turn).scores
            try:
                scores[name] = dimension.check(value, f"task {episode.task.id}" if self.lists else self.where)
            except MemFactoryError as error:
                faults.add(error, name)
                scores[name] = Score(None, error.why or error.what)
                wrong.append(episode)
        return wrong

    def values(self) -> Sequence[Any]:
        """One value per target, not checked yet.

        Raises:
            MemFactoryError: the call failed, or returned no list of the right length.
        """
        if isinstance(self.outcome, MemFactoryError):
            raise self.outcome
        if not self.lists:
            return [self.outcome]
        dimension = self.weighted.dimension
        what = f"reward '{dimension.name}' ({dimension.place}) on {self.where}"
        fix = f"return a list with one value per {'episode' if self.targets[0][1] is None else 'turn'}"
        try:
            if isinstance(self.outcome, str | bytes | dict):
                raise TypeError
            values = list(self.outcome)
        except TypeError as error:
            raise RewardError(what, f"returned {self.outcome!r}", fix) from error
        except Exception as error:  # a generator runs only now
            raise dimension.failure(error, self.where) from error
        if len(values) != len(self.targets):
            raise RewardError(what, f"returned {len(values)} values", fix)
        return values


def takes_lists(dimension: RewardDimension) -> bool:
    """Whether the function is called with a list of episodes."""
    return dimension.batched or dimension.scope is Scope.GROUP


def calls_of(weighted: WeightedDimension, episodes: Sequence[Episode]) -> list[Call]:
    """The calls that measure `weighted` on `episodes`."""
    dimension = weighted.dimension
    if dimension.scope is Scope.GROUP:
        groups: dict[str, list[Episode]] = defaultdict(list)
        for episode in episodes:
            groups[episode.group].append(episode)
        return [_of_list(weighted, members) for members in groups.values()]
    if dimension.batched:
        return [_of_list(weighted, episodes)] if episodes else []
    if not dimension.per_turn:
        return [Call(weighted, (episode,), [(episode, None)]) for episode in episodes]
    turns = [(episode, [turn for turn in episode.turns if dimension.speaks_about(turn)]) for episode in episodes]
    if dimension.whole_episode:
        return [Call(weighted, (e,), [(e, turn) for turn in own], lists=True) for e, own in turns if own]
    return [Call(weighted, (episode, turn), [(episode, turn)]) for episode, own in turns for turn in own]


def _of_list(weighted: WeightedDimension, episodes: Sequence[Episode]) -> Call:
    return Call(weighted, (list(episodes),), [(episode, None) for episode in episodes], lists=True)


def _position(episode: Episode, turn: Turn) -> int:
    return next(index for index, own in enumerate(episode.turns) if own is turn)
