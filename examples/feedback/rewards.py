"""Rewards: what people said of texts, as numbers from 0 to 1 and as pairs.

Everything here is a pure function. The five kinds of feedback on the texts of one prompt, which
are numbered from 1:

scores          [3, -1, 0.5]        one for each text, from -4 (worst) to 4
rankings        [1, 3, 2]           each text's rank, 1 is best; equal ranks are ties
comparisons     [[1, 2], [3, 2]]    the better text's number first
edits           {"2": "good day"}   what a text should have been
demonstrations  ["good day"]        what should have been written
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from envs.errors import BadInput, lookup

LOW, HIGH = -4.0, 4.0  # the scale of scores: that of the ratings which the shipped rater learned
LONGEST = 400  # characters of a text that somebody writes


class Pair(NamedTuple):
    """Two answers to a prompt; ``margin`` is the gap of their rewards, above 0, at most 1."""

    prompt: str
    chosen: str
    rejected: str
    margin: float


def by_score(scores: Any, count: int) -> list[float]:
    """Scores on the scale -> their places on it."""
    values = _numbers(scores, count, "scores")
    for value in values:
        if not LOW <= value <= HIGH:
            raise _bad("scores", value, f"off the scale; give {LOW:g} to {HIGH:g}")
    return [(value - LOW) / (HIGH - LOW) for value in values]


def by_rank(ranks: Any, count: int) -> list[float]:
    """Ranks -> the share of the other texts that each one beats; a tie is half a win."""
    values = _numbers(ranks, count, "rankings")
    for value in values:
        if value != int(value) or not 1 <= value <= count:
            raise _bad("rankings", value, f"no rank; give whole numbers from 1 to {count}")
    beaten = [sum((a < b) + (a == b) / 2 for b in values) - 0.5 for a in values]
    return [share / max(1, count - 1) for share in beaten]


def by_comparison(wins: Any, count: int) -> list[float | None]:
    """Comparisons -> the chance of beating a text of average strength; None: never compared.

    Strengths of Bradley and Terry (1952), by the iteration of Hunter (2004). Each text that was
    compared also has one win and one loss against the average, or a single win would be infinitely
    strong.
    """
    if not isinstance(wins, Sequence) or isinstance(wins, str):
        raise _bad("comparisons", wins, "no list; give pairs of numbers, the better text's first")
    for pair in wins:
        good = isinstance(pair, Sequence) and len(pair) == 2 and pair[0] != pair[1]
        if not good or not all(type(each) is int and 1 <= each <= count for each in pair):
            raise _bad("comparisons", pair, f"no pair; give two of the numbers 1 to {count}")
    won, met = [1.0] * count, [[0] * count for _ in range(count)]
    for better, worse in wins:
        won[better - 1] += 1
        met[better - 1][worse - 1] += 1
        met[worse - 1][better - 1] += 1
    strength = [1.0] * count
    for _ in range(200):
        trials = [
            2 / (mine + 1) + sum(n / (mine + other) for n, other in zip(row, strength, strict=True))
            for mine, row in zip(strength, met, strict=True)
        ]
        strength = [own / tried for own, tried in zip(won, trials, strict=True)]
    return [s / (1 + s) if any(m) else None for s, m in zip(strength, met, strict=True)]


def compared(
    prompt: str, texts: Sequence[str], rewards: Sequence[float | None], least: float = 0.02
) -> list[Pair]:
    """All pairs of texts whose rewards differ by ``least`` or more: a tie says nothing.

    Nor does a text that nobody judged, or one that is there twice.
    """
    found = []
    for (a, x), (b, y) in itertools.combinations(zip(texts, rewards, strict=True), 2):
        if x is not None and y is not None and a != b and abs(x - y) >= max(least, 1e-9):
            better, worse = (a, b) if x > y else (b, a)
            found.append(Pair(prompt, better, worse, abs(x - y)))
    return found


def edited(edits: Any, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Edits -> what was written, and the text that it is better than."""
    if not isinstance(edits, Mapping):
        raise _bad("edits", edits, "no object; give {number of the text: what it should have been}")
    found = []
    numbered = {str(number): text for number, text in enumerate(texts, 1)}
    for number, text in edits.items():
        if str(number) not in numbered:
            raise _bad("edits", number, f"no text's number; give 1 to {len(texts)}")
        old, new = numbered[str(number)], _text(text, "edits")
        if new != old:
            found.append((new, old))
    return found


def demonstrated(written: Any, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Demonstrations -> likewise: each is better than every text of the model."""
    if not isinstance(written, Sequence) or isinstance(written, str):
        raise _bad("demonstrations", written, "no list; give a list of texts")
    mine = [_text(text, "demonstrations") for text in written]
    return [(text, old) for text in mine for old in texts if text != old]


_REWARDS: dict[str, Callable[[Any, int], Sequence[float | None]]] = {
    "scores": by_score,
    "rankings": by_rank,
    "comparisons": by_comparison,
}
_WRITTEN: dict[str, Callable[[Any, Sequence[str]], list[tuple[str, str]]]] = {
    "edits": edited,
    "demonstrations": demonstrated,
}
KINDS = (*_REWARDS, *_WRITTEN)


def pairs(kind: str, prompt: str, texts: Sequence[str], given: Any) -> list[Pair]:
    """What one feedback says of the texts of a prompt; `BadInput` if it cannot be used."""
    lookup(dict.fromkeys(KINDS), kind, "kind of feedback")
    if kind in _REWARDS:
        return compared(prompt, texts, _REWARDS[kind](given, len(texts)))
    return [Pair(prompt, new, old, 1.0) for new, old in dict.fromkeys(_WRITTEN[kind](given, texts))]


def _numbers(values: Any, count: int, kind: str) -> list[float]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise _bad(kind, values, "no list; give a list of numbers")
    if len(values) != count:
        raise _bad(kind, values, f"of length {len(values)}; give one number for each of {count}")
    for value in values:
        if type(value) not in (int, float) or not -math.inf < value < math.inf:
            raise _bad(kind, value, "no finite number; give a number for each text")
    return list(values)


def _text(value: Any, kind: str) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not text or len(text) > LONGEST:
        raise _bad(kind, value, f"no text of 1 to {LONGEST} characters; write one line")
    return text


def _bad(kind: str, value: Any, problem: str) -> BadInput:
    return BadInput(f"feedback: {kind}: {str(value)[:60]!r} is {problem}")
