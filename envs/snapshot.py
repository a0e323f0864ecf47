"""Snapshots: trained weights kept in memory, and put back."""

from collections.abc import Sequence

import torch
from torch import Tensor

Snapshot = list[Tensor]


def remember(parameters: Sequence[Tensor], into: Snapshot | None = None) -> Snapshot:
    """A copy of the weights; ``into`` reuses the memory of an old snapshot."""
    with torch.no_grad():
        if into is None:
            return [p.detach().clone() for p in parameters]
        torch._foreach_copy_(into, list(parameters))
    return into


def recall(
    snapshot: Snapshot,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put the weights back and forget the optimizer's moments.

    The moments belong to the weights that were left; after a divergence they would keep
    AdamW's steps tiny for a thousand updates. The learning rate is not touched: the chosen
    rate stands.
    """
    with torch.no_grad():
        torch._foreach_copy_(list(parameters), snapshot)
    optimizer.state.clear()
    optimizer.zero_grad()
