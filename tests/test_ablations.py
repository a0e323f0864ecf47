"""Ablations: what they do on hand-made observations, and how they enter a comparison."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from fakes import OPTIMUM, TASK, FakeJob
from test_method import MethodConformance, ended
from test_policy import example

from baselines.identity import describe
from baselines.method import Arena
from baselines.schedules import Fixed
from envs.errors import BadInput
from envs.knobs import Actions, Knobs, decode
from envs.observe import SIZE, space
from envs.task import TASKS
from tuner.ablations import Opened, RandomActions, Rule, Shuffled, pool
from tuner.audit import lead
from tuner.evaluate import PolicyMethod, ablations, run_comparison, write_report
from tuner.policy import PLACES
from tuner.settings import CompareConfig

LIFTED = Actions(opens=(("head_rate", 10.0),), rollback=False)


class TestAblations(MethodConformance):
    @pytest.fixture(params=["random", "random continuous", "shuffled", "rule"])
    def method(self, request):
        kind, _, view = request.param.partition(" ")
        return PolicyMethod(
            {
                "random": RandomActions(Actions(view or "discrete")),
                "shuffled": Shuffled(example("ppo")),
                "rule": Rule(),
            }[kind],
            request.param,
        )


def seen(**features):
    """An observation, zero but for some features."""
    observation = np.zeros(SIZE, np.float32)
    for name, value in features.items():
        observation[PLACES[name]] = value
    return observation


def moves(observations, rule=None):
    """The rule's decisions of one run: what each multiplies the rate by."""
    pilot = (rule or Rule()).pilot(0)
    return [decode(pilot.act(each), pilot.manifest.actions).multiplier for each in observations]


# The rule.


def test_the_rule_walks_to_the_reference_a_decade_at_a_time_and_then_keeps():
    off = [-1.4, -0.4, 0.0, 0.0]
    assert moves([seen(rate_vs_reference=x) for x in off]) == pytest.approx(
        [10, 10**0.4, 1, 1], rel=1e-5
    )
    assert moves([seen(rate_vs_reference=x) for x in (1.2, 0.2, 0.01)]) == pytest.approx(
        [0.1, 10**-0.2, 1], rel=1e-5
    )


def test_the_rule_halves_when_validation_got_worse_twice_in_a_row():
    changes = [0.0, 0.1, -0.1, 0.1, 0.1, 0.1, 0.1, -0.2, 0.1]
    found = moves([seen(validation_vs_previous=x) for x in changes])
    assert found == pytest.approx([1, 1, 1, 1, 0.5, 1, 0.5, 1, 1], rel=1e-6)


def test_the_rule_does_not_walk_back_after_it_has_halved():
    observations = [
        seen(), seen(validation_vs_previous=0.1), seen(validation_vs_previous=0.1),
        seen(rate_vs_reference=-0.3), seen(rate_vs_reference=-0.3, validation_vs_previous=-0.1),
    ]  # fmt: skip
    assert moves(observations) == pytest.approx([1, 1, 0.5, 1, 1], rel=1e-6)


def test_the_rule_can_bear_a_small_rise_and_forgets_the_last_run():
    changes = [seen(validation_vs_previous=0.1)] * 4
    assert moves(changes, Rule(tolerance=0.2)) == [1] * 4
    rule = Rule()
    assert moves(changes[:1], rule) == moves(changes[:1], rule) == [1]


@pytest.mark.parametrize("decades", [-1.5, -0.7, 0.0, 1.1, 1.5])
def test_the_rule_brings_a_misjudged_run_to_the_reference_under_the_guard(decades):
    arena = Arena(TASK, 0, OPTIMUM * 10**decades, 9, FakeJob)
    PolicyMethod(Rule()).run(arena)
    rates = [point.rate for point in arena.trials[0].curve]
    assert rates[3:] == pytest.approx([OPTIMUM] * 7, rel=0.15)


@pytest.mark.parametrize("rollback", [False, True])
def test_actions_of_ablations_are_of_the_policys_view(rollback):
    actions = Actions("continuous", rollback=rollback)
    kept = decode(Opened(actions).pilot(0).act(seen()), actions)
    assert (kept.multiplier, kept.rollback) == (1.0, False)
    decode(RandomActions(actions).pilot(0).act(seen()), actions)


def test_a_shuffled_policy_has_the_odds_of_what_it_was_dealt():
    """So that mode careful holds it to the same lead as the policy."""
    policy = example("ppo")
    pilot = Shuffled(policy).pilot(0)
    odds = set()
    for _ in range(20):
        chosen = pilot.act(seen())
        odds.add(found := lead(pilot, seen(), policy.manifest.actions))
        assert (found == 0) == (chosen == policy.manifest.actions.keep)
    assert len(odds) > 2
    assert lead(RandomActions(Actions()).pilot(0), seen(), Actions()) is None


@pytest.mark.parametrize("view", ["discrete", "continuous"])
def test_what_a_policy_opens_with_alone_keeps_the_rate_and_has_the_head(view, tiny_task):
    """The run is the user's own schedule with that head's rate, to the bit."""
    pilot = Opened(replace(LIFTED, view=view))
    arena, plain = (Arena(tiny_task(), 0, 2e-3, 9) for _ in range(2))
    PolicyMethod(pilot).run(arena)
    Fixed(Knobs(2e-3, head_rate=10.0)).run(plain)
    (mine,), (own,) = arena.trials, plain.trials
    assert {point.rate for point in mine.curve} == {2e-3}
    assert mine.test == own.test
    assert [point.selection for point in mine.curve] == [point.selection for point in own.curve]
    rule = Arena(tiny_task(), 0, 2e-3, 9)
    PolicyMethod(Rule(opens=LIFTED.opens)).run(rule)
    assert rule.trials[0].knobs.head_rate == 10.0


# Random actions.


@pytest.mark.parametrize("view", ["discrete", "continuous"])
def test_random_actions_are_even_seeded_and_in_the_space(view):
    actions = Actions(view)
    drawn = {}
    for name, seed, number in (("a", 1, 0), ("again", 1, 0), ("b", 2, 0), ("c", 1, 1)):
        pilot = RandomActions(actions).pilot(seed, number)
        drawn[name] = [pilot.act(seen()) for _ in range(800)]
        assert pilot.outside(seen()) == []
    assert all(actions.space().contains(action) for action in drawn["a"])
    flat = {name: np.array(values).ravel().tolist() for name, values in drawn.items()}
    assert flat["a"] == flat["again"]
    assert flat["a"] not in (flat["b"], flat["c"])
    if view == "discrete":
        assert min(np.bincount(drawn["a"], minlength=actions.size)) > 60
    else:
        assert abs(np.mean(drawn["a"])) < 0.1


# Shuffled observations.


def test_the_pool_is_what_the_policy_sees_of_simulated_runs():
    policy = example("ppo")
    observations = pool(policy)
    assert observations.shape == (64 * policy.manifest.decisions, SIZE)
    assert all(space().contains(each) for each in observations[::50])
    assert set(observations[:, PLACES["progress"]].round(6)) >= {0.0, np.float32(0.5)}
    assert np.array_equal(observations, pool(policy))


@pytest.mark.parametrize("name", ["ppo", "continuous ppo", "sarsa"])
def test_a_shuffled_policy_acts_as_often_in_each_way_but_not_on_what_it_sees(name):
    policy = example(name)
    pilot, again, other = (Shuffled(policy).pilot(*seed) for seed in ((0,), (0,), (0, 1)))
    found = [np.asarray(pilot.act(seen())).tolist() for _ in range(300)]
    assert found == [
        np.asarray(again.act(seen(rate_vs_start=n % 3))).tolist() for n in range(300)
    ], "the observation changes nothing"
    assert found != [np.asarray(other.act(seen())).tolist() for _ in range(300)]
    own = {str(np.asarray(policy.act(each)).tolist()) for each in pool(policy)}
    assert {str(action) for action in found} <= own


def test_the_guard_sees_the_run_that_a_shuffled_policy_does_not():
    policy = example("ppo")
    strange = seen(progress=4.9)
    assert Shuffled(policy).pilot(0).outside(strange) == policy.outside(strange) != []


# As contestants.


def test_ablations_are_told_apart_are_plain_values_and_travel():
    policy = example("ppo")
    known = [
        Shuffled(replace(policy, sha256="a")), Shuffled(replace(policy, sha256="b")), Rule(),
        Rule(near=0.1), RandomActions(Actions()), RandomActions(Actions("continuous")),
        Opened(Actions()), Opened(LIFTED), Rule(opens=LIFTED.opens),
    ]  # fmt: skip
    told = [json.dumps(describe(PolicyMethod(each))) for each in [policy, *known]]
    assert len(set(told)) == len(told)
    again = pickle.loads(pickle.dumps(PolicyMethod(known[0])))
    assert describe(again) == describe(PolicyMethod(known[0]))


def test_only_a_policy_counts_as_steered():
    assert PolicyMethod(example("ppo")).steered
    assert not any(method.steered for method in ablations(["steersman"], [example("ppo")]))


def test_each_policy_is_shuffled_and_the_others_come_once():
    found = ablations(["one", "two"], [example("ppo"), example("sarsa")])
    assert [method.name for method in found] == [
        "one shuffled", "two shuffled", "random-actions", "opened", "rule",
    ]  # fmt: skip
    with pytest.raises(BadInput, match="give one"):
        ablations([], [])


def test_a_second_run_of_a_cell_draws_other_actions():
    arena = ended(PolicyMethod(RandomActions(Actions()), runs=2), Arena(TASK, 0, 1e-3, 9, FakeJob))
    one, two = ([point.decision for point in trial.curve] for trial in arena.trials)
    assert one != two


def test_a_comparison_with_ablations(tiny_task, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "tiny", tiny_task())
    config = CompareConfig(
        tasks=("tiny",), seeds=4, runs=2, methods=("keep", "range-test"), workers=0, ablations=True
    )
    found = run_comparison(config, [example("ppo")], tmp_path, lambda *given: None)
    assert {(outcome["method"], outcome["steered"]) for outcome in found} == {
        ("keep", False), ("range-test", False), ("steersman", True),
        ("steersman shuffled", False), ("random-actions", False), ("opened", False),
        ("rule", False),
    }  # fmt: skip
    guards = [
        point["guard"] for each in found for trial in each["trials"] for point in trial["curve"]
    ]
    assert any(guards)
    assert not any(guard.startswith("off: failed") for guard in guards)
    summary = write_report(tmp_path)
    assert summary["steered"] == "steersman"
    assert {row["name"]: row["kind"] for row in summary["methods"]}["rule"] == "schedule"
