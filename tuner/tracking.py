"""MLflow, a mirror of the run folder; the only module that imports mlflow.

The folder is the truth and work never waits for MLflow. `mirroring` starts a process of its own
that sends what is new every few seconds; what it could not send, `mirror` sends later. What a
server has is told by tags on its runs, so that sending twice, after a kill at any point or with
``mlflow.json`` lost, makes no second run::

    with mirroring(Path("runs/demo"), "http://127.0.0.1:5000"):
        work()
"""

import atexit
import fcntl
import http.client
import json
import logging
import math
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from envs.errors import BadInput, RunFailed, SteersmanError
from envs.files import write_atomic
from tuner.folder import Item, gather, read_json, sha256_of

if TYPE_CHECKING:
    from tuner.policy import Policy

EXPERIMENT = "steersman"  # also the name of the registered policies
EVERY, PATIENCE, LIMIT = 10.0, 4.5, 60.0  # seconds: between passes, at the end, without a parent
BATCH = 1000  # metrics a request
SCHEMES = ("models:/", "runs:/", "mlflow-artifacts:/")
SAFE = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
HASTE = SAFE | {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def mirror(
    folder: Path,
    uri: str | None = None,
    *,
    experiment: str = EXPERIMENT,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Send what MLflow lacks; how many runs were made or changed. Raises `RunFailed`.

    uri: a server or store; by default ``MLFLOW_TRACKING_URI``, else the one that the folder was
    sent to before, else `default_uri`.
    """
    where = _resolve(folder, uri)
    if where is None:
        raise BadInput(f"{folder}: mlflow: 'none' is no place to send to; name a server or store")
    sender = _Sender(folder, where, experiment)
    return sender.send(final=True, on_progress=on_progress)


def default_uri(root: Path) -> str:
    """The store in a folder of run folders: ``runs/mlflow.db``, with artifacts beside it."""
    return f"sqlite:///{root.absolute() / 'mlflow.db'}"


@contextmanager
def mirroring(folder: Path, uri: str | None = None) -> Iterator["Mirror"]:
    """Mirror the folder from a process of its own while the block runs; never raises, nor waits.

    uri: as for `mirror`; ``none`` turns it off. Leaving the block takes at most 5 seconds.
    """
    child = Mirror(folder, uri)
    try:
        yield child
    finally:
        child.close()


class Mirror:
    """The process that mirrors a folder; it ends by itself when this process dies."""

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        self._folder, self._uri = folder, _resolve(folder, uri)
        self._child: subprocess.Popen[bytes] | None = None
        if self._uri is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remember(folder, {"uri": _shown(self._uri)})
            with (folder / "mlflow.log").open("ab") as log:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "tuner.tracking", str(folder), self._uri],
                    stdin=subprocess.PIPE, stdout=log, stderr=log, env=_environment(),
                    start_new_session=True,
                )  # fmt: skip
        except (OSError, SteersmanError):
            self._child = None

    def close(self, patience: float = PATIENCE) -> bool:
        """Let it finish, for so many seconds; whether everything was sent."""
        if self._uri is None:
            return True
        child, uri, self._child, self._uri = self._child, self._uri, None, None
        if child is not None and child.stdin is not None:
            try:
                child.stdin.close()
                child.wait(patience)
            except (OSError, subprocess.TimeoutExpired):
                pass
            finally:
                child.kill()
                child.wait()
        sent = child is not None and child.returncode == 0
        if not sent:
            print(f"mlflow: not everything was sent; `{_again(self._folder, uri)}` sends what is "
                  f"missing (see {self._folder / 'mlflow.log'})", file=sys.stderr)  # fmt: skip
        return sent


def fetch_policy(uri: str, *, tracking: str | None = None, seconds: float = LIMIT) -> Path:
    """Download a policy file, ``models:/name/version`` or ``runs:/id/policy.safetensors``.

    Bounded in time, by a process of its own. The file is removed when this process ends.
    tracking: by default ``MLFLOW_TRACKING_URI``, else the store in ``runs``.
    """
    if not uri.startswith(SCHEMES):
        raise BadInput(f"policy: {uri[:80]!r}: not an MLflow address; it starts {SCHEMES[0]}")
    where = tracking or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(Path("runs"))
    if _gone(where):
        raise BadInput(f"policy: {uri}: no store at {where}; set MLFLOW_TRACKING_URI")
    target = Path(tempfile.mkdtemp(prefix="steersman-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    try:
        _knock(where)
        subprocess.run([sys.executable, "-m", "tuner.tracking", "--fetch", uri, str(target), where],
                       env=_environment(), stdin=subprocess.DEVNULL, capture_output=True,
                       timeout=seconds, check=True)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RunFailed(f"{uri}: not here after {seconds:g} s; try again") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.decode(errors="replace").strip().splitlines() or ["no reason"])[-1]
        raise RunFailed(f"{uri}: {reason[:300]}; check the address and {_shown(where)}") from None
    found = [path for path in target.rglob("*.safetensors") if not path.is_symlink()]
    if len(found) != 1:
        raise BadInput(f"{uri}: {len(found)} policy files; name a version or a file that is one")
    return found[0]


def open_policy(given: str, sha256: str | None = None) -> "Policy":
    """The policy of a file, or of an address that `fetch_policy` knows; or the ``default`` one."""
    from tuner import policy

    if given == "default":
        return policy.load(policy.DEFAULT, sha256)
    return policy.load(fetch_policy(given) if given.startswith(SCHEMES) else given, sha256)


class _Sender:
    """What a server already has of a folder, and how the rest gets there."""

    def __init__(self, folder: Path, uri: str, experiment: str = EXPERIMENT) -> None:
        self.folder, self.uri, self.experiment = folder, uri, experiment
        self._client: Any = None
        self._runs: dict[str, Any] = {}  # key -> the run as it was found or made
        self._versions: dict[str, str] = {}

    def send(
        self, *, final: bool, on_progress: Callable[[int, int], None] | None = None
    ) -> int:  # fmt: skip
        """One pass; ``final`` closes every run. Raises `RunFailed`."""
        with _alone(self.folder):
            items = gather(self.folder)
            _knock(self.uri)
            try:
                self._connect()
                changed = 0
                for done, item in enumerate(items, 1):
                    changed += self._update(item, closing=final or item.done)
                    if on_progress is not None:
                        on_progress(done, len(items))
                self._settle({item.key for item in items})
            except SteersmanError:
                raise
            except Exception as error:  # of mlflow, SQLAlchemy, requests, boto3 ...
                text = " ".join(str(error).split())[:300].replace(self.uri, _shown(self.uri))
                raise RunFailed(
                    f"mlflow: {_shown(self.uri)}: {text}; `{_again(self.folder, self.uri)}` "
                    "tries again"
                ) from error
        return changed

    def _connect(self) -> None:
        if self._client is not None:
            return
        os.environ.update({name: os.environ.get(name, value) for name, value in SAFE.items()})
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        place = None
        if self.uri.startswith("sqlite:///"):
            root = Path(self.uri[len("sqlite:///") :]).absolute().parent
            root.mkdir(parents=True, exist_ok=True)
            place = (root / "mlartifacts").as_uri()
        client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        known = client.get_experiment_by_name(self.experiment)
        self._place = known.experiment_id if known else client.create_experiment(
            self.experiment, place, {"mlflow.experimentKind": "custom_model_development"}
        )  # fmt: skip
        state = read_json(self.folder / "mlflow.json")
        path = str(self.folder.absolute().resolve())
        self._name = str(state.get("folder") or sha256_of(path.encode())[:16])
        token: str | None = ""
        query = f"tags.`steersman.folder` = '{self._name}'"
        while token is not None:
            page = client.search_runs([self._place], query, max_results=BATCH, page_token=token)
            for run in page:
                self._runs[run.data.tags["steersman.key"]] = run
                self._versions[run.data.tags["steersman.key"]] = run.data.tags.get(
                    "steersman.version", ""
                )
            token = page.token or None
        self._client = client

    def _update(self, item: Item, closing: bool) -> bool:
        """Bring one run up to date; the version is noted last, so a kill leaves it to be redone."""
        run, version = self._runs.get(item.key), item.version
        fresh = run is not None and self._versions.get(item.key) == version
        if run is None:
            tags = {"steersman.folder": self._name, "steersman.key": item.key,
                    "steersman.kind": item.kind}  # fmt: skip
            if item.kind != "folder":
                tags["mlflow.parentRunId"] = self._runs["folder"].info.run_id
            run = self._client.create_run(self._place, tags=tags, run_name=item.name)
            self._runs[item.key] = run
        if not fresh:
            self._fill(run, item)
            self._client.set_tag(run.info.run_id, "steersman.version", version)
            self._versions[item.key] = version
        if closing and run.info.status == "RUNNING":
            self._client.set_terminated(run.info.run_id, "FINISHED")
            self._runs[item.key] = self._client.get_run(run.info.run_id)
        return not fresh

    def _fill(self, run: Any, item: Item) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        client, run_id, since = self._client, run.info.run_id, run.info.start_time
        sound = [number for number in item.numbers if math.isfinite(number[1])]
        lost = [f"{name}@{step}" for name, value, step in item.numbers if not math.isfinite(value)]
        tags = dict(item.tags) | ({"steersman.not_finite": ", ".join(lost)[:500]} if lost else {})
        params = {k: v for k, v in item.params.items() if _name(k) not in run.data.params}
        client.log_batch(run_id, tags=[RunTag(k, str(v)) for k, v in tags.items() if v != ""])
        for start in range(0, len(params), 100):
            part = list(params.items())[start : start + 100]
            client.log_batch(run_id, params=[Param(_name(k), str(v)[:500]) for k, v in part])
        for start in range(0, len(sound), BATCH):
            # The same time whenever it is sent, so that a server takes a point only once.
            client.log_batch(run_id, metrics=[
                Metric(_name(name), value, since + step, step)
                for name, value, step in sound[start : start + BATCH]
            ])  # fmt: skip
        if item.data:
            client.log_inputs(run_id, [
                DatasetInput(Dataset(name[:500], digest[:36], "local", json.dumps({"name": name})),
                             [InputTag("mlflow.data.context", context)])
                for name, digest, context in item.data
            ])  # fmt: skip
        if item.files:
            with tempfile.TemporaryDirectory() as folder:
                for name, content in item.files.items():
                    path = Path(folder) / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                client.log_artifacts(run_id, folder)
        if "policy/policy.safetensors" in item.files:
            self._register(run, sha256_of(item.files["policy/policy.safetensors"]))

    def _register(self, run: Any, sha256: str) -> None:
        """The policy as a model version: its file, by its hash, and no code."""
        client, name = self._client, self.experiment
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name, description="Steersman policies")
        versions = client.search_model_versions(f"name = '{name}'")
        if not any(version.tags.get("sha256") == sha256 for version in versions):
            client.create_model_version(
                name, f"{run.info.artifact_uri}/policy", run.info.run_id, tags={"sha256": sha256}
            )

    def _settle(self, keys: set[str]) -> None:
        """Close what a dead process left open, and note where everything is."""
        for key, run in self._runs.items():
            if key not in keys and run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "KILLED")
                self._runs[key] = self._client.get_run(run.info.run_id)
        state = {"folder": self._name, "uri": _shown(self.uri), "experiment": self.experiment,
                 "runs": {key: run.info.run_id for key, run in self._runs.items()}}  # fmt: skip
        _remember(self.folder, state)


def _name(text: str) -> str:
    """A name that every store takes."""
    return re.sub(r"[^\w\-./ ]", "-", text)[:250]


def _resolve(folder: Path, uri: str | None) -> str | None:
    known = read_json(folder / "mlflow.json").get("uri")
    if known is None or _gone(known):  # as of a folder that was moved with its store
        known = default_uri(folder.parent)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or known
    return None if uri == "none" else uri


def _gone(uri: str) -> bool:
    """Whether a store is a file, and not there."""
    return uri.startswith("sqlite:///") and not Path(uri[len("sqlite:///") :]).is_file()


def _remember(folder: Path, state: dict[str, Any]) -> None:
    """Note what is known of where the folder is sent; what was known of the rest stays."""
    path = folder / "mlflow.json"
    known = read_json(path)
    if (now := known | state) != known:
        write_atomic(path, (json.dumps(now, indent=1) + "\n").encode())


def _again(folder: Path, uri: str) -> str:
    """The command that sends what is missing."""
    return shlex.join(("steersman", "report", str(folder), "--sync", "--mlflow", _shown(uri)))


def _shown(uri: str) -> str:
    """Without the password that it may hold."""
    try:
        parts = urlsplit(uri)
    except ValueError:  # no address
        return re.sub("//.*@", "//", uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc \
        else uri  # fmt: skip


def _knock(uri: str) -> None:
    """Any answer will do: a dead server would hold a call of mlflow for minutes."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(_shown(uri), timeout=3).close()
    except urllib.error.HTTPError as answer:
        answer.close()
    except (ValueError, http.client.InvalidURL) as error:
        raise BadInput(f"mlflow: {_shown(uri)}: no address ({error}); mend it") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise RunFailed(f"mlflow: {_shown(uri)}: no answer ({reason}); start the server") from error


def _environment() -> dict[str, str]:
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | HASTE | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two mirrors of one folder would make each run twice."""
    try:
        lock = os.open(folder / ".mlflow.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunFailed(f"{folder}: {error.strerror}; allow writing to it") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunFailed(f"{folder}: another process is sending it; let it finish") from None
    finally:
        os.close(lock)


def _follow(folder: Path, uri: str) -> int:
    """Send until standard input ends, then once more; the exit code."""
    sender, last = _Sender(folder, uri), False
    while True:
        try:
            sender.send(final=last)
            failed = False
        except (SteersmanError, OSError, ValueError) as error:
            print(error, flush=True)
            failed = True
        if last:
            return int(failed)
        last = bool(select.select([sys.stdin], [], [], EVERY)[0])
        if last:
            end = threading.Timer(LIMIT, os._exit, [1])
            end.daemon = True
            end.start()


def _download(uri: str, target: str, tracking: str) -> int:
    import mlflow

    mlflow.set_tracking_uri(tracking)
    mlflow.artifacts.download_artifacts(uri, dst_path=target)
    return 0


if __name__ == "__main__":
    sys.exit(_download(*sys.argv[2:]) if sys.argv[1] == "--fetch"
             else _follow(Path(sys.argv[1]), sys.argv[2]))  # fmt: skip
