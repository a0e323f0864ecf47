"""Warm starts: what a search is worth that begins where a steered run ended, run by run.

    python benchmarks/warm_start.py [--out DIR] [--runs 8] [--workers 2]

TPE from nothing, and one steered run of the shipped policy that `SteersmanSampler` goes on from
with TPE, in the same space on the jobs for choosing (none held out), from rates up to 1.5 decades
off. Everything is charged. Told is the mean test accuracy of the selection-best trial when so many
runs are spent. Repeated, the command goes on where it stopped; figures go to
results/warm_start.json.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from experiments import CHOOSING, JOB_SEEDS, RELATIVES, tasks
from record import record

from baselines.compare import compare
from baselines.method import Arena, finish
from baselines.schedules import reference
from baselines.search import WORST, Search, draw
from tuner import policy
from tuner.evaluate import steer
from tuner.policy import DEFAULT, Policy
from tuner.sampler import Start, SteersmanSampler

NAMES = {name: name for name in ("rate", "head_rate", "shape", "optimizer")}


@dataclass(frozen=True)
class Warm:
    """One steered run, then a search from where it ended."""

    policy: Policy
    name: str = "steered, then TPE"

    def describe(self) -> dict[str, Any]:
        """What tells it from another."""
        return {"policy": self.policy.sha256}

    def run(self, arena: Arena) -> None:
        """Trials until `BudgetSpent`."""
        first, rate = steer(arena, self.policy, arena.start_rate, "explore")
        knobs = first.knobs
        start = Start(rate, knobs.shape, knobs.optimizer, first.selection, knobs.head_rate or 1.0)
        sampler = SteersmanSampler((start,), names=NAMES, seed=arena.seed)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        search, center = Search(), reference(arena.task)
        while True:
            trial = study.ask()
            drawn, _ = draw(trial, center, search.decades, arena.task, 0)
            ended = finish(arena, arena.open(drawn))
            study.tell(trial, WORST if ended.state == "diverged" else ended.selection)


def so_far(trials: list[Mapping[str, Any]], spent: float) -> float:
    """The test score of the selection-best of the trials that were over by then; NaN if none."""
    over = [trial for trial in trials if trial["spent"] <= spent + 1e-9]
    return max(over, key=lambda trial: trial["selection"])["test"] if over else float("nan")


def main() -> None:
    """Run what is missing, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/warm-start"))
    parser.add_argument("--runs", type=int, default=8, help="budget of each")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0: this one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    jobs, seeds = tasks()[: len(CHOOSING) * (1 + RELATIVES)], JOB_SEEDS[:2]
    methods = [Search("tpe"), Warm(policy.load(DEFAULT))]
    found = compare(
        methods, jobs, seeds, options.out / "ledger.sqlite", runs=options.runs,
        workers=options.workers, pack=8,
    )  # fmt: skip
    told = {}
    for method in methods:
        mine = [outcome for outcome in found if outcome["method"] == method.name]
        spent = range(2, options.runs + 1)  # a steered run takes a fifth more than one
        table = [[so_far(each["trials"], runs * each["run_cost"]) for runs in spent]
                 for each in mine]  # fmt: skip
        means = np.mean(table, axis=0).tolist()
        told[method.name] = {
            str(runs): round(mean, 4) for runs, mean in zip(spent, means, strict=True)
        }
        print(method.name, told[method.name])
    record("warm_start", {"runs": options.runs, "best": told}, seeds=list(seeds))


if __name__ == "__main__":
    main()
