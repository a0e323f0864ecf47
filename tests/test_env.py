import math
import random
import re
from dataclasses import replace
from itertools import pairwise

import gymnasium
import numpy as np
import pytest
import torch
from fakes import TASK, FakeJob, no_data
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from envs import workload
from envs.env import EXPLORE, FineTuneEnv
from envs.errors import BadInput, UnknownName
from envs.knobs import OPTIMIZERS, ROLLBACK_FACTOR, Actions, exchange
from envs.observe import FEATURES, SIZE
from envs.progress import Progress
from envs.reward import CEILING, PENALTY, gain, potential

VIEWS = {
    "discrete": Actions(),
    "switching": Actions(optimizers=OPTIMIZERS),
    "continuous": Actions("continuous"),
    "continuous, no rollback": Actions("continuous", rollback=False),
}
ACTIONS = {VIEWS["switching"].label(a): a for a in range(VIEWS["switching"].size)}
KEEP, ROLLBACK, LOWEST, LOWER, HIGHER, HIGHEST = (
    ACTIONS[name] for name in ("keep", "rollback", "x0.1", "x0.3", "x3", "x10")
)
ADAMW, SGD, RMSPROP = (ACTIONS[name] for name in ("adamw", "sgd", "rmsprop"))
NAMES = [feature.name for feature in FEATURES]


def weights(env):
    return torch.cat([part.reshape(-1) for part in env.unwrapped._job.snapshot()])


def applied_rates(env):
    return {group["lr"] for group in env.unwrapped._job._optimizer.param_groups}


def feature(observation, name):
    return float(observation[NAMES.index(name)])


def play(env, actions, seed, between=lambda: None):
    """An episode: observations, rewards, ends and rates, and the weights it ends with."""
    observation, info = env.reset(seed=seed)
    seen = [(observation.tolist(), 0.0, False, info["rate"])]
    for action in actions:
        between()
        observation, reward, terminated, truncated, info = env.step(action)
        assert not truncated
        assert env.observation_space.contains(observation)
        assert math.isfinite(reward)
        seen.append((observation.tolist(), reward, terminated, info["rate"]))
        if terminated:
            break
    return seen, weights(env)


def same(one, other):
    return one[0] == other[0] and torch.equal(one[1], other[1])


def scripted(train=None, validation=None, broken_at=math.inf, **figures):
    """Opens fake jobs whose training or validation losses are functions of the update."""

    class Scripted(FakeJob):
        def advance(self, steps):
            progress = super().advance(steps)
            losses = progress.losses
            if train is not None:
                losses = tuple(train(step) for step in range(self.step - steps, self.step))
            return replace(progress, losses=losses, finite=self.step < broken_at, **figures)

        def evaluate(self, split):
            score = super().evaluate(split)
            return score if validation is None else score._replace(loss=validation(self.step))

    return Scripted


@pytest.fixture
def fake(monkeypatch):
    no_data(monkeypatch)
    return lambda make_job=FakeJob, **options: FineTuneEnv(TASK, make_job=make_job, **options)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("made", [False, True])
def test_both_checkers_pass(tiny_task, view, made):
    options = {"task": tiny_task(steps=6, interval=2), "actions": VIEWS[view]}
    if made:
        env = gymnasium.make("Steersman/FineTune-v0", **options)
        check_env(env.unwrapped)
    else:
        env = FineTuneEnv(**options)
        check_env(env, skip_render_check=True)
    check_env_sb3(env)
    env.close()


def test_the_registered_environment_runs_to_its_end(tiny_task):
    env = gymnasium.make("Steersman/FineTune-v0", task=tiny_task(), actions=VIEWS["continuous"])
    observation, info = env.reset(seed=0)
    assert observation.shape == (SIZE,)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(5)]
    assert ends == [(False, False)] * 4 + [(True, False)]
    assert info["step"] == 0
    env.close()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_one_seed_is_one_episode(tiny_task, dropout):
    """Bit for bit, whatever else draws random numbers; another seed is another episode."""
    task = tiny_task(dropout=dropout, steps=12, interval=4)
    actions = [HIGHER, KEEP, LOWER]

    def stray():
        random.random(), np.random.rand(7), torch.rand(5), torch.manual_seed(0)

    env = FineTuneEnv(task)
    first = play(env, actions, seed=5)
    assert same(first, play(env, actions, seed=5))
    assert same(first, play(FineTuneEnv(task), actions, seed=5, between=stray))
    other = play(env, actions, seed=6)
    assert first[0][0][0] != other[0][0][0]
    assert not torch.equal(first[1], other[1])


def test_episodes_of_one_seeding_differ(tiny_task):
    env = FineTuneEnv(tiny_task(steps=4))
    env.reset(seed=0)
    heads = [weights(env)] + [env.reset()[1] and weights(env) for _ in range(2)]
    assert not any(torch.equal(a, b) for a, b in pairwise(heads))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_two_environments_in_turns_are_each_as_if_alone(tiny_task, dropout):
    task = tiny_task(dropout=dropout, steps=12, interval=4)
    actions = [KEEP, HIGHER, KEEP]
    alone = [play(FineTuneEnv(task), actions, seed) for seed in (1, 2)]
    envs = [FineTuneEnv(task) for _ in alone]
    together = [[(env.reset(seed=seed)[0].tolist(), 0.0)] for seed, env in enumerate(envs, 1)]
    for action in actions:
        for env, seen in zip(envs, together, strict=True):
            observation, reward, *_ = env.step(action)
            seen.append((observation.tolist(), reward))
    for env, seen, (expected, final) in zip(envs, together, alone, strict=True):
        assert seen == [step[:2] for step in expected]
        assert torch.equal(weights(env), final)


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
def test_global_generators_are_neither_read_nor_set(tiny_task, adapter):
    """From the loading of the model to the end of the episode, dropout included."""
    task = tiny_task(dropout=0.2, adapter=adapter)
    for cache in (workload.load, workload._encoder, workload._tokens):
        cache.cache_clear()
    FineTuneEnv(tiny_task(adapter=adapter)).reset(seed=0)  # imports may draw; episodes may not
    workload._encoder.cache_clear()

    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    play(FineTuneEnv(task, vary=True, optimizers=OPTIMIZERS, shape="any"), [KEEP] * 5, seed=0)
    assert states() == before


@pytest.mark.parametrize("decision", [0, 2])
def test_every_action_changes_the_update(tiny_task, decision):
    """The first one included: no two actions leave the same weights."""
    env = FineTuneEnv(tiny_task(), actions=Actions(optimizers=("sgd", "rmsprop")), spread=0.5)
    found = []
    for action in range(env.actions.size):
        env.reset(seed=3, options={"rate": 2e-3})
        for _ in range(decision):
            env.step(KEEP)
        env.step(action)
        found.append(weights(env))
    for i, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[:i]), env.actions.label(i)


def test_the_applied_rate_is_the_one_asked_for(tiny_task):
    """After every kind of action; a constant shape, so that it is the optimizer's own."""
    env = FineTuneEnv(tiny_task(steps=52), actions=VIEWS["switching"], shape="constant")
    _, info = env.reset(seed=0, options={"rate": 1e-2})
    size = env.context.parameters
    expected, optimizer = info["rate"], "adamw"
    assert expected == 1e-2
    for action in (
        KEEP,
        LOWER,
        ROLLBACK,
        SGD,
        KEEP,
        ROLLBACK,
        RMSPROP,
        HIGHER,
        ADAMW,
        KEEP,
    ):
        label = env.actions.label(action)
        if label in OPTIMIZERS:
            expected *= exchange(optimizer, label, size, "full")
            optimizer = label
        elif label == "rollback":
            expected *= ROLLBACK_FACTOR
        else:
            expected *= env.actions.multipliers[action]
        *_, info = env.step(action)
        assert applied_rates(env) == {info["rate"]}
        assert info["rate"] == pytest.approx(expected)
        assert info["optimizer"] == optimizer


def test_the_rate_stays_within_reach_of_the_start_in_the_optimizers_own_terms(tiny_task):
    """The bounds go along with a switch: keeping the rate keeps it."""
    env = FineTuneEnv(tiny_task(steps=40), actions=VIEWS["switching"], shape="constant")
    env.reset(seed=0, options={"rate": 1e-4})
    actions = (*[LOWEST] * 3, SGD, KEEP, *[HIGHEST] * 4, ADAMW)
    rates = [env.step(action)[4]["rate"] for action in actions]
    share = exchange("adamw", "sgd", env.context.parameters, "full")
    low, high = 1e-4 / EXPLORE, 1e-4 * EXPLORE
    assert rates[1] == rates[2] == pytest.approx(low)
    assert rates[3] == rates[4] == pytest.approx(low * share)
    assert rates[8] == pytest.approx(high * share)
    assert rates[9] == pytest.approx(high)


def test_rolling_back_brings_back_the_best_weights_to_the_bit(tiny_task):
    env = FineTuneEnv(tiny_task(steps=24), shape="constant")
    _, info = env.reset(seed=0, options={"rate": 2e-2})
    kept = [(info["validation"], weights(env))]
    for action in (KEEP, KEEP, KEEP, HIGHEST):
        *_, info = env.step(action)
        kept.append((info["validation"], weights(env)))
    best = min(kept, key=lambda pair: pair[0])[1]
    assert not torch.equal(best, kept[-1][1])
    job = env._job
    start, advance = [], job.advance
    job.advance = lambda steps: (start.append(weights(env)), advance(steps))[1]
    observation, _, _, _, info = env.step(ROLLBACK)
    assert torch.equal(start[0], best)
    assert info["rate"] == pytest.approx(2e-1 * ROLLBACK_FACTOR)
    assert applied_rates(env) == {info["rate"]}
    assert feature(observation, "rolled_back") == 1
    assert env._job.step == 20  # the updates are spent all the same


def test_rewards_add_up_to_the_final_quality(tiny_task):
    env = FineTuneEnv(tiny_task())
    _, info = env.reset(seed=1, options={"rate": 1e-2})
    first, total = info["validation"], 0.0
    for action in (KEEP, HIGHER, ROLLBACK, LOWER, KEEP):
        _, reward, over, _, info = env.step(action)
        total += reward
    assert over
    assert info["reason"] is None
    last = env.unwrapped._job.evaluate("validation").loss
    assert info["validation"] == last
    assert total == pytest.approx(math.copysign(abs(math.log(first / last)) ** 0.5, first - last))
    assert total == pytest.approx(potential(last, first) - potential(first, first))


def test_rewards_by_hand():
    assert potential(0.5, 1.0) == pytest.approx(math.sqrt(math.log(2)))
    assert potential(2.0, 1.0) == pytest.approx(-math.sqrt(math.log(2)))
    assert gain(1.0, 0.5, 2.0) == pytest.approx(math.sqrt(math.log(4)) - math.sqrt(math.log(2)))
    for lost in (math.nan, math.inf, 1e9):
        assert potential(lost, 1.0) == -CEILING
    assert potential(0.0, 1.0) == pytest.approx(math.sqrt(math.log(1e4)))
    assert potential(1.0, 0.0) == potential(1.0, math.nan) == -CEILING


CRASHES = {
    "NaN loss": ({"train": lambda step: math.nan}, "loss not finite"),
    "NaN in one update": ({"train": lambda s: math.nan if s == 3 else 1.0}, "loss not finite"),
    "infinite loss": ({"train": lambda step: math.inf}, "loss not finite"),
    "NaN weight": ({"broken_at": 4}, "weights not finite"),
    "NaN validation": ({"validation": lambda s: math.nan if s else 1}, "validation loss blew up"),
    "infinite": ({"validation": lambda s: math.inf if s else 1.0}, "validation loss blew up"),
    "exploding": ({"validation": lambda step: 1.4**step}, "validation loss blew up"),
    "NaN figures": (
        {"train": lambda s: math.nan, "gradient": math.nan, "update": math.inf, "clipped": math.nan,
         "cosine": -math.inf},
        "loss not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("blind", [0.0, 1.0])
@pytest.mark.parametrize("crash", CRASHES)
def test_a_divergence_ends_the_episode_at_a_bounded_cost(fake, crash, blind):
    """Terminated, not truncated; its return is below that of any run that did not diverge."""
    script, reason = CRASHES[crash]
    env = fake(scripted(**script), blind=blind)
    observation, _ = env.reset(seed=0)
    total, terminated = 0.0, False
    while not terminated:
        assert env.observation_space.contains(observation)
        observation, reward, terminated, truncated, info = env.step(KEEP)
        total += reward
    assert env.observation_space.contains(observation)
    assert np.all(np.isfinite(observation))
    assert info["reason"] == reason
    assert not truncated
    assert env._job.step < TASK.steps
    assert total == pytest.approx(-CEILING - PENALTY)
    assert math.isfinite(info["validation"])
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(KEEP)


def test_a_real_run_diverges_in_bounds(tiny_task):
    env = FineTuneEnv(tiny_task(), spread=0.0, optimizers=("sgd",), shape="constant")
    observation, _ = env.reset(seed=0, options={"rate": 10.0})
    total, terminated = 0.0, False
    while not terminated:
        observation, reward, terminated, _, info = env.step(HIGHEST)
        assert env.observation_space.contains(observation)
        total += reward
    assert info["reason"] is not None
    assert total == pytest.approx(-CEILING - PENALTY)


def test_a_run_that_only_gets_worse_pays_less_than_a_divergence(fake):
    env = fake(scripted(validation=lambda step: 1.0 + step / TASK.steps))
    env.reset(seed=0)
    total, terminated = 0.0, False
    while not terminated:
        _, reward, terminated, _, info = env.step(KEEP)
        total += reward
    assert info["reason"] is None
    assert -CEILING < total == pytest.approx(-math.sqrt(math.log(2)))


def test_a_step_after_the_end_raises(fake):
    env = fake()
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(KEEP)
    env.reset(seed=0, options={"rate": 1e-3})
    for _ in range(TASK.decisions):
        over = env.step(KEEP)[2]
    assert over
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(KEEP)
    env.reset()
    env.step(KEEP)


@pytest.mark.parametrize(
    ("view", "bad"),
    [("discrete", a) for a in (-1, Actions().size, 3.0, math.nan, None, [1, 2], "keep")]
    + [("continuous", a) for a in (0, [0.0], [0, 2.0], [math.nan, 0], [[0, 0]], None)],
)
def test_an_invalid_action_raises_and_changes_nothing(tiny_task, view, bad):
    good = KEEP if view == "discrete" else [0.0, 0.0]
    env, other = (FineTuneEnv(tiny_task(steps=8), actions=VIEWS[view]) for _ in range(2))
    for each in (env, other):
        each.reset(seed=0)
    with pytest.raises(BadInput, match=r"^action: "):
        env.step(bad)
    assert torch.equal(weights(env), weights(other))
    for _ in range(2):
        one, two = env.step(good), other.step(good)
        assert one[0].tolist() == two[0].tolist()
        assert one[1:] == two[1:]


def test_hidden_validation_is_not_seen_but_paid_for(fake):
    env, open_ = fake(blind=1.0), fake()
    shown, _ = env.reset(seed=0)
    open_.reset(seed=0)
    about = [n for n in NAMES if "validation" in n] + ["gap", "since_best"]
    for _ in range(TASK.decisions):
        assert [feature(shown, name) for name in about] == [0.0] * len(about)
        shown, reward, over, *_ = env.step(KEEP)
        seen, paid, *_ = open_.step(KEEP)
        assert reward == paid != 0
        assert feature(seen, "has_validation") == 1
    assert over
    half = fake(blind=0.5)
    assert len({feature(half.reset(seed=s)[0], "has_validation") for s in range(20)}) == 2


def test_the_data_sheet_is_true():
    sheet = FineTuneEnv.__doc__
    assert f"Box(-5, 5, ({SIZE},), float32)" in sheet
    assert FineTuneEnv.__init__.__kwdefaults__.keys() <= set(re.findall(r"(\w+):", sheet))
    said = re.search(r"multiply the rate by ([^;]*);", " ".join(sheet.split())).group(1)
    numbers = tuple(float(n) for n in re.findall(r"[\d.]+", said.replace("(keep)", "")))
    assert numbers == Actions().multipliers
    for action in range(Actions().size):
        assert Actions().label(action).removeprefix("x") in sheet
    assert "Box(-1, 1, (2,))" in sheet
    assert VIEWS["continuous"].space().shape == (2,)
    for section in ("Observation", "Action", "Reward", "Start", "End", "Info", "Version history"):
        assert f"{section}:" in sheet
    for words in ("loss not finite", "weights not finite", "validation loss blew up"):
        assert words in " ".join(sheet.split())


def test_the_info_is_what_the_data_sheet_lists(fake):
    env = fake()
    _, at_start = env.reset(seed=0)
    info = env.step(KEEP)[4]
    line = re.search(r"Info: (.*)", FineTuneEnv.__doc__).group(1)
    assert set(re.findall(r"``(\w+)``", line)) == set(info) == set(at_start)
    assert (at_start["step"], info["step"], info["task"]) == (0, 2, "fake/tiny-32")


def test_the_history_is_there_to_be_read(fake):
    env = fake()
    with pytest.raises(gymnasium.error.ResetNeeded):
        _ = env.context
    env.reset(seed=0)
    env.step(HIGHER)
    assert [report.step for report in env.history] == [0, 2]
    assert isinstance(env.history[0], Progress)
    assert env.history[1].decision.multiplier == 3.0
    assert env.context.total == TASK.steps


def test_starts_are_drawn_as_the_arguments_say(fake):
    spread = fake(spread=1.5)
    rates = np.log10([spread.reset(seed=s)[1]["rate"] for s in range(200)])
    assert 2.7 < np.ptp(rates) <= 3.0
    assert len({fake(spread=0).reset(seed=s)[1]["rate"] for s in range(5)}) == 1
    optimizers = fake(optimizers=OPTIMIZERS)
    assert {optimizers.reset(seed=s)[1]["optimizer"] for s in range(20)} == set(OPTIMIZERS)
    shapes = fake(shape="any")
    found = set()
    for seed in range(20):
        shapes.reset(seed=seed)
        found.add(shapes._job.knobs.shape)
    assert found == {"linear", "cosine", "constant"}
    wide = fake(spread=3.0, optimizers=("sgd",))
    assert max(wide.reset(seed=s)[1]["rate"] for s in range(40)) == 10.0  # the highest there is
    several = FineTuneEnv([TASK, replace(TASK, dataset="other")], make_job=FakeJob)
    assert len({several.reset(seed=s)[1]["task"] for s in range(20)}) == 2
    chosen = several.reset(seed=0, options={"task": replace(TASK, dataset="third")})[1]
    assert chosen["task"] == "third/tiny-32"


def test_relatives_of_a_task_are_those_its_data_can_serve(tiny_task, tmp_path):
    """Ten rows of either rare class: a subset of them alone has no batch of 32."""
    rows = [f"{'cat' if i % 2 else 'saw'} {i},{'ab'[i % 2]}" for i in range(200)]
    rows += [f"tower {i},{'cd'[i % 2]}" for i in range(20)]
    data = tmp_path / "uneven.csv"
    data.write_text("\n".join(["text,label", *rows]))
    env = FineTuneEnv(tiny_task(dataset=str(data)), vary=True)
    seen = set()
    for seed in range(25):
        env.reset(seed=seed)
        seen.add((env._job.task.classes, env._job.task.batch, env._job.task.interval))
        assert env._job.task.decisions == 5
    assert len(seen) > 10


def test_an_environment_that_cannot_work_is_refused(fake):
    for bad, problem in (
        ({"spread": -1}, "spread: -1 is out of range; give"),
        ({"spread": math.nan}, "spread: nan"),
        ({"blind": 1.5}, "blind: 1.5 is no probability; give"),
        ({"optimizers": ()}, "optimizers: none given; name"),
        ({"optimizers": ("adam",)}, "Did you mean 'adamw'"),
        ({"shape": "cosin"}, "Did you mean 'cosine'"),
    ):
        with pytest.raises(BadInput, match=problem):
            fake(**bad)
    with pytest.raises(BadInput, match="task: none given; name"):
        FineTuneEnv([])
    with pytest.raises(UnknownName, match="Did you mean 'rate'"):
        fake().reset(options={"rat": 1e-3})
    for rate in (0, math.nan, 1e30, "1e-3"):
        with pytest.raises(BadInput, match=r"rate: .* give"):
            fake().reset(options={"rate": rate})
