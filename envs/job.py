"""Job: the seam between a fine-tuning run and everything that drives it.

Environments, searches and schedules know a run only through `Job`. `TorchJob` is the fast
native loop; a test may put a scripted fake behind the same verbs.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from envs import optim, probe, workload
from envs.chance import RandomState
from envs.errors import BadInput
from envs.head import lifted
from envs.knobs import Decision, Knobs, factor
from envs.parts import Parts
from envs.progress import Context, Progress
from envs.snapshot import Snapshot, recall, remember
from envs.task import Split, Task

MakeOptimizer = Callable[[list[nn.Parameter], Knobs], torch.optim.Optimizer]


class Score(NamedTuple):
    """A split's mean loss in nats and its metric (accuracy), higher is better."""

    loss: float
    metric: float


class Job(Protocol):
    """A fine-tuning run that can be advanced, turned, judged, saved and put back."""

    task: Task

    @property
    def step(self) -> int:
        """Updates done; a restore does not take them back: they are spent."""

    @property
    def knobs(self) -> Knobs:
        """The settings in force."""

    @property
    def context(self) -> Context:
        """What the observation needs to know of the run as a whole."""

    def advance(self, steps: int) -> Progress:
        """Make that many updates and report. Never raises on divergence: it reports it."""

    def apply(self, knobs: Knobs) -> None:
        """Put the settings in force from the next update on."""

    def evaluate(self, split: Split) -> Score:
        """Judge the weights as they are on a split; training is not affected."""

    def snapshot(self) -> Snapshot:
        """The trained weights, copied."""

    def restore(self, snapshot: Snapshot) -> None:
        """Put weights back and forget the optimizer's moments; the knobs stay."""


class TorchJob:
    """A task fine-tuned by a plain PyTorch loop on one device.

    Owns its generators: the same task, seed and knobs give the same run bit for bit at the
    same number of threads, whatever else draws random numbers in the process.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        knobs: Knobs | None = None,
        device: str | None = None,
        *,
        optimizer: MakeOptimizer = optim.make,
    ) -> None:
        """optimizer: makes the one to use, whatever the knobs name; it can then not be switched.

        One with ``train()`` and ``eval()`` is in its training mode within `advance` alone, so
        that all others see the weights it wants judged.
        """
        self.task = task
        self._load = workload.load(task)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        order, head, noise = (int(x) for x in spread(seed, 3))
        self._module = self._load.module(head).to(self._device)
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        self._head = [*self._module.head.parameters()]
        self._sampled = probe.sampled(self._parameters)
        self._order = batches(len(self._load.rows["train"]), task.batch, order)
        self._random = RandomState(noise, [self._device])
        self._probe = probe.Probe()
        self._step = 0
        self._parts = Parts(self._module.encoder)
        self._knobs = self._fit(knobs or Knobs(), Knobs())
        self._parts.put(self._knobs)
        self._start_rate = self._knobs.rate
        self._size = sum(p.numel() for p in self._module.parameters())
        self._make_optimizer = optimizer
        self._optimizer = optimizer(self._parameters, self._knobs)

    @property
    def step(self) -> int:
        """Updates done."""
        return self._step

    @property
    def knobs(self) -> Knobs:
        """The settings in force."""
        return self._knobs

    @property
    def context(self) -> Context:
        """What the observation needs to know of the run as a whole."""
        return Context(
            total=self.task.steps,
            decisions=self.task.decisions,
            parameters=self._size,
            rows=len(self._load.rows["train"]),
            classes=len(self._load.classes),
            adapter=self.task.adapter,
            optimizer=self._knobs.optimizer,
            start_rate=self._start_rate,
        )

    def advance(self, steps: int) -> Progress:
        """Make ``steps`` updates; nothing is read from the device before the last is done."""
        rows, losses = self._load.rows["train"], []
        self._module.train()
        self._set_mode("train")
        with self._random.lent():
            for left in range(steps - 1, -1, -1):
                rate = self._knobs.rate * factor(self._knobs, self._step, self.task.steps)
                for group in self._optimizer.param_groups:
                    group["lr"] = rate
                loss = forward(self._module, rows, next(self._order))["loss"]
                loss.backward()  # type: ignore[no-untyped-call]
                if left < 2:
                    self._probe.gradient(
                        probe.gather([probe.gradient_of(p) for p in self._sampled])
                    )
                if self._knobs.clip:
                    nn.utils.clip_grad_norm_(self._parameters, self._knobs.clip)
                if not left:
                    self._probe.before(self._sampled)
                with lifted(self._head, self._knobs.head_rate):
                    self._optimizer.step()
                if not left:
                    self._probe.after(self._sampled)
                self._optimizer.zero_grad()
                losses.append(loss.detach())
                self._step += 1
        self._set_mode("eval")
        gradient, clipped, update, cosine = self._probe.read()
        return Progress(
            step=self._step,
            rate=self._knobs.rate,
            factor=factor(self._knobs, self._step, self.task.steps),
            losses=tuple(torch.stack(losses).tolist()),
            gradient=gradient,
            clipped=clipped,
            update=update,
            cosine=cosine,
            finite=finite(self._parameters),
        )

    def apply(self, knobs: Knobs) -> None:
        """Put the settings in force; a new optimizer inherits the old one's moments."""
        knobs = self._fit(knobs, self._knobs)
        if knobs.optimizer != self._knobs.optimizer or knobs.weight_decay != (
            self._knobs.weight_decay
        ):
            if self._make_optimizer is not optim.make:
                raise BadInput("job: optimizer: is one of its own; only the rate can be changed")
            self._optimizer = optim.hand_over(self._optimizer, self._parameters, knobs)
        self._parts.put(knobs)
        self._knobs = knobs

    def evaluate(self, split: Split) -> Score:
        """Loss and accuracy on a split, without gradients or dropout."""
        return judge(self._module, self._load.rows[split])

    def snapshot(self) -> Snapshot:
        """The trained weights, copied, and the scale that the adapter had with them."""
        scale = self._knobs.adapter_scale
        return remember(self._parameters) + ([] if scale is None else [torch.tensor(scale)])

    def restore(self, snapshot: Snapshot) -> None:
        """Put weights back and forget the optimizer's moments; the rate stays as chosen."""
        if self._knobs.adapter_scale is not None:
            *snapshot, scale = snapshot
            self._knobs = self._knobs.having(adapter_scale=scale.item())
            self._parts.put(self._knobs)
        recall(snapshot, self._parameters, self._optimizer)
        self._optimizer = self._make_optimizer(self._parameters, self._knobs)  # its counters too

    def _fit(self, knobs: Knobs, now: Knobs) -> Knobs:
        """The knobs that this run can have; its objective has no beta."""
        own = now.head_rate if knobs.head_rate is None else knobs.head_rate
        if len(self._head) == len(self._parameters):
            own = None  # nothing else is in training: there is no other rate
        return self._parts.fit(knobs, now).having(beta=None, head_rate=own)

    def _set_mode(self, mode: Literal["train", "eval"]) -> None:
        turn = getattr(self._optimizer, mode, None)
        if turn is not None:
            turn()


def forward(module: nn.Module, rows: workload.Tokens, index: Tensor) -> dict[str, Tensor]:
    """Loss and logits of some rows, cut to the longest of them. index: (rows,) their numbers."""
    device = next(module.parameters()).device
    length = int(rows.lengths[index.numpy()].max())
    result: dict[str, Tensor] = module(
        rows.ids[index, :length].to(device),
        rows.mask[index, :length].to(device),
        rows.labels[index].to(device),
    )
    return result


def judge(module: nn.Module, rows: workload.Tokens) -> Score:
    """Loss and accuracy on rows, without gradients or dropout; the module's mode is kept."""
    training, device = module.training, next(module.parameters()).device
    module.eval()
    loss, right = torch.zeros(2, device=device)
    with torch.inference_mode():
        for start in range(0, len(rows), 128):
            index = torch.arange(start, min(start + 128, len(rows)))
            result = forward(module, rows, index)
            loss += result["loss"] * len(index)
            right += (result["logits"].argmax(-1) == rows.labels[index].to(device)).sum()
    module.train(training)
    total, correct = torch.stack([loss, right]).tolist()
    return Score(total / len(rows), correct / len(rows))


def finite(parameters: Sequence[Tensor]) -> bool:
    """Whether every weight is a finite number; one transfer from the device."""
    exact = functools.reduce(torch.promote_types, {p.dtype for p in parameters}, torch.float32)
    with torch.no_grad():  # the norm of finite weights is finite: 16 bits do not hold it
        sums = torch._foreach_norm([*parameters], dtype=exact)
    return math.isfinite(torch.stack(sums).sum().item())


def report_start(job: Job, validation: float) -> Progress:
    """The report before any update: nothing is known but the validation loss."""
    knobs = job.knobs
    return Progress(
        step=0,
        rate=knobs.rate,
        factor=factor(knobs, 0, job.task.steps),
        validation=validation,
    )


def with_validation(
    progress: Progress, before: Progress, validation: float | None, decision: Decision
) -> Progress:
    """A report with the decision that led to it and the validation loss, or the last known."""
    if validation is None:
        return replace(
            progress, validation=before.validation, age=before.age + 1, decision=decision
        )
    return replace(progress, validation=validation, age=0, decision=decision)


def spread(seed: int, count: int) -> list[int]:
    """Independent seeds from one."""
    if seed < 0:
        raise BadInput(f"seed: {seed} is negative; give a whole number >= 0")
    return [int(x) for x in np.random.SeedSequence(seed).generate_state(count)]


def batches(rows: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of row numbers; a new order each epoch, the last short batch dropped."""
    for epoch in epochs(rows, batch, seed):
        yield from epoch


def epochs(rows: int, batch: int, seed: int) -> Iterator[Tensor]:
    """The same, (batches, batch) row numbers of a whole epoch at a time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(rows, generator=generator)
        yield order[: rows - rows % batch].view(-1, batch)
