"""Memory of packs: what one takes in a fresh process, beside what was predicted."""

import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import Any

import psutil
from inputs import CLASSES, full_rows
from packs import advance, opened

from envs.batched import fit
from envs.packed import predict

INTERVALS = 3  # that are run: memory is not reused at once in every place


def taken(runs: int, width: int = 32) -> dict[str, Any]:
    """Megabytes at the peak of some intervals with scores, less those of the bare process.

    Bare is a process that has loaded the libraries, the texts and the encoder.
    """
    task = full_rows(width)
    fit(task)
    forget_peak()
    before = psutil.Process().memory_info().rss
    pack = opened(task, runs, 0)
    act = advance(pack)
    for _ in range(INTERVALS):
        act()
        for split in ("validation", "selection"):
            pack.evaluate(dict.fromkeys(range(runs), split))
    found = peak() - before
    return {
        "runs": runs, "width": width, "megabytes": found / 1e6,
        "predicted": predict(task, runs, CLASSES) / 1e6,
    }  # fmt: skip


def peak() -> int:
    """Most bytes that the process has had in memory."""
    status = Path("/proc/self/status")
    if status.exists():  # the other figure begins with that of the process that started this one
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Let the peak count from now on, where the system can: loading took more for a moment.

    What was freed is given back first, or a small pack would find room without asking for any.
    """
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
