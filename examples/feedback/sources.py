"""Sources: where feedback comes from: a file, a person at a terminal, a model that rates.

The fourth, a person at a web form, is in `form.py`. A source yields one row for each item as soon
as it is there: ``{"id": ..., KIND: ...}``, with the values that `rewards.py` describes.
"""

import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import rewards
from candidates import Item

from envs.errors import BadInput

ROWS = 100_000  # that a file of feedback may have
HINTS = {
    "scores": f"a number from {rewards.LOW:g} to {rewards.HIGH:g} for each text, such as 3 -1 0.5",
    "rankings": "the numbers of all texts from best to worst, = between equal ones, such as 2 1=3",
    "comparisons": "who is better than whom, such as 1>2 3>2",
    "edits": "the number of a text and what it should have been, such as 2 good day to you",
    "demonstrations": "what should have been answered",
}

Row = dict[str, Any]


class Source(Protocol):
    """Somebody, or something, to ask."""

    def ask(self, items: Sequence[Item], kind: str) -> Iterator[Row]:
        """One row for each item that there is feedback on; items may be left out."""


def parse(kind: str, line: str, count: int) -> Any:
    """What a person typed -> the feedback; `BadInput` says what is wrong with it."""
    try:
        if kind == "scores":
            return [float(word) for word in line.replace(",", " ").split()]
        if kind == "rankings":
            return _ranks(line, count)
        if kind == "comparisons":
            return [[int(part) for part in word.split(">")] for word in line.split()]
    except ValueError:
        raise BadInput(
            f"feedback: {kind}: {line[:60]!r} is not clear; give {HINTS[kind]}"
        ) from None
    if kind == "edits":
        number, _, text = line.partition(" ")
        return {number: text}
    return [line]


def _ranks(line: str, count: int) -> list[int]:
    """``2 1=3`` -> [2, 1, 2]: the rank of each text."""
    groups = [[int(n) for n in word.split("=")] for word in re.sub(r"\s*=\s*", "=", line).split()]
    named = [number for group in groups for number in group]
    if sorted(named) != list(range(1, count + 1)):
        raise ValueError
    better = {n: sum(map(len, groups[:place])) for place, group in enumerate(groups) for n in group}
    return [better[number] + 1 for number in range(1, count + 1)]


class File:
    """Rows of a JSONL file; those of other items are passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, items: Sequence[Item], kind: str) -> Iterator[Row]:
        """The whole file or `BadInput`: a line cannot be used, or none is about these items."""
        known, rows = {item.id: item for item in items}, []
        for number, line in enumerate(self._lines(), 1):
            try:
                row = json.loads(line, parse_constant=float)
                if not isinstance(row, dict) or not isinstance(row.get("id"), str):
                    raise BadInput('no object with an "id"; give {"id": ..., "KIND": ...}')
                item = known.pop(row["id"], None)
                if item is None:
                    continue
                if kind not in row:
                    raise BadInput(f"feedback: {kind}: missing; give {HINTS[kind]}")
                rewards.pairs(kind, item.prompt, item.texts, row[kind])
            except (BadInput, ValueError, RecursionError) as error:
                raise BadInput(f"{self._path}: line {number}: {error}") from None
            rows.append({"id": item.id, kind: row[kind]})
        if not rows:
            raise BadInput(
                f"{self._path}: id: no line is about {items[0].id} … {items[-1].id}; give your "
                f"{kind} of these candidates there, and repeat the command"
            )
        return iter(rows)

    def _lines(self) -> list[str]:
        try:
            with self._path.open(encoding="utf-8") as file:
                lines = list(file)
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{self._path}: cannot be read: {error}; give a JSONL file") from None
        if len(lines) > ROWS:
            raise BadInput(f"{self._path}: {len(lines)} lines; give at most {ROWS}")
        return lines


class Terminal:
    """A person at a terminal: an empty line leaves an item out, ``q`` ends the session."""

    def __init__(self, stdin: TextIO | None = None, stdout: TextIO | None = None) -> None:
        self._in, self._out = stdin or sys.stdin, stdout or sys.stdout

    def ask(self, items: Sequence[Item], kind: str) -> Iterator[Row]:
        """What cannot be used is asked again."""
        self._say(f"Give {HINTS[kind]}. An empty line leaves a prompt out, q ends.")
        for place, item in enumerate(items, 1):
            self._say(f"\n[{place}/{len(items)}] {_shown(item.prompt)}")
            for number, text in enumerate(item.texts, 1):
                self._say(f"  {number}. {_shown(text)}")
            given = self._one(item, kind)
            if given == "q":
                return
            if given is not None:
                yield {"id": item.id, kind: given}

    def _one(self, item: Item, kind: str) -> Any:
        while True:
            self._say(f"{kind}> ", end="")
            line = self._in.readline()
            if not line or line.strip() == "q":
                return "q"
            if not line.strip():
                return None
            try:
                given = parse(kind, line.strip(), len(item.texts))
                rewards.pairs(kind, item.prompt, item.texts, given)
                return given
            except BadInput as error:
                self._say(str(error))

    def _say(self, text: str, end: str = "\n") -> None:
        print(text, end=end, file=self._out, flush=True)


def _shown(text: str) -> str:
    """Without what steers a terminal: the model, or a file, wrote it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class Model:
    """A model in a person's place: everything it says follows from how it rates texts."""

    def __init__(
        self, rate: Callable[[Sequence[str]], list[float]], known: Sequence[str], seed: int
    ) -> None:
        """rate: texts -> scores. known: texts of people, among which its demonstrations are."""
        self._rate, self._known, self._seed = rate, known, seed

    def ask(self, items: Sequence[Item], kind: str) -> Iterator[Row]:
        """Scores to a tenth; an edit leaves out the worst word; the best of 8 known texts."""
        random_ = random.Random(self._seed)
        for item in items:
            scores = [round(score, 1) for score in self._rate(item.texts)]
            ranks = [1 + sum(other > score for other in scores) for score in scores]
            if kind == "rankings":
                given: Any = ranks
            elif kind == "comparisons":
                given = _compare(scores, random_)
            elif kind == "edits":
                given = self._edit(item.texts)
            elif kind == "demonstrations":
                drawn = random_.sample(self._known, min(8, len(self._known)))
                given = [max(zip(self._rate(drawn), drawn, strict=True))[1]]
            else:
                given = scores
            yield {"id": item.id, kind: given}

    def _edit(self, texts: Sequence[str]) -> dict[str, str]:
        edits = {}
        for number, text in enumerate(texts, 1):
            words = text.split()
            shorter = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
            rated = zip(self._rate([text, *shorter]), [text, *shorter], strict=True)
            best = max(rated)[1] if len(words) > 1 else text
            if best != text:
                edits[str(number)] = best
        return edits


def _compare(scores: Sequence[float], random_: random.Random) -> list[list[int]]:
    """As many comparisons as there are texts, of pairs drawn at random; ties are passed over."""
    found = []
    for _ in scores if len(scores) > 1 else ():
        a, b = random_.sample(range(len(scores)), 2)
        if scores[a] != scores[b]:
            found.append([a + 1, b + 1] if scores[a] > scores[b] else [b + 1, a + 1])
    return found
