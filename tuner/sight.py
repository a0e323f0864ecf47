"""Sight: what the tuner sees of a Trainer's run."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from envs import probe
from envs.errors import BadInput
from envs.gauge import Gauge
from envs.instruments import Eyes, listen
from envs.job import finite
from envs.processes import rank
from envs.progress import Progress
from envs.purpose import objective_of
from envs.slice import Slice

logger = logging.getLogger(__name__)


class Sight:
    """The losses, gradients and validation losses of a run, by hooks that `close` takes off.

    Without the Trainer, a loss that is computed outside of the model is known from the log alone.
    """

    def __init__(
        self, args: Any, model: nn.Module, optimizer: Any, loader: Any, trainer: Any,
        dataset: Any, rows: int,
    ) -> None:  # fmt: skip
        """dataset: its first ``rows`` rows are judged; None: the Trainer's own, if it is given."""
        # the loss is no measure then
        self.rewarded = hasattr(trainer, "reward_funcs") or objective_of(args, model) == "grpo"
        if self.rewarded and dataset is not None:
            raise BadInput(
                "callback: eval_dataset: where there is a reward its rows have no loss that "
                'counts; leave it out, and let the Trainer evaluate (eval_strategy="steps")'
            )
        judge = None if self.rewarded else trainer
        self._slice = _slice(args, dataset, rows, judge)
        self.own = self._slice is not None
        averaged = args.average_tokens_across_devices
        self.eyes = Eyes(model, args.gradient_accumulation_steps, averaged)
        self.gauge = Gauge()
        self.probe = probe.Probe()
        self._model, self._optimizer, self._loader = model, optimizer, loader
        self._trainer = trainer
        self._stuck = False  # the log's loss is NaN: the Trainer's sum stays so
        self._deaf: Callable[[], None] | None = None  # takes the ear off the Trainer
        if judge is not None:
            self._deaf = listen(judge, self.eyes.see_step)

    @property
    def validates(self) -> bool:
        """Whether there are rows to evaluate here; else it is the user's evaluations that count."""
        return self._slice is not None

    @property
    def mistaken(self) -> bool:
        """Whether the rows are judged by a loss that is not the one in training."""
        return self.eyes.foreign and self._trainer is None and self.validates

    @property
    def logs_alone(self) -> bool:
        """Whether losses are known from the log alone."""
        return self.eyes.blind and self._deaf is None

    def drop(self) -> None:
        """Evaluate no rows any more."""
        self._slice = None

    def watch(self, last: bool) -> None:
        """Gradients are in and clipped. last: it is an interval's last update."""
        if self.eyes.watching:
            self.probe.gradient(self.eyes.gradient(self._optimizer))
            if last:
                self.probe.before(self.eyes.sampled)

    def moved(self) -> None:
        """The weights have made an interval's last update."""
        if self.eyes.watching:
            self.probe.after(self.eyes.sampled)

    def glance(self, step: int, rate: float, factor: float) -> Progress:
        """A report of the updates since the last decision, without the probe's figures."""
        return Progress(
            step=step,
            rate=rate,
            factor=factor,
            losses=tuple(self.eyes.fetch()),
            finite=self.eyes.everywhere(finite(self.eyes.parameters)),
        )

    def report(self, step: int, rate: float, factor: float) -> Progress:
        """The report that closes an interval; the same figures as a `TorchJob`'s."""
        gradient, clipped, update, cosine = self.probe.read(self.eyes.sharded)
        self.eyes.rest()
        return replace(
            self.glance(step, rate, factor),
            gradient=gradient, clipped=clipped, update=update, cosine=cosine,
        )  # fmt: skip

    def validation(self) -> float | None:
        """The loss on the rows; every process asks, and rank 0 is told."""
        if self._slice is None:
            return None
        if rank() != 0 and not self.eyes.sharded and self._trainer is None:
            return None
        loss = self._slice.loss(self._model, self._optimizer, self._loader)
        self.eyes.reshard()
        return loss

    def evaluated(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """What counts of the user's evaluation: the cost of a reward, where there is one."""
        if "eval_reward" not in metrics:
            return metrics
        cost = self.gauge.cost(metrics, "eval_")
        return {} if cost is None else {"eval_loss": cost}

    def logged(self, logs: Mapping[str, Any]) -> float | None:
        """The logged loss, where the model's output has none; one of NaN is told once."""
        cost = self.gauge.cost(logs) if self.logs_alone else None
        if cost is None:
            return None
        told, self._stuck = self._stuck, not math.isfinite(cost)
        return None if told and self._stuck else cost

    def close(self) -> None:
        """Leave the model and the Trainer as they were found."""
        self.eyes.close()
        if self._deaf is not None:
            self._deaf()
        self._deaf = None


def _slice(args: Any, dataset: Any, rows: int, judge: Any) -> Slice | None:
    found: Any = judge.eval_dataset if dataset is None and judge is not None else dataset
    found = next(iter(found.values()), None) if isinstance(found, dict) else found
    if hasattr(found, "__len__") and hasattr(found, "__getitem__") and len(found):
        return Slice(found, rows, args.per_device_eval_batch_size, judge)
    if dataset is not None:
        raise BadInput(
            "callback: eval_dataset: no rows that can be counted; give some, or leave it out"
        )
    return None


def need_validation(args: Any, features: Iterable[Any], rewarded: bool) -> None:
    """Without validation losses only policies that were trained for it go on."""
    if args.eval_on_start or args.eval_strategy != "no":
        return
    known = next((each for each in features if each.name == "has_validation"), None)
    way_out = 'let the Trainer evaluate (eval_strategy="steps")'
    way_out = way_out if rewarded else f"give eval_dataset=, or {way_out}"
    if known is not None and known.low > 0:
        raise BadInput(
            "callback: eval_dataset: there is none, the Trainer evaluates nothing, and the "
            f"policy was never trained without validation losses; {way_out}"
        )
    logger.warning("no validation losses: the tuner goes by training losses; %s", way_out)
