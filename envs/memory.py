"""Memory: what a computation and a pack will take, told before it is allocated."""

import weakref
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHARE = 0.8  # of the free memory that a pack may take


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that live, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._see(leaf, counted=False)  # it was there before, or it is known
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._see(leaf, counted=True)
        self.most = max(self.most, self.now)
        return result

    def _see(self, leaf: Any, *, counted: bool) -> None:
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                size = storage.nbytes() if counted else 0
                self._known.add(key)
                self.now += size
                weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak(call: Callable[[], object]) -> int:
    """The most bytes of tensors made by a call that live at the same time."""
    with _Live() as live:
        kept = call()
    del kept
    return live.most


def free(device: torch.device) -> int:
    """Bytes that may still be allocated."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that there was no memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
