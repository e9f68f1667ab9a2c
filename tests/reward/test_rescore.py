"""Rescoring a run offline: what is compared, what is written, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from memfactory import Answer, Episode, Probe, Score, StopReason, Task, Turn
from memfactory.errors import DataError, RecipeErrors
from memfactory.recipe import Recipe
from memfactory.reward.rescore import recipe_for, rescore, write, write_statistics
from memfactory.reward.system import RewardSystem
from memfactory.runs import RunFolder

SIZE = 4
REWARDS = """
from memfactory import Score, reward


@reward
def a(episode):
    return int(episode.memory.split()[0]) / 10


@reward(low=-1)
def b(episode):
    return int(episode.memory.split()[1]) / 10


@reward
def breaks(episode):
    return 1 / int(episode.memory.split()[0])


@reward(scope="turn")
def turn(episode, turn):
    return turn.chunk / 10
"""


def recipe(*rewards: dict, **sections) -> Recipe:
    plain = {"name": "r", "model": {"tiny": {}}, "environment": {"name": "fact_words"}}
    train = {"num_generations": SIZE}
    return Recipe.model_validate(plain | {"rewards": list(rewards), "train": train} | sections)


def episode(group: str, number: int, memory: str) -> Episode:
    probe = Probe("?", ("x",))
    turns = [Turn("write", [1], [2], [0.0], "x", StopReason.STOP, chunk=n) for n in range(2)]
    return Episode(Task(group, (), (probe,)), turns, [Answer(probe, "x")], memory, id=f"{group}/{number}", group=group)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that was rewarded by `my.a`: two steps, of step 2 a group of which two episodes were stored."""
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards/my.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    own = recipe({"name": "my.a"})
    folder = RunFolder.open(tmp_path / "run", own, resume=False)
    system = RewardSystem.from_recipe(own)
    memories = {"p": ["1 9", "2 8", "3 7", "4 6"], "q": ["5 1", "5 2", "5 3", "5 4"], "r": ["1 1", "2 2"]}
    for step, groups in ((1, "pq"), (2, "r")):
        batch = [episode(group, n, text) for group in groups for n, text in enumerate(memories[group])]
        system.begin().finish(batch)
        system.assess(batch)
        folder.log_episodes(step, "train", batch, tokens=False)
    return folder


def again(run: RunFolder, *rewards: dict, **sections):
    return rescore(run, RewardSystem.from_recipe(recipe(*rewards, **sections)))


def test_the_same_rewards_change_nothing(run: RunFolder) -> None:
    result = again(run, {"name": "my.a"})
    assert result.reward.before == pytest.approx(result.reward.after)
    assert result.rank_correlation == pytest.approx(1.0)
    assert (result.pairs_turned, result.best_changed, result.sign_flips) == (0, 0, 0)
    assert (result.groups, result.compared) == (2, 8)
    assert result.dead.before == result.dead.after == 0.5  # q is tied
    for new, old in zip(result.episodes, result.stored, strict=True):
        assert new.advantage == pytest.approx(old.advantage)


def test_the_reverse_turns_everything_round(run: RunFolder) -> None:
    result = again(run, {"name": "my.b", "transform": "unit"})
    # p: every pair of four, and every advantage; q had no order; r keeps its own
    assert result.pairs_turned == pytest.approx(6 / 7)
    assert result.best_changed == 1
    assert result.sign_flips == 4
    assert result.dead.before == 0.5
    assert result.dead.after == 0.0
    assert set(result.dimensions) == {"my.a", "my.b"}
    assert result.dimensions["my.a"].after is None
    assert result.dimensions["my.b"].before is None


def test_incomplete_groups_are_named_and_not_compared(run: RunFolder) -> None:
    result = again(run, {"name": "my.a"})
    assert result.incomplete == ["step 2, r: 2 of 4"]
    assert result.groups == 2


def test_rank_correlation_gives_ties_their_mean_rank(run: RunFolder) -> None:
    result = again(run, {"name": "my.b", "transform": "unit"})
    from scipy.stats import spearmanr

    old = [stored.reward for stored in result.stored]
    new = [own.reward for own in result.episodes]
    assert result.rank_correlation == pytest.approx(spearmanr(old, new).statistic)


def test_bounds_are_of_transformed_scores_and_of_turns(run: RunFolder, tmp_path: Path) -> None:
    result = again(run, {"name": "my.a"}, {"name": "my.b", "transform": "unit"}, {"name": "my.turn"})
    assert result.bounds["my.a"] == pytest.approx((0.1, 0.5))
    assert result.bounds["my.b"] == pytest.approx((0.55, 0.95))
    assert result.bounds["my.turn"] == pytest.approx((0.0, 0.1))
    write_statistics(tmp_path / "s.yaml", result.bounds)
    section = yaml.safe_load((tmp_path / "s.yaml").read_text())["aggregate"]
    normalised = again(
        run, {"name": "my.a"}, {"name": "my.b", "transform": "unit"}, {"name": "my.turn"}, aggregate=section
    )
    rewards = [own.reward for own in normalised.episodes]
    assert max(rewards) <= 1.0
    assert min(rewards) >= 0.0


def test_a_reward_that_fails_is_counted_and_gives_no_zero(run: RunFolder) -> None:
    for step in (1,):
        run.log_episodes(step, "train", [episode("p", 9, "0 0")], tokens=False)
    result = again(run, {"name": "my.breaks"})
    assert result.faults.count == {"reward": 1}
    assert "ZeroDivisionError" in result.faults.examples[0]
    assert result.episodes[-1].reward is None
    assert isinstance(result.episodes[-1].scores["my.breaks"], Score)


def test_only_the_folder_of_its_own_is_written(run: RunFolder) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    result = again(run, {"name": "my.b", "transform": "unit"})
    folder = write(run, "other", recipe({"name": "my.b"}), result)
    assert folder == run.path / "rescored/other"
    assert sorted(path.name for path in folder.iterdir()) == ["episodes.jsonl", "recipe.yaml", "summary.json"]
    assert len((folder / "episodes.jsonl").read_text().splitlines()) == 10
    assert all(path.read_bytes() == content for path, content in before.items())
    write(run, "other", recipe({"name": "my.b"}), result)  # once more replaces it
    assert len((folder / "episodes.jsonl").read_text().splitlines()) == 10


def test_the_recipe_may_hold_reward_sections_only(run: RunFolder, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("rewards: [{name: my.b}]\n")
    assert [section.name for section in recipe_for(run, other).rewards] == ["my.b"]
    assert recipe_for(run, other).train == {"num_generations": SIZE}
    assert recipe_for(run, None, ["credit.advantage=rloo"]).credit.advantage == "rloo"
    other.write_text("rewards: [{nam: my.b}]\n")
    with pytest.raises(RecipeErrors, match="did you mean 'name'"):
        recipe_for(run, other)


def test_without_episodes_it_says_which_there_are(run: RunFolder) -> None:
    with pytest.raises(DataError, match="--split train"):
        rescore(run, RewardSystem.from_recipe(recipe({"name": "my.a"})), "eval")
    with pytest.raises(DataError, match="no run folder"):
        recipe_for(RunFolder(run.path / "nothing"), None)
