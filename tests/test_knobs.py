import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from envs.errors import BadInput, UnknownName
from envs.knobs import (
    KEEP,
    OPTIMIZERS,
    RATE_CEILING,
    RATE_FLOOR,
    ROLLBACK_FACTOR,
    SHAPES,
    Actions,
    Decision,
    Knobs,
    decode,
    exchange,
    factor,
    reference_rate,
    turn,
)
from envs.task import Task, find, vary

SWITCHING = Actions(optimizers=OPTIMIZERS)
CONTINUOUS = Actions("continuous")
WIDE = {"low": RATE_FLOOR, "high": RATE_CEILING}


def one_line(error):
    """A sentence of the form ``<where>: <field>: <problem>; <fix>`` or a look-up's."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 1000
    assert ";" in text or "Known: " in text, text
    return text


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0.0), (20, 0.0), (20, 0.1), (37, 0.3)])
def test_factor_is_the_schedule_of_transformers(shape, total, warmup):
    knobs = Knobs(rate=1.0, shape=shape, warmup=warmup)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    name = "constant_with_warmup" if shape == "constant" else shape
    scheduler = get_scheduler(name, optimizer, round(warmup * total), total)
    for step in range(total + 1):
        assert factor(knobs, step, total) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


@given(st.sampled_from(SHAPES), st.floats(0, 0.99), st.integers(1, 300), st.integers(0, 400))
def test_factor_stays_in_its_range(shape, warmup, total, step):
    assert 0.0 <= factor(Knobs(shape=shape, warmup=warmup), step, total) <= 1.0


def test_every_discrete_action_is_one_decision():
    found = [decode(action, SWITCHING) for action in range(SWITCHING.size)]
    assert found == [
        *(Decision(m) for m in SWITCHING.multipliers),
        Decision(rollback=True),
        *(Decision(optimizer=name) for name in OPTIMIZERS),
    ]
    assert found[SWITCHING.keep] == KEEP
    labels = [SWITCHING.label(action) for action in range(SWITCHING.size)]
    assert (labels[0], labels[SWITCHING.keep]) == ("x0.1", "keep")
    assert labels[len(SWITCHING.multipliers) :] == ["rollback", *OPTIMIZERS]


def test_without_rollback_a_switch_follows_the_multipliers():
    actions = Actions(rollback=False, optimizers=("sgd",))
    assert actions.size == len(actions.multipliers) + 1
    assert decode(actions.size - 1, actions) == Decision(optimizer="sgd")


@pytest.mark.parametrize("form", [int, np.int64, np.uint8, np.array, lambda a: np.array([a])])
def test_a_whole_number_may_come_in_any_form(form):
    assert decode(form(1), Actions(multipliers=(1.0, 0.6))) == Decision(0.6)


def test_continuous_actions_are_decades():
    assert decode(np.zeros(2), CONTINUOUS) == KEEP
    assert decode([-1.0, 0.5], CONTINUOUS) == Decision(0.1)
    assert decode(np.array([1, -1], np.float32), CONTINUOUS) == Decision(10.0)
    assert decode([0.3, 0.51], CONTINUOUS) == Decision(rollback=True)
    narrow = Actions("continuous", rollback=False, span=0.5)
    assert narrow.space().shape == (1,)
    assert decode([1.0], narrow).multiplier == pytest.approx(math.sqrt(10))


@given(st.sampled_from([Actions(), SWITCHING, CONTINUOUS]), st.integers(0, 2**31))
def test_every_action_of_a_space_can_be_decoded(actions, seed):
    space = actions.space()
    space.seed(seed)
    decision = decode(space.sample(), actions)
    assert 0.1 <= decision.multiplier <= 10.0


@pytest.mark.parametrize(
    "action",
    [-1, Actions().size, 10**30, 1.0, np.float32(3), True, None, "3", [1, 2], [], [[1], [2, 3]],
     math.nan, np.zeros((50, 50), int)],
)  # fmt: skip
def test_what_is_no_discrete_action_is_said_to_be_none(action):
    with pytest.raises(BadInput, match=r"^action: ") as error:
        decode(action, Actions())
    one_line(error)


@pytest.mark.parametrize(
    "action",
    [0, 0.5, [0.5], [0.5, 0.5, 0.5], [[0.5, 0.5]], [1.0001, 0], [0, -1.1], [math.nan, 0],
     [0, math.nan], [math.inf, 0], None, "ab", ["a", "b"], [[1], [2, 3]], [1j, 0],
     np.zeros((50, 50)), [True, False]],
)  # fmt: skip
def test_what_is_no_continuous_action_is_said_to_be_none(action):
    with pytest.raises(BadInput, match=r"^action: ") as error:
        decode(action, CONTINUOUS)
    one_line(error)


def test_turning_keeps_everything_but_what_was_asked_for():
    knobs = Knobs(1e-3, "cosine", 0.1, "adamw", 0.01, 0.5)
    assert turn(knobs, KEEP, **WIDE) == knobs
    assert turn(knobs, Decision(3.0), **WIDE) == Knobs(3e-3, "cosine", 0.1, "adamw", 0.01, 0.5)
    assert turn(knobs, Decision(rollback=True), **WIDE).rate == 1e-3 * ROLLBACK_FACTOR


@given(st.floats(1e-6, 1.0), st.floats(1e-3, 1e3), st.floats(1e-9, 1e-4), st.floats(1e-4, 10.0))
def test_turning_stays_within_bounds(rate, multiplier, low, high):
    turned = turn(Knobs(rate), Decision(multiplier), low=low, high=high)
    assert max(low, RATE_FLOOR) <= turned.rate <= min(high, RATE_CEILING)


@pytest.mark.parametrize("old", OPTIMIZERS)
@pytest.mark.parametrize("new", OPTIMIZERS)
def test_a_switch_moves_the_rate_and_its_bounds_along_the_ruler(old, new):
    ruler = [reference_rate(10**6, name, "full") for name in (old, new)]
    share = exchange(old, new, 10**6, "full")
    assert share == pytest.approx(ruler[1] / ruler[0])
    knobs = Knobs(rate=1e-3, optimizer=old)
    free = turn(knobs, Decision(optimizer=new), **WIDE, parameters=10**6)
    assert free.optimizer == new
    assert free.rate == pytest.approx(1e-3 * share)
    held = turn(knobs, Decision(optimizer=new), low=2e-3, high=3e-3, parameters=10**6)
    assert held.rate == pytest.approx(2e-3 * share)


@pytest.mark.parametrize(
    "bad",
    [{"rate": value} for value in (0, -1e-3, 1e30, math.nan, math.inf, "1e-3", None, True)]
    + [{"warmup": value} for value in (-0.1, 1.0, math.nan, "0.1")]
    + [{"weight_decay": value} for value in (-1, 2.0, math.nan)]
    + [{"clip": value} for value in (-1, math.nan, math.inf, None)],
)
def test_knobs_that_cannot_train_are_refused(bad):
    with pytest.raises(BadInput) as error:
        Knobs(**bad)
    text = one_line(error)
    (name, value), *_ = bad.items()
    assert text.startswith(f"knobs: {name}: ")
    assert repr(value) in text
    assert "give" in text


def test_unknown_names_come_with_the_nearest_known_one():
    for bad, near in (
        (lambda: Knobs(optimizer="adam"), "adamw"),
        (lambda: Knobs(shape="cosin"), "cosine"),
        (lambda: Actions("continous"), "continuous"),
        (lambda: Actions(optimizers=("rmspro",)), "rmsprop"),
        (lambda: Task("x.csv", adapter="lorra"), "lora"),
        (lambda: Task("x.csv", objective="classificaton"), "classification"),
        (lambda: find("tweet"), "tweets"),
        (lambda: find("trec6", batchsize=3), "batch"),
    ):
        with pytest.raises(UnknownName, match=f"Did you mean '{near}'") as error:
            bad()
        one_line(error)


@pytest.mark.parametrize(
    "bad",
    [
        {"multipliers": ()},
        {"multipliers": (0.5, 2.0)},
        {"multipliers": (1.0, 0.0)},
        {"multipliers": (1.0, math.nan)},
        {"multipliers": (1.0, 1e9)},
        {"multipliers": (1.0, "3")},
        {"span": 0},
        {"span": 3.5},
        {"span": math.nan},
        {"span": "1"},
        {"view": "continuous", "optimizers": ("sgd",)},
    ],
)
def test_actions_that_make_no_sense_are_refused(bad):
    with pytest.raises(BadInput, match=r"^actions: ") as error:
        Actions(**bad)
    one_line(error)


@pytest.mark.parametrize(
    ("bad", "value"),
    [
        ({"batch": 33, "rows": 32}, "33"),
        ({"batch": 0}, "0"),
        ({"steps": -1}, "-1"),
        ({"steps": 1.5}, "1.5"),
        ({"rows": "100"}, "'100'"),
        ({"rows": True}, "True"),
        ({"interval": 101, "steps": 100}, "101"),
        ({"noise": 0.95}, "0.95"),
        ({"noise": math.nan}, "nan"),
        ({"dropout": -0.1}, "-0.1"),
        ({"dropout": "0.1"}, "'0.1'"),
        ({"classes": ("a",)}, "'a'"),
        ({"classes": ("a", "b", "a")}, "'a'"),
        ({"classes": "ab"}, "'ab'"),
        ({"classes": (1, 2)}, "1"),
        ({"trainable_layers": -1}, "-1"),
        ({"trainable_layers": "2"}, "'2'"),
        ({"trainable_layers": 1, "adapter": "lora"}, "1"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused(bad, value):
    with pytest.raises(BadInput, match=r"^task: ") as error:
        Task("own.csv", **bad)
    assert value in one_line(error)


def test_classes_may_come_as_a_list():
    assert hash(Task("own.csv", classes=["a", "b"])) == hash(Task("own.csv", classes=("a", "b")))


@given(st.integers(0, 2**32))
def test_relatives_keep_the_decisions_and_the_chosen_classes(seed):
    """A task that is limited to some classes never meets another: they may be held out."""
    task = Task("own.csv", classes=("a", "b", "c"), steps=100, interval=10)
    relative = vary(task, task.classes, np.random.default_rng(seed))
    assert relative.decisions == task.decisions
    assert set(relative.classes) <= set(task.classes)
    assert len(relative.classes) >= 2
    assert relative.steps == relative.interval * relative.decisions


def test_preferences_take_a_lower_rate():
    plain = reference_rate(10**6, "adamw", "full")
    for name in ("classification", "causal", "grpo"):
        assert reference_rate(10**6, "adamw", "full", name) == plain
    for name in ("reward", "dpo", "kto"):
        assert reference_rate(10**6, "adamw", "full", name) == pytest.approx(0.3 * plain)
