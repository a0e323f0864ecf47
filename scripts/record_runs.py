"""Record real fine-tuning runs: what the surrogate is fitted to.

    python scripts/record_runs.py [--runs 2400] [--again 150] [--work runs/surrogate.jsonl]

Run number i is drawn from seed i alone: a training task, a horizon, a model, a starting rate within
two decades of the rule of thumb, an optimizer, a schedule's shape, batch, rows and seed; half of
the runs are random relatives of the task (classes, label noise), and in some the rate is turned
at random on the way. Some of the settings are run again with another seed, to say how far two
runs alike agree. Settings and reports are appended to ``--work``, one JSON line a run, so that a
killed recording goes on where it was; at the end all lines are packed into
``benchmarks/results/surrogate_runs.jsonl.gz``. Needs the fetched data; a run takes half a second.
"""

import argparse
import gzip
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs import workload
from envs.env import FineTuneEnv
from envs.errors import BadInput
from envs.knobs import Actions, reference_rate
from envs.progress import Progress
from envs.task import Task, find, vary

PACKED = Path(__file__).parent.parent / "benchmarks" / "results" / "surrogate_runs.jsonl.gz"
TASKS = ("trec6", "trec50", "sms", "movie", "amazon", "tweets")
HORIZONS = ((100, 10), (40, 4))  # updates, and those of an interval
DECADES = 2.0  # of the starting rate around the rule of thumb
DIGITS = 4
AGAIN = 100_000  # run AGAIN + i has the settings of run i and another seed


def draw(number: int) -> dict[str, Any]:
    """The settings of run ``number``."""
    if number >= AGAIN:
        settings = draw(number - AGAIN)
        return settings | {"number": number, "seed": settings["seed"] ^ 1}
    rng = np.random.default_rng([7, number])
    steps, interval = HORIZONS[int(rng.integers(len(HORIZONS)))]
    model = "tiny-64" if rng.random() < 0.06 else "tiny-32"
    task = find(
        TASKS[number % len(TASKS)], model=model, steps=steps, interval=interval,
        batch=int(rng.choice([8, 16, 16, 32])), rows=int(rng.choice([200, 1000])),
    )  # fmt: skip
    if rng.random() < 0.5:
        task = relative(task, rng)
    optimizer = str(rng.choice(["adamw", "adamw", "adamw", "sgd", "rmsprop"]))
    shape = str(rng.choice(["constant", "linear", "linear", "cosine"]))
    ruler = reference_rate(workload.parameters(model), optimizer, task.adapter)
    rate = float(ruler * 10 ** rng.uniform(-DECADES, DECADES))
    turning = float(rng.choice([0.0, 0.0, 0.2, 0.5]))  # chance of a turn at a decision
    actions = Actions()
    turns = [
        int(rng.integers(actions.size)) if rng.random() < turning else actions.keep
        for _ in range(task.decisions)
    ]
    return {
        "number": number, "task": task, "optimizer": optimizer, "shape": shape,
        "rate": min(rate, 10.0), "turns": turns, "seed": int(rng.integers(2**31)),
    }  # fmt: skip


def relative(task: Task, rng: np.random.Generator) -> Task:
    """A random relative that the data can serve, with the task's own horizon."""
    classes = workload.load(task).classes
    for _ in range(20):
        found = replace(vary(task, classes, rng), steps=task.steps, interval=task.interval)
        try:
            workload.load(found)
        except BadInput:
            continue
        return found
    return task


def play(settings: dict[str, Any]) -> dict[str, Any]:
    """Run the settings to their end or divergence -> a JSON object of settings and reports."""
    task = settings["task"]
    env = FineTuneEnv(task, optimizers=(settings["optimizer"],), shape=settings["shape"])
    _, info = env.reset(seed=settings["seed"], options={"rate": settings["rate"]})
    metrics = [info["metric"]]
    for action in settings["turns"]:
        *_, over, _, info = env.step(action)
        metrics.append(info["metric"])
        if over:
            break
    context = env.context
    return {
        "number": settings["number"], "task": task.dataset, "model": task.model,
        "steps": task.steps, "interval": task.interval, "batch": task.batch,
        "rows": context.rows, "classes": context.classes, "noise": task.noise,
        "prior": prior(task), "parameters": context.parameters, "optimizer": settings["optimizer"],
        "shape": settings["shape"], "rate": rounded(settings["rate"]), "seed": settings["seed"],
        "reason": info["reason"], "metric": [rounded(value) for value in metrics],
        "reports": [report(progress) for progress in env.history],
    }  # fmt: skip


def prior(task: Task) -> float:
    """Validation loss, in nats, of a model that knows the training classes' frequencies only."""
    load = workload.load(task)
    rows = load.rows
    counts = np.bincount(rows["train"].labels.numpy(), minlength=len(load.classes))
    shares = np.maximum(counts, 0.5) / counts.sum()
    return rounded(float(-np.log(shares[rows["validation"].labels.numpy()]).mean()))


def report(progress: Progress) -> dict[str, Any]:
    """A report in short: the rate as turned, figures to four digits."""
    return {
        "rate": rounded(progress.rate),
        "rollback": int(progress.decision.rollback),
        "losses": [rounded(loss) for loss in progress.losses],
        "validation": rounded(progress.validation),
        "gradient": rounded(progress.gradient),
        "clipped": rounded(progress.clipped),
        "update": rounded(progress.update),
        "cosine": rounded(progress.cosine),
    }


def rounded(value: float) -> float:
    """A number to `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


def finished(path: Path) -> dict[int, str]:
    """Lines already written, by number; a torn last line is dropped."""
    lines: dict[int, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines[json.loads(line)["number"]] = line
        except ValueError:
            continue
    return lines


def main() -> None:
    """Record what is missing, then pack all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2400)
    parser.add_argument("--again", type=int, default=150, help="settings to run with two seeds")
    parser.add_argument("--work", type=Path, default=Path("runs/surrogate.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.parent.mkdir(parents=True, exist_ok=True)
    lines = finished(options.work)
    held = [number for number in range(options.runs) if number // len(TASKS) % 4 == 0]
    wanted = [*range(options.runs), *(AGAIN + number for number in held[: options.again])]
    began, made = time.perf_counter(), 0
    with options.work.open("w") as file:
        file.writelines(line + "\n" for line in lines.values())
        for number in wanted:
            if number in lines:
                continue
            lines[number] = json.dumps(play(draw(number)), separators=(",", ":"))
            file.write(lines[number] + "\n")
            file.flush()
            made += 1
            if made % 50 == 0:
                print(f"{made} runs, {(time.perf_counter() - began) / made:.2f} s each", flush=True)
    text = "".join(lines[number] + "\n" for number in wanted)
    PACKED.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{len(lines)} runs in {PACKED}, {PACKED.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
