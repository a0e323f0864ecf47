"""SurrogateVectorEnv: simulated fine-tuning runs, thousands at once, behind the same interface."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from envs import curves, readings
from envs.curves import Weights
from envs.env import BLOWN, EXPLORE
from envs.episodes import OTHERS, Draw, Recipe, single
from envs.errors import BadInput, UnknownName
from envs.hands import Decisions, decode_many, turn_many
from envs.knobs import OPTIMIZERS, SHAPES, Actions, Knobs, Optimizer, Shape, exchange, factor
from envs.observe import Contexts, Reports, features, fixed, space
from envs.reward import crash, gain

Array = NDArray[np.floating[Any]]
Index = NDArray[np.intp]

REASON = "validation loss blew up"


class SurrogateVectorEnv(VectorEnv[NDArray[np.float32], Any, NDArray[Any]]):
    """`FineTuneEnv` over simulated runs: the same spaces, features, decisions and rewards.

    A run follows `envs.curves`, whose constants were fitted to recorded runs, and reports through
    `envs.readings`. Episodes end after ``decisions`` intervals or when the run diverges, and the
    next one begins in the same step (``AutoresetMode.SAME_STEP``, with ``final_obs`` and
    ``final_info`` as `SyncVectorEnv` gives them). Each environment owns its generator: with seed s
    it lives the same episodes, up to rounding, whatever its neighbours do and however many.

    Arguments:
        num_envs: runs simulated together; a few thousand are fastest.
        tasks: fitted tasks to draw from; all of them if empty.
        actions, spread, optimizers, shape, blind: as of `FineTuneEnv`.
        decisions: intervals of an episode.
        interval: updates of an interval.
        vary: draw classes, rows, label noise, batch and interval too.
        jitter: how much runs alike differ, 1 as the recorded ones do, 0 not at all.
        fitted: the file of constants.

    Version history: v0, the first.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    _draw: Draw  # the running episodes
    _weights: Weights
    _snapshot: Weights  # with the lowest loss that may be seen
    _rate: NDArray[np.float64]  # peak rate in force
    _start: NDArray[np.float64]  # starting rate, in terms of the optimizer in use
    _optimizer: Index
    _pace: Array  # mean rate of the last interval, as a multiple of the reference rate
    _count: Index  # intervals done
    _loss: Array  # last validation loss that was not a divergence
    _measured: Array  # last validation loss
    _best: Array
    _now: Reports
    _jobs: Contexts

    def __init__(
        self,
        num_envs: int = 1024,
        tasks: Sequence[str] = (),
        *,
        actions: Actions | None = None,
        decisions: int = 10,
        interval: int = 5,
        spread: float = 1.5,
        vary: bool = True,
        optimizers: Sequence[Optimizer] = ("adamw",),
        shape: Shape | Literal["any"] = "linear",
        blind: float = 0.0,
        jitter: float = 1.0,
        fitted: Path = curves.FITTED,
    ) -> None:
        if num_envs < 1:
            raise BadInput(f"surrogate: num_envs: {num_envs!r} is not a count; give at least 1")
        self.num_envs, self.decisions = num_envs, decisions
        self.actions = actions or Actions()
        self.single_observation_space, self.single_action_space = space(), self.actions.space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        content = curves.load(fitted)
        self._recipe = Recipe(
            content, tasks, decisions=decisions, interval=interval, spread=spread, vary=vary,
            optimizers=optimizers, shape=shape, blind=blind, jitter=jitter,
        )  # fmt: skip
        self._noise = readings.noise_of(content)
        self._probe = single(np.moveaxis(self._noise.probe, 0, -1).copy())
        self._constants = single(self._recipe.constants.optimizer.T.copy())
        size = content["parameters"]
        self._exchange = np.array(
            [[exchange(old, new, size, "full") for new in OPTIMIZERS] for old in OPTIMIZERS]
        )
        self._factors = np.array(
            [
                [factor(Knobs(shape=name), step, decisions) for step in range(decisions + 1)]
                for name in SHAPES
            ],
            dtype=np.float32,
        )
        self._generators: list[np.random.Generator] = []
        self._columns = np.arange(num_envs)
        self._names = np.array([f"{name}/surrogate" for name in self._recipe.names], dtype=object)
        self._kinds = np.array(OPTIMIZERS, dtype=object)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode in each environment; environment i gets seed + i, or seed[i]."""
        for name in options or {}:
            raise UnknownName("option of reset", name, ())
        if seed is None and not self._generators:
            seed = [None] * self.num_envs
        if seed is not None:
            seeds = (
                list(seed)
                if isinstance(seed, Sequence)
                else [int(seed) + i for i in range(self.num_envs)]
            )
            if len(seeds) != self.num_envs:
                raise BadInput(
                    f"surrogate: seed: {len(seeds)} given; give one for each of {self.num_envs}"
                )
            self._generators = [np.random.default_rng(one) for one in seeds]
        self._open()
        return features(self._now, self._jobs), self._info()

    def step(
        self, actions: Any
    ) -> tuple[
        NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_],
        dict[str, Any],
    ]:  # fmt: skip
        """Apply an action in each environment and run one interval of each."""
        if not self._generators:
            raise gymnasium.error.ResetNeeded("no episodes yet; call reset()")
        decided = decode_many(actions, self.actions, self.num_envs)
        self._turn(decided)
        train, validation = self._advance(decided)
        draw, before = self._draw, self._loss
        lost = ~(validation <= BLOWN * draw.first)
        rewards = np.asarray(gain(before, validation, draw.first), dtype=np.float64)
        rewards[lost] = crash(before[lost], draw.first[lost])
        self._loss, self._measured = np.where(lost, before, validation), validation
        self._keep(np.where(draw.hidden, train, validation), lost)
        observations = features(self._now, self._jobs)
        terminated = lost | (self._count >= self.decisions)
        over = np.flatnonzero(terminated)
        info: dict[str, Any] = {}
        if len(over):
            info = self._finals(observations, over, lost)
            self._begin(over)
            now, jobs = columns(self._now, over), columns(self._jobs, over)
            observations[over] = features(Reports._make(now), Contexts._make(jobs))
        info.update(self._info())
        truncated = np.zeros(self.num_envs, dtype=np.bool_)
        return observations, rewards, terminated, truncated, info

    @property
    def rates(self) -> NDArray[np.float64]:
        """The peak rates in force, (num_envs,)."""
        return self._rate.copy()

    def _open(self) -> None:
        """A first episode in each environment."""
        count, depth = self.num_envs, max(3, self.decisions + 1)
        self._draw = draw = self._recipe.draw(self._generators)
        self._weights, self._snapshot = curves.fresh(draw.laws), curves.fresh(draw.laws)
        self._rate, self._start, self._optimizer = draw.rate, draw.rate.copy(), draw.optimizer
        self._pace, self._count = np.zeros(count, np.float32), np.zeros(count, dtype=np.intp)
        self._loss, self._measured, self._best = (draw.first.copy() for _ in range(3))
        nothing = [np.zeros(count, np.float32) for _ in range(len(Reports._fields) - 5)]
        tracks = [np.full((depth, count), np.nan, np.float32) for _ in range(4)]
        losses = np.full((self._recipe.longest, count), np.nan, np.float32)
        self._now = Reports._make([*nothing, losses, *tracks])
        self._jobs = Contexts._make(
            np.zeros((size, count) if size > 1 else count, np.float32) for size in (1, 1, 1, 1, 6)
        )
        self._start_reports(self._columns, draw)

    def _begin(self, which: Index) -> None:
        """A new episode in some environments."""
        new = self._recipe.draw([self._generators[i] for i in which])
        draw, weights = self._draw, curves.fresh(new.laws)
        put(draw.given, which, new.given)
        put(draw.laws, which, new.laws)
        put(draw[2:-1], which, new[2:-1])
        draw.normals[which] = new.normals
        put(self._weights, which, weights)
        put(self._snapshot, which, weights)
        self._rate[which] = self._start[which] = new.rate
        self._optimizer[which] = new.optimizer
        self._pace[which] = self._count[which] = 0
        self._loss[which] = self._measured[which] = new.first
        self._start_reports(which, new)

    def _start_reports(self, which: Index, new: Draw) -> None:
        """The report before any update, and the context."""
        now, jobs = self._now, self._jobs
        self._best[which] = np.where(new.hidden, np.inf, new.first)
        for part in (now.losses, now.train, now.validation, now.validated, now.gradients,
                     now.gradient, now.update, now.cosine):  # fmt: skip
            part[..., which] = np.nan
        for part in (now.step, now.age, now.rolled_back):
            part[which] = 0
        now.clipped[which] = now.change[which] = 1.0
        now.factor[which] = self._factors[new.shape, 0]
        now.rate[which] = jobs.start_rate[which] = new.rate
        now.first[which] = now.validation[-1, which] = np.where(new.hidden, np.nan, new.first)
        now.validated[-1, which] = 0.0
        jobs.total[which] = new.updates * self.decisions
        jobs.decisions[which] = self.decisions
        self._describe(which)

    def _describe(self, which: Index) -> None:
        """The context's part that a switch of the optimizer changes."""
        given, optimizer = self._draw.given, self._optimizer[which]
        none = np.zeros(len(which))
        self._jobs.ruler[which] = self._recipe.rulers[optimizer]
        self._jobs.fixed[:, which] = fixed(
            none + self._recipe.parameters, given.rows[which], given.classes[which], none, optimizer
        )

    def _keep(self, seen: Array, lost: NDArray[np.bool_]) -> None:
        """Remember the weights where the loss that may be seen is the lowest so far."""
        better = (seen < self._best) & ~lost
        self._best = np.where(better, seen, self._best)
        self._snapshot = choose(better, self._weights, self._snapshot)

    def _info(self) -> dict[str, Any]:
        """What `FineTuneEnv` tells, for all environments, with gymnasium's masks."""
        draw = self._draw
        info: dict[str, Any] = {
            "step": (self._count * draw.updates).astype(np.int64),
            "rate": self._rate.copy(),
            "optimizer": self._kinds[self._optimizer],
            "validation": self._loss.copy(),
            "metric": readings.accuracy(
                self._noise, self._measured, draw.laws.start, draw.given.classes
            ),
            "reason": np.full(self.num_envs, None, dtype=object),
            "task": self._names[draw.given.task],
        }
        every = np.ones(self.num_envs, dtype=np.bool_)
        return info | {f"_{name}": every.copy() for name in info}

    def _finals(
        self, observations: NDArray[np.float32], over: Index, lost: NDArray[np.bool_]
    ) -> dict[str, Any]:
        """The last observations and infos of the episodes that are over."""
        done = np.zeros(self.num_envs, dtype=np.bool_)
        done[over] = True
        last = np.full(self.num_envs, None, dtype=object)
        for i, row in zip(over, observations[over], strict=True):
            last[i] = row
        final = self._info()
        final["reason"][lost] = REASON
        for values in final.values():
            values[~done] = None if values.dtype == object else 0
        return {
            "final_obs": last,
            "_final_obs": done,
            "final_info": final,
            "_final_info": done.copy(),
        }

    def _turn(self, decided: Decisions) -> None:
        """Put the decisions in force."""
        self._weights = choose(decided.rollback, self._snapshot, self._weights)
        low, high = self._start / EXPLORE, self._start * EXPLORE
        share: NDArray[np.float64] | float = 1.0
        if self.actions.optimizers:
            new = np.where(decided.optimizer < 0, self._optimizer, decided.optimizer)
            share = self._exchange[self._optimizer, new]
            self._optimizer, self._start = new, self._start * share
            self._describe(self._columns)
        self._rate = turn_many(self._rate, decided, low, high, share)

    def _advance(self, decided: Decisions) -> tuple[Array, Array]:
        """Run one interval, report it -> mean training and validation loss."""
        draw, noise, at = self._draw, self._noise, self._count
        shape, normals = draw.shape, draw.normals[self._columns, at].T
        ahead, behind = self._factors[shape, at + 1], self._factors[shape, at]
        relative = single(self._rate / self._jobs.ruler)
        pace = relative * np.maximum(0.5 * (ahead + behind), 1e-6)
        begun = curves.losses(self._weights, draw.laws)[0]
        constants = self._constants[:, self._optimizer]
        self._weights = curves.interval(
            self._weights, draw.laws, pace, self._pace, draw.updates, constants
        )
        self._pace, self._count = pace, at + 1
        ended, expected = curves.losses(self._weights, draw.laws)
        batch, start = draw.given.batch, np.log(draw.laws.start)
        seen = readings.predictors(0.5 * np.log(begun * ended) - start, np.log10(pace), batch)
        logs = readings.train_losses(noise, begun, ended, seen, draw.updates, normals[OTHERS:])
        held = curves.held(draw.laws, pace, constants)
        validation = readings.validation_loss(noise, expected, held, normals[0])
        losses = np.exp(logs)
        train = np.add.reduce(np.where(np.isnan(losses), 0.0, losses), axis=0) / draw.updates
        seen = readings.predictors(
            logs[draw.updates.astype(np.intp) - 1, self._columns] - start,
            np.log10(relative * np.maximum(ahead + (behind - ahead) / draw.updates, 1e-6)),
            batch,
        )
        figures = readings.probe(self._probe[..., self._optimizer], seen, normals[1:OTHERS])
        self._report(decided, losses, train, validation, figures)
        return train, validation

    def _report(
        self,
        decided: Decisions,
        losses: Array,
        train: Array,
        validation: Array,
        figures: tuple[Array, Array, Array, Array],
    ) -> None:
        """What the features are made of."""
        now, draw, step = self._now, self._draw, single(self._count) * self._draw.updates
        shown = np.where(draw.hidden, np.nan, validation)
        for track, value in (
            (now.train, train),
            (now.validation, shown),
            (now.validated, step),
            (now.gradients, figures[0]),
        ):
            track[:-1] = track[1:]
            track[-1] = value
        gradient, clipped, update, cosine = figures
        self._now = now._replace(
            step=step, rate=single(self._rate), factor=self._factors[draw.shape, self._count],
            updates=draw.updates, age=single(self._count * draw.hidden), gradient=gradient,
            clipped=clipped, update=update, cosine=cosine, change=single(decided.change),
            rolled_back=single(decided.rollback), losses=losses,
        )  # fmt: skip


def choose(which: NDArray[np.bool_], one: Weights, other: Weights) -> Weights:
    """The one's weights where asked, elsewhere the other's."""
    return Weights(*(np.where(which, a, b) for a, b in zip(one, other, strict=True)))


def columns(arrays: tuple[Any, ...], which: Index) -> tuple[Any, ...]:
    """Some columns of (..., n) arrays."""
    return tuple(array[..., which] for array in arrays)


def put(mine: tuple[Any, ...], which: Index, new: tuple[Any, ...]) -> None:
    """Write the columns of (..., n) arrays; what all runs share, (..., 1), is the same in both."""
    for into, values in zip(mine, new, strict=True):
        if into.shape[-1] > which[-1]:
            into[..., which] = values
