"""A task fine-tuned by transformers' Trainer with a policy at the tiller."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from envs import workload
from envs.errors import BadInput
from envs.files import write_atomic
from envs.knobs import Knobs, reference_rate
from envs.task import Task
from tuner.callback import TunerCallback
from tuner.policy import Policy
from tuner.settings import ApplyConfig

Tick = Callable[[int, int, str], None]
SEAL = "complete.json"  # written last into a checkpoint: the sizes of its files
CHECKPOINTS = 4  # in a run


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
    """Shows progress, keeps the loss curve, and seals each checkpoint when it is whole."""

    def __init__(self, tick: Tick, words: str) -> None:
        self._tick, self._words = tick, words

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update is done."""
        self._tick(state.global_step, state.max_steps, self._words)

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
    if summary_path.is_file():
        done: dict[str, Any] = json.loads(summary_path.read_text())
        if {key: done.get(key) for key in identity} == identity:
            tick(task.steps, task.steps, "done before")
            return done
        raise BadInput(f"{folder}: holds another steered run; choose another --out")
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
        result["keep"] = _run(task, load, knobs, config, folder / "keep", None, tick)
    steered = _run(task, load, knobs, config, folder, policy, tick)
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
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch(tick, "steered" if policy else "unsteered"))
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
    trainer.train(resume_from_checkpoint=_last_whole(folder / "checkpoints"))
    final = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "model"))
    curve = [
        {"step": row["step"], "rate": row["learning_rate"], "train_loss": row["loss"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    return {
        "start": {"validation_loss": start},
        "final": {"validation_loss": final, "test": _accuracy(trainer, load.rows["test"])},
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _accuracy(trainer: Trainer, rows: workload.Tokens) -> float:
    predictions = trainer.predict(TokenDataset(rows)).predictions
    logits = predictions["logits"] if isinstance(predictions, Mapping) else predictions
    return float((logits.argmax(-1) == rows.labels.numpy()).mean())


def _last_whole(folder: Path) -> str | None:
    """The newest checkpoint whose files all have the size they were sealed with."""
    found = sorted(
        folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True
    )
    for path in found:
        try:
            sizes = json.loads((path / SEAL).read_text())
            if all((path / name).stat().st_size == size for name, size in sizes.items()):
                return str(path)
        except (OSError, ValueError):
            continue
    return None
