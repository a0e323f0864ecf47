"""Warm starts: an Optuna study that begins where a steered run of the tuner ended.

For those who must search all the same, and want to search less::

    found = find_start("policy.safetensors", "bbc")
    study = optuna.create_study(direction="maximize", sampler=SteersmanSampler(found))
    warm_start(study, found)
    study.optimize(objective, n_trials=10)

`warm_start` alone is enough for a study that draws with a sampler of one's own.
"""

import math
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from baselines.method import Arena, Trial
from baselines.schedules import reference
from envs.env import MakeJob
from envs.errors import BadInput, RunFailed, UnknownName
from envs.knobs import Knobs, Optimizer, Shape
from envs.start import open_job
from envs.task import Task, find
from tuner.evaluate import PolicyMethod
from tuner.policy import Policy
from tuner.restarts import SPREAD
from tuner.tracking import open_policy

RATES = ("rate", "head_rate")
SETTINGS = (*RATES, "shape", "optimizer")
NAMES = {"rate": "learning_rate"}  # ours -> the study's
FARTHEST = 2 * SPREAD  # decades that a draw may be away from what was found

Names = Mapping[str, str]
Space = Mapping[str, Any]  # name -> distribution


@dataclass(frozen=True)
class Start:
    """Settings of a run to begin a search from; ``rate`` is a peak rate, ``shape`` its schedule.

    ``head_rate``: times the rate, for a classifier's head, with which a rate was found.
    Of a steered run: what was in force at its best checkpoint, and the selection score of
    that. Or settings of one's own, for example a rate from the summary of `steersman apply`.
    """

    rate: float
    shape: Shape = "linear"
    optimizer: Optimizer = "adamw"
    score: float = math.nan
    head_rate: float = 1.0

    def __post_init__(self) -> None:
        Knobs(self.rate, self.shape, optimizer=self.optimizer, head_rate=self.head_rate)  # checks


def find_start(
    policy: Policy | str | Path,
    task: Task | str | Mapping[str, Any],
    seed: int = 0,
    runs: int = 1,
    *,
    rate: float | None = None,
    mode: str = "explore",
    make_job: MakeJob = open_job,
) -> tuple[Start, ...]:
    """Where steered runs of a task ended, the best first. Costs ``runs`` fine-tuning runs.

    A rate is that of the start's ``optimizer``: with a policy that may switch, name both.
    The first run starts at ``rate``, by default a rule of thumb for the model's size; further
    ones as `tuner.restarts` has it. Runs without a finite checkpoint are left out; `RunFailed`
    if none is left. The task's test split is left for the end of the search.
    """
    if not isinstance(runs, int) or runs < 1:
        raise BadInput(f"find_start: runs: {runs!r} is not a count; give 1 or more")
    policy = open_policy(str(policy)) if isinstance(policy, str | Path) else policy
    job = find(task, test_rows=1)  # An arena reads test at the end; what it says is not used.
    start = reference(job) if rate is None else rate
    arena = Arena(job, seed, start, math.inf, make_job)
    PolicyMethod(policy, runs=runs, mode=mode).run(arena)
    found = [start for trial in arena.trials for start in _ends(trial)]
    if not found:
        raise RunFailed(f"find_start: no run from {start:g} stayed finite; give a lower rate")
    return tuple(sorted(found, key=lambda start: -start.score))


def _ends(trial: Trial) -> list[Start]:
    """The settings at a trial's best checkpoint, if it had one."""
    if not math.isfinite(trial.selection_loss):
        return []
    knobs = trial.ended or trial.knobs
    head = knobs.head_rate or 1.0
    return [Start(knobs.rate, knobs.shape, knobs.optimizer, trial.selection, head)]


def warm_start(
    study: Study, found: Sequence[Start], names: Names = NAMES, space: Space | None = None
) -> list[dict[str, Any]]:
    """Enqueue what was found, the best first, in the study's own names -> what was enqueued.

    Arguments:
        study: settings that it has tried or enqueued before are not enqueued again, so that
            every process of a shared study may call this.
        found: from `find_start`.
        names: ``rate``, ``head_rate``, ``shape`` or ``optimizer`` -> what the objective calls it.
        space: the study's distributions by name; by default those of the trials that it has.
            Where one is known, a rate is clipped to it; a study without trials knows none.
    """
    found, names = _checked("warm_start", found, names)
    known = _seen(study) if space is None else space
    for name in names.values():
        if not known or name in known:
            continue
        unknown = UnknownName("parameter", name, known)
        if space is not None:
            raise unknown
        warnings.warn(f"warm_start: names: no trial so far has had it: {unknown}", stacklevel=2)
    enqueued = []
    for start in found:
        params = {
            name: _fitting(getattr(start, setting), setting, name, known.get(name))
            for setting, name in names.items()
        }
        study.enqueue_trial(params, skip_if_exists=True)
        enqueued.append(params)
    return enqueued


class SteersmanSampler(BaseSampler):
    """Draws a study's first trials around what steered runs found, and then leaves it to ``base``.

    Of the trials with a number below ``trials``, the first ``len(found)`` have exactly what was
    found, the best first; the others take turns with it, the rate log-normal around it (a
    deviation of 0.3 decades, never off by more than 0.6), the same shape and optimizer. Draws
    are clipped to the study's range. Parameters that are not in ``names`` are drawn by ``base``
    from the start, and trials that `warm_start` has enqueued are run as they are.

    A draw depends on the seed and the trial's number alone: processes that share a storage, and
    those that go on after a stop, need to share nothing else.

    Arguments:
        found: from `find_start`.
        base: any sampler; by default TPE, with the same seed.
        names: ``rate``, ``head_rate``, ``shape`` or ``optimizer`` -> what the objective calls it.
            Rates have to be ``suggest_float(..., log=True)``, the others ``suggest_categorical``.
        trials: by default ten, as many as TPE would draw at random.
        seed: of the draws around what was found; by default another one each time.
    """

    def __init__(
        self,
        found: Sequence[Start],
        base: BaseSampler | None = None,
        *,
        names: Names = NAMES,
        trials: int = 10,
        seed: int | None = None,
    ) -> None:
        self._found, names = _checked("sampler", found, names)
        if not isinstance(trials, int) or trials < 1:
            raise BadInput(f"sampler: trials: {trials!r} is not a count; give 1 or more")
        self._settings = {name: setting for setting, name in names.items()}
        self._trials = trials
        self._seed = secrets.randbits(64) if seed is None else seed
        self._base = TPESampler(seed=seed) if base is None else base

    def reseed_rng(self) -> None:
        """For copies in other threads; draws around what was found differ by trial anyway."""
        self._base.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        """The base sampler's; none in the first trials.

        A part of a space would be the whole of it to a sampler that stays with the first one it
        has seen (CMA-ES).
        """
        if trial.number < self._trials:
            return {}
        return self._base.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        """The base sampler's; nothing in the first trials."""
        if trial.number < self._trials:
            return {}
        drawn: dict[str, Any] = self._base.sample_relative(study, trial, search_space)
        return drawn

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """Around what was found, or the base sampler's."""
        if not self._drawn_here(trial, param_name):
            return self._base.sample_independent(study, trial, param_name, param_distribution)
        setting = self._settings[param_name]
        value = getattr(self._found[trial.number % len(self._found)], setting)
        if setting == "rate":
            value *= 10 ** self._decades(trial.number)
        return _fitting(value, setting, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """The base sampler's."""
        self._base.before_trial(study, trial)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """The base sampler's; it warns where no trial so far has had what was named."""
        self._base.after_trial(study, trial, state, values)
        early = trial.number < self._trials and state == TrialState.COMPLETE
        if early and not self._settings.keys() & _seen(study).keys():
            unknown = UnknownName("parameter", next(iter(self._settings)), trial.params)
            warnings.warn(f"sampler: names: {unknown}", stacklevel=2)

    def _drawn_here(self, trial: FrozenTrial, name: str) -> bool:
        return trial.number < self._trials and name in self._settings

    def _decades(self, number: int) -> float:
        if number < len(self._found):
            return 0.0
        drawn = np.random.default_rng([self._seed, number]).normal(0.0, SPREAD)
        return float(np.clip(drawn, -FARTHEST, FARTHEST))


def _checked(
    where: str, found: Sequence[Start], names: Names
) -> tuple[tuple[Start, ...], dict[str, str]]:
    if not found or not all(isinstance(start, Start) for start in found):
        raise BadInput(f"{where}: found: {found!r:.80} holds no start; give what find_start gave")
    for setting in names:
        if setting not in SETTINGS:
            raise UnknownName("setting", setting, SETTINGS)
    if not names or len(set(names.values())) < len(names):
        raise BadInput(f"{where}: names: {dict(names)!r:.80} has none or one twice; name each once")
    return tuple(found), dict(names)


def _seen(study: Study) -> dict[str, Any]:
    """The distributions of a study's trials."""
    trials = study.get_trials(deepcopy=False)
    return {name: kind for trial in trials for name, kind in trial.distributions.items()}


def _fitting(value: Any, setting: str, name: str, distribution: Any) -> Any:
    """The value as the distribution can hold it; `BadInput` if it cannot hold its like."""
    if distribution is None:
        return value
    if setting in RATES:
        if not (isinstance(distribution, FloatDistribution) and distribution.log):
            raise BadInput(
                f"study: {name}: is no logarithmic range, and rates are; "
                f"use suggest_float({name!r}, low, high, log=True)"
            )
        return min(max(value, distribution.low), distribution.high)
    choices = getattr(distribution, "choices", ())
    if not isinstance(distribution, CategoricalDistribution) or value not in choices:
        raise BadInput(
            f"study: {name}: {value!r} is not among its choices {tuple(choices)!r:.80}; "
            f"add it, or leave {setting!r} out of names"
        )
    return value
