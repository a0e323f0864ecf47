"""Setups: what every ready Trainer shares, from its arguments to padded batches."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from envs import workload
from envs.chance import every, put_back
from envs.errors import BadInput
from envs.job import spread
from envs.knobs import Knobs
from envs.optim import ALPHA, MOMENTUM
from envs.task import Split, Task

Batch = dict[str, Tensor]
IGNORED = -100  # a label that no loss counts
AT_ONCE = 64  # rows in one forward pass of a score
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
_OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd", "rmsprop": "rmsprop"}
_CONSTANTS = {"sgd": f"momentum={MOMENTUM}", "rmsprop": f"alpha={ALPHA}"}


def arguments(task: Task, seed: int, knobs: Knobs, **more: Any) -> dict[str, Any]:
    """Keyword arguments for ``TrainingArguments`` and every TRL configuration.

    The run that the native job would make: one device's batch is the task's, float32, nothing is
    logged, evaluated or saved. more: overrides.
    """
    from transformers import TrainingArguments

    order, _, noise = spread(seed, 3)
    cuda = torch.cuda.is_available()
    names = ("activation_checkpointing", "gradient_checkpointing")  # the later name, the earlier
    checkpointing = next(n for n in names if n in TrainingArguments.__dataclass_fields__)
    return {
        "output_dir": str(Path(tempfile.gettempdir()) / "steersman-unused"),  # stays empty
        "learning_rate": knobs.rate,
        "lr_scheduler_type": _SCHEDULES[knobs.shape],
        "warmup_steps": round(knobs.warmup * task.steps),
        "optim": _OPTIMIZERS[knobs.optimizer],
        "optim_args": _CONSTANTS.get(knobs.optimizer),
        "weight_decay": knobs.weight_decay,
        "max_grad_norm": knobs.clip,
        "max_steps": task.steps,
        "per_device_train_batch_size": task.batch,
        "per_device_eval_batch_size": AT_ONCE,
        "gradient_accumulation_steps": 1,
        checkpointing: False,  # TRL's default is True
        "bf16": False,  # likewise
        "fp16": False,
        "seed": noise,
        "data_seed": order,
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "use_cpu": not cuda,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": cuda,
        "dataloader_drop_last": True,
        "average_tokens_across_devices": False,
        **more,
    }


def initial_seed(seed: int) -> int:
    """The part of a seed that draws new weights."""
    return spread(seed, 3)[1]


@contextmanager
def quiet(seed: int) -> Iterator[None]:
    """Libraries without progress bars, and with random states that are not the caller's.

    Building a Trainer seeds Python's, NumPy's and torch's global generators.
    """
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with put_back(every()):
            torch.manual_seed(seed)
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def silent(trainer: Any) -> Any:
    """The Trainer without the callback that prints its logs."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def model_of(
    task: Task, seed: int, factory: Any, new: Sequence[str] = (), **options: Any
) -> nn.Module:
    """A pretrained model with the parts its files lack, trainable as the task asks.

    new: names of parts that are drawn anew, which an adapter must not freeze.
    """
    with workload.seeded(initial_seed(seed)), _hushed():
        model: nn.Module = workload.pretrained(factory, task.model, dtype=torch.float32, **options)
        return trainable(model, task, new)


def decoder_of(task: Task, seed: int) -> nn.Module:
    """A pretrained causal language model; `BadInput` on one that reads what comes after a token."""
    from transformers import AutoModelForCausalLM

    model = model_of(task, seed, AutoModelForCausalLM)
    with judging(model) as device:
        one, other = model(input_ids=torch.tensor([[1, 1], [1, 2]], device=device)).logits[:, 0]
    if not torch.allclose(one, other, atol=1e-5):
        raise BadInput(f"{task.model}: model: not a decoder; give a causal language model")
    return model


@contextmanager
def _hushed() -> Iterator[None]:
    """Without the report of the parts that were drawn anew: here they are meant to be."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def trainable(model: Any, task: Task, new: Sequence[str] = ()) -> nn.Module:
    """The model with the task's adapter, frozen layers and dropout."""
    if task.adapter == "lora":
        model = workload.with_lora(model, new)
    elif task.trainable_layers is not None:
        workload.freeze_below(model.base_model, task.trainable_layers)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = task.dropout
    return model


def tokenizer_of(task: Task) -> Any:
    """The model's tokenizer; `BadInput` without a pad token, or with too few positions."""
    tokenizer = workload.load_tokenizer(task.model)
    if tokenizer.pad_token_id is None:
        raise BadInput(f"{task.model}: tokenizer: no pad token; set tokenizer.pad_token, save it")
    if task.max_length > tokenizer.model_max_length:
        raise BadInput(
            f"{task.model}: max_length: {task.max_length} is longer than the "
            f"{tokenizer.model_max_length} positions of the model; lower it"
        )
    return tokenizer


def coded(tokenizer: Any, texts: Sequence[str], length: int, **options: Any) -> list[list[int]]:
    """Token ids of each text, at most ``length``."""
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=length, **options)[
        "input_ids"
    ]
    return ids


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Lists of whole numbers -> (rows, longest) int64, padded on the right."""
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value
    )


def collator(pad: int) -> Callable[[Sequence[dict[str, Any]]], Batch]:
    """Examples with ``input_ids`` and ``labels`` -> a padded batch with its mask.

    Labels that are lists are padded by `IGNORED`; labels that are numbers are stacked.
    """

    def collate(rows: Sequence[dict[str, Any]]) -> Batch:
        ids = [row["input_ids"] for row in rows]
        labels = [row["labels"] for row in rows]
        many = isinstance(labels[0], list)
        return {
            "input_ids": padded(ids, pad),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded(labels, IGNORED) if many else torch.tensor(labels),
        }

    return collate


def batches(
    rows: dict[Split, list[dict[str, Any]]], collate: Callable[[Sequence[dict[str, Any]]], Batch]
) -> dict[Split, list[Batch]]:
    """Every split in padded batches, ready to be judged."""
    return {
        split: [collate(part[at : at + AT_ONCE]) for at in range(0, len(part), AT_ONCE)]
        for split, part in rows.items()
    }


@contextmanager
def judging(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; gives the model's device."""
    model.eval()
    with torch.inference_mode():
        yield next(model.parameters()).device


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


def table(rows: list[dict[str, Any]]) -> Any:
    """Rows as the `datasets.Dataset` that TRL's Trainers want."""
    from datasets import Dataset

    return Dataset.from_list(rows)


def token_nats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (rows, length, vocabulary), labels (rows, length) -> nats, hits, tokens; sums.

    The labels are those of the same positions, `IGNORED` where nothing is to be predicted.
    """
    nats = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    counted = labels != IGNORED
    return nats, ((logits.argmax(-1) == labels) & counted).sum(), counted.sum()
