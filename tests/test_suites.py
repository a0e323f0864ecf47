"""The plan is valid, and the benchmark that runs it picks up where it was left."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from test_cli import policy_file, run  # noqa: F401
from test_policy import example

from baselines.compare import plan, start_rate
from baselines.ledger import Ledger
from baselines.schedules import STATIC, grid, reference
from envs.errors import BadInput, RunFailed
from envs.task import TASKS, Task
from tuner import benchmark
from tuner.benchmark import finished, run_benchmark
from tuner.evaluate import KNOWN, LEARNED, groups, size
from tuner.settings import CompareConfig
from tuner.suites import HELD_OUT, SUITES, Suite


@pytest.mark.parametrize("scale", ["full", "quick"])
@pytest.mark.parametrize("name", SUITES)
def test_suites_are_valid_comparisons_of_held_out_tasks(name, scale):
    suite = SUITES[name]
    config = suite.config(scale)
    assert CompareConfig.model_validate(config.model_dump()) == config
    jobs = config.jobs(config.tasks)
    if name.startswith("objectives"):  # of which the shipped policy has seen none
        assert "classification" not in {job.objective for job in jobs}
    else:
        assert {job.role for job in jobs} == {"held-out"}
        assert len({job.dataset for job in jobs}) == len(HELD_OUT)
    assert set(config.methods) <= set(KNOWN)
    assert "keep" in config.methods, "harm is told against it"
    assert config.seeds == config.search_seeds or set(config.methods) <= {"keep", "keep-again"}
    learned = dict.fromkeys(LEARNED, grid()[0])
    assert groups(config, [example("ppo")], learned)
    assert (suite.name, suite.purpose[-1]) == (name, ".")


def test_quick_is_a_small_part_of_full():
    policies = [example("ppo")]
    for suite in SUITES.values():
        quick, full = suite.config("quick"), suite.config("full")
        work = [size(config, policies) * config.runs for config in (quick, full)]
        assert work[0] <= work[1] / 2
        assert set(quick.methods) <= set(full.methods)
        assert quick.tasks == full.tasks


def test_an_offset_is_exact_and_other_cells_keep_their_keys():
    task = Task("trec6")
    for offset in (-1.5, 0.0, 1.5):
        got = np.log10(start_rate(task, 3, 1.5, offset) / reference(task))
        assert got == pytest.approx(offset, abs=1e-9)
    with pytest.raises(BadInput, match="offset"):
        start_rate(task, 0, 1.5, 3.5)
    keep = STATIC["keep"]()
    plain, off = (
        plan([keep], [task], [0], runs=1, decades=1.5, offset=offset)[0] for offset in (None, 0.0)
    )
    assert "offset" not in plain.description
    assert off.description["offset"] == 0.0
    assert plain.key != off.key


@pytest.fixture
def small(tiny_task, monkeypatch):
    """Two suites of a second each."""
    monkeypatch.setitem(TASKS, "tiny", replace(tiny_task()))
    common = {"tasks": ("tiny",), "training": ("tiny",), "runs": 2, "seeds": 1, "search_seeds": 1}
    one = CompareConfig(**common, methods=("keep", "random"))
    described = {**common, "tasks": (asdict(tiny_task()),)}
    two = CompareConfig(**described, methods=("keep",), offsets=(-1.0, 1.0), mode="careful")
    return [Suite("one", "The first.", one), Suite("two", "The second.", two)]


def test_a_benchmark_is_run_once_and_then_known(small, tmp_path):
    ticks = []

    def tick(done, total, words):
        ticks.append((done, total))

    run_benchmark(small, [example("ppo")], tmp_path, tick, workers=0)
    assert ticks == [(n, 7) for n in (*range(1, 8), 7)]
    found = finished(tmp_path, ["one", "two", "three"])
    assert list(found) == ["one", "two"]
    assert [len(suite["outcomes"]) for suite in found.values()] == [3, 4]
    assert found["one"]["policies"][0]["algorithm"] == "ppo"
    assert {o["cell"]["offset"] for o in found["two"]["outcomes"]} == {-1.0, 1.0}
    steered = [o for o in found["two"]["outcomes"] if o["steered"]]
    assert {o["cell"]["method"]["mode"] for o in steered} == {"careful"}
    ticks.clear()
    run_benchmark(small, [example("ppo")], tmp_path, tick, workers=0)
    assert ticks == [(7, 7)]
    assert repr(finished(tmp_path, ["one", "two"])) == repr(found)


def test_a_policy_given_twice_is_refused_before_the_search(small, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "learn", lambda *given: pytest.fail("searched first"))
    with pytest.raises(BadInput, match="is given twice"):
        run_benchmark(small, [example("ppo")] * 2, tmp_path / "out", print, workers=0)
    assert not (tmp_path / "out").exists()


def test_one_broken_suite_keeps_no_other_from_running(small, tmp_path, monkeypatch):
    whole = benchmark.run_comparison

    def breaks(config, policies, out, tick, learned):
        if out.name == "one":
            raise RunFailed("a cell failed")
        return whole(config, policies, out, tick, learned)

    monkeypatch.setattr(benchmark, "run_comparison", breaks)
    with pytest.raises(RunFailed, match="a cell failed"):
        run_benchmark(small, [example("ppo")], tmp_path, lambda *given: None, workers=0)
    assert list(finished(tmp_path, ["one", "two"])) == ["two"]


def test_an_unfinished_suite_is_not_there(small, tmp_path):
    (tmp_path / "one").mkdir()
    Ledger(tmp_path / "one" / "ledger.sqlite")
    assert finished(tmp_path, ["one", "two"]) == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--suite", "dataset"], "Did you mean 'datasets'"), (["--scale", "ful"], "'full'")],
)
def test_names_out_of_the_plan_are_refused(run, policy_file, tmp_path, words, said):  # noqa: F811
    code, _, err = run("benchmark", policy_file, "--out", tmp_path / "out", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert said in err
    assert not (tmp_path / "out").exists()


def test_the_command_runs_the_plan(run, policy_file, small, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tuner.suites.SUITES", {suite.name: suite for suite in small})
    words = ["--suite", "one", "--workers", "0", "--out", tmp_path / "out"]
    code, out, err = run("benchmark", policy_file, *words)
    assert code == 0, err
    assert "The first." in " ".join(out.split())
    assert list(finished(tmp_path / "out", ["one", "two"])) == ["one"]
