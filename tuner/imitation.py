"""Imitation: what the best recorded schedule would do, shown to a network before it learns itself.

On the training tasks one rate, relative to the rule of thumb for the model's size, is about as good
as each job's own best (`benchmarks/headroom.py`). The teacher goes there at once, from wherever the
user started, and stays. It is shown on simulated runs, on states that it and random actions lead to
(as in DAgger, Ross et al. 2011), so that a network also learns the way back.
"""

import numpy as np
from numpy.typing import NDArray

from envs.env import EXPLORE
from envs.knobs import Actions
from envs.observe import FEATURES
from envs.surrogate import SurrogateVectorEnv

BEST = -0.12  # decades from the reference rate, with all weights and with LoRA
STRAY = 0.3  # share of decisions that are random
RUNS, EPISODES = 512, 4
_PLACES = {feature.name: place for place, feature in enumerate(FEATURES)}


def teacher(observations: NDArray[np.float32], actions: Actions) -> NDArray[np.int64]:
    """(n, features) raw -> (n,) discrete actions: the multiplier that leads nearest to `BEST`.

    A rate further than `EXPLORE` from the start cannot be reached; of equals, *keep* is taken.
    """
    moved, reach = observations[:, _PLACES["rate_vs_start"]], np.log10(EXPLORE)
    wish = BEST - observations[:, _PLACES["rate_vs_reference"]]
    wish = np.clip(wish, -reach - moved, reach - moved)
    steps = np.log10(np.array(actions.multipliers))
    distance = np.abs(wish[:, None] - steps)
    distance[:, actions.keep] -= 1e-6
    return np.asarray(distance.argmin(1), dtype=np.int64)


def lessons(
    actions: Actions, decisions: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Observations of simulated runs, (n, features), and what the teacher does there, (n,)."""
    runs = SurrogateVectorEnv(RUNS, actions=actions, decisions=decisions, shape="any", vary=True)
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
