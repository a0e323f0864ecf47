"""Steps: seconds that one update of one run takes, by each way to run it."""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from inputs import full_rows, minilm
from torch.utils.data import Dataset

from envs import workload
from envs.job import TorchJob
from envs.knobs import Knobs
from envs.task import Pooling, Task
from envs.workload import Tokens


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


def trainer(
    width: int = 32, tokens: int = 16, steps: int = 400, seed: int = 0, device: str = "cpu",
    pooling: Pooling = "first",
) -> dict[str, Any]:  # fmt: skip
    """The transformers Trainer with its defaults; nothing logged, evaluated or saved."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    warmup, stamps, now = 20, [0.0], clock(device)

    class Stamp(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (warmup, warmup + steps):
                stamps.append(now())

    task = full_rows(width, tokens=tokens, pooling=pooling)
    data = workload.load(task)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=warmup + steps, seed=seed, report_to="none",
            per_device_train_batch_size=task.batch, learning_rate=1e-3, save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=device == "cpu",
            dataloader_drop_last=True, label_names=["labels"],
        )  # fmt: skip
        Trainer(
            model=data.module(seed), args=arguments, train_dataset=Rows(data.rows["train"]),
            callbacks=[Stamp()],
        ).train()  # fmt: skip
    return told("Trainer", task, (stamps[2] - stamps[1]) / steps, width=width)


def torchjob(
    width: int = 32, tokens: int = 16, steps: int = 400, seed: int = 0, pooling: Pooling = "first"
) -> dict[str, Any]:
    """The native loop of one run, fused AdamW."""
    task = full_rows(width, tokens=tokens, pooling=pooling)
    return told("TorchJob", task, advance(task, steps, 20, seed), width=width)


def torchjob_minilm(
    adapter: str = "full", layers: int | None = None, steps: int = 12, seed: int = 0,
    device: str = "cpu", pooling: Pooling = "first",
) -> dict[str, Any]:  # fmt: skip
    """The native loop of one MiniLM-L6 run: all of it, an adapter, or the uppermost layers."""
    task = minilm(adapter=adapter, trainable_layers=layers, pooling=pooling)
    return told("TorchJob", task, advance(task, steps, 2, seed, device), width=384)


def decision(layers: int = 1, seed: int = 0, pooling: Pooling = "first") -> dict[str, Any]:
    """The same with lower layers frozen, and a decision: an interval and two scores."""
    task = minilm(trainable_layers=layers, pooling=pooling)
    job, now = TorchJob(task, seed, Knobs(rate=1e-3)), clock("cpu")
    job.advance(2)
    job.evaluate("validation")
    began = now()
    job.advance(task.interval)
    middle = now()
    job.evaluate("validation")
    job.evaluate("selection")
    found = told("TorchJob", task, (middle - began) / task.interval, width=384)
    return {**found, "decision": now() - began}


def advance(task: Task, steps: int, warmup: int, seed: int, device: str = "cpu") -> float:
    """Seconds of an update in whole intervals, with the probe that each interval ends in."""
    job, now = TorchJob(task, seed, Knobs(rate=1e-3), device), clock(device)
    interval = min(task.interval, steps)
    job.advance(warmup)
    began = now()
    for _ in range(steps // interval):
        job.advance(interval)
    return (now() - began) / (steps // interval * interval)


def clock(device: str) -> Callable[[], float]:
    """Seconds: of the processor, whose one thread does all the work; of the wall for a GPU."""
    if device == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def told(engine: str, task: Task, seconds: float, *, width: int, runs: int = 1) -> dict[str, Any]:
    """What was measured, as the plots and the page read it. seconds: of one run-step."""
    return {
        "seconds": seconds, "engine": engine, "runs": runs, "width": width, "batch": task.batch,
        "tokens": task.max_length, "model": task.model, "adapter": task.adapter,
        "trainable_layers": task.trainable_layers, "pooling": task.pooling,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
