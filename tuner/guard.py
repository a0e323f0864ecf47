"""Do no harm: what stands between a policy's wish and somebody's run.

Pure functions over a small frozen state. Rates are peak rates: the user's schedule runs on, and
``start`` is the peak it was given. A `Ruling` is carried out by `envs.knobs.turn` alone.

All thresholds are starting points. They were set on runs of tiny-32 and MiniLM-L6 with batches
of 8 and 16, where no plain run raises an alarm; see ``tests/test_guard.py``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal, get_args

from envs.dials import DIALS, Turn, label
from envs.env import BLOWN, EXPLORE
from envs.errors import UnknownName
from envs.knobs import KEEP, ROLLBACK_FACTOR, Actions, Decision, Knobs, Optimizer, turn
from envs.progress import Context, Progress

Mode = Literal["careful", "explore"]

EVENTS = 2  # divergences after which the tuner is off
STRANGE = 3  # observations out of range in a row after which it is off
COOLDOWN = 2  # decisions after a divergence in which the rate is not raised, nor a dial turned
STREAK = 5  # updates in a row that must be off for a loss to count as off
WINDOW = 50  # updates before the interval that the running median is taken over
DEVIATIONS = 6.0  # median absolute deviations above the running median
TIMES = 2.0  # and times the running median; also times the start, for a loss that blew up
WORSE = 2.0  # times the best validation loss
MARGIN = 0.5  # nats; also at least so far above, where losses begin below that or are negative
NO_SWITCH = "the optimizer cannot be switched here"


@dataclass(frozen=True)
class Limits:
    """How far a policy may go, as multiples of the user's schedule, and of other dials' settings.

    A dial that counts, as the depth does, stays between 1 and the user's own; where the limits are
    gentle it moves by one a decision. One that the user has off, at 0, is taken for its floor.
    """

    mode: Mode
    below: float  # the rate stays above the schedule over this; a dial likewise
    above: float  # and below the schedule times this
    up: float = math.inf  # most a decision may raise the rate, or a dial, by
    down: float = math.inf  # and lower it by
    lead: float = 0.0  # least log odds of an action over *keep*, else the rate is kept
    near: float = 0.0  # decades around the rule of thumb where only what it was trained on is moved
    gentle: bool = False  # not raised, no dial turned in warm-up; an alarm on a mere spike
    rollback: bool = True  # the policy may roll back when it likes
    switch: bool = False  # whoever carries out the rulings can change the optimizer
    turns: tuple[str, ...] = ()  # and these of `envs.dials.DIALS`
    opens: float = EXPLORE  # most a dial may be opened with, times the user's


CAREFUL = Limits(
    "careful", below=10.0, above=3.0, up=1.5, down=2.0, lead=5.0, near=0.5, gentle=True,
    rollback=False, opens=3.0,
)  # fmt: skip
FAR = Limits("explore", below=EXPLORE, above=EXPLORE)
LIMITS = {limits.mode: limits for limits in (CAREFUL, FAR)}


def limits_of(mode: str) -> Limits:
    """The limits of a mode: ``careful`` or ``explore``."""
    if mode not in LIMITS:
        raise UnknownName("mode", mode, get_args(Mode))
    return LIMITS[mode]


def within(actions: Actions, limits: Limits) -> Actions:
    """The actions with what they open a run with held to the limits."""
    most = limits.opens
    held = ((name, min(max(amount, 1 / most), most)) for name, amount in actions.opens)
    return replace(actions, opens=tuple(each for each in held if each[1] != 1))


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers from decision to decision; plain numbers."""

    events: int = 0  # divergences so far
    cooldown: int = 0  # decisions in which the rate is not raised, and no dial turned
    strange: int = 0  # observations out of range in a row
    off: str = ""  # why the tuner is off for good; empty while it is on
    multiplier: float = 1.0  # of the user's schedule, once off


@dataclass(frozen=True)
class Ruling:
    """What is carried out: a decision, and bounds of the peak rate and of dials after it."""

    decision: Decision
    low: float
    high: float
    guard: str = ""  # why it is not what the policy wished; empty when the wish was granted
    off: bool = False  # the tuner is off from here on
    back: tuple[tuple[str, float], ...] = ()  # dials that are put back to what the user gave
    bounds: tuple[tuple[str, float, float], ...] = ()  # of the dials that it turns

    def turn(self, knobs: Knobs, context: Context) -> Knobs:
        """The knobs after this ruling."""
        turned = turn(
            knobs,
            self.decision,
            low=self.low,
            high=self.high,
            parameters=context.parameters,
            adapter=context.adapter,
        )
        held = {
            name: min(max(value, low), high)
            for name, low, high in self.bounds
            if (value := getattr(turned, name)) is not None
        }
        return turned.having(**{**held, **dict(self.back)})


def rule(
    state: GuardState,
    wish: Decision,
    limits: Limits,
    *,
    rate: float,
    start: float,
    trouble: str = "",
    strange: Sequence[str] = (),
    warming: bool = False,
    lead: float | None = None,
    foreign: str = "",
    dials: Mapping[str, Sequence[float]] | None = None,
    own: Optimizer | None = None,
) -> tuple[GuardState, Ruling]:
    """A policy's wish and the evidence -> what is done.

    rate: the peak rate in force; start: the user's. trouble: what `alarm` found. strange: the
    features out of the policy's range. warming: the user's schedule is still in its warm-up. lead:
    how clearly the policy prefers its wish to *keep*, in log odds; None if it has none. foreign:
    why the policy has no say in this run while nothing is wrong. dials: the setting in force of
    each dial that the wish turns, and the user's. own: the user's optimizer, where another is in
    use; a tuner that is switched off gives it back.
    """
    if state.off:
        return state, _rest(start * state.multiplier, state.off, own)
    if trouble:
        return _rescue(state, limits, trouble, rate=rate, start=start, own=own)
    held = state.cooldown > 0 or (limits.gentle and warming)
    most, least = (min(1.0, limits.up) if held else limits.up), 1 / limits.down
    low, high = start / limits.below, start * limits.above
    after = replace(state, cooldown=max(0, state.cooldown - 1), strange=0)
    if strange:
        count, names = state.strange + 1, ", ".join(strange[:3])
        if count >= STRANGE:
            why = f"{count} observations in a row out of range ({names})"
            return switch_off(after, start, why, own=own)
        eased = min(max((rate / start) ** -0.5, least), most)
        reason = f"out of range: {names}; eased towards the schedule"
        return replace(after, strange=count), Ruling(Decision(eased), low, high, reason)
    reasons = [
        f"the {name.replace('_', ' ')} cannot be turned here"
        for name, _ in wish.turns
        if name not in limits.turns
    ]
    if reasons:
        wish = replace(wish, turns=tuple(each for each in wish.turns if each[0] in limits.turns))
    if wish.optimizer is not None and not limits.switch:
        wish = replace(wish, optimizer=None)
        reasons.append(NO_SWITCH)
    if wish.rollback and not limits.rollback:
        return after, Ruling(KEEP, low, high, f"no rollback in {limits.mode} mode")
    if wish != KEEP and foreign:
        return after, Ruling(KEEP, low, high, foreign)
    if wish != KEEP and lead is not None and lead < limits.lead:
        return after, Ruling(KEEP, low, high, f"not clear enough: ahead of keep by {lead:.2g}")
    multiplier = wish.multiplier if wish.rollback else min(max(wish.multiplier, least), most)
    aim = rate * multiplier
    reason, late = "", "after a divergence" if state.cooldown else "in the warm-up"
    if wish.optimizer is None and not wish.rollback and not low <= aim <= high:
        reason = f"held at x{(low if aim < low else high) / start:.3g} of the schedule"
    elif multiplier > wish.multiplier:
        reason = f"at most /{limits.down:g} in a decision"
    elif multiplier < wish.multiplier and held:
        reason = f"not raised {late}"
    elif multiplier < wish.multiplier:
        reason = f"at most x{limits.up:g} in a decision"
    reasons.append(reason)
    turns, bounds = list[Turn](), list[tuple[str, float, float]]()
    for each in wish.turns:
        if held:
            reasons.append(f"the {each[0].replace('_', ' ')} is not turned {late}")
            continue
        granted, bound, words = _mind(each, limits, (dials or {}).get(each[0]))
        reasons.append(words)
        turns += granted
        bounds += bound
    if (multiplier, tuple(turns)) != (wish.multiplier, wish.turns):
        wish = replace(wish, multiplier=multiplier, turns=tuple(turns))
    reason = "; ".join(filter(None, reasons))
    return after, Ruling(wish, low, high, reason, bounds=tuple(bounds))


def _mind(
    wish: Turn, limits: Limits, known: Sequence[float] | None
) -> tuple[list[Turn], list[tuple[str, float, float]], str]:
    """A turn -> the one that is granted, if any; bounds of what it comes to; why, if it differs.

    known: the setting in force, and the user's; without it there are no bounds.
    """
    name, amount = wish
    dial, step = DIALS[name], min(max(amount, 1 / limits.down), limits.up)
    if dial.way == "plus":
        step = math.copysign(1.0, amount) if limits.gentle else amount
    words = "" if step == amount else f"at most {label((name, step))} in a decision"
    if known is None:
        return [(name, step)], [], words.replace("_", " ")
    now, user = known
    low, high = user / limits.below, (user or dial.floor) * limits.above
    if dial.way == "plus":
        low, high = min(1.0, user), user
    moved = dial.turned(now, step)
    held = min(max(moved, low), high)
    if held != moved:
        words = f"{name} held at {held:.3g}"
    granted = [] if moved != now == held else [(name, step)]
    return granted, [(name, low, high)], words.replace("_", " ")


def _rescue(
    state: GuardState,
    limits: Limits,
    trouble: str,
    *,
    rate: float,
    start: float,
    own: Optimizer | None,
) -> tuple[GuardState, Ruling]:
    """The last verified weights again: once with half the rate, the next time without the tuner."""
    halved = min(1.0, rate / start) * ROLLBACK_FACTOR
    after = replace(state, events=state.events + 1, cooldown=COOLDOWN, strange=0)
    if after.events >= EVENTS:
        # Whoever explores does not trust the schedule: a rate that diverged is not taken up again.
        lowest = 1.0 / limits.below
        multiplier = 1.0 if limits.gentle else max(lowest, min(1.0, rate / start * ROLLBACK_FACTOR))
        after, ruling = switch_off(after, start, f"diverged again: {trouble}", multiplier, own)
        return after, replace(ruling, decision=replace(ruling.decision, rollback=True))
    low = start / limits.below
    high = max(low, start * halved)
    return after, Ruling(Decision(rollback=True), low, high, f"diverged: {trouble}")


def switch_off(
    state: GuardState,
    start: float,
    reason: str,
    multiplier: float = 1.0,
    own: Optimizer | None = None,
) -> tuple[GuardState, Ruling]:
    """The tuner is off for good, and the user's schedule rules, with the user's optimizer."""
    after = replace(state, off=reason, multiplier=multiplier)
    return after, _rest(start * multiplier, f"off: {reason}", own)


def _rest(rate: float, reason: str, own: Optimizer | None) -> Ruling:
    return Ruling(Decision(optimizer=own), rate, rate, reason, off=True)


def alarm(history: Sequence[Progress], limits: Limits, multiplier: float = 1.0) -> str:
    """Why the run counts as diverging at its latest report, or "".

    Numbers that are not finite, and losses far above the run's start, always count. A loss that
    only rose against its own recent past counts where the limits are gentle and the tuner is
    answerable for it, that is, while ``multiplier`` is above 1. A run is judged by its losses
    alone: data that become that much harder on the way count as a divergence too.
    """
    now = history[-1]
    if not now.finite:
        return "weights are not finite"
    if not all(map(math.isfinite, now.losses)):
        return "training loss is not finite"
    measured = not math.isnan(now.update) and now.update != 0  # 0: a loss scaler skipped the step
    if measured and not math.isfinite(now.gradient):
        return "gradient is not finite"
    gentle = limits.gentle and multiplier > 1
    seen = [r.validation for r in history if r.age == 0 and math.isfinite(r.validation)]
    if seen and now.age == 0:
        loss, first, best, margin = now.validation, seen[0], min(seen), margin_of(seen[0], seen)
        if not math.isfinite(loss):
            return "validation loss is not finite"
        if loss > line_above(first, BLOWN, margin):
            return f"validation loss is {loss:.3g}, and was {first:.3g} at its start"
        if gentle and loss > line_above(best, WORSE, margin):
            return f"validation loss is {loss:.3g}, and was {best:.3g} at its best"
    losses = [loss for report in history for loss in report.losses if math.isfinite(loss)]
    if not losses:
        return ""
    start = median(losses[:STREAK])
    margin = margin_of(start, losses)
    if streak(now.losses, line_above(start, TIMES, margin)):
        return f"training loss is far above the {start:.3g} of its start"
    before = losses[: len(losses) - len(now.losses)][-WINDOW:]
    if gentle and len(before) >= STREAK:
        centre = median(before)
        spread = median(abs(loss - centre) for loss in before)
        line = max(centre + DEVIATIONS * spread, line_above(centre, TIMES, margin))
        if streak(now.losses, line):
            return "training loss left its running median"
    return ""


def line_above(level: float, times: float, margin: float) -> float:
    """``times - 1`` of a level's size above it, and at least ``margin``; it may be negative."""
    return max(times * level, (2 - times) * level, level + margin)


def margin_of(start: float, losses: Sequence[float]) -> float:
    """0 for losses that began at `MARGIN` or above and never were negative: ratios are enough."""
    return 0.0 if start >= MARGIN and min(losses) >= 0 else MARGIN


def streak(losses: Sequence[float], line: float) -> bool:
    """Whether `STREAK` losses in a row are above the line."""
    count = 0
    for loss in losses:
        count = count + 1 if loss > line else 0
        if count >= STREAK:
            return True
    return False
