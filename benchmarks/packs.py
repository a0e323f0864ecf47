"""Packs: seconds of an update, of a decision and of a reset of runs in a batched model."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from inputs import CLASSES, full_rows, minilm
from step import clock, told

from envs import workload
from envs.knobs import Knobs
from envs.packed import Pack
from envs.task import Pooling, Task
from envs.trunk import trunk_of

UPDATES = 100  # of a run, the first interval warms up; the words in use grow up to the 62nd
LIMIT = 20.0  # seconds after which no further interval is measured, but there are at least two


def update(
    width: int = 32, runs: int = 8, compiled: bool = True, tokens: int = 16,
    limit: float = LIMIT, device: str = "cpu", seed: int = 0, pooling: Pooling = "first",
) -> dict[str, Any]:  # fmt: skip
    """An update of one run of the shipped encoder of that width."""
    task = full_rows(width, tokens=tokens, pooling=pooling)
    pack = opened(task, runs, seed, compiled=compiled, device=device)
    seconds = timed(advance(pack), UPDATES // task.interval - 1, limit, device)
    name = engine(compiled=compiled)
    return told(name, task, seconds / (task.interval * runs), width=width, runs=runs)


def lora(
    runs: int = 8, compiled: bool = False, bfloat16: bool = False, device: str = "cpu",
    seed: int = 0, pooling: Pooling = "first", together: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """An update of one adapter of MiniLM-L6. together: runs computed at a time, by default all."""
    task = minilm(adapter="lora", pooling=pooling)
    how: dict[str, Any] = {"compiled": compiled, "bfloat16": bfloat16, "device": device}
    pack = opened(task, runs, seed, together=together or runs, **how)
    seconds = timed(advance(pack), 2, LIMIT, device) / (task.interval * runs)
    name = engine(compiled=compiled, bfloat16=bfloat16)
    return told(name, task, seconds, width=384, runs=runs)


def trunk(
    runs: int = 1, compiled: bool = False, layers: int = 1, seed: int = 0,
    pooling: Pooling = "first",
) -> dict[str, Any]:  # fmt: skip
    """An update and a decision of one run of MiniLM-L6 whose lower layers are frozen.

    A decision is an interval of updates and the two scores that an environment asks for. What the
    frozen layers make of the texts is computed before, once for all runs: ``prepared`` seconds.
    """
    task = minilm(trainable_layers=layers, pooling=pooling)
    pack = opened(task, runs, seed, compiled=compiled)
    prepared = timed(lambda: prepare(task), 1, LIMIT, warm=False)
    act = advance(pack)

    def decide() -> None:
        act()
        for split in ("validation", "selection"):
            pack.evaluate(dict.fromkeys(range(runs), split))

    decide()
    seconds = timed(act, 4, LIMIT, warm=False) / (task.interval * runs)
    found = told(engine(compiled=compiled), task, seconds, width=384, runs=runs)
    decision = timed(decide, 4, LIMIT, warm=False) / runs
    return {**found, "decision": decision, "prepared": prepared}


def reset(width: int = 32, runs: int = 8, turns: int = 7) -> dict[str, Any]:
    """Opening every run of a pack anew, and one update of all of them with compiled code."""
    task = full_rows(width)
    pack = opened(task, runs, 0, compiled=True)
    act = advance(pack)
    act()
    openings, updates = [], []
    for turn in range(1, turns + 1):
        openings.append(timed(opening(pack, task, turn * runs), 1, LIMIT, warm=False))
        updates.append(timed(act, 3, LIMIT, warm=False) / task.interval)
    return {
        "opening": statistics.median(openings), "update": statistics.median(updates),
        "runs": runs, "width": width, "updates_of_a_run": task.steps,
    }  # fmt: skip


def prepare(task: Task) -> None:
    """Compute what the frozen layers make of the texts that are trained on and judged."""
    rows = workload.load(task).rows
    for split in ("train", "validation", "selection"):
        trunk_of(task, torch.device("cpu")).states(rows[split], split)


def opened(task: Task, runs: int, seed: int, **how: Any) -> Pack:
    """A full pack, by default all of it computed together."""
    pack = Pack(task, runs, CLASSES, **{"together": runs, **how})
    opening(pack, task, seed)()
    return pack


def opening(pack: Pack, task: Task, seed: int) -> Callable[[], None]:
    """What begins a run in every lane."""

    def begin() -> None:
        for lane in range(pack.lanes):
            pack.open(lane, task, seed + lane, Knobs(1e-3))

    return begin


def advance(pack: Pack) -> Callable[[], object]:
    """What makes an interval of updates in every lane, with the probe at its end."""
    wanted = dict.fromkeys(range(pack.lanes), pack.family.interval)
    return lambda: pack.advance(wanted)


def timed(
    action: Callable[[], object], most: int, limit: float, device: str = "cpu", warm: bool = True
) -> float:
    """Mean seconds of an action, done ``most`` times, or at least twice and up to the limit."""
    now = clock(device)
    if warm:
        action()
    began, done = now(), 0
    while done < most and (done < 2 or now() - began < limit):
        action()
        done += 1
    return (now() - began) / done


def engine(*, compiled: bool, bfloat16: bool = False) -> str:
    """The name of a way to compute a pack."""
    return "Pack" + ("" if compiled else ", eager") + (", bfloat16" if bfloat16 else "")
