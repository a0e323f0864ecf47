"""Trainer jobs: any transformers or TRL Trainer as a `Job`."""

import functools
import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import greenlet
import torch
from transformers import Trainer, TrainerCallback

from envs import probe
from envs.chance import RandomState, every
from envs.errors import BadInput, RunFailed
from envs.gauge import Gauge
from envs.handles import Handles, beta_of, kind_of
from envs.head import Lift, head_of, is_new
from envs.instruments import Eyes, Rates, describe, listen
from envs.job import Score, finite, spread
from envs.knobs import OPTIMIZERS, Actions, Knobs, Optimizer
from envs.parts import Parts
from envs.progress import Context, Progress
from envs.purpose import objective_of
from envs.refusals import refuse_job
from envs.snapshot import Snapshot, recall, remember, statistics
from envs.switchable import SwitchableOptimizer
from envs.task import Split, Task


@dataclass(frozen=True)
class Setup:
    """What a factory hands over: a Trainer that has not begun, and how its weights are judged.

    score: the Trainer and a split -> a cost that is never negative (nats for a likelihood), and
    the metric, higher is better. It may leave the model in evaluation mode and use up random
    numbers: the job guards both. marks: where a model writes, what the field gives its texts, by
    name; slow, and of no use to a comparison of models that can hardly write.
    """

    trainer: Any
    score: Callable[[Any, Split], Score]
    rows: int  # of the training split
    classes: int = 2
    marks: Callable[[Any, Split], Mapping[str, float]] | None = None


Make = Callable[[Task, int, Knobs], Setup]


class TrainerJob:
    """A Trainer whose own loop runs, an interval at a time.

    ``trainer.train()`` lives in a greenlet. It comes to a halt before the update at which a
    decision is due, and goes on where it stood: whatever the Trainer does at an update, it does.
    With the knobs left alone the run is the plain ``trainer.train()`` bit for bit. Python's,
    NumPy's and torch's random states are the job's own while it runs, and the caller's otherwise.
    The schedule is the Trainer's, and ``knobs.rate`` its peak. A job that is dropped in the middle
    leaves its loop by an exception of greenlet's, which runs the Trainer's own clean-up.
    """

    def __init__(self, task: Task, seed: int, knobs: Knobs | None = None, *, make: Make) -> None:
        """make: the task, a seed and the knobs to start from -> the `Setup`."""
        _freeze()
        self.task = task
        self._knobs = knobs or Knobs()
        self._start_rate = self._knobs.rate
        mine, numpy_seed = spread(seed, 2)
        self._world = RandomState(mine, every(), numpy_seed)
        with self._world.lent():
            self._setup = make(task, seed, self._knobs)
        trainer = self._setup.trainer
        refuse_job(trainer)
        with self._world.copied():
            optimizer = optimizer_of(trainer)
        self._knobs = in_force(trainer, optimizer, self._knobs)
        self._model = trainer.model
        self._parameters: list[torch.Tensor] = [
            p for p in self._model.parameters() if p.requires_grad
        ]
        if not self._parameters:
            raise BadInput("trainer: model: no weight of it is trainable; unfreeze some")
        self._parameters += statistics(self._model).values()
        found = describe(self._model, None, self._setup.classes, self._setup.rows)
        own = task.objective == "own"
        objective = objective_of(trainer.args, self._model) if own else task.objective
        head = self._head_rate(self._knobs.head_rate, optimizer)
        self._parts = Parts(self._model)
        self._knobs = self._fit(self._knobs, Knobs()).having(head_rate=head)
        self._scale()
        self._context = Context(
            total=task.steps,
            decisions=task.decisions,
            optimizer=self._knobs.optimizer,
            start_rate=self._start_rate,
            objective=objective,
            **found,
        )
        self._switch = isinstance(optimizer, SwitchableOptimizer)
        self._pace = _Pace(trainer, self._parts)
        trainer.add_callback(self._pace)
        self._loop = greenlet.greenlet(trainer.train)
        self._lost, self._closed = 0, False

    @property
    def step(self) -> int:
        """Updates done; those that a Trainer could not make after it diverged count too."""
        return self._pace.step + self._lost

    @property
    def knobs(self) -> Knobs:
        """The settings in force."""
        return self._knobs

    @property
    def context(self) -> Context:
        """What the observation needs to know of the run as a whole."""
        return self._context

    def advance(self, steps: int) -> Progress:
        """Let the Trainer make ``steps`` updates.

        What a Trainer raises when its weights are no longer finite, as generation does, counts as
        divergence. Its loop has ended then: the losses of all further updates are NaN, also after
        a restore. Anything else it raises is raised here.
        """
        if self._closed:
            raise RunFailed("trainer: job: it was closed; open another one")
        pace = self._pace
        pace.until, pace.knobs = pace.step + steps, self._knobs
        if not self._lost:
            self._run()
        left = pace.until - pace.step
        if left and not self._lost and finite(self._parameters):
            raise RunFailed(
                f"trainer: stopped by itself at update {self.step} of {self.task.steps}; take off "
                "the callbacks that stop it early, or plan fewer steps"
            )
        self._lost += left
        gradient, clipped, update, cosine = pace.probe.read()
        return Progress(
            step=self.step,
            rate=self._knobs.rate,
            factor=pace.factor,
            losses=(*pace.fetch(), *[math.nan] * left),
            gradient=gradient,
            clipped=clipped,
            update=update,
            cosine=cosine,
            finite=finite(self._parameters),
        )

    def _head_rate(self, times: float | None, optimizer: Any) -> float | None:
        """What the head's rate is opened with: of a new one, where all weights have one rate."""
        head = head_of(self._model)
        if times is None or not is_new(self._model, head):
            return None
        if optimizer is not None and not Lift(head, optimizer).able:
            return None
        return times

    def _fit(self, knobs: Knobs, now: Knobs) -> Knobs:
        """The layers and the scale that this run can have; one layer at least, as in a callback."""
        fitted = self._parts.fit(knobs, now)
        if getattr(self._setup.trainer.args, "load_best_model_at_end", False):
            fitted = fitted.having(adapter_scale=None)  # these weights had another
        return fitted if fitted.depth is None else fitted.having(depth=max(1, fitted.depth))

    def _scale(self) -> None:
        """Scale the adapter at once: it is judged before the next update."""
        self._parts.put(Knobs(adapter_scale=self._knobs.adapter_scale))

    def _run(self) -> None:
        """Let the loop go on to its next halt, or to its end."""
        self._loop.parent = greenlet.getcurrent()
        try:
            with self._world.lent():
                self._loop.switch()
        except Exception:
            if finite(self._parameters):
                raise

    def apply(self, knobs: Knobs) -> None:
        """Put the settings in force from the next update on.

        The rate, weight decay and clipping of any Trainer, its model's depth and LoRA's scaling;
        beta, if it has one; the rate of a new head, if the run was opened with one; the optimizer,
        if it is a `envs.switchable.SwitchableOptimizer`. Raises `BadInput` for any other change.
        """
        own = ["shape", "warmup"]
        if not self._switch:
            own.append("optimizer")
        for name in own:
            if getattr(knobs, name) != getattr(self._knobs, name):
                raise BadInput(
                    f"trainer: {name}: is the Trainer's own and cannot be changed in the run; "
                    "leave it as it is"
                )
        beta = None if self._knobs.beta is None else knobs.beta or self._knobs.beta
        now = self._knobs.head_rate
        head = now if now is None or knobs.head_rate is None else knobs.head_rate
        self._knobs = self._fit(knobs, self._knobs).having(beta=beta, head_rate=head)
        self._scale()

    def evaluate(self, split: Split) -> Score:
        """Judge the weights on a split as the factory says; training is not affected."""
        training = [(module, module.training) for module in self._model.modules()]
        with self._world.copied():
            score = self._setup.score(self._setup.trainer, split)
        for module, mode in training:
            module.training = mode
        return score

    def snapshot(self) -> Snapshot:
        """The trained weights, copied, and the scale that the adapter had with them."""
        scale = self._knobs.adapter_scale
        return remember(self._parameters) + ([] if scale is None else [torch.tensor(scale)])

    def restore(self, snapshot: Snapshot) -> None:
        """Put weights back and forget the optimizer's moments; the other knobs stay."""
        if self._knobs.adapter_scale is not None:
            *snapshot, scale = snapshot
            self._knobs = self._knobs.having(adapter_scale=scale.item())
            self._scale()
        optimizer = self._setup.trainer.optimizer
        if optimizer is None:  # made when training begins
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, snapshot)
        else:
            recall(snapshot, self._parameters, optimizer)

    def close(self) -> None:
        """Leave the Trainer's loop; nothing can be advanced any more."""
        self._closed = True
        if not self._loop.dead:  # one that has not begun is false, and not dead
            self._loop.parent = greenlet.getcurrent()
            with self._world.lent():
                self._loop.throw()


def optimizer_of(trainer: Any) -> Any:
    """The optimizer that a Trainer has, or one as its own ``create_optimizer`` will make.

    None: as its arguments say. What is made here is looked at and not trained with: the Trainer
    makes another when its run begins. Random numbers may be used up.
    """
    own = getattr(trainer.create_optimizer, "__func__", None) is not Trainer.create_optimizer
    if trainer.optimizer is not None or not own:
        return trainer.optimizer
    scheduler = trainer.lr_scheduler
    trainer.create_optimizer()
    made, trainer.optimizer, trainer.lr_scheduler = trainer.optimizer, None, scheduler
    return made


def in_force(trainer: Any, optimizer: Any, knobs: Knobs) -> Knobs:
    """The knobs with the settings that are the Trainer's own, or its optimizer's if it has one."""
    args = trainer.args
    named = str(getattr(args.optim, "value", args.optim))
    kind: Optimizer = next((known for known in OPTIMIZERS if known == named), "adamw")
    decay = args.weight_decay
    if optimizer is not None:
        kind = kind_of(optimizer)
        decay = max(group.get("weight_decay") or 0.0 for group in optimizer.param_groups)
    return replace(knobs, optimizer=kind).having(
        weight_decay=min(max(float(decay), 0.0), 1.0),
        clip=min(max(float(args.max_grad_norm or 0.0), 0.0), 1e6),
        beta=beta_of(trainer),
    )


class _Pace(TrainerCallback):
    """Halts the Trainer before the update ``until``, and reads what a report needs of the rest.

    It must not refer to the greenlet: the last reference to a dropped job's loop ends it.
    """

    def __init__(self, trainer: Any, parts: Parts) -> None:
        self.step, self.until, self.knobs = 0, 0, Knobs()
        self._trainer, self._parts = trainer, parts
        self.factor = 1.0
        self.probe = probe.Probe()
        self._rewarded, self._gauge = hasattr(trainer, "reward_funcs"), Gauge()
        if not self._rewarded:
            listen(trainer, self._hear)

    def _hear(self, loss: torch.Tensor) -> None:
        """The update's loss where the model's output has none; the first update tells."""
        if self._eyes.blind or not self.step:
            self._eyes.see_step(loss)

    def fetch(self) -> list[float]:
        """The losses of the updates since the last call; one transfer from the device.

        Of a Trainer that learns by reward one cost, of what the last updates were rewarded: there
        the loss is no measure.
        """
        losses, self._eyes.losses = self._eyes.fetch(), []
        return losses

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take hold of what the Trainer has made by now."""
        self._rates = Rates(kwargs["lr_scheduler"])
        averaged = args.average_tokens_across_devices
        self._eyes = Eyes(kwargs["model"], args.gradient_accumulation_steps, averaged)
        self._optimizer = kwargs["optimizer"]
        self._handles = Handles(
            args,
            kwargs["model"],
            self._optimizer,
            self._rates.start,
            Actions(),
            trainer=self._trainer,
            parts=self._parts,
        )
        self._put = in_force(self._trainer, self._optimizer, self._handles.given)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Halt if a decision is due, and go on with what was decided."""
        while state.global_step >= self.until:
            greenlet.getcurrent().parent.switch()
        if self.knobs != self._put:
            self._handles.put(self.knobs, self._put)
            self._rates.put(self.knobs.rate)
            self._put = self.knobs
        if self.until - state.global_step <= 2:
            self._eyes.watch_gradients()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are in and clipped."""
        self._handles.arm()
        if self._eyes.watching:
            self.probe.gradient(self._eyes.gradient(self._optimizer))
            if state.global_step + 1 == self.until:
                self.probe.before(self._eyes.sampled)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights have moved."""
        if self._eyes.watching and state.global_step + 1 == self.until:
            self.probe.after(self._eyes.sampled)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the update; the gradients need no more watching at an interval's end."""
        self._eyes.end_update()
        if self._rewarded:
            self._eyes.losses = []
        self.step, self.factor = state.global_step, self._rates.factor
        if self.step == self.until:
            self._eyes.rest()
            control.should_log = control.should_log or self._rewarded

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A reward is known from the log alone."""
        logs = kwargs.get("logs") or {}
        if "reward" in logs and (cost := self._gauge.cost(logs)) is not None:
            self._eyes.losses = [cost]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off the model."""
        self._eyes.close()


@functools.cache
def _freeze() -> None:
    """Each ``train()`` collects garbage; what the libraries have made by now need not be seen."""
    gc.collect()
    gc.freeze()
