"""Hardware: device, pack size, precision and compilation, chosen by a short measured probe."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from envs import memory
from envs.batched import fit
from envs.knobs import Knobs
from envs.packed import Pack, predict
from envs.task import Task

logger = logging.getLogger(__name__)

SIZES = {"cpu": (4, 8, 16, 32), "cuda": (16, 32, 64, 128, 256, 512)}  # packs that are tried
WORTH = 0.95  # a larger pack must take at most this share of a smaller one's time a run
COMPILING = 60.0  # seconds that the code of a family takes at most, of training and of judging
HALF = 0.5  # of the time that compiled code may be hoped to save


@dataclass(frozen=True)
class Plan:
    """How runs are computed."""

    device: str
    pack: int  # runs computed together
    bfloat16: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        kinds = [name for name in ("bfloat16", "compiled") if getattr(self, name)]
        return ", ".join([f"packs of {self.pack} on {self.device}", *kinds])


def probe(task: Task, *, updates: float = 0.0, most: int = 512, threads: int = 1) -> Plan:
    """Time a few updates of a task in packs of several sizes -> the cheapest way.

    updates: that will be made of a run-step each, for what must pay for its preparation. most:
    runs that there will be at a time. threads: of torch, on a CPU.
    """
    before = torch.get_num_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(threads)
    try:
        return _probe(task, device, updates, most)
    finally:
        torch.set_num_threads(before)


def _probe(task: Task, device: str, updates: float, most: int) -> Plan:
    if fit(task).reason:
        return Plan(device, 1)
    plan, cost = Plan(device, 1), seconds(task, Plan(device, 1))
    for size in fitting(task, device, [size for size in SIZES[device] if size <= most]):
        larger = Plan(device, size)
        its = seconds(task, larger)
        if its > WORTH * cost:
            break
        plan, cost = larger, its
    lower = Plan(device, plan.pack, bfloat16=True)
    if updates and (its := seconds(task, lower)) < WORTH * HALF * cost:
        plan, cost = lower, its  # coarser numbers must save more than half
    compiled = Plan(device, plan.pack, plan.bfloat16, compiled=True)
    if updates * cost * HALF > COMPILING and seconds(task, compiled) < WORTH * cost:
        plan = compiled
    logger.info("probe: %s, %.3g ms a run-step", plan, 1000 * cost)
    return plan


def fitting(task: Task, device: str, sizes: Iterable[int]) -> list[int]:
    """The pack sizes that the free memory has room for."""
    room = memory.SHARE * memory.free(torch.device(device))
    return [size for size in sizes if predict(task, size) <= room]


def seconds(task: Task, plan: Plan, updates: int = 3, repeats: int = 3) -> float:
    """Of one update of one run, in packs of the plan; the least of some repeats."""
    pack = Pack(
        task, plan.pack, 64, bfloat16=plan.bfloat16, compiled=plan.compiled, device=plan.device
    )
    for lane in range(plan.pack):
        pack.open(lane, task, lane, Knobs(1e-3))
    wanted = dict.fromkeys(range(plan.pack), updates)
    pack.advance(wanted)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        pack.advance(wanted)  # its report waits for the device
        times.append(time.perf_counter() - began)
    return min(times) / (updates * plan.pack)
