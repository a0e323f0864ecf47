"""A `TrainerJob` over the plain ``trainer.train()``: processor time of whole runs, in pairs.

    python benchmarks/trainer_overhead.py [--pairs 15]

Width 32 is the hardest case: an update takes some 8 ms, MiniLM's a hundred times as long.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from env_overhead import write_data
from record import record
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from envs import workload
from envs.job import Score
from envs.knobs import Knobs
from envs.task import Task
from envs.trainer_job import Setup, TrainerJob

BAR = 1.03
STEPS, INTERVAL = 200, 20


def trainer(task: Task, seed: int, knobs: Knobs) -> Any:
    """The user's own: no logs, no checkpoints, no evaluations."""
    load = workload.load(task)
    rows = load.rows["train"]
    data = [
        {"input_ids": rows.ids[i], "attention_mask": rows.mask[i], "labels": rows.labels[i]}
        for i in range(len(rows))
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=task.steps, per_device_train_batch_size=task.batch,
            learning_rate=knobs.rate, seed=seed, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=True, logging_nan_inf_filter=False,
        )  # fmt: skip
    return Trainer(model=load.module(seed), args=settings, train_dataset=data)


def setup(task: Task, seed: int, knobs: Knobs) -> Setup:
    """The same Trainer, for a job; nothing is judged."""
    return Setup(trainer(task, seed, knobs), lambda trainer, split: Score(0.0, 0.0), task.rows)


def plain(task: Task, seed: int) -> tuple[float, torch.Tensor]:
    """Processor seconds of ``train()``, and the final weights."""
    own = trainer(task, seed, Knobs())
    start = time.process_time()
    own.train()
    taken = time.process_time() - start
    return taken, torch.cat([p.detach().reshape(-1) for p in own.model.parameters()])


def halted(task: Task, seed: int) -> tuple[float, torch.Tensor]:
    """The same of a job that halts every `INTERVAL` updates."""
    job = TrainerJob(task, seed, make=setup)
    start = time.process_time()
    for _ in range(STEPS // INTERVAL):
        job.advance(INTERVAL)
    taken = time.process_time() - start
    return taken, torch.cat([part.reshape(-1) for part in job.snapshot()])


def measure(pairs: int) -> dict[str, Any]:
    """Runs by turns, the order alternating; the ratio is worked out pair by pair."""
    with tempfile.TemporaryDirectory() as folder:
        data = str(write_data(Path(folder) / "words.csv"))
        task = Task(data, steps=STEPS, interval=INTERVAL, batch=16, dropout=0.1)
        sides = {"plain": partial(plain, task), "job": partial(halted, task)}
        for side in sides.values():
            side(0)
        ratios, equal, times = [], True, []
        for seed in range(pairs):
            order = list(sides) if seed % 2 else list(reversed(sides))
            found = {name: sides[name](seed) for name in order}
            ratios.append(found["job"][0] / found["plain"][0])
            times.append(found["plain"][0])
            equal = equal and torch.equal(found["job"][1], found["plain"][1])
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "bar": BAR, "ratio": round(statistics.median(ratios), 4),
        "quartiles": [round(q, 4) for q in (quartiles[0], quartiles[2])], "pairs": pairs,
        "equal_weights": equal, "plain_ms_an_update": 1e3 * statistics.median(times) / STEPS,
        "updates": STEPS, "updates_between_halts": INTERVAL, "model": "tiny-32",
    }  # fmt: skip


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    figures = measure(parser.parse_args().pairs)
    figures["passed"] = figures["ratio"] <= BAR and figures["equal_weights"]
    print(json.dumps(figures, indent=2))
    print(record("trainer_overhead", figures, seeds=list(range(figures["pairs"]))))


if __name__ == "__main__":
    main()
