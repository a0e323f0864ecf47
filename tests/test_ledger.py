"""The ledger under kill -9, races, damage and refusal."""

import functools
import math
import multiprocessing
import os
import random
import signal
import sqlite3
import tempfile
import threading
import time
import uuid
import warnings
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import ledger as module
from baselines.ledger import Ledger, key_of
from envs.errors import BadInput, RunFailed

fork = multiprocessing.get_context("fork")


def start(target, *arguments):
    """A process of its own, which dies as ``kill -9`` has it: no cleanup runs."""
    process = fork.Process(target=target, args=arguments, daemon=True)
    with warnings.catch_warnings():  # Later Pythons warn where numpy has threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    return process


def run_cell(ledger, log, key, seconds=0.0):
    time.sleep(random.uniform(0, seconds))
    token = uuid.uuid4().hex
    if ledger.commit(key, {"answer": key[::-1], "token": token}):
        os.write(log, f"{key} {token}\n".encode())


def work(path, log, rations):
    """Run what is pending, a cell a ration; now and then one that another worker has."""
    random.seed()
    ledger, log = Ledger(path), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while keys := ledger.pending():
        rations.acquire()
        key = random.choice(keys)
        with ledger.claim(key) as mine:
            if mine or random.random() < 0.1:
                run_cell(ledger, log, key, seconds=0.02)


def rush(path, log, gate):
    """Run every cell, claimed or not."""
    random.seed()
    ledger, log = Ledger(path), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    keys = ledger.pending()
    random.shuffle(keys)
    gate.wait()
    for key in keys:
        run_cell(ledger, log, key)


def die_at(path, stage, needle, moment):
    """Plan, claim and commit, and be killed before or after one statement of one of them."""
    now = ""

    class Mortal(sqlite3.Connection):
        def execute(self, statement, *values):
            if now == stage and needle in statement and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = super().execute(statement, *values)
            if now == stage and needle in statement:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

    sqlite3.connect = functools.partial(sqlite3.connect, factory=Mortal)
    now = "create"
    ledger = Ledger(path)
    now = "plan"
    ledger.plan([("a", {"n": 1}), ("b", {"n": 2})])
    now = "claim"
    with ledger.claim("a"):
        now = "commit"
        ledger.commit("a", {"x": 1})


def hold_and_fork(path, pipe):
    with Ledger(path).claim("a") as mine:
        awake, wake = os.pipe()
        child = os.fork()
        if child:
            os.read(awake, 1)  # Until then the child has what its parent has.
            pipe.send((mine, child))
        else:
            os.write(wake, b"x")
        time.sleep(60)


def without_privilege(folder, pipe):
    """In a folder that turns read-only, as a user whom that stops."""

    def attempt(action):
        try:
            pipe.send(action())
        except Exception as error:
            pipe.send(f"{type(error).__name__} {error}")

    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
        os.setuid(65534)
    ledger = Ledger(folder / "ledger.db")
    ledger.plan([("a", {}), ("b", {})])
    ledger.commit("a", {})
    folder.chmod(0o500)
    attempt(lambda: ledger.commit("b", {}))
    attempt(lambda: Ledger(folder / "other.db"))
    folder.chmod(0o700)
    attempt(lambda: ledger.commit("b", {}))


@pytest.fixture
def ledger(tmp_path):
    return planned(tmp_path / "ledger.db", 2)


def planned(path, cells):
    ledger = Ledger(path)
    ledger.plan([(key_of({"n": n}), {"n": n}) for n in range(cells)])
    return ledger


def verdict(ledger, log):
    """What went wrong, judged from what the workers wrote down and what is stored."""
    stored = {key: outcome for key, _, outcome in ledger.outcomes()}
    won = [tuple(line.split()) for line in log.read_text().splitlines()]
    with closing(sqlite3.connect(ledger.path)) as database:
        sound = database.execute("PRAGMA integrity_check").fetchone()[0]
    return {
        "lost": ledger.pending(),
        "twice": [key for key, n in Counter(key for key, _ in won).items() if n > 1],
        "replaced": [key for key, token in won if stored[key]["token"] != token],
        "wrong": [key for key, outcome in stored.items() if outcome["answer"] != key[::-1]],
        "damage": [] if sound == "ok" else [sound],
    }


CLEAN = {"lost": [], "twice": [], "replaced": [], "wrong": [], "damage": []}


def test_a_comparison_from_plan_to_outcomes(tmp_path):
    ledger = Ledger(tmp_path / "ledger.db")
    cells = [(key_of({"n": n}), {"n": n}) for n in (3, 1, 2)]
    assert ledger.plan(cells) == 3
    assert ledger.plan(iter(cells)) == 0
    first, second, third = (key for key, _ in cells)
    assert ledger.commit(second, {"score": 0.5}) is True
    assert ledger.commit(first, {"score": 1}) is True
    assert ledger.commit(first, {"score": 2}) is False
    ledger.fail(first, "too late")
    ledger.fail(third, "out of memory")
    ledger.fail(third, "again")
    again = Ledger(tmp_path / "ledger.db")
    assert again.pending() == [third]
    assert again.failures() == {third: (2, "again")}
    assert list(again.outcomes()) == [
        (first, {"n": 3}, {"score": 1}),
        (second, {"n": 1}, {"score": 0.5}),
    ]
    assert again.plan([*cells, ("new", {})]) == 1
    assert again.pending() == [third, "new"]
    assert again.commit(third, {})
    assert again.failures() == {}


def test_meta_is_kept_and_replaced(ledger):
    assert ledger.meta("version") is None
    ledger.set_meta("version", {"code": "1"})
    ledger.set_meta("version", {"code": "2", "limit": math.inf})
    assert Ledger(ledger.path).meta("version") == {"code": "2", "limit": math.inf}


def test_a_key_keeps_its_description(ledger):
    with pytest.raises(BadInput, match="planned otherwise"):
        ledger.plan([("fresh", {}), (ledger.pending()[0], {"n": 99})])
    assert "fresh" not in ledger.pending()


def test_a_cell_that_was_not_planned(ledger):
    for verb in (
        lambda: ledger.claim("x").__enter__(),
        lambda: ledger.commit("x", {}),
        lambda: ledger.fail("x", "reason"),
    ):
        with pytest.raises(BadInput, match="no cell 'x'; plan it first"):
            verb()


def test_a_claim_is_for_one_and_ends_with_its_block(ledger):
    first, second = ledger.pending()
    with ledger.claim(first) as mine, ledger.claim(first) as again, ledger.claim(second) as other:
        assert (mine, again, other) == (True, False, True)
    with ledger.claim(first) as mine:
        assert mine
        ledger.commit(first, {})
    with ledger.claim(first) as mine:
        assert not mine
    with pytest.raises(BlockingIOError), ledger.claim(second):
        raise BlockingIOError("from the cell itself")
    with ledger.claim(second) as mine:
        assert mine


def test_keys_are_canonical():
    a = key_of({"seed": 1, "task": {"name": "sst2", "rate": 0.1}})
    assert a == key_of({"task": {"rate": 0.1, "name": "sst2"}, "seed": 1})
    assert a != key_of({"seed": 2, "task": {"name": "sst2", "rate": 0.1}})
    assert key_of({"a": [1, None]}) == (
        "a290b55a84a4e851c13e570346d396a0ff58e13e3b458112237484f9ed3b8950"
    )


def test_values_that_json_lacks_survive(ledger):
    key = ledger.pending()[0]
    outcome = {
        "list": [math.inf, -math.inf, np.float64("nan"), np.float64(0.1)],
        "nan": math.nan,
        "pair": (1, -0.0),
        "text": ["nan", "NaN\0", "\ud800"],
    }
    ledger.commit(key, outcome)
    ((_, _, back),) = ledger.outcomes()
    assert repr(back) == repr(
        outcome | {"list": [math.inf, -math.inf, math.nan, 0.1], "pair": [1, -0.0]}
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=50)
@given(values)
def test_any_value_survives(value):
    back = module._from_json(module._to_json(value))
    assert module._to_json(back) == module._to_json(value)
    assert back == value or "nan" in repr(value)


@pytest.mark.parametrize("value", [{1: 2}, {"$float": "nan"}, np.float32(1), {1}, [b"x"]])
def test_what_cannot_be_stored_is_refused_before_anything_is_written(ledger, value):
    key = ledger.pending()[0]
    with pytest.raises(TypeError):
        ledger.commit(key, {"value": value})
    assert ledger.pending()[0] == key


def race(tmp_path, cells=25, workers=3):
    """All workers run every cell from the same moment on."""
    ledger, log, gate = planned(tmp_path / "ledger.db", cells), tmp_path / "log", fork.Event()
    running = [start(rush, ledger.path, log, gate) for _ in range(workers)]
    gate.set()
    for worker in running:
        worker.join(60)
        assert worker.exitcode == 0
    return verdict(ledger, log)


def test_each_cell_is_committed_once_whoever_runs_it(tmp_path):
    assert race(tmp_path) == CLEAN


def test_without_the_guard_the_race_is_seen_to_commit_twice(tmp_path, monkeypatch):
    """The negative control of the test above and of the kills below."""
    guard = " AND status != 'done'"
    assert guard in module._COMMIT
    monkeypatch.setattr(module, "_COMMIT", module._COMMIT.replace(guard, ""))
    found = race(tmp_path)
    assert found["twice"]
    assert found["replaced"]


def test_the_journal_waits_for_one_who_is_about_to_write(tmp_path):
    path, ready = tmp_path / "a.db", threading.Event()

    def write():
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("CREATE TABLE a (b)")
            other.execute("BEGIN IMMEDIATE")
            ready.set()
            time.sleep(0.2)
            other.execute("COMMIT")

    writer = threading.Thread(target=write)
    writer.start()
    ready.wait()
    with closing(sqlite3.connect(path, isolation_level=None)) as mine:
        module._let_read(mine)
        assert mine.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    writer.join()


def test_several_processes_may_create_the_ledger_at_once(tmp_path):
    gate = fork.Event()

    def create():
        gate.wait()
        Ledger(tmp_path / "ledger.db").plan([("a", {})])

    running = [start(create) for _ in range(6)]
    gate.set()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    assert Ledger(tmp_path / "ledger.db").pending() == ["a"]


def under_fire(tmp_path, kills, cells):
    """Two workers, one of them killed at a random instant and replaced, again and again."""
    ledger, log, rations = (
        planned(tmp_path / "ledger.db", cells),
        tmp_path / "log",
        fork.Semaphore(0),
    )
    workers = [start(work, ledger.path, log, rations) for _ in range(2)]
    for _ in range(kills):
        rations.release()
        rations.release()
        time.sleep(random.uniform(0, 0.05))
        victim = random.randrange(2)
        workers[victim].kill()
        workers[victim].join()
        assert workers[victim].exitcode == -signal.SIGKILL
        workers[victim] = start(work, ledger.path, log, rations)
    assert ledger.pending()  # The kills fell while there was work.
    for _ in range(20 * cells):
        rations.release()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return verdict(ledger, log)


def test_random_kills(tmp_path):
    assert under_fire(tmp_path, kills=15, cells=40) == CLEAN


@pytest.mark.slow
def test_two_hundred_random_kills(tmp_path):
    assert under_fire(tmp_path, kills=200, cells=500) == CLEAN


POINTS = [
    *[
        ("create", n)
        for n in ("journal_mode", "TABLE cells", "TABLE meta", "user_version =", "COMMIT")
    ],
    *[("plan", n) for n in ("BEGIN", "INSERT", "COMMIT")],
    ("claim", "status"),
    *[("commit", n) for n in ("BEGIN", "UPDATE", "COMMIT")],
]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(("stage", "needle"), POINTS)
def test_killed_at_a_named_point_it_resumes(tmp_path, stage, needle, moment):
    path = tmp_path / "ledger.db"
    process = start(die_at, path, stage, needle, moment)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    ledger = Ledger(path)
    survived = (needle, moment) == ("COMMIT", "after")
    added = ledger.plan([("a", {"n": 1}), ("b", {"n": 2})])
    assert added == (0 if stage in ("claim", "commit") or (stage == "plan" and survived) else 2)
    assert ledger.pending() == (["b"] if stage == "commit" and survived else ["a", "b"])
    for key in ledger.pending():
        with ledger.claim(key) as mine:
            assert mine
            assert ledger.commit(key, {"x": 1})
    assert [outcome for _, _, outcome in ledger.outcomes()] == [{"x": 1}, {"x": 1}]


def test_a_claim_dies_with_its_worker_even_if_a_child_of_it_lives_on(tmp_path):
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.plan([("a", {})])
    ours, theirs = fork.Pipe()
    worker = start(hold_and_fork, ledger.path, theirs)
    mine, child = ours.recv()
    try:
        assert mine
        with ledger.claim("a") as also_mine:
            assert not also_mine
        worker.kill()
        worker.join()
        os.kill(child, 0)  # The child is alive.
        with ledger.claim("a") as now_mine:
            assert now_mine
    finally:
        os.kill(child, signal.SIGKILL)


def write_other_program(path):
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE customers (name TEXT)")


def write_newer_version(path):
    Ledger(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 9")


@pytest.mark.parametrize(
    ("name", "make", "problem"),
    [
        ("text", lambda path: path.write_text("task: sst2\n" * 99), "not a database"),
        ("short", lambda path: path.write_bytes(b"1234567"), "not a database"),
        ("folder", lambda path: path.mkdir(), "not a regular file"),
        ("fifo", os.mkfifo, "not a regular file"),
        ("other", write_other_program, "another program's"),
        ("newer", write_newer_version, "a ledger of version 9"),
        ("missing/ledger.db", lambda path: None, "No such file"),
        ("x" * 600, lambda path: None, "too long"),
        ("nul\0", lambda path: None, "null byte"),
    ],
)
def test_a_file_that_cannot_be_a_ledger_is_left_alone(tmp_path, name, make, problem):
    path = tmp_path / name
    make(path)
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    with pytest.raises(BadInput, match=problem) as caught:
        Ledger(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


def test_an_empty_file_becomes_a_ledger(tmp_path):
    (tmp_path / "a ledger?#%.db").touch()
    assert planned(tmp_path / "a ledger?#%.db", 3).pending() == [key_of({"n": n}) for n in range(3)]


def test_a_damaged_database_is_said_to_be(ledger):
    size = ledger.path.stat().st_size
    with ledger.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    with pytest.raises(BadInput, match=r"malformed; restore"):
        ledger.pending()


def test_a_damaged_outcome_is_not_returned(ledger):
    key = ledger.pending()[0]
    ledger.commit(key, {"score": 1})
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as database:
        database.execute("UPDATE cells SET outcome = '{\"score\":2}' WHERE status = 'done'")
    with pytest.raises(BadInput, match=f"outcome of '{key}' is damaged"):
        list(ledger.outcomes())


def test_a_locked_database_is_waited_for_and_then_reported(ledger, monkeypatch):
    key, other = ledger.pending()
    with closing(
        sqlite3.connect(ledger.path, isolation_level=None, check_same_thread=False)
    ) as database:
        database.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(module, "_PATIENCE", 0.1)
        with pytest.raises(RunFailed, match=r"locked; .* run again"):
            ledger.commit(key, {})
        monkeypatch.setattr(module, "_PATIENCE", 60.0)
        release = threading.Timer(0.3, lambda: database.execute("ROLLBACK"))
        release.start()
        assert ledger.commit(key, {})
        release.join()
    assert ledger.pending() == [other]


def test_a_full_disk_loses_nothing_that_was_committed(ledger, monkeypatch):
    key, other = ledger.pending()
    ledger.commit(key, {"score": 1})
    connect = sqlite3.connect

    def cramped(*arguments, **options):
        database = connect(*arguments, **options)
        database.execute("PRAGMA max_page_count = 1")  # No more pages than there are.
        return database

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", cramped)
        with pytest.raises(RunFailed, match=r"ledger.db: database or disk is full; .* run again"):
            ledger.commit(other, {"curve": [0.1] * 10_000})
    assert [outcome for _, _, outcome in ledger.outcomes()] == [{"score": 1}]
    assert ledger.commit(other, {"curve": [0.1] * 10_000})


def test_a_folder_turned_read_only():
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = fork.Pipe()
        process = start(without_privilege, Path(folder), theirs)
        running, opening, resumed = (ours.recv() for _ in range(3))
        process.join(60)
    assert running.startswith(f"RunFailed {folder}/ledger.db: ")
    assert opening.startswith(f"BadInput {folder}/other.db: Permission denied; ")
    assert resumed is True


def test_a_ledger_that_vanished_is_not_made_anew(ledger):
    key = ledger.pending()[0]
    ledger.path.unlink()
    with pytest.raises(RunFailed, match="unable to open"):
        ledger.commit(key, {})
    assert not ledger.path.exists()
