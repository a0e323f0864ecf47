"""Instruments: what is read from a Trainer's model and set on its schedule, without a trace."""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from envs import probe
from envs.chance import put_back
from envs.errors import BadInput
from envs.files import write_atomic
from envs.head import unwrapped
from envs.processes import total, world
from envs.shards import local, reshard, sharded
from envs.snapshot import Snapshot, cramped, statistics

logger = logging.getLogger(__name__)


class Rates:
    """The user's schedule, and the scale on it."""

    def __init__(self, scheduler: Any, base: list[float] | None = None) -> None:
        """base: the user's peak rates, where the scheduler's are no longer these."""
        kind = type(scheduler)
        if not isinstance(scheduler, LambdaLR) or kind.get_lr is not LambdaLR.get_lr:
            raise BadInput(
                f"trainer: lr_scheduler_type: {kind.__name__} cannot be scaled; use linear, "
                "cosine, constant or another of transformers' fixed schedules"
            )
        self._scheduler = scheduler
        self.base = base or [float(rate) for rate in scheduler.base_lrs]
        self._at = max(range(len(self.base)), key=self.base.__getitem__)
        self.start = self.base[self._at]

    @property
    def factor(self) -> float:
        """The schedule's shape at the next update."""
        return float(self._scheduler.lr_lambdas[self._at](self._scheduler.last_epoch))

    @property
    def warming(self) -> bool:
        """Whether the schedule is still rising."""
        return self.rising(self._scheduler.last_epoch)

    def rising(self, at: int) -> bool:
        """Whether the update after ``at`` has more of the peak than that one."""
        shape = self._scheduler.lr_lambdas[self._at]
        return bool(shape(at + 1) > shape(at))

    def put(self, rate: float) -> None:
        """Scale all groups so that the largest peak is ``rate``; used and logged from now on."""
        scheduler, scale = self._scheduler, rate / self.start
        scheduler.base_lrs = [
            rate if base == self.start else base * scale if scale != 1 else base
            for base in self.base
        ]
        rates = [
            base * shape(scheduler.last_epoch)
            for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, value in zip(scheduler.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value
        scheduler._last_lr = rates

    def leave(self, *, loaded: bool = False) -> None:
        """The user's rates again, if somebody goes on with the schedule.

        loaded: a checkpoint has set the rate in force since. It is left alone then, as is one that
        another schedule has set.
        """
        scheduler = self._scheduler
        rates = [group["lr"] for group in scheduler.optimizer.param_groups]
        if loaded or not all(map(math.isclose, rates, scheduler.get_last_lr())):
            scheduler.base_lrs = [*self.base]
        else:
            self.put(self.start)


class Eyes:
    """Hooks on the model: the loss of each update, and gradients before they are clipped."""

    def __init__(self, model: nn.Module, accumulation: int, averaged: bool = True) -> None:
        """averaged: tokens are counted over all processes, ``average_tokens_across_devices``."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise BadInput("trainer: model: no weight of it is trainable; unfreeze some")
        self.sharded = sharded(model)
        self.trained = len(trained)
        kept = [*trained, *statistics(model).values()]  # what training changes
        self.parameters = [local(p) for p in kept]  # this process's parts, under FSDP
        self.sampled = probe.sampled(trained)
        self.device = self.parameters[0].device
        self.losses: list[Any] = []  # one an update; tensors until they are fetched
        self.blind = False  # the model's output has no loss that counts
        self.foreign = False  # it has one, but another is trained
        self.error: Exception | None = None
        self.watching = False
        self.last_gradient: Tensor | None = None
        self._model, self._world, self._averaged = model, world(), averaged
        self._parts: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._inputs: Any = ((), {})
        self._trained: bool | None = None  # the output's loss is; None before the first update
        self._scaled: bool | None = None if accumulation * self._world > 1 else False
        self._gradients: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        self._forward = model.register_forward_hook(self._on_forward, with_kwargs=True)

    def _on_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        try:
            loss = loss_of(output)
            if loss is None or self.blind:
                self.blind = True
                return
            if self._trained is None and loss.requires_grad:
                loss.register_hook(self._on_backward)  # type: ignore[no-untyped-call]
            if self._scaled is None:
                self._inputs = (args, kwargs)
            self._parts.append(loss.detach().float().clone())
        except Exception as error:
            self.error = error

    def _on_backward(self, gradient: Tensor | None) -> None:
        self._trained = self._trained or gradient is not None

    def see_step(self, loss: Tensor) -> None:
        """What a Trainer's ``training_step`` gave: it counts where the model's output has none."""
        self._steps.append(loss.detach().float().clone())

    def end_update(self) -> None:
        """The micro-batches of an update become its loss; nothing is read from the device.

        With several processes it is the loss of all of them, and each has to call this.
        """
        if self._parts and not self._trained:  # as with DPO, whose loss is made of log-likelihoods
            self.blind = self.foreign = True
            self._parts, self._inputs = [], ((), {})
        if self._parts and self._scaled is None:
            self._scaled = _is_share(self._model, *self._inputs)
            self._inputs = ((), {})
        loss = None
        if self._parts:
            loss, count = functools.reduce(torch.add, self._parts), len(self._parts)
            if not self._scaled:
                loss = loss / count if count > 1 else loss
            elif self._averaged and self._world > 1:
                loss = loss * self._world  # it was divided by the items of all processes
        elif self._steps:
            loss = functools.reduce(torch.add, self._steps)
        self._parts, self._steps = [], []
        if self._world > 1:
            mine = torch.zeros((), device=self.device) if loss is None else loss
            mean = total(mine) / self._world
            loss = None if loss is None else mean
        if loss is not None:
            self.losses.append(loss)

    def everywhere(self, mine: bool) -> bool:
        """Whether it holds of all shards; under FSDP every process has to ask."""
        if not self.sharded:
            return mine
        return total(torch.tensor(float(not mine), device=self.device)).item() == 0

    def reshard(self) -> None:
        """Make a change of the weights count under FSDP."""
        if self.sharded:
            reshard(self._model)

    def fetch(self) -> list[float]:
        """The losses so far as numbers; one transfer from the device."""
        tensors = [loss for loss in self.losses if isinstance(loss, Tensor)]
        if tensors:
            numbers = [loss for loss in self.losses if not isinstance(loss, Tensor)]
            self.losses = [*numbers, *torch.stack(tensors).tolist()]
        return list(self.losses)

    def watch_gradients(self) -> None:
        """Keep a sample of the gradients of each update from now on."""
        if not self.watching:
            self.watching = True
            self._handles = [
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    functools.partial(self._on_gradient, index)
                )
                for index, parameter in enumerate(self.sampled)
                if parameter.requires_grad  # not frozen for now
            ]

    def _on_gradient(self, index: int, parameter: Tensor) -> None:
        try:
            if parameter.grad is not None:
                self._gradients[index] = probe.view(parameter.grad).clone()
        except Exception as error:
            self.error = error

    def gradient(self, optimizer: Any) -> Tensor:
        """The sample of the update's gradients as they were before clipping, of all processes."""
        parts = [
            self._gradients[i] if i in self._gradients else torch.zeros_like(probe.view(parameter))
            for i, parameter in enumerate(self.sampled)
        ]
        self._gradients = {}
        scaler = getattr(optimizer, "scaler", None)
        self.last_gradient = torch.cat(parts)
        if scaler is not None:
            self.last_gradient = self.last_gradient / scaler.get_scale()
        if self._world > 1 and not self.sharded:  # the hooks are faster than DDP
            self.last_gradient = total(self.last_gradient) / self._world
        return self.last_gradient

    def rest(self) -> None:
        """No more gradients for now."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.watching, self._gradients = [], False, {}

    def close(self) -> None:
        """Take all hooks off the model."""
        self.rest()
        self._forward.remove()


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards modes and random states are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    with put_back([next(model.parameters()).device]):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def loss_of(output: Any) -> Tensor | None:
    """The loss in a model's output; None where it has none."""
    found = output.get("loss") if isinstance(output, Mapping) else None
    if isinstance(output, tuple | list) and output:
        found = output[0]
    return found if isinstance(found, Tensor) and found.ndim == 0 else None


def _is_share(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the model divides its loss by ``num_items_in_batch``: ask it, without a trace."""
    items = kwargs.get("num_items_in_batch")
    if items is None:
        return False
    with aside(module), torch.no_grad():
        one, two = (
            loss_of(module(*args, **{**kwargs, "num_items_in_batch": items * times}))
            for times in (1, 2)
        )
    return one is not None and two is not None and bool(two < 0.75 * one)


def write_weights(
    path: Path, mark: Mapping[str, str], sample: Tensor | None, weights: Snapshot
) -> None:
    """Keep a snapshot, and the gradient sample of an interval that is nearly full.

    mark: what tells the file from those of other checkpoints.
    """
    tensors = {f"weight{i}": weight for i, weight in enumerate(weights)}
    if sample is not None:
        tensors["gradient"] = sample
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(tensors, dict(mark)))


def read_weights(
    path: Path, mark: Mapping[str, str], eyes: Eyes
) -> tuple[Tensor | None, Snapshot | None]:
    """The gradient sample and the weights of `write_weights`; None where they are not there."""
    if not path.is_file():
        return None, None
    try:
        with safetensors.safe_open(path, "pt") as file:
            if (file.metadata() or {}) != mark:
                return None, None
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        logger.warning("%s: cannot be read: %s", path, error)
        return None, None
    for i, buffer in enumerate(eyes.parameters[eyes.trained :], eyes.trained):
        tensors.setdefault(f"weight{i}", buffer.clone())  # an older file has none
    weights = [tensors.get(f"weight{i}") for i in range(len(eyes.parameters))]
    shapes = [None if weight is None else weight.shape for weight in weights]
    fit = shapes == [parameter.shape for parameter in eyes.parameters]
    place = "cpu" if cramped(eyes.parameters) else eyes.device
    gradient = tensors.get("gradient")
    return (
        None if gradient is None else gradient.to(eyes.device),
        [w.to(place) for w in weights if w is not None] if fit else None,
    )


def listen(trainer: Any, tell: Callable[[Tensor], None]) -> Callable[[], None]:
    """Tell each training step's loss from now on -> what ends that and leaves no trace."""
    step, own = trainer.training_step, "training_step" in vars(trainer)

    @functools.wraps(step)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        tell(loss)
        return loss

    def end() -> None:
        del trainer.training_step
        if own:
            trainer.training_step = step

    trainer.training_step = training_step
    return end


def rows_of(dataset: Any, seen: int) -> int:
    """A dataset's rows; a stream does not know its own, and has those that are ``seen``."""
    try:
        return len(dataset)
    except (TypeError, AttributeError, NotImplementedError):
        return seen


def describe(model: nn.Module, loader: Any, classes: int | None, seen: int) -> dict[str, Any]:
    """What a `Context` has of the model and the data. seen: rows of a run, for a stream's size."""
    named = getattr(getattr(model, "config", None), "num_labels", None) or 2
    known = classes or max(2, named)  # one output is a regression or a reward: it has no classes
    lora = any("lora_" in name for name, _ in model.named_parameters())
    return {
        "parameters": _size(model),
        "rows": rows_of(getattr(loader, "dataset", None), seen),
        "classes": int(known),
        "adapter": "lora" if lora else "full",
    }


def _size(model: nn.Module) -> int:
    """Weights of a model; of an encoder-decoder without one half: width is what counts."""
    whole, inner = _count(model), unwrapped(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        finders = (getattr(inner, name, None) for name in ("get_encoder", "get_decoder"))
        halves = [_count(find()) for find in finders if find is not None]
        if len(halves) == 2:
            return max(*halves, whole - min(halves))  # a backbone is in neither
    return whole


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else 0
