"""train(config) -> Policy: read this first.

Episodes of fine-tuning go in, a policy artifact comes out. Every iteration starts with fresh
episodes seeded by its number, so that a training that was killed resumes from its last
checkpoint to the same final weights.
"""

import io
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from pydantic import BaseModel, ConfigDict, Field

from baselines.identity import code_version
from envs import observe, workload
from envs.env import FineTuneEnv, MakeJob
from envs.errors import BadInput
from envs.files import write_atomic
from envs.job import TorchJob
from envs.knobs import Actions
from envs.lockstep import Lockstep
from envs.task import Task, find, reshape
from envs.vector import PackedVectorEnv
from envs.workers import WorkerVectorEnv
from tuner import policy
from tuner.agent import Agent, Normaliser
from tuner.policy import Policy
from tuner.recorder import Recorder
from tuner.tabular import TabularAgent, TabularConfig, q_learning, sarsa

Algorithm = Literal["ppo", "dqn", "q-learning", "sarsa"]
SURVEY = 2  # random episodes of each environment that fix the normaliser
CONSTANT = 1e-3  # a feature that deviates less in training is mute: nothing was learned of it
MUTE = 1e6  # the deviation that a mute feature is divided by
FLOOR = 0.05  # least deviation of any other


class TrainConfig(BaseModel):
    """What to train a tuner on, with which agent, and for how long."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    agent: Algorithm = Field("ppo", description="learner: ppo, dqn, q-learning or sarsa")
    tasks: tuple[str | dict[str, Any], ...] = Field(
        ("trec6", "trec50", "sms", "movie", "amazon", "tweets"),
        description="training tasks to draw from",
    )
    iterations: int = Field(60, ge=1, le=100_000, description="rollouts, each of whole episodes")
    episodes: int = Field(2, ge=1, le=100, description="episodes of an environment in a rollout")
    envs: int = Field(64, ge=1, le=4096, description="environments stepped together")
    workers: int = Field(2, ge=0, le=256, description="processes that share them; 0: this one")
    pack: int = Field(8, ge=1, le=4096, description="runs computed in one batched model")
    compile: bool = Field(False, description="compile the batched model: pays in long trainings")
    steps: int = Field(50, ge=1, description="updates in an episode, before it is varied")
    interval: int = Field(5, ge=1, description="updates between two decisions")
    spread: float = Field(1.5, ge=0, le=3, description="decades of misjudged starting rates")
    vary: bool = Field(True, description="draw classes, rows and label noise too")
    batches: tuple[int, ...] = Field((16,), description="batch sizes, in turn over environments")
    horizons: tuple[float, ...] = Field(
        (0.6, 1.0, 1.0, 1.5), description="factors of steps and interval, in turn likewise"
    )
    blind: float = Field(0.1, ge=0, le=1, description="share of episodes without validation")
    view: Literal["discrete", "continuous"] = Field("discrete", description="action view")
    multipliers: tuple[float, ...] = Field(
        (0.1, 0.3, 1.0, 3.0), description="what an action may multiply the rate by"
    )
    minutes: float = Field(0.0, ge=0, description="stop after so many minutes; 0: no limit")
    seed: int = Field(0, ge=0, description="seed of everything")

    def task_list(self) -> list[Task]:
        """The tasks with this configuration's horizon."""
        if not self.tasks:
            raise BadInput("train: tasks: none given; name at least one")
        return [find(name, steps=self.steps, interval=self.interval) for name in self.tasks]

    def relatives(self, number: int) -> list[Task]:
        """The tasks of one environment: those that share a pack have one batch size and horizon."""
        if not self.batches or not self.horizons:
            raise BadInput("train: batches, horizons: none given; give at least one of each")
        kind, block = number // self.pack, len(self.batches)
        batch, horizon = (
            self.batches[kind % block],
            self.horizons[kind // block % len(self.horizons)],
        )
        return [reshape(task, batch, horizon) for task in self.task_list()]

    def actions(self) -> Actions:
        """The action view."""
        if self.view == "continuous" and self.agent != "ppo":
            raise BadInput(f"train: view: {self.agent} acts discretely; use ppo or discrete")
        return Actions(view=self.view, multipliers=self.multipliers)


def train(
    config: TrainConfig,
    out: Path,
    on_iteration: Callable[[int, dict[str, Any]], None] | None = None,
) -> Policy:
    """Train a tuner; write ``policy.safetensors``, ``train.jsonl`` and a checkpoint to ``out``.

    Called again with the same configuration it resumes; with another it refuses.
    """
    saved = _load_checkpoint(out / "checkpoint.pt", config)
    with open_envs(config) as envs:
        recorder = Recorder(envs)
        if saved is None:
            normaliser = survey(recorder, config.seed)
        else:
            normaliser = Normaliser(saved["mean"].numpy(), saved["deviation"].numpy())
            recorder.low, recorder.high = saved["low"].numpy(), saved["high"].numpy()
        agent = make_agent(config, recorder, normaliser)
        rows: list[dict[str, Any]] = []
        if saved is not None:
            agent.load(saved["agent"])
            rows = json.loads(saved["rows"])
        while len(rows) < config.iterations and not _out_of_time(config, rows):
            began, number = time.perf_counter(), len(rows)
            recorder.forget()
            share = number / config.iterations
            figures = agent.learn(recorder, iteration_seed(config.seed, number), share)
            rows.append(_row(number, recorder, config, figures, time.perf_counter() - began))
            _save_checkpoint(out, config, agent, recorder, normaliser, rows)
            if on_iteration is not None:
                on_iteration(number + 1, rows[-1])
    result = make_policy(config, agent, recorder, normaliser, rows)
    policy.save(result, out / "policy.safetensors")
    return policy.load(out / "policy.safetensors")


@contextmanager
def open_envs(config: TrainConfig) -> Iterator[VectorEnv]:
    """The training environments in packs, shared out over processes; closed at the end."""
    if config.workers and config.envs % config.workers:
        raise BadInput(
            f"train: envs: {config.envs} do not share out over {config.workers} workers evenly; "
            "give a multiple"
        )
    for task in config.task_list():  # read once here; forked processes share the memory
        workload.load(task)
    if config.workers:
        size = config.envs // config.workers
        parts = [partial(_part, config, range(i * size, (i + 1) * size))
                 for i in range(config.workers)]  # fmt: skip
        envs: VectorEnv = WorkerVectorEnv(parts, _make_env(config, 0, TorchJob), size)
    else:
        envs = _part(config, range(config.envs))
    try:
        yield envs
    finally:
        envs.close()


def _part(config: TrainConfig, numbers: Iterable[int]) -> PackedVectorEnv:
    """Some of the environments, computed in one process."""
    classes = max(len(workload.load(task).classes) for task in config.task_list())
    lockstep = Lockstep(config.pack, classes=classes, compiled=config.compile)
    return PackedVectorEnv([partial(_make_env, config, i) for i in numbers], lockstep)


def _make_env(config: TrainConfig, number: int, make_job: MakeJob) -> FineTuneEnv:
    return FineTuneEnv(
        config.relatives(number),
        actions=config.actions(),
        spread=config.spread,
        vary=config.vary,
        blind=config.blind,
        shape="any",
        make_job=make_job,
    )


def survey(recorder: Recorder, seed: int) -> Normaliser:
    """Random episodes -> the normaliser, frozen from then on."""
    space = recorder.action_space
    space.seed(iteration_seed(seed, 2**20))
    recorder.reset(seed=iteration_seed(seed, 2**20))
    while len(recorder.returns) < SURVEY * recorder.num_envs:
        recorder.step(space.sample())
    seen = np.concatenate(recorder.seen).astype(np.float64)
    deviation = np.where(seen.std(0) < CONSTANT, MUTE, np.maximum(seen.std(0), FLOOR))
    return Normaliser(seen.mean(0).astype(np.float32), deviation.astype(np.float32))


def make_agent(config: TrainConfig, envs: VectorEnv, normaliser: Normaliser) -> Agent:
    """The learner that a configuration asks for."""
    if config.agent in ("q-learning", "sarsa"):
        target = q_learning if config.agent == "q-learning" else sarsa
        actions, tabular = config.actions(), TabularConfig(episodes=config.episodes)
        return TabularAgent(target, actions.size, actions.keep, tabular)
    from tuner.sb3 import DQNAgent, DQNConfig, PPOAgent, PPOConfig

    decisions = config.task_list()[0].decisions
    if config.agent == "ppo":
        keep = config.actions().keep if config.view == "discrete" else None
        return PPOAgent(envs, decisions, normaliser, PPOConfig(episodes=config.episodes), keep)
    return DQNAgent(envs, decisions, normaliser, DQNConfig(episodes=config.episodes))


def make_policy(
    config: TrainConfig,
    agent: Agent,
    recorder: Recorder,
    normaliser: Normaliser,
    rows: list[dict[str, Any]],
) -> Policy:
    """The artifact: what was learned, with where it came from."""
    network, arrays = agent.network()
    mute = normaliser.deviation >= MUTE
    features = [
        {
            "name": feature.name,
            "unit": feature.unit,
            "mean": float(normaliser.mean[i]),
            "deviation": float(normaliser.deviation[i]),
            "low": -observe.LIMIT if mute[i] else float(recorder.low[i]),
            "high": observe.LIMIT if mute[i] else float(recorder.high[i]),
        }
        for i, feature in enumerate(observe.FEATURES)
    ]
    tasks = config.task_list()
    last = rows[-max(1, len(rows) // 5) :]
    provenance = {
        "config": config.model_dump(mode="json"),
        "data": {task.name: workload.load(task).fingerprint for task in tasks},
        "episodes": sum(row["episodes"] for row in rows),
        "decisions": sum(row["decisions"] for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "final_return": float(np.mean([row["return_mean"] for row in last])),
        "versions": {name: version(name) for name in ("torch", "transformers", "gymnasium")},
        "threads": torch.get_num_threads(),
    }
    return policy.make(
        arrays=arrays,
        algorithm=config.agent,
        features=features,
        network=network,
        actions=config.actions(),
        decisions=tasks[0].decisions,
        start_decades=config.spread,
        provenance=provenance,
    )


def iteration_seed(seed: int, number: int) -> int:
    """An independent 31-bit seed for each iteration."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


def _row(
    number: int,
    recorder: Recorder,
    config: TrainConfig,
    figures: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    returns = np.array(recorder.returns or [np.nan])
    error = 1.96 * returns.std() / np.sqrt(len(returns))
    return {
        "iteration": number,
        "episodes": len(recorder.returns),
        "decisions": config.envs * config.episodes * config.task_list()[0].decisions,
        "return_mean": float(returns.mean()),
        "return_low": float(returns.mean() - error),
        "return_high": float(returns.mean() + error),
        "metric_mean": float(np.mean(recorder.metrics or [np.nan])),
        "divergences": int(recorder.divergences),
        "seconds": seconds,
        **figures,
    }


def _out_of_time(config: TrainConfig, rows: list[dict[str, Any]]) -> bool:
    return bool(config.minutes) and sum(row["seconds"] for row in rows) > 60 * config.minutes


def _save_checkpoint(
    out: Path,
    config: TrainConfig,
    agent: Agent,
    recorder: Recorder,
    normaliser: Normaliser,
    rows: list[dict[str, Any]],
) -> None:
    """One file holds all, so that a crash leaves the old state or the new, never a mix."""
    stream = io.BytesIO()
    torch.save(
        {
            "config": config.model_dump_json(),
            "made_with": _made_with(config),
            "threads": torch.get_num_threads(),
            "agent": agent.state(),
            "mean": torch.from_numpy(normaliser.mean),
            "deviation": torch.from_numpy(normaliser.deviation),
            "low": torch.from_numpy(recorder.low),
            "high": torch.from_numpy(recorder.high),
            "rows": json.dumps(rows),
        },
        stream,
    )
    write_atomic(out / "checkpoint.pt", stream.getvalue())
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(out / "train.jsonl", lines.encode())


def _made_with(config: TrainConfig) -> dict[str, str]:
    """What else decides the weights: code, libraries and data."""
    data = {task.name: workload.load(task).fingerprint for task in config.task_list()}
    libraries = {name: version(name) for name in ("torch", "transformers", "stable-baselines3")}
    return {"code": code_version("tuner.train")} | libraries | data


def _load_checkpoint(path: Path, config: TrainConfig) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        known = TrainConfig.model_validate_json(saved["config"])
    except Exception as error:
        raise BadInput(f"{path}: not a checkpoint of this program; move it away") from error
    # More of the same is the same training; anything else is another one.
    changed = {"iterations", "minutes"}
    if known.model_dump(exclude=changed) != config.model_dump(exclude=changed):
        raise BadInput(f"{path}: made with another configuration; choose another --out")
    if saved["made_with"] != _made_with(config):
        raise BadInput(f"{path}: made with other code or data; choose another --out")
    if saved["threads"] != torch.get_num_threads():
        raise BadInput(
            f"{path}: made with {saved['threads']} threads, now {torch.get_num_threads()}; "
            "an exact resume needs the same number"
        )
    return saved
