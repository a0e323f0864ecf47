"""Compare: methods x tasks x seeds at equal budget, crash-safe.

A cell is one method on one task with one seed. Its key is a hash of everything that decides its
outcome, so that calling `compare` again does what is missing and nothing twice. A cell has the
same outcome, bit for bit but for its seconds, in this process or in any worker; computed in a pack
with others it has the same up to rounding.
"""

import functools
import json
import logging
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from baselines.crew import Lost, each
from baselines.identity import code_version, describe, weights_of
from baselines.ledger import Ledger, key_of
from baselines.method import Arena, BudgetSpent, Method, run_cost
from baselines.schedules import reference
from envs import workload
from envs.env import MakeJob
from envs.errors import BadInput, RunFailed
from envs.hardware import Plan
from envs.knobs import RATE_CEILING, RATE_FLOOR
from envs.lockstep import Lockstep
from envs.packed import family
from envs.start import data_of, open_job
from envs.task import Task

PACKED = 5_000_000  # weights of the largest model whose runs are worth packing on a CPU
_PACKAGES = ("numpy", "optuna", "torch", "transformers")

logger = logging.getLogger(__name__)

OnCell = Callable[[int, int, dict[str, Any]], None]  # done, total, the cell's description


@dataclass(frozen=True)
class Cell:
    """One method on one task with one seed."""

    method: Method
    task: Task
    seed: int
    start_rate: float
    runs: float
    description: dict[str, Any] = field(repr=False)

    @functools.cached_property
    def key(self) -> str:
        """The hash of the description."""
        return key_of(self.description)

    @property
    def size(self) -> float:
        """A guess at how long it takes, in weights times tokens; only for the order of work."""
        runs = min(self.runs, getattr(self.method, "runs", self.runs))
        weights = workload.parameters(self.task.model)
        return runs * run_cost(self.task) * self.task.max_length * weights


def compare(
    methods: Sequence[Method],
    tasks: Sequence[Task],
    seeds: Sequence[int],
    ledger_path: Path | str,
    *,
    runs: float,
    decades: float = 1.5,
    offset: float | None = None,
    workers: int = 0,
    pack: int = 1,
    compiled: bool = False,
    on_cell: OnCell | None = None,
    make_job: MakeJob = open_job,
) -> list[dict[str, Any]]:
    """Run what the ledger lacks; all outcomes, in the order of methods, tasks and seeds.

    runs: every method's budget on a task, in whole runs. decades: how far from the `reference`
    rate the user's starting rate may lie either way; offset: exactly how far, in its place.
    workers: processes of one thread each; 0 takes this one. pack: cells of one family
    (`envs.packed`) whose runs are computed together, if ``make_job`` is the plain `open_job`;
    models over `PACKED` weights run alone. compiled: compile a family's code, which takes a
    process up to a minute and then halves the time. With workers, methods and ``make_job`` must be
    picklable, and a script must call this under ``if __name__ == "__main__"``.

    A cell that raises is recorded and the others go on; `RunFailed` at the end says how many
    did. Ctrl-C stops at once; in both cases finished cells are kept: call again.
    """
    if not (math.isfinite(runs) and runs > 0):
        raise BadInput(f"comparison: runs: {runs!r} is no budget; give a number above 0")
    if workers < 0:
        raise BadInput(f"comparison: workers: {workers} is negative; give 0 or more")
    cells = plan(
        methods, tasks, seeds, runs=runs, decades=decades, offset=offset, make_job=make_job
    )
    ledger = Ledger(Path(ledger_path))
    ledger.plan((cell.key, cell.description) for cell in cells)
    pending = set(ledger.pending())
    todo = sorted((c for c in cells if c.key in pending), key=lambda c: -c.size)
    done, before = len(cells) - len(todo), ledger.failures()
    how = Plan("cuda" if torch.cuda.is_available() else "cpu", pack, compiled=compiled)
    groups = list(_groups(todo, pack if make_job is open_job else 1))
    with closing(each(partial(_attempt, ledger, make_job, how, before), groups, workers)) as work:
        for group, status in work:
            for cell in group:
                if isinstance(status, Lost):
                    ledger.fail(cell.key, str(status))
                done += 1
                if on_cell is not None:
                    on_cell(done, len(cells), cell.description)
    reasons = ledger.failures()  # of cells that no other process has brought to an end
    if failed := [cell for cell in cells if cell.key in reasons]:
        first = failed[0]
        raise RunFailed(
            f"{ledger.path}: {len(failed)} of {len(cells)} cells failed; the first, "
            f"{first.method.name} on {first.task.name} with seed {first.seed}: "
            f"{reasons[first.key][1]}; the others are kept: mend it and run again"
        )
    return outcomes(ledger, {cell.key for cell in cells})


def plan(
    methods: Sequence[Method],
    tasks: Sequence[Task],
    seeds: Sequence[int],
    *,
    runs: float,
    decades: float,
    offset: float | None = None,
    make_job: MakeJob = open_job,
) -> list[Cell]:
    """The cells of a comparison. Raises `BadInput` on names, tasks or seeds given twice."""
    names = [method.name for method in methods]
    for what, given in (("methods", names), ("tasks", tasks), ("seeds", seeds)):
        twice = [item for item, count in Counter(given).items() if count > 1]
        if not given or twice:
            problem = f"{twice[0]!r} is given twice" if twice else "none given"
            raise BadInput(f"comparison: {what}: {problem}; give each once")
    for seed in seeds:
        if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
            raise BadInput(f"comparison: seeds: {seed!r}; give whole numbers >= 0")
    libraries = {name: version(name) for name in ("torch", "transformers")}
    job, cells = describe(make_job), []
    for method in methods:
        identity = describe(method) | {"name": method.name}
        code = code_version(type(method).__module__)
        for task in tasks:
            data = {"rows": data_of(task).fingerprint, "model": weights_of(task.model)}
            for seed in map(int, seeds):
                rate = start_rate(task, seed, decades, offset)
                description = {
                    "method": identity, "task": asdict(task), "seed": seed, "runs": runs,
                    "decades": decades, "start_rate": rate, "job": job, "code": code, "data": data,
                    "libraries": libraries,
                }  # fmt: skip
                if offset is not None:  # else unsaid: known cells keep their keys
                    description["offset"] = offset
                cells.append(Cell(method, task, seed, rate, runs, description))
    return cells


def start_rate(task: Task, seed: int, decades: float, offset: float | None = None) -> float:
    """The user's rate: `reference` times 10**u, u uniform in +-decades by hash of task and seed.

    ``offset`` is u itself. The same for every method: a cell's contestants start from the same
    misjudgement.
    """
    if not 0 <= decades <= 3:
        raise BadInput(f"comparison: decades: {decades!r} is not in 0 to 3")
    if offset is not None and not -3 <= offset <= 3:
        raise BadInput(f"comparison: offset: {offset!r} is not in -3 to 3")
    share = int(key_of({"task": asdict(task), "seed": seed})[:13], 16) / 16**13
    rate = reference(task) * 10 ** (decades * (2 * share - 1) if offset is None else offset)
    return min(max(rate, RATE_FLOOR), RATE_CEILING)


def run_cell(cell: Cell, make_job: MakeJob = open_job) -> dict[str, Any]:
    """The outcome of one cell. Raises what the method raises, but for `BudgetSpent`."""
    with _one_thread():
        arena = Arena(cell.task, cell.seed, cell.start_rate, cell.runs, make_job)
        with suppress(BudgetSpent):
            cell.method.run(arena)
        if not arena.trials:
            raise RunFailed(f"{cell.method.name}: handed in no trial; give more runs")
        return arena.outcome(
            cell.method.name,
            steered=bool(getattr(cell.method, "steered", False)),
            role=cell.task.role,
            versions={"python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
            device=torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else platform.machine(),
        )


def run_cells(cells: Sequence[Cell], make_job: MakeJob, how: Plan) -> list[dict[str, Any] | str]:
    """The outcome of each cell, or why it failed; several are computed in one pack.

    how: what packs are; their seconds are shared out by what their cells spent.
    """

    def attempt(cell: Cell, make_job: MakeJob) -> dict[str, Any] | str:
        try:
            return run_cell(cell, make_job)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    if len(cells) == 1:
        return [attempt(cells[0], make_job)]
    lockstep = _lockstep(how, _room(cells[0].task))
    began = time.perf_counter()
    try:
        with _one_thread():
            found = lockstep.run([partial(attempt, cell, lockstep.open) for cell in cells])
    except Exception as error:  # of the pack itself, memory for one
        logger.warning("a pack of %d failed (%s); its cells run one by one", len(cells), error)
        _lockstep.cache_clear()
        return [attempt(cell, make_job) for cell in cells]
    seconds, good = time.perf_counter() - began, [o for o in found if not isinstance(o, str)]
    for outcome in good:
        outcome["seconds"] = seconds * outcome["spent"] / sum(o["spent"] for o in good)
        outcome["packed"] = len(cells)
    return found


@functools.lru_cache(maxsize=8)
def _lockstep(how: Plan, room: int) -> Lockstep:
    """This process's packs, which serve one group of cells after another."""
    return Lockstep(how, classes=room)


def outcomes(ledger: Ledger, keys: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Finished cells in plan order, each with its description under ``cell``.

    Where several tasks share a name, ``task`` also says how they differ: ``sms/tiny-32 rows=200``.
    """
    wanted = None if keys is None else set(keys)
    found = [
        outcome | {"cell": cell}
        for key, cell, outcome in ledger.outcomes()
        if wanted is None or key in wanted
    ]
    namesakes: dict[str, list[dict[str, Any]]] = {}
    for outcome in found:
        namesakes.setdefault(outcome["task"], []).append(outcome["cell"]["task"])
    for outcome in found:
        task, others = outcome["cell"]["task"], namesakes[outcome["task"]]
        apart = [f"{k}={v}" for k, v in task.items() if any(other[k] != v for other in others)]
        outcome["task"] = " ".join([outcome["task"], *apart])
    return found


def pool(
    results: Iterable[Mapping[str, Any]], method: str, task: Task | str, *, pruned: bool = False
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """Selection and test metrics of a method's trials on a task: one array a seed, in order.

    pruned: take trials that were cut short as well, by a pruner or by the end of the budget.
    """
    wanted = task if isinstance(task, str) else json.loads(json.dumps(asdict(task)))
    scores: dict[int, list[tuple[float, float]]] = {}
    for result in results:
        here = result["task"] if isinstance(task, str) else result["cell"]["task"]
        if result["method"] == method and here == wanted:
            scores[result["seed"]] = [
                (trial["selection"], trial["test"])
                for trial in result["trials"]
                if pruned or trial["state"] != "pruned"
            ]
    pairs = [np.array(scores[seed], dtype=float).reshape(-1, 2) for seed in sorted(scores)]
    return [pair[:, 0] for pair in pairs], [pair[:, 1] for pair in pairs]


def _room(task: Task) -> int:
    """Classes that a pack has room for, so that many tasks share it."""
    return max(8, len(data_of(task).classes))


def _groups(cells: Sequence[Cell], pack: int) -> Iterator[tuple[Cell, ...]]:
    """Cells that are computed together, in order of their first.

    Large models stay alone, and methods that say so: their jobs cannot be packed.
    """
    waiting: dict[Any, list[Cell]] = {}
    for cell in cells:
        native = cell.task.objective == "classification"
        small = native and workload.parameters(cell.task.model) <= PACKED
        together = pack > 1 and small and not getattr(cell.method, "alone", False)
        key = (family(cell.task), _room(cell.task)) if together else cell.key
        waiting.setdefault(key, []).append(cell)
    for alike in waiting.values():
        for start in range(0, len(alike), pack):
            yield tuple(alike[start : start + pack])


def _attempt(
    ledger: Ledger,
    make_job: MakeJob,
    how: Plan,
    before: Mapping[str, tuple[int, str]],
    cells: tuple[Cell, ...],
) -> bool | None:
    """Whether all have been tried (failures are recorded), or None: another process has some.

    before: the ledger's failures when the comparison began; what failed since is not tried again.
    """

    def untried() -> list[Cell]:
        failed, left = ledger.failures(), set(ledger.pending())
        return [c for c in cells if c.key in left and failed.get(c.key) == before.get(c.key)]

    with ExitStack() as claims:
        mine = [cell for cell in untried() if claims.enter_context(ledger.claim(cell.key))]
        for cell, outcome in zip(mine, run_cells(mine, make_job, how) if mine else [], strict=True):
            if isinstance(outcome, str):
                ledger.fail(cell.key, outcome)
            else:
                ledger.commit(cell.key, outcome)
    return None if untried() else True


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them, so a cell always has one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
