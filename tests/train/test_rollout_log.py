"""Numbers of all ranks as one; with real ranks and a real server: `tests/rollout_servers/test_ranks.py`."""

from __future__ import annotations

from typing import Any

import pytest

from memfactory.train.ranks import Ranks
from memfactory.train.rollout_log import over_ranks


class Told(Ranks):
    """Ranks of which the others have measured what is told."""

    def __init__(self, *others: dict[str, float]) -> None:
        self.others = others

    def gather(self, values: list[Any]) -> list[Any]:
        return [*values, *self.others]


def test_counts_are_summed_and_means_weighted_by_requests() -> None:
    here = {"requests": 30.0, "failures/cut": 2.0, "latency": 1.0, "canary_difference": 1e-6, "taken_out": 1.0}
    there = {"requests": 10.0, "failures/server": 1.0, "latency": 3.0, "canary_difference": 2e-6, "taken_out": 1.0}
    assert over_ranks(here, Told(there | {"prefix_cache_hit_rate": 0.5})) == pytest.approx(
        {
            "requests": 40.0,
            "failures/cut": 2.0,
            "failures/server": 1.0,
            "latency": 1.5,
            "canary_difference": 2e-6,
            "taken_out": 1.0,
            "prefix_cache_hit_rate": 0.5,
        }
    )


def test_one_rank_says_what_it_measured_even_where_it_asked_nothing() -> None:
    measured = {"requests": 0.0, "wait": 0.25, "canary_difference": 0.0}
    assert over_ranks(measured, Told()) == measured
