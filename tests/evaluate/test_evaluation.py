"""`memfactory eval`: several checkpoints in one table, going on after a kill, and what it refuses."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

pytest.importorskip("torch")

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from memfactory.agents import build_agent
from memfactory.agents.baselines import Baseline
from memfactory.episode import Probe, Task
from memfactory.errors import DataError, EngineError, MemFactoryError, RecipeError
from memfactory.evaluate import fingerprints, job
from memfactory.evaluate.candidates import Candidate, apart, find_candidates, weights_fingerprint
from memfactory.evaluate.job import Asked, Done, _plan, _room, run_evaluation
from memfactory.evaluate.preflight import check_context
from memfactory.modules.prompts import PROMPT_SETS, PromptOrder
from memfactory.plugins import shipped
from memfactory.policy import transformers_backend
from memfactory.policy.rendering import prompt_of
from memfactory.policy.tiny import tiny_tokenizer
from memfactory.recipe import load_recipe
from memfactory.train.callbacks import progress_bar
from memfactory.train.prepare import prepare
from tests.forked import Server

TASKS = 10


@pytest.fixture(scope="module")
def trained(forked: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a warmed-up model to begin with."""
    run = tmp_path_factory.mktemp("evaluated") / "short"
    small = ("warmup.steps=30", "train.max_steps=2", "train.per_device_train_batch_size=32", "train.save_steps=1")
    forked.run(["train", "memagent/quickstart", f"output_dir={run}", f"environment.test_tasks={TASKS}", *small])
    return run


def evaluated(run: Path, output: Path, *overrides: str, **asked: Any) -> Done:
    asked.setdefault("checkpoints", [run])
    with progress_bar(Console(quiet=True)) as progress:
        return run_evaluation(Asked(run / "recipe.yaml", overrides, **asked), output, progress)


def stored(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return read


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    """The table but for what the clock says."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in stored(folder)["rows"]]


@pytest.mark.slow
def test_base_and_checkpoint_in_one_table_with_the_numbers_of_training(trained: Path, tmp_path: Path) -> None:
    done = evaluated(trained, tmp_path / "eval")
    summary = json.loads((trained / "summary.json").read_text())
    by_place = {(row.candidate, row.mode): row for row in done.rows}
    assert list(by_place) == [("base", "sampled"), ("short", "sampled"), ("base", "greedy"), ("short", "greedy")]
    for candidate, when in (("base", "before"), ("short", "after")):
        for mode in ("sampled", "greedy"):
            row = by_place[candidate, mode]
            assert row.mean == summary[when][f"{mode}_em"]
            assert row.dimensions.get("memory.retention") == summary[when].get(f"{mode}_retain")
            assert row.tokens > 0
            assert row.peak_context > 0
    # each row of another candidate is compared with the base's, task by task
    first, second = by_place["base", "sampled"], by_place["short", "sampled"]
    assert first.difference is None
    assert second.difference == pytest.approx(second.mean - first.mean)
    assert second.difference_low <= second.difference <= second.difference_high
    # the files say the same
    folder = tmp_path / "eval"
    assert len(lines(folder)) == 4 * TASKS
    assert {line["candidate"] for line in lines(folder)} == {"base", "short"}
    assert all(line["scores"]["answer.exact_match"]["value"] is not None for line in lines(folder))
    table = list(csv.DictReader((folder / "table.csv").open()))
    assert [float(row["mean"]) for row in table] == [row.mean for row in done.rows]
    assert "| recipe | base | sampled |" in (folder / "table.md").read_text()
    assert len({one["fingerprint"] for one in stored(folder)["candidates"]}) == 2

    # again: nothing is run, and the table is the same
    before = without_seconds(folder)
    again = evaluated(trained, folder)
    assert (again.ran, again.cached) == (0, 4 * TASKS)
    assert without_seconds(folder) == before
    # a checkpoint more runs only what is new; the final checkpoint has the weights of the model, wherever it lies
    checkpoints = [trained, trained / "checkpoints" / "checkpoint-1", trained / "checkpoints" / "checkpoint-2"]
    more = evaluated(trained, folder, checkpoints=checkpoints)
    assert more.ran == 2 * TASKS
    assert [row.candidate for row in more.rows[:4]] == ["base", "short", "short/checkpoint-1", "short/checkpoint-2"]
    assert more.rows[3].mean == more.rows[1].mean
    # another metric needs no episode; more samples run the new ones, and the first sample is the one there was
    evaluated(trained, folder, "eval.metric=answer.token_f1")
    assert stored(folder)["rows"][0]["metric"] == "answer.token_f1"
    two = evaluated(trained, folder, samples=2)
    assert two.ran == 2 * TASKS
    assert set(two.rows[0].pass_at) == {"1", "2"}
    assert two.rows[0].pass_at["2"] >= two.rows[0].pass_at["1"] == pytest.approx(two.rows[0].mean)


@pytest.mark.slow
def test_the_same_weights_twice_are_run_once_and_both_keep_their_episodes(trained: Path, tmp_path: Path) -> None:
    last = trained / "checkpoints" / "checkpoint-2"  # what the run ended with
    done = evaluated(trained, tmp_path / "eval", base=False, checkpoints=[trained, last])
    assert (done.ran, done.cached) == (2 * TASKS, 2 * TASKS)
    assert done.rows[0].mean == done.rows[1].mean
    kept = lines(tmp_path / "eval")
    assert [line["candidate"] for line in kept].count("short") == 2 * TASKS
    assert [line["candidate"] for line in kept].count("short/checkpoint-2") == 2 * TASKS
    assert evaluated(trained, tmp_path / "eval", base=False, checkpoints=[trained, last]).ran == 0
    assert lines(tmp_path / "eval") == kept


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_table(forked: Server, trained: Path, tmp_path: Path) -> None:
    words = ("eval", str(trained / "recipe.yaml"), "environment.test_tasks=60", "--checkpoint", str(trained))
    # few at a time, so that there is a middle to be killed in
    words = (*words, "rollout.generate_token_budget=2500", "--samples", "2", "--output")
    run = forked.start([*words, "killed"], folder=tmp_path)
    file, wanted = tmp_path / "killed" / "episodes.jsonl", 0.6 * 360
    while not file.exists() or file.read_bytes().count(b"\n") < wanted:
        time.sleep(0.01)
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, run.output
    assert not (tmp_path / "killed" / "evaluation.json").exists()
    with file.open("ab") as stream:
        stream.write(b'{"schema": 1, "key": "torn')  # a line that was being written
    there = file.read_bytes().count(b"\n")
    assert wanted <= there < 360
    goes_on = forked.command(*words, "killed", folder=tmp_path)
    assert goes_on.returncode == 0, goes_on.stderr
    assert f"{360 - there} episodes run, {there} taken from" in goes_on.stdout
    through = forked.command(*words, "through", folder=tmp_path)
    assert through.returncode == 0, through.stderr
    assert without_seconds(tmp_path / "killed") == without_seconds(tmp_path / "through")

    def texts(name: str) -> dict[str, list[str]]:
        return {line["key"]: [turn["text"] for turn in line["turns"]] for line in lines(tmp_path / name)}

    assert texts("killed") == texts("through")


@pytest.mark.slow
def test_an_episode_depends_on_nothing_that_is_run_beside_it(trained: Path, tmp_path: Path) -> None:
    evaluated(trained, tmp_path / "all", base=False)
    evaluated(trained, tmp_path / "few", base=False, tasks=3)
    evaluated(trained, tmp_path / "other", "seed=1", base=False, tasks=3)
    every = {line["key"]: line["turns"] for line in lines(tmp_path / "all")}
    few = {line["key"]: line["turns"] for line in lines(tmp_path / "few")}
    assert len(few) == 6
    assert all(every[key] == turns for key, turns in few.items())
    other = [line["turns"] for line in lines(tmp_path / "other") if line["mode"] == "sampled"]
    assert other != [line["turns"] for line in lines(tmp_path / "few") if line["mode"] == "sampled"]


@pytest.mark.slow
def test_suites_and_baselines_stand_in_the_same_table(forked: Server, trained: Path, tmp_path: Path) -> None:
    """The tiny model knows no other words than the quickstart's, so its own generator stands in for a suite."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "suites.yaml").write_text(
        "longer:\n  summary: twice as long\n  environment: fact_words\n  options: {seed: 9, targets: 1}\n"
        "  size: {option: chunks, default: 6, unit: chunks}\n  tasks: 8\n"
        "  metrics: [answer.containment, answer.token_f1]\n  differs: it is our own\n"
    )
    words = ("eval", str(trained / "recipe.yaml"), "--checkpoint", str(trained), "--suite", "longer@8")
    more = ("--suite", "recipe", "--tasks", "6", "--baselines", "--output", "out")
    done = forked.command(*words, *more, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = stored(tmp_path / "out")["rows"]
    candidates = ["base", "short", *(f"{kind} (base)" for kind in ("full_context", "no_memory", "bm25", "oracle"))]
    assert [(row["suite"], row["mode"], row["candidate"]) for row in rows] == [
        (suite, mode, name)
        for suite, mode in (
            *(("longer@8", "sampled"), ("longer@8", "greedy")),
            *(("recipe", "sampled"), ("recipe", "greedy")),
        )
        for name in candidates
    ]
    assert {row["metric"] for row in rows} == {"answer.containment", "answer.exact_match"}
    assert "longer@8: it is our own" in done.stdout
    by_name = {row["candidate"]: row for row in rows[: len(candidates)]}
    # eight chunks and an answer against one turn; the whole document is longer than any turn of the agent
    turns = {line["candidate"]: len(line["turns"]) for line in lines(tmp_path / "out") if line["split"] == "longer@8"}
    assert turns["base"] == 9
    assert turns["full_context (base)"] == turns["oracle (base)"] == 1
    assert by_name["full_context (base)"]["peak_context"] > by_name["base"]["peak_context"]
    # no word of a question stands in the text, so BM25 finds nothing
    assert by_name["no_memory (base)"]["tokens"] == by_name["bm25 (base)"]["tokens"]
    shown = [line for line in lines(tmp_path / "out") if line["candidate"] == "oracle (base)"]
    for line in shown:
        evidence = [e["text"] for probe in line["task"]["probes"] for e in probe["evidence"]]
        assert [entry["text"] for entry in line["turns"][0]["retrieved"]] == evidence


@pytest.mark.slow
def test_a_model_is_loaded_once_for_itself_and_its_baselines(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their turns are decoded together, which changes none of them."""
    loaded: list[Any] = []
    batches: list[set[str]] = []
    load, decode = job.load_policy, transformers_backend.decode

    def noted(model: Any, sequences: Any, *rest: Any, **options: Any) -> Any:
        batches.append({tokenizer.decode(sequence.prompt_ids) for sequence in sequences})
        return decode(model, sequences, *rest, **options)

    def counted(*asked: Any, **options: Any) -> Any:
        loaded.append(load(*asked, **options))
        return loaded[-1]

    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    monkeypatch.setattr(job, "load_policy", counted)
    monkeypatch.setattr(transformers_backend, "decode", noted)
    kinds = [Baseline.FULL_CONTEXT, Baseline.ORACLE]
    evaluated(trained, tmp_path / "together", checkpoints=[trained], baselines=kinds)
    assert len(loaded) == 2, "base and checkpoint"
    first = batches[0]
    assert len(first) == 3 * TASKS, "first turns of the agent and of both baselines"
    for kind in kinds:
        evaluated(trained, tmp_path / kind, checkpoints=[trained], baselines=[kind])
        told = [
            {name: value for name, value in line.items() if name != "seconds"}
            for line in lines(tmp_path / "together")
            if line["candidate"] in ("base", "short", f"{kind} (base)")
        ]
        alone = [{name: value for name, value in line.items() if name != "seconds"} for line in lines(tmp_path / kind)]
        assert told == alone


def test_candidates_of_one_name_are_told_apart() -> None:
    """Also those whose name is one that another was given, when names are looked at again with one more."""
    every = apart([Candidate("base", None, "a"), Candidate("base", None, "b"), Candidate("base (2)", None, "c")])
    assert [one.name for one in every] == ["base", "base (3)", "base (2)"]
    assert [one.name for one in apart([*every, Candidate("base", None, "d")])][3] == "base (4)"


def test_contaminated_suites_are_named(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaky.py").write_text(
        "from memfactory.environments.fact_words import FactWords\nfrom memfactory.environments.base import Split\n\n"
        "class Leaky(FactWords):\n    def tasks(self, split, count=None):\n"
        "        return [*super().tasks(Split.TRAIN, 1), *super().tasks(Split.TEST, count - 1)]\n"
    )
    (tmp_path / "data" / "suites.yaml").write_text(
        "leaky: {summary: x, environment: 'leaky.py:Leaky', tasks: 4, metrics: [answer.exact_match]}"
    )
    done = evaluated(trained, tmp_path / "out", "eval.greedy=false", suites=["leaky"], checkpoints=[])
    assert [note for note in done.notes if note.startswith("CONTAMINATED: leaky: 1 of 4 tasks")]
    assert "CONTAMINATED" in (tmp_path / "out" / "table.md").read_text()


def test_the_training_data_of_a_checkpoint_is_looked_at_for_questions_too(trained: Path, tmp_path: Path) -> None:
    """The command's recipe has other data than the run of the checkpoint had."""
    done = evaluated(trained, tmp_path / "a", "eval.greedy=false")
    assert not [note for note in done.notes if "training data" in note]
    (tmp_path / "run").mkdir()
    for name in ("model", "initial"):
        shutil.copytree(trained / name, tmp_path / "run" / name)
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    (tmp_path / "other.py").write_text(
        "from dataclasses import replace\nfrom memfactory.environments.fact_words import FactWords\n"
        "from memfactory.environments.base import Split\n\n"
        "class Train(FactWords):\n    def tasks(self, split, count=None):\n"
        "        first, *rest = super().tasks(Split.TEST, 3)\n"
        "        other = {'stream': ('other',), 'metadata': {'source': 'y'}}\n"
        "        return [first, *(replace(t, id='x' + t.id, **other) for t in rest)]\n\n"
        "class Test(FactWords):\n    def tasks(self, split, count=None):\n"
        "        source = {'source': 'x'} if split is Split.TEST else {}\n"
        "        return [replace(t, metadata=source) for t in super().tasks(split, count)]\n"
    )
    own = recipe | {"environment": recipe["environment"] | {"name": f"{tmp_path / 'other.py'}:Train"}}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(own))
    name = f"environment.name={tmp_path / 'other.py'}:Test"
    done = evaluated(trained, tmp_path / "b", name, "eval.greedy=false", checkpoints=[tmp_path / "run"])
    leaked, again = (note for note in done.notes if note.endswith("documents") or "CONTAMINATED" in note)
    assert leaked.startswith("CONTAMINATED")
    assert "1 of 10 tasks stand in the training data of run run" in leaked
    assert "are also asked in the training data of run run" in again


def test_a_task_that_fails_is_counted_and_left_out(trained: Path, tmp_path: Path) -> None:
    """Chunks differ in number: two tasks of ten have one too many for the agent."""
    (tmp_path / "uneven.py").write_text(
        "from dataclasses import replace\nfrom memfactory.environments.fact_words import FactWords\n\n"
        "class Uneven(FactWords):\n    def tasks(self, split, count=None):\n"
        "        tasks = super().tasks(split, count)\n"
        "        return [replace(t, stream=(*t.stream, 'the old dog stood near the wall .')) if n < 2 else t\n"
        "                for n, t in enumerate(tasks)]\n"
    )
    name = f"environment.name={tmp_path / 'uneven.py'}:Uneven"
    done = evaluated(trained, tmp_path / "out", name, "agent.max_chunks=4", "eval.greedy=false")
    for row in done.rows:
        assert (row.tasks, row.episodes, row.failed) == (10, 10, 2)
        assert row.faults == {"data": 2}
    assert any("2 of 10 tasks are refused" in note and "agent.max_chunks = 4" in note for note in done.notes)
    kept = [line for line in lines(tmp_path / "out") if line["failed"]]
    assert len(kept) == 4
    with pytest.raises(DataError, match="2 of 10 tasks are refused"):
        evaluated(trained, tmp_path / "no", name, "agent.max_chunks=4", "rollout.max_failed_share=0.1")
    # what failed is tried again, and nothing else
    assert evaluated(trained, tmp_path / "out", name, "agent.max_chunks=4", "eval.greedy=false").ran == 4


# ---- what kept episodes are found again by ------------------------------------------------------


@pytest.mark.slow
def test_other_weights_in_the_folder_of_the_base_are_run_again(trained: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(trained / "initial", base)
    own = (f"model={{name: {base}}}", "warmup=null", "eval.greedy=false")
    for ran in (3, 0):
        assert evaluated(trained, tmp_path / "out", *own, checkpoints=[], tasks=3).ran == ran
    shutil.copy(trained / "model" / "model.safetensors", base / "model.safetensors")
    assert evaluated(trained, tmp_path / "out", *own, checkpoints=[], tasks=3).ran == 3
    # and those that an adapter is put on
    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(adapter)
    for ran in (3, 0):
        assert evaluated(trained, tmp_path / "out", *own, base=False, checkpoints=[adapter], tasks=3).ran == ran
    shutil.copy(trained / "initial" / "model.safetensors", base / "model.safetensors")
    assert evaluated(trained, tmp_path / "out", *own, base=False, checkpoints=[adapter], tasks=3).ran == 3


@pytest.mark.slow
def test_an_edited_agent_is_run_again(forked: Server, trained: Path, tmp_path: Path) -> None:
    source = "from memfactory.agents import MemAgent\n\nclass Own(MemAgent):\n    pass\n"
    words = ("eval", str(trained / "recipe.yaml"), "agent.name=own.py:Own", "eval.greedy=false", "--tasks", "3")
    for text, ran in ((source, 3), (source, 0), (source.replace("pass", "order = 'paper'"), 3)):
        (tmp_path / "own.py").write_text(text)
        done = forked.command(*words, "--output", "out", folder=tmp_path)
        assert f"{ran} episodes run, " in done.stdout, done.stderr


def test_what_else_decides_an_episode(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(*overrides: str) -> str:
        prepared = prepare(trained / "recipe.yaml", ("warmup=null", *overrides))
        return json.dumps(_plan(prepared, Asked(trained / "recipe.yaml"), [], []).asked, sort_keys=True)

    plain = key()
    assert key("train.max_steps=9") == plain
    keys = [plain, key("agent.max_answer_tokens=9"), key("model.dtype=bfloat16")]
    keys += [key("rollout.engine=vllm"), key("rollout.engine=vllm", "rollout.vllm.max_model_len=99")]
    beside = (f"policies={{frozen: {{model: {trained / 'initial'}}}}}", "modules={answer: {policy: frozen}}")
    keys.append(key(*beside))
    monkeypatch.setattr(fingerprints, "weights_fingerprint", lambda *_: "other weights in the same folder")
    keys.append(key(*beside))
    words = PROMPT_SETS["words"]
    others = {order: replace(words[order], write=words[order].write + " now") for order in PromptOrder}
    monkeypatch.setitem(PROMPT_SETS, "words", others)
    keys.append(key())
    lora = f"model={{name: {trained / 'initial'}, lora: {{r: 2}}}}"
    monkeypatch.setattr("memfactory.policy.quantization.unfit", lambda recipe: [])  # it needs no GPU to be asked for
    keys += [key(lora, "model.quantization={bits: 4}"), key(lora, "model.quantization={bits: 4, type: fp4}")]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("recipe", "overrides", "places", "expected"),
    [
        ("memagent/quickstart-vllm", (), 5, 5),
        ("memagent/quickstart-vllm", (), 0, 1),
        ("memagent/quickstart-vllm", (), -1, 1),
        ("memagent/quickstart-vllm", ("rollout.vllm.mode=colocate",), 5, 1),
        ("memagent/quickstart-vllm", ("model.lora=null",), 5, 1),
        ("memagent/quickstart-vllm", ("rollout.engine=transformers",), 5, 1),
        # a model beside the trained one, and a module that learns, are there once
        (
            "memagent/quickstart-vllm",
            ("policies={frozen: {model: org/other}}", "modules={answer: {policy: frozen}}"),
            5,
            1,
        ),
        ("rmm/quickstart", ("rollout.engine=vllm", "model.lora={r: 2}"), 5, 1),
    ],
)
def test_models_are_asked_at_the_same_time_where_servers_have_places(
    recipe: str, overrides: tuple[str, ...], places: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memfactory.train.serving.make_room", lambda recipe, label: places)
    assert _room(prepare(shipped("recipes") / f"{recipe}.yaml", overrides, splits=()), "eval-") == expected


def test_large_weights_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"x" * 1000)
    whole = weights_fingerprint(file.parent)
    assert not (tmp_path / ".memfactory").exists()
    monkeypatch.setattr(fingerprints, "_LARGE", 999)
    assert weights_fingerprint(file.parent) == whole
    with monkeypatch.context() as once:
        once.delattr(hashlib, "file_digest")
        assert weights_fingerprint(file.parent) == whole
        file.touch()
        with pytest.raises(AttributeError):
            weights_fingerprint(file.parent)
    (tmp_path / ".memfactory" / "weights.json").write_text("torn")
    assert weights_fingerprint(file.parent) == whole
    file.write_bytes(b"x" * 500 + b"y" + b"x" * 499)
    assert weights_fingerprint(file.parent) != whole


# ---- bad input, before a model is loaded --------------------------------------------------------


@pytest.fixture
def refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The error of an evaluation that must end before a model is loaded."""
    import memfactory.evaluate.job as job

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(job, "load_policy", never)

    def error(*overrides: str, **asked: Any) -> str:
        with pytest.raises(MemFactoryError) as caught:
            evaluated(trained, tmp_path / "refused", *overrides, **asked)
        return str(caught.value)

    return error


def test_what_is_refused_before_a_model_is_loaded(refused: Any, trained: Path, tmp_path: Path) -> None:
    assert "there is no such folder" in refused(checkpoints=[tmp_path / "nowhere"])
    assert "neither config.json nor adapter_config.json" in refused(checkpoints=[tmp_path])
    # a tokenizer with other ids
    other = tmp_path / "other"
    other.mkdir()
    for file in (trained / "model").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    told = json.loads((other / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(told))
    text = refused(checkpoints=[other])
    assert "2 tokens have other ids than in the recipe's" in text
    assert "RUN/recipe.yaml" in text
    # an adapter's, too
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "tokenizer.json").write_text(json.dumps(told))
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(trained / "initial")}))
    own = (f"model={{name: {trained / 'initial'}}}", "warmup=null")
    assert "2 tokens have other ids than in the recipe's" in refused(*own, checkpoints=[adapter])
    # another base with the same tokenizer
    (other / "tokenizer.json").write_bytes((trained / "model" / "tokenizer.json").read_bytes())
    config = json.loads((other / "config.json").read_text())
    for name, value in (("model_type", "llama"), ("hidden_size", 48), ("num_hidden_layers", 7)):
        (other / "config.json").write_text(json.dumps(config | {name: value}))
        for overrides in ((), own):
            text = refused(*overrides, checkpoints=[other])
            assert f"its {name} is {value}, and that of the recipe's model {config[name]}" in text
    # another base
    (other / "config.json").write_text(json.dumps({"vocab_size": 7}))
    assert "it knows 7 tokens" in refused(checkpoints=[other])
    # an adapter without its base
    (other / "config.json").unlink()
    (other / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    assert "its base model is missing" in refused(checkpoints=[other])
    text = refused(f"model={{name: {trained / 'initial'}}}", "warmup=null", checkpoints=[other])
    assert "an adapter of another base: of somebody/else" in text
    # prompts that do not fit
    limit = json.loads((trained / "model" / "config.json").read_text())["max_position_embeddings"]
    text = refused(f"agent.max_memory_tokens={limit}")
    assert "a turn that reads does not fit the model" in text
    assert f"of {limit} positions" in text
    text = refused(f"agent.max_answer_tokens={limit}")
    assert "recipe: an answer does not fit the model" in text
    # suites, judge, endpoint
    text = refused(suites=["locomo", "nothing"])
    assert "--suite: 2 errors" in text
    assert "CC BY-NC 4.0" in text
    assert "the recipe names no judge" in refused(judge=True)
    assert "an endpoint needs both" in refused(endpoint="http://localhost:9/v1")
    assert "check the address and that it runs" in refused(endpoint="http://localhost:9/v1", model="m")


@pytest.mark.parametrize("name", ["compose", "memory_r1", "rmm_grpo"])
def test_prompts_of_bank_agents_are_checked(name: str) -> None:
    """By a tokenizer with a token for each word, so that everything can be counted by hand."""
    words = [f"w{n}" for n in range(50)]
    tokenizer = tiny_tokenizer(words)
    agent = build_agent(name, {"max_extract_tokens": 10, "max_update_tokens": 20, "max_answer_tokens": 30})
    task = Task("t", ("w1 w2", " ".join(words)), (Probe("w1 w2 w3", ("w4",)), Probe("w1", ("w4",))))
    suite: Any = SimpleNamespace(name="own", tasks=[task])
    prompts = {prompt.what: prompt for prompt in agent.longest(task, task.stream)}
    read = len(prompt_of(tokenizer, prompts["a turn that reads"].messages, "extract", {}))
    assert " ".join(words) in prompts["a turn that reads"].messages[0]["content"]
    assert "w1 w2 w3" in prompts["an answer"].messages[0]["content"]
    assert {"a turn that reads", "an update", "an answer"} <= set(prompts)
    assert ("a reranking" in prompts) == (name == "rmm_grpo")
    # each turn with nothing written before fits, and all entries together do not: it is said and goes on
    sure = max(len(prompt_of(tokenizer, p.messages, p.module, {})) + p.reply for p in prompts.values())
    notes = check_context(agent, [suite], tokenizer, sure, 0.25)
    assert any("own: an answer may come to be too long for the model" in note for note in notes)
    assert check_context(agent, [suite], tokenizer, 10**6, 0.25) == []
    with pytest.raises(EngineError, match="own: a turn that reads does not fit the model"):
        check_context(agent, [suite], tokenizer, read + 9, 0.25)


def test_a_folder_is_one_evaluations(trained: Path, tmp_path: Path) -> None:
    from memfactory.evaluate.folder import EvalFolder

    with EvalFolder(tmp_path / "out").held(), pytest.raises(RecipeError, match="another process is evaluating in it"):
        evaluated(trained, tmp_path / "out")
    (tmp_path / "out" / "episodes.jsonl").write_text('{"schema": 1, "failed": ""}\n')
    with pytest.raises(DataError, match=r"episodes.jsonl line 1: not an episode"):
        evaluated(trained, tmp_path / "out")
    (tmp_path / "out" / "episodes.jsonl").write_text('{"schema": 99, "key": "x"}\n')
    with pytest.raises(DataError, match="upgrade memfactory"):
        evaluated(trained, tmp_path / "out")


def test_fingerprints_are_of_weights(trained: Path, tmp_path: Path) -> None:
    model, last = trained / "model", trained / "checkpoints" / "checkpoint-2"
    assert weights_fingerprint(model) == weights_fingerprint(last)
    assert weights_fingerprint(model) != weights_fingerprint(trained / "initial")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert weights_fingerprint(copy) == weights_fingerprint(model)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights_fingerprint(copy) != weights_fingerprint(model)
    recipe = load_recipe(trained / "recipe.yaml")
    names = [one.name for one in find_candidates(recipe, [model, trained, copy])]
    assert names == ["base", "short", "short (2)", "copy"]
    weights.with_name("seal.json").write_text(json.dumps({"complete": True, "files": {"gone.bin": 3}}))
    with pytest.raises(EngineError, match=r"gone\.bin is missing"):
        find_candidates(recipe, [copy])
