"""How fast the surrogate steps on one core, and what one observation costs a single job.

    python benchmarks/surrogate_speed.py [--envs 4096] [--repeats 15]

Everything is included: decoding of actions, dynamics, observations, rewards, ends and the next
episodes. Actions are random, so that runs diverge and episodes are out of step. Steps per second
are of the wall clock and of the processor (`time.process_time`; on a busy machine the wall clock
measures the others); the median over repeats, and the quartiles. Needs no fetched data.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from record import record

from envs.knobs import Decision
from envs.observe import observe
from envs.progress import Context, Progress
from envs.surrogate import SurrogateVectorEnv

BARS = {"steps_per_second": 300_000, "observe_ms": 0.15}
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


def measure(action: Callable[[], float], repeats: int) -> dict[str, Any]:
    """Seconds per unit of work: median and quartiles of the wall clock and of the processor."""
    walls, processors = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        done = action()
        processors.append((time.process_time() - processor) / done)
        walls.append((time.perf_counter() - wall) / done)
    return {"wall": statistics.quantiles(walls), "processor": statistics.quantiles(processors)}


def figures(envs: int = 4096, repeats: int = 15, seed: int = 0) -> dict[str, Any]:
    """All figures, with the bars they are held to."""
    result: dict[str, Any] = {}
    for count in (256, 1024, envs):
        action = stepping(count, seed)
        action()
        times = measure(action, repeats)
        # A quarter of the repeats is faster than the last figure, a quarter slower than the first.
        result[f"{count} environments"] = {
            clock: [round(1 / seconds) for seconds in reversed(times[clock])] for clock in times
        }
    best = result[f"{envs} environments"]
    once = measure(observing(), repeats)
    return {
        "steps_per_second": best["wall"][1],
        "steps_per_processor_second": best["processor"][1],
        "observe_ms": round(once["processor"][1] * 1e3, 4),
        "observe_wall_ms": round(once["wall"][1] * 1e3, 4),
        "quartiles": result,
        "bars": BARS,
    }


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = figures(options.envs, options.repeats)
    print(json.dumps(found, indent=2))
    record("surrogate_speed", found, seeds=[0])


if __name__ == "__main__":
    main()
