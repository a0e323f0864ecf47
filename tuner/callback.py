"""TunerCallback: the policy at the tiller of a transformers Trainer."""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from envs import probe
from envs.errors import BadInput, SteersmanError
from envs.gauge import Gauge
from envs.handles import Handles
from envs.instruments import (
    Eyes,
    Rates,
    Slice,
    describe,
    listen,
    objective_of,
    read_weights,
    write_weights,
)
from envs.job import finite
from envs.knobs import Knobs
from envs.processes import rank, world
from envs.progress import Context, Progress
from envs.snapshot import Snapshot, recall, remember
from tuner.audit import Pilot
from tuner.guard import alarm, limits_of
from tuner.logbook import Logbook
from tuner.processes import Order, share
from tuner.steer import Helm

logger = logging.getLogger(__name__)

WATCH = 25  # updates between two looks at the losses, when decisions are further apart
RENEW = 10  # and at least between two copies of the best weights, when only the guard needs them
REFUSED = ("deepspeed", "megatron_lm", "xla")  # engines whose optimizers are out of reach
LOG, WEIGHTS = "tuner.jsonl", "tuner.safetensors"


def guarded(event: Callable[..., None]) -> Callable[..., None]:
    """Fail open: an exception in the tuner switches it off and leaves the user's run alone.

    One process must not leave alone, or the others wait for it: there the tuner goes on, and all
    leave together at the next decision.
    """

    @functools.wraps(event)
    def run(self: "TunerCallback", args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._live:
            return
        try:
            if self._eyes.error is not None and not self._many:
                raise self._eyes.error
            event(self, args, state, control, **kwargs)
        except Exception as error:
            if self._many:
                self._failure = self._failure or error
            else:
                self._give_up(error, state.global_step)

    return run


class TunerCallback(TrainerCallback, ExportableState):
    """``trainer.add_callback(TunerCallback("default"))`` steers the learning rate.

    The user's schedule runs on; every ``ceil(max_steps / decisions)`` updates the policy may scale
    it, within the limits of the mode. Training losses and gradients are read by hooks; validation
    losses are the user's evaluations, or those of ``eval_dataset``'s first ``eval_rows`` rows,
    evaluated by the callback before each decision. Resuming from a checkpoint is exact.

    With several processes (DDP, FSDP2) rank 0 decides on the figures of all, and all carry it out.

    Where the loss is computed outside of the model, as TRL's Trainers do, a callback cannot see it:
    it goes by the logged losses, and asks for one an interval. ``trainer=`` gives it each update's
    loss, and validation losses on the Trainer's own evaluation data. Where there is a reward (GRPO,
    RLOO) the loss is no measure: the cost is one less the logged reward.

    A policy that was trained to may also turn weight decay, clipping and the number of layers in
    training, and change the optimizer if it is a `envs.switchable.SwitchableOptimizer`.

    Arguments:
        policy: ``default``, the one that comes with the package; a policy file, an MLflow URI
            (``models:/``, ``runs:/``), or a loaded policy.
        mode: ``careful`` (0.1 to 3 times the schedule, small steps) or ``explore`` (1.5 decades
            either way, and rollbacks), for those who do not trust their rate.
        advise: only write the log; the run is bit for bit the one without the callback.
        decisions: how often to decide in the run; by default as in the policy's training.
        classes: number of classes; by default as the model's configuration has it.
        log: the audit log; by default ``tuner.jsonl`` in the Trainer's output folder.
        sha256: the policy file's hash, to pin it.
        trainer: the Trainer that the callback is added to; it computes the losses then.
    """

    def __init__(
        self,
        policy: str | Path | Pilot,
        *,
        mode: str = "careful",
        advise: bool = False,
        eval_dataset: Any = None,
        eval_rows: int = 128,
        decisions: int | None = None,
        classes: int | None = None,
        log: str | Path | None = None,
        sha256: str | None = None,
        trainer: Any = None,
    ) -> None:
        self._limits = limits_of(mode)
        for name, count in (("eval_rows", eval_rows), ("decisions", decisions)):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise BadInput(f"callback: {name}: {count!r} is not a count; give 1 or more")
        self._policy = _load(policy, sha256)
        self._advise, self._eval_dataset, self._eval_rows = advise, eval_dataset, eval_rows
        self._decisions = decisions or int(self._policy.manifest.decisions)
        self._classes, self._log = classes, log
        self._asked, self._trainer = decisions, trainer
        self._deaf: Callable[[], None] | None = None  # takes the ear off the Trainer
        self._args = {
            "policy": str(policy) if isinstance(policy, str | Path) else "",
            "mode": mode,
            "advise": advise,
            "eval_rows": eval_rows,
            "decisions": decisions,
            "classes": classes,
            "log": None if log is None else str(log),
            "sha256": self._policy.sha256 or None,
        }
        self._live = False
        self._begun = False

    # -- the run's beginning and end -------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the run, refuse one that cannot be steered, and take up a resumed one."""
        self._release()
        self._begun = self._live = False
        self._failure: Exception | None = None
        self._saved: dict[str, Any] = {}  # what a checkpoint brought
        try:
            self._begin(args, state, **kwargs)
        except SteersmanError:
            self._release()
            raise
        except Exception as error:
            self._failure = error
            logger.warning("the tuner failed and is off; your schedule rules: %s", error)
        if share([], args.device, self._failure is not None)[1]:
            self._begun = self._live = False
            self._release()
            if self._saved and not self._advise:  # the tuner's settings among it
                self._handles.put(self._handles.given, self._knobs_of(self._saved))
                self._rates.put(self._rates.start)
        elif self._saved:
            self._agree(args, state, control)

    def _begin(self, args: Any, state: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs.get("model"), kwargs.get("optimizer")
        if model is None or optimizer is None:
            raise BadInput("trainer: optimizer: there is none; the tuner has nothing to steer")
        _check(args, state, optimizer, self._asked)
        if self._trainer is not None and self._trainer.args is not args:
            raise BadInput("callback: trainer: not the one that trains; give that one")
        state.stateful_callbacks.setdefault(type(self).__name__, {})
        saved = _saved(state.stateful_callbacks[type(self).__name__])
        saved = saved if state.global_step > 0 else None
        base = saved["base_rates"] if saved else None
        self._rates = Rates(kwargs.get("lr_scheduler"), base)
        users = saved.get("user", {}) if saved else {}
        actions = self._policy.manifest.actions
        self._handles = Handles(
            args, model, optimizer, self._rates.start, actions, trainer=self._trainer, **users
        )
        self._knobs, self._saved = self._handles.given, saved or {}
        self._model, self._optimizer = model, optimizer
        averaged = args.average_tokens_across_devices
        self._eyes = Eyes(model, args.gradient_accumulation_steps, averaged)
        self._many, self._gauge = world() > 1, Gauge()
        self._probe = probe.Probe()
        self._slice = self._rows_of(args)
        self._own = self._slice is not None
        self._see_validation(args)
        self._loader = kwargs.get("train_dataloader")
        self._total = state.max_steps
        self._interval = max(1, math.ceil(self._total / self._decisions))
        self._context = Context(
            total=self._total,
            decisions=math.ceil(self._total / self._interval),
            optimizer=self._knobs.optimizer,
            start_rate=self._rates.start,
            objective=objective_of(args),
            **describe(model, self._loader, self._classes, self._total * _batch(args)),
        )
        self._rank = rank()
        log = Path(self._log) if self._log is not None else Path(args.output_dir) / LOG
        record = log if self._rank == 0 else None
        start, advise, hands = self._rates.start, self._advise, self._handles
        limits = replace(self._limits, switch=hands.switch, turns=hands.dials)
        self._helm = Helm(self._policy, limits, start, advise=advise, log=record)
        self._book = Logbook(next=state.global_step)
        self._snapshot: Snapshot | None = None
        if saved:
            self._resume(saved, args, state.global_step)
        else:
            self._helm.start()
        self._begun, self._live = True, not self._helm.off
        self._quiet = args.logging_nan_inf_filter and not self._advise
        if self._quiet:
            args.logging_nan_inf_filter = False
            logger.warning("logging_nan_inf_filter is off: it logs a loss of NaN as 0")
        if self._trainer is not None and not self._rewarded:
            self._deaf = listen(self._trainer, self._eyes.see_step)
        if not self._live:
            self._release()

    @property
    def _rewarded(self) -> bool:
        """The Trainer is one of those whose loss is no measure."""
        return hasattr(self._trainer, "reward_funcs")

    def _rows_of(self, args: Any) -> Slice | None:
        """What the callback evaluates itself."""
        rows, judge = self._eval_dataset, None if self._rewarded else self._trainer
        if rows is None and judge is not None:
            rows = judge.eval_dataset
            rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
            rows = rows if hasattr(rows, "__len__") and hasattr(rows, "__getitem__") else None
        if rows is None:
            return None
        return Slice(rows, self._eval_rows, args.per_device_eval_batch_size, judge)

    def _see_validation(self, args: Any) -> None:
        """Without validation losses only policies that were trained for it go on."""
        if self._slice is not None or args.eval_on_start or args.eval_strategy != "no":
            return
        ranges = {each.name: each for each in self._policy.manifest.features}
        known = ranges.get("has_validation")
        way_out = "give eval_dataset=, or let the Trainer evaluate (eval_strategy)"
        if known is not None and known.low > 0:
            raise BadInput(
                "callback: eval_dataset: there is none, the Trainer evaluates nothing, and the "
                f"policy was never trained without validation losses; {way_out}"
            )
        logger.warning("no validation losses: the tuner goes by training losses; %s", way_out)

    def _drop_slice(self) -> None:
        """What it found is the loss of another objective."""
        logger.warning(
            "eval_dataset is not used: the model's own loss is not the one that is trained; give "
            "the callback trainer= for that one"
        )
        self._slice, book = None, self._book
        book.history = [replace(r, validation=math.nan) for r in book.history]
        book.best, book.best_step, book.judged = math.inf, -1, False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model and the arguments as they were found."""
        if self._begun and self._quiet:
            args.logging_nan_inf_filter = True
        if self._begun:
            self._handles.leave(self._knobs)
        self._live = False
        self._release()

    # -- an update ---------------------------------------------------------------------------

    @guarded
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide, if it is time to; look at the gradients of an interval's last two updates."""
        if state.global_step >= self._book.next:
            self._decide(state.global_step)
        if self._live and self._end() - state.global_step <= 2:
            self._eyes.watch_gradients()

    @guarded
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are in and clipped."""
        if self._eyes.watching:
            self._probe.gradient(self._eyes.gradient(self._optimizer))
            if state.global_step + 1 == self._end():
                self._probe.before(self._eyes.sampled)

    @guarded
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights have moved."""
        if self._eyes.watching and state.global_step + 1 == self._end():
            self._probe.after(self._eyes.sampled)

    @guarded
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close a full interval; never let weights that are not finite be saved or handed over."""
        self._eyes.end_update()
        step = state.global_step
        if self._eyes.foreign and self._trainer is None and self._slice is not None:
            self._drop_slice()
        if step == self._end():
            self._book.report = self._close(step)
            if self._eyes.blind and self._deaf is None and not self._advise:
                control.should_log = True
        look = step >= self._total or (step - self._book.last) % WATCH == 0
        self._watch(step, control, look)

    @guarded
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Likewise where evaluations and checkpoints come with the epoch, and at an early stop."""
        self._watch(state.global_step, control, control.should_training_stop)

    @guarded
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take note of the validation loss of the user's evaluation."""
        if self._slice is None:
            metrics = kwargs["metrics"]
            if "eval_reward" in metrics:
                cost = self._gauge.cost(metrics, "eval_")
                metrics = {} if cost is None else {"eval_loss": cost}
            self._book.note(metrics, state.global_step)

    @guarded
    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The logged loss stands in where the model's output has none."""
        if not self._eyes.blind or self._deaf is not None:
            return
        cost = self._gauge.cost(kwargs.get("logs") or {})
        if cost is not None and (report := self._book.report) is not None:
            self._book.report = replace(report, losses=(*report.losses, cost))
        elif cost is not None:
            self._eyes.losses.append(cost)

    # -- a decision ----------------------------------------------------------------------------

    def _end(self) -> int:
        return min(self._book.next, self._total)

    def _close(self, step: int) -> Progress:
        """The report of the updates since the last decision; the same figures as a `TorchJob`'s."""
        gradient, clipped, update, cosine = self._probe.read(self._eyes.sharded)
        self._eyes.rest()
        return replace(
            self._glance(step), gradient=gradient, clipped=clipped, update=update, cosine=cosine
        )

    def _watch(self, step: int, control: Any, look: bool) -> None:
        """Decide at once if the run diverged: before a checkpoint, an evaluation, or the end."""
        look = look or control.should_save or control.should_evaluate
        if self._advise or not look or self._book.last in (-1, step):
            return
        report = self._book.report or self._glance(step)
        trouble = False
        if self._rank == 0:
            history = [*self._book.history, self._book.shown(report, None)]
            trouble = bool(alarm(history, self._limits, self._knobs.rate / self._helm.start_now))
        (found,), failed = share([trouble], self._eyes.device, self._failing)
        if found or failed:
            self._book.report = self._book.report or self._close(step)
            self._decide(step, fresh=False)

    def _glance(self, step: int) -> Progress:
        """A report without the probe's figures."""
        return Progress(
            step=step,
            rate=self._knobs.rate,
            factor=self._rates.factor,
            losses=tuple(self._eyes.fetch()),
            finite=self._eyes.everywhere(finite(self._eyes.parameters)),
        )

    def _decide(self, step: int, fresh: bool = True) -> None:
        """One decision: rank 0 takes it, all carry it out. fresh: look at the validation loss."""
        knobs = self._handles.given
        order = stop = Order(knobs.rate, rollback=False, off=True, keep=False)
        try:
            self._book.report = self._book.report or self._glance(step)
            value = self._validation() if fresh else None
            if self._rank == 0:
                order, knobs = self._think(step, value)
        except Exception as error:
            self._failure = self._failure or error
        numbers, failed = share(
            (*order, *self._handles.numbers(knobs)), self._eyes.device, self._failing
        )
        order, knobs = Order(*numbers[:4]), self._handles.knobs(numbers[0], *numbers[4:])
        if failed:
            mine = self._failure or self._eyes.error
            self._helm.fail(mine or RuntimeError("another process failed"), step)
            order, knobs = stop, self._handles.given
        self._eyes.losses, self._book.report = [], None
        self._book.last, self._book.next = step, (step // self._interval + 1) * self._interval
        if not self._advise:
            if order.keep:
                self._snapshot = remember(self._eyes.parameters, into=self._snapshot)
            if order.rollback and self._snapshot is not None:
                recall(self._snapshot, self._eyes.parameters, self._optimizer)
                self._eyes.reshard()
            if knobs != self._knobs:
                self._turn(knobs)
        if order.off:
            self._live = False
            self._release()

    @property
    def _failing(self) -> bool:
        return self._failure is not None or self._eyes.error is not None

    def _validation(self) -> float | None:
        """The latest validation loss, if it is a new one."""
        if self._slice is None:
            return self._book.news()
        if self._rank != 0 and not self._eyes.sharded and self._trainer is None:
            return None
        loss = self._slice.loss(self._model, self._optimizer, self._loader)
        self._eyes.reshard()
        return loss

    def _think(self, step: int, value: float | None) -> tuple[Order, Knobs]:
        """Observe, ask, and say what is to be done. value: a new validation loss."""
        book = self._book
        book.add(book.shown(book.report or self._glance(step), value))
        trouble = alarm(book.history, self._limits, self._knobs.rate / self._helm.start_now)
        # A policy rolls back to the very best, as in its training; the guard to a little before.
        keep = not trouble and book.is_best(0 if self._limits.rollback else RENEW)
        warming = self._rates.warming
        ruling = self._helm.decide(book.history, self._context, self._knobs, warming=warming)
        book.applied = ruling.decision
        knobs = self._handles.fit(ruling.turn(self._knobs, self._context))
        return Order(knobs.rate, ruling.decision.rollback, ruling.off, keep), knobs

    def _turn(self, knobs: Knobs) -> None:
        self._handles.put(knobs, self._knobs)
        self._rates.put(knobs.rate)
        self._knobs = knobs
        self._context = replace(self._context, optimizer=knobs.optimizer)

    def _give_up(self, error: Exception, step: int) -> None:
        self._live = False
        try:
            self._helm.fail(error, step)
            if not self._advise:
                self._turn(self._handles.given)
        finally:
            self._release()

    def _release(self) -> None:
        if hasattr(self, "_eyes"):
            self._eyes.close()
        if self._deaf is not None:
            self._deaf()
        self._deaf, self._snapshot = None, None

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """For the Trainer's checkpoint: JSON only, no object and no code."""
        if not self._begun:
            return {"args": self._args, "attributes": {}}
        saved = {
            "base_rates": self._rates.base,
            "rate": self._knobs.rate,
            "knobs": asdict(self._knobs),
            "user": {"decays": self._handles.decays, "kind": self._handles.kind},
            "helm": self._helm.state(),
            "book": self._book.to_json(),
            "losses": self._eyes.fetch(),
            "kept": self._snapshot is not None,
            "own_evaluation": self._own,
            "total": self._total,
            "bounded": self._gauge.bounded,
            "dropped": self._own and self._slice is None,
        }
        return {"args": self._args, "attributes": {"saved": saved}}

    def _resume(self, saved: dict[str, Any], args: Any, step: int) -> None:
        if saved["own_evaluation"] != self._own:
            raise BadInput(
                "callback: eval_dataset: the checkpoint's run "
                f"{'had one' if saved['own_evaluation'] else 'had none'}; give the same, and leave "
                "restore_callback_states_from_checkpoint off"
            )
        if (total := saved["total"]) != self._total:
            logger.warning("the run was planned for %d updates: resuming is not exact", total)
        self._helm.load_state(saved["helm"])
        self._book = Logbook.from_json(saved["book"])
        self._eyes.losses = list(saved["losses"])
        if not self._advise:
            self._turn(self._knobs_of(saved))
        self._gauge = Gauge(saved.get("bounded"))
        self._slice = None if saved.get("dropped") else self._slice
        folder = _folder(args, step)
        gradient, self._snapshot = read_weights(folder / self._weights, step, self._eyes)
        self._eyes.last_gradient = gradient
        if gradient is not None:
            self._probe.gradient(gradient)

    def _knobs_of(self, saved: dict[str, Any]) -> Knobs:
        """Those in force when the checkpoint was made."""
        own = asdict(self._handles.given)
        return Knobs(**saved.get("knobs", own | {"rate": saved["rate"]}))

    @guarded
    def _agree(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All processes come back to the best weights, or none: their disks may differ."""
        if share([], self._eyes.device, self._snapshot is None)[1]:
            self._snapshot = None
            if self._saved["kept"]:
                folder = _folder(args, state.global_step)
                logger.warning("%s: the best weights are not there: these take their place", folder)
                self._snapshot = remember(self._eyes.parameters)

    @property
    def _weights(self) -> str:
        """Under FSDP each process keeps its own."""
        return f"{self._rank}.{WEIGHTS}" if self._eyes.sharded else WEIGHTS

    @guarded
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the weights to come back to beside the checkpoint."""
        folder = _folder(args, state.global_step)
        sample = self._eyes.last_gradient if self._eyes.watching else None
        mine = self._rank == 0 or self._eyes.sharded
        if mine and folder.is_dir() and (self._snapshot or sample is not None):
            write_weights(folder / self._weights, state.global_step, sample, self._snapshot or [])


def _check(args: Any, state: Any, optimizer: Any, asked: int | None) -> None:
    """Refuse what cannot be steered."""
    engine = getattr(getattr(optimizer, "accelerator_state", None), "distributed_type", "")
    engine = "deepspeed" if args.deepspeed else str(getattr(engine, "value", engine)).lower()
    if engine in REFUSED:
        raise BadInput(f"trainer: {engine}: not supported by the tuner; train with DDP or FSDP2")
    if state.max_steps < 1:
        raise BadInput(
            f"trainer: max_steps: {state.max_steps} leaves nothing to steer; ask for 1 update or "
            "more"
        )
    if asked is not None and asked > state.max_steps:
        raise BadInput(
            f"callback: decisions: {asked} are more than the run's {state.max_steps} updates; give "
            f"{state.max_steps} at most, or leave it out"
        )


def _batch(args: Any) -> int:
    """Rows of an update, of all processes."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def _load(given: str | Path | Pilot, sha256: str | None) -> Pilot:
    if not isinstance(given, str | Path):
        return given
    from tuner.tracking import open_policy

    return open_policy(str(given), sha256)


def _saved(stored: Any) -> dict[str, Any] | None:
    """The callback's part of a checkpoint's state; None if it had none."""
    stored = stored[-1] if isinstance(stored, list) and stored else stored
    found: dict[str, Any] | None = stored.get("attributes", {}).get("saved") if stored else None
    return found


def _folder(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"
