"""The shipped tuner: several agents learn, and the best of them by `experiments.judge` is kept.

    python benchmarks/choose.py --config examples/default/train.yaml [--out DIR] [--agents 5]

Agents differ in their seed alone; two train at a time. They are judged by the mean test accuracy on
jobs of the corpus for choosing and of the training tasks. What is left is ``policy.safetensors`` in
the folder, and in results/tuner.json every agent's scores beside those of fixed rates, and what all
of it took, in seconds of one core. Held-out tasks have no part in the choice. Repeated, the command
goes on where it stopped.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from experiments import JOB_SEEDS, figures, judge, rivals
from record import record

from baselines.compare import outcomes
from baselines.ledger import Ledger
from tuner import policy
from tuner.evaluate import PolicyMethod


def learn(config: Path, seed: int, out: Path) -> Path:
    """Train an agent in a process of its own -> its policy."""
    words = [sys.executable, "-m", "tuner.cli", "train", "--config", config, "--seed", str(seed),
             "--out", out]  # fmt: skip
    subprocess.run(words, check=True)
    return out / "policy.safetensors"


def spent(agents: Sequence[PolicyMethod], judged: Path) -> float:
    """Seconds of one core: all agents' training, and the runs that judged them."""
    training = sum(float(agent.policy.manifest.provenance["seconds"]) for agent in agents)
    return training + sum(float(outcome["seconds"]) for outcome in outcomes(Ledger(judged)))


def main() -> None:
    """Train what is missing, judge all, keep the best."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/default"))
    parser.add_argument("--agents", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes that train and judge")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(options.agents)
    with ThreadPoolExecutor(max(1, options.workers)) as pool:
        paths = list(pool.map(lambda s: learn(options.config, s, options.out / str(s)), seeds))
    agents = [PolicyMethod(policy.load(path), f"agent{s}") for s, path in enumerate(paths)]
    scores = judge([*rivals(), *agents], options.out, options.workers)
    means = [float(scores[agent.name].mean()) for agent in agents]
    best = max(seeds, key=means.__getitem__)
    shutil.copyfile(paths[best], options.out / "policy.safetensors")
    told = figures(scores, {"base": [agents[best].name]} | {name: [name] for name in scores})
    chosen = {
        "chosen": best, "sha256": agents[best].policy.sha256, "agents": len(agents),
        "seconds": round(spent(agents, options.out / "ledger.sqlite")), "scores": told,
    }  # fmt: skip
    record("tuner", chosen, seeds=list(JOB_SEEDS))
    for name, row in told.items():
        print(f"{name:16} {row}")
    print(options.out / "policy.safetensors")


if __name__ == "__main__":
    main()
