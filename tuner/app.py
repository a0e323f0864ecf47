"""The command line's frame: errors as one line, exit codes, progress bars."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

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

console = Console(highlight=False)

Tick = Callable[[int, int, str], None]  # done, total, a few words


class Terminated(BaseException):
    """SIGTERM arrived."""


def run(app: typer.Typer) -> NoReturn:
    """Run the app; every failure is one line on stderr and an exit code.

    0 done, 1 failed at run time, 2 bad input, 130 interrupted, 143 terminated.
    """
    signal.signal(signal.SIGTERM, _terminate)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer turns Ctrl-C into this, without a word
            raise KeyboardInterrupt
    except SteersmanError as error:
        code = _say(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = _say("interrupted; repeat the command to go on", 130)
    except Terminated:
        code = _say("terminated; repeat the command to go on", 143)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = _say(f"{where}{error.strerror or error}", 1)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises on a wrong command line
            raise
        code = _say(f"{error.format_message()} See --help.", 2)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def progress(title: str) -> Iterator[Tick]:
    """A progress bar; on a terminal it moves, elsewhere each tenth prints a line."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[words]}"),
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


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
