"""Slice: the first rows of a dataset, evaluated beside a training without a trace."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from envs.instruments import aside, loss_of
from envs.shards import local


class Slice:
    """The first rows of a dataset, evaluated without a trace: no random number is used up.

    Nor one of the collator's own, where it can be copied. An optimizer with modes, as a
    schedule-free one, is asked for the weights that it would hand over: it is these that the user
    gets. Its way back rounds, so the weights are put back to the bit.
    """

    def __init__(self, dataset: Any, rows: int, batch: int, trainer: Any = None) -> None:
        """trainer: computes the losses, its own way, where the model's output has none."""
        self._dataset, self._rows, self._size = dataset, rows, batch
        self._trainer = trainer
        self._batches: list[tuple[int, Mapping[str, Any]]] = []

    def loss(self, model: nn.Module, optimizer: Any, loader: Any) -> float | None:
        """Mean loss over the rows; None if the model's output has none.

        With a Trainer, or under FSDP, every process has to ask.
        """
        device = next(model.parameters()).device
        with aside(model), torch.no_grad(), _metrics_of(self._trainer):
            if not self._batches:
                data = getattr(loader, "dataset", None)
                shared = (*model.modules(), optimizer, self._trainer, data)
                collate = _copied(loader.collate_fn, shared)
                self._batches = list(self._collated(loader, collate))
            with _handed_over(optimizer):
                losses = [self._one(model, batch, device) for _, batch in self._batches]
        if any(loss is None for loss in losses):
            return None
        counts = [count for count, _ in self._batches]
        total = torch.zeros((), device=device)
        for count, loss in zip(counts, losses, strict=True):
            assert loss is not None
            total += loss * count
        return total.item() / sum(counts)

    def _one(self, model: nn.Module, batch: Mapping[str, Any], device: Any) -> Tensor | None:
        if self._trainer is not None:
            return self._trainer.prediction_step(model, batch, prediction_loss_only=True)[0]
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return loss_of(model(**moved))

    def _collated(
        self, loader: Any, collate: Callable[[Any], Any]
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        names = getattr(getattr(loader, "dataset", None), "column_names", None)
        count = min(self._rows, len(self._dataset))
        for start in range(0, count, self._size):
            rows = [self._dataset[i] for i in range(start, min(start + self._size, count))]
            if names:
                rows = [{k: row[k] for k in row if k in names} for row in rows]
            yield len(rows), collate(rows)


def _copied(collate: Callable[[Any], Any], shared: Iterable[Any]) -> Callable[[Any], Any]:
    """A collator whose generator may be used up; itself where it cannot be copied.

    shared: what it may hold that is not copied with it, as a model.
    """
    try:
        return copy.deepcopy(collate, {id(each): each for each in shared})
    except Exception:
        return collate


@contextmanager
def _handed_over(optimizer: Any) -> Iterator[None]:
    """The weights that an optimizer with modes would hand over; afterwards those it trains."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's own modes are no sign
    if not any(hasattr(each, "eval") for each in (inner, getattr(inner, "optimizer", inner))):
        yield
        return
    weights = [local(p) for group in optimizer.param_groups for p in group["params"]]
    before = [weight.detach().clone() for weight in weights]
    optimizer.eval()
    try:
        yield
    finally:
        if not all(map(torch.equal, weights, before)):  # else it was asked in that mode
            optimizer.train()
            torch._foreach_copy_(weights, before)


@contextmanager
def _metrics_of(trainer: Any) -> Iterator[None]:
    """TRL's Trainers note figures of each evaluation for their next log line: forget these."""
    metrics = getattr(trainer, "_metrics", None)
    kept = copy.deepcopy(metrics)
    try:
        yield
    finally:
        if metrics is not None:
            metrics.clear()
            metrics.update(kept)
