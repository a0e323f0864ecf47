"""Handles: the knobs of a Trainer beyond its rate, found on its parts, set, and put back."""

import math
import re
from dataclasses import replace
from typing import Any, cast

from torch import nn

from envs.dials import DIALS
from envs.errors import BadInput
from envs.head import Lift, head_of, is_new
from envs.knobs import OPTIMIZERS, Actions, Knobs, Optimizer, opened
from envs.parts import Parts
from envs.purpose import WEIGHED, objective_of
from envs.shards import sharded
from envs.switchable import SwitchableOptimizer

SGD = re.compile(r"(fused)?sgd(\d+bit)?")
RMSPROP = re.compile(r"rmsprop(\d+bit)?")
ADAM = re.compile(  # what takes the rates that AdamW takes
    r"(apollo|anyprecision|cpu|fused|grok|npu|paged|stable)*[nr]?adam(w|ax)?(\d+bit|fp8|schedulefree)*"
    r"|(paged)?ademamix(\d+bit)?|adabelief|adopt|soap|lorafaoptimizer|adafactor"
)
APART = ("prodigy", "dadapt", "muon")  # in a name: makes something else of its rate
MOMENTA = (0.8, 0.95)  # of SGD: what a rate comes to is that over one less the momentum


class Handles:
    """What a callback can set: weight decay, clipping, depth, and a `SwitchableOptimizer`'s kind.

    Beta too, where the Trainer is given and has one, and LoRA's scaling, but not in shards, nor
    where the run ends with the weights of another step: their scaling would not be known. A new
    head's rate, where the user gave all weights one rate, but not in shards.
    """

    def __init__(
        self, args: Any, model: nn.Module, optimizer: Any, rate: float, actions: Actions,
        *, trainer: Any = None, decays: list[float] | None = None, kind: str = "",
        scales: list[float] | None = None, clip: float | None = None, beta: float | None = None,
        depth: int | None = None, headed: bool | None = None,
        parts: Parts | None = None,
    ) -> None:  # fmt: skip
        """actions: the policy's. decays to depth: the user's, where a checkpoint has others.

        headed: whether there was a new head when the run that is taken up began. parts: the
        model's, if somebody has them.

        In several processes layers stay as they are: each waits for the gradients of all.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        self._args, self._optimizer, self._trainer = args, optimizer, trainer
        self._inner = inner if isinstance(inner, SwitchableOptimizer) else None
        if self._inner is not None and getattr(args, "fsdp", None):
            raise BadInput("trainer: fsdp: its optimizer cannot be switched; use a plain one")
        groups = optimizer.param_groups
        self.decays = decays or [float(group.get("weight_decay") or 0.0) for group in groups]
        largest = max(self.decays)
        self._shares = [
            decay / largest if largest else float(all(p.ndim >= 2 for p in group["params"]))
            for decay, group in zip(self.decays, groups, strict=True)
        ]
        clip = float(args.max_grad_norm or 0.0) if clip is None else clip
        self.kind = kind or kind_of(optimizer)
        self._parts = parts or Parts(model, scales)
        if depth is not None and self._parts.depth < depth:  # a run that was cut short froze some
            for parameter in (p for group in groups for p in group["params"]):
                parameter.requires_grad_(True)
            self._parts = Parts(model, scales)
        self.scales = self._parts.scales
        wish = self._parts.fit(opened(Knobs(rate=rate), actions), Knobs())
        depth = None if args.world_size > 1 else wish.depth
        own_beta = beta_of(trainer)
        again = getattr(args, "load_best_model_at_end", False) or getattr(args, "fsdp", None)
        scale = None if again else wish.adapter_scale
        shards = getattr(args, "fsdp", None) or sharded(model)
        self._lift = Lift([] if shards else head_of(model), inner)
        self.headed = is_new(model, self._lift.parameters) if headed is None else headed
        head = wish.head_rate is not None and self.headed and self._lift.able
        self.given = Knobs(
            rate=rate,
            optimizer=cast(Optimizer, self.kind),
            weight_decay=min(max(largest, 0.0), 1.0),
            clip=min(max(clip, 0.0), 1e6),
            adapter_scale=scale,
            beta=own_beta if own_beta is None or beta is None else beta,
            depth=depth,
            head_rate=1.0 if head else None,
        )
        can = {
            "weight_decay": any(self._shares) and 0 <= largest <= 1,
            "clip": 0 < clip <= 1e6,
            "adapter_scale": scale is not None,
            "beta": self.given.beta is not None,
            "depth": depth is not None,
            "head_rate": head,
        }
        self.dials = tuple(name for name, able in can.items() if able)
        self.opening = self.given.having(
            **{
                name: DIALS[name].turned(getattr(self.given, name), amount)
                for name, amount in actions.opens
                if name in self.dials
            }
        )

    @property
    def switch(self) -> bool:
        """Whether the optimizer can be switched."""
        return self._inner is not None

    def fit(self, knobs: Knobs) -> Knobs:
        """The wish as this run can have it: no more layers than were in training at the start.

        And one at least, or there may be no weight left to train, and the run breaks.
        """
        most = self.given.depth
        if knobs.depth is None or most is None:
            return knobs
        return replace(knobs, depth=max(1, min(knobs.depth, most)))

    def numbers(self, knobs: Knobs) -> tuple[float, ...]:
        """The settings beyond the rate as numbers, for other processes; NaN stands for None."""
        known = (
            math.nan if value is None else value
            for value in (knobs.beta, knobs.depth, knobs.adapter_scale, knobs.head_rate)
        )
        return OPTIMIZERS.index(knobs.optimizer), knobs.weight_decay, knobs.clip, *known

    def knobs(
        self, rate: float, kind: float, decay: float, clip: float, beta: float, depth: float,
        scale: float, head: float,
    ) -> Knobs:  # fmt: skip
        """What `numbers` was made of, and a rate."""
        return replace(
            self.given, rate=rate, optimizer=OPTIMIZERS[int(kind)], weight_decay=decay, clip=clip,
            beta=None if math.isnan(beta) else beta,
            depth=None if math.isnan(depth) else int(depth),
            adapter_scale=None if math.isnan(scale) else scale,
            head_rate=None if math.isnan(head) else head,
        )  # fmt: skip

    def put(self, knobs: Knobs, before: Knobs | None = None) -> None:
        """Set what differs from ``before``, or all that can be turned, but the rate."""

        def new(name: str) -> bool:
            if before is None:
                return name in self.dials
            return bool(getattr(knobs, name) != getattr(before, name))

        if self._inner is not None and (before is None or new("optimizer")):
            self._inner.switch(knobs.optimizer)
        if new("weight_decay"):
            wanted = [knobs.weight_decay * share for share in self._shares]
            if knobs.weight_decay == self.given.weight_decay:
                wanted = self.decays
            for group, decay in zip(self._optimizer.param_groups, wanted, strict=True):
                group["weight_decay"] = decay
        if new("clip"):
            self._args.max_grad_norm = knobs.clip
        if knobs.beta is not None and new("beta"):
            self._trainer.beta = knobs.beta
        for name in ("depth", "adapter_scale"):
            if new(name):
                self._parts.put(Knobs().having(**{name: getattr(knobs, name)}))
        if knobs.head_rate is not None and new("head_rate"):
            self._lift.put(knobs.head_rate)

    def arm(self) -> None:
        """The optimizer's next step is an update of the run: a head's rate holds for it."""
        self._lift.arm()

    def settle(self, scale: float | None) -> None:
        """Give LoRA's scaling back, with what the adapters add as it is under ``scale``."""
        if scale not in (None, 1.0):
            self._parts.settle(scale)

    def close(self) -> None:
        """Take the hooks off the optimizer: a Trainer keeps it for its next run."""
        self._lift.close()

    def leave(self, knobs: Knobs, *, loaded: bool = False) -> None:
        """The run is over: what was turned is as it was found, but for the rate.

        loaded: weights and an optimizer from a checkpoint have come since, and are left alone.
        """
        given = self.given
        self.close()
        if loaded:
            given = replace(given, optimizer=knobs.optimizer, weight_decay=knobs.weight_decay)
        else:
            self.settle(knobs.adapter_scale)
        self.put(given, knobs)


def kind_of(optimizer: Any) -> Optimizer:
    """What an optimizer counts as, wrapped or not; an unknown one as AdamW."""
    return _known(optimizer) or "adamw"


def refuse_unknown(optimizer: Any) -> None:
    """Optimizers whose rates are of a scale that no tuner knows, as Lion's or Prodigy's."""
    if _known(optimizer) is None:
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's is no name to give
        raise BadInput(
            f"trainer: optimizer: {type(inner).__name__}: which rates suit it is not known to the "
            "tuner; train with AdamW, RMSprop or SGD with a momentum of 0.9, or without the tuner"
        )


def _known(optimizer: Any) -> Optimizer | None:
    """The kind of an optimizer whose rates have a known scale, also within others."""
    if isinstance(optimizer, SwitchableOptimizer):
        return optimizer.kind
    names = [cls.__name__.lower() for cls in type(optimizer).__mro__]
    group: dict[str, Any] = next(iter(optimizer.param_groups), {})
    if any(far in name for name in names for far in APART):
        return None
    if any(map(SGD.fullmatch, names)):
        return "sgd" if MOMENTA[0] <= group.get("momentum", 0.0) <= MOMENTA[1] else None
    if any(map(RMSPROP.fullmatch, names)):
        return "rmsprop"
    if any(map(ADAM.fullmatch, names)):
        scaled = "adafactor" in names and group.get("scale_parameter", True)
        return None if scaled else "adamw"
    inner = (getattr(optimizer, name, None) for name in ("optimizer", "optim"))
    return next((_known(each) for each in inner if hasattr(each, "param_groups")), None)


def beta_of(trainer: Any) -> float | None:
    """Of a Trainer whose objective has one that counts; with 0 there is no reference model.

    Others call other things beta, as the share of two divergences; or only show theirs.
    """
    beta, shown = getattr(trainer, "beta", None), getattr(type(trainer), "beta", None)
    if not isinstance(beta, int | float) or isinstance(beta, bool) or beta <= 0:
        return None
    fixed = isinstance(shown, property) and shown.fset is None
    known = objective_of(trainer.args, trainer.model) in WEIGHED
    return float(beta) if known and not fixed else None
