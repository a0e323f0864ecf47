"""train(config) -> Policy: read this first.

Episodes of fine-tuning go in, a policy artifact comes out. Every iteration starts with fresh
episodes seeded by its number, so that a training that was killed resumes from its last
checkpoint to the same final weights.
"""

import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from baselines.identity import code_version
from envs import observe
from envs.errors import BadInput
from envs.files import make_folder, write_atomic
from envs.hardware import Plan
from envs.start import data_of
from tuner import policy
from tuner.agent import Agent, Normaliser
from tuner.curriculum import TrainConfig, iteration_seed, opened, plan_of
from tuner.imitation import lessons
from tuner.policy import Policy
from tuner.recorder import Recorder
from tuner.tabular import TabularAgent, TabularConfig, q_learning, sarsa

SURVEY = 2  # random episodes of each environment that fix the normaliser
CONSTANT = 1e-3  # a feature that deviates less in training is mute: nothing was learned of it
MUTE = 1e6  # the deviation that a mute feature is divided by
FLOOR = 0.05  # least deviation of any other
TAUGHT = 0.2  # exploration of a table at the start, when it has been shown what to do


def train(
    config: TrainConfig,
    out: Path,
    on_iteration: Callable[[float, dict[str, Any]], None] | None = None,
) -> Policy:
    """Train a tuner; write ``policy.safetensors``, ``train.jsonl`` and a checkpoint to ``out``.

    Called again with the same configuration it resumes; with another it refuses.
    """
    config.check()
    make_folder(out)
    saved = _load_checkpoint(out / "checkpoint.pt", config)
    plan = plan_of(config) if saved is None else Plan(**json.loads(saved["plan"]))
    with opened(config, plan) as curriculum:
        real = curriculum.envs("tasks")
        if saved is None:
            normaliser = survey(real, config.seed)
        else:
            normaliser = Normaliser(saved["mean"].numpy(), saved["deviation"].numpy())
            real.low, real.high = saved["low"].numpy(), saved["high"].numpy()
        rows: list[dict[str, Any]] = [] if saved is None else json.loads(saved["rows"])
        if saved is not None:
            _write_rows(out, rows)  # it may have been killed between the checkpoint and these
        learned = None if saved is None else saved["agent"]
        agent, stage, lesson = None, None, 0.0
        while agent is None or done(config, rows) < 1:
            share, began = done(config, rows), time.perf_counter()
            if agent is None or stage != config.stage(share):
                stage = config.stage(share)
                recorder = curriculum.envs(stage)
                learned = learned if agent is None else agent.state()
                agent = make_agent(config, recorder, normaliser)
                if learned is not None:
                    agent.load(learned)
                elif config.imitate or config.agent == "imitation":
                    decisions = config.task_list()[0].decisions
                    shown = lessons(config.actions(), decisions, config.seed, config.starts)
                    cast(Any, agent).imitate(*shown, config.seed)
                    lesson = time.perf_counter() - began
                continue  # a finished training that is repeated learns no more
            recorder.forget()
            figures = agent.learn(recorder, iteration_seed(config.seed, len(rows)), share)
            rows.append(_row(len(rows), stage, recorder, figures, time.perf_counter() - began))
            if lesson:  # no part of the budget, but of the cost
                rows[-1]["lesson"], lesson = lesson, 0.0
            _save_checkpoint(out, config, plan, agent, real, normaliser, rows)
            if on_iteration is not None:
                on_iteration(done(config, rows), rows[-1])
        if not rows:  # taught alone
            _save_checkpoint(out, config, plan, agent, real, normaliser, rows)
        result = make_policy(config, plan, agent, real, normaliser, rows)
    policy.save(result, out / "policy.safetensors")
    return policy.load(out / "policy.safetensors")


def done(config: TrainConfig, rows: list[dict[str, Any]]) -> float:
    """The share of the training that is done: of the iterations or of the time."""
    if config.agent == "imitation":
        return 1.0  # it makes no episodes
    seconds = sum(row["seconds"] for row in rows)
    return max(
        len(rows) / config.iterations if config.iterations else 0.0,
        seconds / config.seconds if config.seconds else 0.0,
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
        if config.imitate:
            tabular = replace(tabular, explore_from=TAUGHT)
        return TabularAgent(target, actions.size, actions.keep, tabular)
    from tuner.sb3 import DQNAgent, DQNConfig, PPOAgent, PPOConfig

    decisions = config.task_list()[0].decisions
    if config.agent in ("ppo", "imitation"):
        keep = config.actions().keep if config.view == "discrete" else None
        settings = PPOConfig(episodes=config.episodes, rate=config.rate, group=config.group)
        return PPOAgent(envs, decisions, normaliser, settings, keep)
    return DQNAgent(
        envs, decisions, normaliser, DQNConfig(episodes=config.episodes, rate=config.rate)
    )


def make_policy(
    config: TrainConfig,
    plan: Plan,
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
        "data": {task.name: data_of(task).fingerprint for task in tasks},
        "episodes": sum(row["episodes"] for row in rows),
        "decisions": sum(row["decisions"] for row in rows),
        "seconds": round(sum(row["seconds"] + row.get("lesson", 0.0) for row in rows), 1),
        "final_return": float(np.mean([row["return_mean"] for row in last])) if last else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "gymnasium")},
        "threads": torch.get_num_threads(),
        "plan": asdict(plan),
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


def _row(
    number: int, stage: str, recorder: Recorder, figures: dict[str, float], seconds: float
) -> dict[str, Any]:
    returns = np.array(recorder.returns or [np.nan])
    error = 1.96 * returns.std() / np.sqrt(len(returns))
    return {
        "iteration": number,
        "stage": stage,
        "episodes": len(recorder.returns),
        "decisions": recorder.decisions,
        "return_mean": float(returns.mean()),
        "return_low": float(returns.mean() - error),
        "return_high": float(returns.mean() + error),
        "metric_mean": float(np.mean(recorder.metrics or [np.nan])),
        "divergences": int(recorder.divergences),
        "seconds": seconds,
        **figures,
    }


def _save_checkpoint(
    out: Path,
    config: TrainConfig,
    plan: Plan,
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
            "plan": json.dumps(asdict(plan)),
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
    _write_rows(out, rows)


def _write_rows(out: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(out / "train.jsonl", lines.encode())


def _made_with(config: TrainConfig) -> dict[str, str]:
    """What else decides the weights: code, libraries and data."""
    data = {task.name: data_of(task).fingerprint for task in config.task_list()}
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
    changed = {"iterations", "budget"}
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
