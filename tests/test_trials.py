"""The best of several steered runs: where each starts, which is chosen, and what a kill costs."""

import json

import pytest
from safetensors.torch import load_file, save_file
from test_cli import policy_file, run  # noqa: F401  # fixtures
from test_evaluate import quiet
from test_policy import example

import tuner.apply
from envs import workload
from envs.errors import BadInput
from envs.knobs import RATE_CEILING
from tuner.apply import steer_trainer
from tuner.evaluate import run_comparison, write_report
from tuner.folder import gather
from tuner.restarts import Ended, best_run, next_start
from tuner.settings import ApplyConfig, CompareConfig

TODAY = {"config", "sha256", "data", "task", "role", "seed", "start_rate", "metric", "mode",
         "folder", "start", "final", "seconds"}  # fmt: skip


@pytest.fixture
def config(tiny_task):
    task = tiny_task()
    fields = {"task": task.dataset, "model": task.model, "steps": 20, "rows": 200, "batch": 8,
              "max_length": 12, "rate": 1e-3, "threads": 1, "mode": "explore"}  # fmt: skip
    return lambda **changes: ApplyConfig(**(fields | changes))


@pytest.fixture
def apply(tmp_path):
    """Steer into a folder of that name -> the job's folder, with its summary as ``.summary``."""

    def call(config, name="out", tick=quiet):
        summary = steer_trainer(example("ppo"), config, tmp_path / name, tick)
        (folder,) = (tmp_path / name / "steered").iterdir()
        assert json.loads((folder / "summary.json").read_text()) == summary
        return folder, summary

    return call


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def lasting(summary):
    """What does not depend on the clock or the place."""
    kept = {k: v for k, v in summary.items() if k not in ("seconds", "folder")}
    trials = [{k: v for k, v in t.items() if k != "seconds"} for t in summary.get("trials", ())]
    return kept | {"trials": trials}


def test_each_further_run_starts_near_where_the_best_ended_but_not_there():
    one, two, three = Ended(0.5, 1e-3), Ended(0.7, 4e-3), Ended(0.7, 9.0)
    second = next_start([one], seed=0)
    assert 10**-0.3 <= second / 1e-3 <= 10**0.3
    assert second != 1e-3
    third = next_start([one, two], seed=0)
    assert 10**-0.3 <= third / 4e-3 <= 10**0.3
    assert third == next_start([one, two], seed=0) != next_start([one, two], seed=1)
    assert third / 4e-3 != pytest.approx(second / 1e-3)
    assert next_start([one, two, three], seed=0) / 4e-3 != pytest.approx(third / 4e-3)
    assert best_run([one, two, three]) == 1  # the first of equals
    assert max(next_start([three] * n, 0) for n in range(2, 9)) == RATE_CEILING


def test_one_trial_is_what_it_was_and_the_first_of_several_is_the_same_run(apply, config):
    single, plain = apply(config(), "single")
    names = {"identity.json", "summary.json", "audit.jsonl", "curve.jsonl", "checkpoints", "model"}
    assert {path.name for path in single.iterdir()} == names
    assert plain.keys() == TODAY
    assert plain["final"].keys() == {"validation_loss", "test"}
    newer = {"trials", "objective"} & plain["config"].keys()
    assert not newer, "a folder of an earlier version is still its own"
    several, summary = apply(config(trials=2), "several")
    assert {path.name for path in several.iterdir()} == names - {"checkpoints"} | {
        "trial-1", "trial-2"
    }  # fmt: skip
    assert summary.keys() == TODAY | {"trials", "chosen"}
    for name in ("audit.jsonl", "curve.jsonl"):
        assert lines(several / "trial-1" / name) == lines(single / name)
    first, second = summary["trials"]
    assert first["start_rate"] == summary["start_rate"] == 1e-3
    assert 10**-0.3 <= second["start_rate"] / first["end_rate"] <= 10**0.3
    assert second["start_rate"] not in (first["start_rate"], first["end_rate"])
    chosen = several / f"trial-{summary['chosen']}"
    assert (several / "audit.jsonl").read_bytes() == (chosen / "audit.jsonl").read_bytes()
    model, best = (
        load_file(several / "model" / "model.safetensors"),
        (chosen / "checkpoints" / f"checkpoint-{summary['trials'][summary['chosen'] - 1]['step']}"),
    )
    assert all(
        value.equal(model[name]) for name, value in load_file(best / "model.safetensors").items()
    )


def test_a_kill_in_the_second_trial_repeats_nothing_and_changes_nothing(apply, config):
    whole, summary = apply(config(trials=2), "whole")

    class Killed(BaseException):
        pass

    ticks = []

    def kill(step, total, words):
        ticks.append((words, step))
        if (words, step) == ("trial 2 of 2", 13):
            raise Killed

    with pytest.raises(Killed):
        apply(config(trials=2), "killed", kill)
    ticks.clear()
    again, resumed = apply(config(trials=2), "killed", lambda n, _, words: ticks.append((words, n)))
    assert ticks == [("trial 2 of 2", step) for step in range(11, 21)]
    assert lasting(resumed) == lasting(summary)
    for name in ("audit.jsonl", "curve.jsonl", "model/model.safetensors"):
        for folder in (".", "trial-1", "trial-2"):
            ours, theirs = (root / folder / name for root in (again, whole))
            assert ours.read_bytes() == theirs.read_bytes()
    ticks.clear()
    assert apply(config(trials=2), "killed", lambda *tick: ticks.append(tick))[1] == resumed
    assert ticks == [(20, 20, "done before")]


def test_the_choice_is_by_selection_and_test_is_read_once(apply, config, monkeypatch):
    """The second has the best selection score; the third the best validation loss."""
    scores, starts, read = iter([(0.5, 0.9), (0.8, 0.7), (0.6, 0.1)]), [], []

    def trial(job, knobs, folder, policy, words):
        selection, loss = next(scores)
        starts.append(knobs.rate)
        (folder / "model").mkdir(parents=True)
        weights = {
            name: value + selection for name, value in job.load.module(0).state_dict().items()
        }
        save_file(weights, folder / "model" / "model.safetensors")
        ended = {"end_rate": 2 * knobs.rate, "selection": selection, "validation_loss": loss}
        return ended | {"start": {"validation_loss": 1.0}, "seconds": 1.0}

    def judged(module, rows, judge=tuner.apply.judge):
        read.append(rows)
        return judge(module, rows)

    monkeypatch.setattr(tuner.apply, "_trial", trial)
    monkeypatch.setattr(tuner.apply, "judge", judged)
    job = config(trials=3)
    folder, summary = apply(job)
    assert summary["chosen"] == 2
    assert summary["final"]["validation_loss"] == 0.7
    assert [len(rows) for rows in read] == [len(workload.load(job.job()).rows["test"])]
    assert starts[:2] == [1e-3, next_start([Ended(0.5, 2e-3)], job.seed)]
    assert starts[2] == next_start([Ended(0.5, 2e-3), Ended(0.8, 2 * starts[1])], job.seed)
    head = {name: load_file(root / "model" / "model.safetensors")["head.bias"]
            for name, root in (("chosen", folder), ("second", folder / "trial-2"))}  # fmt: skip
    assert head["chosen"].equal(head["second"])


def test_trials_on_the_command_line(run, policy_file, config, tmp_path, monkeypatch):  # noqa: F811
    out, job = tmp_path / "out", config()
    words = ["apply", policy_file, "--out", out, "--mode", "explore", "--threads", "1"]
    for name in ("task", "model", "steps", "rows", "batch", "max_length", "rate"):
        words += [f"--{name.replace('_', '-')}", getattr(job, name)]
    for bad, said in (
        (["--trials", "0"], "--trials"),
        (["--trials", "many"], "--trials"),
        (["--trials", "101"], "--trials"),
        (["--trials", "2", "--advise"], "advice steers nothing"),
    ):
        code, _, err = run(*words, *bad)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err
    assert not (out / "steered").exists()
    code, shown, err = run(*words, "--trials", "2")
    assert code == 0, err
    assert "trial 1 of 2" in shown
    assert shown.count("chosen") == 1
    (folder,) = (out / "steered").iterdir()
    for place in (folder, folder / "trial-2"):
        code, shown, err = run("explain", policy_file, "--run", place)
        assert code == 0, err
        assert "decisions of" in shown
    code, _, err = run(*words, "--trials", "3")
    assert code == 2
    assert "another steered run" in err
    task = {"dataset": job.task, "model": job.model, "rows": 200, "batch": 8, "max_length": 12}
    compared = CompareConfig(tasks=(task,), methods=("keep",), seeds=1, runs=2, workers=0, steps=8)
    run_comparison(compared, [example("ppo")], out, quiet)
    assert write_report(out)["cells"] == 1
    assert f"steered-{folder.name}" in (out / "report.html").read_text()
    (item,) = [item for item in gather(out) if item.kind == "steered"]
    assert item.params["chosen"] in (1, 2)


def test_advice_has_nothing_to_choose_from(config):
    with pytest.raises(BadInput, match="leave out one of the two"):
        config(trials=2, advise=True).job()
