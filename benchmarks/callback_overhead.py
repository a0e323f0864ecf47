"""What `TunerCallback` costs: MiniLM-L6 fine-tuned with it and without it, update by update.

    python benchmarks/callback_overhead.py [--repeats 6] [--threads 1] [--control]

Two processes train the same model with the same rows and evaluate the same slice at the same
updates; only one has the tuner, which observes, asks a policy, minds the guard, keeps the best
weights and writes its log. They take turns, one update each in an order drawn anew for every
update, so that whatever else the machine does hits both alike; the one that waits is idle. With
each new run they change parts: no two processes are equally fast. A pair is one interval of each
run, evaluation and decision included. Two figures, by the wall clock and by the processor's, each
with a 95 % bootstrap interval over the intervals:

- paired: the median over pairs of steered / plain, the first interval of each run dropped;
- direct: 1 + the seconds inside the tuner's own methods and hooks over those of the rest of its
  run, evaluations included, first intervals too. Far less noisy, and blind only to what the
  tuner does to the speed of the code around it.

``--control`` runs the plain run against itself and writes nothing: paired must then be 1.
"""

import argparse
import functools
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from record import record
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from baselines.stats import bootstrap
from envs import workload
from envs.instruments import Eyes
from envs.knobs import Actions
from envs.observe import SIZE
from envs.slice import Slice
from envs.task import find
from envs.workload import Tokens
from tuner.callback import TunerCallback

BAR = 1.01
STEPS, DECISIONS, BATCH, LENGTH, ROWS = 60, 10, 16, 32, 128
EVERY = STEPS // DECISIONS
# Memory is kept once it was used: page faults make evaluations of the same run differ by a fifth.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
CLOCKS = ("wall", "cpu")
TURN, OWN = range(2)  # what is told of a turn, by each clock: all of it, and the tuner's part


class Network:
    """A policy with the arithmetic of a trained one, two layers of 64, that steers gently."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        shapes = ((64, SIZE), (64, 64), (Actions().size, 64))
        self._layers = [rng.normal(0, 0.3, shape).astype(np.float32) for shape in shapes]
        self.manifest = SimpleNamespace(actions=Actions(), decisions=DECISIONS, features=())
        self.sha256 = "0" * 64

    def act(self, observation: Any) -> int:
        """Keep and x0.6, by turns."""
        values = observation
        for layer in self._layers:
            values = np.tanh(layer @ values)
        return 3 if float(values[0]) > 0 else 2

    def outside(self, observation: Any) -> list[str]:
        """Nothing is."""
        return []


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Tokenised rows as a Trainer takes them."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = self._tokens
        return {
            "input_ids": tokens.ids[i],
            "attention_mask": tokens.mask[i],
            "labels": tokens.labels[i],
        }


class Evaluate(TrainerCallback):
    """The plain run's evaluations: those of the tuner, and nothing else."""

    def __init__(self, rows: Any) -> None:
        self._slice = Slice(rows, ROWS, ROWS)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before each interval, as the tuner does."""
        if state.global_step % EVERY == 0:
            self._slice.loss(kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"])


class Meter:
    """Seconds inside the tuner's events and hooks, less those of the evaluations within."""

    def __init__(self) -> None:
        self.seconds = [0.0, 0.0]
        for event in [name for name in vars(TunerCallback) if name.startswith("on_")]:
            self._time(TunerCallback, event, 1)
        for hook in ("_on_forward", "_on_gradient"):
            self._time(Eyes, hook, 1)
        self._time(Slice, "loss", -1)

    def _time(self, owner: type, name: str, sign: int) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[1] += sign * (time.process_time() - cpu)
                self.seconds[0] += sign * (time.perf_counter() - wall)

        setattr(owner, name, timed)


class Pace(TrainerCallback):
    """An update when it is its turn; first of the callbacks, so that a turn has all of theirs."""

    def __init__(self, pipe: Connection, meter: Meter) -> None:
        self._pipe, self._meter = pipe, meter
        self._began: np.ndarray | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell what the last turn took, and wait for the next."""
        self._tell()
        self._began = self._now()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last turn; the next run is made when the other process is through, too."""
        self._tell()
        self._began = None

    def _tell(self) -> None:
        self._pipe.send(None if self._began is None else self._now() - self._began)
        self._pipe.recv()

    def _now(self) -> np.ndarray:
        return np.array([[time.perf_counter(), time.process_time()], self._meter.seconds])


def train(pipe: Connection, parts: Sequence[bool], threads: int) -> None:
    """One process: a run for each part, steered or not, in turns with the other process."""
    torch.set_num_threads(threads)
    task = find("bbc/minilm-l6", batch=BATCH, max_length=LENGTH, steps=STEPS, rows=500)
    data = workload.load(task)
    rows = Rows(data.rows["validation"])
    pace = Pace(pipe, Meter())
    gc.collect()
    gc.freeze()  # or every Trainer collects all that was imported
    for seed, steered in enumerate(parts):
        with tempfile.TemporaryDirectory() as folder:
            tuner = TunerCallback(
                Network(), eval_dataset=rows, eval_rows=ROWS, classes=len(data.classes)
            )
            trainer = Trainer(
                model=data.module(seed),
                args=TrainingArguments(
                    output_dir=folder, max_steps=STEPS, seed=seed, report_to="none",
                    per_device_train_batch_size=BATCH, per_device_eval_batch_size=ROWS,
                    learning_rate=1e-4, save_strategy="no", logging_steps=STEPS,
                    disable_tqdm=True, use_cpu=True, dataloader_drop_last=True,
                    label_names=["labels"],
                ),
                train_dataset=Rows(data.rows["train"]),
                callbacks=[pace, tuner if steered else Evaluate(rows)],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()


def take_turns(parts: Sequence[Sequence[bool]], threads: int) -> np.ndarray:
    """parts: of each process, run by run, whether it is steered -> seconds, by process.

    (2, runs, STEPS, 2, 2): of process, run, update; the whole turn or the tuner's own; clock.
    """
    os.environ.update(ALLOCATOR)
    context, rng = get_context("spawn"), np.random.default_rng(0)
    pipes, processes = [], []
    for mine in parts:
        here, there = context.Pipe()
        arguments = (there, mine, threads)
        processes.append(context.Process(target=train, args=arguments, daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    seconds = np.zeros((2, len(parts[0]), STEPS, 2, len(CLOCKS)))
    for run in range(len(parts[0])):
        for pipe in pipes:
            pipe.recv()  # ready
        for step in range(STEPS):
            for who in rng.permutation(2):
                pipes[who].send("your turn")
                seconds[who, run, step] = pipes[who].recv()
        for pipe in pipes:
            pipe.send("the next run")
    for process in processes:
        process.join()
    return seconds


def figures(seconds: np.ndarray) -> dict[str, Any]:
    """seconds: as `take_turns` gives them, but first the plain runs and then the steered."""
    intervals = seconds.reshape(2, -1, DECISIONS, EVERY, 2, len(CLOCKS)).sum(3)
    result: dict[str, Any] = {"pairs": intervals[0, :, 1:, 0, 0].size}
    for i, clock in enumerate(CLOCKS):
        plain, steered = intervals[:, :, 1:, TURN, i].reshape(2, -1)
        result[f"paired_{clock}"] = _figure(np.median, steered / plain)
        result[f"direct_{clock}"] = _figure(_direct, intervals[1, ..., i].reshape(-1, 2))
    own = intervals[1, :, :, OWN].mean((0, 1))
    result["tuner_ms_a_decision"] = _ms(own, CLOCKS)
    updates = seconds[0, :, :, TURN, 0].reshape(-1, EVERY)
    both = np.median(updates[:, 1:]), np.median(updates[:, 0])
    result["plain_ms"] = _ms(both, ("an_update", "an_update_and_its_evaluation"))
    return result


def _direct(rows: np.ndarray) -> float:
    turns, own = rows.sum(0)
    return float(1 + own / (turns - own))


def _figure(statistic: Callable[..., Any], sample: np.ndarray) -> dict[str, Any]:
    found = bootstrap(lambda jobs: float(statistic(jobs[0])), [sample])
    interval = [round(found.low, 4), round(found.high, 4)]
    return {"ratio": round(found.point, 4), "interval_95": interval}


def _ms(seconds: Iterable[float], names: Iterable[str]) -> dict[str, float]:
    return {name: round(1e3 * float(x), 2) for name, x in zip(names, seconds, strict=True)}


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=6, help=f"runs of {STEPS} updates each")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's, in either process")
    parser.add_argument("--control", action="store_true", help="plain against plain")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    runs = range(options.repeats)
    parts = [[not options.control and (run + who) % 2 == 1 for run in runs] for who in (0, 1)]
    seconds = take_turns(parts, options.threads)
    seconds[:, 1::2] = seconds[::-1, 1::2].copy()  # they changed parts
    found = figures(seconds)
    print(json.dumps(found, indent=1), f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    if options.control:
        return
    result = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "bar": BAR,
        "passed": max(found["paired_wall"]["ratio"], found["direct_wall"]["ratio"]) <= BAR,
        **found,
        "settings": {
            "task": "bbc/minilm-l6", "batch": BATCH, "tokens": LENGTH, "steps": STEPS,
            "decisions": DECISIONS, "evaluated_rows": ROWS, "mode": "careful",
            "allocator": ALLOCATOR,
        },
        "load": {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)},
        "seconds_an_interval": {
            name: seconds[who, ..., TURN, 0].reshape(-1, EVERY).sum(1).round(4).tolist()
            for who, name in enumerate(("plain", "steered"))
        },
    }  # fmt: skip
    print(record("callback_overhead", result, seeds=list(range(options.repeats))))


if __name__ == "__main__":
    main()
