"""A task fine-tuned by transformers' Trainer with a policy at the tiller."""

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from envs import objectives, workload
from envs.errors import BadInput
from envs.files import full_disk, write_atomic
from envs.job import judge
from envs.knobs import Knobs, reference_rate
from envs.start import data_of
from envs.task import Task
from tuner import prepared
from tuner.app import Terminated
from tuner.callback import TunerCallback
from tuner.folder import read_json
from tuner.judge import Judge, best_check, read_model
from tuner.policy import Policy
from tuner.restarts import Ended, best_run, next_start, opening_rate
from tuner.settings import ApplyConfig

Tick = Callable[[int, int, str], None]
SEAL = "complete.json"  # written last into a checkpoint: the sizes of its files
CHECKPOINTS = 4  # in a run
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TokenDataset(Dataset[dict[str, Any]]):
    """Tokenised rows as the Trainer wants them."""

    def __init__(self, rows: workload.Tokens) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row: ids, mask and label."""
        rows = self._rows
        return {
            "input_ids": rows.ids[index],
            "attention_mask": rows.mask[index],
            "labels": int(rows.labels[index]),
        }


class Watch(TrainerCallback):
    """Shows progress, saves when a signal arrives, and seals each checkpoint when it is whole.

    Comes after the tuner's callback, whose files belong to the checkpoint.
    """

    def __init__(self, tick: Tick, words: str) -> None:
        self._tick, self._words = tick, words
        self.stopped: BaseException | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update is done."""
        self._tick(state.global_step, state.max_steps, self._words)
        if self.stopped is not None:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The first signal saves and stops at the next update; it is raised at the end."""

        def hear(number: int, frame: FrameType | None) -> None:
            if self.stopped is not None:
                raise self.stopped
            self.stopped = KeyboardInterrupt() if number == signal.SIGINT else Terminated()

        before = {number: signal.signal(number, hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopped is not None:
            raise self.stopped

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer does not save atomically: a checkpoint counts once this is written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
        write_atomic(folder / SEAL, json.dumps(sizes).encode())


@dataclass(frozen=True)
class Bench:
    """What every run of a job shares."""

    task: Task
    config: ApplyConfig
    tick: Tick

    @property
    def load(self) -> workload.Workload:
        """The data of a classification."""
        return workload.load(self.task)


def steer_trainer(policy: Policy, config: ApplyConfig, out: Path, tick: Tick) -> dict[str, Any]:
    """Fine-tune, steered. Writes ``steered/<job>/``.

    A classification resumes from the last whole checkpoint; a run of another objective, which has
    none, begins again.
    """
    torch.set_num_threads(config.threads)
    task, knobs = check(policy, config)
    job = Bench(task, config, tick)
    parts = [Path(part).stem for part in (task.dataset, task.model)] + [str(config.seed)]
    if task.objective != "classification":  # one dataset serves several
        parts.insert(0, task.objective)
    name = "-".join(parts)
    folder = out / "steered" / name
    summary_path = folder / "summary.json"
    identity = _identity(config, policy)
    identity_path = folder / "identity.json"
    known = _read(identity_path) if identity_path.is_file() else identity
    if {"data": identity["data"]} | known != identity:
        raise BadInput(
            f"{folder}: holds another steered run, or one of other data; choose another --out"
        )
    if summary_path.is_file():
        tick(task.steps, task.steps, "done before")
        return _read(summary_path)
    if task.objective != "classification":
        objectives.prepare(task, config.seed, knobs)
    write_atomic(identity_path, json.dumps(identity).encode())
    result: dict[str, Any] = {
        **identity,
        "task": task.name,
        "role": task.role,
        "seed": config.seed,
        "start_rate": knobs.rate,
        "mode": "advise" if config.advise else config.mode,
        "metric": objectives.CARDS[task.objective].metric,
        "folder": str(folder),
    }
    if config.keep:
        result["keep"] = _once(folder / "keep", lambda: _run(job, knobs, folder / "keep", None))
    steer = _best if config.trials > 1 else _steered
    result |= steer(job, knobs, folder, policy)
    write_atomic(summary_path, (json.dumps(result, indent=1) + "\n").encode())
    for weights in folder.glob(f"trial-*/{prepared.TRAINED}"):
        weights.unlink()
    return result


def check(policy: Policy, config: ApplyConfig) -> tuple[Task, Knobs]:
    """The job and its settings at the start. Raises `BadInput` for what cannot be steered."""
    task, rate = config.job(), config.rate
    if rate is None:
        size = workload.parameters(task.model)
        rate = reference_rate(size, "adamw", task.adapter, task.objective)
    scaled = any(name == "adapter_scale" for name, _ in policy.manifest.actions.turns)
    if scaled and config.trials > 1 and task.adapter == "lora":
        raise BadInput(
            f"apply: trials: {config.trials} with a policy that turns LoRA's scaling, of which "
            "weights kept on the way know nothing; leave it out"
        )
    data_of(task)
    return task, Knobs(rate=rate, shape=config.schedule)


def _identity(config: ApplyConfig, policy: Policy) -> dict[str, Any]:
    """What a folder's run is; without newer settings it is what it was before there were any.

    The data's hash is newer, too: a folder without it is taken as it is.
    """
    newer = {"trials": 1, "objective": None}
    unused = {name for name, value in newer.items() if getattr(config, name) == value}
    return {
        "config": config.model_dump(mode="json", exclude=unused),
        "sha256": policy.sha256,
        "data": data_of(config.job()).fingerprint,
    }


def _read(path: Path) -> dict[str, Any]:
    """A file that a run left behind."""
    if not (found := read_json(path)):
        raise BadInput(f"{path}: is damaged; delete {path.parent}, or choose another --out")
    return found


def _once(folder: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` gave, the first time it came to an end."""
    kept = folder / "result.json"
    if not kept.is_file():
        write_atomic(kept, json.dumps(make()).encode())
    return _read(kept)


def _best(job: Bench, knobs: Knobs, folder: Path, policy: Policy) -> dict[str, Any]:
    """The best of several steered runs by selection; test is read for that one alone."""
    trials: list[dict[str, Any]] = []
    ended: list[Ended] = []
    for number in range(1, job.config.trials + 1):
        start = next_start(ended, job.config.seed) if ended else knobs.rate
        words = f"trial {number} of {job.config.trials}"
        trial = _trial(job, replace(knobs, rate=start), folder / f"trial-{number}", policy, words)
        trials.append({"trial": number, "start_rate": start} | trial)
        score = trial["selection"]  # None of a run that diverged at once
        optimizer = trial.get("end_optimizer", knobs.optimizer)
        rate = opening_rate(trial["end_rate"], optimizer, knobs.optimizer)
        ended.append(Ended(-math.inf if score is None else score, rate))
    chosen = best_run(ended)
    origin = folder / f"trial-{chosen + 1}"
    with full_disk(folder):
        shutil.copytree(origin / "model", folder / "model", dirs_exist_ok=True)
    for name in ("audit.jsonl", "curve.jsonl"):
        if (origin / name).is_file():
            write_atomic(folder / name, (origin / name).read_bytes())
    start_losses = [trial.pop("start") for trial in trials]
    return {
        "trials": trials,
        "chosen": chosen + 1,
        "start": start_losses[chosen],
        "final": {
            "validation_loss": trials[chosen]["validation_loss"],
            **_tested(job, knobs, origin),
        },
        "seconds": round(sum(trial["seconds"] for trial in trials), 1),
    }


def _tested(job: Bench, knobs: Knobs, folder: Path) -> dict[str, Any]:
    """What the model of a trial is worth on test."""
    if job.task.objective != "classification":
        return prepared.judge(job.task, job.config, knobs, folder)
    module = read_model(job.load.module(job.config.seed), folder / "model")
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    return {"test": judge(module, job.load.rows["test"]).metric}


def _trial(job: Bench, knobs: Knobs, folder: Path, policy: Policy, words: str) -> dict[str, Any]:
    """One of several steered runs, or what it came to before."""

    def make() -> dict[str, Any]:
        run = _steered(job, knobs, folder, policy, words, judged=True)
        best = run["best"] or {"step": 0, "selection": None, "selection_loss": None}
        rate, optimizer = _in_force(folder / "audit.jsonl", best["step"], knobs)
        return {
            "start_rate": knobs.rate,
            "end_rate": rate,
            "end_optimizer": optimizer,
            **best,
            "start": run["start"],
            **run["final"],
            "seconds": run["seconds"],
        }

    return _once(folder, make)


def _steered(
    job: Bench,
    knobs: Knobs,
    folder: Path,
    policy: Policy,
    words: str = "steered",
    judged: bool = False,
) -> dict[str, Any]:
    """A steered run; its curve, with the rate in force, goes to a file."""
    steered = _run(job, knobs, folder, policy, words, judged)
    for row in steered["curve"]:
        row["rate"], _ = _in_force(folder / "audit.jsonl", row["step"], knobs)
    lines = "".join(json.dumps(row) + "\n" for row in steered.pop("curve"))
    write_atomic(folder / "curve.jsonl", lines.encode())
    return steered


def _run(
    job: Bench,
    knobs: Knobs,
    folder: Path,
    policy: Policy | None,
    words: str = "unsteered",
    judged: bool = False,
) -> dict[str, Any]:
    """One Trainer run, steered if there is a policy -> its ``model/`` and what it came to.

    The model is the last one, and judged on the test split; or, where trials are to be
    ``judged`` against each other, the best checkpoint on the selection split.
    """
    if job.task.objective != "classification":
        watch = Watch(job.tick, words)
        return prepared.run(job.task, job.config, knobs, folder, policy, watch, judged)
    began = time.perf_counter()
    task, config, rows = job.task, job.config, job.load.rows
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=task.steps,
        per_device_train_batch_size=task.batch,
        per_device_eval_batch_size=64,
        learning_rate=knobs.rate,
        lr_scheduler_type=knobs.shape,
        seed=config.seed,
        logging_steps=task.interval,
        save_steps=max(1, task.steps // CHECKPOINTS),
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=job.load.module(config.seed),
        args=arguments,
        train_dataset=TokenDataset(rows["train"]),
        eval_dataset=TokenDataset(rows["validation"]),
    )
    trainer.remove_callback(PrinterCallback)
    start = trainer.evaluate()["eval_loss"]
    if policy is not None:
        trainer.add_callback(
            TunerCallback(
                policy,
                mode=config.mode,
                advise=config.advise,
                eval_dataset=trainer.eval_dataset,
                classes=len(job.load.classes),
                log=folder / "audit.jsonl",
            )
        )
    if judged:
        trainer.add_callback(Judge(rows["selection"]))
    watch = Watch(job.tick, words)
    trainer.add_callback(watch)
    with watch.listening(), full_disk(folder):
        trainer.train(resume_from_checkpoint=_last_whole(folder / "checkpoints", task.steps))
    best = best_check(trainer.state.log_history) if judged else None
    if best:
        read_model(trainer.model, folder / "checkpoints" / f"checkpoint-{best['step']}")
    final = {"validation_loss": trainer.evaluate()["eval_loss"]}
    if not judged:
        final["test"] = _accuracy(trainer, rows["test"])
    with full_disk(folder):
        trainer.save_model(str(folder / "model"))
    curve = [
        {"step": row["step"], "train_loss": row["loss"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    result = {
        "start": {"validation_loss": start},
        "final": final,
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 1),
    }
    return result | ({"best": best} if judged else {})


def _in_force(audit: Path, step: int, knobs: Knobs) -> tuple[float, str]:
    """The peak rate and the optimizer in force at the update that ended at ``step``."""
    rate, optimizer = knobs.rate, str(knobs.optimizer)
    if audit.is_file():
        for line in audit.read_text().splitlines():
            decision = json.loads(line)
            if decision["step"] < step:
                rate = float(decision["applied"]["rate"])
                optimizer = decision["applied"]["optimizer"] or optimizer
    return rate, optimizer


def _accuracy(trainer: Trainer, rows: workload.Tokens) -> float:
    predictions = trainer.predict(TokenDataset(rows)).predictions
    logits = predictions["logits"] if isinstance(predictions, Mapping) else predictions
    return float((logits.argmax(-1) == rows.labels.numpy()).mean())


def _last_whole(folder: Path, steps: int) -> str | None:
    """The newest checkpoint, short of the end, whose files have the size they were sealed with.

    Not one at the end: the Trainer would make one update more than ``max_steps`` from there.
    """
    found = {int(path.name.partition("-")[2]): path for path in folder.glob("checkpoint-*")}
    for step, path in sorted(found.items(), reverse=True):
        if step >= steps:
            continue
        try:
            sizes = json.loads((path / SEAL).read_text())
            if all((path / name).stat().st_size == size for name, size in sizes.items()):
                return str(path)
        except (OSError, ValueError):
            continue
    return None
