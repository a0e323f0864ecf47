"""Rounds: the sides of a comparison, each in a fresh process, by turns.

A side is a function of a module in this folder; it runs in an interpreter of its own with one
thread and returns a dictionary. A round runs every side once, and the next round runs them in
the opposite order, so that whatever else the machine does hits all of them alike. A figure is
worked out within each round; what is reported is its median over the rounds, and its quartiles.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
Round = Mapping[str, Result]  # by side

HERE = Path(__file__).parent
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LIMIT = 1800  # seconds; a side that takes longer is stuck


@dataclass(frozen=True)
class Side:
    """One thing to measure: ``module:function`` of this folder, called with the arguments."""

    name: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    python: str | None = None  # another interpreter; its module may import nothing of ours


@dataclass(frozen=True)
class Case:
    """Sides that are measured together; figures by the name of their claim, from one round."""

    name: str
    sides: Sequence[Side]
    figures: Mapping[str, Callable[[Round], float]] = field(default_factory=dict)
    rounds: int = 5
    missing: str | None = None  # why it cannot be measured here, and what to do about it


class Broken(RuntimeError):
    """A side that did not return a result."""


def run(side: Side) -> Result:
    """Measure one side in a process of its own. Raises `Broken` with the end of its output."""
    environment = os.environ | dict.fromkeys(THREADS, "1") | {"TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        arguments = json.dumps(side.arguments)
        command = [side.python or sys.executable, str(HERE / "harness.py")]
        done = subprocess.run(
            [*command, side.target, arguments, str(answer)],
            env=environment, capture_output=True, text=True, timeout=LIMIT,
        )  # fmt: skip
        if done.returncode or not answer.exists():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise Broken(f"{side.name}: {side.target} with {arguments} failed:\n{tail}")
        result: Result = json.loads(answer.read_text())
    return result


def rounds(
    case: Case, count: int, before: Callable[[str], None], after: Callable[[], None]
) -> list[dict[str, Result]]:
    """Every side once a round, in alternating order.

    ``before`` is told a side's name; ``after`` is called when it is done.
    """
    found = []
    for turn in range(count):
        order: Iterable[Side] = case.sides if turn % 2 == 0 else reversed(case.sides)
        results = {}
        for side in order:
            before(side.name)
            results[side.name] = run(side)
            after()
        found.append({side.name: results[side.name] for side in case.sides})
    return found


def summary(case: Case, found: Sequence[Round]) -> dict[str, Any]:
    """Figures and sides over the rounds, ready for JSON."""
    return {
        "rounds": len(found),
        "figures": {
            name: spread([value(results) for results in found])
            for name, value in case.figures.items()
        },
        "sides": {side.name: _side([r[side.name] for r in found]) for side in case.sides},
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and the values themselves, to four significant digits."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else [values[0]] * 3
    )
    return {
        "median": brief(middle),
        "quartiles": [brief(low), brief(high)],
        "values": [brief(value) for value in values],
    }


def brief(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def _side(results: Sequence[Result]) -> dict[str, Any]:
    """Numbers that differ between rounds become medians and quartiles; the rest is kept once."""
    content: dict[str, Any] = {}
    for key, first in results[0].items():
        values = [result[key] for result in results]
        measured = isinstance(first, float) and not isinstance(first, bool)
        content[key] = spread(values) if measured else first
    return content


def _child(target: str, arguments: str, answer: str) -> None:
    """Run a side's function in this process and write what it returns."""
    import torch

    torch.set_num_threads(1)
    module, _, function = target.partition(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    Path(answer).write_text(json.dumps(result))


if __name__ == "__main__":
    _child(*sys.argv[1:])
