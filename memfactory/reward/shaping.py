"""Potential-based shaping per turn: credit for progress that does not change what is best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memfactory.reward.table import Floats


def shaped_returns(
    outcome: float, potentials: Sequence[float] | Floats, gamma: float = 1.0, lam: float = 1.0
) -> Floats:
    """Return of every turn of an episode under potential-based shaping (Ng et al. 1999), as a GAE over turns.

    delta_t = r_t + gamma * Phi_(t+1) - Phi_t, G_t = sum_k (gamma * lam)^k delta_(t+k), where Phi_t is the potential
    of the state turn t begins in, r_t is 0 but for the last turn, and the potential of the end is 0: without that,
    shaping would change what is optimal. With lam = gamma = 1, G_t = outcome - Phi_t, so the potential is only a
    baseline and the gradient keeps its mean; with lam < 1 it also bootstraps, which is biased unless the potential
    is exact.

    Args:
        outcome: reward of the episode.
        potentials: (T,) of the states *after* the T turns. The state before the first has potential 0; the last is
            replaced by 0, because the episode ends there.
        gamma: discount per turn.
        lam: lambda.

    Returns:
        (T,)
    """
    before = np.concatenate([[0.0], np.asarray(potentials, dtype=np.float64)[:-1]])  # (T,) Phi_t
    after = np.concatenate([before[1:], [0.0]])  # (T,) Phi_(t+1)
    delta = gamma * after - before
    delta[-1] += outcome
    returns, running = np.empty_like(delta), 0.0
    for t in range(len(delta) - 1, -1, -1):
        running = delta[t] + gamma * lam * running
        returns[t] = running
    return returns
