"""One agent for each knob against one agent over all of them, at equal numbers of episodes.

    python benchmarks/many_agents.py [--simulated 40] [--real 10] [--seeds 3] [--real-seeds 2]

Two games. On simulated runs (`envs.surrogate`) the knobs are the rate and the optimizer, both of
which matter there, and episodes cost nothing; on real runs of a tiny encoder they are the rate,
clipping and weight decay, and episodes are few. In each, four learners:

- ``one, Q``: a Q-table over single steps of one knob at a time (flat actions);
- ``many, Q``: independent Q-learning, a table for each knob, all paid the same reward;
- ``one, PPO``: PPO over the flat actions;
- ``many, PPO``: PPO with a head for each knob on a shared network, all paid the same reward.

Returns are `FineTuneEnv`'s, of greedy policies, on episodes that all play and none learned from;
*keep* turns nothing. Needs the fetched data for the real runs.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from record import record

from envs.knobs import OPTIMIZERS, Actions
from envs.surrogate import SurrogateVectorEnv
from envs.task import find
from envs.vector import packed
from tuner.agent import Normaliser
from tuner.sb3 import PPOAgent, PPOConfig
from tuner.tabular import TabularAgent, TabularConfig, q_learning, together

RATE = (0.1, 0.3, 1.0, 3.0)
SIMULATED = Actions("discrete", RATE, optimizers=OPTIMIZERS)
REAL = Actions(
    "discrete", RATE, turns=(("weight_decay", 0.1), ("weight_decay", 10.0), ("clip", 0.1),
                             ("clip", 10.0)),
)  # fmt: skip
JUDGED = 1_000_000  # first seed of the judged episodes

Act = Callable[[NDArray[np.float32]], NDArray[np.int64]]
Make = Callable[[Actions], VectorEnv]


def simulated(actions: Actions) -> VectorEnv:
    """256 simulated runs from any optimizer."""
    return SurrogateVectorEnv(256, actions=actions, optimizers=OPTIMIZERS, shape="any")


def real(actions: Actions) -> VectorEnv:
    """32 real runs of 25 updates in 5 decisions, in one pack."""
    task = find("trec6", steps=25, interval=5, batch=8, max_length=12, validation_rows=64)
    return packed(32, pack=32, task=task, actions=actions, spread=1.5)


def tables(make: Make, actions: Actions, decisions: int, iterations: int, seed: int) -> Act:
    """Q-learning: one table for the flat view, one for each seat of the joint view."""
    envs, config = make(actions), TabularConfig(episodes=1)
    joint = actions.view == "joint"
    sizes = [(len(c), actions.keep if name == "rate" else 0) for name, c in actions.seats.items()]
    agents = [
        TabularAgent(q_learning, size, keep, config)
        for size, keep in (sizes if joint else [(actions.size, actions.keep)])
    ]
    for number in range(iterations):
        together(agents, envs, seed=seed + 1000 * number, share=number / iterations)
    found = [agent.network()[1]["table"].reshape(-1, agent.actions) for agent in agents]

    def act(seen: NDArray[np.float32]) -> NDArray[np.int64]:
        rows = [t[a.states(seen)].argmax(1) for t, a in zip(found, agents, strict=True)]
        return np.stack(rows, 1) if joint else rows[0]

    return act


def ppo(make: Make, actions: Actions, decisions: int, iterations: int, seed: int) -> Act:
    """PPO: one head for the flat view, one for each seat of the joint view."""
    envs, keep = make(actions), actions.keep
    observations = [envs.reset(seed=seed)[0]]
    look = Normaliser(
        observations[0].mean(0), np.maximum(observations[0].std(0), 0.3).astype(np.float32)
    )
    kept: Any = keep
    if actions.view == "joint":
        sizes = [len(choices) for choices in actions.seats.values()]
        kept = [keep, *np.cumsum(sizes)[:-1].tolist()]
    agent = PPOAgent(envs, decisions, look, PPOConfig(episodes=1, group=8), keep=kept)
    for number in range(iterations):
        agent.learn(envs, seed + 1000 * number, number / iterations)
    model = agent._model
    return lambda seen: np.asarray(model.predict(look(seen), deterministic=True)[0])


def judge(make: Make, actions: Actions, act: Act, decisions: int, rounds: int) -> list[float]:
    """Returns of episodes that are the same for every contestant."""
    envs, returns = make(actions), []
    for number in range(rounds):
        observations, _ = envs.reset(seed=JUDGED + 1000 * number)
        total, going = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
        for _ in range(decisions):
            observations, rewards, terminated, _, _ = envs.step(act(observations))
            total += np.where(going, rewards, 0.0)
            going &= ~terminated
        returns += total.tolist()
    return returns


def game(
    make: Make, flat: Actions, decisions: int, iterations: int, rounds: int, seeds: int
) -> dict[str, Any]:
    """Mean return of each learner, over seeds, and its gain over *keep* on the same episodes."""
    joint = replace(flat, view="joint")
    keep = np.full(make(flat).num_envs, flat.keep)
    base = np.array(judge(make, flat, lambda seen: keep, decisions, rounds))
    found: dict[str, Any] = {
        "episodes learned from": iterations * len(keep),
        "episodes judged on": len(base),
        "actions": {
            "one": flat.size,
            "many": {name: len(choices) for name, choices in joint.seats.items()},
        },
        "keep": round(float(base.mean()), 3),
    }
    for name, learn, actions in (
        ("one, Q", tables, flat), ("many, Q", tables, joint),
        ("one, PPO", ppo, flat), ("many, PPO", ppo, joint),
    ):  # fmt: skip
        began, means = time.perf_counter(), []
        for seed in range(seeds):
            act = learn(make, actions, decisions, iterations, 7919 * seed)
            means.append(float(np.mean(judge(make, actions, act, decisions, rounds))))
        found[name] = {
            "return": round(float(np.mean(means)), 3),
            "over keep": round(float(np.mean(means) - base.mean()), 3),
            "by seed": [round(mean, 3) for mean in means],
            "seconds a seed": round((time.perf_counter() - began) / seeds, 1),
        }
        print(name, json.dumps(found[name]), flush=True)
    return found


def main() -> None:
    """Run, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulated", type=int, default=40, help="iterations on simulated runs")
    parser.add_argument("--real", type=int, default=10, help="iterations on real runs; 0: none")
    parser.add_argument("--seeds", type=int, default=3, help="learners of a kind")
    parser.add_argument("--real-seeds", type=int, default=2, help="likewise on real runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = {"simulated": game(simulated, SIMULATED, 10, arguments.simulated, 8, arguments.seeds)}
    if arguments.real:
        figures["real"] = game(real, REAL, 5, arguments.real, 3, arguments.real_seeds)
    print(
        record("many_agents", figures, seeds=list(range(arguments.seeds)))
    )  # the real game: the first of these


if __name__ == "__main__":
    main()
