"""An aggregator with state, for the test of resuming: weights follow running means, so rewards depend on the past."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from memfactory.reward.aggregate import Aggregate, settle, weighted_mean
from memfactory.reward.table import ScoreTable


class RunningWeights:
    needs_positive: ClassVar[bool] = False
    scale_free: ClassVar[bool] = False
    stateful: ClassVar[bool] = True

    def __init__(self) -> None:
        self.means: dict[str, Any] = {}  # numbers of numpy, as such code naturally keeps

    def __call__(self, table: ScoreTable) -> Aggregate:
        table, mask = settle(table)
        weights = np.array([1 - self.means.get(column.name, 0.0) for column in table.columns])
        return Aggregate(weighted_mean(table.values, weights) + mask)

    def update(self, table: ScoreTable) -> None:
        for column, values in zip(table.columns, table.values.T, strict=True):
            self.means[column.name] = 0.5 * self.means.get(column.name, 0.0) + 0.5 * values.mean()

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means = dict(state["means"])
