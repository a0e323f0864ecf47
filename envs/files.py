"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from envs.errors import BadInput, RunFailed


def make_folder(path: Path) -> None:
    """Make a folder and its parents; `BadInput` on a file there, `RunFailed` on a refusing disk."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BadInput(f"{path}: folder: a file is in its place; name another folder") from None
    except OSError as error:
        raise RunFailed(f"{path}: cannot be made: {error.strerror or error}") from error


def write_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``; a crash at any point leaves the old file or the new one.

    Written under a temporary name in the same folder, flushed, synced, renamed; the folder is
    synced last. Raises `RunFailed`, with the previous file intact, when the disk refuses.
    """
    temporary = ""
    try:
        make_folder(path.parent)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = ""
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A disk that refuses a checkpoint is a failure at run time, in one line."""
    try:
        yield
    except (RuntimeError, SafetensorError, OSError) as error:
        if "space" in str(error).lower() or "write" in str(error).lower():
            reason = str(error).splitlines()[0][:200]
            raise RunFailed(f"{folder}: a checkpoint cannot be written: {reason}") from error
        raise
