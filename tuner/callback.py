"""TunerCallback: the policy at the tiller of a transformers Trainer."""

import functools
import logging
import math
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from envs.errors import BadInput, SteersmanError
from envs.handles import Handles, refuse_unknown
from envs.instruments import Rates, describe
from envs.processes import rank
from envs.progress import Context
from envs.purpose import objective_of
from envs.refusals import refuse_arguments, refuse_engine
from tuner import checkpoint, processes
from tuner.audit import Pilot
from tuner.crew import Crew
from tuner.guard import limits_of, within
from tuner.sight import Sight, need_validation
from tuner.steer import Helm

logger = logging.getLogger(__name__)

WATCH = 25  # updates between two looks at the losses, when decisions are further apart
LOG = "tuner.jsonl"


def guarded(event: Callable[..., None]) -> Callable[..., None]:
    """Fail open: an exception in the tuner switches it off and leaves the user's run alone.

    One process must not leave alone, or the others wait for it: there the tuner goes on, and all
    leave together at the next decision.
    """

    @functools.wraps(event)
    def run(self: "TunerCallback", args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._begun or self._crew.done:
            return
        crew = self._crew
        try:
            if crew.sight.eyes.error is not None and not crew.many:
                raise crew.sight.eyes.error
            event(self, args, state, control, **kwargs)
        except Exception as error:
            if crew.many:
                crew.failure = crew.failure or error
            else:
                crew.give_up(error, state.global_step)

    return run


class TunerCallback(TrainerCallback, ExportableState):
    """``trainer.add_callback(TunerCallback("default"))`` steers the learning rate.

    The user's schedule runs on; every ``ceil(max_steps / decisions)`` updates the policy may scale
    it, within the limits of the mode. Training losses and gradients are read by hooks; validation
    losses are the user's evaluations, or those of ``eval_dataset``'s first ``eval_rows`` rows,
    evaluated by the callback before each decision. Resuming from a checkpoint is exact, if it lies
    in ``output_dir`` or is named by the arguments' ``resume_from_checkpoint``: elsewhere the best
    weights so far, which a rollback comes back to, are not found, and the log says so.
    The best weights are kept on the GPU, or on the host where that has no room for two copies.

    With several processes (DDP, FSDP2) rank 0 decides on the figures of all, and all carry it out.

    Where the loss is computed outside of the model, as TRL's Trainers do, a callback cannot see it:
    it goes by the logged losses, and asks for one an interval. ``trainer=`` gives it each update's
    loss, and validation losses on the Trainer's own evaluation data. Where there is a reward (GRPO,
    RLOO) the loss is no measure: the cost is one less the logged reward, and the validation cost
    that of the user's evaluations.

    A policy that was trained to may also give a new head a rate of its own from the first update
    on, turn weight decay, clipping, LoRA's scaling and the number of layers in training, and change
    the optimizer if it is a `envs.switchable.SwitchableOptimizer`. At the end, or when it is off,
    LoRA's scaling is the user's again, and its weights are such that the model is the one that was
    trained. A run that was interrupted ends without a word to its callbacks: give the same one to
    the next ``train()``, or `close` it.

    Arguments:
        policy: ``default``, the one that comes with the package; a policy file, an MLflow URI
            (``models:/``, ``runs:/``), or a loaded policy.
        mode: ``careful`` (0.1 to 3 times the schedule, small steps; a new head's rate at most
            three times as high; a rate near the rule of thumb is left alone where the policy was
            not trained on the run's objective) or ``explore`` (1.5 decades either way, and
            rollbacks; a new head's rate as the policy has it), for those who do not trust theirs.
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
        if trainer is not None:
            refuse_arguments(trainer.args)
        self._policy = _load(policy, sha256)
        self._advise, self._eval_dataset, self._eval_rows = advise, eval_dataset, eval_rows
        self._decisions = decisions or int(self._policy.manifest.decisions)
        self._classes, self._log = classes, log
        self._asked, self._trainer = decisions, trainer
        self._hooks = ExitStack()  # what takes everything off the run again
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
        self._begun = False

    # -- the run's beginning and end -------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what the Trainer would stumble over before training begins."""
        refuse_arguments(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the run, refuse one that cannot be steered, and take up a resumed one."""
        failed = False
        self._saved: dict[str, Any] = {}  # what a checkpoint brought
        try:
            self._leave(loaded=state.global_step > 0)  # a run that was cut short
            self._begin(args, state, **kwargs)
        except SteersmanError:
            self._hooks.close()
            raise
        except Exception as error:
            failed = True
            logger.warning("the tuner failed and is off; your schedule rules: %s", error)
        (run,), failed = processes.share([secrets.randbelow(2**53)], args.device, failed)
        if failed:
            self._begun = False
            self._hooks.close()
            if self._saved and not self._advise:  # the tuner's settings among it
                given = self._handles.given
                self._handles.settle(checkpoint.knobs_of(self._saved, given).adapter_scale)
                self._handles.put(given)
                self._rates.put(self._rates.start)
            return
        self._crew.run = int(run)
        if self._saved:
            self._agree(args, state, control)
        else:
            self._open(args, state, control)

    def _begin(self, args: Any, state: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs.get("model"), kwargs.get("optimizer")
        if model is None or optimizer is None:
            raise BadInput("trainer: optimizer: there is none; the tuner has nothing to steer")
        if getattr(state, "tuned", False):
            raise BadInput("callback: TunerCallback: the Trainer has two of them; remove one")
        state.tuned = True  # each run has a state of its own, and a checkpoint keeps no such word
        _check(args, state, optimizer, self._asked)
        if self._trainer is not None and self._trainer.args is not args:
            raise BadInput("callback: trainer: not the one that trains; give that one")
        step, total, manifest = state.global_step, state.max_steps, self._policy.manifest
        stored = state.stateful_callbacks.setdefault(type(self).__name__, {})
        saved = checkpoint.found_in(stored) if step > 0 else None
        base = saved["base_rates"] if saved else None
        self._rates = Rates(kwargs.get("lr_scheduler"), base)
        if self._rates.rising(total - 2) and (warmup := args.get_warmup_steps(total)) >= total:
            logger.warning(
                "warmup_steps: %d in a run of %d updates: the rate never reaches its peak, and the "
                "tuner never raises it; ask for fewer",
                warmup,
                total,
            )
        users = saved.get("user", {}) if saved else {}
        loader = kwargs.get("train_dataloader")
        found = describe(model, loader, self._classes, total * _batch(args))
        start = self._rates.start
        self._handles = Handles(
            args,
            model,
            optimizer,
            start,
            within(manifest.actions, self._limits),
            trainer=self._trainer,
            **users,
        )
        self._hooks.callback(self._handles.close)
        lacking = {name for name, _ in manifest.actions.turns} - {*self._handles.dials}
        if lacking and rank() == 0:
            logger.warning(
                "turns: %s: the policy turns them, and this run cannot; they stay as they are",
                ", ".join(sorted(lacking)),
            )
        self._saved = saved or {}
        sight = Sight(
            args, model, optimizer, loader, self._trainer, self._eval_dataset, self._eval_rows
        )
        self._hooks.callback(sight.close)
        if not sight.own:
            need_validation(args, manifest.features, sight.rewarded)
        interval = max(1, math.ceil(total / self._decisions))
        context = Context(
            total=total,
            decisions=math.ceil(total / interval),
            optimizer=self._handles.given.optimizer,
            start_rate=start,
            objective=objective_of(args, model),
            **found,
        )
        log = Path(self._log) if self._log is not None else Path(args.output_dir) / LOG
        record = log if rank() == 0 else None
        limits = replace(self._limits, switch=self._handles.switch, turns=self._handles.dials)
        helm = Helm(self._policy, limits, start, advise=self._advise, log=record)
        self._crew = Crew(
            helm, sight, self._rates, self._handles, context, optimizer,
            interval=interval, step=step,
        )  # fmt: skip
        self._hooks.callback(self._crew.leave)
        if saved:
            checkpoint.resume(self._crew, saved, checkpoint.folders_of(args, step), step)
        else:
            helm.start()
        self._begun = True
        if helm.off:
            self._crew.leave()

    @guarded
    def _open(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the run is opened with, once no process has failed."""
        if not self._advise:
            self._crew.turn(self._handles.opening)

    @guarded
    def _agree(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint.agree(self._crew, self._saved, checkpoint.folder_of(args, state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the run as it was found."""
        self.close()

    def close(self) -> None:
        """Leave model, optimizer and arguments as they were found, as at the end of training.

        For who goes on without the callback after an interrupted run. Taken off the Trainer without
        this it sets nothing any more, and its hooks only look; but what it had set by then, as
        frozen layers or weight decay, stays.
        """
        self._leave()

    def _leave(self, *, loaded: bool = False) -> None:
        """Leave model, optimizer and arguments as they were found. loaded: by a checkpoint now."""
        if self._begun:
            self._crew.give_back(loaded=loaded)
        self._begun = False
        self._hooks.close()

    # -- an update ---------------------------------------------------------------------------

    @guarded
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide, if it is time to; look at the gradients of an interval's last two updates."""
        crew = self._crew
        if state.global_step >= crew.book.next:
            crew.decide(state.global_step)
        if not crew.done and crew.end - state.global_step <= 2:
            crew.sight.eyes.watch_gradients()

    @guarded
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are in and clipped."""
        self._handles.arm()
        self._crew.sight.watch(last=state.global_step + 1 == self._crew.end)

    @guarded
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights have moved."""
        if state.global_step + 1 == self._crew.end:
            self._crew.sight.moved()

    @guarded
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close a full interval; never let weights that are not finite be saved or handed over."""
        crew, step = self._crew, state.global_step
        crew.sight.eyes.end_update()
        if crew.sight.mistaken:
            logger.warning(
                "eval_dataset is not used: the model's own loss is not the one that is trained; "
                "give the callback trainer= for that one"
            )
            crew.sight.drop()
            crew.book.forget_validation()
        hidden = crew.sight.logs_alone and not crew.sight.rewarded and args.logging_nan_inf_filter
        if hidden and not self._advise:
            args.logging_nan_inf_filter = False
            self._hooks.callback(setattr, args, "logging_nan_inf_filter", True)
            logger.warning(
                "logging_nan_inf_filter is off: it logs a loss of NaN as 0, and the tuner goes by "
                "the log; give the callback trainer= to keep it"
            )
        if step == crew.end:
            crew.close(step)
            if crew.sight.logs_alone and not self._advise:
                control.should_log = True
        look = step >= state.max_steps or (step - crew.book.last) % WATCH == 0
        self._watch(step, control, look)

    @guarded
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Likewise where evaluations and checkpoints come with the epoch, and at an early stop."""
        self._watch(state.global_step, control, control.should_training_stop)

    def _watch(self, step: int, control: Any, look: bool) -> None:
        if look or control.should_save or control.should_evaluate:
            self._crew.watch(step)

    @guarded
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take note of the validation loss of the user's evaluation."""
        sight = self._crew.sight
        if not sight.validates:
            self._crew.book.note(sight.evaluated(kwargs["metrics"]), state.global_step)

    @guarded
    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The logged loss stands in where the model's output has none."""
        book, sight = self._crew.book, self._crew.sight
        cost = sight.logged(kwargs.get("logs") or {})
        if cost is not None and (report := book.report) is not None:
            book.report = replace(report, losses=(*report.losses, cost))
        elif cost is not None:
            sight.eyes.losses.append(cost)

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """For the Trainer's checkpoint: JSON only, no object and no code."""
        saved = {"saved": checkpoint.kept_of(self._crew)} if self._begun else {}
        return {"args": self._args, "attributes": saved}

    @guarded
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the weights to come back to beside the checkpoint."""
        step = state.global_step
        checkpoint.write(self._crew, checkpoint.folder_of(args, step), step)


def _check(args: Any, state: Any, optimizer: Any, asked: int | None) -> None:
    """Refuse what cannot be steered."""
    refuse_engine(args, getattr(optimizer, "accelerator_state", None))
    refuse_unknown(optimizer)
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
    if not str(given):
        raise BadInput(
            "callback: policy: '' names none, and a checkpoint keeps none that was given as an "
            "object; give a file, or leave restore_callback_states_from_checkpoint off"
        )
    from tuner.tracking import open_policy

    return open_policy(str(given), sha256)
