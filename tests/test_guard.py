"""The guard: known evidence, known rulings; and the helm that asks it."""

import json
import math
from dataclasses import asdict, replace
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.env import BLOWN, EXPLORE
from envs.errors import BadInput, UnknownName
from envs.knobs import KEEP, Actions, Decision, Knobs, reference_rate, turn
from envs.progress import Context, Progress
from tuner.audit import Audit, replay
from tuner.guard import (
    CAREFUL,
    COOLDOWN,
    DEVIATIONS,
    FAR,
    MARGIN,
    NO_SWITCH,
    STREAK,
    TIMES,
    WINDOW,
    WORSE,
    GuardState,
    alarm,
    limits_of,
    rule,
    streak,
)
from tuner.steer import Helm

START = 1e-3
CONTEXT = Context(100, 10, 150_000, 1000, 6, "full", "adamw", START)
NEW = GuardState()


def after(ruling, rate=START):
    return ruling.turn(Knobs(rate=rate), CONTEXT).rate


def test_far_without_an_event_is_the_environments_own_rule():
    for multiplier in (0.1, 0.6, 1.0, 3.0, 10.0):
        for rate in (START, START * 7, START / 29):
            wish = Decision(multiplier)
            _, ruling = rule(NEW, wish, FAR, rate=rate, start=START)
            assert ruling.decision is wish
            low, high = START / EXPLORE, START * EXPLORE
            assert ruling.turn(Knobs(rate=rate), CONTEXT) == turn(
                Knobs(rate=rate), wish, low=low, high=high, parameters=150_000
            )
    _, ruling = rule(NEW, Decision(rollback=True), FAR, rate=START, start=START)
    assert ruling.decision.rollback
    assert ruling.guard == ""


@pytest.mark.parametrize(
    ("wish", "applied", "guard"),
    [
        (KEEP, 1.0, ""),
        (Decision(1.2), 1.2, ""),
        (Decision(10.0), 1.5, "at most x1.5"),
        (Decision(0.1), 0.5, "at most /2"),
        (Decision(rollback=True), 1.0, "no rollback"),
        (Decision(optimizer="sgd"), 1.0, "cannot be switched"),
    ],
)
def test_careful_takes_small_steps(wish, applied, guard):
    _, ruling = rule(NEW, wish, CAREFUL, rate=START, start=START)
    assert ruling.decision == Decision(applied)
    assert guard in ruling.guard
    assert bool(ruling.guard) == bool(guard)


def test_careful_stays_within_three_times_and_a_tenth():
    rate = START
    for _ in range(9):
        _, ruling = rule(NEW, Decision(10.0), CAREFUL, rate=rate, start=START)
        rate = after(ruling, rate)
    assert rate == START * 3
    assert "held at x3" in ruling.guard
    for _ in range(9):
        _, ruling = rule(NEW, Decision(0.1), CAREFUL, rate=rate, start=START)
        rate = after(ruling, rate)
    assert rate == START / 10


def test_never_raised_in_warm_up_but_lowered():
    _, ruling = rule(NEW, Decision(1.4), CAREFUL, rate=START, start=START, warming=True)
    assert after(ruling) == START
    assert "warm-up" in ruling.guard
    _, ruling = rule(NEW, Decision(0.6), CAREFUL, rate=START, start=START, warming=True)
    assert after(ruling) == START * 0.6


@pytest.mark.parametrize(("rate", "expected"), [(3, 0.5), (1, 0.5), (0.6, 0.3), (0.1, 0.1)])
def test_a_divergence_undoes_the_multiplier_and_halves(rate, expected):
    state, ruling = rule(
        NEW, Decision(1.5), CAREFUL, rate=rate * START, start=START, trouble="loss is not finite"
    )
    assert ruling.decision.rollback
    assert after(ruling, rate * START) == pytest.approx(expected * START)
    assert state.events == 1
    for _ in range(COOLDOWN):
        state, ruling = rule(state, Decision(1.5), CAREFUL, rate=START / 2, start=START)
        assert after(ruling, START / 2) == START / 2
        assert "divergence" in ruling.guard
    state, ruling = rule(state, Decision(1.5), CAREFUL, rate=START / 2, start=START)
    assert ruling.guard == ""


def test_careful_wants_a_clear_wish():
    for lead, granted in ((0.99 * CAREFUL.lead, False), (CAREFUL.lead, True), (None, True)):
        _, ruling = rule(NEW, Decision(0.6), CAREFUL, rate=START, start=START, lead=lead)
        assert (ruling.decision == Decision(0.6)) is granted
        assert ("not clear enough" in ruling.guard) is not granted
    _, ruling = rule(NEW, Decision(0.6), FAR, rate=START, start=START, lead=0.01)
    assert ruling.decision == Decision(0.6)
    _, ruling = rule(NEW, KEEP, CAREFUL, rate=START, start=START, lead=0.0)
    assert ruling.guard == ""


@pytest.mark.parametrize("limits", [CAREFUL, FAR])
def test_the_second_divergence_switches_off_for_good(limits):
    state, _ = rule(NEW, KEEP, limits, rate=START * 2, start=START, trouble="x")
    state, ruling = rule(state, KEEP, limits, rate=START * 2, start=START, trouble="x")
    assert ruling.off
    assert ruling.decision.rollback
    assert after(ruling, START * 2) == START
    for wish in (KEEP, Decision(10.0), Decision(rollback=True)):
        state, ruling = rule(state, wish, limits, rate=START, start=START, trouble="x")
        assert ruling.off
        assert ruling.decision == KEEP
        assert after(ruling) == START


def test_far_does_not_go_back_to_a_rate_that_diverged():
    state = GuardState(events=1)
    _, ruling = rule(state, KEEP, FAR, rate=START / 2, start=START, trouble="x")
    assert after(ruling, START / 2) == START / 4
    _, ruling = rule(state, KEEP, CAREFUL, rate=START / 2, start=START, trouble="x")
    assert after(ruling, START / 2) == START


@pytest.mark.parametrize(("limits", "first"), [(CAREFUL, 3 / math.sqrt(3)), (FAR, math.sqrt(3))])
def test_out_of_range_eases_and_three_in_a_row_switch_off(limits, first):
    state, ruling = rule(NEW, Decision(3.0), limits, rate=3 * START, start=START, strange=["gap"])
    assert after(ruling, 3 * START) == pytest.approx(first * START)
    assert "gap" in ruling.guard
    between, _ = rule(state, KEEP, limits, rate=START, start=START)
    assert between.strange == 0
    for _ in range(2):
        state, ruling = rule(state, KEEP, limits, rate=START, start=START, strange=["gap"])
    assert ruling.off
    assert state.off
    assert after(ruling) == START


numbers = st.floats(1e-3, 1e3)
wishes = st.one_of(st.builds(Decision, numbers), st.just(Decision(rollback=True)), st.just(KEEP))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([CAREFUL, FAR]),
    st.floats(1e-7, 1.0),
    st.lists(st.tuples(wishes, st.booleans(), st.sampled_from(["", "", "x"]),
                       st.sampled_from([[], [], ["gap"]])), max_size=20),
)  # fmt: skip
def test_whatever_is_wished_the_limits_hold(limits, start, story):
    state, rate, off = NEW, start, False
    for wish, warming, trouble, strange in story:
        state, ruling = rule(
            state, wish, limits, rate=rate, start=start, warming=warming, trouble=trouble,
            strange=strange,
        )  # fmt: skip
        new = after(ruling, rate)
        assert (
            start / limits.below * (1 - 1e-9) <= new <= min(start * limits.above, 10.0) * (1 + 1e-9)
        )
        if not trouble and not ruling.off:
            assert new <= rate * limits.up * (1 + 1e-9)
            assert new >= rate / limits.down * (1 - 1e-9) or math.isinf(limits.down)
            assert not (limits.gentle and warming and new > rate * (1 + 1e-9))
        if off:
            assert ruling.off
            assert ruling.decision == KEEP
        rate, off = new, ruling.off
    assert GuardState(**json.loads(json.dumps(asdict(state)))) == state


def reports(losses, validations=None, every=10):
    found = [Progress(0, START, 1.0, validation=1.7 if validations else math.nan)]
    for i in range(0, len(losses), every):
        extra = {"validation": validations[i // every]} if validations else {"age": i + 1}
        found.append(Progress(i + every, START, 1.0, tuple(losses[i : i + every]), **extra))
    return found


def falling(count, noise, seed, end=0.02):
    """Loss curves as fine-tuning has them: ever lower, with heavy tails above the median."""
    rng = np.random.default_rng(seed)
    curve = end + (1.7 - end) * np.exp(-np.arange(count) / (count / 6))
    return (curve * np.exp(noise * rng.standard_normal(count))).tolist()


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.6, 0.9])
def test_the_noise_of_small_batches_is_no_alarm(noise):
    for seed in range(5):
        history = reports(falling(300, noise, seed))
        for i in range(2, len(history) + 1):
            assert alarm(history[:i], CAREFUL, 2.0) == "", (seed, i)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"finite": False}, "weights"),
        ({"losses": (0.5, math.nan)}, "training loss is not finite"),
        ({"losses": (0.5, math.inf)}, "training loss is not finite"),
        ({"gradient": math.inf, "update": 1e-3}, "gradient"),
        ({"gradient": math.nan, "update": 1e-3}, "gradient"),
        ({"validation": math.nan, "age": 0}, "validation loss is not finite"),
        ({"validation": 5.0, "age": 0}, "validation loss is 5, and was 1.7 at its start"),
        ({"losses": (4.0,) * STREAK}, "training loss is far above the"),
    ],
)
def test_what_always_counts_as_a_divergence(change, words):
    history = reports(falling(50, 0.1, 0), [1.0, 0.8, 0.6, 0.5, 0.4])
    history[-1] = replace(history[-1], **change)
    for limits in (CAREFUL, FAR):
        for multiplier in (0.5, 1.0, 2.0):
            assert words in alarm(history, limits, multiplier)


def test_what_counts_where_the_tuner_is_answerable():
    history = reports(falling(80, 0.1, 0), [1.0, 0.8, 0.6, 0.5, 0.4, 0.4, 0.4, 0.4])
    risen = [replace(history[-1], losses=(0.9,) * 10), replace(history[-1], validation=0.9)]
    for report, words in zip(
        risen, ("running median", "is 0.9, and was 0.4 at its best"), strict=True
    ):
        story = [*history[:-1], report]
        assert words in alarm(story, CAREFUL, 1.5)
        assert alarm(story, CAREFUL, 1.0) == ""
        assert alarm(story, FAR, 1.5) == ""


def ratios_alone(history, gentle):
    """The lines for losses that are far from 0, by ratios: whether the latest report is above."""
    now, losses = history[-1], [loss for report in history for loss in report.losses]
    seen = [r.validation for r in history if r.age == 0 and math.isfinite(r.validation)]
    fresh, before = seen and now.age == 0, losses[: len(losses) - len(now.losses)][-WINDOW:]
    found = [fresh and now.validation > BLOWN * seen[0]]
    found.append(losses and streak(now.losses, TIMES * median(losses[:STREAK])))
    if gentle:
        found.append(fresh and now.validation > WORSE * min(seen))
    if gentle and len(before) >= STREAK:
        centre = median(before)
        spread = median(abs(loss - centre) for loss in before)
        found.append(streak(now.losses, max(centre + DEVIATIONS * spread, TIMES * centre)))
    return any(found)


@given(
    st.floats(MARGIN, 20), st.booleans(), st.booleans(),
    st.lists(st.tuples(*[st.sampled_from([1e-4, 0.03, 0.4, 0.99, 1.01, 2.1, 3, 9])] * 2),
             min_size=1, max_size=6),
)  # fmt: skip
def test_losses_that_begin_far_from_zero_are_judged_by_ratios(start, judged, spiky, levels):
    losses = [start] * 2 * STREAK
    for i, (level, _) in enumerate(levels):
        losses += [start * level * (1 + (j % 3 * 0.4 if spiky else 0)) for j in range(2 * STREAK)]
        validations = [start, *[start * each for _, each in levels[: i + 1]]] if judged else None
        history = reports(losses, validations, every=2 * STREAK)
        if judged:
            history[0] = replace(history[0], validation=start)
        for limits, multiplier in ((CAREFUL, 1.5), (CAREFUL, 1.0), (FAR, 1.5)):
            expected = ratios_alone(history, limits is CAREFUL and multiplier > 1)
            assert bool(alarm(history, limits, multiplier)) == expected


@pytest.mark.parametrize(
    ("losses", "validations", "words"),
    [
        ([-1.9, -2.1], [-1.9, -2.1], ""),
        ([-2.0, -1.0], [-2.0, -1.0], ""),
        ([0.3, -0.1, 0.1], [0.3, -0.1, 0.1], ""),
        ([2.0, -0.1, 0.1], [2.0, -0.1, 0.1], ""),
        ([0.001, 0.03], [0.001, 0.03], ""),
        ([-2.0, 0.1], None, "training loss is far above the -2 of its start"),
        ([0.001, 0.6], None, "training loss is far above the 0.001 of its start"),
        ([-2.0, -1.9], [-2.0, 1.5], "validation loss is 1.5, and was -2 at its start"),
        ([-2.0, -4.0], [-2.0, 0.1], "validation loss is 0.1, and was -2 at its best"),
        ([-1.0, -9.0, -1.5], None, ""),
        ([0.2, 0.01, 0.01, 0.6], None, "running median"),
    ],
)
def test_losses_near_zero_and_below(losses, validations, words):
    history = reports([loss for loss in losses for _ in range(10)], validations)
    if validations:
        history[0] = replace(history[0], validation=validations[0])
    for i in range(2, len(history)):
        assert alarm(history[:i], CAREFUL, 1.5) == ""
    found = alarm(history, CAREFUL, 1.5)
    assert words in found
    assert bool(words) == bool(found)


def test_a_step_that_a_loss_scaler_skipped_is_no_alarm():
    history = reports(falling(20, 0.1, 0))
    history[-1] = replace(history[-1], gradient=math.inf, update=0.0)
    assert alarm(history, CAREFUL) == ""
    history[-1] = replace(history[-1], gradient=math.nan, update=math.nan)  # not measured
    assert alarm(history, CAREFUL) == ""


def test_a_streak_is_in_a_row():
    assert not streak([9, 9, 9, 9, 0, 9, 9, 9, 9], 1)
    assert streak([0, 9, 9, 9, 9, 9], 1)


def test_modes_have_names():
    assert limits_of("careful") is CAREFUL
    assert limits_of("explore") is FAR
    with pytest.raises(UnknownName, match="Did you mean 'careful'"):
        limits_of("carefull")


# -- the helm ------------------------------------------------------------------------------------


class Table:
    """A policy that reads its action off the share of the run."""

    def __init__(self, *actions, actions_as=None):
        self._actions = actions
        self.sha256 = "a" * 64
        self.manifest = SimpleNamespace(actions=actions_as or Actions(), decisions=10, features=())

    def act(self, observation):
        return self._actions[round(float(observation[0]) * 10) % len(self._actions)]

    def outside(self, observation):
        return ["progress"] if observation[0] > 0.95 else []


def drive(helm, count=9):
    knobs, history, rulings = Knobs(rate=START), [Progress(0, START, 1.0)], []
    for i in range(count):
        ruling = helm.decide(history, CONTEXT, knobs)
        knobs = ruling.turn(knobs, CONTEXT)
        rulings.append((ruling, knobs.rate))
        history.append(
            Progress(10 * i + 10, knobs.rate, 1.0, (1.0, 0.9), decision=ruling.decision, age=i + 1)
        )
    return rulings


@pytest.mark.parametrize("view", ["discrete", "continuous"])
def test_the_log_has_a_line_a_decision_and_replays(tmp_path, view):
    actions, kind = (4, 3, 6, 7), Actions()
    if view == "continuous":
        kind = Actions(view="continuous")
        actions = [np.array(a, np.float32) for a in ((0.3, 0), (0, 0), (1, 0), (0, 1))]
    policy = Table(*actions, actions_as=kind)
    for limits in (CAREFUL, FAR):
        path = tmp_path / f"{limits.mode}.jsonl"
        helm = Helm(policy, limits, START, log=path)
        helm.start()
        rulings = drive(helm)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(0, 90, 10))
        assert [line["applied"]["rate"] for line in lines] == [rate for _, rate in rulings]
        assert set(lines[0]) >= {"step", "observation", "normalised", "proposed", "applied",
                                 "guard", "reason", "sha256"}  # fmt: skip
        assert replay(path, policy) == []
    other = Table(*reversed(actions), actions_as=kind)
    assert any("proposed" in line for line in replay(path, other))
    lines[2]["applied"]["rate"] *= 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert any(line.startswith("step 20: applied") for line in replay(path, policy))


@pytest.mark.parametrize(
    ("limits", "choice", "carried", "guard"),
    [
        (FAR, [0, 0, 1], Decision(0.3), "the clip cannot be turned here"),
        (FAR, [3, 0, 1], Decision(rollback=True), "the clip cannot be turned here"),
        (FAR, [0, 1, 0], Decision(0.3), NO_SWITCH),
        (FAR, [3, 1, 1], Decision(rollback=True), f"the clip cannot be turned here; {NO_SWITCH}"),
        (FAR, [1, 1, 1], Decision(), f"the clip cannot be turned here; {NO_SWITCH}"),
        (replace(FAR, turns=("clip",)), [1, 1, 1], Decision(turns=(("clip", 0.3),)), NO_SWITCH),
        (replace(FAR, switch=True), [0, 1, 1], Decision(0.3, optimizer="sgd"),
         "the clip cannot be turned here"),
    ],
)  # fmt: skip
def test_what_cannot_be_turned_here_leaves_the_rest(limits, choice, carried, guard, tmp_path):
    kind = Actions("joint", (0.3, 1.0, 3.0), optimizers=("sgd",), turns=(("clip", 0.3),))
    policy = Table(np.array(choice), actions_as=kind)
    helm = Helm(policy, limits, START, log=tmp_path / "log.jsonl")
    helm.start()
    ruling, _ = drive(helm)[0]
    assert (ruling.decision, ruling.guard) == (carried, guard)
    assert replay(tmp_path / "log.jsonl", policy) == []


@pytest.mark.parametrize(
    ("known", "decades", "limits", "moved"),
    [
        ({"classification"}, 0.0, CAREFUL, True),
        ({"causal"}, 0.0, CAREFUL, False),
        ({"causal"}, 0.45, CAREFUL, False),
        ({"causal"}, -0.45, CAREFUL, False),
        ({"causal"}, 0.6, CAREFUL, True),
        ({"causal"}, -0.6, CAREFUL, True),
        ({"causal"}, 0.0, FAR, True),
        (set(), 0.0, CAREFUL, True),
    ],
)
def test_careful_leaves_a_sensible_rate_alone_where_it_was_not_trained(
    tmp_path, known, decades, limits, moved
):
    policy = Table(2)
    policy.objectives = frozenset(known)
    start = reference_rate(CONTEXT.parameters, "adamw", "full") * 10**decades
    context = replace(CONTEXT, start_rate=start)
    helm = Helm(policy, limits, start, log=tmp_path / "log")
    helm.start()
    ruling = helm.decide([Progress(0, start, 1.0)], context, Knobs(rate=start))
    assert (ruling.decision != KEEP) == moved
    assert ("not trained on classification" in ruling.guard) == (not moved)
    assert replay(tmp_path / "log", policy) == []


def test_trouble_is_mended_where_it_was_not_trained_too():
    _, ruling = rule(
        NEW, KEEP, CAREFUL, rate=START, start=START, trouble="loss", foreign="not trained on it"
    )
    assert ruling.decision.rollback


def test_advice_changes_nothing(tmp_path):
    helm = Helm(Table(6), FAR, START, advise=True, log=tmp_path / "log")
    rulings = drive(helm)
    assert {rate for _, rate in rulings} == {START}
    assert all(ruling.decision == KEEP for ruling, _ in rulings)
    first = json.loads((tmp_path / "log").read_text().splitlines()[0])
    assert first["proposed"] == "x10"
    assert first["applied"]["multiplier"] == 1
    assert "x10 of the schedule" in first["guard"]
    assert replay(tmp_path / "log", Table(6)) == []


@pytest.mark.parametrize("action", [None, 99, -1, math.nan, "left", 2.5])
def test_nonsense_from_a_policy_switches_it_off(tmp_path, action, caplog):
    helm = Helm(Table(4, action), FAR, START, log=tmp_path / "log")
    rulings = drive(helm, 4)
    assert [rate for _, rate in rulings] == [START * 1.6, START, START, START]
    assert rulings[1][0].off
    assert helm.off.startswith("failed")
    assert len(caplog.records) == 1
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_a_full_disk_switches_it_off(tmp_path, monkeypatch, caplog):
    helm = Helm(Table(4), FAR, START, log=tmp_path / "log")
    monkeypatch.setattr(Audit, "append", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    assert {rate for _, rate in drive(helm, 3)} == {START}
    assert "full" in caplog.text


def test_the_state_goes_on_where_it_was(tmp_path):
    path = tmp_path / "log"
    helm = Helm(Table(4, 3), CAREFUL, START, log=path)
    drive(helm, 3)
    state = json.loads(json.dumps(helm.state()))
    kept = path.read_bytes()
    drive(helm, 2)
    with open(path, "ab") as file:
        file.write(b'{"step": 50, "torn')
    again = Helm(Table(4, 3), CAREFUL, START, log=path)
    again.load_state(state)
    assert path.read_bytes() == kept
    assert again.state() == state
    stranger = Table(4, 3)
    stranger.sha256 = "b" * 64
    with pytest.raises(BadInput, match="sha256"):
        Helm(stranger, CAREFUL, START, log=path).load_state(state)


def test_a_switched_optimizer_takes_the_bounds_along():
    actions = Actions(optimizers=("sgd",))
    policy = Table(8, 6, 6, actions_as=actions)
    helm = Helm(policy, replace(FAR, switch=True), START)
    knobs, context = Knobs(rate=START), CONTEXT
    history = [Progress(0, START, 1.0)]
    ruling = helm.decide(history, context, knobs)
    knobs = ruling.turn(knobs, context)
    assert (knobs.optimizer, knobs.rate) == ("sgd", pytest.approx(12 * START))
    for step in (10, 20):
        history.append(Progress(step, knobs.rate, 1.0, (1.0, 0.9), decision=ruling.decision))
        ruling = helm.decide(history, replace(context, optimizer="sgd"), knobs)
        knobs = ruling.turn(knobs, context)
    assert knobs.rate == pytest.approx(12 * START * EXPLORE)
