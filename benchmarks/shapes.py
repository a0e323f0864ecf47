"""Shapes: schedules of the rate and of a new head's rate, against the best fixed setting.

    python benchmarks/shapes.py [--out DIR] [--workers 2]

Every schedule is one run of the jobs for choosing and of the training tasks, on which tuners are
chosen, too. Repeated, the command goes on where it stopped; figures go to results/shapes.json.
`docs/experiments.md` tells what was concluded.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from experiments import JOB_SEEDS, figures, judge
from record import record

from baselines.method import Arena, Best, MeteredJob, Point, point
from baselines.schedules import Fixed, reference
from envs.knobs import Knobs

FIXED = "0, head x10, cosine"  # what is best of all fixed settings on the training tasks


@dataclass(frozen=True)
class Curve:
    """A straight line to zero whose rate and head's rate move along knots, interval by interval.

    rates: decades from the rule of thumb; heads: times the rate. Evenly spaced over the run.
    """

    label: str
    rates: tuple[float, ...]
    heads: tuple[float, ...] = (10.0,)
    runs: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """As the results call it."""
        return self.label

    def run(self, arena: Arena) -> None:
        """One run."""
        decisions = arena.task.decisions
        settings = [self._at(arena, i / max(1, decisions - 1)) for i in range(decisions)]
        job, best, curve = arena.open(settings[0]), Best(), list[Point]()
        for knobs in settings:
            job.apply(knobs)
            curve.append(_interval(job, best))
        arena.hand_in(job, best, curve, "complete", settings[0])

    def _at(self, arena: Arena, share: float) -> Knobs:
        rate = reference(arena.task) * 10 ** _along(self.rates, share)
        return Knobs(rate, head_rate=min(10 ** _along(np.log10(self.heads), share), 100.0))


def _along(knots: Sequence[float] | np.ndarray, share: float) -> float:
    return float(np.interp(share, np.linspace(0, 1, len(knots)), knots))


def _interval(job: MeteredJob, best: Best) -> Point:
    progress = job.advance(min(job.task.interval, job.task.steps - job.step))
    score = job.evaluate("selection")
    best.offer(score, job)
    return point(progress, job.knobs, score)


def curves() -> list[Curve]:
    """Straight ones at several rates; then at two of them what else might be better."""
    found = [Curve(f"{r:+g}, head x10", (r,)) for r in (-0.25, -0.12, -0.05, 0.0, 0.1)]
    for r in (-0.12, 0.0):
        found += [
            Curve(f"{r:+g}, head x30 to x3", (r,), (30.0, 3.0)),
            Curve(f"{r:+g}, head x30 to x1", (r,), (30.0, 1.0)),
            Curve(f"{r:+g}, head x3 to x30", (r,), (3.0, 30.0)),
            Curve(f"{r:+g}, head alone first", (r - 1, *[r] * 9), (100.0, *[10.0] * 9)),
            Curve(f"{r:+g}, head rather first", (r - 0.5, *[r] * 9), (30.0, *[10.0] * 9)),
            Curve(f"{r:+g}, steeper", (r + 0.12, r - 0.2)),
            Curve(f"{r:+g}, flatter", (r - 0.1, r + 0.15)),
        ]
    return found


def main() -> None:
    """Run what is missing, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--workers", type=int, default=2, help="processes; 0: this one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fixed = Fixed(Knobs(1.0, "cosine", head_rate=10.0), True, FIXED)
    scores = judge([fixed, *curves()], options.out, options.workers)
    told = figures(scores, {"base": [FIXED]} | {name: [name] for name in scores})
    record("shapes", {"schedules": told}, seeds=list(JOB_SEEDS))
    for name, row in told.items():
        print(f"{name:26} {row}")


if __name__ == "__main__":
    main()
