"""Worker processes: vector environments side by side, one a process, as one vector environment."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from envs.env import FineTuneEnv
from envs.errors import RunFailed
from envs.vector import EachVectorEnv, Start, Step

MakePart = Callable[[], EachVectorEnv]
ATTEMPTS = 3  # of a worker at one and the same reset


class WorkerVectorEnv(EachVectorEnv):
    """Parts of equal size, each a vector environment in a process of its own.

    The same seed and the same parts give the same episodes bit for bit. A worker that dies is
    started again: its episodes end as truncated (reward 0, ``info["reason"]`` is "worker died"),
    and new ones begin with seeds of their own.
    """

    def __init__(self, parts: Sequence[MakePart], some: FineTuneEnv, size: int) -> None:
        """some: any of the environments, for its spaces; size: environments in a part."""
        super().__init__(some, size * len(parts))
        self._size, self._deaths = size, 0
        # A forked process shares what was loaded before; with a GPU in use it would not work.
        fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
        self._context = multiprocessing.get_context("fork" if fork else "forkserver")
        self._makes = list(parts)
        self._workers = [self._start(make) for make in self._makes]
        self._last: list[NDArray[np.float32]] = []
        self._seed = 0

    def reset_each(self, seeds: Sequence[int | None], options: dict[str, Any]) -> list[Start]:
        """Begin an episode in every environment, all workers at once."""
        self._seed = next((seed for seed in seeds if seed is not None), self._seed)
        asks = [("reset", (list(seeds[part]), options)) for part in self._parts()]
        starts: list[Start] = []
        for number, answer in enumerate(self._ask(asks)):
            starts += answer if answer is not None else self._again(number, asks[number])
        self._last = [observation for observation, _ in starts]
        return starts

    def step_each(self, actions: NDArray[Any]) -> list[Step]:
        """One step of every environment, all workers at once."""
        steps: list[Step] = []
        for number, answer in enumerate(
            self._ask([("step", (actions[part],)) for part in self._parts()])
        ):
            steps += answer if answer is not None else self._truncated(number)
        self._last = [s.observation if s.start is None else s.start[0] for s in steps]
        return steps

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the workers; they keep nothing."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()

    def _parts(self) -> list[slice]:
        return [slice(i * self._size, (i + 1) * self._size) for i in range(len(self._workers))]

    def _start(self, make: MakePart) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(  # type: ignore[attr-defined]
            target=_work, args=(theirs, ours, make), daemon=True
        )
        process.start()
        theirs.close()
        return process, ours

    def _ask(self, asks: Sequence[tuple[str, Any]]) -> list[Any]:
        """Every worker's answer; None where it died. An exception there is raised here."""
        for (_, pipe), ask in zip(self._workers, asks, strict=True):
            try:
                pipe.send(ask)
            except OSError:
                continue  # its silence is noticed below
        answers = []
        for _, pipe in self._workers:
            try:
                answers.append(pipe.recv())
            except (EOFError, OSError):
                answers.append(None)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def _again(self, number: int, ask: tuple[str, Any]) -> list[Start]:
        """A worker in place of one that died, put to the same start."""
        for _ in range(ATTEMPTS):
            process, pipe = self._workers[number]
            process.kill()
            process.join()
            pipe.close()
            code = process.exitcode
            self._workers[number] = self._start(self._makes[number])
            self._workers[number][1].send(ask)
            try:
                answer: Any = self._workers[number][1].recv()
            except (EOFError, OSError):
                continue
            if isinstance(answer, BaseException):
                raise answer
            return list(answer)
        raise RunFailed(f"workers: number {number} died {ATTEMPTS} times (exit code {code})")

    def _truncated(self, number: int) -> list[Step]:
        self._deaths += 1
        entropy = np.random.SeedSequence([self._seed, self._deaths])
        seeds = [int(x) for x in entropy.generate_state(self._size) >> 1]
        starts = self._again(number, ("reset", (seeds, {})))
        info = {"reason": "worker died", "metric": 0.0}
        last = self._last[self._parts()[number]]
        return [Step(seen, 0.0, False, True, dict(info), start)
                for seen, start in zip(last, starts, strict=True)]  # fmt: skip


def _work(pipe: Connection, other: Connection, make: MakePart) -> None:
    """A worker's life: answer until the pipe closes."""
    other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    try:
        part = make()
        while True:
            verb, arguments = pipe.recv()
            try:
                pipe.send(getattr(part, f"{verb}_each")(*arguments))
            except Exception as error:
                pipe.send(error)
    except (EOFError, OSError):
        pass
    os._exit(0)
