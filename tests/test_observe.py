import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_histories import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.knobs import OPTIMIZERS, Decision, reference_rate
from envs.observe import (
    FEATURES,
    LIMIT,
    SIZE,
    Contexts,
    Reports,
    features,
    frame,
    look,
    observe,
    slope,
    space,
)
from envs.progress import Context, Progress

CONTEXT = Context(100, 10, 1_000_000, 1000, 2, "full", "adamw", 1e-3)
START = Progress(0, 1e-3, 1.0, validation=1.0)

wild = st.one_of(
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e308, 5e-324, 1e30]),
)
sane = st.floats(1e-3, 1e3)
decisions = st.builds(
    Decision,
    multiplier=wild,
    rollback=st.booleans(),
    optimizer=st.sampled_from([None, *OPTIMIZERS]),
)


def reports(values):
    return st.builds(
        Progress,
        step=st.integers(0, 10**6),
        rate=values,
        factor=values,
        losses=st.lists(values, max_size=5).map(tuple),
        validation=values,
        age=st.integers(0, 50),
        gradient=values,
        clipped=values,
        update=values,
        cosine=values,
        finite=st.booleans(),
        decision=decisions,
    )


histories = st.lists(reports(wild), min_size=1, max_size=40)
contexts = st.builds(
    Context,
    total=st.integers(1, 10**7),
    decisions=st.integers(1, 10**4),
    parameters=st.integers(0, 10**12),
    rows=st.integers(0, 10**12),
    classes=st.integers(0, 10**6),
    adapter=st.sampled_from(["full", "lora"]),
    optimizer=st.sampled_from(OPTIMIZERS),
    start_rate=wild,
)


def named(history, context=CONTEXT):
    values = observe(history, context)
    return {feature.name: float(value) for feature, value in zip(FEATURES, values, strict=True)}


@settings(deadline=None)
@given(histories, contexts)
def test_any_history_gives_an_observation_in_the_space(history, context):
    observation = observe(history, context)
    assert observation.dtype == np.float32
    assert space().contains(observation)
    assert np.all(np.isfinite(observation))


@settings(deadline=None, max_examples=25)
@given(histories, contexts)
def test_observing_is_pure(history, context):
    before = copy.deepcopy((history, context))
    first = observe(history, context)
    first_again = observe(tuple(history), context)
    np.testing.assert_array_equal(first, first_again)
    assert repr((history, context)) == repr(before)


@settings(deadline=None, max_examples=50)
@given(st.lists(reports(sane), min_size=1, max_size=8), st.sampled_from([1e-2, 0.5, 3.0, 1e2]))
def test_losses_count_only_as_ratios(history, scale):
    """All losses by a constant: nothing moves. Those of training alone: only the gap does."""
    trained = [replace(r, losses=tuple(scale * loss for loss in r.losses)) for r in history]
    both = [replace(r, validation=scale * r.validation) for r in trained]
    plain = named(history)
    assert named(both) == pytest.approx(plain, abs=1e-5)
    moved = {n: v for n, v in named(trained).items() if v != pytest.approx(plain[n], abs=1e-5)}
    assert set(moved) <= {"gap"}


@settings(deadline=None, max_examples=50)
@given(st.lists(reports(sane), min_size=1, max_size=8), st.sampled_from([1e-3, 0.5, 7.0, 1e4]))
def test_gradients_and_rates_count_only_as_ratios(history, scale):
    scaled = [replace(r, gradient=scale * r.gradient) for r in history]
    assert named(scaled) == pytest.approx(named(history), abs=1e-5)
    rates = [replace(r, rate=scale * r.rate) for r in history]
    context = replace(CONTEXT, start_rate=scale * CONTEXT.start_rate)
    plain, other = named(history), named(rates, context)
    plain.pop("rate_vs_reference")
    other.pop("rate_vs_reference")
    assert other == pytest.approx(plain, abs=1e-5)


def test_every_feature_has_a_name_of_its_own_and_a_unit():
    assert SIZE == len({feature.name for feature in FEATURES}) == space().shape[0]
    assert all(feature.unit for feature in FEATURES)


def test_before_the_first_update_by_hand():
    ruler = reference_rate(1_000_000, "adamw", "full")
    assert named([START]) == pytest.approx(
        dict.fromkeys((feature.name for feature in FEATURES), 0.0)
        | {
            "schedule": 1.0,
            "rate_vs_reference": math.log10(1e-3 / ruler),
            "has_validation": 1.0,
        }
    )


def test_a_run_by_hand():
    e = math.e
    history = [
        START,
        Progress(10, 1e-3, 0.9, (e**2, e**2), 0.5, gradient=1.0, update=1e-3),
        Progress(20, 1e-3, 0.8, (e, e), 0.25, gradient=4.0, update=1e-3),
        Progress(
            30, 1e-2, 0.7, (e**1.25, e**1.75), 0.5, gradient=10.0, clipped=0.1, update=1e-2,
            cosine=0.5, decision=Decision(10.0),
        ),
    ]  # fmt: skip
    mean = (e**1.25 + e**1.75) / 2
    noise = 0.0  # two losses lie on their line
    assert named(history) == pytest.approx(
        {
            "progress": 0.3,
            "schedule": 0.7,
            "rate_vs_start": 1.0,
            "rate_vs_reference": math.log10(1e-2 / reference_rate(10**6, "adamw", "full")),
            "update_ratio": 1.0,
            "train_vs_initial": math.log(mean) - 2,
            "train_vs_best": math.log(mean) - 1,
            "train_vs_previous": math.log(mean) - 1,
            "train_slope": 1.0,  # half a nat an update, two updates
            "train_trend": (math.log(mean) - 2) / 2,
            "train_noise": noise,
            "validation_vs_initial": math.log(0.5),
            "validation_vs_best": math.log(2),
            "validation_vs_previous": math.log(2),
            "validation_trend": 0.0,  # 0.5, 0.25, 0.5
            "gap": math.log(0.5 / mean),
            "since_best": 0.1,
            "age": 0.0,
            "has_validation": 1.0,
            "gradient_vs_median": math.log10(10 / 4),
            "clipped": -1.0,
            "gradient_cosine": 0.5,
            "last_change": 1.0,
            "rolled_back": 0.0,
            "parameters": 0.0,
            "rows": 0.0,
            "classes": 0.0,
            "adapter": 0.0,
            "sgd": 0.0,
            "rmsprop": 0.0,
        },
        abs=1e-6,
    )


def test_noise_is_the_deviation_around_the_line():
    now = replace(START, step=10, losses=(1.0, math.e, 1.0, math.e))
    line = [0.2, 0.4, 0.6, 0.8]  # least squares through 0, 1, 0, 1
    rest = [y - f for y, f in zip((0, 1, 0, 1), line, strict=True)]
    seen = named([START, now])
    assert seen["train_slope"] == pytest.approx(0.2 * 4)
    assert seen["train_noise"] == pytest.approx(math.sqrt(sum(r * r for r in rest) / 4))


def test_a_rollback_and_an_adapter_are_seen():
    now = replace(START, step=10, rate=5e-4, decision=Decision(rollback=True))
    context = replace(
        CONTEXT, adapter="lora", optimizer="sgd", parameters=10**8, rows=10**5, classes=6
    )
    seen = named([START, now], context)
    assert (seen["rolled_back"], seen["adapter"], seen["sgd"], seen["rmsprop"]) == (1, 1, 1, 0)
    assert seen["last_change"] == pytest.approx(math.log10(0.5))
    assert seen["parameters"] == pytest.approx(1.0)
    assert seen["rows"] == pytest.approx(2.0)
    assert seen["classes"] == pytest.approx(math.log(3))


def test_a_validation_loss_of_another_interval_is_old():
    later = Progress(10, 1e-3, 0.9, (1.0,), validation=1.0, age=1)
    latest = Progress(20, 1e-3, 0.8, (1.0,), validation=1.0, age=2)
    seen = named([START, later, latest])
    assert seen["age"] == pytest.approx(0.2)
    assert seen["since_best"] == pytest.approx(0.2)
    assert seen["has_validation"] == 1.0


def test_without_validation_its_features_are_nought():
    blind = replace(START, validation=math.nan)
    later = Progress(10, 1e-3, 0.9, (2.0, 1.0), validation=math.nan, age=1)
    seen = named([blind, later])
    for name in ("has_validation", "gap", "since_best", "validation_vs_initial"):
        assert seen[name] == 0.0
    assert seen["train_slope"] < 0


def test_a_loss_that_blew_up_is_at_the_limit_and_not_beyond():
    seen = named([START, Progress(10, 1e-3, 0.9, (1.0,), 1e300)])
    assert seen["validation_vs_initial"] == LIMIT
    lost = named([START, Progress(10, 1e-3, 0.9, (1.0, math.nan), math.nan, gradient=math.inf)])
    assert lost["train_vs_initial"] == lost["gradient_vs_median"] == 0.0


def test_slope_of_known_lines():
    assert slope([1.0, math.e, math.e**2]) == pytest.approx((1.0, 0.0))
    assert slope([1.0, math.nan, math.e**2]) == pytest.approx((1.0, 0.0))  # a gap is a gap
    assert all(map(math.isnan, slope([1.0, -1.0])))
    assert all(map(math.isnan, slope([])))


def together(histories, contexts):
    """The reports of many runs as one batch; shorter tracks get NaN in front, losses behind."""
    columns = {}
    for name in Reports._fields:
        parts = [getattr(look(history), name) for history in histories]
        longest = max(len(part) for part in parts)
        if parts[0].ndim == 2:
            ends = [(0, 1) if name == "losses" else (1, 0)] * len(parts)
            parts = [
                np.pad(
                    part,
                    [[(longest - len(part)) * end for end in side], (0, 0)],
                    constant_values=math.nan,
                )
                for part, side in zip(parts, ends, strict=True)
            ]
        columns[name] = np.concatenate(parts, axis=-1)
    jobs = zip(*(frame(context) for context in contexts), strict=True)
    return Reports(**columns), Contexts(*(np.concatenate(part, axis=-1) for part in jobs))


def test_golden_observations_are_what_they_were():
    """Recorded from the first, scalar version of `observe`: a trained policy depends on them."""
    golden = np.load(Path(__file__).parent / "golden_observations.npy")
    seen = np.array([observe(history, context) for history, context in cases()])
    np.testing.assert_allclose(seen, golden, rtol=1e-6, atol=1e-6)
    assert len(golden) == 60
    assert np.count_nonzero(golden, axis=0).min() >= 5  # no feature is 0 throughout


def test_a_row_of_a_batch_is_the_single_observation():
    histories, contexts = zip(*cases(), strict=True)
    rows = features(*together(histories, contexts))
    single = np.array([observe(*case) for case in zip(histories, contexts, strict=True)])
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, single, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(histories, contexts), min_size=1, max_size=4))
def test_any_batch_gives_the_single_observations(runs):
    both = zip(*runs, strict=True)
    single = np.array([observe(*run) for run in runs])
    np.testing.assert_allclose(features(*together(*both)), single, rtol=1e-6, atol=1e-6)
