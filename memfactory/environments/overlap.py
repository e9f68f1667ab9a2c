"""Train and test must not share tasks: the check."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from memfactory.episode import Task
from memfactory.errors import DataError

_MOST_SHOWN = 5


def shared(train: Iterable[Task], test: Iterable[Task]) -> list[str]:
    """Test tasks that are also training tasks, in words: same id, or same questions about the same document.

    How the document is cut into pieces and its white space do not matter.
    """
    ids: set[str] = set()
    contents: dict[str, str] = {}
    for task in train:
        ids.add(task.id)
        contents.setdefault(_content(task), task.id)
    found = []
    for task in test:
        twin = task.id if task.id in ids else contents.get(_content(task))
        if twin is not None:
            what = "the same id" if twin == task.id else f"the content of train task {twin}"
            source = task.metadata.get("source")
            found.append(f"{task.id}{f' ({source})' if source else ''} has {what}")
    return found


def asked_again(train: Iterable[Task], test: Iterable[Task]) -> int:
    """Test tasks with a question that is also asked in training, about whatever document.

    Only tasks of a dataset count, which say where they come from (``metadata["source"]``): a generator asks its few
    questions about every document.
    """
    asked = {question for task in train if task.metadata.get("source") for question in _questions(task)}
    return sum(bool(asked & _questions(task)) for task in test if task.metadata.get("source"))


def _questions(task: Task) -> set[str]:
    """Case and white space do not matter."""
    return {" ".join(probe.question.lower().split()) for probe in task.probes}


def check_disjoint(train: Iterable[Task], test: Iterable[Task]) -> None:
    """Check that no test task is also a training task, see :func:`shared`.

    Raises:
        DataError: some are; up to 5 are named.
    """
    both = shared(train, test)
    if both:
        more = f"\n  - and {len(both) - _MOST_SHOWN} more" if len(both) > _MOST_SHOWN else ""
        raise DataError(
            f"train and test share {len(both)} of the test tasks",
            "".join(f"\n  - {line}" for line in both[:_MOST_SHOWN]) + more,
            "remove them from one of the two splits",
        )


def _content(task: Task) -> str:
    questions = "\n".join(probe.question for probe in task.probes)
    return hashlib.sha256(f"{questions}\0{' '.join(' '.join(task.stream).split())}".encode()).hexdigest()
