"""Search: Optuna's samplers and pruners as contestants."""

import importlib.util
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal, get_args

import numpy as np
import optuna

from baselines.method import Arena, Point, finish
from baselines.schedules import reference
from envs.errors import BadInput, UnknownName
from envs.knobs import (
    OPTIMIZERS,
    RATE_CEILING,
    RATE_FLOOR,
    SHAPES,
    Knobs,
    Optimizer,
    Shape,
    exchange,
)
from envs.task import Task

Sampler = Literal["random", "tpe", "tpe-independent", "gp", "cmaes"]
Pruner = Literal["hyperband"]

WORST = 0.0  # of any metric: what a diverged trial scores
NO_DECAY = 1e-4  # a weight decay drawn below this is none
HEAD = (0.3, 30.0)  # what the rate of a new head may be multiplied by
KNOTS = 4  # of a schedule that is searched for
LOWEST, HIGHEST = 0.03, 3.0  # what a knot may multiply the drawn rate by


@dataclass(frozen=True)
class Search:
    """Optuna over at least the reach of the tuner, until the budget is spent.

    Space: rate, log-uniform within ``decades`` either way of ``center``; shape of the schedule;
    warm-up, 0 to 0.2 of the steps; a classifier's head's rate, log-uniform from 0.3 to 30 times
    that of the other weights; weight decay, log-uniform from 1e-5 to 0.1, below 1e-4 none
    (a quarter of the draws; one flat dimension, as a conditional one would turn multivariate
    TPE, GP and CMA-ES into random search); optimizer, one of ``optimizers``. The rate is AdamW's:
    for SGD and RMSprop it is scaled by the ratio of their `reference_rate` to AdamW's, so that the
    rate's dimension means the same under each. ``center`` is by default AdamW's reference rate of
    the task's model, the centre of the starting rates too; the misjudged start is not used.

    ``knots``: instead of shape and warm-up, so many log-uniform multipliers of the rate, `LOWEST`
    to `HIGHEST`, at evenly spaced points of the run, the first and the last interval included; in
    between log-linear. Each interval has one rate. That is the tuner's reach without its eyes: what
    it cannot match of a steered run is due to feedback, not to the schedule's shape.

    Objective: the best selection metric of the run, reported after each interval to the pruner.
    A pruned trial is charged what it used; a diverged one is complete with the worst value.
    Trials are sequential and in memory; seeded by the arena's seed and task.

    Sources: Akiba et al. 2019 (Optuna, arXiv 1907.10902); Bergstra et al. 2011 (TPE, NeurIPS);
    Watanabe 2023 (multivariate TPE, arXiv 2304.11127); Hansen 2016 (CMA-ES, arXiv 1604.00772;
    its categories are drawn at random); Li et al. 2018 (Hyperband, JMLR 18).
    """

    sampler: Sampler = "random"
    pruner: Pruner | None = None
    center: float | None = None
    decades: float = 1.5
    knots: int = 0
    optimizers: tuple[Optimizer, ...] = OPTIMIZERS  # one: the reach of a tuner that keeps to it

    def __post_init__(self) -> None:
        if self.sampler not in get_args(Sampler):
            raise UnknownName("sampler", self.sampler, get_args(Sampler))
        if self.pruner is not None and self.pruner not in get_args(Pruner):
            raise UnknownName("pruner", self.pruner, get_args(Pruner))
        if self.center is not None and not RATE_FLOOR <= self.center <= RATE_CEILING:
            raise BadInput(f"search: center: {self.center!r} is not a rate that can train")
        if not 0 < self.decades <= 4:
            raise BadInput(f"search: decades: {self.decades!r} is not in (0, 4]")
        if self.knots != 0 and not 2 <= self.knots <= 16:
            raise BadInput(f"search: knots: {self.knots!r} are not 2 to 16; give 0 for none")
        if not self.optimizers or not set(self.optimizers) <= set(OPTIMIZERS):
            raise BadInput(f"search: optimizers: {self.optimizers!r} are not some of {OPTIMIZERS}")
        if self.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
            raise BadInput("search: sampler: 'cmaes' needs a package; pip install cmaes")

    @property
    def name(self) -> str:
        """For example ``random``, ``tpe+hyperband``, ``tpe+knots`` or ``tpe+adamw``."""
        only = None if self.optimizers == OPTIMIZERS else "-".join(self.optimizers)
        parts = (self.sampler, "knots" if self.knots else None, only, self.pruner)
        return "+".join(part for part in parts if part)

    def describe(self) -> dict[str, Any]:
        """Its settings and its packages' versions."""
        packages = ("optuna", "cmaes") if self.sampler == "cmaes" else ("optuna",)
        return asdict(self) | {"versions": {name: version(name) for name in packages}}

    def run(self, arena: Arena) -> None:
        """Trials until `BudgetSpent`."""
        center = self.center or reference(arena.task)
        study = self._study(arena)
        while True:
            trial = study.ask()
            knobs, multipliers = draw(
                trial, center, self.decades, arena.task, self.knots, self.optimizers
            )
            ended = finish(
                arena,
                arena.open(knobs),
                _watch(trial, arena.task) if self.pruner else None,
                _follow(knobs.rate, multipliers, arena.task) if multipliers else None,
            )
            if ended.state == "pruned":
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, WORST if ended.state == "diverged" else ended.selection)

    def _study(self, arena: Arena) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pruner: Any = optuna.pruners.NopPruner()
        if self.pruner == "hyperband":
            pruner = optuna.pruners.HyperbandPruner(1, arena.task.decisions)
        job = zlib.crc32(repr((arena.task, arena.seed)).encode())
        return optuna.create_study(
            storage=optuna.storages.InMemoryStorage(),
            sampler=_sampler(self.sampler, job),
            pruner=pruner,
            study_name=f"{job}",  # Hyperband deals brackets by the name: never a random one.
            direction="maximize",
        )


def _sampler(name: Sampler, seed: int) -> Any:
    samplers = optuna.samplers
    match name:
        case "random":
            return samplers.RandomSampler(seed)
        case "tpe":
            return samplers.TPESampler(seed=seed)
        case "tpe-independent":  # the default before Optuna 5
            return samplers.TPESampler(seed=seed, multivariate=False, constant_liar=False)
        case "gp":
            return samplers.GPSampler(seed=seed)
        case "cmaes":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)


def draw(
    trial: Any,
    center: float,
    decades: float,
    task: Task,
    knots: int,
    optimizers: tuple[Optimizer, ...] = OPTIMIZERS,
) -> tuple[Knobs, tuple[float, ...]]:
    """A trial's settings, and its knots if there are any; ``trial`` suggests as Optuna's do."""
    shape: Shape = "constant"
    warmup, multipliers = 0.0, ()
    rate = trial.suggest_float("rate", center / 10**decades, center * 10**decades, log=True)
    if knots:
        multipliers = tuple(
            trial.suggest_float(f"knot{i}", LOWEST, HIGHEST, log=True) for i in range(knots)
        )
    else:
        shape = trial.suggest_categorical("shape", SHAPES)
        warmup = trial.suggest_float("warmup", 0.0, 0.2)
    decay = trial.suggest_float("weight_decay", NO_DECAY / 10, 0.1, log=True)
    optimizer = trial.suggest_categorical("optimizer", optimizers)
    rate *= exchange("adamw", optimizer, 1, task.adapter)
    headed = task.objective == "classification"
    head = trial.suggest_float("head_rate", *HEAD, log=True) if headed else None
    knobs = Knobs(
        min(max(rate, RATE_FLOOR), RATE_CEILING), shape, warmup, optimizer,
        decay if decay >= NO_DECAY else 0.0, head_rate=head,
    )  # fmt: skip
    return knobs, multipliers


def along(multipliers: Sequence[float], share: float) -> float:
    """The multiplier at a share of the way from the first knot to the last: log-linear."""
    places = np.linspace(0.0, 1.0, len(multipliers))
    return float(np.exp(np.interp(share, places, np.log(multipliers))))


def _follow(
    rate: float, multipliers: Sequence[float], task: Task
) -> Callable[[Sequence[Point]], float]:
    """The rate of each interval; the first has the first knot's, the last the last one's."""
    return lambda curve: rate * along(multipliers, len(curve) / max(1, task.decisions - 1))


def _watch(trial: Any, task: Task) -> Callable[[Point], bool]:
    """Reports the best metric so far after each interval but the last; True asks to prune."""
    best = -math.inf

    def prune(point: Point) -> bool:
        nonlocal best
        best = max(best, point.selection)
        if point.step >= task.steps:
            return False
        trial.report(best, math.ceil(point.step / task.interval))
        return bool(trial.should_prune())

    return prune
