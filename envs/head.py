"""Head: the weights that came without pretraining, and a rate of their own."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LIKE = 0.2  # how far a head's deviation may be from what it is drawn with, as a share; and chance

ANCHORED = ("schedulefree", "prodigy")  # optimizers that keep where the weights were


@contextmanager
def lifted(parameters: Sequence[nn.Parameter], times: float | None) -> Iterator[None]:
    """An update inside moves these weights so many times as far: as if their rate were that.

    The same as a parameter group of their own for all optimizers whose step is proportional to the
    rate, AdamW's decoupled weight decay included, but nothing that a checkpoint would have to keep.
    """
    if times is None or times == 1:
        yield
        return
    before = _copies(parameters)
    yield
    _stretch(parameters, before, times)


class Lift:
    """The same for an optimizer that another loop calls; its hooks come off with `close`.

    Only updates that `arm` announces: of one who is gone without a word, the hooks do nothing.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: Any) -> None:
        self.parameters, self.times = parameters, 1.0
        self._optimizer, self._hooks = optimizer, list[Any]()
        self._armed, self._before = False, list[Tensor]()

    @property
    def able(self) -> bool:
        """Whether there is a head, and an optimizer that can be hooked with one rate for all."""
        groups = getattr(self._optimizer, "param_groups", [])
        rates = {float(group.get("initial_lr", group["lr"])) for group in groups}
        name = type(self._optimizer).__name__.lower()
        known = isinstance(self._optimizer, torch.optim.Optimizer)
        return (
            bool(self.parameters) and len(rates) == 1 and known
            and not any(word in name for word in ANCHORED)
        )  # fmt: skip

    def put(self, times: float) -> None:
        """From the next update on."""
        self.times = times
        if times != 1 and not self._hooks:
            self._hooks = [
                self._optimizer.register_step_pre_hook(self._note),
                self._optimizer.register_step_post_hook(self._lengthen),
            ]

    def arm(self) -> None:
        """The optimizer's next step is an update of the run."""
        self._armed = True

    def close(self) -> None:
        """Leave the optimizer as it was found."""
        for hook in self._hooks:
            hook.remove()
        self.times, self._hooks, self._armed, self._before = 1.0, [], False, []

    def _note(self, *_: Any) -> None:
        self._before = _copies(self.parameters) if self._armed and self.times != 1 else []

    def _lengthen(self, *_: Any) -> None:
        _stretch(self.parameters, self._before, self.times)
        self._armed, self._before = False, []


def _copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _stretch(parameters: Sequence[nn.Parameter], before: Sequence[Tensor], times: float) -> None:
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=False):
            parameter.copy_(further(old, parameter, times))


def further(before: Tensor, after: Tensor, times: float) -> Tensor:
    """``times`` the way from one tensor to another."""
    return torch.lerp(before, after, times)


def head_of(model: Any) -> list[nn.Parameter]:
    """What of a classifier lies outside its pretrained part and is in training.

    Of models that give a text, an image or a sound one of several classes; others have none that
    counts. A head that labels every token has many labels a row, and needs no higher rate (x3 and
    x10 did tags no good); one that rates, with one output, or writes, is another matter.
    """
    inner, base = _parts(model)
    name = type(inner).__name__
    if base is None or "Classifi" not in name or "Token" in name:
        return []
    if not any(parameter.requires_grad for parameter in base.parameters()):
        return []  # there is no other rate that the head's could be a multiple of
    within = {id(parameter) for parameter in base.parameters()}
    head = [p for p in inner.parameters() if p.requires_grad and id(p) not in within]
    matrices = [p for p in head if p.ndim > 1]
    return head if matrices and len(matrices[-1]) > 1 else []


def is_new(model: Any, head: Sequence[nn.Parameter]) -> bool:
    """Whether a head looks as transformers draws one: a trained one needs no rate of its own.

    Its biases are 0, and its matrices have the deviation that the configuration names, give or take
    what chance makes of so few numbers.
    """
    inner, base = _parts(model)
    config = getattr(inner, "config", None) or getattr(base, "config", None)
    drawn = getattr(config, "initializer_range", None)
    if not head or not isinstance(drawn, float):
        return False
    with torch.no_grad():
        return all(
            abs(float(p.float().std()) / drawn - 1) < LIKE + 4 / math.sqrt(2 * p.numel())
            if p.ndim > 1
            else not p.any()
            for p in head
        )


def unwrapped(model: Any) -> Any:
    """A model without DDP, `torch.compile` and PEFT around it."""
    for wrapper in ("module", "_orig_mod"):
        model = getattr(model, wrapper, model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _parts(model: Any) -> tuple[Any, nn.Module | None]:
    """A model without what wraps it, and its pretrained part if it names one."""
    inner = unwrapped(model)
    base = getattr(inner, getattr(inner, "base_model_prefix", "") or "-", None)
    return inner, base if isinstance(base, nn.Module) and base is not inner else None
