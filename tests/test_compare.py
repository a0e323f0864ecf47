import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fakes import OPTIMUM, OTHER, TASK, FakeJob, Opener, no_data

from baselines import compare as module
from baselines.compare import code_version, compare, describe, outcomes, plan, pool, start_rate
from baselines.crew import each
from baselines.ledger import Ledger
from baselines.method import Arena
from baselines.schedules import Fixed, Keep, TrainerDefault
from baselines.search import Search
from envs.errors import BadInput, RunFailed
from envs.knobs import Knobs

SEARCH = Search("tpe", center=OPTIMUM)
METHODS = (Keep(), SEARCH)


@pytest.fixture(autouse=True)
def _no_data(monkeypatch):
    no_data(monkeypatch)


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "ledger.sqlite"


def run(ledger, methods=METHODS, tasks=(TASK, OTHER), seeds=(0, 1), **changes):
    options = {"runs": 3.0, "make_job": FakeJob} | changes
    return compare(methods, tasks, seeds, ledger, **options)


def timeless(results):
    """Outcomes without what may differ: how long they took."""
    return [json.dumps({k: v for k, v in r.items() if k != "seconds"}) for r in results]


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_every_method_on_every_task_with_every_seed(ledger):
    results = run(ledger)
    assert [(r["method"], r["task"], r["seed"]) for r in results] == [
        (method, f"{task}/tiny-32", seed)
        for method in ("keep", "tpe")
        for task in ("fake", "other")
        for seed in (0, 1)
    ]
    assert [len(r["trials"]) for r in results[:4]] == [1] * 4
    assert all(len(r["trials"]) >= 3 for r in results[4:])
    assert all(r["role"] == "own" and not r["steered"] for r in results)
    assert results[0]["cell"]["task"]["steps"] == TASK.steps


def test_starting_rates_are_misjudged_alike_for_every_method(ledger):
    rates = {}
    for result in run(ledger, seeds=range(5)):
        rates.setdefault((result["task"], result["seed"]), set()).add(result["start_rate"])
    assert all(len(rate) == 1 for rate in rates.values())
    assert len({next(iter(rate)) for rate in rates.values()}) == 10


def test_starting_rates_are_uniform_over_three_decades():
    drawn = np.log10([start_rate(TASK, seed, 1.5) / OPTIMUM for seed in range(400)])
    shares, _ = np.histogram(drawn, 6, (-1.5, 1.5))
    assert shares.sum() == 400
    assert shares.min() > 40
    assert start_rate(TASK, 3, 0) == pytest.approx(OPTIMUM)
    assert start_rate(TASK, 3, 1.5) == start_rate(replace(TASK), 3, 1.5)


def test_again_runs_nothing_and_more_seeds_run_only_those(ledger, tmp_path):
    opener = Opener(str(tmp_path / "log"))
    first = run(ledger, methods=[Keep()], make_job=opener)
    assert len(lines(tmp_path / "log")) == 4
    assert repr(run(ledger, methods=[Keep()], make_job=opener)) == repr(first)
    assert len(lines(tmp_path / "log")) == 4
    more = run(ledger, methods=[Keep()], make_job=opener, seeds=(0, 1, 2))
    assert len(lines(tmp_path / "log")) == 6
    assert [r["seed"] for r in more if r["task"] == "fake/tiny-32"] == [0, 1, 2]


def test_what_decides_an_outcome_decides_the_key(monkeypatch):
    def keys(method=Keep(), task=TASK, runs=3.0, decades=1.5, make_job=FakeJob):  # noqa: B008
        cells = plan([method], [task], [0], runs=runs, decades=decades, make_job=make_job)
        return [cell.key for cell in cells]

    own = keys()
    assert own == keys()
    others = [
        keys(TrainerDefault()), keys(Fixed(Knobs(1e-3))), keys(Fixed(Knobs(2e-3))),
        keys(SEARCH), keys(replace(SEARCH, decades=1.0)), keys(task=replace(TASK, noise=0.1)),
        keys(runs=4.0), keys(decades=1.0), keys(make_job=Opener()), keys(make_job=Opener("x")),
    ]  # fmt: skip
    monkeypatch.setattr(module, "code_version", lambda name: "edited")
    others.append(keys())
    monkeypatch.undo()
    no_data(monkeypatch)
    monkeypatch.setattr(module, "weights_of", lambda name: "retrained")
    others.append(keys())
    assert len({key for found in [own, *others] for key in found}) == 1 + len(others)


def test_a_method_may_describe_itself_and_must_be_describable(tmp_path):
    @dataclass(frozen=True)
    class Policy:
        artifact: Path

        def describe(self):
            return {"sha256": "ab12"}

    @dataclass(frozen=True)
    class Bare:
        artifact: Path

    assert describe(Policy(tmp_path)) == describe(Policy(Path("/elsewhere")))
    assert describe(Policy(tmp_path))["sha256"] == "ab12"
    with pytest.raises(BadInput, match="give it describe"):
        describe(Bare(tmp_path))
    with pytest.raises(BadInput, match="make it a dataclass"):
        describe(partial(FakeJob, seed=0))


def test_the_code_version_is_of_sources_that_make_outcomes():
    assert code_version("baselines.search") == code_version("envs.job")
    assert code_version("fakes") != code_version("envs.job")


def test_a_cell_that_raises_is_recorded_and_the_others_go_on(ledger, tmp_path):
    broken = Opener(str(tmp_path / "log"), broken=(1,))
    with pytest.raises(RunFailed, match=r"2 of 6 cells failed.*keep on fake.*seed 1.*no memory"):
        run(ledger, methods=[Keep()], seeds=(0, 1, 2), make_job=broken)
    assert len(outcomes(Ledger(ledger))) == 4
    (tmp_path / "log").unlink()
    with pytest.raises(RunFailed):
        run(ledger, methods=[Keep()], seeds=(0, 1, 2), make_job=broken)
    assert len(lines(tmp_path / "log")) == 2, "only what failed is tried again"


def test_what_fails_here_and_another_process_brings_to_an_end_has_not_failed(ledger, tmp_path):
    """Both run one ledger, and the other's memory sufficed."""
    other = Ledger(ledger)

    def finish(done, total, cell):
        for key in other.pending():
            assert other.commit(key, {"method": "keep", "task": "fake", "seed": 9})

    broken = Opener(str(tmp_path / "log"), broken=(0,))
    found = run(ledger, [Keep()], [TASK], (0, 1), make_job=broken, on_cell=finish)
    assert [outcome["seed"] for outcome in found] == [9, 9]
    assert len(lines(tmp_path / "log")) == 1


def test_a_cell_that_failed_is_not_tried_at_every_poll(ledger, tmp_path):
    """Another process holds its neighbour for some time."""
    cells = plan([Keep()], [TASK], (0, 1), runs=2, decades=1.5,
                 make_job=Opener(str(tmp_path / "log")))  # fmt: skip
    shared = Ledger(ledger)
    shared.plan((cell.key, cell.description) for cell in cells)
    broken = Opener(str(tmp_path / "log"), broken=(0,))
    attempt = partial(module._attempt, shared, broken, module.Plan("cpu", 1), {}, tuple(cells))
    with shared.claim(cells[1].key):
        assert attempt() is None
        assert attempt() is None
    assert attempt() is True
    assert len(lines(tmp_path / "log")) == 2
    assert shared.pending() == [cells[0].key]


def test_a_method_that_hands_in_nothing_has_failed(ledger):
    with pytest.raises(RunFailed, match="handed in no trial"):
        run(ledger, methods=[Keep()], runs=0.01)


def test_progress_counts_what_was_there_before(ledger):
    seen = []
    run(ledger, methods=[Keep()])
    run(ledger, on_cell=lambda *args: seen.append(args))
    assert [(done, total) for done, total, _ in seen] == [(5, 8), (6, 8), (7, 8), (8, 8)]
    assert {cell["method"]["name"] for _, _, cell in seen} == {"tpe"}


def test_longest_cells_first(ledger):
    seen = []
    run(ledger, on_cell=lambda done, total, cell: seen.append(cell))
    assert [(c["method"]["name"], c["task"]["dataset"]) for c in seen[::2]] == [
        ("tpe", "fake"), ("tpe", "other"), ("keep", "fake"), ("keep", "other"),
    ]  # fmt: skip


def test_ctrl_c_keeps_what_is_finished(ledger):
    def interrupt(done, total, cell):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ledger, on_cell=interrupt)
    assert len(outcomes(Ledger(ledger))) == 3
    assert len(run(ledger)) == 8


def test_workers_make_the_same_outcomes_and_survive_a_kill(ledger, tmp_path):
    deadly = Opener(str(tmp_path / "log"), deadly=(1,), mercy=str(tmp_path / "mercy"))
    results = run(ledger, workers=2, make_job=deadly)
    (tmp_path / "mercy").touch()
    assert timeless(results) == timeless(run(tmp_path / "other", make_job=deadly))
    assert not multiprocessing.active_children()
    pids = {line.split()[0] for line in lines(tmp_path / "log")}
    assert len(pids) >= 3, "two workers and this process"


@pytest.mark.slow
def test_ctrl_c_stops_the_workers(tmp_path):
    def interrupt(done, total, cell):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "third", workers=1, make_job=Opener(pause=0.01), on_cell=interrupt)
    assert not multiprocessing.active_children()
    assert 1 <= len(outcomes(Ledger(tmp_path / "third"))) < 8


@pytest.mark.slow
def test_a_cell_that_kills_every_worker_fails_and_the_others_go_on(ledger):
    with pytest.raises(RunFailed, match=r"1 of 3 cells failed.*killed 3 times \(exit code -9\)"):
        run(ledger, [Keep()], [TASK], range(3), workers=1, make_job=Opener(deadly=(1,)))
    assert [r["seed"] for r in outcomes(Ledger(ledger))] == [0, 2]


def test_workers_need_methods_that_can_be_sent(ledger):
    @dataclass(frozen=True)
    class Local:
        name: str = "local"

    with pytest.raises(BadInput, match="top of a module"):
        run(ledger, methods=[Local()], workers=1)


SCRIPT = """
import sys
import pytest
from fakes import OTHER, TASK, Opener, no_data
from baselines.compare import compare
from baselines.schedules import Keep

if __name__ == "__main__":
    no_data(pytest.MonkeyPatch())
    ledger, log = sys.argv[1:]
    compare([Keep()], [TASK, OTHER], range(20), ledger, runs=1, workers=1,
            make_job=Opener(log, pause=0.05))
"""


def test_killed_in_the_middle_and_run_again_nothing_is_lost_or_done_twice(ledger, tmp_path):
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(SCRIPT)
    folders = [str(Path(__file__).parent), str(Path(module.__file__).parents[1])]
    process = subprocess.Popen(
        [sys.executable, str(script), str(ledger), str(log)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
    )
    deadline = time.monotonic() + 60
    while len(lines(log)) < 8 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    workers = {int(line.split()[0]) for line in lines(log)}
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(alive(pid) for pid in workers), "workers die with their master"
    kept = {r["cell"]["task"]["dataset"] + f" {r['seed']}" for r in outcomes(Ledger(ledger))}
    begun = len(lines(log))
    assert 4 <= len(kept) < 40

    results = run(
        ledger, [Keep()], [TASK, OTHER], range(20), runs=1, make_job=Opener(str(log), pause=0.05)
    )
    assert len(results) == 40
    again = {line.split(" ", 1)[1] for line in lines(log)[begun:]}
    assert not again & kept
    assert len(again | kept) == 40
    assert timeless(results) == timeless(
        run(tmp_path / "b", [Keep()], [TASK, OTHER], range(20), runs=1,
            make_job=Opener(str(log), pause=0.05))
    )  # fmt: skip


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_cell_that_another_process_has_is_left_to_it(ledger, monkeypatch):
    """Another comparison on the same ledger has the first cell; the others are done meanwhile."""
    cells = plan([Keep()], [TASK], [0, 1], runs=3.0, decades=1.5, make_job=FakeJob)
    theirs = Ledger(ledger)
    theirs.plan((cell.key, cell.description) for cell in cells)
    seen = []
    with theirs.claim(cells[0].key) as mine:
        assert mine

        def other_ends(pause):
            theirs.commit(cells[0].key, Arena(TASK, 0, 1e-3, 1, FakeJob).outcome("theirs"))

        monkeypatch.setattr("baselines.crew.time.sleep", other_ends)
        results = run(ledger, [Keep()], [TASK], on_cell=lambda d, t, cell: seen.append(cell))
    assert [cell["seed"] for cell in seen] == [1, 0]
    assert [r["method"] for r in results] == ["theirs", "keep"]


def test_items_of_a_crew_in_this_process():
    assert dict(each(lambda x: x * x, [1, 2, 3], 0)) == {1: 1, 2: 4, 3: 9}


def test_pool_gives_a_study_per_seed(ledger):
    results = run(ledger, methods=[SEARCH, Search("random", "hyperband", OPTIMUM)], runs=8)
    selection, test = pool(results, "tpe", TASK)
    assert [len(s) for s in selection] == [len(t) for t in test]
    assert len(selection) == 2
    assert pool(results, "tpe", "fake/tiny-32")[0][0].tolist() == selection[0].tolist()
    assert pool(results, "tpe", OTHER)[0][0].tolist() != selection[0].tolist()
    whole, _ = pool(results, "random+hyperband", TASK)
    every, _ = pool(results, "random+hyperband", TASK, pruned=True)
    assert len(every[0]) > len(whole[0])
    assert pool(results, "none", TASK) == ([], [])


def test_namesakes_are_told_apart(ledger):
    short = replace(TASK, steps=10)
    results = run(ledger, methods=[Keep()], tasks=[TASK, short, OTHER], seeds=[0])
    assert [r["task"] for r in results] == [
        "fake/tiny-32 steps=20", "fake/tiny-32 steps=10", "other/tiny-32",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": 0}, "runs: 0"),
        ({"runs": float("nan")}, "runs: nan"),
        ({"workers": -1}, "workers"),
        ({"decades": -1}, "decades"),
        ({"decades": float("nan")}, "decades"),
        ({"methods": []}, "methods: none given"),
        ({"methods": [Keep(), Keep()]}, "methods: 'keep' is given twice"),
        ({"tasks": [TASK, TASK]}, "tasks: .* twice"),
        ({"seeds": []}, "seeds: none given"),
        ({"seeds": [1, 1]}, "seeds: 1 is given twice"),
        ({"seeds": [-1]}, "seeds: -1"),
        ({"seeds": [0.5]}, "seeds: 0.5"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(ledger, changes, message):
    with pytest.raises(BadInput, match=message):
        run(ledger, **changes)
    assert not ledger.exists()


@pytest.mark.slow
def test_real_runs_are_the_same_here_and_in_a_worker_bit_for_bit(monkeypatch, tmp_path):
    import tiny

    monkeypatch.undo()  # real data and a real, tiny model
    task = tiny.task(
        tiny.write_data(tmp_path / "data.csv"), tiny.write_model(tmp_path / "m"), dropout=0.1
    )
    methods = [Keep(), Search("random", "hyperband")]
    here, there = (
        compare(methods, [task], [0, 1], tmp_path / f"{workers}", runs=3, workers=workers)
        for workers in (0, 1)
    )
    assert timeless(here) == timeless(there)
    first = {r["trials"][0]["curve"][0]["selection"] for r in here}
    assert len(first) > 1
    assert all(len(r["cell"]["data"]["model"]) == 64 for r in here)
