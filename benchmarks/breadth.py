"""Breadth: what a tuner is worth outside of what it was trained on, and one that was trained there.

    python benchmarks/breadth.py [--out DIR] [--agents 2] [--iterations 6] [--only SETTING ...]

The shipped policy, and agents of its setting with batches, horizons, adapters and optimizers of all
kinds in the training, steer the same runs in several settings: the corpus for choosing on two
encoders and the training tasks, from rates up to 1.5 decades off, without a guard. Test accuracy is
that at the end of a run. Trained agents are kept; figures go to results/breadth.json, setting by
setting. `docs/experiments.md` tells what was concluded.
"""

import argparse
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments import CHOOSING
from headroom import TRAINED
from record import merge

from baselines.schedules import reference
from envs.env import FineTuneEnv
from envs.job import Job
from envs.knobs import Actions, Optimizer
from envs.start import open_job
from envs.task import find
from tuner import policy
from tuner.config import read
from tuner.curriculum import TrainConfig
from tuner.imitation import BEST
from tuner.policy import DEFAULT, Policy
from tuner.train import train

CONFIG = Path(__file__).parent.parent / "examples" / "default" / "train.yaml"
BROAD: dict[str, Any] = {
    "tasks": [*TRAINED, *({"dataset": name, "adapter": "lora"} for name in TRAINED)],
    "batches": [8, 16, 64],
    "horizons": [0.5, 1.0, 3.0],
    "starts": ["adamw", "rmsprop", "sgd"],
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "as trained": {},
    "batch 8": {"batch": 8},
    "batch 64": {"batch": 64},
    "LoRA": {"adapter": "lora"},
    "RMSprop": {"optimizer": "rmsprop"},
    "SGD": {"optimizer": "sgd"},
    "30 updates": {"steps": 30, "interval": 3},
    "300 updates": {"steps": 300, "interval": 30},
    "1,000 updates": {"steps": 1000, "interval": 100},
}
SEEDS = range(2)
Choose = Callable[[np.ndarray], Any]


def run(
    name: str, changes: Mapping[str, Any], seed: int, actions: Actions, choose: Choose,
    rate: float | None = None,
) -> float:  # fmt: skip
    """One episode -> the test accuracy at its end. rate: decades from the rule; None: misjudged."""
    fields = dict(changes)
    optimizer: Optimizer = fields.pop("optimizer", "adamw")
    task = find(name, **fields)
    jobs: list[Job] = []

    def make_job(*given: Any) -> Job:
        jobs.append(open_job(*given))
        return jobs[-1]

    env = FineTuneEnv(task, actions=actions, optimizers=(optimizer,), make_job=make_job)
    off = rate
    if off is None:  # another for each job, from 1.5 decades too low to 1.5 too high
        off = np.random.default_rng([zlib.crc32(name.encode()), seed]).uniform(-1.5, 1.5)
    seen, _ = env.reset(seed=seed, options={"rate": reference(task, optimizer) * 10**off})
    over = False
    while not over:
        seen, _, over, _, _ = env.step(choose(seen))
    return jobs[-1].evaluate("test").metric


def runs(changes: Mapping[str, Any], pilots: Mapping[str, Policy]) -> dict[str, list[float]]:
    """By method, the scores of the same runs in the same order."""
    plain, lifted = Actions(), next(iter(pilots.values())).manifest.actions

    def all_of(actions: Actions, choose: Choose, rate: float | None = None) -> list[float]:
        jobs = [(name, seed) for name in (*CHOOSING, *TRAINED) for seed in SEEDS]
        return [run(name, changes, seed, actions, choose, rate) for name, seed in jobs]

    found = {"keep": all_of(plain, lambda _: plain.keep),
             "one rate": all_of(lifted, lambda _: lifted.keep, BEST)}  # fmt: skip
    for name, pilot in pilots.items():
        found[name] = all_of(pilot.manifest.actions, pilot.act)
    return found


def learn(iterations: int, seeds: Sequence[int], out: Path) -> dict[str, Policy]:
    """The shipped policy, and agents that learn broadly."""
    broad = {**read(CONFIG), **BROAD, "budget": "", "iterations": iterations}
    configs = {f"broad {s}": TrainConfig.model_validate({**broad, "seed": s}) for s in seeds}
    agents = {name: train(config, out / name.replace(" ", "-")) for name, config in configs.items()}
    return {"default": policy.load(DEFAULT), **agents}


def figures(scores: Mapping[str, list[float]]) -> dict[str, Any]:
    """Each method's mean, and how it stands to the shipped one over the same runs."""
    rows = {}
    for name, mine in scores.items():
        gain = np.array(mine) - np.array(scores["default"])
        rows[name] = {
            "test": round(float(np.mean(mine)), 4),
            "gain": round(float(gain.mean()), 4),
            "standard_error": round(float(gain.std(ddof=1) / np.sqrt(len(gain))), 4),
            "runs": [round(score, 4) for score in mine],
        }
    return rows


def main() -> None:
    """Train and run what is missing, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/breadth"))
    parser.add_argument("--agents", type=int, default=2, help="agents that learn broadly")
    parser.add_argument(
        "--iterations", type=int, default=6, help="of 128 runs; the shipped agent made 6"
    )
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pilots = learn(options.iterations, range(options.agents), options.out)
    shas = {name: pilot.sha256 for name, pilot in pilots.items()}
    for name in options.only:
        found = figures(runs(SETTINGS[name], pilots))
        merge("breadth", name, {"policies": shas, "methods": found}, seeds=list(SEEDS))
        told = {method: (row["test"], row["gain"], row["standard_error"])
                for method, row in found.items()}  # fmt: skip
        print(name, told, flush=True)


if __name__ == "__main__":
    main()
