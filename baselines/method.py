"""Methods: contestants of a comparison, what they may spend, and what they hand in.

A `Method` gets an `Arena`. It opens jobs there, drives them through the `Job` seam, and hands
in trials. Every update and every evaluation is charged to one `Budget`. The test split is
closed to methods; the arena reads it when a trial is handed in, and does not tell the method.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from envs.env import MakeJob
from envs.errors import BadInput, SteersmanError
from envs.job import Job, Score
from envs.knobs import RATE_CEILING, RATE_FLOOR, Knobs
from envs.progress import Context, Progress
from envs.snapshot import Snapshot
from envs.start import open_job
from envs.task import Split, Task

_APART = 1_000_003  # between the seeds of a cell's draws
FORWARD = 1 / 3  # cost of a row that is only evaluated: backward passes cost twice a forward one


class BudgetSpent(SteersmanError):
    """The next update or evaluation would cost more than is left."""


@dataclass
class Budget:
    """Training rows that may be spent; an evaluated row counts a third."""

    total: float
    spent: float = 0.0

    def charge(self, rows: float) -> None:
        """Spend, or raise `BudgetSpent` and spend nothing."""
        if not rows >= 0:
            raise BadInput(f"budget: {rows} rows asked; nothing can be earned back")
        if self.spent + rows > self.total * (1 + 1e-9):
            raise BudgetSpent(f"budget: {rows:g} rows asked, {self.total - self.spent:g} left")
        self.spent += rows


@dataclass(frozen=True)
class Point:
    """One interval of a trial, for the curves. Losses in nats; NaN where not measured."""

    step: int
    rate: float  # peak rate in force in the interval that ended here
    factor: float
    train_loss: float
    selection_loss: float
    selection: float
    validation_loss: float = math.nan
    decision: str = ""  # what a steering method did before the interval, in words
    guard: str = ""  # why something else was applied, if it was


@dataclass(frozen=True)
class Trial:
    """A run handed in. ``selection`` and ``test`` are metrics of the best checkpoint."""

    knobs: Knobs
    selection: float
    selection_loss: float
    test: float
    test_loss: float
    state: str  # complete, pruned or diverged
    steps: int
    spent: float  # of the whole budget, when this trial was handed in
    curve: tuple[Point, ...]
    ended: Knobs | None = None  # in force at the best checkpoint; None: those it was opened with


class MeteredJob:
    """A job whose every update and evaluation is charged, with the test split closed."""

    def __init__(self, job: Job, budget: Budget) -> None:
        self._job, self._budget = job, budget
        self.task = job.task

    @property
    def step(self) -> int:
        """Updates done."""
        return self._job.step

    @property
    def knobs(self) -> Knobs:
        """The settings in force."""
        return self._job.knobs

    @property
    def context(self) -> Context:
        """What the observation needs to know of the run as a whole."""
        return self._job.context

    def advance(self, steps: int) -> Progress:
        """Make that many updates; charged ``steps`` batches, before they are made."""
        self._budget.charge(steps * self.task.batch)
        return self._job.advance(steps)

    def apply(self, knobs: Knobs) -> None:
        """Put the settings in force."""
        self._job.apply(knobs)

    def evaluate(self, split: Split) -> Score:
        """Judge the weights on a split other than test; charged a third of its rows."""
        if split == "test":
            raise BadInput("arena: split: the test split is read by the referee alone")
        rows = {
            "train": self.task.rows,
            "validation": self.task.validation_rows,
            "selection": self.task.selection_rows,
        }[split]
        self._budget.charge(rows * FORWARD)
        return self._job.evaluate(split)

    def snapshot(self) -> Snapshot:
        """The trained weights, copied."""
        return self._job.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Put weights back."""
        self._job.restore(snapshot)


@dataclass
class Best:
    """The checkpoint rule, the same for all: the best selection metric, then loss."""

    score: Score = field(default_factory=lambda: Score(math.inf, -math.inf))
    snapshot: Snapshot | None = None
    knobs: Knobs | None = None  # in force there

    def offer(self, score: Score, job: MeteredJob) -> None:
        """Keep this checkpoint if it is better than the best so far."""
        better = (score.metric, -score.loss) > (self.score.metric, -self.score.loss)
        if math.isfinite(score.loss) and better:
            self.score, self.snapshot, self.knobs = score, job.snapshot(), job.knobs


class Arena:
    """One cell of a comparison: a task, a seed, the user's starting rate, and a budget."""

    def __init__(
        self,
        task: Task,
        seed: int,
        start_rate: float,
        runs: float,
        make_job: MakeJob = open_job,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """runs: the budget, in whole runs of the task evaluated on selection every interval."""
        self.task, self.seed, self.start_rate = task, seed, start_rate
        self.budget = Budget(runs * run_cost(task))
        self.trials: list[Trial] = []
        self._make_job, self._clock = make_job, clock
        self._open: dict[int, tuple[MeteredJob, Job]] = {}
        self._began = clock()

    def open(self, knobs: Knobs, make_job: MakeJob | None = None, *, draw: int = 0) -> MeteredJob:
        """A new run: the same weights, head and data order for every method of this cell.

        make_job: for a method whose runs only a job of its own kind can make. draw: above 0 asks
        for another head and data order, for one who wants to know what chance alone does.
        """
        job = (make_job or self._make_job)(self.task, self.seed + draw * _APART, knobs)
        metered = MeteredJob(job, self.budget)
        self._open[id(metered)] = (metered, job)
        return metered

    def hand_in(
        self, job: MeteredJob, best: Best, curve: list[Point], state: str, knobs: Knobs
    ) -> Trial:
        """Close a run: its best checkpoint is judged on the test split, once.

        The trial comes back without the test score; ``trials`` is for the referee.
        """
        _, inner = self._open.pop(id(job))
        test = Score(math.inf, 0.0)
        if best.snapshot is not None:
            inner.restore(best.snapshot)
            test = inner.evaluate("test")
        trial = Trial(
            knobs, best.score.metric if best.snapshot is not None else 0.0, best.score.loss,
            test.metric, test.loss, state, job.step, self.budget.spent, tuple(curve),
            best.knobs if best.knobs != knobs else None,
        )  # fmt: skip
        self.trials.append(trial)
        return replace(trial, test=math.nan, test_loss=math.nan)

    def outcome(self, method: str, **extra: Any) -> dict[str, Any]:
        """The cell's raw outcome, JSON-ready but for NaN and inf."""
        return {
            "method": method,
            "task": self.task.name,
            "seed": self.seed,
            "start_rate": self.start_rate,
            "budget": self.budget.total,
            "spent": self.budget.spent,
            "run_cost": run_cost(self.task),
            "seconds": self._clock() - self._began,
            "trials": [asdict(trial) for trial in self.trials],
            **extra,
        }


class Method(Protocol):
    """A contestant. It may use the arena's task, start rate and budget, and nothing else."""

    @property
    def name(self) -> str:
        """A short name, unique in a comparison."""

    def run(self, arena: Arena) -> None:
        """Open jobs and hand in trials until done, or until `BudgetSpent` is raised."""


def run_cost(task: Task) -> float:
    """Cost in training rows of one plain run with a selection evaluation per interval."""
    return task.steps * task.batch + task.decisions * task.selection_rows * FORWARD


def run_static(
    arena: Arena,
    knobs: Knobs,
    on_interval: Callable[[Point], bool] | None = None,
    draw: int = 0,
) -> Trial:
    """One run with fixed knobs: a trial. ``on_interval`` returns True to prune it."""
    return finish(arena, arena.open(knobs, draw=draw), on_interval)


def finish(
    arena: Arena,
    job: MeteredJob,
    on_interval: Callable[[Point], bool] | None = None,
    rate: Callable[[Sequence[Point]], float] | None = None,
) -> Trial:
    """Train an open run to its end: a trial. ``on_interval`` returns True to prune it.

    rate: the curve so far, empty at first -> the peak rate of the next interval.
    """
    knobs, best, state = job.knobs, Best(), "complete"
    curve: list[Point] = []
    try:
        while job.step < job.task.steps:
            if rate is not None:
                job.apply(replace(knobs, rate=min(max(rate(curve), RATE_FLOOR), RATE_CEILING)))
            progress = job.advance(min(job.task.interval, job.task.steps - job.step))
            score = job.evaluate("selection")
            best.offer(score, job)
            curve.append(point(progress, job.knobs, score))
            if not all(map(math.isfinite, (*progress.losses, score.loss))):
                state = "diverged"
                break
            if on_interval is not None and on_interval(curve[-1]):
                state = "pruned"
                break
    except BudgetSpent:
        if curve:
            arena.hand_in(job, best, curve, "pruned", knobs)
        raise
    return arena.hand_in(job, best, curve, state, knobs)


def point(progress: Progress, knobs: Knobs, score: Score, **extra: Any) -> Point:
    """A curve point from a report and a selection score."""
    losses = progress.losses
    mean = sum(losses) / len(losses) if losses else math.nan
    return Point(
        progress.step, knobs.rate, progress.factor, mean, score.loss, score.metric, **extra
    )
