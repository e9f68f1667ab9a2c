"""What failed: how it is told, and when it is too much."""

from __future__ import annotations

from collections.abc import Mapping


def by_fault(failures: Mapping[str, int]) -> str:
    """``2 data, 1 service``: how many by whose fault it was, the most first."""
    return ", ".join(f"{number} {fault}" for fault, number in sorted(failures.items(), key=lambda one: -one[1]))


def too_many(failed: int, of: int, share: float, samples: int = 1) -> bool:
    """Whether a mean over the rest would be of other tasks than those asked for.

    One task that fails is never too many among others, unless `share` is 0: of three tasks it is already a third.

    Args:
        failed: episodes (or tasks) without a score.
        of: all of them.
        share: of them that may fail.
        samples: episodes of one task.
    """
    if not failed:
        return False
    return failed == of or failed > max(share * of, samples if share else 0)
