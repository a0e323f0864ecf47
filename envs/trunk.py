"""Trunks: what frozen lower layers make of a text, computed once for all runs and episodes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from envs import workload
from envs.task import Split, Task

LARGEST = 4 << 30  # bytes of a split's states, at most; they are computed as rows are needed
CHUNK = 64  # texts computed together


class _Through(nn.Module):
    """In place of a frozen layer: its input is already what the layer above it takes."""

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        return states


class _Entry(nn.Module):
    """In place of the embeddings: what enters is already a state."""

    def forward(self, *values: Any, **named: Any) -> Tensor:
        every = [*values, *named.values()]
        return next(x for x in every if isinstance(x, Tensor) and x.is_floating_point())


class _Nothing(nn.Module):
    """In place of position embeddings that a model adds by itself."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros(*positions.shape, 1, device=positions.device)


def shorten(encoder: nn.Module, layers: int) -> None:
    """Leave only the uppermost layers; names of weights stay.

    With a state of `Trunk` as input embeddings the encoder ends as the whole one with the text.
    """
    stack = workload.layers_of(encoder)
    assert stack is not None
    for number in range(len(stack) - layers):
        stack[number] = _Through()
    if hasattr(encoder, "embeddings"):
        encoder.embeddings = _Entry()
    if hasattr(encoder, "wpe"):
        encoder.wpe = _Nothing()


@dataclass
class Trunk:
    """States that enter the trained layers, for every text of a dataset, by split."""

    task: Task
    layers: int
    device: torch.device

    def __post_init__(self) -> None:
        load = workload.load(self.task)
        self._width = load.width
        self._encoder = load.module(0).encoder.to(self.device).eval()
        self._states: dict[Split, Tensor] = {}
        self._known: dict[Split, Tensor] = {}

    def states(self, tokens: workload.Tokens, split: Split) -> Tensor:
        """(texts, length, width) of all texts of the split; those of ``tokens`` are computed."""
        source = torch.from_numpy(tokens.source)
        if split not in self._states:
            shape = (tokens.texts, tokens.ids.shape[1], self._width)
            self._states[split] = torch.empty(shape, device=self.device)
            self._known[split] = torch.zeros(tokens.texts, dtype=torch.bool)
        missing = torch.nonzero(~self._known[split][source]).flatten()
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            ids, mask = (x[part].to(self.device) for x in (tokens.ids, tokens.mask))
            self._states[split][source[part].to(self.device)] = self._entering(ids, mask)
        self._known[split][source] = True
        return self._states[split]

    def _entering(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What enters the first trained layer, or leaves the last one if none is trained."""
        stack, caught = workload.layers_of(self._encoder), list[Tensor]()
        assert stack is not None
        if self.layers:
            hook = stack[len(stack) - self.layers].register_forward_pre_hook(
                lambda _, values: caught.append(values[0])
            )
        else:
            hook = stack[-1].register_forward_hook(lambda _, __, out: caught.append(out))
        try:
            with torch.no_grad():
                self._encoder(input_ids=ids, attention_mask=mask)
        finally:
            hook.remove()
        return caught[0]


def size(task: Task) -> int:
    """Bytes of the states of a task's largest split."""
    load = workload.load(task)
    width = load.width
    return max(t.texts * t.ids.shape[1] * width * 4 for t in load.rows.values())


_TRUNKS: dict[tuple[Any, ...], Trunk] = {}


def trunk_of(task: Task, device: torch.device) -> Trunk:
    """The trunk of a task with frozen layers; shared by all its relatives."""
    assert task.trainable_layers is not None
    key = (task.dataset, task.text, task.label, task.model, task.max_length,
           task.trainable_layers, str(device))  # fmt: skip
    if key not in _TRUNKS:
        _TRUNKS[key] = Trunk(task, task.trainable_layers, device)
    return _TRUNKS[key]
