"""How far a judge can be believed: its verdicts against labelled examples.

Accuracy alone flatters: where nine of ten labels are "yes", a judge that always says yes scores 90 %. So the
report puts the best constant beside it, and says where the examples cannot tell a judge from a constant.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from memfactory.errors import DataError, JudgeError, RecipeError
from memfactory.reward.judge.base import PREFERENCES, Judge, Rubric
from memfactory.reward.judge.examples import Example, Pair
from memfactory.reward.judge.pairwise import both_orders, flipped, preference_of

POSITION_GAP = 20.0
"""Points of position bias from which the report warns. Zero-shot judges show 28 to 35, guided ones 9 to 10
(arXiv 2605.08354)."""


@dataclass(frozen=True, slots=True)
class Graded:
    """An example with the judge's score."""

    example: Example
    score: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Compared:
    """A pair with what the judge preferred in both orders: 1 the text shown first, -1 the one shown second."""

    pair: Pair
    forward: int
    backward: int

    @property
    def preference(self) -> int:
        return preference_of(self.forward, self.backward)

    @property
    def flipped(self) -> bool:
        return flipped(self.forward, self.backward)


@dataclass(frozen=True, slots=True)
class Failed:
    """An example or pair without a verdict, and why. It is in no number of the report but the count."""

    example: Example | Pair
    why: str


@dataclass(frozen=True, slots=True)
class Disagreement:
    """An example or pair on which judge and label differ."""

    example: Example | Pair
    verdict: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """A judge's verdicts on labelled examples. A number that cannot be had from them is None."""

    rubric: Rubric
    graded: tuple[Graded, ...] = ()
    compared: tuple[Compared, ...] = ()
    failures: tuple[Failed, ...] = ()

    @property
    def n(self) -> int:
        """Examples and pairs asked about."""
        return len(self.graded) + len(self.compared) + len(self.failures)

    @property
    def failed(self) -> int:
        return len(self.failures)

    @property
    def accuracy(self) -> float | None:
        """Share of examples whose label is worth as much as the judge's."""
        return _mean([value == truth for truth, value in self._outcomes()])

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean recall over the labels that occur: 1 / labels for any constant."""
        outcomes = self._outcomes()
        hits = Counter(truth for truth, value in outcomes if truth == value)
        return _mean([hits[truth] / count for truth, count in Counter(truth for truth, _ in outcomes).items()])

    @property
    def majority(self) -> float | None:
        """Accuracy of always giving the most frequent label."""
        counts = Counter(truth for truth, _ in self._outcomes())
        return max(counts.values()) / counts.total() if counts else None

    @property
    def auc(self) -> float | None:
        """See :func:`auc_with_ties`."""
        return auc_with_ties([truth for truth, _ in self._outcomes()], [one.score for one in self.graded])

    @property
    def pair_accuracy(self) -> float | None:
        """Share of pairs, compared in both orders, that came out as labelled."""
        return _mean([one.preference == PREFERENCES[one.pair.label] for one in self.compared])

    @property
    def position_gap(self) -> float | None:
        """Percentage points by which the text shown first wins more often than the one shown second.

        Every pair is shown in both orders, so a judge without bias has 0, and one that always says "first" 100.
        """
        mean = _mean([one.forward + one.backward for one in self.compared])
        return None if mean is None else 50 * mean

    @property
    def flip_rate(self) -> float | None:
        """Share of pairs on which the same place won in both orders."""
        return _mean([one.flipped for one in self.compared])

    @property
    def disagreements(self) -> list[Disagreement]:
        found = [
            Disagreement(one.example, nearest_label(self.rubric, one.score), one.reason)
            for one, (truth, value) in zip(self.graded, self._outcomes(), strict=True)
            if truth != value
        ]
        names = {number: name for name, number in PREFERENCES.items()}
        return found + [
            Disagreement(
                one.pair, names[one.preference], "contradicts itself in the other order" if one.flipped else ""
            )
            for one in self.compared
            if one.preference != PREFERENCES[one.pair.label]
        ]

    @property
    def warnings(self) -> dict[str, str]:
        """Why the numbers may mislead, by code.

        ``single_class``: only one label occurs. ``no_true_negatives``: the lowest label was never rightly given,
        so nobody has seen this judge refuse anything. ``no_better_than_constant``, ``position_bias``, ``failures``.
        """
        outcomes, accuracy, majority, gap = self._outcomes(), self.accuracy, self.majority, self.position_gap
        found = {}
        if outcomes and len({truth for truth, _ in outcomes}) == 1:
            found["single_class"] = (
                f"all {len(outcomes)} labels mean the same: any constant could be right; AUC is undefined"
            )
        if outcomes and not any(truth == value == self.rubric.low for truth, value in outcomes):
            found["no_true_negatives"] = "the lowest label was never rightly given: add examples that deserve it"
        if accuracy is not None and majority is not None and accuracy <= majority:
            found["no_better_than_constant"] = f"accuracy {accuracy:.1%}, the most frequent label alone {majority:.1%}"
        if gap is not None and abs(gap) >= POSITION_GAP:
            found["position_bias"] = (
                f"shown {'first' if gap > 0 else 'second'}, a text wins {abs(gap):.0f} points more often"
            )
        if self.failures:
            found["failures"] = f"{self.failed} of {self.n} without a verdict: they are in none of these numbers"
        return found

    def numbers(self) -> dict[str, float | None]:
        """Every number by name, e.g. to write as JSON."""
        names = "n failed accuracy balanced_accuracy majority auc pair_accuracy position_gap flip_rate"
        return {name: getattr(self, name) for name in names.split()}

    def table(self) -> str:
        """The report as text, for a terminal: numbers, warnings, then every disagreement and failure."""
        rows = [("asked", f"{self.n}"), ("failed", f"{self.failed}")]
        if self.graded:
            rows += [
                ("graded", f"{len(self.graded)}"),
                ("accuracy", _percent(self.accuracy)),
                ("best constant", _percent(self.majority)),
                ("balanced accuracy", _percent(self.balanced_accuracy)),
                ("AUC, ties half", "-" if self.auc is None else f"{self.auc:.3f}"),
            ]
        if self.compared:
            rows += [
                ("compared", f"{len(self.compared)}"),
                ("pair accuracy", _percent(self.pair_accuracy)),
                ("position bias", f"{self.position_gap:+.1f} points for the text shown first"),
                ("flips", _percent(self.flip_rate)),
            ]
        lines = [f"rubric '{self.rubric.name}', version {self.rubric.version}"]
        lines += [f"  {name:<18} {value}" for name, value in rows]
        lines += [f"  warning {code}: {text}" for code, text in self.warnings.items()]
        for one in self.disagreements:
            reason = f" ({one.reason})" if one.reason else ""
            lines.append(f"  {one.example.where or 'example'}: label {one.example.label}, judge {one.verdict}{reason}")
        lines += [f"  {one.example.where or 'example'}: no verdict: {one.why}" for one in self.failures]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def _outcomes(self) -> list[tuple[float, float]]:
        """Value of the true label and of the judge's, for each graded example."""
        labels = self.rubric.labels
        return [(labels[one.example.label], labels[nearest_label(self.rubric, one.score)]) for one in self.graded]


async def calibrate(judge: Judge, rubric: Rubric, examples: Sequence[Example | Pair]) -> CalibrationReport:
    """Ask `judge` about every example and pair, all at once within its own limits.

    Failures of the judge are counted, not raised.

    Raises:
        DataError: a label is none of the rubric's (place named). Nothing has been asked then.
        RewardError: a rule of the rubric raised.
    """
    for one in examples:
        allowed = PREFERENCES if isinstance(one, Pair) else rubric.labels
        if one.label not in allowed:
            why = f"label {one.label!r} is none of rubric '{rubric.name}'"
            raise DataError(one.where or "example", why, f"one of: {', '.join(allowed)}")
    results = await asyncio.gather(*(_ask(judge, rubric, one) for one in examples))
    return CalibrationReport(
        rubric,
        tuple(one for one in results if isinstance(one, Graded)),
        tuple(one for one in results if isinstance(one, Compared)),
        tuple(one for one in results if isinstance(one, Failed)),
    )


async def _ask(judge: Judge, rubric: Rubric, example: Example | Pair) -> Graded | Compared | Failed:
    try:
        if isinstance(example, Pair):
            orders = await both_orders(judge, rubric, example.first, example.second, dict(example.fields))
            return Compared(example, *orders)
        score = await judge.grade(rubric, **example.fields)
    except JudgeError as error:
        return Failed(example, str(error))
    return Failed(example, score.reason) if score.value is None else Graded(example, score.value, score.reason)


def nearest_label(rubric: Rubric, score: float) -> str:
    """The label whose score is nearest: a rule may give a number between labels."""
    return min(rubric.labels, key=lambda label: abs(rubric.labels[label] - score))


def auc_with_ties(gold: Sequence[float], scores: Sequence[float]) -> float | None:
    """Mean of 1(win) + 1/2 1(tie) over all pairs of examples with different gold values (arXiv 2603.10473, eq. 7).

    Of two values it is the area under the ROC curve. Of more, the mean over each two of them, weighted by their
    number of pairs. None where all gold values are equal.

    Raises:
        RecipeError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ModuleNotFoundError as error:
        raise RecipeError("calibration", f"needs {error.name}", 'pip install "memfactory[judge]"') from error
    won, pairs = 0.0, 0
    counts = Counter(gold)
    for low, high in combinations(sorted(counts), 2):
        both = [(truth == high, score) for truth, score in zip(gold, scores, strict=True) if truth in (low, high)]
        weight = counts[low] * counts[high]
        won += weight * float(roc_auc_score([truth for truth, _ in both], [score for _, score in both]))
        pairs += weight
    return won / pairs if pairs else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
