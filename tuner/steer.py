"""One steered run: observe, ask the policy, mind the guard, record."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.dials import DIALS, label
from envs.errors import BadInput
from envs.knobs import KEEP, Knobs, Optimizer, decode, exchange
from envs.observe import observe
from envs.progress import Context, Progress
from envs.purpose import kind
from tuner.audit import Audit, Pilot, applied, lead, normalised, proposal, reason
from tuner.guard import GuardState, Limits, Ruling, alarm, rule, switch_off
from tuner.policy import PLACES

logger = logging.getLogger(__name__)


class Helm:
    """A policy steering one run. It knows neither the training loop nor the model.

    Before each interval: ``ruling = helm.decide(history, context, knobs)``; then put the best
    weights back if ``ruling.decision.rollback``, and the knobs of ``ruling.turn(knobs, context)``
    in force; the interval's report carries ``ruling.decision``. Once ``ruling.off``, nothing
    changes any more. It never raises: a failure switches it off and leaves the user's schedule.
    """

    def __init__(
        self,
        policy: Pilot,
        limits: Limits,
        start_rate: float,
        *,
        advise: bool = False,
        log: str | Path | None = None,
    ) -> None:
        """start_rate: the user's peak rate. advise: record what would be done, and do nothing."""
        self.policy, self.limits, self.start_rate, self.advise = policy, limits, start_rate, advise
        self.guard = GuardState()
        self._start = start_rate  # in terms of the optimizer in use
        self._given = self._opening  # the user's settings of dials turned since
        self._own: Optimizer | None = None  # the user's, while another is in use
        self.audit = Audit(Path(log)) if log is not None else None

    @property
    def _opening(self) -> tuple[tuple[str, float], ...]:
        """The user's settings of the dials that the run was opened with otherwise."""
        return tuple(
            (name, start)
            for name, _ in self.policy.manifest.actions.opens
            if name in self.limits.turns and (start := DIALS[name].start) is not None
        )

    @property
    def start_now(self) -> float:
        """The user's peak rate, in terms of the optimizer in use."""
        return self._start

    @property
    def off(self) -> str:
        """Why the tuner is off for good; empty while it is on."""
        return self.guard.off

    def start(self) -> None:
        """Begin a new run: nothing remembered, a new log."""
        self.guard = GuardState()
        self._start, self._given, self._own = self.start_rate, self._opening, None
        if self.audit is not None:
            self.audit.start()

    def decide(
        self,
        history: Sequence[Progress],
        context: Context,
        knobs: Knobs,
        *,
        warming: bool = False,
    ) -> Ruling:
        """What to do at the latest report of ``history``; recorded before it is returned."""
        try:
            return self._decide(history, context, knobs, warming)
        except Exception as error:
            return self.fail(error, history[-1].step if history else 0)

    def fail(self, error: Exception, step: int) -> Ruling:
        """Warn once, and leave the user's schedule for good."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not self.off:
            logger.warning("the tuner failed and is off; your schedule rules: %s", text)
        reason = f"failed: {text}"
        self.guard, ruling = switch_off(self.guard, self._start, reason, own=self._own)
        ruling = replace(ruling, back=self._given)
        applied = {
            "multiplier": 1.0, "rate": self.start_rate, "rollback": False, "optimizer": self._own
        }  # fmt: skip
        self._start, self._own = self.start_rate, None
        try:
            if self.audit is not None:
                self.audit.append(
                    {"step": step, "observation": [], "normalised": [], "proposed": None,
                     "applied": applied, "guard": ruling.guard, "reason": "",
                     "sha256": self.policy.sha256}
                )  # fmt: skip
        except Exception:
            logger.warning("the audit log cannot be written: %s", self.audit and self.audit.path)
        return ruling

    def _decide(
        self, history: Sequence[Progress], context: Context, knobs: Knobs, warming: bool
    ) -> Ruling:
        start, actions = self._start, self.policy.manifest.actions
        if self.off:
            ruling = rule(self.guard, KEEP, self.limits, rate=knobs.rate, start=start)[1]
            return replace(ruling, back=self._given)
        observation = observe(history, context)
        action = self.policy.act(observation)
        evidence: dict[str, Any] = {
            "rate": knobs.rate,
            "start": start,
            "trouble": alarm(history, self.limits, knobs.rate / start),
            "strange": self.policy.outside(observation),
            "warming": warming,
            "lead": lead(self.policy, observation, actions),
        }
        wish, user = decode(action, actions), dict(self._given)
        if wish.turns:
            now = {name: getattr(knobs, name) for name, _ in wish.turns}
            now = {name: value for name, value in now.items() if value is not None}
            evidence["dials"] = {name: [now[name], user.get(name, now[name])] for name in now}
        if self._own is not None:
            evidence["own"] = self._own
        if words := self._foreign(context, observation):
            evidence["foreign"] = words
        after, ruling = rule(self.guard, wish, self.limits, **evidence)
        ruling = replace(ruling, back=self._given if ruling.off else ())
        would = ruling.turn(knobs, context)
        if self.advise:
            advice = f"advice only: x{would.rate / start:.4g} of the schedule"
            advice += "".join(f", {label(turn)}" for turn in ruling.decision.turns)
            advice += ", rolled back" if ruling.decision.rollback else ""
            ruling = Ruling(KEEP, knobs.rate, knobs.rate, advice)
            after, would = self.guard, knobs
        share = exchange(knobs.optimizer, would.optimizer, context.parameters, context.adapter)
        if self.audit is not None:
            evidence["mode"] = "advise" if self.advise else self.limits.mode
            if self.limits.turns:
                evidence["turns"] = list(self.limits.turns)
            if len(history) == 1 and self._opening and not self.advise:
                evidence["opened"] = {name: getattr(knobs, name) for name, _ in self._opening}
            self.audit.append(
                {
                    "step": history[-1].step,
                    "observation": observation.tolist(),
                    "normalised": normalised(self.policy, observation),
                    "proposed": proposal(action, actions),
                    "applied": applied(ruling.decision, would, start * share),
                    "guard": ruling.guard,
                    "reason": reason(self.policy, observation, actions),
                    "sha256": self.policy.sha256,
                    "evidence": evidence,
                }
            )
        if after.off:
            logger.warning("the tuner is off; your schedule rules: %s", after.off)
        self.guard = after
        self._given += tuple(
            (name, getattr(knobs, name))
            for name, _ in ruling.decision.turns
            if name not in user and getattr(knobs, name) is not None
        )
        self._start *= share
        own = self._own or knobs.optimizer
        self._own = None if would.optimizer == own else own
        return ruling

    def _foreign(self, context: Context, observation: NDArray[np.float32]) -> str:
        """Why this run is none for the policy to steer; empty if it is."""
        known = {kind(each) for each in getattr(self.policy, "objectives", ())}
        near = abs(observation[PLACES["rate_vs_reference"]]) < self.limits.near
        if not near or not known or kind(context.objective) in known:
            return ""
        return f"near the rule of thumb, and not trained on {context.objective}"

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, as JSON."""
        return {
            "guard": asdict(self.guard),
            "start": self._start,
            "given": [list(pair) for pair in self._given],
            "own": self._own,
            "sha256": self.policy.sha256,
            "lines": self.audit.lines if self.audit else 0,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`; log lines written after it are cut off."""
        if state["sha256"] != self.policy.sha256:
            raise BadInput(
                f"policy: sha256: is {self.policy.sha256[:12]!r}, and the checkpoint was steered "
                f"by {state['sha256'][:12]!r}; give the policy that the run began with"
            )
        self.guard, self._start = GuardState(**state["guard"]), state["start"]
        self._given = tuple((name, value) for name, value in state.get("given", ()))
        self._own = state.get("own")
        if self.audit is not None:
            self.audit.cut(state["lines"])
