"""`memfactory rewards`: what a person sees who writes a reward in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from memfactory import StopReason, Task, Turn
from memfactory.cli import main
from memfactory.cli.main import app
from memfactory.cli.rewards.samples import load_samples
from memfactory.cli.rewards.trial import own_frames, prepare, try_out
from memfactory.episode import Answer, Episode, Evidence, Probe
from memfactory.errors import DataError, MemFactoryError, RecipeError, RecipeErrors
from memfactory.plugins import shipped
from memfactory.runs import episode_record

BAD = '''
import asyncio
import time
from memfactory import Score, reward


@reward
def raises(episode):
    """First sentence
    goes on. Second sentence."""
    return episode.answer.txt


@reward(deadline=0.05)
def hangs(episode):
    time.sleep(30)


@reward(deadline=0.05)
async def waits(episode):
    await asyncio.sleep(30)


@reward(scope="group")
def short_group(episodes):
    return [1.0]


@reward(batched=True)
def short_batch(episodes):
    return [1.0] * (len(episodes) + 1)


@reward(batched=True)
def word(episodes):
    return "no"


@reward
def text(episode):
    return "0.5"


@reward
def nan(episode):
    return float("nan")


@reward
def outside(episode):
    return 3


@reward
def same(episode):
    return 1


@reward
def by_task(episode):
    return float(episode.group == "a")


@reward
def sometimes(episode, *, of: int = 2):
    return 1.0 if int(episode.id[-1]) % of else Score(None, "[odd] case")


@reward(scope="turn")
def turn(episode, turn):
    return 1.0 if turn.chunk == 0 else 0.25


def short_trl(prompts, completions, **kwargs):
    return [1.0 for _ in completions][1:]


def trl(completions, answer, **kwargs):
    return [float(c[0]["content"] == a) for c, a in zip(completions, answer)]


def plain(episode):
    return len(episode.memory) / 100
'''


def episode(number: int, group: str = "a") -> Episode:
    probe = Probe("Which [fruit]?", ("pear", "the pear"), (Evidence("pear", 0),))
    text = "pear" if number % 2 else "plum"
    turns = [
        Turn("write", [1], [2], [0.0], "a pear", StopReason.STOP, chunk=0),
        Turn("answer", [1], [2], [0.0], text, StopReason.STOP),
    ]
    task = Task(f"task/{group}", ("a pear",), (probe,))
    return Episode(task, turns, [Answer(probe, text)], "a pear", id=f"{group}{number}", group=group)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    return tmp_path


@pytest.fixture
def bad(work: Path) -> Path:
    """A folder with rewards of every kind and eight episodes."""
    (work / "rewards").mkdir()
    (work / "rewards/bad.py").write_text(BAD)
    records = [episode_record(episode(n, group)) for group in "ab" for n in range(4)]
    (work / "e.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return work


def run(*arguments: str, code: int = 0) -> str:
    """Output of the command; an error raised on purpose comes through as itself."""
    result = CliRunner().invoke(app, ["rewards", *arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def try_bad(name: str, *arguments: str, code: int = 0) -> str:
    return run("test", f"bad.{name}", "--episode", "e.jsonl", *arguments, code=code)


# ---- from an empty folder --------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["episode", "turn", "module", "group"])
def test_a_new_reward_works_and_is_short(work: Path, scope: str) -> None:
    said = run("new", "my.polite", "--scope", scope)
    assert "memfactory rewards test my.polite" in said
    assert yaml.safe_load(said[said.index("rewards:\n") :])["rewards"][0]["name"] == "my.polite"
    code = (work / "rewards/my.py").read_text()
    assert len(code.splitlines()) <= 12
    tried = run("test", "my.polite")
    assert "None on 0 of 16" in tried
    assert "no spread" not in tried
    assert "teach nothing" not in tried


def test_new_takes_one_name_or_a_path_and_never_overwrites(work: Path) -> None:
    run("new", "polite")
    assert "def polite" in (work / "rewards/polite.py").read_text()
    run("new", "team.short.brief")
    assert "team.short.brief" in run("test", "team.short.brief")
    (work / "rewards/mine.py").write_text("# mine\n")
    with pytest.raises(RecipeError, match="there is such a file already"):
        run("new", "mine.polite")
    assert (work / "rewards/mine.py").read_text() == "# mine\n"
    with pytest.raises(RecipeError, match="hide the shipped"):
        run("new", "answer.polite")
    for wrong in ("my-own.polite", "my.class", "my.", ".x", "../x", "my._private"):
        with pytest.raises(RecipeError, match="no Python name"):
            run("new", wrong)


def test_the_commands_for_tests_of_rewards_import_no_torch(bad: Path) -> None:
    (bad / "r.yaml").write_text(
        "name: r\nmodel: {tiny: {}}\nenvironment: {name: fact_words}\nrewards: [{name: bad.by_task}]\n"
    )
    (bad / "run").mkdir()
    (bad / "run/recipe.yaml").write_text((bad / "r.yaml").read_text())
    lines = (bad / "e.jsonl").read_text().splitlines()
    stored = [{"schema": 1, "step": 1, "split": "train"} | json.loads(line) for line in lines]
    (bad / "run/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stored))
    commands = [
        ["list"],
        ["show", "bad.trl"],
        ["new", "my.polite"],
        ["test", "my.polite"],
        ["lint", "r.yaml"],
        ["rescore", "run"],
    ]
    script = f"""
import sys
from memfactory.cli.main import app
for arguments in {commands}:
    try:
        app(["rewards", *arguments])
    except SystemExit as exit:
        assert not exit.code, arguments
print("heavy:", [name for name in ("torch", "transformers", "trl", "datasets") if name in sys.modules])
"""
    paths = os.pathsep.join([str(Path(main.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


# ---- test ------------------------------------------------------------------------------------


def test_it_prints_score_reason_time_and_what_it_saw(bad: Path) -> None:
    said = try_bad("sometimes")
    rows = [line.split() for line in said.splitlines() if line.startswith(("a", "b"))]
    assert rows[1][:3] == ["a0", "a", "None"]
    assert rows[1][4:] == ["[odd]", "case"]
    assert rows[2][:3] == ["a1", "a", "1.000"]
    assert float(rows[2][3]) < 1000
    assert "mean 1.000, std 0.000" in said
    assert "None on 4 of 8" in said
    assert "no spread" in said
    assert "what it saw: episode a0" in said
    for part in ("Which [fruit]?", "pear | the pear", "plum", "a pear", "write: 'a pear'"):
        assert part in said
    assert "in a recipe" in said
    assert "what it saw: episode b3" in try_bad("sometimes", "--show", "b3")
    assert "None on 2 of 2" in try_bad("sometimes", "--option", "of=1", "--limit", "2")


def test_scores_of_turns_are_shown(bad: Path) -> None:
    said = try_bad("turn")
    assert "write 1.00, answer 0.25" in said
    assert "0.625" in said
    assert "write: 'a pear'  -> 1.000" in said


def test_a_score_that_differs_between_tasks_only_is_noted(bad: Path) -> None:
    assert "differs between tasks only" in try_bad("by_task")
    assert "differs" not in try_bad("trl")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", "AttributeError: 'Answer' object has no attribute 'txt'"),
        ("hangs", "no answer within 0.05 s"),
        ("waits", "no answer within 0.05 s"),
        ("short_group", "returned 1 values"),
        ("short_batch", "returned 9 values"),
        ("short_trl", "returned 7 values"),
        ("word", "returned 'no'"),
        ("text", "returned '0.5'"),
        ("nan", "returned nan"),
        ("outside", "outside its range [0.0, 1.0]"),
    ],
)
def test_faults_say_where_and_end_with_one(bad: Path, name: str, says: str) -> None:
    said = try_bad(name, code=1)
    assert says in said
    assert "None on 8 of 8" in said
    assert f"{bad}/rewards/bad.py:" in said  # file and line
    assert "fix:" in said
    assert "in a recipe" not in said


def test_a_traceback_shows_the_persons_own_lines(bad: Path) -> None:
    said = try_bad("raises", code=1)
    assert "return episode.answer.txt" in said
    assert "measure.py" not in said
    assert said.count("fix: mend it there") == 1  # eight episodes, one reason


def test_frames_of_shipped_rewards_stay(tmp_path: Path) -> None:
    package = Path(main.__file__).parents[1]
    text = "".join(
        f'  File "{path}", line 1, in f\n    return 1\n'
        for path in (package / "reward/measure.py", package / "_shipped/rewards/answer.py", tmp_path / "my.py")
    )
    kept = own_frames(text)
    assert "measure.py" not in kept
    assert "_shipped/rewards/answer.py" in kept
    assert "my.py" in kept


def test_the_deadline_can_be_given(bad: Path) -> None:
    weighted = prepare("bad.same", [], deadline=0.5)
    assert weighted.dimension.deadline == 0.5
    trial = try_out(weighted, load_samples(Path("e.jsonl")).episodes)
    assert trial.faults.count == {}
    assert len(trial.seconds) == 8


def test_functions_that_nobody_decorated_work(bad: Path) -> None:
    assert "range open" in try_bad("trl")
    assert "clip" in try_bad("trl")  # the line for the recipe tames it
    assert "0.060" in try_bad("plain")
    (bad / "package.py").write_text("def f(episode):\n    return 0.5\n")
    assert "0.500" in run("test", "package.py:f")


def test_a_judge_stands_in_by_rules(work: Path) -> None:
    assert "None on 0 of 16" in run("test", "grounding.supported_judge")


# ---- what it is not ---------------------------------------------------------------------------


def test_unknown_names_say_what_is_near_and_where_it_was_looked_for(bad: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'outside'") as caught:
        try_bad("outsid")
    assert "bad.py" in str(caught.value)
    with pytest.raises(RecipeError, match=r"did you mean 'answer\.token_f1'") as caught:
        run("test", "answers.token_f1")
    assert str(bad / "rewards") in str(caught.value)
    assert str(shipped("rewards")) in str(caught.value)
    with pytest.raises(RecipeError, match=r"that is a file\n  fix: name a function in it: bad\.raises"):
        run("test", "bad")
    with pytest.raises(RecipeError, match="not a function"):
        run("show", "os:sep")


def test_two_rewards_of_one_name(bad: Path) -> None:
    (bad / "rewards/twice.py").write_text(
        "from memfactory import reward\n\n@reward\ndef a(e):\n    return 1\n\n@reward\ndef a(e):\n    return 0\n"
    )
    with pytest.raises(RecipeError, match=r"two rewards are called 'a': here and at .*twice\.py:3"):
        run("test", "twice.a")


@pytest.mark.parametrize(
    ("option", "says"),
    [("off=1", "did you mean 'of'"), ("of=x", "valid integer"), ("of", "key=value")],
)
def test_wrong_options(bad: Path, option: str, says: str) -> None:
    with pytest.raises((RecipeError, RecipeErrors), match="--option") as caught:
        try_bad("sometimes", "--option", option)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no episodes in it"),
        ("no json\n", "line 1: not JSON"),
        ("[1]\n", "line 1: not an episode: a list"),
        ('\n{"id": "x"}\n', "line 2: not an episode: it has no 'task'"),
        ('{"schema": 99}\n', "line 1: schema 99"),
    ],
)
def test_files_that_hold_no_episodes(bad: Path, content: str, says: str) -> None:
    (bad / "e.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        try_bad("same")
    assert says in str(caught.value)
    assert "e.jsonl" in str(caught.value)


def test_missing_files_and_episodes(bad: Path) -> None:
    with pytest.raises(MemFactoryError, match="no such file"):
        run("test", "bad.same", "--episode", "nothing.jsonl")
    with pytest.raises(RecipeError, match="no such episode"):
        try_bad("same", "--show", "z9")
    with pytest.raises(MemFactoryError, match="no such file"):
        run("test", "bad.same", "--episode", ".")  # a folder that is no run


def test_episodes_come_from_a_file_a_run_or_the_shipped_sample(bad: Path) -> None:
    assert len(load_samples(None).episodes) == 16
    assert "shipped" in load_samples(Path("data/samples/episodes.jsonl")).source
    (bad / "run").mkdir()
    (bad / "run/episodes.jsonl").write_text((bad / "e.jsonl").read_text())
    assert len(load_samples(Path("run")).episodes) == 8
    (bad / "data/samples").mkdir(parents=True)
    (bad / "data/samples/episodes.jsonl").write_text((bad / "e.jsonl").read_text())
    assert len(load_samples(Path("data/samples/episodes.jsonl")).episodes) == 8  # one's own comes first


def test_the_shipped_sample_has_groups_with_better_and_worse() -> None:
    episodes = load_samples(None).episodes
    groups = {own.group for own in episodes}
    assert len(groups) >= 2
    for group in groups:
        assert len({own.scores["answer.exact_match"].value for own in episodes if own.group == group}) > 1


# ---- list and show ---------------------------------------------------------------------------


def test_list_says_whose_it_is_what_it_hides_and_what_is_broken(bad: Path) -> None:
    (bad / "rewards/answer.py").write_text("from memfactory import reward\n\n@reward\ndef mine(e):\n    return 1\n")
    (bad / "rewards/broken.py").write_text("import no_such_module\n")
    (bad / "rewards/empty.py").write_text("x = 1\n")
    (bad / "rewards/_helper.py").write_text("raise SystemExit\n")
    said = run("list")
    assert "yours: rewards/bad.py" in said
    assert "bad.raises" in said
    assert "First sentence goes on." in said
    assert "Second" not in said
    assert "bad.trl" in said
    assert "bad.plain" not in said  # cannot be told from a helper
    assert "hides the shipped file 'answer'" in said
    assert "answer.mine" in said
    assert "answer.exact_match  " not in said
    assert "cannot be imported: ModuleNotFoundError" in said
    assert "no rewards in it" in said
    assert "_helper" not in said
    assert "shipped: " in said
    assert "none of your own" not in said


def test_list_in_an_empty_folder_says_how_to_begin(work: Path) -> None:
    assert "memfactory rewards new" in run("list")


def test_show_gives_docstring_options_place_and_a_line_for_the_recipe(bad: Path) -> None:
    said = run("show", "bad.sometimes")
    assert "rewards/bad.py:" in said
    assert "of: int = 2" in said
    section = yaml.safe_load(said[said.index("rewards:\n") :])["rewards"][0]
    assert section == {"name": "bad.sometimes", "weight": 1.0, "options": {"of": 2}}
    assert "module write" in run("show", "memory.churn")
    assert "open" in run("show", "bad.trl")
    assert "no docstring" in run("show", "bad.same")


@pytest.mark.parametrize("path", sorted(shipped("rewards").glob("*.py")), ids=lambda path: path.stem)
def test_every_shipped_reward_can_be_shown(path: Path, work: Path) -> None:
    from memfactory.cli.rewards.catalogue import reward_files

    (own,) = [file for file in reward_files() if file.path == path]
    assert own.owner == "shipped"
    assert own.error == ""
    for name, dimension in own.dimensions.items():
        assert dimension.doc, f"{own.name}.{name} has no docstring"
        said = run("show", f"{own.name}.{name}")
        assert yaml.safe_load(said[said.index("rewards:\n") :])["rewards"]


# ---- rescore ----------------------------------------------------------------------------------


@pytest.fixture
def finished(bad: Path) -> Path:
    """A run folder of two groups, of which the second is stored in part."""
    folder = bad / "run"
    folder.mkdir()
    recipe = {
        "name": "r",
        "model": {"tiny": {}},
        "environment": {"name": "fact_words"},
        "train": {"num_generations": 4},
    }
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(recipe | {"rewards": [{"name": "bad.trl", "low": 0, "high": 1}]})
    )
    lines = [json.loads(line) for line in (bad / "e.jsonl").read_text().splitlines()][:7]
    stored = [{"schema": 1, "step": 1, "split": "train"} | line for line in lines]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stored))
    return folder


def test_rescore_prints_and_writes_what_would_have_been(finished: Path, bad: Path) -> None:
    (bad / "other.yaml").write_text("rewards: [{name: bad.sometimes, missing: drop}, {name: bad.same}]\n")
    said = run("rescore", "run", "--recipe", "other.yaml", "--statistics", "s.yaml")
    for part in (
        "7 episodes of split train",
        "bad.sometimes",
        "groups that teach nothing",
        "1 incomplete",
        "b: 3 of 4",
    ):
        assert part in said
    assert "written: run/rescored/other" in said
    assert len((finished / "rescored/other/episodes.jsonl").read_text().splitlines()) == 7
    statistics = yaml.safe_load((bad / "s.yaml").read_text())["aggregate"]["statistics"]
    assert statistics == {"bad.sometimes": [1.0, 1.0], "bad.same": [1.0, 1.0]}
    run("rescore", "run", "credit.advantage=rloo")
    run("rescore", "run", "--name", "mine")
    assert {path.name for path in (finished / "rescored").iterdir()} == {"other", "changed", "mine"}


def test_rescore_with_a_reward_that_fails_ends_with_one(finished: Path) -> None:
    said = run("rescore", "run", "rewards=[{name: bad.raises}]", code=1)
    assert "faults/reward: 7" in said
    assert "no attribute 'txt'" in said
    with pytest.raises(DataError, match="--split train"):
        run("rescore", "run", "--split", "eval")
    with pytest.raises(DataError, match="no run folder"):
        run("rescore", "nothing")


# ---- lint and calibrate ----------------------------------------------------------------------


def test_lint_of_a_recipe(bad: Path) -> None:
    recipe = {
        "name": "r",
        "model": {"tiny": {}},
        "environment": {"name": "fact_words"},
        "rewards": [{"name": "bad.trl", "low": 0, "high": 1}, {"name": "bad.same", "role": "bonus"}],
    }
    (bad / "r.yaml").write_text(yaml.safe_dump(recipe))
    said = run("lint", "r.yaml", "--episode", "e.jsonl")
    assert "plain bonus" in said
    assert "outcome" in said
    assert "warning: bad.same: a plain bonus, no potential" in said
    assert "nothing to remark" in run("lint", "memagent/quickstart")


@pytest.mark.slow
def test_a_dry_run_ends_with_what_the_linter_says(bad: Path) -> None:
    rewards = "rewards=[{name: answer.token_f1}, {name: bad.same, role: bonus}]"
    result = CliRunner().invoke(app, ["train", "memagent/quickstart", "--dry-run", rewards], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "warning: bad.same: a plain bonus, no potential" in result.output
    assert result.output.rstrip().endswith("dry run passed")


RUBRIC = """
from memfactory import reward
from memfactory.reward.judge import Rubric

POLITE = Rubric(
    "polite", "1", "Is it polite?", {"yes": 1.0, "no": 0.0}, rule=lambda fields: float("please" in fields["answer"])
)


@reward
async def polite(episode, *, judge):
    return await judge.grade(POLITE, answer=episode.answer.text)


@reward
def other(episode):
    return 1
"""


@pytest.mark.parametrize("name", ["kind.POLITE", "kind.polite", "rewards/kind.py:POLITE"])
def test_calibrate_takes_a_rubric_or_the_reward_that_uses_it(work: Path, name: str) -> None:
    (work / "rewards").mkdir()
    (work / "rewards/kind.py").write_text(RUBRIC)
    rows = [("please sit", "yes"), ("sit", "no"), ("sit, friend", "yes")]
    lines = [json.dumps({"fields": {"answer": answer}, "label": label}) for answer, label in rows]
    (work / "labels.jsonl").write_text("\n".join(lines))
    said = run("calibrate", name, "labels.jsonl")
    assert "66.7%" in said
    assert "labels.jsonl:3" in said


def test_calibrate_says_where_there_is_no_rubric(work: Path) -> None:
    (work / "rewards").mkdir()
    (work / "rewards/kind.py").write_text(RUBRIC)
    with pytest.raises(RecipeError, match="uses no rubric"):
        run("calibrate", "kind.other", "labels.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        run("calibrate", "kind.POLITE", "labels.jsonl")
