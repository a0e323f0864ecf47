"""Populations: contestants that stop trials early, or breed them, by Ray Tune's schedulers.

Ray is an extra: ``pip install 'steersman[benchmark]'``. It only decides: the runs, their costs and
their scores stay in the process of the cell (`baselines.raytune`), and are never part of a pack.
"""

import importlib.util
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, ClassVar, Self

from baselines.method import (
    FORWARD,
    Arena,
    Best,
    BudgetSpent,
    MeteredJob,
    Method,
    Point,
    point,
    run_cost,
)
from baselines.schedules import reference
from baselines.search import WORST, Search, draw
from envs.errors import BadInput
from envs.knobs import Knobs
from envs.snapshot import Snapshot
from envs.task import Task

Mark = tuple[str, int]  # a trial and its updates when it was saved


@dataclass(frozen=True)
class Asha:
    """Asynchronous successive halving over random draws, until the budget is spent.

    Li et al. 2020 (A System for Massively Parallel Hyperparameter Tuning, arXiv 1810.05934), by
    Ray Tune's ``ASHAScheduler``. The space is that of `baselines.search.Search`. A trial is judged
    by the selection metric after 1, ``reduction``, ``reduction``**2 ... times ``grace`` intervals,
    and stopped if it is not in the best 1/``reduction`` of those that came so far; the first to
    come always goes on. One worker: a trial begins when the one before has ended.
    """

    reduction: float = 4.0  # eta, as in the paper's experiments
    grace: int = 1  # intervals
    name: ClassVar[str] = "asha"
    alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        need(self.name)
        if not 1 < self.reduction <= 100:
            raise BadInput(f"asha: reduction: {self.reduction!r} is not above 1, at most 100")
        if self.grace < 1:
            raise BadInput(f"asha: grace: {self.grace!r} are no intervals; give 1 or more")

    def describe(self) -> dict[str, Any]:
        """Its settings and Ray's version."""
        return asdict(self) | {"version": version("ray")}

    def run(self, arena: Arena) -> None:
        """Trials until `BudgetSpent`."""
        from baselines import raytune

        most = arena.task.decisions
        scheduler = raytune.asha(most, min(self.grace, most), self.reduction)
        with Herd(arena, 1) as herd:
            raytune.search(herd, space_of(arena.task), scheduler, seed_of(arena))


@dataclass(frozen=True)
class Pbt:
    """Population-based training: members in step, the worst copy the weights of the best.

    Jaderberg et al. 2017 (arXiv 1711.09846), by Ray Tune's ``PopulationBasedTraining`` in its
    synchronous mode, from random draws of the space of `baselines.search.Search`. Each ``every``
    intervals the worst ``share`` of the members, by the latest selection metric, take weights and
    settings of one of the best ``share``, and a rate that is multiplied by one of ``factors`` or,
    with probability ``resample``, drawn anew. As everywhere, weights that are put back come without
    the optimizer's moments. A member that diverged scores 0, and may be saved by another's weights.

    A population has as many members as there are whole runs left in the budget, at most
    ``population``; another one follows until the budget is spent, and what is less than a run goes
    to a single member that is cut short.
    """

    population: int = 4
    every: int = 1  # intervals
    share: float = 0.25  # 0.2 in the paper; of four members, one
    factors: tuple[float, float] = (0.8, 1.25)
    resample: float = 0.25
    name: ClassVar[str] = "pbt"
    alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        need(self.name)
        for name in ("population", "every"):
            if getattr(self, name) < 1:
                raise BadInput(f"pbt: {name}: {getattr(self, name)!r} is too few; give 1 or more")
        if not 0 < self.share <= 0.5:
            raise BadInput(f"pbt: share: {self.share!r} is not above 0, at most 0.5")
        if not all(0 < factor < 100 for factor in self.factors):
            raise BadInput(f"pbt: factors: {self.factors!r} are not all between 0 and 100")
        if not 0 <= self.resample <= 1:
            raise BadInput(f"pbt: resample: {self.resample!r} is no probability; give 0 to 1")

    def describe(self) -> dict[str, Any]:
        """Its settings and Ray's version."""
        return asdict(self) | {"version": version("ray")}

    def run(self, arena: Arena) -> None:
        """Populations until the budget is spent."""
        from baselines import raytune

        task, budget, number = arena.task, arena.budget, 0
        space = space_of(task)
        least = min(task.interval, task.steps) * task.batch + task.selection_rows * FORWARD
        with raytune.running():
            while budget.total - budget.spent >= least * (1 - 1e-9):
                left = math.floor((budget.total - budget.spent) / run_cost(task) + 1e-9)
                members, seed = max(1, min(self.population, left)), seed_of(arena, number)
                scheduler = raytune.Pbt(
                    seed, space["rate"][1:], self.every, quantile_fraction=self.share,
                    perturbation_factors=self.factors, resample_probability=self.resample,
                )  # fmt: skip
                with Herd(arena, members) as herd:
                    raytune.search(herd, space, scheduler, seed, members)
                number += 1


POPULATIONS: dict[str, type[Method]] = {"asha": Asha, "pbt": Pbt}
"""Contestants of this kind, by name."""


def need(name: str) -> None:
    """Raise `BadInput` if Ray Tune is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise BadInput(f"{name}: needs ray[tune]; pip install 'steersman[benchmark]'")


def seed_of(arena: Arena, number: int = 0) -> int:
    """The seed of a cell's draws, or of its further populations'."""
    return zlib.crc32(repr((arena.task, arena.seed, number)).encode())


class _Space:
    """Stands in for a trial of Optuna, to learn what `Search` draws."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[Any, ...]] = {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.known[name] = ("loguniform" if log else "uniform", low, high)
        return low

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.known[name] = ("choice", choices)
        return choices[0]


class _Drawn:
    """Stands in for a trial of Optuna, to turn what was drawn into knobs as `Search` does."""

    def __init__(self, drawn: Mapping[str, Any]) -> None:
        self._drawn = drawn

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._drawn[name])

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._drawn[name]


def space_of(task: Task) -> dict[str, tuple[Any, ...]]:
    """The space of `Search`: Ray's distributions by name, and their arguments; AdamW's rates."""
    space = _Space()
    draw(space, reference(task), Search.decades, task, 0)
    return space.known


def knobs_of(task: Task, drawn: Mapping[str, Any]) -> Knobs:
    """Settings from a point of the space, or from one whose rate has left it."""
    knobs, _ = draw(_Drawn(drawn), reference(task), Search.decades, task, 0)
    return knobs


@dataclass
class Member:
    """A run under a scheduler."""

    job: MeteredJob
    knobs: Knobs  # that it was opened with
    best: Best = field(default_factory=Best)
    curve: list[Point] = field(default_factory=list)
    diverged: bool = False  # as its weights are now
    copied: str = ""  # what was done to it before its next interval


class Herd:
    """The runs behind a scheduler's trials: advanced, copied, charged and handed in here."""

    def __init__(self, arena: Arena, size: int) -> None:
        """size: how many are under way together."""
        self._arena, self._size = arena, size
        self._members: dict[str, Member] = {}  # under way
        self._opened = 0
        self._saved: dict[str, list[tuple[Mark, Snapshot]]] = {}  # the last two of each
        self.spent: BudgetSpent | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Hand in those that are still under way; `BudgetSpent` goes on to the cell."""
        if kind is None:
            for trial in list(self._members):
                self.close(trial)
            if self.spent is not None:
                raise self.spent

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return self.spent is not None

    def settle(self, trial: str, drawn: Mapping[str, Any]) -> None:
        """Open the trial's run, or put other settings in force."""
        knobs = knobs_of(self._arena.task, drawn)
        if trial not in self._members:
            self._members[trial] = Member(self._arena.open(knobs), knobs)
            self._opened += 1
        elif knobs != self._members[trial].job.knobs:
            self._members[trial].job.apply(knobs)

    def advance(self, trial: str) -> tuple[float, bool]:
        """One interval -> its selection metric, and whether the run is done.

        It is when it has had all its updates or the budget is spent, and also when it diverged
        and there is no other that could help it.
        """
        member = self._members[trial]
        job, task = member.job, member.job.task
        try:
            progress = job.advance(min(task.interval, task.steps - job.step))
            score = job.evaluate("selection")
        except BudgetSpent as spent:
            self.spent = spent
            return WORST, True
        member.best.offer(score, job)
        member.curve.append(point(progress, job.knobs, score, decision=member.copied))
        member.copied = ""
        member.diverged = not all(map(math.isfinite, (*progress.losses, score.loss)))
        lost = self._opened >= self._size and all(m.diverged for m in self._members.values())
        done = job.step >= task.steps or lost
        return WORST if member.diverged else score.metric, done

    def save(self, trial: str) -> Mark | None:
        """A mark of the weights as they are; None of a trial that has ended."""
        if trial not in self._members:
            return None
        job = self._members[trial].job
        mark = (trial, job.step)
        self._saved[trial] = [*self._saved.get(trial, [])[-1:], (mark, job.snapshot())]
        return mark

    def load(self, trial: str, mark: Mark) -> None:
        """Put another's marked weights in place; its own are there already."""
        member, source = self._members[trial], mark[0]
        if source != trial:
            member.job.restore(dict(self._saved[source])[mark])
            member.copied = "copy"

    def close(self, trial: str) -> None:
        """Hand the run in, if anything was seen of it; once."""
        member = self._members.pop(trial, None)
        if member is None or not member.curve:
            return
        state = "complete" if member.job.step >= member.job.task.steps else "pruned"
        self._arena.hand_in(
            member.job, member.best, member.curve, "diverged" if member.diverged else state,
            member.knobs,
        )  # fmt: skip
        if not self._members:
            self._saved.clear()
