"""The command line's frame: errors as one line, exit codes, progress bars."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from envs.errors import SteersmanError

console = Console(highlight=False, markup=False, soft_wrap=True)  # paths stay as they are

Tick = Callable[[int, int, str], None]  # done, total, a few words
_AGAIN = "repeat the command to go on from what is saved"


class Terminated(BaseException):
    """SIGTERM arrived."""


def run(app: typer.Typer) -> NoReturn:
    """Run the app; every failure is one line on stderr and an exit code.

    0 done, 1 failed at run time, 2 bad input, 130 interrupted, 143 terminated.
    """
    signal.signal(signal.SIGTERM, _terminate)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.formatwarning = _format
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer turns Ctrl-C into this, without a word
            raise KeyboardInterrupt
    except SteersmanError as error:
        code = _say(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = _say(f"interrupted; {_AGAIN}", 130)
    except Terminated:
        code = _say(f"terminated; {_AGAIN}", 143)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = _say(f"{where}{error.strerror or error}", 1)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises on a wrong command line
            raise
        said = error.format_message()  # nothing where the help was shown
        code = _say(f"{said} See --help.", 2) if said else 2
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def progress(title: str) -> Iterator[Tick]:
    """A progress bar; on a terminal it moves, elsewhere each tenth prints a line."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}", style="dim", markup=False),
        )
        with Progress(*columns, console=console) as bar:
            line = bar.add_task(title, total=None, words="")

            def tick(done: int, total: int, words: str) -> None:
                bar.update(line, completed=done, total=total, words=words)

            yield tick
        return
    last = -1

    def say(done: int, total: int, words: str) -> None:
        nonlocal last
        tenth = 10 * done // max(total, 1)
        if tenth != last:
            console.print(f"{title}: {done}/{total} {words}")
            last = tenth

    yield say


def _say(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _format(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning without the line of source that it was given at."""
    return f"warning: {' '.join(str(message).split())}\n"


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
