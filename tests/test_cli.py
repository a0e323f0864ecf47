"""The command line: every failure is one line and an exit code; configuration is checked."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
from test_policy import example

from envs import workload
from envs.errors import BadInput
from envs.task import TASKS
from tuner import cli, policy
from tuner.apply import _identity, steer_trainer
from tuner.config import read, resolve
from tuner.curriculum import TrainConfig
from tuner.settings import ApplyConfig, CompareConfig
from tuner.suites import Suite


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command -> (exit code, stdout, stderr)."""

    def call(*words):
        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        monkeypatch.setattr(sys, "argv", ["steersman", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        signal.signal(signal.SIGTERM, before)
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture
def policy_file(tmp_path):
    policy.save(example("ppo"), tmp_path / "policy.safetensors")
    return tmp_path / "policy.safetensors"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train", "--agnt", "ppo"], "--agent"),
        (["train", "--agent", "pqo"], "'pqo'"),
        (["train", "--tasks", "trec7"], "Did you mean 'trec6'"),
        (["train", "--iterations", "-1"], "--iterations"),
        (["train", "--iterations", "many"], "--iterations"),
        (["train", "--view", "continuous", "--agent", "dqn"], "acts discretely"),
        (["train", "--steps", "3", "--interval", "5"], "interval"),
        (["train", "--config", "absent.yaml"], "absent.yaml"),
        (["explain", "absent.safetensors"], "absent.safetensors"),
        (["report", "absent"], "absent"),
        (["fetch", "trec7"], "Did you mean 'trec6'"),
        (["fetch", "all"], "no corpus, texts or model 'all'"),
        (["train", "--starts", "lion"], "no value 'lion'. Known: adamw, rmsprop, sgd."),
        (["train", "--optimizers", "lion"], "no value 'lion'. Known: adamw, rmsprop, sgd."),
        (["train", "--horizons", "nan"], "--horizons: '[nan]': not factors"),
        (["train", "--horizons", "inf"], "--horizons: '[inf]': not factors"),
        (["train", "--horizons", "0"], "--horizons: '[0.0]': not factors"),
        (["train", "--seed", str(10**30)], "--seed"),
        (["compare", "--seed", str(10**30)], "--seed"),
        (["compare", "--runs", "inf"], "--runs"),
        (["compare", "--tasks", "sms", "--offsets", "9"], "offset: 9.0 is not in -3 to 3"),
        (["report", ".", "--mlflow", "http://127.0.0.1:9"], "nothing is sent without --sync"),
        (["report", ".", "--sync", "--mlflow", "none"], "'none' is no place to send to"),
        (["explain", "models:/steersman/1"], "no address (Invalid IPv6 URL)"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    if words[0] == "explain":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://[::1")
    code, _, err = run(*words)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not any(tmp_path.iterdir()), "nothing may be written"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rate", "0"], "rate"),
        (["--rate", "nan"], "rate"),
        (["--rate", "1e30"], "rate"),
        (["--batch", "0"], "batch"),
        (["--batch", "5000"], "batch"),
        (["--task", "bcc"], "Did you mean 'bbc'"),
        (["--model", "tiny-33"], "Did you mean 'tiny-32'"),
        (["--mode", "carefree"], "careful"),
        (["--task", "absent.csv"], "absent.csv"),
        (["--seed", "5000000000"], "--seed"),
        (["--task", "trec6", "--text", "nosuch"], "text: 'nosuch' for trec6, whose columns are"),
        (["--task", "dpo", "--label", "nosuch"], "label: 'nosuch' for dpo, whose columns are"),
    ],
)
def test_bad_jobs_are_refused_before_training(run, policy_file, tmp_path, words, said):
    out = ("--out", tmp_path / "out", "--mlflow", "http://127.0.0.1:9")
    code, _, err = run("apply", policy_file, *out, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert said in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    ["train --iterations 1", "apply", "compare --methods keep", "benchmark"],
)
def test_a_file_in_place_of_the_folder(run, policy_file, tiny_task, tmp_path, monkeypatch, command):
    task, suite = asdict(tiny_task()), Suite("one", "", CompareConfig(methods=(), tasks=("tiny",)))
    monkeypatch.setitem(TASKS, "tiny", tiny_task())
    monkeypatch.setattr("tuner.suites.SUITES", {"one": suite})
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"tasks": [task]}))
    name, *words = command.split()
    if name == "apply":
        words = ["--task", task["dataset"], "--model", task["model"], "--rows", "200",
                 "--max-length", "12"]  # fmt: skip
    elif name != "benchmark":
        words += ["--config", file]
    given = [] if name == "train" else [policy_file]
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    code, _, err = run(name, *given, *words, "--out", blocked)
    assert (code, err.count("\n")) == (2, 1)
    assert "folder: a file is in its place; name another folder" in err
    assert blocked.read_text() == "in the way"


def test_a_steered_job_end_to_end(run, policy_file, tiny_task, tmp_path):
    task = tiny_task()
    words = ["apply", policy_file, "--task", task.dataset, "--model", task.model, "--steps", "20",
             "--rows", "200", "--batch", "8", "--max-length", "12", "--rate", "1e-3", "--keep",
             "--threads", "1", "--mode", "explore", "--out", tmp_path / "out[red]"]  # fmt: skip
    code, out, err = run(*words)
    assert code == 0, err
    assert "steered" in out
    assert "unsteered" in out
    (folder,) = (tmp_path / "out[red]" / "steered").iterdir()
    assert f"steersman explain {policy_file} --run '{folder}'\n" in out, "to be pasted as it is"
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["final"]["test"] <= 1
    decisions = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    assert len(decisions) >= 3  # this policy knows a narrow range only; outside it is off
    assert [d["step"] for d in decisions] == list(range(0, 20, 2))[: len(decisions)]
    code, out, err = run("explain", policy_file, "--run", folder)
    assert code == 0, err
    assert out.count("\n") >= len(decisions)
    assert f"decisions of {folder.name}" in out
    for bad in (b"\xff\n", json.dumps(decisions[0] | {"observation": [0.1]}).encode()):
        (tmp_path / "audit.jsonl").write_bytes(bad)
        code, _, err = run("explain", policy_file, "--run", tmp_path)
        assert (code, err.count("\n")) == (2, 1)
        assert "line 1: is not a decision" in err
    assert run(*words)[0] == 0  # repeated: done before
    assert json.loads((folder / "summary.json").read_text()) == summary


@pytest.fixture
def finished(tiny_data, tmp_path):
    """A finished steered run of own data -> its folder, and what repeats its command."""
    data = tmp_path / "own.csv"
    data.write_bytes(tiny_data.read_bytes())
    config = ApplyConfig(task=str(data), model="tiny-32", rows=200, max_length=12)
    identity = _identity(config, example("ppo"))
    folder = tmp_path / "out" / "steered" / "own-tiny-32-0"
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text(json.dumps(identity))
    (folder / "summary.json").write_text(json.dumps({"known": True}))
    workload._splits.cache_clear()
    return folder, lambda: (
        workload.load.cache_clear(), workload._splits.cache_clear(), workload._tokens.cache_clear(),
        steer_trainer(example("ppo"), config, tmp_path / "out", lambda *given: None),
    )[-1]  # fmt: skip


def test_a_finished_run_is_not_that_of_changed_data(finished, tmp_path):
    folder, repeat = finished
    assert repeat() == {"known": True}
    with (tmp_path / "own.csv").open("a") as file:
        file.writelines(f"one more cat {number},animal\n" for number in range(99))
    with pytest.raises(BadInput, match="holds another steered run, or one of other data; choose"):
        repeat()
    known = json.loads((folder / "identity.json").read_text())
    del known["data"]
    (folder / "identity.json").write_text(json.dumps(known))  # as it was written once
    assert repeat() == {"known": True}


@pytest.mark.parametrize("name", ["identity.json", "summary.json"])
def test_a_run_that_is_damaged_is_told_in_one_sentence(finished, name):
    folder, repeat = finished
    (folder / name).write_text((folder / name).read_text()[:-3])
    with pytest.raises(BadInput, match=f"{name}: is damaged; delete"):
        repeat()


def test_a_damaged_config_is_written_anew(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    cli.save_config(tmp_path, "apply", ApplyConfig())
    assert list(json.loads((tmp_path / "config.json").read_text())) == ["apply"]


def test_help_alone_is_no_error(run):
    code, out, err = run()
    assert "Usage" in out
    assert (code, err) == (2, "")


def test_a_warning_is_one_line(run):
    run("--version")
    text = warnings.formatwarning("own.csv: 4 rows\ndropped", UserWarning, "f.py", 3, "x = 1")
    assert text == "warning: own.csv: 4 rows dropped\n"


@pytest.mark.parametrize("name", ["ppo", "dqn", "q-learning", "sarsa"])
def test_explain_prints_what_a_policy_does(run, tmp_path, name):
    policy.save(example(name), tmp_path / "p.safetensors")
    code, out, _ = run("explain", tmp_path / "p.safetensors")
    assert code == 0
    assert name in out
    assert "what it does" in out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"agnt: ppo", "Did you mean 'agent'"),
        (b"iterations: '1e-3'", "iterations"),
        (b"agent: !!python/object/apply:os.system ['true']", "tags are not read"),
        (b"tasks: &a [sms]\nagent: *a", "not read"),
        (b"agent: ppo\nagent: dqn", "given twice"),
        (b"- agent", "not a mapping"),
        (b"agent: [", "not YAML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"# " + b"x" * (1 << 20), "over 1 MiB"),
        (b"seed: -1", "seed"),
        (b"steps: true", "steps: True is yes or no"),
        (b"tasks: [{dataset: sms, rows: 1, rows: 2}]", "rows: is given twice"),
        (b"tasks: " + b"[" * 3000, "nested over 20 deep"),
    ],
)
def test_bad_configuration_files(tmp_path, content, said):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=said) as error:
        resolve(TrainConfig, file, {})
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_over_file_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("agent: dqn\niterations: 7\n")
    config = resolve(TrainConfig, file, {"iterations": 9})
    assert (config.agent, config.iterations, config.envs) == ("dqn", 9, 64)
    assert read(file) == {"agent": "dqn", "iterations": 7}


def test_the_demonstrations_settings_are_valid():
    folder = Path(__file__).parent.parent / "examples" / "demo"
    for name, model in (("train", TrainConfig), ("apply", ApplyConfig), ("compare", CompareConfig)):
        resolve(model, folder / f"{name}.yaml", {})


@pytest.mark.parametrize("command", ["tasks", "fetch", "train", "apply", "compare", "benchmark",
                                     "report", "explain"])  # fmt: skip
def test_help_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Example" in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_command_resumes(tiny_task, tmp_path, number, code):
    task = tiny_task()
    file = tmp_path / "train.yaml"
    job = {"dataset": task.dataset, "model": task.model, "rows": 200, "batch": 8,
           "max_length": 12, "validation_rows": 48}  # fmt: skip
    file.write_text(json.dumps({"agent": "sarsa", "tasks": [job], "iterations": 1000, "envs": 2,
                                "episodes": 1, "steps": 8, "interval": 2, "pack": 2}))  # fmt: skip
    words = [sys.executable, "-m", "tuner.cli", "train", "--config", file, "--out", tmp_path / "o"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "o" / "train.jsonl"
    limit = time.monotonic() + 90
    while time.monotonic() < limit and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.strip().splitlines()[-1].endswith("repeat the command to go on from what is saved")
    rows = log.read_text().count("\n")
    assert rows > 2
    again = subprocess.run([*words, "--iterations", str(rows + 1)], env=environment, check=False)
    assert again.returncode == 0
    assert log.read_text().count("\n") == rows + 1


def test_read_only_output_is_one_line_and_exit_1(run, policy_file, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    code, _, err = run("train", "--out", blocked / "runs", "--iterations", "1")
    assert code in (1, 2)
    assert err.count("\n") == 1
    assert blocked.read_text() == "in the way"
