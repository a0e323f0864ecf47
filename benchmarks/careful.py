"""Careful: how clear a policy must be before mode careful acts, and whether it may open a run.

    python benchmarks/careful.py [--policy tuner/default.safetensors] [--seeds 12] [--out DIR]

Runs for choosing (never held-out ones), from starting rates at most 0.3 decades off, with the
limits of mode careful but for the least lead, in log odds, and for what the policy opens runs with.
Each steered run is set beside the same run without a tuner. Repeated, the command goes on where it
stopped; figures go to results/careful.json. `tuner.guard.CAREFUL` was set by them.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments import STARTS, tasks
from record import record

from baselines.compare import compare
from baselines.schedules import Keep, KeepAgain
from tuner import policy
from tuner.evaluate import PolicyMethod
from tuner.guard import CAREFUL, LIMITS, Limits
from tuner.policy import DEFAULT

DECADES = 0.3
VARIANTS: Mapping[str, Limits] = {
    f"{f'opened x{most:g}, ' if most > 1 else ''}lead {lead:g}": replace(
        CAREFUL, lead=lead, opens=most
    )
    for most, leads in ((1.0, (5.0, 8.0, 11.0)), (3.0, (5.0, 8.0)), (10.0, (5.0,)))
    for lead in leads
}


def scores(given: Path, seeds: int, out: Path) -> dict[str, np.ndarray]:
    """Test scores by method, (jobs, seeds)."""
    LIMITS.update(VARIANTS)
    loaded = policy.load(given)
    methods = [Keep(), KeepAgain(), *(PolicyMethod(loaded, n, mode=n) for n in VARIANTS)]
    jobs = tasks()
    out.mkdir(parents=True, exist_ok=True)
    found = compare(
        methods, jobs, range(seeds), out / "ledger.sqlite", runs=STARTS, decades=DECADES, pack=8,
        compiled=True,
    )  # fmt: skip
    flat: dict[str, list[float]] = {method.name: [] for method in methods}
    for outcome in found:
        flat[outcome["method"]].append(outcome["trials"][0]["test"])
    return {name: np.array(values).reshape(len(jobs), seeds) for name, values in flat.items()}


def figures(mine: np.ndarray, keep: np.ndarray) -> dict[str, float]:
    """Shares of the runs, (jobs, seeds): which differ, are better, and are clearly worse."""
    gain = mine - keep
    bar = np.minimum(0.01 * keep, 2 * keep.std(1, ddof=1, keepdims=True))
    found = {
        "acted": (gain != 0).mean(),
        "better": ((gain > 0) + 0.5 * (gain == 0)).mean(),
        "harmed": (gain < -bar).mean(),
        "gain": gain.mean(),
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def main() -> None:
    """Steer, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, default=DEFAULT)
    parser.add_argument("--out", type=Path, default=Path("runs/careful"))
    parser.add_argument("--seeds", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = scores(options.policy, options.seeds, options.out)
    told: dict[str, Any] = {name: figures(mine, found["keep"]) for name, mine in found.items()}
    record("careful", {"decades": DECADES, "variants": told}, seeds=[*range(options.seeds)])
    for name, row in told.items():
        print(f"{name:16} {row}")


if __name__ == "__main__":
    main()
