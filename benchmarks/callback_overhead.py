"""What `TunerCallback` costs: MiniLM-L6 fine-tuned with it and without it, turn about.

Two Trainers in one process take turns, one interval each, so that whatever else the machine does
hits both alike. Both evaluate the same slice at the same steps; only one observes, asks the
policy, minds the guard and writes the log. The figure is the median over pairs of intervals of
the ratio of their times; the bar is 1.01.

    python benchmarks/callback_overhead.py [--steps 60] [--repeats 2] [--out FILE]
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from envs import workload
from envs.knobs import Actions
from envs.observe import SIZE
from envs.task import find
from envs.workload import Tokens
from tuner.callback import TunerCallback
from tuner.instruments import Slice

DECISIONS = 10
BAR = 1.01


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


class Turns:
    """Whose turn it is, of two."""

    def __init__(self) -> None:
        self._lock, self._who, self._over = threading.Condition(), 0, False

    def wait(self, me: int) -> None:
        """Return when it is my turn."""
        with self._lock:
            self._lock.wait_for(lambda: self._who == me or self._over)

    def swap(self, me: int, over: bool = False) -> None:
        """The other's turn."""
        with self._lock:
            self._who, self._over = 1 - me, self._over or over
            self._lock.notify_all()


class Pace(TrainerCallback):
    """One interval, then the other run's. Times are of this run's turns alone."""

    def __init__(self, turns: Turns, me: int, every: int) -> None:
        self._turns, self._me, self._every = turns, me, every
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An interval begins: the time before it is another's."""
        if state.global_step % self._every == 0:
            self._stop()
            self._turns.wait(self._me)
            self._began = time.perf_counter(), time.thread_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last interval."""
        self._stop(over=True)

    def _stop(self, over: bool = False) -> None:
        if hasattr(self, "_began"):
            self.wall.append(time.perf_counter() - self._began[0])
            self.cpu.append(time.thread_time() - self._began[1])
            self._turns.swap(self._me, over)


class Evaluate(TrainerCallback):
    """The plain run's evaluations: those of the tuner, and nothing else."""

    def __init__(self, rows: Any, count: int, size: int, every: int) -> None:
        self._slice, self._every = Slice(rows, count, size), every

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before each interval, as the tuner does."""
        if state.global_step % self._every == 0:
            self._slice.loss(kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"])


def measure(steps: int, seed: int, rows: int) -> dict[str, list[float]]:
    """Seconds of each interval, plain and steered, by the wall clock and of this thread's work."""
    task = find("bbc/minilm-l6", batch=16, max_length=32, steps=steps, rows=500)
    data, every, turns = workload.load(task), -(-steps // DECISIONS), Turns()
    paces, trainers = [], []
    for me in (0, 1):
        slice_rows = Rows(data.rows["validation"])
        tuner = TunerCallback(
            Network(), eval_dataset=slice_rows, eval_rows=rows, classes=len(data.classes)
        )
        evaluate = Evaluate(slice_rows, rows, 128, every)
        paces.append(Pace(turns, me, every))
        trainer = Trainer(
            model=data.module(seed),
            args=TrainingArguments(
                output_dir=tempfile.mkdtemp(), max_steps=steps, seed=seed, report_to="none",
                per_device_train_batch_size=16, per_device_eval_batch_size=128,
                learning_rate=1e-4, save_strategy="no", logging_steps=steps, disable_tqdm=True,
                use_cpu=True, dataloader_drop_last=True, label_names=["labels"],
            ),
            train_dataset=Rows(data.rows["train"]),
            callbacks=[paces[-1], tuner if me else evaluate],
        )  # fmt: skip
        trainers.append(trainer)
    threads = [threading.Thread(target=trainer.train) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain, steered = paces
    return {
        "plain_wall": plain.wall, "steered_wall": steered.wall,
        "plain_cpu": plain.cpu, "steered_cpu": steered.cpu,
    }  # fmt: skip


def main() -> None:
    """Measure, print one line, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "callback_overhead.json"
    )
    options = parser.parse_args()
    load = os.getloadavg()[0]
    runs = [measure(options.steps, seed, options.rows) for seed in range(options.repeats)]
    figures: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        plain = [seconds for run in runs for seconds in run[f"plain_{clock}"]]
        steered = [seconds for run in runs for seconds in run[f"steered_{clock}"]]
        every = -(-options.steps // DECISIONS)
        figures[clock] = {
            "plain_ms_a_step": round(1e3 * statistics.median(plain) / every, 2),
            "steered_ms_a_step": round(1e3 * statistics.median(steered) / every, 2),
            "ratio_of_medians": round(statistics.median(steered) / statistics.median(plain), 4),
            "ratio_of_sums": round(sum(steered) / sum(plain), 4),
            "median_of_paired_ratios": round(
                statistics.median(b / a for a, b in zip(plain, steered, strict=True)), 4
            ),
        }
    result = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "bar": BAR,
        "figures": figures,
        "raw_seconds_an_interval": runs,
        "settings": {
            "task": "bbc/minilm-l6", "batch": 16, "tokens": 32, "steps": options.steps,
            "decisions": DECISIONS, "evaluated_rows": options.rows, "mode": "careful",
            "seeds": list(range(options.repeats)),
        },
        "machine": {
            "cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__,
        },
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(figures), f"load {load:.1f}")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
