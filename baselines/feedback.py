"""Feedback: contestants that set the rate by what they measure, by a rule that nobody trained."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.method import Arena, MeteredJob, Method, Point, finish
from baselines.schedules import reference
from envs.env import EXPLORE
from envs.errors import BadInput
from envs.knobs import RATE_CEILING, RATE_FLOOR, Knobs

BLOWN = 4.0  # times the lowest loss: where a range test stops (Gugger 2018, as fastai does)


@dataclass(frozen=True)
class RangeTest:
    """A learning-rate range test, then half a cosine from the rate that it found.

    Smith 2017 (arXiv 1506.01186): a few updates at rates that rise from update to update, evenly
    in their logarithm, here within ``decades`` either way of the `reference` rate. The rate is a
    third of the one after which the loss, averaged over three updates, was the lowest: the paper's
    own share (a third or a quarter of the highest good rate), as a tenth, the share of fastai's
    ``lr_find``, is far too low after a test of ten updates.

    The test takes the first ``share`` of the run's updates, or less where the loss blows up. The
    pretrained weights are then put back, and the cosine spans the updates that are left: both
    together cost one run. The user's starting rate is not used.
    """

    share: float = 0.1
    decades: float = 2.0
    margin: float = 3.0
    name: ClassVar[str] = "range-test"
    runs: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise BadInput(f"range-test: share: {self.share!r} is not in (0, 0.5]")

    def run(self, arena: Arena) -> None:
        """The test and the run, in one job."""
        total = arena.task.steps
        tests = max(3, round(self.share * total))
        if tests >= total:
            raise BadInput(f"range-test: steps: {total} are too few for a test; give at least 4")
        rates = reference(arena.task) * 10 ** np.linspace(-self.decades, self.decades, tests)
        rates = rates.clip(RATE_FLOOR, RATE_CEILING).tolist()
        job = arena.open(Knobs(rates[0], "constant"))
        pretrained = job.snapshot()
        found = pick(rates, sweep(job, rates)) / self.margin
        job.restore(pretrained)
        # The schedule's warm-up lies in the updates that the test took.
        job.apply(Knobs(max(found, RATE_FLOOR), "cosine", job.step / total))
        finish(arena, job)


def sweep(job: MeteredJob, rates: Sequence[float]) -> list[float]:
    """An update at each rate, until the loss has blown up -> the loss before each update."""
    losses: list[float] = []
    for rate in rates:
        job.apply(Knobs(rate, "constant"))
        losses += job.advance(1).losses
        if not losses[-1] <= BLOWN * min(losses):
            break
    return losses


def pick(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate after which the loss, averaged over three updates, was the lowest.

    losses: before the update at each rate; the one after it is the next. May end early.
    """
    after = [loss if math.isfinite(loss) else math.inf for loss in losses[1:]] or [math.inf]
    padded = np.pad(after, 1, constant_values=math.nan)
    smooth = np.nanmean(np.lib.stride_tricks.sliding_window_view(padded, 3), axis=1)
    return rates[int(np.argmin(smooth))]


@dataclass(frozen=True)
class Plateau:
    """The starting rate, halved after three intervals without a better selection loss.

    The rule of `torch.optim.lr_scheduler.ReduceLROnPlateau`, as in He et al. 2016 (ResNet, arXiv
    1512.03385), on the loss that every method has measured at the end of each interval.
    """

    factor: float = 0.5
    patience: int = 2  # intervals without a better loss that are borne
    threshold: float = 1e-4  # share of the best loss that an improvement must exceed
    name: ClassVar[str] = "plateau"
    runs: ClassVar[int] = 1

    def run(self, arena: Arena) -> None:
        """One run."""
        follow(arena, self.rate)

    def rate(self, start: float, losses: Sequence[float]) -> float:
        """The rate after intervals that ended with those selection losses."""
        rate, best, bad = start, math.inf, 0
        for loss in losses:
            better = loss < best * (1 - self.threshold)
            best, bad = (loss, 0) if better else (best, bad + 1)
            if bad > self.patience:
                rate, bad = rate * self.factor, 0
        return rate


@dataclass(frozen=True)
class Greedy:
    """GreedyLR: the rate rises after an interval with a new best selection loss, else falls.

    "Dynamic Learning Rate Scheduling based on Loss Changes Leads to Faster Convergence" (arXiv
    2512.14527, 2025), by the rule of transformers' ``lr_scheduler_type="greedy"``, which acts at
    evaluations as this does. Its defaults are for hundreds of them: patience 10 would never act in
    a run of ten intervals, and the least rate, 1e-3, is above what fine-tuning wants. Here each
    interval counts, and the rate stays within ``reach`` either way of the start, as the tuner's.
    """

    factor: float = 0.7
    patience: int = 0
    threshold: float = 1e-6  # nats
    reach: float = EXPLORE
    name: ClassVar[str] = "greedy"
    runs: ClassVar[int] = 1

    def run(self, arena: Arena) -> None:
        """One run."""
        follow(arena, self.rate)

    def rate(self, start: float, losses: Sequence[float]) -> float:
        """The rate after intervals that ended with those selection losses."""
        rate, best, good, bad = start, math.inf, 0, 0
        for loss in losses:
            better = loss < best - self.threshold
            best, good, bad = (loss, good + 1, 0) if better else (best, 0, bad + 1)
            if good > self.patience:
                rate, good = min(rate / self.factor, start * self.reach), 0
            elif bad > self.patience:
                rate, bad = max(rate * self.factor, start / self.reach), 0
        return rate


def follow(arena: Arena, rule: Callable[[float, Sequence[float]], float]) -> None:
    """One run by a rule: starting rate and selection losses so far -> the next interval's rate."""
    start = arena.start_rate

    def rate(curve: Sequence[Point]) -> float:
        return rule(start, [point.selection_loss for point in curve])

    finish(arena, arena.open(Knobs(start, "constant")), rate=rate)


FEEDBACK: dict[str, type[Method]] = {method.name: method for method in (RangeTest, Plateau, Greedy)}
"""Contestants of this kind, by name."""
