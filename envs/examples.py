"""Examples: the checked rows that a task's objective trains on and is judged by."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs import texts
from envs.errors import BadInput, RunFailed, UnknownName
from envs.rows import clean, digest, plain_key, split_of
from envs.task import SPLITS, Objective, Split, Task
from envs.texts import RATING, Article, Preferred, Rated, Tagged, Turn, Verse


@dataclass(frozen=True)
class Data:
    """The rows of a task by split, all of one type of `envs.texts` (plain text is ``str``).

    classes: the tags of token classification, otherwise none. fingerprint: sha256 of the rows.
    """

    rows: dict[Split, tuple[Any, ...]]
    classes: tuple[str, ...]
    fingerprint: str


KINDS: Mapping[Objective, type] = {
    "regression": Rated, "tokens": Tagged, "causal": str, "translation": Verse,
    "headlines": Article, "reward": Preferred, "dpo": Preferred, "kto": Preferred,
    "sft": Turn, "grpo": Turn,
}  # fmt: skip
"""The rows that each objective needs."""

Read = Callable[[], Mapping[Split, Sequence[Any]]]
SOURCES: Mapping[str, tuple[type, Read]] = {
    "ratings": (Rated, texts.ratings), "pairs": (Preferred, texts.pairs),
    "tagged": (Tagged, texts.tagged), "verses": (Verse, texts.verses),
    "articles": (Article, texts.articles), "dialogue": (Turn, texts.dialogue),
    "plain": (str, texts.plain),
}  # fmt: skip
"""The shipped datasets of these rows, by the name that a `Task` gives."""

FIELDS: Mapping[type, tuple[str, ...]] = {
    Rated: ("text", "scores"), Preferred: ("prompt", "chosen", "rejected"),
    Tagged: ("words", "tags"), Verse: ("source", "target"), Article: ("title", "body"),
    Turn: ("statement", "reply"), str: ("text",),
}  # fmt: skip
"""What a line of one's own JSON lines holds: texts, or a list of scores, words or tags."""


@functools.lru_cache(maxsize=32)
def load(task: Task) -> Data:
    """The task's rows: a shipped dataset of `SOURCES`, or a JSONL file with the `FIELDS`.

    At most ``rows`` of training and so many of the other splits as the task says; a file is
    split by the hash of its texts. Raises `BadInput` for what cannot be trained on.
    """
    if task.objective not in KINDS:
        raise UnknownName("objective with examples", task.objective, KINDS)
    for name, plain in (("noise", 0.0), ("classes", None)):
        if getattr(task, name) != plain:
            raise BadInput(
                f"task: {name}: only for classification; leave it {plain} for {task.objective}"
            )
    kind = KINDS[task.objective]
    splits = _splits(task.dataset, kind)
    caps: dict[Split, int] = {
        "train": task.rows,
        "validation": task.validation_rows,
        "selection": task.selection_rows,
        "test": task.test_rows,
    }
    rows = {split: tuple(splits[split][: caps[split]]) for split in SPLITS}
    for split in SPLITS:
        if not rows[split]:
            raise BadInput(f"{task.dataset}: {split}: no rows are left for this split; give more")
    if len(rows["train"]) < task.batch:
        raise BadInput(
            f"{task.dataset}: batch: {task.batch} is larger than the {len(rows['train'])} "
            "training rows; lower batch"
        )
    classes: tuple[str, ...] = ()
    if kind is Tagged:
        classes = tuple(sorted({tag for row in splits["train"] for tag in row.tags}))
        if len(classes) < 2:
            raise BadInput(f"{task.dataset}: tags: the training rows have one tag; give two")
    return Data(rows, classes, hashlib.sha256(repr(rows).encode()).hexdigest())


@functools.lru_cache(maxsize=16)
def _splits(dataset: str, kind: type) -> dict[Split, tuple[Any, ...]]:
    if dataset in SOURCES:
        found, read = SOURCES[dataset]
        if found is Turn and kind is str:
            return {split: tuple(f"{row.statement}\n{row.reply}" for row in rows)
                    for split, rows in read().items()}  # fmt: skip
        if found is not kind:
            fit = [name for name, (each, _) in SOURCES.items() if each is kind]
            raise BadInput(
                f"{dataset}: dataset: its rows are no {kind.__name__}; take {' or '.join(fit)}"
            )
        if kind is Preferred:  # they come source by source
            return {split: tuple(sorted(rows, key=lambda row: digest(row.chosen)))
                    for split, rows in read().items()}  # fmt: skip
        return {split: tuple(rows) for split, rows in read().items()}
    if dataset.lower().endswith(".jsonl"):
        return _divided(_own(Path(dataset), kind))
    if "." in dataset or "/" in dataset:
        raise BadInput(
            f"{dataset}: dataset: not .jsonl; give JSON lines with {', '.join(FIELDS[kind])}"
        )
    raise UnknownName("dataset of examples", dataset, SOURCES)


def _own(path: Path, kind: type) -> list[Any]:
    if not path.is_file():
        raise BadInput(f"{path}: file: not found or not a regular file; give a file that exists")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: file: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise RunFailed(f"{path}: file: {error.strerror}; give a file you may read") from error
    rows = [
        _row(f"{path}: line {number}", line, kind)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise BadInput(f"{path}: file: holds no rows; give one JSON object a line")
    return rows


def _row(where: str, line: str, kind: type) -> Any:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise BadInput(f"{where}: is not a JSON object; give one with {', '.join(FIELDS[kind])}")
    found = []
    for name in FIELDS[kind]:
        value = values.get(name)
        if name in ("scores", "words", "tags"):
            item = (int, float) if name == "scores" else str
            good = isinstance(value, list) and all(
                isinstance(v, item) and not isinstance(v, bool) for v in value
            )
            value = tuple(value) if isinstance(value, list) else value
        else:
            good = isinstance(value, str)
            value = clean(value) if isinstance(value, str) else value
        if not good:
            raise BadInput(
                f"{where}: {name}: missing or of the wrong type; give {', '.join(FIELDS[kind])}, "
                "see docs/objectives.md"
            )
        found.append(value)
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadInput(f"{where}: is not valid Unicode; repair the row") from None
    extra = {Rated: ("own",), Preferred: (1.0,)}.get(kind, ())
    row = found[0] if kind is str else kind(*found, *extra)
    if problem := _problem(row):
        raise BadInput(f"{where}: {problem}")
    return row


def _problem(row: Any) -> str:
    """What is wrong with a row, and the way out; empty if nothing is."""
    if isinstance(row, Rated):
        if not row.text.strip() or not row.scores:
            return "has no text or no score; remove it"
        if not all(-RATING <= score <= RATING for score in row.scores):
            return f"has a score outside -{RATING:g} to {RATING:g}; rescale the scores"
    elif isinstance(row, Preferred):
        if not row.chosen.strip() or not row.rejected.strip():
            return "has an empty answer; remove it"
        if row.chosen == row.rejected:
            return "is a tie, which prefers nothing; remove it"
    elif isinstance(row, Tagged):
        if not row.words or len(row.words) != len(row.tags):
            return f"has {len(row.words)} words and {len(row.tags)} tags; give each word one"
    elif not all(part.strip() for part in ([row] if isinstance(row, str) else row)):
        return "has an empty text; remove it"
    return ""


def _divided(rows: Sequence[Any]) -> dict[Split, tuple[Any, ...]]:
    """The four splits: rows with the same text to read stay together, in the order of its hash."""
    keys = [_key(row, 1 if isinstance(row, Article) else 0) for row in rows]
    if len(set(keys)) == 1:  # one prompt for all
        keys = [_key(row, 1) for row in rows]
    order = sorted(zip(keys, rows, strict=True), key=lambda pair: digest(pair[0]))
    return {split: tuple(row for key, row in order if split_of(key) == split) for split in SPLITS}


def _key(row: Any, number: int) -> str:
    if isinstance(row, str):
        return plain_key(row)
    value = row[number]
    return plain_key(value if isinstance(value, str) else " ".join(map(str, value)))
