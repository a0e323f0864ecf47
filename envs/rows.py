"""Labelled texts in four fixed splits: made the same way from any source."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Pair = tuple[str, str]
"""A text and the name of its class."""

_ENDS = {"train": 0.60, "validation": 0.73, "selection": 0.86, "test": 1.0}
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S*")
_USER = re.compile(r"@\w+")


@dataclass(frozen=True)
class Rows:
    """One split: texts, their class numbers, and the sorted names of all classes."""

    texts: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


def clean(text: str) -> str:
    """``text`` on one line, without control characters."""
    return " ".join(_CONTROL.sub("", text).split())


def mask(text: str) -> str:
    """``text`` without web addresses, and with every user name replaced by one."""
    return _USER.sub("@user", _ADDRESS.sub("", text))


def plain_key(text: str) -> str:
    """What makes two texts of a user the same: letter case and white space do not count."""
    return " ".join(text.casefold().split())


def strict_key(text: str) -> str:
    """What makes two texts of the catalogue the same: the words, with every number alike.

    Web addresses, user names, digits and punctuation do not count: retweets differ in the
    shortened address, and one spam template in the telephone number. Kept, such twins would land
    on both sides of a split.
    """
    words = re.findall(r"\w+", re.sub(r"\d+", "0", mask(text.casefold())))
    return " ".join(word for word in words if word not in ("rt", "user"))


def unique(pairs: Iterable[Pair], key: Callable[[str], str]) -> dict[str, Pair]:
    """The first text of each key; empty keys, and keys with different labels, are dropped."""
    first: dict[str, Pair] = {}
    dropped = {""}
    for pair in pairs:
        name = key(pair[0])
        if first.setdefault(name, pair)[1] != pair[1]:
            dropped.add(name)
    return {name: pair for name, pair in first.items() if name not in dropped}


def split_of(key: str) -> str:
    """The split in which a text belongs, for good: a function of its key alone.

    >>> split_of("the film is good")
    'train'
    """
    place = int.from_bytes(digest(key)[:8], "big") / 2**64
    return next((name for name, end in _ENDS.items() if place < end), "test")


def divide(
    rows: Mapping[str, Pair], own: Mapping[str, Mapping[str, Pair]] | None = None
) -> dict[str, Rows]:
    """Rows by key -> the four splits; a split in ``own`` is taken from there instead.

    The rows of a split are ordered by hash: the first n are a fair sample of it.
    """
    own = own or {}
    members: dict[str, dict[str, Pair]] = {name: dict(own.get(name, {})) for name in _ENDS}
    for key, pair in rows.items():
        place = split_of(key)
        members["train" if place in own else place][key] = pair
    classes = tuple(sorted({label for part in members.values() for _, label in part.values()}))
    return {
        name: _as_rows((part[key] for key in sorted(part, key=digest)), classes)
        for name, part in members.items()
    }


def without_twins(splits: Mapping[str, Rows]) -> dict[str, Rows]:
    """Drop from each split the texts that nearly repeat those of the splits before it.

    A text nearly repeats when four fifths of its runs of five words have been seen.
    """
    seen: set[str] = set()
    result = {}
    for name, rows in splits.items():
        found = [runs(text) for text in rows.texts]
        keep = [
            (text, rows.classes[label])
            for text, label, own in zip(rows.texts, rows.labels, found, strict=True)
            if len(own & seen) < 0.8 * len(own)
        ]
        result[name] = _as_rows(keep, rows.classes)
        seen.update(*found)
    return result


def runs(text: str) -> set[str]:
    """Every run of five words of ``text``; the whole of a shorter one."""
    words = strict_key(text).split()
    return {" ".join(words[start : start + 5]) for start in range(max(1, len(words) - 4))}


def digest(key: str) -> bytes:
    """The hash that places a text, and orders those of a split."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _as_rows(pairs: Iterable[Pair], classes: tuple[str, ...]) -> Rows:
    texts, labels = tuple(zip(*pairs, strict=True)) or ((), ())
    number = {name: index for index, name in enumerate(classes)}
    return Rows(texts, np.array([number[label] for label in labels], dtype=np.int64), classes)
