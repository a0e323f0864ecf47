"""A task fine-tuned by transformers' Trainer with a policy at the tiller."""

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from envs import workload
from envs.errors import BadInput, RunFailed
from envs.files import write_atomic
from envs.knobs import Knobs, reference_rate
from envs.task import Task
from tuner.app import Terminated
from tuner.callback import TunerCallback
from tuner.policy import Policy
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


def steer_trainer(policy: Policy, config: ApplyConfig, out: Path, tick: Tick) -> dict[str, Any]:
    """Fine-tune, steered; resumes from the last whole checkpoint. Writes ``steered/<job>/``."""
    torch.set_num_threads(config.threads)
    task = config.job()
    load = workload.load(task)
    rate = config.rate
    if rate is None:
        rate = reference_rate(workload.parameters(task.model), "adamw", task.adapter)
    knobs = Knobs(rate=rate, shape=config.schedule)
    name = "-".join(Path(part).stem for part in (task.dataset, task.model)) + f"-{config.seed}"
    folder = out / "steered" / name
    summary_path = folder / "summary.json"
    identity = {"config": config.model_dump(mode="json"), "sha256": policy.sha256}
    identity_path = folder / "identity.json"
    if identity_path.is_file() and json.loads(identity_path.read_text()) != identity:
        raise BadInput(f"{folder}: holds another steered run; choose another --out")
    if summary_path.is_file():
        tick(task.steps, task.steps, "done before")
        done: dict[str, Any] = json.loads(summary_path.read_text())
        return done
    write_atomic(identity_path, json.dumps(identity).encode())
    result: dict[str, Any] = {
        **identity,
        "task": task.name,
        "role": task.role,
        "seed": config.seed,
        "start_rate": knobs.rate,
        "mode": "advise" if config.advise else config.mode,
        "folder": str(folder),
    }
    if config.keep:
        kept = folder / "keep" / "result.json"
        if not kept.is_file():
            unsteered = _run(task, load, knobs, config, folder / "keep", None, tick)
            write_atomic(kept, json.dumps(unsteered).encode())
        result["keep"] = json.loads(kept.read_text())
    steered = _run(task, load, knobs, config, folder, policy, tick)
    for row in steered["curve"]:
        row["rate"] = _peak(folder / "audit.jsonl", row["step"], knobs.rate)
    lines = "".join(json.dumps(row) + "\n" for row in steered.pop("curve"))
    write_atomic(folder / "curve.jsonl", lines.encode())
    result |= steered
    write_atomic(summary_path, (json.dumps(result, indent=1) + "\n").encode())
    return result


def _run(
    task: Task,
    load: workload.Workload,
    knobs: Knobs,
    config: ApplyConfig,
    folder: Path,
    policy: Policy | None,
    tick: Tick,
) -> dict[str, Any]:
    """One Trainer run, steered if there is a policy; judged on the test split at its end."""
    began = time.perf_counter()
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
        model=load.module(config.seed),
        args=arguments,
        train_dataset=TokenDataset(load.rows["train"]),
        eval_dataset=TokenDataset(load.rows["validation"]),
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
                classes=len(load.classes),
                log=folder / "audit.jsonl",
            )
        )
    watch = Watch(tick, "steered" if policy else "unsteered")
    trainer.add_callback(watch)
    with watch.listening(), full_disk(folder):
        trainer.train(resume_from_checkpoint=_last_whole(folder / "checkpoints", task.steps))
    final = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "model"))
    curve = [
        {"step": row["step"], "train_loss": row["loss"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    return {
        "start": {"validation_loss": start},
        "final": {"validation_loss": final, "test": _accuracy(trainer, load.rows["test"])},
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _peak(audit: Path, step: int, rate: float) -> float:
    """The peak rate in force at the update that ended at ``step``."""
    if audit.is_file():
        for line in audit.read_text().splitlines():
            decision = json.loads(line)
            if decision["step"] < step:
                rate = float(decision["applied"]["rate"])
    return rate


def _accuracy(trainer: Trainer, rows: workload.Tokens) -> float:
    predictions = trainer.predict(TokenDataset(rows)).predictions
    logits = predictions["logits"] if isinstance(predictions, Mapping) else predictions
    return float((logits.argmax(-1) == rows.labels.numpy()).mean())


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A disk that refuses a checkpoint is a failure at run time, in one line."""
    try:
        yield
    except (RuntimeError, SafetensorError, OSError) as error:
        if "space" in str(error).lower() or "write" in str(error).lower():
            reason = str(error).splitlines()[0][:200]
            raise RunFailed(f"{folder}: a checkpoint cannot be written: {reason}") from error
        raise


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
