"""Names in a recipe: shipped environments, registries, classes of one's own, and every mistake."""

import subprocess
import sys

import pytest
import yaml

from memfactory.environments import Split, build_environment, check_disjoint
from memfactory.environments.files import LongContextFiles
from memfactory.environments.registry import ENVIRONMENTS, datasets, read_registry
from memfactory.environments.rows import Match
from memfactory.environments.ruler import RulerTask, RulerTasks
from memfactory.errors import RecipeError, RecipeErrors
from memfactory.plugins import shipped

OWN = """
from memfactory import Probe, Task

class Mine:
    def __init__(self, size: int, tag: str = "a"):
        self.size, self.tag = size, tag

    def tasks(self, split, count=None):
        return [Task(f"{split}-{n}", ("text",), (Probe("q", ("a",)),)) for n in range(self.size)]

class Nothing:
    pass

number = 3
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A user's folder with a registry and a class of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "mine.py").write_text(OWN)
    return tmp_path


def write_registry(folder, **entries):
    (folder / "data" / "registry.yaml").write_text(yaml.safe_dump(entries))


@pytest.mark.parametrize("name", ["fact_words", "people_codes", "fact-words", "people-codes", "samples"])
def test_shipped_environments_give_disjoint_tasks(name):
    environment = build_environment(name, {})
    train, test = environment.tasks(Split.TRAIN, 3), environment.tasks(Split.TEST, 3)
    assert len(train) == len(test) == 3
    check_disjoint(train, test)


def test_options_become_the_declared_types():
    environment = build_environment("ruler", {"task": "variable_tracking", "length": 300, "needles": 2})
    assert environment == RulerTasks(task=RulerTask.VARIABLE_TRACKING, length=300, needles=2)
    files = build_environment("files", {"train": ["a.json"], "outputs_match": "any"})
    assert files == LongContextFiles(train=["a.json"], outputs_match=Match.ANY)


def test_recipe_options_go_over_the_registry():
    environment = build_environment("ruler-variable-tracking", {"length": 500})
    assert environment == RulerTasks(task=RulerTask.VARIABLE_TRACKING, length=500)


def test_every_shipped_dataset_builds_and_has_a_card():
    found = datasets()
    assert {"samples", "hotpotqa-memfactory-train", "memagent-hotpotqa", "ruler-common-words"} <= set(found)
    cards = set()
    for name, dataset in found.items():
        build_environment(name, {})
        card = shipped("data") / dataset.card
        assert card.is_file(), f"{name}: no card {card}"
        cards.add(card)
        text = card.read_text(encoding="utf-8")
        for heading in ("What", "Size", "Licence", "Source", "Columns", "Splits", "How to get it", "Known problems"):
            assert f"**{heading}.**" in text, f"{card}: no '{heading}'"
        assert name in text, f"{card} does not name {name}"
    assert cards == set((shipped("data") / "cards").glob("*.md"))


def test_own_registry_goes_first(elsewhere):
    (elsewhere / "data" / "rows.json").write_text('[{"context": "a", "input": "q", "answers": "x"}]')
    entry = {"environment": "files", "options": {"train": "{data}/rows.json"}, "card": "c.md", "summary": "s"}
    write_registry(elsewhere, samples=entry, mine=entry)
    assert len(build_environment("mine", {}).tasks(Split.TRAIN)) == 1
    assert len(build_environment("samples", {}).tasks(Split.TRAIN)) == 1
    assert build_environment("ruler-niah-single", {})  # the shipped registry stays in reach


def test_registry_may_name_a_class(elsewhere):
    write_registry(
        elsewhere, mine={"environment": "mine.py:Mine", "options": {"size": 2}, "card": "c", "summary": "s"}
    )
    assert len(build_environment("mine", {}).tasks(Split.TRAIN)) == 2
    assert len(build_environment("mine", {"size": 5}).tasks(Split.TRAIN)) == 5


def test_class_of_ones_own(elsewhere):
    assert build_environment("mine.py:Mine", {"size": "4"}).size == 4
    assert build_environment("memfactory.environments.ruler:RulerTasks", {"length": 50}).length == 50
    with pytest.raises(RecipeErrors, match=r"environment.size: missing"):
        build_environment("mine.py:Mine", {})
    with pytest.raises(RecipeError, match="no method `tasks`"):
        build_environment("mine.py:Nothing", {})
    with pytest.raises(RecipeError, match="not a class"):
        build_environment("mine.py:number", {})
    with pytest.raises(RecipeError, match="did you mean 'Mine'"):
        build_environment("mine.py:Mime", {})


@pytest.mark.parametrize(("name", "meant"), [("rulers", "ruler"), ("fact_word", "fact_words"), ("samplse", "samples")])
def test_unknown_name(name, meant):
    with pytest.raises(RecipeError, match=f"no '{name}'") as caught:
        build_environment(name, {})
    assert f"did you mean '{meant}'?" in str(caught.value)


def test_all_wrong_options_together():
    with pytest.raises(RecipeErrors) as caught:
        build_environment("ruler", {"lenght": 5, "seed": "many", "task": "niah"})
    text = str(caught.value)
    assert "3 errors" in text
    assert "environment.lenght: unknown option\n  fix: did you mean 'length'?" in text
    assert "environment.seed: " in text
    assert "got 'many'" in text
    assert "'niah_single'" in text


def test_union_option_of_the_wrong_type():
    with pytest.raises(RecipeErrors, match=r"environment.train: .*string or .*list.*got 3"):
        build_environment("files", {"train": 3})


def test_environment_that_refuses_its_options():
    with pytest.raises(RecipeError, match="too few"):
        build_environment("ruler", {"length": 3})


def test_wrong_registry_lists_every_entry(elsewhere):
    write_registry(elsewhere, a={"environment": "files", "summary": "s"}, b={"enviroment": "files"}, c="text")
    with pytest.raises(RecipeErrors) as caught:
        read_registry(elsewhere / "data" / "registry.yaml")
    text = str(caught.value)
    assert "a.card: field required" in text
    assert "did you mean 'environment'" in text
    assert "- c: " in text


def test_nothing_heavy_is_imported():
    program = (
        "import sys\n"
        "from memfactory.environments import build_environment\n"
        f"for name in {sorted(set(ENVIRONMENTS) - {'files', 'hub'})}: build_environment(name, {{}})\n"
        "build_environment('files', {'train': 'x.json'}), build_environment('hub', {'path': 'x'})\n"
        "print([m for m in ('torch', 'datasets', 'transformers', 'pyarrow', 'huggingface_hub') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
