"""Learners at equal time: which one, how large a network, what reward, how much training.

    python benchmarks/learners.py [--only NAME ...] [--out DIR] [--seeds N] [--seconds S]
                                 [--job-seeds N]

All learn from simulated runs (`envs.surrogate`) alone, with the actions and through the normaliser
of the shipped tuner, each for the same processor time. Judged is the greedy policy, twice: by its
return on simulated runs that none learned from, and by the test scores of the real runs for
choosing (`experiments.judge`; no held-out corpus). A command that is repeated goes on where it
stopped; figures go to results/learners.json, what was learned and the ledger of real runs stay in
DIR. `docs/experiments.md` tells what was concluded.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import many_agents
import numpy as np
import torch
from evolution import EvolutionAgent, EvolutionConfig
from experiments import figures, judge, rivals
from gymnasium.vector import VectorEnv, VectorWrapper
from numpy.typing import NDArray
from record import merge
from recurrent import Memory, RecurrentAgent, RecurrentMethod, network_of

from baselines.ledger import key_of
from baselines.method import Method
from envs.files import write_atomic
from envs.knobs import Actions
from envs.surrogate import SurrogateVectorEnv
from tuner import policy
from tuner.agent import Agent, Normaliser
from tuner.curriculum import SIMULATED, iteration_seed
from tuner.evaluate import PolicyMethod
from tuner.imitation import lessons
from tuner.policy import DEFAULT, PLACES, Policy
from tuner.sb3 import DQNAgent, DQNConfig, PPOAgent, PPOConfig
from tuner.tabular import TabularAgent, TabularConfig, q_learning, sarsa

DECISIONS, JUDGED = 10, 4096  # of a run; simulated runs that all are judged by
BASE, FIXED = "PPO", "-0.25 decades"  # what the others are set against
DECADES = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5)  # what one rate for every job may be

Learner = Literal["ppo", "imitation", "recurrent", "evolution", "dqn", "q-learning", "sarsa"]
Act = Callable[[NDArray[np.float32]], NDArray[np.int64]]


@dataclass(frozen=True)
class Variant:
    """A learner, and what is changed of it."""

    learner: Learner
    times: float = 1.0  # of the time that the others have
    shown: bool = False  # first shown the best recorded schedule
    rate: float = 1e-3  # of PPO; 3e-4 after imitation, as shipped
    layers: tuple[int, ...] = (64, 64)
    group: int = 8  # episodes of the same job that PPO compares; 1: each by its own return
    # All is paid at the end of an episode: for the last loss, or for the lowest on the way.
    at_the_end: bool | Literal["lowest"] = False


VARIANTS: Mapping[str, Variant] = {
    BASE: Variant("ppo"),
    "PPO, shown first": Variant("ppo", shown=True, rate=3e-4),
    "shown, nothing learned": Variant("imitation", shown=True),
    "RecurrentPPO": Variant("recurrent"),
    "evolution strategies": Variant("evolution"),
    "DQN": Variant("dqn"),
    "Q-learning": Variant("q-learning"),
    "SARSA": Variant("sarsa"),
    "PPO, 2 x 32": Variant("ppo", layers=(32, 32)),
    "PPO, 2 x 128": Variant("ppo", layers=(128, 128)),
    "PPO, each by its own return": Variant("ppo", group=1),
    "PPO, own return, paid at the end": Variant("ppo", group=1, at_the_end=True),
    "Q-learning, paid at the end": Variant("q-learning", at_the_end=True),
    "PPO, paid for the lowest loss": Variant("ppo", at_the_end="lowest"),
    "PPO, four times the time": Variant("ppo", times=4.0),
    "RecurrentPPO, four times the time": Variant("recurrent", times=4.0),
    "evolution, four times the time": Variant("evolution", times=4.0),
    "PPO, paid for the lowest loss, four times the time": Variant(
        "ppo", times=4.0, at_the_end="lowest"
    ),
}


class AtTheEnd(VectorWrapper):
    """Pays nothing before an episode's last step, and then what its rewards came to.

    lowest: or the most that they came to on the way: as a reward is the rise of a potential of the
    validation loss, that is what the checkpoint with the lowest loss is worth.
    """

    def __init__(self, envs: VectorEnv, lowest: bool = False) -> None:
        super().__init__(envs)
        self._lowest = lowest
        self._sums = np.zeros(self.num_envs)
        self._most = np.full(self.num_envs, -np.inf)

    def reset(self, **given: Any) -> Any:
        """Begin new episodes."""
        self._forget(np.ones(self.num_envs, dtype=bool))
        return self.env.reset(**given)

    def step(self, actions: Any) -> Any:
        """Step all."""
        seen, rewards, terminated, truncated, info = self.env.step(actions)
        self._sums += rewards
        self._most = np.maximum(self._most, self._sums)
        over = terminated | truncated
        paid = np.where(over, self._most if self._lowest else self._sums, 0.0)
        self._forget(over)
        return seen, paid, terminated, truncated, info

    def _forget(self, which: NDArray[np.bool_]) -> None:
        self._sums[which], self._most[which] = 0.0, -np.inf


@dataclass(frozen=True)
class Trained:
    """An agent that has learned, with what it took."""

    name: str
    file: Path
    facts: Mapping[str, Any]


def simulated(actions: Actions, runs: int) -> SurrogateVectorEnv:
    """Simulated runs as `tuner.train` has them: 100 updates, every kind of job."""
    return SurrogateVectorEnv(
        runs, actions=actions, decisions=DECISIONS, interval=10, shape="any", blind=0.1
    )


def look_of(frame: Policy) -> Normaliser:
    """The normaliser of a policy."""
    pairs = [(each.mean, each.deviation) for each in frame.manifest.features]
    mean, deviation = np.array(pairs, np.float32).T
    return Normaliser(mean, deviation)


def make_agent(variant: Variant, envs: VectorEnv, frame: Policy, seed: int) -> Any:
    """The learner, which has learned nothing yet but what it is shown."""
    actions, look = frame.manifest.actions, look_of(frame)
    if variant.learner in ("q-learning", "sarsa"):
        target = q_learning if variant.learner == "q-learning" else sarsa
        return TabularAgent(target, actions.size, actions.keep, TabularConfig(episodes=2))
    if variant.learner == "dqn":
        return DQNAgent(envs, DECISIONS, look, DQNConfig(episodes=2, layers=variant.layers))
    settings = PPOConfig(episodes=2, rate=variant.rate, layers=variant.layers, group=variant.group)
    torch.manual_seed(seed)
    if variant.learner == "recurrent":
        return RecurrentAgent(envs, DECISIONS, look, settings, actions.keep)
    keep = None if variant.learner == "evolution" else actions.keep
    agent = PPOAgent(envs, DECISIONS, look, settings, keep)
    if variant.learner == "evolution":
        return EvolutionAgent(agent.network()[1], look, EvolutionConfig())
    if variant.shown:
        agent.imitate(*lessons(actions, DECISIONS, seed), seed)
    return agent


def learn(name: str, seconds: float, seed: int, frame: Policy, out: Path) -> Trained:
    """An agent trained for some processor time, or as it was found in ``out``."""
    variant = VARIANTS[name]
    told = {"variant": asdict(variant), "seconds": seconds, "seed": seed, "frame": frame.sha256}
    key = key_of(told)[:12]
    file, facts = out / f"{key}.safetensors", out / f"{key}.json"
    if not facts.exists():
        out.mkdir(parents=True, exist_ok=True)
        envs: VectorEnv = simulated(frame.manifest.actions, SIMULATED)
        if variant.at_the_end:
            envs = AtTheEnd(envs, lowest=variant.at_the_end == "lowest")
        budget, rounds = seconds * variant.times, 0
        began = time.process_time()
        agent = make_agent(variant, envs, frame, seed)  # what it is shown costs time as well
        while variant.learner != "imitation" and (gone := time.process_time() - began) < budget:
            agent.learn(envs, iteration_seed(seed, rounds), gone / budget)
            rounds += 1
        took = {"rounds": rounds, "seconds": round(time.process_time() - began, 1)}
        if isinstance(agent, RecurrentAgent):
            agent.save(file)
        else:
            policy.save(artifact(variant, agent, frame, told), file)
        write_atomic(facts, json.dumps(told | took | {"name": name}).encode())
        print(name, seed, took, flush=True)
    return Trained(f"{key} {seed}", file, json.loads(facts.read_text()))


def artifact(variant: Variant, agent: Agent, frame: Policy, told: Mapping[str, Any]) -> Policy:
    """What was learned, in the frame of the shipped tuner: its envelope and normaliser."""
    network, arrays = agent.network()
    manifest = frame.manifest
    return policy.make(
        arrays=arrays, algorithm=variant.learner, features=manifest.features, network=network,
        actions=manifest.actions, decisions=DECISIONS, start_decades=manifest.start_decades,
        provenance=json.loads(json.dumps(told)),
    )  # fmt: skip


def act_of(agent: Trained, frame: Policy) -> Act:
    """Greedy actions for rows of observations of runs that begin together."""
    if agent.facts["variant"]["learner"] == "recurrent":
        return Memory(network_of(agent.file, frame.manifest.actions), look_of(frame))
    learned = policy.load(agent.file)
    return lambda seen: np.array([learned.act(row) for row in seen])


def method_of(agent: Trained, frame: Policy) -> Method:
    """The agent as a contestant on real runs."""
    if agent.facts["variant"]["learner"] == "recurrent":
        return RecurrentMethod(agent.file, frame, look_of(frame), agent.name)
    return PolicyMethod(policy.load(agent.file), agent.name)


def returns(act: Act, actions: Actions) -> NDArray[np.float64]:
    """(JUDGED,) returns of simulated runs that are the same for all and that none learned from."""
    make = partial(simulated, runs=JUDGED)
    return np.array(many_agents.judge(make, actions, act, DECISIONS, rounds=1))


def to_rate(decades: float, actions: Actions) -> Act:
    """Goes at once to one rate, from the reference rate in decades, for every job."""
    steps = np.log10(actions.multipliers)

    def act(seen: NDArray[np.float32]) -> NDArray[np.int64]:
        wish = decades - seen[:, PLACES["rate_vs_reference"]]
        return np.asarray(np.abs(wish[:, None] - steps).argmin(1))

    return act


def paired(mine: NDArray[np.float64], base: NDArray[np.float64]) -> dict[str, float]:
    """(agents, runs) returns of two kinds -> mean difference, and its standard error.

    The error is that of drawing other agents, which is the larger part on thousands of runs.
    """
    means, bases = mine.mean(1), base.mean(1)
    squares = [each.var(ddof=1) / len(each) for each in (means, bases) if len(each) > 1]
    return {
        "gain": round(float(means.mean() - bases.mean()), 4),
        "standard_error": round(float(np.sqrt(sum(squares))), 4),
    }


def simulate(
    agents: Mapping[str, Sequence[Trained]], frame: Policy, out: Path
) -> dict[str, dict[str, Any]]:
    """Figures on simulated runs of each variant, of *keep*, and of one rate for every job."""
    actions = frame.manifest.actions
    found = {}
    for name, some in agents.items():
        rows = []
        for agent in some:
            file = agent.file.with_suffix(".npy")
            if not file.exists():
                np.save(file, returns(act_of(agent, frame), actions))
            rows.append(np.load(file))
        found[name] = np.array(rows)
    unlearned = {"keep": lambda seen: np.full(len(seen), actions.keep)}
    unlearned |= {f"{each:+g} decades": to_rate(each, actions) for each in DECADES}
    told = {
        name: {
            "return": round(float(rows.mean()), 4),
            "agents": [round(float(row.mean()), 4) for row in rows],
            **paired(rows, found[BASE]),
        }
        for name, rows in found.items()
    }
    return told | {
        name: {"return": round(float(returns(act, actions).mean()), 4)}
        for name, act in unlearned.items()
    }


def last_loss(trial: Mapping[str, Any]) -> float:
    """The selection loss in nats where a run ended, not where it was best."""
    return float(trial["curve"][-1]["selection_loss"])


def main() -> None:
    """Train what is missing, judge, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("runs/learners"))
    parser.add_argument("--seeds", type=int, default=3, help="agents of each variant")
    parser.add_argument("--seconds", type=float, default=30.0, help="processor time of an agent")
    parser.add_argument(
        "--job-seeds", type=int, default=4, help="real runs of each job; 0: simulated ones alone"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    frame, seeds = policy.load(DEFAULT), range(options.seeds)
    names = list(dict.fromkeys([BASE, *options.only]))
    agents = {
        name: [learn(name, options.seconds, seed, frame, options.out) for seed in seeds]
        for name in names
    }
    told = simulate(agents, frame, options.out)
    for name, row in told.items():
        print(f"{name:34} {row}")
    costs = {
        name: {
            "rounds": round(float(np.mean([agent.facts["rounds"] for agent in some])), 1),
            "seconds": round(float(np.mean([agent.facts["seconds"] for agent in some])), 1),
        }
        for name, some in agents.items()
    }
    found = {"seconds": options.seconds, "variants": told, "training": costs}
    merge("learners", "simulated", found, seeds=list(seeds))
    if not options.job_seeds:
        return
    plain = rivals()
    methods = [method_of(agent, frame) for some in agents.values() for agent in some]
    seen, job_seeds = [*plain, *methods], range(options.job_seeds)
    scores = judge(seen, options.out, seeds=job_seeds)
    ends = judge(seen, options.out, seeds=job_seeds, read=last_loss)
    groups = {name: [agent.name for agent in some] for name, some in agents.items()}
    groups |= {method.name: [method.name] for method in plain}
    real = figures(scores, {"base": groups[BASE]} | groups)
    fixed = figures(scores, {"base": groups[FIXED]} | groups)
    for name, row in real.items():
        row["over_fixed"] = fixed[name]["gain"]
        row["over_fixed_error"] = fixed[name]["standard_error"]
        logs = np.log([ends[member] for member in groups.get(name, groups[BASE])])
        row["last_loss"] = round(float(np.exp(np.nanmean(logs))), 3)
        print(f"{name:34} {row}")
    del real["base"]
    merge("learners", "real", {"job_seeds": options.job_seeds, "variants": real}, seeds=list(seeds))


if __name__ == "__main__":
    main()
