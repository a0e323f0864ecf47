"""The ruler on other objectives: where a Trainer's run ends from rates around the reference rate.

    python benchmarks/objective_rates.py [--tasks ratings,dpo] [--seeds 1] [--first 0] [--model M]

Each shipped task of `envs.objectives`, each rate linear to zero, ``trainer.train()`` alone.
"cost" is the validation cost at the end by multiple of `envs.knobs.reference_rate`; "seconds" are
of processor time. Figures go to results/objective_rates.json, task by task.
"""

import argparse
import gc
import math
import time
from typing import Any

import numpy as np
import torch
from record import merge

from envs import objectives, workload
from envs.instruments import describe
from envs.knobs import RATE_CEILING, Knobs, reference_rate
from envs.task import Task, find

MULTIPLES = (0.03, 0.1, 0.3, 0.56, 1.0, 1.8, 3.0, 10.0)


def run(task: Task, seed: int, rate: float) -> dict[str, float]:
    """One run from its start to its end: costs on validation, the test metric, seconds."""
    begun = time.process_time()
    setup = objectives.prepare(task, seed, Knobs(rate=min(rate, RATE_CEILING)))
    start = setup.score(setup.trainer, "validation").loss
    prepared = time.process_time()
    with workload.seeded(seed):
        setup.trainer.train()
    trained = time.process_time()
    cost = setup.score(setup.trainer, "validation").loss
    return {
        "start": start,
        "cost": cost,
        "metric": setup.score(setup.trainer, "test").metric,
        "prepare": prepared - begun,
        "train": trained - prepared,
    }


def size_of(task: Task) -> int:
    """Weights of the task's model as the ruler counts them, heads and bridges included."""
    model = objectives.prepare(task, 0, Knobs()).trainer.model
    return int(describe(model, None, None, task.rows)["parameters"])


def figures(task: Task, seeds: range) -> dict[str, Any]:
    """All rates of one task, means over seeds."""
    size = size_of(task)
    ruler = reference_rate(size, "adamw", task.adapter, task.objective)
    found = [[run(task, seed, ruler * m) for seed in seeds] for m in MULTIPLES]

    def mean(name: str) -> dict[str, float]:
        return {
            f"{m:g}": round(float(np.mean([each[name] for each in part])), 4)
            for m, part in zip(MULTIPLES, found, strict=True)
        }

    costs = mean("cost")
    flat = [each for part in found for each in part]
    return {
        "parameters": size,
        "reference_rate": ruler,
        "start": round(float(np.mean([each["start"] for each in flat])), 4),
        "cost": costs,
        "metric": mean("metric"),
        "best": min(costs, key=lambda m: costs[m] if math.isfinite(costs[m]) else math.inf),
        "seconds": {
            name: round(float(np.median([each[name] for each in flat])), 2)
            for name in ("prepare", "train")
        },
    }


def main() -> None:
    """Sweep, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default=",".join(objectives.TASKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--model", help="in place of the task's own, as tiny-64")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or every Trainer collects all that was imported
    seeds = range(options.first, options.first + options.seeds)
    for name in options.tasks.split(","):
        changes = {"model": options.model} if options.model else {}
        task = find(objectives.TASKS[name], **changes)
        name += f"/{options.model}" if options.model else ""
        found = figures(task, seeds)
        merge("objective_rates", name, found, seeds=list(seeds))
        print(name, found, flush=True)


if __name__ == "__main__":
    main()
