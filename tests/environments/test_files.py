"""The files environment: every form it reads, every way a file can be wrong."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memfactory.environments import Split, check_disjoint, files
from memfactory.environments.files import LongContextFiles
from memfactory.environments.rows import Match
from memfactory.errors import DataError, RecipeError
from memfactory.plugins import shipped

SAMPLES = shipped("data") / "samples"
GOOD = {"context": "The cat sat.", "input": "Who sat?", "answers": ["the cat", "cat"]}


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def load(path: str | list[str], count: int | None = None, **options):
    return LongContextFiles(train=path, **options).tasks(Split.TRAIN, count)


def test_memfactory_rows_keep_every_alias():
    tasks = load(str(SAMPLES / "memfactory.json"))
    assert len(tasks) == 4
    assert tasks[1].probes[0].answers == ("nineteen", "19")
    assert tasks[3].probes[0].answers == ("no",)
    assert tasks[0].probes[0].question.startswith("In which town")
    assert all(len(task.stream) == 1 for task in tasks)
    assert tasks[2].metadata["source"].endswith("memfactory.json row 3")
    assert tasks[2].metadata["columns"] == {"num_docs": 2}
    assert tasks[2].metadata["match"] == "any"
    assert "required" not in tasks[2].metadata


def test_outputs_are_parts_of_one_answer():
    task = load(str(SAMPLES / "outputs.json"))[0]
    assert task.probes[0].answers == ("velka, soru, tamin",)
    assert task.metadata["match"] == "all"
    assert task.metadata["required"] == ["velka", "soru", "tamin"]


def test_outputs_can_be_aliases():
    task = load(str(SAMPLES / "outputs.json"), outputs_match=Match.ANY)[0]
    assert task.probes[0].answers == ("velka", "soru", "tamin")
    assert task.metadata["match"] == "any"


def test_json_lines_also_under_the_name_json(tmp_path):
    rows = (SAMPLES / "memfactory.jsonl").read_text(encoding="utf-8")
    renamed = load(write(tmp_path / "rows.json", rows))
    original = load(str(SAMPLES / "memfactory.jsonl"))
    assert [task.id for task in renamed] == [task.id for task in original]
    assert original[2].probes[0].answers == ("two", "2")
    assert original[1].metadata["source"].endswith("memfactory.jsonl line 2")


def test_memagent_parquet():
    tasks = load(str(SAMPLES / "memagent.parquet"))
    assert [task.probes[0].answers for task in tasks] == [("Anders Roe", "Roe"), ("14 km",), ("oboe", "the oboe")]
    assert tasks[0].probes[0].question == "Who cast the clock of Velm?"
    assert tasks[0].stream == ("The clock of Velm was cast by Anders Roe.",)
    assert tasks[1].metadata["columns"] == {"data_source": "sample", "ability": "memory", "index": 1, "num_docs": 1}


@pytest.mark.parametrize(
    "prompt",
    [
        "Who sat?",
        [{"role": "user", "content": "Who sat?"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello."},
            {"role": "user", "content": "Who sat?"},
            {"role": "assistant", "content": "Hm."},
        ],
    ],
)
@pytest.mark.parametrize("extra", [None, {"index": 3, "question": ""}])
def test_memagent_question_from_the_prompt(tmp_path, prompt, extra):
    row = {"context": "The cat sat.", "prompt": prompt, "reward_model": {"ground_truth": "cat"}, "extra_info": extra}
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    (task,) = load(str(path))
    assert task.probes[0].question == "Who sat?"
    assert task.probes[0].answers == ("cat",)


def test_several_files_in_their_order_and_count():
    paths = [str(SAMPLES / "memfactory.json"), str(SAMPLES / "memagent.parquet")]
    everything = load(paths)
    assert len(everything) == 7
    assert load(paths, 5) == everything[:5]
    assert load(paths, 100) == everything


def test_rows_after_the_count_are_not_looked_at(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", json.dumps(GOOD) + "\nbroken\n" * 3)
    read = []
    monkeypatch.setattr(files.json, "loads", lambda text: read.append(text) or json.JSONDecoder().decode(text))
    assert len(load(path, 1)) == 1
    assert len(read) == 1
    with pytest.raises(DataError, match="line 2"):
        load(path, 2)


def test_ids_follow_the_content(tmp_path):
    other = {**GOOD, "context": "The dog sat."}
    first = load(write(tmp_path / "a.json", [GOOD, other, GOOD]))
    second = load(write(tmp_path / "b.jsonl", json.dumps({**GOOD, "answers": "x"})))
    assert first[0].id == second[0].id  # the same question on the same document, whatever file or answer
    assert first[2].id == f"{first[0].id}-2"
    assert len({task.id for task in first}) == 3


def test_overlap_of_train_and_test_shows(tmp_path):
    a = write(tmp_path / "a.json", [GOOD])
    b = write(tmp_path / "b.json", [{**GOOD, "input": "Did it sit?"}, {**GOOD, "context": "The  cat sat.\n"}])
    environment = LongContextFiles(train=a, test=b)
    with pytest.raises(DataError, match=r"share 1 of the test tasks") as caught:
        check_disjoint(environment.tasks(Split.TRAIN), environment.tasks(Split.TEST))
    assert "b.json row 2" in str(caught.value)


def test_check_disjoint_names_at_most_five(tmp_path):
    rows = [{**GOOD, "context": f"Cat {number} sat."} for number in range(8)]
    tasks = load(write(tmp_path / "a.json", rows))
    check_disjoint(tasks[:4], tasks[4:])
    with pytest.raises(DataError, match="share 8") as caught:
        check_disjoint(tasks, tasks)
    assert str(caught.value).count("\n  - ") == 6
    assert "and 3 more" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context": None}, "no context"),
        ({"context": "  "}, "no context"),
        ({"context": 7}, "no context"),
        ({"context": [0, 3]}, "document indices"),
        ({"input": ""}, "no question"),
        ({"input": 3}, "no question"),
        ({"answers": []}, "no answer"),
        ({"answers": ""}, "no answer"),
        ({"answers": ["cat", " "]}, "no answer"),
        ({"answers": None}, "no answer"),
        ({"answers": [True]}, "no answer"),
        ({"answers": {"text": ["cat"]}}, "mapping with keys text"),
    ],
)
def test_bad_values(tmp_path, change, said):
    path = write(tmp_path / "rows.json", [GOOD, {**GOOD, **change}])
    with pytest.raises(DataError, match=r"rows\.json row 2") as caught:
        load(path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("gone", "said"), [("context", "no context"), ("input", "no input"), ("answers", "no answers")]
)
def test_missing_columns(tmp_path, gone, said):
    row = {key: value for key, value in GOOD.items() if key != gone}
    with pytest.raises(DataError, match="line 1") as caught:
        load(write(tmp_path / "rows.jsonl", json.dumps(row)))
    assert said in str(caught.value)
    assert "fix:" in str(caught.value)


def test_all_bad_rows_together(tmp_path):
    lines = [json.dumps(GOOD), "{not json", json.dumps({**GOOD, "input": ""}), "[1, 2]"]
    with pytest.raises(DataError, match=r"3 of 4 rows") as caught:
        load(write(tmp_path / "rows.jsonl", "\n".join(lines)))
    for said in ("line 2: not valid JSON", "line 3: no question", "line 4: a list, not a row"):
        assert said in str(caught.value)


def test_only_the_first_twenty_bad_rows_are_listed(tmp_path):
    with pytest.raises(DataError, match="25 of 25 rows") as caught:
        load(write(tmp_path / "rows.json", [{**GOOD, "input": ""}] * 25))
    assert "row 20:" in str(caught.value)
    assert "row 21:" not in str(caught.value)
    assert "and 5 more" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.json", "[]", "no tasks"),
        ("rows.json", "", "no tasks"),
        ("rows.jsonl", "\n\n", "no tasks"),
        ("rows.json", '[{"context": "a"},\n {"context": }]', "rows.json line 2 column"),
        ("rows.json", '["text"]', "a str, not a row"),
        ("rows.json", '{\n "data": []}', "line 1: not valid JSON"),
        ("rows.csv", "context,input", "'.csv' are not known"),
        ("rows.parquet", "not parquet", "rows.parquet"),
    ],
)
def test_unusable_files(tmp_path, name, content, said):
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / name, content))
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_not_utf8(tmp_path):
    (tmp_path / "rows.json").write_bytes(b'[{"context": "\xff"}]')
    with pytest.raises(DataError, match="UTF-8"):
        load(str(tmp_path / "rows.json"))
    (tmp_path / "rows.jsonl").write_bytes(b'{"context": "\xff"}\n')
    with pytest.raises(DataError, match="line 1"):
        load(str(tmp_path / "rows.jsonl"))


def test_byte_order_mark_is_accepted(tmp_path):
    for name, text in (("rows.json", json.dumps([GOOD])), ("rows.jsonl", json.dumps(GOOD))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert len(load(str(tmp_path / name))) == 1


def test_no_such_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load(str(tmp_path / "gone.json"))
    with pytest.raises(DataError, match="no such file"):
        load([str(SAMPLES / "memfactory.json"), str(tmp_path / "gone.json")], 1)
    with pytest.raises(DataError, match="it is a folder"):
        load(str(tmp_path))


def test_split_without_a_file():
    with pytest.raises(RecipeError, match="neither"):
        LongContextFiles()
    with pytest.raises(RecipeError, match=r"environment.test: missing"):
        LongContextFiles(train="x.json").tasks(Split.TEST)


def test_hub_files_are_downloaded(monkeypatch):
    import huggingface_hub

    asked = []

    def fake(repo, file, *, repo_type, revision):
        asked.append((repo, file, repo_type, revision))
        return str(SAMPLES / "memfactory.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    assert len(load("hf://datasets/some/thing@v1/folder/rows.json")) == 4
    assert len(load("hf://datasets/some/thing/rows.json")) == 4
    assert asked == [
        ("some/thing", "folder/rows.json", "dataset", "v1"),
        ("some/thing", "rows.json", "dataset", None),
    ]


def test_hub_file_that_cannot_be_had(monkeypatch):
    import huggingface_hub

    def fake(*_args, **_options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    with pytest.raises(DataError, match="no network") as caught:
        load("hf://datasets/some/thing/rows.json")
    assert "local path" in str(caught.value)
    with pytest.raises(DataError, match="not of the form"):
        load("hf://datasets/some")


def test_samples_are_what_the_script_writes(tmp_path):
    from memfactory.plugins import load_file

    load_file(SAMPLES / "make_samples.py").main(tmp_path)
    for name in ("memfactory.json", "memfactory.jsonl", "outputs.json"):
        assert (tmp_path / name).read_bytes() == (SAMPLES / name).read_bytes()
    assert pq.read_table(tmp_path / "memagent.parquet").equals(pq.read_table(SAMPLES / "memagent.parquet"))
