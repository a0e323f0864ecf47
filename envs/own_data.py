"""A user's own labelled texts: CSV, JSON lines, a saved dataset or one from the hub."""

import csv
import difflib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.errors import BadInput, RunFailed
from envs.rows import Pair, Rows, divide, plain_key, unique

SUFFIXES = (".csv", ".jsonl")
MAX_BYTES = 2**30
_OWN_SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_Raw = tuple[str, Any, Any]  # where the row stands, its text, its label


def load_user(
    source: str, text: str = "text", label: str = "label", max_rows: int | None = None
) -> dict[str, Rows]:
    """The four splits of a CSV or JSONL file, a folder saved by ``datasets``, or a hub id.

    A source's own validation and test splits are used; what is missing is taken from its training
    rows by the fixed hash. Texts that occur twice are dropped, from training first, with a warning
    that counts them.

    max_rows: a fixed random sample of at most so many rows of each of the source's splits.
    """
    if max_rows is not None and max_rows < 1:
        raise BadInput(f"{source}: max_rows: {max_rows} is not a count; give 1 or more")
    raw: dict[str, Sequence[_Raw]]
    if source.lower().endswith(SUFFIXES):
        raw = {"train": _sample(list(_file_rows(Path(source), text, label)), max_rows)}
    else:
        raw = _dataset_rows(source, text, label, max_rows)
    pairs = {name: _checked(source, text, label, rows) for name, rows in raw.items()}
    kept: dict[str, dict[str, Pair]] = {}
    for name in ("test", "validation", "train"):
        if name in pairs:
            taken = set().union(*kept.values())
            rows = unique(pairs[name], plain_key)
            kept[name] = {key: pair for key, pair in rows.items() if key not in taken}
    total = sum(map(len, pairs.values()))
    lost = total - sum(map(len, kept.values()))
    splits = divide(kept.pop("train"), kept)
    for name, found in splits.items():
        if not len(found):
            raise BadInput(
                f"{source}: {name}: no rows are left for this split, of {total}; give more rows"
            )
    classes = splits["train"].classes
    if len(np.unique(splits["train"].labels)) < 2:
        raise BadInput(f"{source}: {label}: the training rows have one class; give at least two")
    if len(classes) > total / 2:
        raise BadInput(
            f"{source}: {label}: {len(classes)} classes for {total} rows; "
            "name the column of the classes"
        )
    if lost:
        warnings.warn(
            f"{source}: {text}: {lost} of {total} rows dropped: empty, repeated "
            "(within a split or in two of them), or labelled in two ways",
            stacklevel=3,
        )
    return splits


def _sample(rows: Any, limit: int | None) -> Any:
    if limit is None or len(rows) <= limit:
        return rows
    chosen = sorted(np.random.default_rng(0).permutation(len(rows))[:limit].tolist())
    return [rows[i] for i in chosen] if isinstance(rows, list) else rows.select(chosen)


def _file_rows(path: Path, text: str, label: str) -> Iterator[_Raw]:
    if not os.path.isfile(path):
        raise BadInput(f"{path}: file: not found or not a regular file; give a file that exists")
    size = path.stat().st_size
    if not size:
        raise BadInput(f"{path}: file: empty; give labelled texts, one a row")
    if size > MAX_BYTES:
        raise BadInput(
            f"{path}: file: {size / 2**30:.1f} GB, over {MAX_BYTES / 2**30:g}; "
            "save large data with `datasets`, give its folder"
        )
    read = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from read(path, file, text, label)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: file: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (csv.Error, RecursionError) as error:
        raise BadInput(f"{path}: file: cannot be read ({error}); repair it") from None
    except OSError as error:
        raise BadInput(f"{path}: file: {error.strerror}; give a file you may read") from None


def _csv_rows(path: Path, file: Iterable[str], text: str, label: str) -> Iterator[_Raw]:
    csv.field_size_limit(MAX_BYTES)  # a document may be long
    reader = csv.reader(file, strict=True)
    header = next(reader, [])
    at, to = (header.index(_column(path, name, header)) for name in (text, label))
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            raise BadInput(
                f"{path}: line {reader.line_num}: {len(row)} fields where the header has "
                f"{len(header)}; quote fields that hold a comma"
            )
        yield f"line {reader.line_num}", row[at], row[to]


def _json_rows(path: Path, file: Iterable[str], text: str, label: str) -> Iterator[_Raw]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise BadInput(f"{path}: line {number}: not a JSON object; write one object per line")
        at, to = (_column(f"{path}: line {number}", name, row) for name in (text, label))
        yield f"line {number}", row[at], row[to]


def _column(source: object, name: str, known: Iterable[str]) -> str:
    names = list(known)
    if names.count(name) == 1:
        return name
    if name in names:
        raise BadInput(f"{source}: {name}: two columns have this name; rename one")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(names[:20])[:300]
    raise BadInput(f"{source}: {name}: no such column; {hint}name one of: {shown}")


def _dataset_rows(
    source: str, text: str, label: str, limit: int | None
) -> dict[str, Sequence[_Raw]]:
    if os.path.exists(source) and not os.path.isdir(source):
        raise BadInput(f"{source}: file: not .csv or .jsonl; convert it, or rename it if it is one")
    import datasets

    try:
        if os.path.isdir(source):
            data: Any = datasets.load_from_disk(source)
        else:
            data = datasets.load_dataset(source)
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            path = Path(source)
            if len(path.parts) > 1 and path.parent.is_dir() and not path.exists():
                raise BadInput(
                    f"{source}: dataset: no such folder, nor within reach on the hub; "
                    "correct the path"
                ) from None
            raise RunFailed(f"{source}: cannot be loaded ({problem}); try again later") from error
        raise BadInput(
            f"{source}: dataset: cannot be read ({problem}); give a CSV or JSONL file, a hub id, "
            "or a folder written by `save_to_disk` in which no split is empty"
        ) from None
    if not isinstance(data, dict):
        data = {"train": data}
    if "train" not in data:
        raise BadInput(f"{source}: train: no such split; it has {', '.join(map(str, data))[:200]}")
    result: dict[str, Sequence[_Raw]] = {}
    for split, table in data.items():
        name = _OWN_SPLITS.get(str(split))
        if name is None or name in result:
            continue
        for column in (text, label):
            _column(source, column, table.column_names)
        table = _sample(table, limit)
        labels = list(table[label])
        names = getattr(table.features[label], "names", None)
        if name == "test" and labels and all(value in (None, -1) for value in labels):
            continue  # a benchmark's hidden test labels
        if names:
            labels = [v if v is None or v < 0 else names[v] for v in labels]
        where = (f"{split} row {number}" for number in range(len(labels)))
        result[name] = list(zip(where, list(table[text]), labels, strict=True))
    return result


def _checked(source: str, text: str, label: str, rows: Iterable[_Raw]) -> list[Pair]:
    pairs = []
    for where, content, value in rows:
        if not isinstance(content, str):
            raise BadInput(
                f"{source}: {text}: {where} holds {_kind(content)}, not a string; "
                "name the column of texts, or repair the row"
            )
        try:
            content.encode()
        except UnicodeEncodeError:
            raise BadInput(
                f"{source}: {text}: {where} is not valid Unicode; repair the row"
            ) from None
        name, problem = _class_name(value)
        if problem:
            raise BadInput(f"{source}: {label}: {where} {problem}")
        pairs.append((content, name))
    return pairs


def _class_name(value: Any) -> tuple[str, str]:
    """The name of a label's class, and what is wrong with the label (empty when nothing is)."""
    if value is None or value != value or (isinstance(value, str) and _is_blank(value)):
        return "", "has no label; fill it in or remove the row"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        return "", f"holds {_kind(value)}; labels are class names or whole numbers"
    name = str(value).strip()
    if re.fullmatch(r"-\d+", name):
        return "", f"has the negative label {name[:20]}; number classes from 0, or name them"
    return name, ""


def _is_blank(value: str) -> bool:
    return value.strip().casefold() in ("", "nan")


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
