"""The judge without a model: every rubric answers by its own rule."""

from __future__ import annotations

import math

from memfactory.episode import Score
from memfactory.errors import JudgeError, RewardError, boundary
from memfactory.reward.judge.base import Rubric, check_fields
from memfactory.reward.judge.pairwise import check_pair, compared
from memfactory.reward.judge.tally import Tally

FIX = "set judge.base_url and judge.model in the recipe, or give the rubric a {}"


class RuleJudge:
    """What a recipe gets that sets no ``judge.base_url``: free, instant, and only as good as the rules."""

    def __init__(self) -> None:
        self._tally = Tally()

    async def grade(self, rubric: Rubric, /, **fields: str) -> Score:
        """The rule's score; a score of None where it cannot tell.

        Raises:
            JudgeError: the rubric has no rule, or its rule left the range of the labels.
            RewardError: the rule raised.
        """
        check_fields(rubric, fields)
        self._tally.add(asked=1)
        if rubric.rule is None:
            raise self._failed(rubric, "no endpoint is set and it has no rule", FIX.format("rule"))
        with boundary(RewardError, f"rule of rubric '{rubric.name}'", "mend the rule"):
            value = rubric.rule(fields)
        if value is None:
            return Score(None, f"the rule of rubric '{rubric.name}' cannot tell")
        if not (math.isfinite(value) and rubric.low <= value <= rubric.high):
            why = f"its rule gave {value}, outside its labels [{rubric.low}, {rubric.high}]"
            raise self._failed(rubric, why, "mend the rule")
        return Score(float(value))

    async def prefer(self, rubric: Rubric, first: str, second: str, /, **fields: str) -> int:
        """The rule's preference in this order.

        Raises:
            JudgeError: the rubric has no `compare_rule`, or it gave none of -1, 0, 1.
            RewardError: the rule raised.
        """
        check_pair(rubric, first, second, fields)
        self._tally.add(asked=1)
        if rubric.compare_rule is None:
            raise self._failed(rubric, "no endpoint is set and it has no compare_rule", FIX.format("compare_rule"))
        with boundary(RewardError, f"compare_rule of rubric '{rubric.name}'", "mend the rule"):
            preference = rubric.compare_rule(first, second, fields)
        if preference not in (-1, 0, 1):
            raise self._failed(rubric, f"its compare_rule gave {preference!r}, none of -1, 0, 1", "mend the rule")
        return int(preference)

    async def compare(self, rubric: Rubric, first: str, second: str, /, **fields: str) -> int:
        """As :meth:`prefer`, in both orders: a rule can depend on the order too."""
        return await compared(self, self._tally, rubric, first, second, fields)

    def metrics(self) -> dict[str, float]:
        return self._tally.take()

    async def aclose(self) -> None:
        pass

    def _failed(self, rubric: Rubric, why: str, fix: str) -> JudgeError:
        self._tally.add(failed=1)
        return JudgeError(f"rule judge, rubric '{rubric.name}'", why, fix)
