"""Credit by provenance: turns that write answer for what was made of their entries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfactory.episode import Answer, Episode, Probe, Retrieved, StopReason, Task, Turn
from memfactory.recipe import CreditSection
from memfactory.reward.batch import links_of
from memfactory.reward.catalogue import WeightedDimension, load_dimension
from memfactory.reward.system import RewardSystem

PROBES = (Probe("where ?", ("paris",)), Probe("who ?", ("leo",)))


def turn(module: str, shown: tuple[tuple[str, int | None], ...] = (), cited: tuple[str, ...] = ()) -> Turn:
    made = Turn(module, [1], [2], [-1.0], "", StopReason.STOP)
    made.retrieved = [Retrieved(id, id, writer) for id, writer in shown]
    made.cited = list(cited)
    return made


def episode(
    answers: tuple[str, str], shown: tuple[tuple[tuple[str, int | None], ...], ...], cited: tuple[str, ...] = ()
) -> Episode:
    """Three turns that write, then one answer for each question, shown entries by (id, turn that wrote it)."""
    turns = [turn("update"), turn("update"), turn("update")]
    turns += [turn("answer", own, cited) for own in shown]
    given = [Answer(probe, text, text, 3 + n) for n, (probe, text) in enumerate(zip(PROBES, answers, strict=True))]
    return Episode(Task("t", ("a", "b", "c"), PROBES), turns, given, group="t")


def assessed(episodes: list[Episode], **credit: object) -> list[list[float]]:
    """Advantages of the turns, by episode."""
    rewards = [WeightedDimension(name, load_dimension(name)) for name in ("answer.exact_match", "answer.own_match")]
    section = CreditSection.model_validate({"advantage": "centered", "attribute": "shown", **credit})
    system = RewardSystem(rewards, credit=section)
    system.begin().finish(episodes)
    system.assess(episodes)
    return [[one.advantage for one in e.turns] for e in episodes]


def test_a_hand_worked_group():
    """Two episodes, alpha 0. Both answer `where` right; only the first answers `who` right.

    Answers' own advantages: (0, +.5) and (0, -.5). `who` was shown e1 (turn 0) and e3 (turn 2) in the first, two
    entries of turn 1 in the second, and in both one entry from before, which is nobody's.
    """
    shown = ((("e2", 1),), (("e1", 0), ("e3", 2), ("e9", None)))
    other = ((("e2", 1),), (("e4", 1), ("e5", 1), ("e9", None)))
    right, wrong = episode(("Paris", "Leo"), shown), episode(("paris", "mia"), other)
    first, second = assessed([right, wrong], outcome_share=0.0)
    assert first == pytest.approx([0.25, 0.0, 0.25, 0.0, 0.5])
    assert second == pytest.approx([0.0, -0.5, 0.0, 0.0, -0.5])
    # with the outcome (A = +-.25, the mean of two questions) mixed in at one half
    first, second = assessed([right, wrong], outcome_share=0.5)
    assert first == pytest.approx([0.25, 0.125, 0.25, 0.125, 0.375])
    assert second == pytest.approx([-0.125, -0.375, -0.125, -0.125, -0.375])


def test_cited_entries_take_all_where_there_are_any():
    shown = ((("e2", 1),), (("e1", 0), ("e3", 2)))
    assert links_of(episode(("a", "b"), shown, cited=("e3", "e7")), "cited") == [(3, 1, 1.0), (4, 2, 1.0)]
    assert links_of(episode(("a", "b"), shown), "cited") == [(3, 1, 1.0), (4, 0, 0.5), (4, 2, 0.5)]


def test_without_attribution_every_turn_gets_the_outcome():
    shown = ((("e2", 1),), (("e1", 0),))
    right, wrong = episode(("paris", "leo"), shown), episode(("rome", "mia"), shown)
    first, second = assessed([right, wrong], attribute="none", outcome_share=1.0)
    assert first == pytest.approx([0.5] * 5)
    assert second == pytest.approx([-0.5] * 5)


writers = st.lists(st.tuples(st.sampled_from(["e1", "e2", "e3"]), st.sampled_from([None, 0, 1, 2])), max_size=4)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), writers, writers), min_size=2, max_size=6))
def test_what_is_dealt_out_is_what_the_answers_earned(drawn):
    """Conservation: the writers of an episode get together what those answers earned that were shown their entries."""
    group = [
        episode(("paris" if a else "rome", "leo" if b else "mia"), (tuple(first), tuple(second)))
        for a, b, first, second in drawn
    ]
    for own, e in zip(assessed(group, outcome_share=0.0), group, strict=True):
        earned = sum(
            own[place] for place in (3, 4) if any(entry.turn is not None for entry in e.turns[place].retrieved)
        )
        assert sum(own[:3]) == pytest.approx(earned, abs=1e-9)
        assert np.isfinite(own).all()
