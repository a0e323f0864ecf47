"""Workload: a task turned into a model and tensors."""

import copy
import functools
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from envs import catalog
from envs.errors import BadInput
from envs.own_data import load_user
from envs.rows import Rows
from envs.task import SPLITS, Pooling, Split, Task

CAP = 8000  # rows of a split that are tokenised at most


PREFIX = "encoder"  # the pretrained part's name, where transformers' models name theirs


class Classifier(nn.Module):
    """An encoder, the mean or the first of its token states, and a linear head.

    A sentence encoder is trained for the mean; its own pooler is not trained for classification.
    The signature is the one that transformers' ``Trainer`` calls.
    """

    base_model_prefix = PREFIX

    def __init__(self, encoder: nn.Module, head: nn.Linear, pooling: Pooling = "mean") -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.pooling = pooling

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """input_ids, attention_mask: (batch, length); labels: (batch,) -> loss and logits."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        logits = self.head(pool(states, attention_mask, self.pooling))
        if labels is None:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """(batch, length, width) states, (batch, length) mask -> (batch, width), of real tokens."""
    if pooling == "first":
        return states[:, 0]
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-6)


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows of one split: (rows, length) ids and mask, (rows,) labels and lengths.

    source: (rows,) their numbers among the ``texts`` texts of the dataset's split.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    source: np.ndarray[Any, np.dtype[np.int64]]
    texts: int

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Workload:
    """What a job needs of a task: its rows by split, and how to make its model."""

    task: Task
    classes: tuple[str, ...]
    rows: dict[Split, Tokens]
    fingerprint: str

    @property
    def width(self) -> int:
        """Of the encoder's states."""
        return int(_encoder(self.task.model).config.hidden_size)

    def module(self, seed: int) -> Classifier:
        """The pretrained encoder with a new head; trainable parts as the task asks.

        seed: draws the head and the adapter, and nothing else; torch's own state is untouched.
        """
        task = self.task
        with seeded(seed):
            encoder = backbone(task)
            module = Classifier(encoder, _new_head(self), task.pooling)
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = task.dropout
        return module

    def drawn(self, seed: int) -> dict[str, Tensor]:
        """The trained weights of `module` that depend on the seed, by name."""
        if self.task.adapter == "lora":
            named = self.module(seed).named_parameters()
            return {name: p.detach() for name, p in named if p.requires_grad}
        weight = _head_weight(self, torch.Generator().manual_seed(seed))
        return {"head.weight": weight, "head.bias": torch.zeros(len(weight))}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's own generator starts from the seed inside, and is what it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def backbone(task: Task) -> Any:
    """A copy of the task's encoder, trainable as the task asks; adapters draw random numbers."""
    encoder = copy.deepcopy(_encoder(task.model))
    if task.adapter == "lora":
        return with_lora(encoder)
    if task.trainable_layers is not None:
        freeze_below(encoder, task.trainable_layers)
    return encoder


def _new_head(load: Workload) -> nn.Linear:
    head: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, load.width, len(load.classes)
    )
    with torch.no_grad():
        head.weight.copy_(_head_weight(load, torch.default_generator))
        head.bias.zero_()
    return head


def _head_weight(load: Workload, generator: torch.Generator) -> Tensor:
    """The draws of ``nn.Linear`` come first, or a seed would not mean the head that it did."""
    shape = (len(load.classes), load.width)
    torch.empty(shape).uniform_(generator=generator)
    torch.empty(shape[0]).uniform_(generator=generator)
    return torch.empty(shape).normal_(std=0.02, generator=generator)


@functools.lru_cache(maxsize=64)
def load(task: Task) -> Workload:
    """Read, check, tokenise and cut the task's data. Raises `BadInput` before any training."""
    splits = _splits(task.dataset, task.text, task.label)
    every = splits["train"].classes
    wanted = task.classes or every
    for name in wanted:
        if name not in every:
            raise BadInput(f"{task.dataset}: classes: no class {name!r}; it has {', '.join(every)}")
    tokens = _tokens(task.dataset, task.model, task.max_length, task.text, task.label)
    caps = {
        "train": task.rows,
        "validation": task.validation_rows,
        "selection": task.selection_rows,
        "test": task.test_rows,
    }
    place = np.full(len(every), -1, dtype=np.int64)
    for index, name in enumerate(wanted):
        place[every.index(name)] = index
    rows: dict[Split, Tokens] = {}
    for split in SPLITS:
        ids, mask, labels = tokens[split]
        moved = place[labels]
        keep = np.flatnonzero(moved >= 0)[: caps[split]]
        if not len(keep):
            raise BadInput(
                f"{task.dataset}: {split}: no rows of {', '.join(wanted)}; give data for this split"
            )
        moved = moved[keep]
        if split == "train":
            if len(keep) < task.batch:
                raise BadInput(
                    f"{task.dataset}: batch: {task.batch} is larger than the {len(keep)} "
                    "training rows; lower batch"
                )
            if len(np.unique(moved)) < 2:
                raise BadInput(
                    f"{task.dataset}: {task.label}: the training rows have one class; "
                    "nothing can be learned from them"
                )
            moved = _noisy(moved, len(wanted), task.noise)
        lengths = mask[keep].sum(1)
        rows[split] = Tokens(
            torch.from_numpy(ids[keep]),
            torch.from_numpy(mask[keep]),
            torch.from_numpy(moved),
            lengths,
            keep,
            len(ids),
        )
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(rows[split].ids.numpy().tobytes() + rows[split].labels.numpy().tobytes())
    return Workload(task, tuple(wanted), rows, digest.hexdigest())


@functools.lru_cache(maxsize=16)
def _splits(dataset: str, text: str, label: str) -> dict[str, Rows]:
    if dataset in catalog.CORPORA:
        return catalog.load(dataset)
    return load_user(dataset, text=text, label=label)


def _noisy(labels: np.ndarray, classes: int, share: float) -> np.ndarray:
    """Replace a fixed share of labels by another class; the same rows for the same share."""
    rng = np.random.default_rng(len(labels))
    flip = rng.random(len(labels)) < share
    return np.where(flip, (labels + rng.integers(1, classes, len(labels))) % classes, labels)


@functools.lru_cache(maxsize=16)
def _tokens(
    dataset: str, model: str, length: int, text: str, label: str
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per split: (rows, length) int64 ids and mask, and the labels, of at most CAP rows."""
    tokenizer = load_tokenizer(model)
    if tokenizer.pad_token_id is None:
        raise BadInput(f"{model}: tokenizer: no pad token; set tokenizer.pad_token and save it")
    config = _encoder(model).config
    places = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", length))
    if length > places:
        raise BadInput(
            f"{model}: max_length: {length} is longer than the {places} positions of the model; "
            "lower it"
        )
    if len(tokenizer) > config.vocab_size:
        raise BadInput(
            f"{model}: tokenizer: {len(tokenizer)} tokens, the model knows {config.vocab_size}; "
            "save the model with its own tokenizer"
        )
    result = {}
    for split, rows in _splits(dataset, text, label).items():
        texts = list(rows.texts[:CAP])
        if not texts:
            raise BadInput(f"{dataset}: {split}: no rows; give data for this split")
        with ThreadPoolExecutor(1) as thread:  # its heap, and not the packs', keeps what it leaves
            coded = thread.submit(
                tokenizer,
                texts,
                padding="max_length",
                padding_side="right",
                truncation=True,
                max_length=length,
                return_tensors="np",
            ).result()
        mask = coded["attention_mask"].astype(np.int64)
        if not mask.any(1).all():
            raise BadInput(f"{dataset}: {text}: a text without any token; drop empty texts")
        result[split] = (coded["input_ids"].astype(np.int64), mask, rows.labels[:CAP])
    return result


def parameters(model: str) -> int:
    """How many weights a model's encoder has."""
    return sum(p.numel() for p in _encoder(model).parameters())


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a shipped model, a local directory or a hub id."""
    from transformers import AutoTokenizer

    return pretrained(AutoTokenizer, model)


@functools.lru_cache(maxsize=4)
def _encoder(model: str) -> Any:
    from transformers import AutoModel

    with seeded(0):  # weights that the files lack are drawn
        encoder = pretrained(AutoModel, model, dtype=torch.float32)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # not used; its weights would get no gradient
    return encoder


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bar, which lasts no time for what is loaded here."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def pretrained(factory: Any, model: str, **options: Any) -> Any:
    """``factory.from_pretrained`` of a shipped model, a local directory or a hub id."""
    path = catalog.model_path(model)
    local = Path(path).is_dir()
    try:
        with _quietly():
            return factory.from_pretrained(path, local_files_only=local, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise BadInput(
            f"{model}: not a model that transformers can load: {reason}; "
            "give a transformers directory or a hub id"
        ) from error


def with_lora(model: nn.Module, new: Sequence[str] = ()) -> nn.Module:
    """LoRA on the query and value projections; only the parts named in ``new`` train beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    names = {name.rsplit(".", 1)[-1] for name, part in model.named_modules()
             if isinstance(part, nn.Linear | Conv1D)}  # fmt: skip
    for targets in ({"query", "value"}, {"q_proj", "v_proj"}, {"q_lin", "v_lin"}, {"q", "v"},
                    {"c_attn"}):  # fmt: skip
        if targets <= names:
            config = LoraConfig(
                r=8,
                lora_alpha=16,
                target_modules=targets,
                fan_in_fan_out="c_attn" in targets,  # of a Conv1D: GPT-2's, query, key and value
                modules_to_save=list(new) or None,
            )
            return get_peft_model(model, config)
    raise BadInput(f"adapter: no query and value projections among {sorted(names)}; use 'full'")


def layers_of(encoder: nn.Module) -> nn.ModuleList | None:
    """The stack of an encoder's layers, lowest first."""
    return next((p for p in encoder.modules() if isinstance(p, nn.ModuleList)), None)


def freeze_below(encoder: nn.Module, layers: int) -> None:
    """Leave only the uppermost layers trainable; the embeddings are frozen too."""
    stack = layers_of(encoder)
    if stack is None or layers > len(stack):
        count = len(stack) if stack is not None else 0
        raise BadInput(f"task: trainable_layers: {layers} of a model with {count} layers")
    encoder.requires_grad_(False)
    for layer in list(stack)[len(stack) - layers :]:
        layer.requires_grad_(True)
