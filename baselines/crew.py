"""Crew: a list of items worked through in order by processes that may die.

Knows nothing of comparisons. A worker that is killed loses the item in its hands, and another
one gets it. Workers die with their master, however it ends.
"""

import os
import pickle
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from threading import Thread
from typing import Any, TypeVar

from envs.errors import BadInput, RunFailed

Item = TypeVar("Item")
Result = TypeVar("Result")

ATTEMPTS = 3  # workers that may die with an item before it is given up
_POLL = 0.2  # seconds of rest where an item cannot be done now
_READY = "ready"


@dataclass(frozen=True)
class Lost:
    """In place of a result: every worker that had the item was killed."""

    exit_code: int | None

    def __str__(self) -> str:
        return f"its worker was killed {ATTEMPTS} times (exit code {self.exit_code})"


def each(
    do: Callable[[Item], Result | None], items: Iterable[Item], workers: int
) -> Generator[tuple[Item, Result | Lost], None, None]:
    """``(item, do(item))`` as they finish; an item for which ``do`` returns None comes back later.

    workers: spawned processes; 0 works in this one. An exception of ``do`` is raised here. End
    the iteration by ``close``: workers are stopped at once.
    """
    waiting = deque(items)
    if workers:
        yield from _spawned(do, waiting, workers)
    while waiting:
        item = waiting.popleft()
        result = do(item)
        if result is None:
            waiting.append(item)
            time.sleep(_POLL)
        else:
            yield item, result


class _Worker:
    """A process, the pipe to it, and the item in its hands."""

    def __init__(self, do: Callable[[Any], Any]) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.item: Any = None
        self.ready = False  # for an item
        self.known = False  # to have started
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs, do), daemon=True)
        self.process.start()
        theirs.close()  # The worker's is the only one: its death closes the pipe.

    def give(self, item: Any) -> None:
        self.item, self.ready = item, False
        with suppress(OSError):  # A dead worker is noticed when it is listened to.
            self.pipe.send(item)

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(5)
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _spawned(
    do: Callable[[Any], Any], waiting: deque[Any], count: int
) -> Generator[tuple[Any, Any], None, None]:
    try:
        pickle.dumps((do, *waiting))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise BadInput(f"workers: {error}; define it at the top of a module, or use 0") from None
    crew: list[_Worker] = []
    deaths: Counter[int] = Counter()
    try:
        while waiting or any(worker.item is not None for worker in crew):
            for worker in crew:
                if worker.ready and waiting:
                    worker.give(waiting.popleft())
            while len(crew) < count and len(waiting) > sum(w.item is None for w in crew):
                crew.append(_Worker(do))
            for pipe in connection.wait([worker.pipe for worker in crew]):
                worker = next(worker for worker in crew if worker.pipe is pipe)
                item = worker.item
                try:
                    answer = worker.pipe.recv()
                except (EOFError, OSError):
                    crew.remove(worker)
                    worker.stop()
                    deaths[id(item)] += 1
                    if not worker.known and deaths[id(item)] >= ATTEMPTS:
                        raise RunFailed(
                            "workers: they die as they start; see above, and in a script put "
                            'the call under `if __name__ == "__main__":`'
                        ) from None
                    if item is not None and deaths[id(item)] < ATTEMPTS:
                        waiting.appendleft(item)
                    elif item is not None:
                        yield item, Lost(worker.process.exitcode)
                    continue
                worker.item, worker.ready, worker.known = None, True, True
                if isinstance(answer, BaseException):
                    raise answer
                if answer is None:
                    waiting.append(item)
                elif item is not None:
                    yield item, answer
    finally:
        for worker in crew:
            worker.stop()


def _work(pipe: Connection, do: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the master.
    Thread(target=_die_with_master, daemon=True).start()
    answer: Any = _READY
    with suppress(EOFError, OSError):
        while True:
            pipe.send(answer)
            item = pipe.recv()
            try:
                answer = do(item)
            except Exception as error:
                answer = error
            if answer is None:
                time.sleep(_POLL)


def _die_with_master() -> None:
    master = parent_process()
    if master is not None:
        master.join()
    os._exit(1)
