"""From the scores of an episode to one reward. The default here is a weighted sum, as in TRL."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from memfactory.episode import Episode, Score
from memfactory.errors import MemFactoryError
from memfactory.plugins import find_in_folder, resolve
from memfactory.recipe import RewardSection
from memfactory.reward.dimension import RewardDimension


@dataclass(frozen=True, slots=True)
class WeightedDimension:
    """A dimension under the name the recipe gives it, with its weight."""

    name: str
    dimension: RewardDimension
    weight: float = 1.0


@dataclass(slots=True)
class Faults:
    """Failed measurements of one batch, by the fault class of their cause."""

    count: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, error: MemFactoryError) -> None:
        self.count[error.fault] = self.count.get(error.fault, 0) + 1
        if len(self.examples) < 3:
            self.examples.append(str(error))


def load_dimension(name: str) -> RewardDimension:
    """The dimension called `name` in a recipe; a plain function becomes one with range [0, 1].

    Raises:
        RecipeError: it cannot be found.
    """
    found = resolve(name) if ":" in name else find_in_folder(name, "rewards")
    return found if isinstance(found, RewardDimension) else RewardDimension(name.rpartition(".")[2], found)


def load_dimensions(sections: Iterable[RewardSection]) -> list[WeightedDimension]:
    """The recipe's `rewards:`, resolved."""
    return [WeightedDimension(section.name, load_dimension(section.name), section.weight) for section in sections]


def score_episodes(episodes: Sequence[Episode], dimensions: Sequence[WeightedDimension]) -> Faults:
    """Measure every dimension on every episode and set `scores` and `reward`.

    The reward is sum_k weight_k * score_k. An episode with a dimension of non-zero weight that could
    not be measured gets no reward (None): a failed measurement is not a zero.
    """
    faults = Faults()
    for episode in episodes:
        for weighted in dimensions:
            try:
                score = weighted.dimension(episode)
            except MemFactoryError as error:
                faults.add(error)
                score = Score(None, str(error))
            episode.scores[weighted.name] = score
        values = [(w.weight, episode.scores[w.name].value) for w in dimensions if w.weight != 0]
        episode.reward = (
            None
            if any(value is None for _, value in values)
            else sum(weight * value for weight, value in values if value is not None)
        )
    return faults
