"""Tasks: what is fine-tuned, on which data, for how many steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import PurePath
from typing import Any, Literal, get_args

import numpy as np

from envs.catalog import CORPORA, ENCODERS
from envs.errors import BadInput, UnknownName, lookup

Ready = Literal[
    "classification", "regression", "tokens", "causal", "translation", "headlines", "reward", "dpo",
    "kto", "sft", "grpo",
]  # fmt: skip
Objective = Literal[Ready, "own"]
Adapter = Literal["full", "lora"]
Pooling = Literal["mean", "first"]
Split = Literal["train", "validation", "selection", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Task:
    """One fine-tuning job, apart from its knobs and its seed. Checked when it is made.

    Sizes are counts of rows; ``steps`` are optimizer updates; ``interval`` is the number of
    updates between two decisions; ``noise`` is the share of training labels replaced by a
    random other class.
    """

    dataset: str  # a shipped corpus, a CSV or JSONL file, a saved or hub dataset
    model: str = "tiny-32"  # a shipped model, a local directory or a hub id
    objective: Objective = "classification"
    text: str = "text"  # column of the text, for data of one's own
    label: str = "label"  # column of the label, likewise
    classes: tuple[str, ...] | None = None  # a subset of the classes; None takes all
    rows: int = 1000
    noise: float = 0.0
    batch: int = 16
    steps: int = 100
    interval: int = 10
    max_length: int = 24
    adapter: Adapter = "full"
    trainable_layers: int | None = None  # the uppermost encoder layers; None trains all
    dropout: float = 0.0
    pooling: Pooling = "mean"  # what the head reads: the mean of all tokens, or the first one
    validation_rows: int = 128  # for observation and reward
    selection_rows: int = 256  # for choosing among checkpoints and trials
    test_rows: int = 1000  # read once, by the referee

    def __post_init__(self) -> None:
        for name in ("dataset", "model", "text", "label"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise BadInput(f"task: {name}: {value!r} is not a name; give a string")
        for name in ("rows", "batch", "steps", "interval", "max_length", "validation_rows",
                     "selection_rows", "test_rows"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInput(f"task: {name}: {value!r} is not a count; give a whole number >= 1")
        if self.batch > self.rows:
            raise BadInput(
                f"task: batch: {self.batch} is larger than the {self.rows} training rows; "
                "lower batch or raise rows"
            )
        if self.interval > self.steps:
            raise BadInput(
                f"task: interval: {self.interval} is longer than the {self.steps} steps; lower it"
            )
        for name, top in (("noise", 0.9), ("dropout", 0.9)):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value <= top):
                raise BadInput(f"task: {name}: {value!r} is not a share; give 0 to {top}")
        if self.objective not in get_args(Objective):
            raise UnknownName("objective", self.objective, get_args(Objective))
        if self.adapter not in get_args(Adapter):
            raise UnknownName("adapter", self.adapter, get_args(Adapter))
        if self.pooling not in get_args(Pooling):
            raise UnknownName("pooling", self.pooling, get_args(Pooling))
        if self.classes is not None:
            given: Any = self.classes
            if isinstance(given, list):  # from a configuration file
                object.__setattr__(self, "classes", tuple(given))
            if not isinstance(given, list | tuple) or {type(name) for name in given} - {str}:
                raise BadInput(
                    f"task: classes: {self.classes!r} are not names; give a list of class names"
                )
            if len(set(self.classes)) < max(2, len(self.classes)):
                raise BadInput(
                    f"task: classes: {self.classes!r} is one class or repeats one; "
                    "name at least two, each once"
                )
        layers = self.trainable_layers
        if layers is not None:
            if not isinstance(layers, int) or isinstance(layers, bool) or layers < 0:
                raise BadInput(
                    f"task: trainable_layers: {layers!r} is not a count; "
                    "give a whole number >= 0, or None for all"
                )
            if self.adapter != "full":
                raise BadInput(
                    f"task: trainable_layers: {layers!r} has no meaning with an adapter, "
                    "which freezes every layer; give one of the two"
                )

    @property
    def decisions(self) -> int:
        """Decisions in a whole run: the first before any update, then one per interval."""
        return math.ceil(self.steps / self.interval)

    @property
    def role(self) -> str:
        """``train``, ``choose`` or ``held-out`` for a shipped corpus; ``own`` for other data."""
        return CORPORA[self.dataset].role if self.dataset in CORPORA else "own"

    @property
    def name(self) -> str:
        """``dataset/model``, the short name of a table or a plot; of paths the last part.

        With the objective, where it is not classification: one dataset serves several.
        """
        kind = "" if self.objective == "classification" else f":{self.objective}"
        return f"{PurePath(self.dataset).name}{kind}/{PurePath(self.model).name}"


_MINILM: dict[str, Any] = {
    "batch": 16,
    "max_length": 32,
    "steps": 60,
    "interval": 6,
    "rows": 500,
    "dropout": 0.1,
}

TASKS: dict[str, Task] = {corpus: Task(dataset=corpus) for corpus in CORPORA} | {
    f"{corpus}/{model}": Task(
        dataset=corpus, model=model, **(_MINILM if model == "minilm-l6" else {})
    )
    for corpus in CORPORA
    for model in ENCODERS
}
"""Shipped tasks: ``trec6`` is ``trec6/tiny-32``; a name with a model picks another encoder."""

_SMALL: dict[str, Any] = {
    "rows": 1000, "steps": 60, "interval": 6, "max_length": 32, "selection_rows": 128,
    "test_rows": 256,
}  # fmt: skip
_LONG = _SMALL | {"rows": 2000, "batch": 32, "steps": 100, "interval": 10}
_WRITTEN = {"steps": 40, "interval": 4, "max_length": 24, "validation_rows": 64}
_PAIRED = {"rows": 2000, "max_length": 48, "test_rows": 1000}  # a share has 1.6 % of error
_DECODER = "tiny-gpt-32"

OBJECTIVE_TASKS: dict[str, Task] = {
    "ratings": Task("ratings", "tiny-32", "regression", **_LONG),
    # Bytes, for the encoders know no Chinese: several tokens a word.
    "tags": Task("tagged", _DECODER, "tokens", **_SMALL | {"max_length": 96}),
    "dialogue-lm": Task("dialogue", _DECODER, "causal", **_SMALL),
    "verses": Task("verses", "tiny-32", "translation", **_SMALL),
    "headlines": Task("articles", "tiny-32", "headlines", **_SMALL),
    "reward": Task("pairs", "tiny-32", "reward", **_LONG | {"test_rows": 1000}),
    "dpo": Task("pairs", _DECODER, "dpo", **_SMALL | _PAIRED),
    "kto": Task("pairs", _DECODER, "kto", **_SMALL | _PAIRED),
    "sft": Task("dialogue", _DECODER, "sft", **_SMALL),
    "grpo": Task("dialogue", _DECODER, "grpo", **_SMALL | _WRITTEN),
}
"""Shipped tasks of the other objectives, by name: see `envs.objectives`."""


def find(name: "str | Task | Mapping[str, Any]", **changes: Any) -> Task:
    """A task with some fields changed: a shipped one by name, a `Task`, or its fields."""
    known = {field.name for field in fields(Task)}
    for key in [*changes, *(name if isinstance(name, Mapping) else ())]:
        if key not in known:
            raise UnknownName("task field", key, known)
    if isinstance(name, Mapping):
        if "dataset" not in name:
            raise BadInput("task: dataset: missing; name a corpus, a file or a dataset")
        return Task(**{**name, **changes})
    task = name if isinstance(name, Task) else lookup(TASKS | OBJECTIVE_TASKS, name, "task")
    return replace(task, **changes)


def vary(task: Task, classes: tuple[str, ...], rng: np.random.Generator) -> Task:
    """A random relative of a task: class subset, rows and label noise; of a Trainer's, rows.

    classes: those to choose from; the task's own, if it names some. Batch size and horizon stay:
    environments that share them can be computed together (see `reshape`).
    """
    if task.objective != "classification":
        return replace(task, rows=int(rng.choice([200, 500, 1000, 2000])))
    subset = task.classes
    if len(classes) > 2 and rng.random() < 0.7:
        count = int(rng.integers(2, len(classes) + 1))
        subset = tuple(sorted(rng.choice(classes, count, replace=False).tolist()))
    return replace(
        task,
        classes=subset,
        rows=int(rng.choice([200, 500, 1000, 2000])),
        noise=float(rng.choice([0.0, 0.0, 0.1, 0.2])),
    )


def reshape(task: Task, batch: int, horizon: float) -> Task:
    """The task with another batch size, and its horizon scaled; as many decisions as before."""
    interval = max(1, round(task.interval * horizon))
    return replace(task, batch=batch, interval=interval, steps=interval * task.decisions)
