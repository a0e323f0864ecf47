"""Ray Tune: its schedulers, over runs that stay in this process.

A Ray trial is a remote control. Its actor holds no model, no data and no budget: each of its verbs
is a message to the process that called `search`, which answers one at a time from a thread of its
own. So what a trial costs is charged where it arises, and neither Ray nor its actors can see more
of a run than the score they are told. One trial is in motion at a time, in Ray's own order.
"""

import contextlib
import functools
import logging
import math
import os
import random
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any, Protocol, Self

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.search.basic_variant import BasicVariantGenerator

from envs.errors import BadInput, RunFailed

SCORE = "score"
TIME = "training_iteration"  # Ray's count of a trial's intervals
STORE = 80 * 2**20  # bytes of shared memory, about the least that Ray takes
QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a FutureWarning
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints whatever is asked
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is raised here
}


Space = Mapping[str, tuple[Any, ...]]  # name of a distribution in `ray.tune`, and its arguments


class Jobs(Protocol):
    """The runs behind the trials, by the names that Ray gives these."""

    @property
    def over(self) -> bool:
        """Whether nothing can be done any more."""

    def settle(self, trial: str, drawn: Mapping[str, Any]) -> None:
        """Open the trial's run, or put other settings in force."""

    def advance(self, trial: str) -> tuple[float, bool]:
        """One interval -> its score, higher is better, and whether the run is done."""

    def save(self, trial: str) -> Any:
        """A mark of the weights as they are."""

    def load(self, trial: str, mark: Any) -> None:
        """Put the marked weights, of this trial or of another, in place."""

    def close(self, trial: str) -> None:
        """The trial has ended."""


def asha(most: int, grace: int, reduction: float) -> ASHAScheduler:
    """Ray's ASHA over at most so many intervals."""
    return ASHAScheduler(TIME, SCORE, "max", most, grace, reduction)


class Pbt(PopulationBasedTraining):
    """Ray's PBT with the members in step, drawing from a generator of its own.

    Ray's draws from Python's global one, which Ray also shuffles its events with, at times that
    depend on the machine.
    """

    def __init__(self, seed: int, span: tuple[float, float], every: int, **options: Any) -> None:
        """span: of the rate. every: intervals from one perturbation to the next."""
        low, high = map(math.log, span)
        super().__init__(
            TIME, SCORE, "max", every, synch=True, log_config=False,
            hyperparam_mutations={"rate": lambda: math.exp(random.uniform(low, high))},
            **options,
        )  # fmt: skip
        self._dice = random.Random(seed).getstate()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Any) -> str:
        """Ray's, with these dice."""
        before = random.getstate()
        random.setstate(self._dice)
        try:
            decision: str = super().on_trial_result(tune_controller, trial, result)
        finally:
            self._dice = random.getstate()
            random.setstate(before)
        return decision


def search(jobs: Jobs, space: Space, scheduler: Any, seed: int, samples: int | None = None) -> None:
    """Random draws under a scheduler, until all ``samples`` have ended or the jobs are over.

    samples: trials that are under way together; none: one after another, without an end. Raises
    what a job raised, and `RunFailed` if Ray itself failed.
    """
    with running() as folder, Desk(jobs, folder / "desk") as desk:
        drawing = _Draws(random_state=seed, max_concurrent=0 if samples else 1)
        tuner = tune.Tuner(
            Remote,
            param_space={"desk": desk.path}
            | {name: getattr(tune, kind)(*given) for name, (kind, *given) in space.items()},
            tune_config=tune.TuneConfig(
                num_samples=samples or -1, scheduler=scheduler, search_alg=drawing,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="search", storage_path=str(folder), verbose=0, log_to_file=False,
                stop=_Over(desk.path), callbacks=[_Closing(desk.path)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(fail_fast=True),
            ),
        )  # fmt: skip
        try:
            failures = tuner.fit().errors
        except (tune.TuneError, ray.exceptions.RayError) as error:
            failures = [error]
        finally:
            shutil.rmtree(folder / "search", ignore_errors=True)
    if failures and not desk.over:
        reason = str(failures[0]).strip().splitlines()[-1].partition(". ")[0]
        raise RunFailed(f"ray: {reason}; look for memory and disk, and run again")


class Remote(tune.Trainable):
    """A trial as Ray sees it: every verb is asked of the process that has the run."""

    def setup(self, config: dict[str, Any]) -> None:
        """In a fresh actor."""
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """In the actor of an earlier trial."""
        drawn = dict(new_config)
        self._desk = drawn.pop("desk")
        self._ask("settle", drawn)
        return True

    def step(self) -> dict[str, Any]:
        """One interval."""
        score, done = self._ask("advance")
        return {SCORE: score, "done": done}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """The weights stay where they are."""
        return {"mark": self._ask("save")}

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As a scheduler resumes a trial, or copies one into another."""
        self._ask("load", checkpoint["mark"])

    def _ask(self, verb: str, *given: Any) -> Any:
        return _ask(self._desk, verb, self.trial_id, *given)


class Desk:
    """Where the trials' verbs are answered, one after another, in a thread of its own.

    It opens no port, and its folder is this user's alone. After the first exception of a job
    nothing is done any more; it is raised when the desk closes.
    """

    def __init__(self, jobs: Jobs, path: Path) -> None:
        self.path = str(path)
        self._jobs, self._raised = jobs, list[Exception]()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def over(self) -> bool:
        """Whether the trials can end."""
        return bool(self._raised) or self._jobs.over

    def __enter__(self) -> Self:
        self._listener = Listener(self.path, "AF_UNIX")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        _ask(self.path)
        self._thread.join()
        self._listener.close()
        if self._raised and (kind is None or issubclass(kind, Exception)):
            raise self._raised[0]

    def _serve(self) -> None:
        while True:
            with contextlib.suppress(EOFError, OSError), self._listener.accept() as line:
                message = line.recv()
                if not message:
                    return
                line.send(self._answer(*message))

    def _answer(self, verb: str, *given: Any) -> Any:
        if verb == "over":
            return self.over
        if not self._raised:
            try:
                return getattr(self._jobs, verb)(*given)
            except Exception as error:
                self._raised.append(error)
        return (0.0, True) if verb == "advance" else None


def _ask(path: str, *message: Any) -> Any:
    with Client(path, "AF_UNIX") as line:
        line.send(message)
        return line.recv() if message else None


class _Draws(BasicVariantGenerator):
    """Ray's random draws, of which none is the last while a trial is under way.

    After the last one, Ray would end an actor whenever all trials wait, and start another anew.
    """

    _drawing = _ended = False

    def next_trial(self) -> Any:
        self._drawing = True
        try:
            return super().next_trial()
        finally:
            self._drawing = False

    def set_finished(self) -> None:
        super().set_finished()
        self._ended = not self._drawing  # else it is only that all are drawn

    def is_finished(self) -> bool:
        return super().is_finished() and (self._ended or not self._live_trials)


# Ray pickles these two, so that they know the desk by its path.
class _Over(tune.Stopper):
    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(_ask(self._path, "over"))


class _Closing(tune.Callback):
    def __init__(self, path: str) -> None:
        self._path = path

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _ask(self._path, "close", trial.trial_id)


_folder: Path | None = None  # of the Ray that runs


@contextlib.contextmanager
def running() -> Iterator[Path]:
    """A Ray of this process's own, that prints nothing and leaves nothing behind -> its folder.

    It has one CPU and takes some seconds to start; a block inside another shares the outer one's.
    """
    global _folder
    if _folder is not None:
        yield _folder
        return
    if ray.is_initialized():
        raise BadInput("ray: it runs already in this process; call ray.shutdown() before")
    logger, signals = logging.getLogger("ray"), (signal.SIGTERM, signal.SIGUSR1)
    level, environment = logger.level, dict(os.environ)
    handlers = [signal.getsignal(number) for number in signals]
    # Sockets lie in it, whose paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="steersman-", dir="/tmp"))
    try:
        os.environ.update(QUIET)
        os.environ.setdefault("RAY_AUTH_TOKEN", _token())
        logger.setLevel(logging.CRITICAL + 1)
        ray.init(
            "local", num_cpus=1, num_gpus=0, object_store_memory=STORE, include_dashboard=False,
            log_to_driver=False, configure_logging=False, _temp_dir=str(folder),
        )  # fmt: skip
        _folder = folder
        yield folder
    finally:
        _folder = None
        ray.shutdown()
        logger.setLevel(level)
        os.environ.clear()
        os.environ.update(environment)
        if threading.current_thread() is threading.main_thread():
            for number, handler in zip(signals, handlers, strict=True):
                signal.signal(number, handler)
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _token() -> str:
    """Who has it may use this process's Rays; without one, Ray would write one to the home."""
    return secrets.token_hex(32)
