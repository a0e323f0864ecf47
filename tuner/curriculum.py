"""Curriculum: simulated runs, then small real ones, then larger ones, by share of the training."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from pydantic import BaseModel, ConfigDict, Field, field_validator

from envs.dials import parse
from envs.env import FineTuneEnv, MakeJob
from envs.errors import BadInput
from envs.hardware import Plan, probe
from envs.knobs import Actions, Optimizer
from envs.lockstep import Lockstep
from envs.packed import family
from envs.start import data_of, open_job
from envs.surrogate import SurrogateVectorEnv
from envs.task import Task, find, reshape
from envs.vector import PackedVectorEnv
from envs.workers import WorkerVectorEnv
from tuner.recorder import Recorder

Algorithm = Literal["ppo", "imitation", "dqn", "q-learning", "sarsa"]
Stage = Literal["surrogate", "tasks", "larger"]
SIMULATED = 512  # runs of the surrogate stepped together
LONGEST = 1000  # factor of a horizon
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class TrainConfig(BaseModel):
    """What to train a tuner on, with which agent, and for how long."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    agent: Algorithm = Field(
        "ppo",
        description="learner: ppo, dqn, q-learning, sarsa; or imitation, which is taught alone",
    )
    budget: str = Field("10m", description="time to train: 90s, 10m, 2h; empty: by iterations")
    iterations: int = Field(
        0, ge=0, le=1_000_000, description="rollouts at most, each of whole episodes; 0: no limit"
    )
    tasks: tuple[str | dict[str, Any], ...] = Field(
        ("trec6", "trec50", "sms", "movie", "amazon", "tweets"),
        description="training tasks to draw from",
    )
    larger: tuple[str | dict[str, Any], ...] = Field(
        (), description="tasks of the last stage, on larger models for one"
    )
    imitate: bool = Field(
        False, description="first learn what the best recorded schedule would do; not for dqn"
    )
    rate: float = Field(1e-3, gt=0, le=1, description="learning rate of ppo and dqn at the start")
    surrogate: float = Field(
        0.15, ge=0, lt=1, description="share of the training on simulated runs"
    )
    last: float = Field(0.25, ge=0, le=1, description="share of the last stage, if it has tasks")
    episodes: int = Field(2, ge=1, le=100, description="episodes of an environment in a rollout")
    envs: int = Field(64, ge=1, le=4096, description="environments stepped together")
    group: int = Field(
        8, ge=1, le=256, description="environments with the same episodes, for ppo to compare"
    )
    workers: int = Field(2, ge=0, le=256, description="processes that share them; 0: this one")
    pack: int = Field(0, ge=0, le=4096, description="runs in one batched model; 0: measured")
    compile: bool = Field(False, description="compile that model; with pack 0 if it pays")
    steps: int = Field(50, ge=1, description="updates in an episode, before it is varied")
    interval: int = Field(5, ge=1, description="updates between two decisions")
    length: int = Field(24, ge=4, description="tokens of a text")
    validation: int = Field(128, ge=8, description="rows that reward and observation come from")
    spread: float = Field(1.5, ge=0, le=3, description="decades of misjudged starting rates")
    vary: bool = Field(True, description="draw classes, rows and label noise too")
    batches: tuple[int, ...] = Field((16,), description="batch sizes, in turn over packs")
    horizons: tuple[float, ...] = Field(
        (0.6, 1.0, 1.0, 1.5), description="factors of steps and interval, in turn likewise"
    )
    blind: float = Field(0.1, ge=0, le=1, description="share of episodes without validation")
    view: Literal["discrete", "continuous"] = Field("discrete", description="action view")
    multipliers: tuple[float, ...] = Field(
        (0.1, 0.3, 1.0, 3.0), description="what an action may multiply the rate by"
    )
    rollback: bool = Field(True, description="an action puts the best weights back")
    starts: tuple[Optimizer, ...] = Field(
        ("adamw",), description="optimizers that runs start with, drawn: adamw, sgd, rmsprop"
    )
    optimizers: tuple[Optimizer, ...] = Field(
        (), description="optimizers that an action may switch to, of classification: sgd, rmsprop"
    )
    turns: tuple[str, ...] = Field(
        (), description="steps of further knobs, as 'weight_decay x3' or 'depth -1'"
    )
    opens: tuple[str, ...] = Field(
        (), description="what runs are opened with, as 'head_rate x10': a new head's own rate"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything")

    @field_validator("budget")
    @classmethod
    def _time(cls, value: str) -> str:
        number = value[:-1].replace(".", "", 1)
        if value and not (value[-1] in UNITS and number.isdigit() and float(value[:-1]) > 0):
            raise ValueError("not a time; give one as 90s, 10m or 2h")
        return value

    @field_validator("horizons")
    @classmethod
    def _factors(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < factor <= LONGEST for factor in value):
            raise ValueError(f"not factors; give numbers above 0, at most {LONGEST}")
        return value

    @property
    def seconds(self) -> float:
        """The budget in seconds; 0 if there is none."""
        return float(self.budget[:-1]) * UNITS[self.budget[-1]] if self.budget else 0.0

    def task_list(self, stage: Stage = "tasks") -> list[Task]:
        """The tasks of a stage with this configuration's horizon."""
        names = self.larger if stage == "larger" else self.tasks
        if not names:
            raise BadInput("train: tasks: none given; name at least one")
        changes = {"steps": self.steps, "interval": self.interval, "max_length": self.length,
                   "validation_rows": self.validation}  # fmt: skip
        return [find(name, **_unless_given(name, changes)) for name in names]

    def relatives(self, number: int, stage: Stage = "tasks") -> list[Task]:
        """The tasks of one environment: those that share a pack have one batch size and horizon."""
        if not self.batches or not self.horizons:
            raise BadInput("train: batches, horizons: none given; give at least one of each")
        kind = number // self.group // max(1, self.pack // self.group)
        sizes = len(self.batches)
        horizon = self.horizons[kind // sizes % len(self.horizons)]
        return [reshape(t, self.batches[kind % sizes], horizon) for t in self.task_list(stage)]

    def actions(self) -> Actions:
        """The action view."""
        if self.view == "continuous" and self.agent != "ppo":
            raise BadInput(f"train: view: {self.agent} acts discretely; use ppo or discrete")
        return Actions(
            self.view,
            self.multipliers,
            self.rollback,
            self.optimizers,
            turns=tuple(map(parse, self.turns)),
            opens=tuple(map(parse, self.opens)),
        )

    def check(self) -> None:
        """Raise `BadInput` for what only becomes wrong together, and for data that are no use."""
        if not self.starts:
            raise BadInput("train: starts: none given; name at least one optimizer")
        if not self.budget and not self.iterations and self.agent != "imitation":
            raise BadInput("train: budget, iterations: both empty; give how long to train")
        if self.workers and self.envs % self.workers:
            raise BadInput(
                f"train: envs: {self.envs} do not share out over {self.workers} workers evenly; "
                "give a multiple"
            )
        if self.imitate and (self.agent == "dqn" or self.view != "discrete"):
            raise BadInput(
                f"train: imitate: {self.agent} with {self.view} actions cannot; use ppo, "
                "q-learning or sarsa with discrete ones, or leave it out"
            )
        if self.agent in ("ppo", "imitation") and self.envs % self.group:
            raise BadInput(
                f"train: envs: {self.envs} do not share out over groups of {self.group} evenly; "
                "give a multiple"
            )
        tasks = self.task_list() + (self.task_list("larger") if self.larger else [])
        own = next((task for task in tasks if task.objective != "classification"), None)
        if self.optimizers and own is not None:
            raise BadInput(
                f"train: optimizers: {own.name} has a Trainer's optimizer, which cannot be "
                "switched; leave it or them out"
            )
        self.actions()
        for task in tasks:
            data_of(task)

    @property
    def updates(self) -> float:
        """Updates of single runs that a process may make, at the speed of a laptop."""
        by_time = self.seconds / 2e-3 or math.inf
        episodes = self.iterations * self.episodes * self.envs / max(1, self.workers)
        return min(by_time, episodes * self.steps or math.inf)

    def stage(self, share: float) -> Stage:
        """The stage at a share of the training, 0 to 1."""
        if share < self.surrogate:
            return "surrogate"
        return "larger" if self.larger and share >= 1 - self.last else "tasks"


class Curriculum:
    """The environments of each stage, opened when they are first needed."""

    def __init__(self, config: TrainConfig, plan: Plan) -> None:
        self._config = config.model_copy(update={"pack": plan.pack})
        self._plan = plan
        self._open: dict[Stage, Recorder] = {}

    def envs(self, stage: Stage) -> Recorder:
        """The environments of a stage, recorded."""
        if stage not in self._open:
            self._open[stage] = Recorder(_make(self._config, self._plan, stage))
        return self._open[stage]

    def close(self) -> None:
        """Stop everything."""
        for envs in self._open.values():
            envs.close()


def plan_of(config: TrainConfig) -> Plan:
    """How to compute the runs: as configured, or by a short measured probe."""
    if config.pack:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Plan(device, config.pack, compiled=config.compile)
    most = max(1, config.envs // max(1, config.workers))
    return probe(config.relatives(0)[0], updates=config.updates, most=most)


@contextmanager
def opened(config: TrainConfig, plan: Plan) -> Iterator[Curriculum]:
    """The curriculum of a configuration; closed at the end."""
    curriculum = Curriculum(config, plan)
    try:
        yield curriculum
    finally:
        curriculum.close()


def _make(config: TrainConfig, plan: Plan, stage: Stage) -> VectorEnv:
    if stage == "surrogate":
        return SurrogateVectorEnv(
            SIMULATED, actions=config.actions(), decisions=config.task_list()[0].decisions,
            interval=config.interval, spread=config.spread, vary=config.vary, shape="any",
            optimizers=config.starts, blind=config.blind,
        )  # fmt: skip
    for task in config.task_list(stage):  # read once here; forked processes share the memory
        data_of(task)
    if not config.workers:
        return _part(config, plan, stage, range(config.envs))
    lockstep = _lockstep(config, plan, stage)
    families = {
        family(task)._replace(interval=0): task
        for number in range(0, config.envs, config.pack)
        for task in config.relatives(number, stage)
    }
    for task in families.values():
        lockstep.warm(task)
    size = config.envs // config.workers
    parts = [partial(_part, config, plan, stage, range(i * size, (i + 1) * size))
             for i in range(config.workers)]  # fmt: skip
    return WorkerVectorEnv(parts, _make_env(config, stage, 0, open_job), size)


def _part(config: TrainConfig, plan: Plan, stage: Stage, numbers: Iterable[int]) -> PackedVectorEnv:
    """Some of the environments, computed in one process."""
    makes = [partial(_make_env, config, stage, number) for number in numbers]
    return PackedVectorEnv(makes, _lockstep(config, plan, stage))


def _lockstep(config: TrainConfig, plan: Plan, stage: Stage) -> Lockstep:
    classes = max(len(data_of(task).classes) for task in config.task_list(stage))
    return Lockstep(plan, classes=classes)


def _make_env(config: TrainConfig, stage: Stage, number: int, make_job: MakeJob) -> FineTuneEnv:
    return FineTuneEnv(
        config.relatives(number, stage),
        actions=config.actions(),
        spread=config.spread,
        vary=config.vary,
        optimizers=config.starts,
        blind=config.blind,
        shape="any",
        make_job=make_job,
    )


def _unless_given(name: str | Mapping[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A task given by its fields keeps those that it has."""
    return {k: v for k, v in changes.items() if isinstance(name, str) or k not in name}


def iteration_seed(seed: int, number: int) -> int:
    """An independent 31-bit seed for each iteration."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)
