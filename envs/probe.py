"""Probe: norms and cosines of gradients and updates, from a fixed sample of the weights.

A whole pass over a large model for each figure would cost more than the tuner may spend, so
every figure comes from at most `TENSORS` weight matrices, `SAMPLE` evenly spaced entries each.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from envs.processes import total
from envs.shards import local

TENSORS = 24
SAMPLE = 1024


def sampled(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """The trainable weight matrices that the probe looks at, evenly spread over the model."""
    matrices = [p for p in parameters if p.requires_grad and p.ndim >= 2]
    matrices = matrices or [p for p in parameters if p.requires_grad]
    count = min(TENSORS, len(matrices))
    return [matrices[i * len(matrices) // count] for i in range(count)]


def view(tensor: Tensor) -> Tensor:
    """At most `SAMPLE` evenly spaced entries of a tensor, or of this process's part, flat."""
    dense = local(tensor.detach()).contiguous()
    stride = max(1, -(-dense.numel() // SAMPLE))
    count = -(-dense.numel() // stride)
    # One call where a reshape and a slice are two: this runs within the user's backward pass.
    return dense.as_strided((count,), (stride,)).float()


def gather(tensors: Sequence[Tensor]) -> Tensor:
    """The sampled entries of all tensors in one new vector."""
    return torch.cat([view(tensor) for tensor in tensors])


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient of a weight; zeros where it has none."""
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)


class Probe:
    """Collects samples around the last two updates of an interval; `read` gives the figures.

    The order of calls in an interval: `gradient` after each of the last two backward passes,
    before clipping; then `before` and `after` around the last optimizer step.
    """

    def __init__(self) -> None:
        self._gradients: list[Tensor] = []
        self._clipped: Tensor | None = None
        self._weights: Tensor | None = None
        self._update: Tensor | None = None

    def gradient(self, sample: Tensor) -> None:
        """sample: `gather` of the gradients of one update, before clipping."""
        self._gradients = [*self._gradients[-1:], sample]

    def before(self, parameters: Sequence[nn.Parameter]) -> None:
        """Just before the optimizer steps: gradients as clipped, weights as they are."""
        self._clipped = gather([gradient_of(p) for p in parameters])
        self._weights = gather(parameters)

    def after(self, parameters: Sequence[nn.Parameter]) -> None:
        """Just after the optimizer has stepped."""
        if self._weights is not None:
            self._update = gather(parameters) - self._weights

    def read(self, sharded: bool = False) -> tuple[float, float, float, float]:
        """(gradient norm, clipped share, update ratio, gradient cosine), NaN where unknown.

        One transfer from the device; the probe is empty afterwards. sharded: every process reads,
        and each has a part of the samples.
        """
        gradients, clipped, weights, update = (
            self._gradients,
            self._clipped,
            self._weights,
            self._update,
        )
        self.__init__()  # type: ignore[misc]
        if not gradients or clipped is None or weights is None or update is None:
            return math.nan, 1.0, math.nan, math.nan
        last = gradients[-1]
        alike = len(gradients) == 2 and len(gradients[0]) == len(last)
        first = gradients[0] if alike else torch.full_like(last, math.nan)
        samples = (sample[None] for sample in (last, clipped, update, weights, first))
        row = figures(*samples)[0]
        if sharded:
            squares = total(torch.cat([row[:-1] ** 2, row[-1:]]))
            row = torch.cat([squares[:-1].sqrt(), squares[-1:]])
        return reading(row.tolist())


def figures(
    last: Tensor, clipped: Tensor, update: Tensor, weights: Tensor, first: Tensor
) -> Tensor:
    """Samples of runs, (runs, entries) each -> (runs, 6) norms and a product, for `reading`.

    last, first: gradients of the last update and of the one before it, NaN if there was none;
    clipped: the last one's after clipping.
    """
    norms = [part.norm(dim=1) for part in (last, clipped, update, weights, first)]
    return torch.stack([*norms, (last * first).sum(1)], 1)


def reading(row: Sequence[float]) -> tuple[float, float, float, float]:
    """A row of `figures` -> (gradient norm, clipped share, update ratio, gradient cosine)."""
    gradient, after, moved, size, other, product = row
    share = min(1.0, after / gradient) if gradient > 0 and math.isfinite(gradient) else 1.0
    ratio = moved / size if size > 0 else math.nan
    cosine = product / (gradient * other) if gradient * other > 0 else math.nan
    return gradient, share, ratio, cosine
