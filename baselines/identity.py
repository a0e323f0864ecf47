"""Identity: what tells one cell of a comparison from another."""

import functools
import hashlib
import json
import os
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from envs import catalog
from envs.errors import BadInput

# They make no outcome.
_JUDGES = (
    "crew.py", "evidence.py", "figures.py", "identity.py", "ledger.py", "plates.py", "report.py",
    "stats.py",
)  # fmt: skip


def describe(thing: object) -> dict[str, Any]:
    """A method or a way to open jobs as plain values: what tells it from another.

    ``thing.describe()`` where it has one (a policy gives its artifact's sha256, not its path);
    else the name of a class or function, or a dataclass's type and fields.
    """
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    name = {"class": f"{kind.__module__}.{kind.__qualname__}"}
    own = getattr(thing, "describe", None)
    if kind is thing:
        return name
    if own is None and not is_dataclass(thing):
        raise BadInput(f"{name['class']}: cannot be told from another; make it a dataclass")
    try:
        values = own() if own is not None else asdict(thing)  # type: ignore[call-overload]
        json.dumps(values)
    except TypeError as error:
        raise BadInput(f"{name['class']}: {error}; give it describe() -> plain values") from None
    return name | values


@functools.cache
def code_version(module: str) -> str:
    """Sha256 of the sources that make outcomes: envs, baselines and the package of ``module``.

    Any edit there gives new cells: running them again costs less than numbers that mix two
    versions. Left out are the modules that only judge outcomes.
    """
    digest = hashlib.sha256()
    for name in sorted({"envs", "baselines", module.partition(".")[0]}):
        path = Path(getattr(sys.modules.get(name), "__file__", None) or os.devnull)
        package = path.name == "__init__.py"
        for file in sorted(path.parent.rglob("*.py")) if package else [path]:
            if not (name == "baselines" and file.name in _JUDGES):
                digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def weights_of(model: str) -> str:
    """Sha256 of a local model's files; a hub id as it is."""
    path = Path(catalog.model_path(model))
    files = sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files))
    return digest.hexdigest() if files else model
