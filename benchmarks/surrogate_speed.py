"""Surrogate: environment steps a second on one core, and what one observation costs a job.

Everything is included: decoding of actions, dynamics, observations, rewards, ends and the next
episodes. Actions are random, so that runs diverge and episodes are out of step.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from envs.knobs import Decision
from envs.observe import observe
from envs.progress import Context, Progress
from envs.surrogate import SurrogateVectorEnv

STEPS = 40


def stepping(envs: int, seed: int) -> Callable[[], float]:
    """A function that makes some steps and says how many environment steps they were."""
    env = SurrogateVectorEnv(envs, shape="any", blind=0.1)
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    actions = rng.integers(env.actions.size, size=(STEPS, envs))

    def steps() -> float:
        for chosen in actions:
            env.step(chosen)
        return float(STEPS * envs)

    return steps


def observing() -> Callable[[], float]:
    """A function that observes a run of ten intervals of ten updates a hundred times."""
    context = Context(100, 10, 200_000, 1000, 3, "full", "adamw", 1e-3)
    history = [Progress(0, 1e-3, 1.0, validation=1.1)]
    for i in range(1, 11):
        losses = tuple(1.0 / (i + j / 10) for j in range(10))
        history.append(
            Progress(10 * i, 1e-3, 1 - i / 10, losses, 1.0 / i, 0, 1.0, 1.0, 1e-3, 0.1, True,
                     Decision(3.0))
        )  # fmt: skip

    def observations() -> float:
        for _ in range(100):
            observe(history, context)
        return 100.0

    return observations


def steps(envs: int = 4096, repeats: int = 15, seed: int = 0) -> dict[str, Any]:
    """Environment steps a second of the processor; of the wall clock, which others slow, too."""
    action = stepping(envs, seed)
    action()
    walls, processors = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        done = action()
        processors.append(done / (time.process_time() - processor))
        walls.append(done / (time.perf_counter() - wall))
    return {
        "a_second": statistics.median(processors), "a_second_of_the_wall_clock":
        statistics.median(walls), "envs": envs,
    }  # fmt: skip


def observation(repeats: int = 15) -> dict[str, Any]:
    """Milliseconds of the processor that one observation of a single job takes."""
    action, times = observing(), []
    action()
    for _ in range(repeats):
        began = time.process_time()
        done = action()
        times.append((time.process_time() - began) / done)
    return {"milliseconds": 1e3 * statistics.median(times)}
