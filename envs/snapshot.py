"""Snapshots: trained weights kept in memory, and put back."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Snapshot = list[Tensor]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances by name, as BatchNorm's: training changes them like weights."""
    return {
        name: buffer
        for path, module in model.named_modules()
        if getattr(module, "track_running_stats", False)
        for name, buffer in module.named_buffers(path, recurse=False)
        if buffer.is_floating_point()
    }


def cramped(parameters: Sequence[Tensor]) -> bool:
    """Whether they are on a GPU without room for two copies: one is then kept on the host."""
    device = parameters[0].device
    if device.type != "cuda":
        return False
    return torch.cuda.mem_get_info(device)[0] < 2 * sum(p.nbytes for p in parameters)


def remember(parameters: Sequence[Tensor], into: Snapshot | None = None) -> Snapshot:
    """A copy of the weights; ``into`` reuses the memory of an old snapshot."""
    with torch.no_grad():
        if into is None:
            host = cramped(parameters)
            return [p.detach().to("cpu" if host else p.device, copy=True) for p in parameters]
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
