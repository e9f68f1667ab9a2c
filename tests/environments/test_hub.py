"""The hub environment over local folders and files; no network."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memfactory.environments import Split
from memfactory.environments.hub import HubDataset
from memfactory.environments.rows import Match
from memfactory.errors import DataError, RecipeError

datasets = pytest.importorskip("datasets")

COLUMNS = {"context": "passage", "question": "meta.question", "answers": "meta.gold.text"}
ROWS = [
    {"passage": f"Fact {n}.", "meta": {"question": f"Which fact {n}?", "gold": {"text": [str(n), f"no. {n}"]}}, "n": n}
    for n in range(4)
]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS[:3]), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[3:]), folder / "test.parquet")
    return folder


def test_folder_of_parquet_with_dotted_columns(folder):
    environment = HubDataset(str(folder), columns=COLUMNS)
    train, test = environment.tasks(Split.TRAIN), environment.tasks(Split.TEST)
    assert [task.stream for task in train] == [("Fact 0.",), ("Fact 1.",), ("Fact 2.",)]
    assert train[1].probes[0].question == "Which fact 1?"
    assert train[1].probes[0].answers == ("1", "no. 1")
    assert train[1].metadata["columns"] == {"n": 1}
    assert [task.probes[0].answers[0] for task in test] == ["3"]
    assert environment.tasks(Split.TRAIN, 2) == train[:2]
    assert len(environment.tasks(Split.TRAIN, 50)) == 3


def test_one_json_lines_file_sliced(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    environment = HubDataset(str(path), columns=COLUMNS, train_split="train[:75%]", test_split="train[75%:]")
    assert len(environment.tasks(Split.TRAIN)) == 3
    assert environment.tasks(Split.TEST)[0].stream == ("Fact 3.",)


def test_split_made_of_files(folder):
    environment = HubDataset(str(folder), columns=COLUMNS, train_files="test.parquet", test_files=["train.parquet"])
    assert len(environment.tasks(Split.TRAIN)) == 1
    assert len(environment.tasks(Split.TEST)) == 3


def test_saved_to_disk(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(str(tmp_path / "both"))
    assert len(HubDataset(str(tmp_path / "both"), columns=COLUMNS).tasks(Split.TEST)) == 1
    rows.save_to_disk(str(tmp_path / "one"))
    one = HubDataset(str(tmp_path / "one"), columns=COLUMNS)
    assert len(one.tasks(Split.TRAIN)) == 4
    with pytest.raises(DataError, match="no split 'test'"):  # never the training rows again
        one.tasks(Split.TEST)


def test_sessions_and_list_items(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {
        "context": ["Monday.", "Tuesday."],
        "prompt": [{"content": "Which days?"}],
        "answers": ["Monday", "Tuesday"],
    }
    path.write_text(json.dumps(row))
    (task,) = HubDataset(str(path), columns={"question": "prompt.0.content"}, match=Match.ALL).tasks(Split.TRAIN)
    assert task.stream == ("Monday.", "Tuesday.")
    assert task.probes[0].question == "Which days?"
    assert task.metadata["required"] == ["Monday", "Tuesday"]


def test_missing_column_names_the_nearest(folder):
    with pytest.raises(DataError, match=r"no column 'meta\.qustion'") as caught:
        HubDataset(str(folder), columns={**COLUMNS, "question": "meta.qustion"}).tasks(Split.TRAIN)
    assert "environment.columns.question, e.g. to meta.question" in str(caught.value)
    with pytest.raises(DataError, match="no column 'context'") as caught:
        HubDataset(str(folder)).tasks(Split.TRAIN)
    assert "its columns are passage, meta.question, meta.gold.text, n" in str(caught.value)


def test_answers_that_are_a_struct(folder):
    with pytest.raises(DataError, match="3 of 3 rows") as caught:
        HubDataset(str(folder), columns={**COLUMNS, "answers": "meta.gold"}).tasks(Split.TRAIN)
    assert "row 2: the answers are a mapping with keys text" in str(caught.value)


def test_bad_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"context": "a", "input": "q", "answers": ["x"]}, {"context": "a", "input": None, "answers": ["x"]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"\(train\) row 2: no question"):
        HubDataset(str(path)).tasks(Split.TRAIN)


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(DataError, match="cannot be loaded"):
        HubDataset(str(folder), columns=COLUMNS, train_split="validation").tasks(Split.TRAIN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        HubDataset(str(tmp_path / "empty")).tasks(Split.TRAIN)
    with pytest.raises(RecipeError, match="train_split"):
        HubDataset(str(folder), train_split=None).tasks(Split.TRAIN)


def test_unknown_key_of_columns():
    with pytest.raises(RecipeError, match="did you mean 'question'"):
        HubDataset("x", columns={"qestion": "q"})
