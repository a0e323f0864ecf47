"""Whether what is learned on the surrogate is worth anything on real runs.

    python benchmarks/surrogate_transfer.py [--episodes 200]

A Q-table learns on simulated runs alone and then steers real ones, random relatives of the
training tasks from starting rates over three decades, against keeping the rate on the same runs.
Returns are `FineTuneEnv`'s. Needs the fetched data; a real episode takes a third of a second.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import record

from envs.env import FineTuneEnv
from envs.knobs import Actions
from envs.surrogate import SurrogateVectorEnv
from envs.task import find
from tuner.tabular import TabularAgent, TabularConfig, q_learning

TASKS = ("trec6", "trec50", "sms", "movie", "amazon", "tweets")
ACTIONS = Actions(multipliers=(0.1, 0.3, 1.0, 3.0))
ENVS, ITERATIONS = 512, 60

Act = Callable[[NDArray[np.float32]], int]


def learn(seed: int) -> Act:
    """A greedy policy from simulated runs."""
    env = SurrogateVectorEnv(ENVS, actions=ACTIONS, shape="any")
    agent = TabularAgent(q_learning, ACTIONS.size, ACTIONS.keep, TabularConfig())
    for i in range(ITERATIONS):
        agent.learn(env, seed=seed + ENVS * i, share=i / ITERATIONS)
    table = agent.network()[1]["table"].reshape(-1, ACTIONS.size)
    return lambda seen: int(table[agent.states(seen[None])][0].argmax())


def play(env: FineTuneEnv, act: Act, seed: int) -> float:
    """The return of one real episode."""
    observation, _ = env.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        observation, reward, over, _, _ = env.step(act(observation))
        total += reward
    return total


def figures(episodes: int, seed: int = 0) -> dict[str, Any]:
    """Mean returns on the same real runs, and their paired difference."""
    began = time.perf_counter()
    act = learn(seed)
    seconds = time.perf_counter() - began
    tasks = [find(name, steps=50, interval=5) for name in TASKS]
    env = FineTuneEnv(tasks, actions=ACTIONS, shape="any", vary=True)
    learned = np.array([play(env, act, i) for i in range(episodes)])
    kept = np.array([play(env, lambda seen: ACTIONS.keep, i) for i in range(episodes)])
    gain = learned - kept
    return {
        "episodes": episodes,
        "learned": round(float(learned.mean()), 3),
        "kept": round(float(kept.mean()), 3),
        "difference": round(float(gain.mean()), 3),
        "standard_error": round(float(gain.std(ddof=1)) / math.sqrt(episodes), 3),
        "simulated_decisions": ENVS * ITERATIONS * TabularConfig().episodes * 10,
        "training_seconds": round(seconds, 1),
    }


def main() -> None:
    """Learn, steer, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = figures(options.episodes)
    print(json.dumps(found, indent=2))
    record("surrogate_transfer", found, seeds=[0])


if __name__ == "__main__":
    main()
