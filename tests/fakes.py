"""A scripted job behind the `Job` seam: no model and no data, microseconds a run.

Known answers: with `FakeJob` the rate that ends best is `OPTIMUM` (in AdamW's terms), whatever
the seed; above ``100 * OPTIMUM`` a run diverges at its second update.
"""

import math
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from envs.errors import BadInput
from envs.job import Score
from envs.knobs import Knobs, factor, reference_rate
from envs.progress import Context, Progress
from envs.snapshot import Snapshot
from envs.task import Split, Task

PARAMETERS = 150_000
OPTIMUM = reference_rate(PARAMETERS, "adamw", "full")
FLOOR, FIRST = 0.2, 1.6  # nats

TASK = Task("fake", rows=64, batch=8, steps=20, interval=2, selection_rows=24, test_rows=24)
OTHER = replace(TASK, dataset="other", steps=12)


class FakeJob:
    """Loss falls by a share an update that is quadratic in the log of the rate."""

    def __init__(self, task: Task, seed: int, knobs: Knobs) -> None:
        if seed < 0:
            raise BadInput(f"seed: {seed} is negative; give a whole number >= 0")
        self.task, self._seed = task, seed
        self._knobs = knobs
        self._start = knobs.rate
        self._step = 0
        self._weights = torch.zeros(1, dtype=torch.float64)  # log of the share still to go
        self._noise = np.random.default_rng(seed)
        self.read: list[Split] = []

    @property
    def step(self) -> int:
        return self._step

    @property
    def knobs(self) -> Knobs:
        return self._knobs

    @property
    def context(self) -> Context:
        return Context(
            self.task.steps, self.task.decisions, PARAMETERS, self.task.rows, 2,
            self.task.adapter, self._knobs.optimizer, self._start,
        )  # fmt: skip

    def advance(self, steps: int) -> Progress:
        losses = []
        for _ in range(steps):
            noise = 0.02 * self._noise.standard_normal()
            losses.append(self._loss() * math.exp(noise) if self._finite() else math.nan)
            self._weights += self._gain()
            self._step += 1
        shape = factor(self._knobs, self._step, self.task.steps)
        return Progress(
            self._step, self._knobs.rate, shape, tuple(losses), gradient=1.0, update=1e-3,
            cosine=0.0, finite=self._finite(),
        )  # fmt: skip

    def apply(self, knobs: Knobs) -> None:
        self._knobs = knobs

    def evaluate(self, split: Split) -> Score:
        self.read.append(split)
        if not self._finite():
            return Score(math.nan, 0.0)
        shift = 0.01 * ("train", "validation", "selection", "test").index(split)
        loss = self._loss() + shift + 0.001 * (self._seed % 7)
        return Score(loss, math.exp(-loss))

    def snapshot(self) -> Snapshot:
        return [self._weights.clone()]

    def restore(self, snapshot: Snapshot) -> None:
        self._weights = snapshot[0].clone()

    def _loss(self) -> float:
        return FLOOR + (FIRST - FLOOR) * math.exp(self._weights.item())

    def _finite(self) -> bool:
        return math.isfinite(self._weights.item())

    def _gain(self) -> float:
        ruler = [reference_rate(PARAMETERS, o, "full") for o in (self._knobs.optimizer, "adamw")]
        off = math.log10(self._knobs.rate * ruler[1] / ruler[0] / OPTIMUM)
        if off > 2:
            return math.nan
        return -0.2 / (1 + 4 * off**2)


@dataclass(frozen=True)
class Opener:
    """Opens fake jobs, notes each in a file, and goes wrong in the ways that are asked for."""

    log: str = ""  # a line per job opened: pid, task, seed
    pause: float = 0.0  # seconds before a job opens
    broken: tuple[int, ...] = ()  # seeds for which it raises
    deadly: tuple[int, ...] = ()  # seeds for which it kills its own process
    mercy: str = ""  # a file whose absence is a license to kill; made by the first kill

    def __call__(self, task: Task, seed: int, knobs: Knobs) -> FakeJob:
        time.sleep(self.pause)
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {task.dataset} {seed}\n")
        if seed in self.broken:
            raise RuntimeError("no memory for this seed")
        if seed in self.deadly and not (self.mercy and Path(self.mercy).exists()):
            if self.mercy:
                Path(self.mercy).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return FakeJob(task, seed, knobs)


def no_data(patch) -> None:
    """Let tasks on made-up data be compared: ``patch`` is pytest's monkeypatch or alike."""

    class Loaded:
        fingerprint = "0" * 64

    patch.setattr("envs.workload.load", lambda task: Loaded)
    patch.setattr("envs.workload.parameters", lambda model: PARAMETERS)
    patch.setattr("baselines.compare.weights_of", lambda model: "1" * 64)
    patch.setattr("baselines.compare.code_version", lambda name: "2" * 64)


def overheard(callback, told):
    """A TunerCallback that notes the losses of each interval and the new validation loss."""
    begin = callback.on_train_begin

    def on_train_begin(*args, **kwargs):
        begin(*args, **kwargs)
        crew, think = callback._crew, callback._crew._think

        def note(step, value):
            told.append((crew.book.report.losses, value))
            return think(step, value)

        crew._think = note

    callback.on_train_begin = on_train_begin
    return callback
