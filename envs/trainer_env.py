"""A user's own Trainer as a Gymnasium environment."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from inspect import iscoroutinefunction
from typing import Any

from torch import nn

from envs.chance import every, put_back
from envs.env import FineTuneEnv
from envs.errors import BadInput
from envs.gauge import Gauge
from envs.instruments import Rates, rows_of
from envs.job import Score
from envs.knobs import Actions, Knobs, Optimizer, Shape
from envs.refusals import refuse_job
from envs.task import SPLITS, Split, Task
from envs.trainer_job import Setup, TrainerJob, in_force, optimizer_of

Factory = Callable[[int], Any]

SHAPES: dict[str, Shape] = {"linear": "linear", "cosine": "cosine"}  # others count as constant


def trainer_env(
    trainer_factory: Factory,
    *,
    decisions: int = 10,
    actions: Actions | None = None,
    spread: float = 1.5,
) -> FineTuneEnv:
    """Any transformers or TRL Trainer, subclasses included, as a `FineTuneEnv`.

    Id: ``gymnasium.make("Steersman/Trainer-v0", trainer_factory=factory)``. Observation, action,
    reward and end are those of `FineTuneEnv`; an episode with *keep* alone is the factory's
    ``trainer.train()`` bit for bit, at the rate that was drawn.

    Arguments:
        trainer_factory: a seed -> a Trainer that has not begun, with ``eval_dataset``. Its model,
            its data and ``TrainingArguments(seed=...)`` should come of the seed.
        decisions: how often to decide in a run.
        actions: the action view.
        spread: half-width, in decades, of the starting rate around the Trainer's own.

    Raises:
        BadInput: the Trainer has no rows to learn from or to be judged by, no updates, a schedule
            that cannot be scaled, or is none that a job can be made of (`envs.refusals`).
    """
    if not isinstance(decisions, int) or decisions < 1:
        raise BadInput(f"environment: decisions: {decisions!r} is not a count; give 1 or more")
    with put_back(every()):
        args, steps, rate, kind = _planned(trainer_factory)
    task = Task(
        dataset="trainer",
        model="own",
        objective="own",
        steps=steps,
        interval=min(steps, -(-steps // decisions)),
        batch=args.per_device_train_batch_size,
        rows=max(args.per_device_train_batch_size, 1000),
    )
    shape = SHAPES.get(str(getattr(args.lr_scheduler_type, "value", "")), "constant")
    return FineTuneEnv(
        task,
        actions=actions,
        spread=spread,
        shape=shape,
        center=rate,
        optimizers=(kind,),
        make_job=partial(TrainerJob, make=partial(_prepare, trainer_factory)),
    )


def _planned(factory: Factory) -> tuple[Any, int, float, Optimizer]:
    """A Trainer's arguments, updates, peak rate and optimizer; looked at before any episode."""
    trainer = factory(0)
    for name in ("args", "train", "training_step", "get_eval_dataloader"):
        if not hasattr(trainer, name):
            raise BadInput(
                f"environment: trainer_factory: gave a {type(trainer).__name__} without {name!r}; "
                "let it return a transformers Trainer"
            )
    refuse_job(trainer)
    for split in SPLITS:
        _data(trainer, split)
    batches = _batches(trainer)
    if trainer.optimizer is None:
        Knobs(trainer.args.learning_rate)  # refuses what no optimizer takes
    steps = int(trainer.set_initial_training_values(trainer.args, batches)[-1])
    if steps < 1:
        name = "num_train_epochs" if trainer.args.max_steps < 0 else "max_steps"
        raise BadInput(f"trainer: {name}: {getattr(trainer.args, name)!r} is no update; give more")
    kind = in_force(trainer, optimizer_of(trainer), Knobs()).optimizer
    trainer.create_optimizer_and_scheduler(steps)
    return trainer.args, steps, Rates(trainer.lr_scheduler).start, kind


def _prepare(factory: Factory, task: Task, seed: int, knobs: Knobs) -> Setup:
    trainer = factory(seed)
    trainer.args.learning_rate = knobs.rate
    trainer.args.logging_nan_inf_filter = False
    classes = getattr(getattr(trainer.model, "config", None), "num_labels", None)
    if isinstance(getattr(trainer, "reward_funcs", None), list):  # trainers may share it
        trainer.reward_funcs = [_checked(reward) for reward in trainer.reward_funcs]
    judge = partial(score, gauge=Gauge())
    seen = task.steps * trainer.get_total_train_batch_size(trainer.args)
    return Setup(trainer, judge, rows_of(trainer.train_dataset, seen), classes or 2)


def score(trainer: Any, split: Split, gauge: Gauge | None = None) -> Score:
    """A Trainer's own evaluation, without its callbacks: mean loss, and the first other metric.

    An ``eval_dataset`` that is a dictionary has a dataset for each split, or one is all. Of a
    Trainer that learns by reward, the cost that the gauge makes of the mean reward, and that.
    """
    data = _data(trainer, split)
    told = trainer.evaluation_loop(
        trainer.get_eval_dataloader(data), "Evaluation", metric_key_prefix="eval"
    ).metrics
    if hasattr(trainer, "reward_funcs"):
        gauge, reward = gauge or Gauge(), _reward(trainer)
        if gauge.bounded is None and not math.isfinite(reward):
            raise BadInput(
                f"trainer: reward_funcs: {reward} is the mean reward before training; let them "
                "return finite numbers"
            )
        cost = gauge.cost({"reward": reward})
        return Score(math.nan if cost is None else cost, reward)
    if "eval_loss" not in told:
        raise BadInput(
            "trainer: eval_dataset: its rows give no loss; name the labels' columns in label_names"
        )
    timed = ("eval_loss", "eval_model_preparation_time")
    others = [float(v) for k, v in told.items() if k not in timed and isinstance(v, int | float)]
    loss = float(told["eval_loss"])
    if loss < 0:
        raise BadInput(
            f"trainer: eval_loss: {loss:.4g} is negative, and a tuner needs a cost that is not; "
            "add what makes it so"
        )
    return Score(loss, others[0] if others else -loss)


def _checked(reward: Any) -> Any:
    """The same reward function, but what it must not return is told in one sentence.

    A number or None for each text is as TRL has it. Models are left alone.
    """
    if isinstance(reward, nn.Module):
        return reward
    plain = reward
    while isinstance(plain, partial):
        plain = plain.func
    name = getattr(plain, "__name__", type(plain).__name__)

    def checked(found: Any, completions: Sequence[Any]) -> list[float | None]:
        try:
            values = [None if value is None else float(value) for value in found]
        except (TypeError, ValueError, RuntimeError):
            raise BadInput(
                f"trainer: reward_funcs: {name} returned {str(found)[:60]}; let it return a list "
                "with a number, or None, for each text"
            ) from None
        if len(values) != len(completions):
            raise BadInput(
                f"trainer: reward_funcs: {name} returned {len(values)} numbers for "
                f"{len(completions)} texts; let it return one, or None, for each"
            )
        return values

    if iscoroutinefunction(plain) or iscoroutinefunction(plain.__call__):

        async def pay_later(completions: Sequence[Any], **more: Any) -> list[float | None]:
            return checked(await reward(completions=completions, **more), completions)

        return pay_later

    def pay(completions: Sequence[Any], **more: Any) -> list[float | None]:
        return checked(reward(completions=completions, **more), completions)

    return pay


def _batches(trainer: Any) -> Any:
    """The loader of the rows to learn from; torch and transformers refuse some that have none."""
    data = trainer.train_dataset
    try:
        loader = trainer.get_train_dataloader()
        if rows_of(loader, seen=1):
            return loader
    except ValueError:
        if data is not None and rows_of(data, seen=1):
            raise
    lack = "the Trainer has none" if data is None else "no batch in it"
    raise BadInput(f"trainer: train_dataset: {lack}, so there is nothing to learn; give it rows")


def _data(trainer: Any, split: Split) -> Any:
    """The rows that say how good a run is."""
    data = trainer.eval_dataset
    if isinstance(data, dict):
        data = data.get(split, next(iter(data.values()), None))
    if data is None or not rows_of(data, seen=1):
        lack = "the Trainer has none" if data is None else f"no rows in it for {split}"
        raise BadInput(
            f"trainer: eval_dataset: {lack}, so nothing says how good a run is; give it some"
        )
    return data


def _reward(trainer: Any) -> float:
    """The mean reward of the evaluation just made: TRL keeps it for its next line of the log."""
    kept = getattr(trainer, "_metrics", {}).get("eval", {})
    rewards = list(kept.get("reward", ()))
    kept.clear()
    if not rewards:
        raise BadInput(
            f"trainer: {type(trainer).__name__} tells no reward of its evaluation; "
            "use TRL's GRPOTrainer or RLOOTrainer"
        )
    known = [reward for reward in rewards if not math.isnan(reward)]  # as TRL's log has it
    return float(sum(known) / len(known)) if known else math.nan
