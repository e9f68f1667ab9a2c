"""What a judge is worth, told by labelled examples."""

from __future__ import annotations

import asyncio
import json
import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import ChatServer, Reply, fields_of

from memfactory.errors import DataError
from memfactory.reward.judge import Example, Pair, Rubric, RuleJudge, calibrate, load_examples
from memfactory.reward.judge.calibrate import auc_with_ties

LABELS = {"yes": 1.0, "no": 0.0}


def report_of(scores: list[tuple[str, float | None]], labels=LABELS, pairs=(), compare_rule=None):
    """The report on a rule judge that gives these scores to examples with these labels."""
    given = {str(number): score for number, (_, score) in enumerate(scores)}
    rubric = Rubric("r", "1", "i", labels, lambda fields: given[fields["answer"]], compare_rule)
    examples = [Example({"answer": str(number)}, label) for number, (label, _) in enumerate(scores)]
    return asyncio.run(calibrate(RuleJudge(), rubric, [*examples, *pairs]))


def test_numbers_by_hand() -> None:
    # 4 yes (3 found), 2 no (1 found): the constant "yes" is as good
    report = report_of([("yes", 1), ("yes", 1), ("yes", 1), ("yes", 0), ("no", 0), ("no", 1), ("no", None)])
    assert (report.n, report.failed) == (7, 1)
    assert report.accuracy == pytest.approx(4 / 6)
    assert report.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert report.majority == pytest.approx(4 / 6)
    assert report.auc == pytest.approx((3 * 1 + 3 * 0.5 + 1 * 0.5 + 0) / 8)
    assert set(report.warnings) == {"no_better_than_constant", "failures"}
    assert [(one.example.label, one.verdict) for one in report.disagreements] == [("yes", "no"), ("no", "yes")]
    assert report.position_gap is None
    assert report.numbers()["accuracy"] == report.accuracy


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])), min_size=1))
def test_auc_is_the_win_rate_with_half_for_ties(rows: list[tuple[float, float]]) -> None:
    gold, scores = [row[0] for row in rows], [row[1] for row in rows]
    wins = [
        1.0 if better[1] > worse[1] else 0.5 if better[1] == worse[1] else 0.0
        for better, worse in product(rows, rows)
        if better[0] > worse[0]
    ]
    if wins:
        assert auc_with_ties(gold, scores) == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    else:
        assert auc_with_ties(gold, scores) is None


def test_one_class_says_nothing_and_the_report_says_so() -> None:
    report = report_of([("yes", 1.0)] * 10)
    assert report.accuracy == 1.0
    assert report.auc is None
    assert set(report.warnings) == {"single_class", "no_true_negatives", "no_better_than_constant"}


def test_a_judge_that_never_refuses_has_no_true_negatives() -> None:
    assert "no_true_negatives" in report_of([("yes", 1), ("yes", 1), ("no", 1)]).warnings
    assert not report_of([("yes", 1), ("yes", 1), ("no", 0)]).warnings


def test_a_score_between_labels_counts_as_the_nearest() -> None:
    report = report_of([("yes", 0.9), ("no", 0.4), ("yes", 0.3)], LABELS)
    assert report.accuracy == pytest.approx(2 / 3)
    assert report.auc == 0.5


def pairs(count: int) -> list[Pair]:
    """Half of them with the better text first; the better one is longer."""
    made = []
    for number in range(count):
        texts, label = ("longer" + "x" * number, "s"), "first"
        made.append(Pair(*(texts if number % 2 else texts[::-1]), label if number % 2 else "second"))
    return made


def test_a_judge_that_always_says_first() -> None:
    report = report_of([], pairs=pairs(10), compare_rule=lambda first, second, fields: 1)
    assert report.position_gap == 100.0
    assert report.flip_rate == 1.0
    assert report.pair_accuracy == 0.0
    assert "position_bias" in report.warnings
    wins = [(one.preference + 1) / 2 for one in report.compared]
    assert sum(wins) / len(wins) == 0.5, "in both orders it prefers nothing"
    second = report_of([], pairs=pairs(10), compare_rule=lambda first, second, fields: -1)
    assert second.position_gap == -100.0
    assert "second" in second.warnings["position_bias"]


def test_a_judge_without_position_bias() -> None:
    longer = lambda first, second, fields: (len(first) > len(second)) - (len(first) < len(second))  # noqa: E731
    report = report_of([], pairs=pairs(9), compare_rule=longer)
    assert (report.position_gap, report.flip_rate, report.pair_accuracy) == (0.0, 0.0, 1.0)
    assert not report.warnings
    assert not report.disagreements


def test_a_slight_bias_is_measured() -> None:
    """Right three times of four, else the first: 25 points."""
    draw = random.Random(0)
    biased = {text: draw.random() < 0.25 for text in (p.first + p.second for p in pairs(400))}
    biased |= {p.second + p.first: biased[p.first + p.second] for p in pairs(400)}

    def rule(first: str, second: str, fields: object) -> int:
        return 1 if biased[first + second] else (len(first) > len(second)) * 2 - 1

    share = sum(biased[p.first + p.second] for p in pairs(400)) / 400
    report = report_of([], pairs=pairs(400), compare_rule=rule)
    assert report.position_gap == pytest.approx(100 * share)
    assert report.flip_rate == pytest.approx(share)


def test_against_a_server(make_judge, server: ChatServer, rubric) -> None:
    """Grades and pairs through HTTP; one text makes the server fail."""

    def answer(request, number) -> Reply:
        fields = fields_of(request)
        if fields.get("answer") == "poison":
            return Reply(status=400)
        verdict = "first" if "first" in fields else "yes" if fields["answer"] == fields["gold"] else "no"
        return Reply(json.dumps({"reason": "compared", "verdict": verdict}))

    server.answer = answer
    examples = [
        Example({"answer": "a", "gold": "a"}, "yes", "f:1"),
        Example({"answer": "b", "gold": "a"}, "no", "f:2"),
        Example({"answer": "b", "gold": "c"}, "yes", "f:3"),
        Example({"answer": "poison", "gold": "c"}, "yes", "f:4"),
        Pair("x", "y", "first", {"gold": "x"}, "f:5"),
    ]
    report = asyncio.run(calibrate(make_judge(), rubric, examples))
    assert report.accuracy == pytest.approx(2 / 3)
    assert report.position_gap == 100.0
    text = str(report)
    assert "f:3: label yes, judge no (compared)" in text
    assert "f:4: no verdict" in text
    assert "accuracy           66.7%" in text
    assert "warning position_bias" in text


def test_examples_from_a_file(tmp_path) -> None:
    file = tmp_path / "labelled.jsonl"
    file.write_text(
        '{"fields": {"answer": "a\u2028b"}, "label": "yes"}\n\n'
        '{"first": "a", "second": "b", "label": "tie", "fields": {"gold": "a"}}\n',
        encoding="utf-8",
    )
    assert load_examples(file) == [
        Example({"answer": "a\u2028b"}, "yes", f"{file}:1"),
        Pair("a", "b", "tie", {"gold": "a"}, f"{file}:3"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"label": "yes"}',
        '{"fields": {"answer": 1}, "label": "yes"}',
        '{"fields": {"answer": "a"}}',
        '{"fields": {"answer": "a"}, "label": 1}',
        '{"fields": {"answer": "a"}, "label": "yes", "gold": "a"}',
        '{"first": "a", "second": "b", "label": "yes"}',
        '{"first": "a", "label": "first"}',
    ],
)
def test_a_wrong_line_is_named(line: str, tmp_path) -> None:
    file = tmp_path / "labelled.jsonl"
    file.write_text(f'{{"fields": {{"answer": "a"}}, "label": "yes"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"labelled\.jsonl:2") as caught:
        load_examples(file)
    assert caught.value.fix


def test_a_file_without_examples_or_with_a_foreign_label(tmp_path, make_judge, server, rubric) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_examples(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no examples"):
        load_examples(tmp_path / "empty.jsonl")
    examples = [Example({"answer": "a"}, "yes", "f:1"), Example({"answer": "a"}, "perhaps", "f:2")]
    with pytest.raises(DataError, match=r"f:2.*'perhaps'"):
        asyncio.run(calibrate(make_judge(), rubric, examples))
    assert not server.requests, "nothing was paid for"
