"""MLflow is a mirror: sent once, in any order of accidents, and never waited for."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from test_policy import GOOD
from test_report import outcome, trial

from baselines.ledger import Ledger, key_of
from envs.errors import BadInput, RunFailed
from tuner import tracking
from tuner.folder import _numbers, gather
from tuner.tracking import default_uri, fetch_policy, mirror, mirroring, open_policy

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # mlflow's of SQLAlchemy


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """An empty store; making one takes seconds, copying it does not."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    os.environ.update(tracking.SAFE)
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def make_folder(root, outcomes=3):
    """A run folder with everything in it."""
    folder = root / "demo"
    (folder / "figures").mkdir(parents=True)
    (folder / "config.json").write_text('{"train": {"agent": "dqn", "seed": 3}}')
    (folder / "report.html").write_text("<p>report</p>")
    (folder / "figures/final.png").write_bytes(b"\x89PNG")
    (folder / "policy.safetensors").write_bytes(GOOD)
    add_training(folder, 2)
    steered = folder / "steered/job"
    steered.mkdir(parents=True)
    (steered / "audit.jsonl").write_text(json.dumps({
        "step": 0, "observation": [0.1], "normalised": [0.2], "proposed": "x3", "guard": "",
        "applied": {"multiplier": 3.0, "rate": 3e-4, "rollback": False}, "sha256": "ab",
    }) + "\n")  # fmt: skip
    (steered / "curve.jsonl").write_text(
        '{"step": 10, "rate": 3e-4, "train_loss": 1.5, "validation_loss": null}\n{"step": 20, "ra'
    )
    (steered / "summary.json").write_text('{"task": "mine", "seed": 0, "final": {"test": 0.9}}')
    ledger = Ledger(folder / "ledger.sqlite")
    for seed in range(outcomes):
        add_outcome(ledger, seed)
    return folder


def add_training(folder, count):
    with (folder / "train.jsonl").open("a") as file:
        for number in range(count):
            file.write(json.dumps({"iteration": number, "return_mean": 0.5, "loss": math.nan}))
            file.write("\n")


def add_outcome(ledger, seed):
    cell = {"method": {"name": "steersman"}, "task": {"dataset": "bbc", "model": "tiny-32"},
            "seed": seed, "data": {"rows": "a" * 64, "model": "b" * 64}}  # fmt: skip
    ledger.plan([(key_of(cell), cell)])
    handed = [trial(0.8, decisions=[("x3", ""), ("keep", "")])]
    handed[0]["test_loss"] = math.inf
    ledger.commit(key_of(cell), outcome("steersman", "bbc/tiny-32", seed, handed, steered=True))


@pytest.fixture
def folder(tmp_path, template):
    shutil.copy(template, tmp_path / "mlflow.db")
    return make_folder(tmp_path)


def client_of(folder, uri=None):
    from mlflow import MlflowClient

    return MlflowClient(uri or default_uri(folder.parent))


def runs_of(folder, uri=None):
    client = client_of(folder, uri)
    known = client.get_experiment_by_name("steersman")
    return client.search_runs([known.experiment_id], max_results=1000) if known else []


def by_kind(folder, kind, uri=None):
    return next(r for r in runs_of(folder, uri) if r.data.tags["steersman.kind"] == kind)


def points(folder):
    """Every metric point of every run: a duplicate would show."""
    client = client_of(folder)
    return sum(len(client.get_metric_history(run.info.run_id, name))
               for run in runs_of(folder) for name in run.data.metrics)  # fmt: skip


def test_importing_it_does_not_import_mlflow():
    code = "import sys, tuner.tracking; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=tracking._environment()).returncode == 0


def test_sent_once_however_often(folder):
    seen = []
    assert mirror(folder, on_progress=lambda done, total: seen.append((done, total))) == 6
    assert seen == [(i, 6) for i in range(1, 7)]  # the folder, training, a steered run, outcomes
    before = points(folder)
    assert mirror(folder) == 0
    (folder / "mlflow.json").unlink()
    assert mirror(folder) == 0
    assert len(runs_of(folder)) == 6
    assert points(folder) == before
    assert {run.info.status for run in runs_of(folder)} == {"FINISHED"}
    state = json.loads((folder / "mlflow.json").read_text())
    assert set(state["runs"].values()) == {run.info.run_id for run in runs_of(folder)}


def test_what_is_new_is_added(folder):
    mirror(folder)
    add_training(folder, 0)
    (folder / "train.jsonl").write_text((folder / "train.jsonl").read_text()
                                        + '{"iteration": 2, "return_mean": 0.7}\n')  # fmt: skip
    add_outcome(Ledger(folder / "ledger.sqlite"), 9)
    assert mirror(folder) == 2
    assert len(runs_of(folder)) == 7
    training = by_kind(folder, "training")
    history = client_of(folder).get_metric_history(training.info.run_id, "return_mean")
    assert sorted((m.step, m.value) for m in history) == [(0, 0.5), (1, 0.5), (2, 0.7)]


def test_what_an_outcome_holds(folder):
    mirror(folder)
    run = by_kind(folder, "outcome")
    assert run.data.tags["mlflow.parentRunId"] == by_kind(folder, "folder").info.run_id
    assert run.data.params["knobs.rate"] == "0.001"
    assert run.data.params["task.dataset"] == "bbc"
    assert run.data.metrics["final.test"] == 0.8
    assert "final.test_loss" not in run.data.metrics  # infinite
    assert run.data.tags["steersman.not_finite"] == "final.test_loss@0"
    client = client_of(folder)
    history = client.get_metric_history(run.info.run_id, "decision.multiplier")
    assert [(m.step, m.value) for m in history] == [(10, 1.0), (20, 3.0)]
    names = {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs}
    assert names == {"bbc": "a" * 36, "tiny-32": "b" * 36}
    path = client.download_artifacts(run.info.run_id, "decisions.json")
    assert json.loads(Path(path).read_text())["data"][0][:2] == [10, "x3"]


def test_what_the_others_hold(folder):
    mirror(folder)
    client = client_of(folder)
    parent, steered = by_kind(folder, "folder"), by_kind(folder, "steered")
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"config.json", "report.html", "figures"}
    assert steered.data.metrics["decision.multiplier"] == 3.0
    assert steered.data.metrics["final.test"] == 0.9
    assert steered.data.metrics["train_loss"] == 1.5  # and the torn last line is left out
    assert by_kind(folder, "training").data.params == {"agent": "dqn", "seed": "3"}


def test_policy_is_a_model_version_once(folder, monkeypatch):
    mirror(folder)
    (folder / "report.html").write_text("again")
    (folder / "config.json").write_text('{"train": {"agent": "dqn", "seed": 4}}')  # params stay
    mirror(folder)
    versions = client_of(folder).search_model_versions("name = 'steersman'")
    assert len(versions) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", default_uri(folder.parent))
    path = fetch_policy("models:/steersman/1")
    assert path.read_bytes() == GOOD
    assert open_policy(str(path)).manifest.algorithm == "dqn"
    with pytest.raises(RunFailed, match="check the address"):
        fetch_policy("models:/steersman/7")


def test_addresses_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="not an MLflow address"):
        fetch_policy("ftp://somewhere/policy")
    with pytest.raises(BadInput, match="set MLFLOW_TRACKING_URI"):
        fetch_policy("models:/steersman/1")


def test_stale_runs_are_closed(folder):
    mirror(folder)
    client, run = client_of(folder), by_kind(folder, "training")
    client.update_run(run.info.run_id, "RUNNING")
    (folder / "train.jsonl").unlink()
    mirror(folder)
    assert client.get_run(run.info.run_id).info.status == "KILLED"


def test_killed_in_the_middle_and_resumed(folder, tmp_path):
    """Any call may be the last: the next mirror makes it whole, and nothing twice."""
    code = """if True:
        import os, sys
        from pathlib import Path
        from mlflow import MlflowClient
        from tuner import tracking
        left = int(sys.argv[2])
        def deadly(name):
            plain = getattr(MlflowClient, name)
            def call(*args, **kwargs):
                global left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), 9)
                return plain(*args, **kwargs)
            setattr(MlflowClient, name, call)
        for name in ("create_run", "log_batch", "log_inputs", "log_artifacts", "set_tag",
                     "create_model_version", "set_terminated"):
            deadly(name)
        print(tracking.mirror(Path(sys.argv[1])))
    """
    for calls in (9, 17):
        run = subprocess.run([sys.executable, "-c", code, str(folder), str(calls)],
                             env=tracking._environment(), capture_output=True)  # fmt: skip
        assert run.returncode == -signal.SIGKILL, run.stderr.decode()[-500:]
    mirror(folder)
    assert len(runs_of(folder)) == 6
    assert {run.info.status for run in runs_of(folder)} == {"FINISHED"}
    assert len(client_of(folder).search_model_versions("name = 'steersman'")) == 1
    whole = points(folder)
    shutil.rmtree(folder / "figures")
    mirror(folder)
    assert points(folder) == whole == 2 + 6 + 3 * (4 + 8 + 3 + 2)


def test_two_mirrors_do_not_meet(folder):
    with tracking._alone(folder), pytest.raises(RunFailed, match="another process"):
        mirror(folder)


@pytest.fixture
def silent():
    """A server that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_dead_server_is_left_within_five_seconds(tmp_path, silent, capfd):
    folder = make_folder(tmp_path, outcomes=1)
    for uri in ("http://127.0.0.1:9", silent):
        began = time.monotonic()
        with mirroring(folder, uri):
            pass
        assert time.monotonic() - began < 5.0
        command = f"`steersman report {folder} --sync --mlflow {uri}` sends what is missing"
        assert capfd.readouterr().err.count(command) == 1


def test_dead_server_is_one_sentence(tmp_path, silent):
    folder = make_folder(tmp_path, outcomes=0)
    for uri in ("http://name:secret@127.0.0.1:9", silent):
        began = time.monotonic()
        with pytest.raises(RunFailed, match="start the server") as error:
            mirror(folder, uri)
        assert time.monotonic() - began < 5.0
        assert "secret" not in str(error.value)


def test_what_was_missed_goes_where_the_run_was_sent(folder, tmp_path, monkeypatch):
    store = tmp_path / "other" / "mlflow.db"
    store.parent.mkdir()
    shutil.copy(tmp_path / "mlflow.db", store)
    with mirroring(folder, "http://name:secret@127.0.0.1:9"):
        pass
    assert json.loads((folder / "mlflow.json").read_text()) == {"uri": "http://127.0.0.1:9"}
    with pytest.raises(RunFailed, match=r"http://127.0.0.1:9: no answer"):
        mirror(folder)
    assert mirror(folder, f"sqlite:///{store}") == 6
    assert mirror(folder) == 0  # sent there
    shutil.rmtree(store.parent)
    assert tracking._resolve(folder, None) == default_uri(tmp_path)


def test_no_place_to_send_to(tmp_path):
    folder = make_folder(tmp_path, outcomes=0)
    with pytest.raises(BadInput, match="'none' is no place to send to"):
        mirror(folder, "none")
    for uri in ("http://name:secret@[::1", "http://name:secret@host:port"):
        with pytest.raises(BadInput, match="no address") as error:
            mirror(folder, uri)
        assert "secret" not in str(error.value)


def test_mirroring_never_raises_and_can_be_off(tmp_path, monkeypatch, capfd):
    with mirroring(tmp_path / "a", "none"):
        pass
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with mirroring(tmp_path / "file", "http://127.0.0.1:9"):
        pass
    assert "not everything was sent" in capfd.readouterr().err
    with pytest.raises(ZeroDivisionError), mirroring(tmp_path / "b", "http://127.0.0.1:9"):
        _ = 1 / 0


def test_the_process_ends_with_its_parent(tmp_path):
    code = ("import os, sys; from pathlib import Path; from tuner.tracking import Mirror;"
            "m = Mirror(Path(sys.argv[1]), 'http://127.0.0.1:9'); print(m._child.pid, flush=True);"
            "os.kill(os.getpid(), 9)")  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True,
                         env=tracking._environment(), check=False)  # fmt: skip
    child, until = int(run.stdout), time.monotonic() + 15
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        if "Z" in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
            return  # dead, and not yet waited for
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()


def test_long_curves_are_thinned_to_the_same_points():
    def lines(count):
        return [{"step": i, "loss": 1.0} for i in range(count)]

    few, many = _numbers(lines(3000), "step"), _numbers(lines(9000), "step")
    assert len(few) == 1500
    assert len(many) <= 2000
    assert {n for n in many if n[2] < 3000} <= set(few)


def test_items_of_an_empty_folder(tmp_path):
    assert [item.kind for item in gather(tmp_path)] == ["folder"]


@pytest.mark.slow
def test_a_real_server(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
         "--artifacts-destination", str(tmp_path / "artifacts")],
        env=os.environ | tracking.SAFE, start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        folder = make_folder(tmp_path)
        with mirroring(folder, uri) as child:
            time.sleep(30)
            assert {r.info.status for r in runs_of(folder, uri)} == {"RUNNING", "FINISHED"}
            assert child.close(30)
        assert {r.info.status for r in runs_of(folder, uri)} == {"FINISHED"}
        assert mirror(folder, uri) == 0
        assert len(runs_of(folder, uri)) == 6
        run = by_kind(folder, "training", uri).info.run_id
        for address in ("models:/steersman/1", f"runs:/{run}/policy.safetensors"):
            assert fetch_policy(address, tracking=uri).read_bytes() == GOOD
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
    with pytest.raises(RunFailed, match="no answer"):
        mirror(folder, uri)
