"""The synthetic tasks: the answer follows from the document, splits share nothing, any process agrees."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfactory.environments import Split, check_disjoint
from memfactory.environments.ruler import RulerTask, RulerTasks
from memfactory.errors import RecipeError

NEEDLES = [task for task in RulerTask if not task.endswith("words")]
WORDS = [RulerTask.COMMON_WORDS, RulerTask.FREQUENT_WORDS]

options = st.fixed_dictionaries(
    {
        "length": st.integers(200, 1500),
        "seed": st.integers(0, 2**32),
        "words_per_chunk": st.none() | st.integers(20, 400),
    }
)
splits = st.sampled_from(list(Split))
quick = settings(max_examples=25, deadline=None)


def one(task, split=Split.TRAIN, **kwargs):
    return RulerTasks(task=task, **kwargs).tasks(split, 1)[0]


def required(task):
    return task.metadata.get("required") or list(task.probes[0].answers)


@quick
@given(st.sampled_from(list(RulerTask)), options, splits)
def test_length_and_chunks(kind, options, split):
    task = one(kind, split, **options)
    sizes = [len(chunk.split()) for chunk in task.stream]
    assert options["length"] - 17 <= sum(sizes) <= options["length"]
    if options["words_per_chunk"] is None:
        assert len(sizes) == 1
    else:
        assert max(sizes) <= options["words_per_chunk"]
    # cutting changes nothing but the cuts
    whole = one(kind, split, **{**options, "words_per_chunk": None})
    assert " ".join(task.stream) == whole.stream[0]
    assert task.probes[0].answers == whole.probes[0].answers


@quick
@given(st.sampled_from(NEEDLES), options, splits)
def test_evidence_stands_in_its_chunk_and_nowhere_else(kind, options, split):
    task = one(kind, split, **options)
    evidence = task.probes[0].evidence
    assert len(evidence) == (len(required(task)))
    for item in evidence:
        assert item.text in task.stream[item.chunk]
        assert " ".join(task.stream).count(item.text) == 1


@quick
@given(st.sampled_from(NEEDLES[:3]), options, splits, st.integers(1, 6))
def test_needles_read_back(kind, options, split, needles):
    task = one(kind, split, needles=1 if kind == RulerTask.NIAH_SINGLE else needles, **options)
    probe = task.probes[0]
    codes = re.findall(r"The access code of the (\w+ \w+) is (\d{7})\.", " ".join(task.stream))
    key = re.search(r"of the (\w+ \w+)\?", probe.question)[1]
    assert [value for name, value in codes if name == key] == required(task)
    assert len({value for _, value in codes}) == len(codes)
    if kind == RulerTask.NIAH_MULTIKEY:
        assert len({name for name, _ in codes}) == needles
    if kind == RulerTask.NIAH_MULTIVALUE:
        assert len(codes) == needles
        assert probe.answers == (", ".join(required(task)),)
    assert task.metadata["match"] == ("any" if len(required(task)) == 1 else "all")


def test_many_keys_are_all_different():
    task = one(RulerTask.NIAH_MULTIKEY, needles=900, length=9000)
    codes = re.findall(r"The access code of the (\w+ \w+) is (\d{7})\.", task.stream[0])
    assert len({key for key, _ in codes}) == len({value for _, value in codes}) == 900


@quick
@given(options, splits, st.integers(1, 8))
def test_variables_by_running_the_program(options, split, needles):
    task = one(RulerTask.VARIABLE_TRACKING, split, needles=needles, **options)
    memory = {}
    for name, value, source in re.findall(r"Set variable (\w+) to (?:(\d+)|variable (\w+))\.", " ".join(task.stream)):
        assert name not in memory
        memory[name] = value or memory[source]  # a variable is set before it is read
    asked = re.search(r"the value (\d+)", task.probes[0].question)[1]
    assert [name for name, value in memory.items() if value == asked] == required(task)
    assert len(memory) == 2 * needles
    assert len(set(memory.values())) == 2


@quick
@given(st.sampled_from(WORDS), options, splits, st.integers(1, 8))
def test_asked_words_are_strictly_the_most_frequent(kind, options, split, needles):
    options = {**options, "length": max(options["length"], 300)}
    task = one(kind, split, needles=needles, **options)
    counts = Counter(" ".join(task.stream).split())
    asked = required(task)
    assert len(asked) == len(set(asked)) == needles
    least = min(counts.pop(word) for word in asked)
    assert least > max(counts.values())
    assert task.probes[0].evidence == ()


@pytest.mark.parametrize("kind", list(RulerTask))
@pytest.mark.parametrize("length", ["least", 100_000])
def test_shortest_and_long(kind, length):
    if length == "least":
        with pytest.raises(RecipeError, match="too few") as caught:
            RulerTasks(task=kind, length=1)
        length = int(re.search(r"needs (\d+)", str(caught.value))[1])
        assert length <= 100
    task = one(kind, length=length)
    assert length - 17 <= len(task.stream[0].split()) <= length
    assert required(task)
    if kind in WORDS:
        counts = Counter(task.stream[0].split())
        asked = [counts.pop(word) for word in required(task)]
        assert min(asked) > max(counts.values())


@pytest.mark.parametrize("kind", list(RulerTask))
def test_splits_share_nothing(kind):
    environment = RulerTasks(task=kind, length=200)
    train, test = environment.tasks(Split.TRAIN, 60), environment.tasks(Split.TEST, 60)
    check_disjoint(train, test)
    assert len({task.id for task in [*train, *test]}) == 120

    def asked(tasks):
        """Coined words, or names and numbers, of all documents."""
        text = " ".join(" ".join(task.stream) for task in tasks)
        return set(text.split() if kind in WORDS else re.findall(r"\d{5,}|\b[A-Z]{5}\b|of the (\w+ \w+) is", text))

    words = asked(train) & asked(test)
    assert words <= {""}, words


def test_first_tasks_do_not_depend_on_the_count():
    environment = RulerTasks(task=RulerTask.NIAH_MULTIKEY, length=200)
    assert environment.tasks(Split.TRAIN, 5) == environment.tasks(Split.TRAIN, 9)[:5]
    assert len({task.stream for task in environment.tasks(Split.TRAIN, 9)}) == 9
    other = RulerTasks(task=RulerTask.NIAH_MULTIKEY, length=200, seed=1)
    assert not {t.stream for t in other.tasks(Split.TRAIN, 9)} & {t.stream for t in environment.tasks(Split.TRAIN, 9)}


def test_the_same_in_a_fresh_process():
    program = (
        "import hashlib\n"
        "from memfactory.environments import Split, build_environment\n"
        "from memfactory.environments.ruler import RulerTask\n"
        "tasks = [t for k in RulerTask for s in Split for t in\n"
        "         build_environment('ruler', {'task': k.value, 'length': 300, 'words_per_chunk': 50}).tasks(s, 3)]\n"
        "print(hashlib.sha256(repr(tasks).encode()).hexdigest())\n"
        "import sys; assert 'torch' not in sys.modules and 'datasets' not in sys.modules\n"
    )

    def run(hash_seed):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        return done.stdout

    assert run("1") == run("2")


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"needles": 0, "task": RulerTask.NIAH_MULTIKEY}, "0 needles"),
        ({"needles": 2}, "exactly 1"),
        ({"needles": 2000, "length": 10**6, "task": RulerTask.NIAH_MULTIKEY}, "too many"),
        ({"length": 10}, "too few"),
        ({"words_per_chunk": 5}, "too small"),
    ],
)
def test_options_that_cannot_be(kwargs, said):
    with pytest.raises(RecipeError, match=said) as caught:
        RulerTasks(**kwargs)
    assert caught.value.fix


def test_generates_without_end():
    with pytest.raises(RecipeError, match=r"environment\.train_tasks: missing"):
        RulerTasks().tasks(Split.TRAIN)
