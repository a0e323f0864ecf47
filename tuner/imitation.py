"""Imitation: what the best recorded schedule would do, shown to a network before it learns itself.

On the training tasks one rate, relative to the rule of thumb for the model's size, is about as good
as each job's own best, with and without a rate of its own for a new head (`benchmarks/headroom.py`:
the parabolas through the three best rates of "tiny-32" and "tiny-32, head x10" have their peaks at
-0.08 and -0.06 decades). The teacher goes there at once, from wherever the user started, and stays;
a rate that is as good within half a point it leaves alone. It is shown on simulated runs, on states
that it and random actions lead to (as in DAgger, Ross et al. 2011), so that a network also learns
the way back.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from envs.env import EXPLORE
from envs.knobs import Actions, Optimizer
from envs.surrogate import SurrogateVectorEnv
from tuner.policy import PLACES

BEST = -0.06  # decades from the reference rate, of all weights; an adapter is best a little lower
GOOD = (-0.2, 0.03)  # where nothing is to be won by a change
STRAY = 0.3  # share of decisions that are random
RUNS, EPISODES = 512, 4


def teacher(observations: NDArray[np.float32], actions: Actions) -> NDArray[np.int64]:
    """(n, features) raw -> (n,) discrete actions.

    *Keep* where the rate is good, else what leads nearest to the best. A rate further than
    `EXPLORE` from the start cannot be reached.
    """
    rate = observations[:, PLACES["rate_vs_reference"]]
    moved, reach = observations[:, PLACES["rate_vs_start"]], np.log10(EXPLORE)
    wish = np.clip(BEST - rate, -reach - moved, reach - moved)
    steps = np.log10(np.array(actions.multipliers))
    nearest = np.abs(wish[:, None] - steps).argmin(1)
    good = (rate >= GOOD[0]) & (rate <= GOOD[1])
    return np.asarray(np.where(good, actions.keep, nearest), dtype=np.int64)


def lessons(
    actions: Actions, decisions: int, seed: int, starts: Sequence[Optimizer] = ("adamw",)
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Observations of simulated runs, (n, features), and what the teacher does there, (n,)."""
    runs = SurrogateVectorEnv(
        RUNS, actions=actions, decisions=decisions, optimizers=starts, shape="any", vary=True
    )
    rng = np.random.default_rng(seed)
    observations, _ = runs.reset(seed=seed)
    seen, shown = [], []
    for _ in range(decisions * EPISODES):
        seen.append(observations.copy())
        shown.append(teacher(seen[-1], actions))
        stray = rng.random(RUNS) < STRAY
        chosen = np.where(stray, rng.integers(actions.size, size=RUNS), shown[-1])
        observations = runs.step(chosen)[0]
    return np.concatenate(seen), np.concatenate(shown)
