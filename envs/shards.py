"""Shards: the part of each weight that this process holds, under FSDP2 (``fully_shard``)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from envs.errors import BadInput
from envs.processes import world


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory; the tensor itself where it is not sharded."""
    part = getattr(tensor, "_local_tensor", None)
    return tensor if part is None else part


def sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model's weights; `BadInput` for what else spreads them."""
    split = any(local(parameter) is not parameter for parameter in model.parameters())
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise BadInput(
            "trainer: fsdp: version 1 flattens the weights, which the tuner cannot read; set "
            "version 2, or train with DDP"
        )
    if split and not any(_groups(model)):
        raise BadInput(
            "trainer: model: its weights are spread over processes by other means than FSDP2, "
            "which the tuner cannot read; use FSDP2 or DDP"
        )
    return split


def reshard(model: nn.Module) -> None:
    """Drop whole weights that a forward pass left behind: they are stale once a shard changes."""
    for module in _groups(model):
        module.reshard()


def _groups(model: nn.Module) -> Iterable["torch.distributed.fsdp.FSDPModule"]:
    if world() > 1:
        from torch.distributed.fsdp import FSDPModule

        yield from (module for module in model.modules() if isinstance(module, FSDPModule))
