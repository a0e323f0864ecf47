"""Headroom: which rate is best on the training tasks, and what knowing a job's own best is worth.

    python benchmarks/headroom.py [--out runs/headroom] [--workers 2] [--only SETTING ...]

Every rate, linear to zero, on every training task and two seeds, in several settings. "own best"
takes for a job and seed the rate that was best on the other seed: what a choice for each job would
bring over one rate for all. Repeated, it goes on where it stopped; figures go to
results/headroom.json. The rate that is best over all is what `tuner.imitation` teaches.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import merge

from baselines.compare import compare
from baselines.schedules import Fixed
from envs.knobs import Knobs
from envs.task import find

TRAINED = ("trec6", "trec50", "sms", "movie", "amazon", "tweets")
DECADES = (-1.25, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5)  # from the reference rate
SEEDS = range(2)
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "tiny-32": {},
    "tiny-32, 60 steps": {"steps": 60, "interval": 6},
    "tiny-32, 200 steps": {"steps": 200, "interval": 20},
    "tiny-64": {"model": "tiny-64"},
    "tiny-32, 200 rows": {"rows": 200},
    "tiny-32, a fifth of the labels wrong": {"noise": 0.2},
    "tiny-32, LoRA": {"adapter": "lora"},
    "tiny-32, head x3": {"head": 3.0},
    "tiny-32, head x10": {"head": 10.0},
    "tiny-32, head x30": {"head": 30.0},
    "tiny-64, head x10": {"model": "tiny-64", "head": 10.0},
    "tiny-32, LoRA, head x2": {"adapter": "lora", "head": 2.0},
    "tiny-32, LoRA, head x10": {"adapter": "lora", "head": 10.0},
    "tiny-64, LoRA, head x2": {"model": "tiny-64", "adapter": "lora", "head": 2.0},
    "tiny-64, LoRA, head x10": {"model": "tiny-64", "adapter": "lora", "head": 10.0},
    "tiny-64, LoRA, head x30": {"model": "tiny-64", "adapter": "lora", "head": 30.0},
    "tiny-64, head x30": {"model": "tiny-64", "head": 30.0},
    "tiny-32, head x10, batch 8": {"batch": 8, "head": 10.0},
    "tiny-32, head x10, batch 64": {"batch": 64, "head": 10.0},
    "tiny-32, head x10, RMSprop": {"optimizer": "rmsprop", "head": 10.0},
    "tiny-64, head x10, RMSprop": {"model": "tiny-64", "optimizer": "rmsprop", "head": 10.0},
    "tiny-32, head x10, SGD": {"optimizer": "sgd", "head": 10.0},
    "tiny-64, head x10, SGD": {"model": "tiny-64", "optimizer": "sgd", "head": 10.0},
    "tiny-32, SGD": {"optimizer": "sgd"},
    "tiny-32, RMSprop": {"optimizer": "rmsprop"},
}


def scores(changes: Mapping[str, Any], out: Path, workers: int) -> np.ndarray:
    """Test scores of every rate: (rates, tasks, seeds). head: times the rate, for the new head."""
    given = dict(changes)
    head, optimizer = given.pop("head", None), given.pop("optimizer", "adamw")
    own = "" if head is None else f", head x{head:g}"
    knobs = Knobs(optimizer=optimizer, head_rate=head)
    methods = [Fixed(replace(knobs, rate=10.0**d), True, f"{d:+g}{own}") for d in DECADES]
    tasks = [find(name, **given) for name in TRAINED]
    found = compare(
        methods, tasks, SEEDS, out / "ledger.sqlite", runs=1, workers=workers, pack=8, compiled=True
    )
    flat = [outcome["trials"][0]["test"] for outcome in found]
    return np.array(flat).reshape(len(methods), len(tasks), len(SEEDS))


def figures(found: np.ndarray) -> dict[str, Any]:
    """The mean of each rate, the best one, and what each job's own best would bring."""
    means = found.mean((1, 2))
    chosen = found[:, :, ::-1].argmax(0)  # on the other seed
    own = np.take_along_axis(found, chosen[None], 0)[0]
    gain = own - found[means.argmax()]
    return {
        "rates": {f"{d:+g}": round(float(m), 4) for d, m in zip(DECADES, means, strict=True)},
        "best": DECADES[int(means.argmax())],
        "own_best_gain": round(float(gain.mean()), 4),
        "standard_error": round(float(gain.std(ddof=1)) / np.sqrt(gain.size), 4),
        "best_of_each_task": [DECADES[i] for i in found.mean(2).argmax(0)],
    }


def main() -> None:
    """Sweep, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/headroom"))
    parser.add_argument("--workers", type=int, default=2, help="processes; 0: this one")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        found = figures(scores(SETTINGS[name], options.out, options.workers))
        merge("headroom", name, found, seeds=list(SEEDS))
        print(name, found, flush=True)


if __name__ == "__main__":
    main()
