"""The run folder keeps what a run wrote, whatever the model wrote and whenever the run was killed."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.checkpoints import begin, saving, seal
from memfactory.episode import Answer, Episode, Evidence, Probe, Score, StopReason, Task, Turn
from memfactory.errors import DataError, EngineError, RecipeError
from memfactory.recipe import Recipe
from memfactory.runs import SCHEMA_VERSION, RunFolder, episode_from_record, episode_record

NASTY = "</script><img onerror=alert(1)> <!-- \u2028\u2029\x85\x00 \ud800 \U0001f600 \\u2028 \r\n {{ x }}"


def make_recipe(**changes: object) -> Recipe:
    data = {
        "name": "quick",
        "model": {"tiny": {}},
        "environment": {"name": "pairs"},
        "rewards": [{"name": "answer.exact_match"}],
        "train": {"max_steps": 4, "learning_rate": 1e-5},
        **changes,
    }
    return Recipe.model_validate(data)


def make_episode(text: str = NASTY, id: str = "e1") -> Episode:
    probe = Probe("Who?", ("Ann", "Anna"), (Evidence("Ann did it", 0),))
    turns = [
        Turn(
            module="write",
            prompt_ids=[1, 2, 3],
            completion_ids=[4, 5],
            logprobs=[-0.25, -1.5],
            text=text,
            stop=StopReason.LENGTH,
            messages=[{"role": "user", "content": text}],
            policy_version=3,
            prefix_key="t/write/0",
            chunk=0,
            memory_after=text,
            advantage=0.5,
        ),
        Turn("answer", [7], [8], [0.0], text, StopReason.STOP, trainable=False, error="no box"),
    ]
    return Episode(
        task=Task("t", ("Ann did it", text), (probe,), {"level": "easy"}),
        turns=turns,
        answers=[Answer(probe, None, text)],
        memory=text,
        id=id,
        group="g",
        scores={"answer.exact_match": Score(1.0), "judge.quality": Score(None, "judge timed out")},
        reward=None,
        advantage=-0.5,
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.open(tmp_path / "run", make_recipe(), resume=False)


def add_checkpoint(run: RunFolder, step: int, state: str | None = "{}") -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    return folder


def test_an_episode_comes_back_whole(run: RunFolder) -> None:
    episode = make_episode()
    run.log_episodes(2, "train", [episode])
    (record,) = run.read_episodes()
    assert (record["schema"], record["step"], record["split"]) == (SCHEMA_VERSION, 2, "train")
    assert episode_from_record(record) == episode


def test_without_tokens_only_their_counts_are_kept(run: RunFolder) -> None:
    run.log_episodes(2, "eval", [make_episode()], tokens=False)
    (record,) = run.read_episodes()
    assert record["turns"][0]["completion_tokens"] == 2
    assert "completion_ids" not in record["turns"][0]
    assert episode_from_record(record).turns[0].completion_ids == []


MIMIC = ',"prompt_ids":[1,2],"logprobs":[-0.5'


@pytest.mark.parametrize("text", ["plain", MIMIC, f'"{MIMIC}]', f"\\{MIMIC}", f'\\"{MIMIC}', NASTY])
def test_tokens_are_left_out_when_read_and_texts_that_look_like_them_are_not(run: RunFolder, text: str) -> None:
    episode = make_episode(text)
    episode.turns[0].logprobs = [-1e-6, math.nan]
    episode.task.metadata["logprobs"] = [[1], [2]]  # of the data: nothing that a policy drew
    run.log_episodes(2, "train", [episode])
    (whole,), (light,) = run.read_episodes(), run.read_episodes(tokens=False)
    for turn in whole["turns"]:
        for name in ("prompt_ids", "completion_ids", "logprobs"):
            del turn[name]
    assert light == whole


# any text that Python can hold, lone surrogates included
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=60) | st.sampled_from([NASTY, ""])


@settings(deadline=None, max_examples=60)
@given(text=ANY_TEXT, logprobs=st.lists(st.floats(-20, 0), max_size=4), reward=st.none() | st.floats(-5, 5))
def test_any_text_and_number_survives(
    tmp_path_factory: pytest.TempPathFactory, text: str, logprobs: list[float], reward: float | None
) -> None:
    run = RunFolder(tmp_path_factory.mktemp("run"))
    episode = make_episode(text)
    episode.turns[0].logprobs = logprobs
    episode.reward = reward
    run.log_episodes(1, "train", [episode, episode])
    first, second = run.read_episodes()
    assert first == second
    back = episode_from_record(first)
    assert back.turns[0].logprobs == pytest.approx(logprobs, abs=1e-6)
    back.turns[0].logprobs = logprobs
    assert back == episode


def test_metrics_come_back_and_numbers_that_json_lacks_become_null(run: RunFolder) -> None:
    run.log_metrics(1, {"loss": 0.5, "grad_norm": math.nan, "reward": None, "groups/count": 8}, phase="train")
    (line,) = run.read_metrics()
    assert (line["schema"], line["step"], line["phase"]) == (SCHEMA_VERSION, 1, "train")
    assert line["values"] == {"loss": 0.5, "grad_norm": None, "reward": None, "groups/count": 8}
    json.loads(run.metrics_file.read_text(), parse_constant=pytest.fail)


def test_a_number_of_another_library_is_stored_as_a_number(run: RunFolder) -> None:
    numpy = pytest.importorskip("numpy")
    run.log_metrics(1, {"loss": numpy.float32(0.5)}, phase="train")
    assert run.read_metrics()[0]["values"] == {"loss": 0.5}


def test_a_torn_last_line_is_skipped_and_then_dropped(run: RunFolder) -> None:
    run.log_metrics(1, {"loss": 1.0}, phase="train")
    with run.metrics_file.open("a") as stream:
        stream.write('{"schema":1,"step":2,"pha')
    assert [line["step"] for line in run.read_metrics()] == [1]
    run.truncate_after(1)
    run.log_metrics(2, {"loss": 0.5}, phase="train")
    assert [line["step"] for line in run.read_metrics()] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(run: RunFolder) -> None:
    run.metrics_file.write_text("nonsense\n")
    run.log_metrics(1, {"loss": 1.0}, phase="train")
    with pytest.raises(DataError, match=r"metrics\.jsonl line 1"):
        run.read_metrics()


def test_lines_of_a_newer_version_are_refused(run: RunFolder) -> None:
    run.metrics_file.write_text(json.dumps({"schema": SCHEMA_VERSION + 1, "step": 1}) + "\n")
    with pytest.raises(DataError, match="upgrade memfactory"):
        run.read_metrics()


def test_truncate_keeps_the_checkpoint_step_and_the_warmup(run: RunFolder) -> None:
    run.log_metrics(150, {"loss": 1.0}, phase="warmup")
    run.log_metrics(0, {"sampled_em": 0.1}, phase="eval")
    for step in (1, 2, 3):
        run.log_metrics(step, {"loss": 1.0}, phase="train")
        run.log_episodes(step, "train", [make_episode()])
    run.truncate_after(2)
    assert [(line["phase"], line["step"]) for line in run.read_metrics()] == [
        ("warmup", 150),
        ("eval", 0),
        ("train", 1),
        ("train", 2),
    ]
    assert [record["step"] for record in run.read_episodes()] == [1, 2]


def test_episodes_are_read_by_split_and_step(run: RunFolder) -> None:
    run.log_episodes(0, "eval", [make_episode(id="a")])
    run.log_episodes(1, "train", [make_episode(id="b"), make_episode(id="c")])
    assert [record["id"] for record in run.read_episodes(split="train")] == ["b", "c"]
    assert [record["id"] for record in run.read_episodes(step=0)] == ["a"]
    assert list(run.read_episodes(split="train", step=0)) == []


def test_a_folder_that_holds_a_run_is_not_overwritten(run: RunFolder) -> None:
    with pytest.raises(RecipeError, match="already holds a run") as raised:
        RunFolder.open(run.path, make_recipe(), resume=False)
    assert "output_dir=" in raised.value.fix


def test_the_run_of_another_recipe_is_not_continued(run: RunFolder) -> None:
    other = make_recipe(train={"max_steps": 9, "learning_rate": 1e-5, "beta": 0.1})
    with pytest.raises(RecipeError) as raised:
        RunFolder.open(run.path, other, resume=True)
    assert "train.max_steps was 4, is 9" in raised.value.why
    assert "train.beta was absent, is 0.1" in raised.value.why
    assert "learning_rate" not in raised.value.why
    assert "output_dir=" in raised.value.fix
    assert "--start-over" in raised.value.fix


def test_fields_that_came_later_and_have_their_defaults_are_no_difference(run: RunFolder) -> None:
    stored = yaml.safe_load(run.recipe_file.read_text())
    del stored["model"]["gguf_file"], stored["rollout"]["async_grpo"]
    run.recipe_file.write_text(yaml.safe_dump(stored))
    assert RunFolder.open(run.path, make_recipe(), resume=True).path == run.path


def test_a_moved_folder_can_be_continued(run: RunFolder, tmp_path: Path) -> None:
    moved = run.path.rename(tmp_path / "moved")
    assert RunFolder.open(moved, make_recipe(output_dir=str(moved)), resume=True).path == moved


def test_resume_goes_back_to_the_newest_complete_checkpoint(run: RunFolder) -> None:
    for step in (1, 2, 10, 11):
        run.log_metrics(step, {"loss": 1.0}, phase="train")
    add_checkpoint(run, 2)
    newest = add_checkpoint(run, 10)
    add_checkpoint(run, 11, state=None)
    add_checkpoint(run, 12, state='{"global_st')
    (run.checkpoints / "checkpoint-old").mkdir()
    again = RunFolder.open(run.path, make_recipe(), resume=True)
    assert again.latest_checkpoint() == newest
    assert [line["step"] for line in again.read_metrics()] == [1, 2, 10]


def test_resume_without_a_checkpoint_starts_over(run: RunFolder) -> None:
    run.log_metrics(0, {"loss": 1.0}, phase="warmup")
    again = RunFolder.open(run.path, make_recipe(), resume=True)
    assert again.latest_checkpoint() is None
    assert again.read_metrics() == []


def test_lines_of_a_warm_up_that_was_saved_stay(run: RunFolder) -> None:
    run.log_metrics(150, {"loss": 1.0}, phase="warmup")
    run.log_metrics(0, {"sampled_em": 0.1}, phase="eval")
    (run.path / "initial").mkdir()
    again = RunFolder.open(run.path, make_recipe(), resume=True)
    assert [line["phase"] for line in again.read_metrics()] == ["warmup"]


def test_the_ledger_goes_back_with_the_other_files(run: RunFolder) -> None:
    for step in (1, 2, 3):
        run.log_ledger({"step": step, "event": "issued", "prompts": ["a"]})
    add_checkpoint(run, 2)
    again = RunFolder.open(run.path, make_recipe(), resume=True)
    assert [line["step"] for line in again.read_ledger()] == [1, 2]


def sealed(run: RunFolder, step: int) -> Path:
    checkpoint = run.checkpoints / f"checkpoint-{step}"
    begin(checkpoint)
    (checkpoint / "weights").write_text("0123456789")
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "deeper").mkdir()
    (checkpoint / "deeper" / "shard").write_text("01234")
    seal(checkpoint)
    return checkpoint


def test_a_checkpoint_without_its_seal_is_not_used_and_is_cleared_away(run: RunFolder) -> None:
    whole = sealed(run, 1)
    begin(add_checkpoint(run, 2))  # all is there but the seal
    assert run.latest_checkpoint() == whole
    assert run.clean_checkpoints() == []
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("weights", "012", "weights has 3 bytes, and 10 were written"),
        ("deeper/shard", None, "deeper/shard is missing"),
        ("trainer_state.json", "{", "trainer_state.json has 1 bytes"),
        ("seal.json", "", "seal.json is not readable"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside(run: RunFolder, file: str, text: str | None, told: str) -> None:
    whole, broken = sealed(run, 1), sealed(run, 2)
    if text is None:
        (broken / file).unlink()
    else:
        (broken / file).write_text(text)
    run.log_metrics(2, {"loss": 1.0}, phase="train")
    again = RunFolder.open(run.path, make_recipe(), resume=True)
    assert again.read_metrics() == []
    (said,) = again.clean_checkpoints()
    assert told in said
    assert again.latest_checkpoint() == whole
    assert (run.checkpoints / "damaged-checkpoint-2").is_dir()
    assert not broken.exists()


def test_with_none_but_damaged_checkpoints_nothing_is_dropped(run: RunFolder) -> None:
    (sealed(run, 2) / "weights").unlink()
    run.log_metrics(2, {"loss": 1.0}, phase="train")
    with pytest.raises(EngineError, match="checkpoint-2: weights is missing") as raised:
        RunFolder.open(run.path, make_recipe(), resume=True)
    assert "--start-over" in raised.value.fix
    assert len(run.read_metrics()) == 1


def test_a_folder_that_another_process_trains_in_is_refused(run: RunFolder) -> None:
    with run.held(), pytest.raises(RecipeError, match=rf"another process .*process {os.getpid()} on"), run.held():
        pass
    with run.held():  # it was let go of
        pass


def test_a_run_is_set_aside_whole(run: RunFolder) -> None:
    run.log_metrics(1, {"loss": 1.0}, phase="train")
    first = run.set_aside()
    assert first == run.path.with_name("run.1")
    assert run.set_aside() is None  # nothing lies there any more
    RunFolder.open(run.path, make_recipe(), resume=True)
    assert run.set_aside() == run.path.with_name("run.2")
    assert RunFolder(first).read_metrics()
    with RunFolder(first).held(), pytest.raises(RecipeError, match="another process"):
        RunFolder(first).set_aside()


def test_a_write_that_fails_says_what_to_do(run: RunFolder, tmp_path: Path) -> None:
    run.metrics_file.mkdir()  # no text can be appended to it
    with pytest.raises(EngineError, match=r"metrics\.jsonl could not be written") as raised:
        run.log_metrics(1, {"loss": 1.0}, phase="train")
    assert "same command" in raised.value.fix
    (tmp_path / "x").mkdir()
    with pytest.raises(EngineError, match="the disk is full"), saving(tmp_path / "x", remove=True):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not (tmp_path / "x").exists()


def test_resume_in_an_empty_folder_starts_a_run(tmp_path: Path) -> None:
    assert RunFolder.open(tmp_path / "new", make_recipe(), resume=True).read_recipe() == make_recipe().dump()


def test_the_summary_is_replaced_as_a_whole(run: RunFolder) -> None:
    assert run.read_summary() == {}
    run.write_summary({"name": "quick", "stopped": "interrupted"})
    run.write_summary({"name": "quick", "before": {"sampled_em": 0.5}})
    assert run.read_summary() == {"schema": SCHEMA_VERSION, "name": "quick", "before": {"sampled_em": 0.5}}
    run.write_summary({"before": {"sampled_em": math.nan}, "seconds": [1.0, math.inf]})
    assert run.read_summary() == {"schema": SCHEMA_VERSION, "before": {"sampled_em": None}, "seconds": [1.0, None]}
    assert not list(run.path.glob("*.tmp"))


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run folder"):
        RunFolder(tmp_path).read_recipe()


def test_a_record_that_lacks_a_field_says_whose_fault_it_is() -> None:
    record = episode_record(make_episode())
    del record["turns"][0]["stop"]
    with pytest.raises(DataError, match="e1"):
        episode_from_record(record)
