"""The simulated environment against the real one's code, gymnasium and known curves."""

import math

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from envs import curves
from envs.curves import OPTIMIZER, SHARED, TASK, Settings
from envs.env import BLOWN, EXPLORE, FineTuneEnv
from envs.errors import BadInput, UnknownName
from envs.knobs import OPTIMIZERS, Actions, Decision, Knobs, decode, exchange, factor, turn
from envs.observe import FEATURES, SIZE, observe
from envs.progress import Context, Progress
from envs.reward import CEILING, PENALTY
from envs.surrogate import SurrogateVectorEnv
from tuner.recorder import Recorder
from tuner.tabular import TabularAgent, TabularConfig, q_learning

NAMES = [feature.name for feature in FEATURES]
KEEP = Actions().keep
VIEWS = {
    "discrete": Actions(),
    "switching": Actions(optimizers=OPTIMIZERS),
    "continuous": Actions("continuous"),
    "continuous, no rollback": Actions("continuous", rollback=False),
}


def acts(env, seed):
    env.action_space.seed(seed)
    return env.action_space.sample()


def test_the_wildest_play_stays_in_bounds():
    """The largest rates, turned up at once, in every shape and with every optimizer."""
    for action in (0, KEEP, Actions().size - 2, Actions().size - 1):
        env = SurrogateVectorEnv(300, spread=3.0, shape="any", optimizers=OPTIMIZERS, jitter=3.0)
        env.reset(seed=0)
        for _ in range(25):
            observations, rewards, *_ = env.step(np.full(300, action))
            assert observations in env.observation_space
            assert np.isfinite(rewards).all()
            assert rewards.min() >= -2 * CEILING - PENALTY - 5


def play(env, steps, seed=0, first=0):
    """Everything an environment gives in some steps of random actions."""
    seen = [env.reset(seed=seed)[0]]
    for step in range(steps):
        observations, rewards, terminated, truncated, _ = env.step(acts(env, first + step))
        seen.append(np.column_stack([observations, rewards, terminated, truncated, env.rates]))
    return seen


@pytest.mark.parametrize("view", VIEWS)
def test_spaces_are_those_of_the_real_environment_and_hold(view):
    env = SurrogateVectorEnv(64, actions=VIEWS[view], optimizers=OPTIMIZERS, shape="any", blind=0.3)
    real = FineTuneEnv(actions=VIEWS[view])
    assert env.single_observation_space == real.observation_space
    assert env.single_action_space == real.action_space
    observations, _ = env.reset(seed=0)
    ends = 0
    for step in range(40):
        assert observations in env.observation_space
        assert observations.dtype == np.float32
        observations, rewards, terminated, truncated, _ = env.step(acts(env, step))
        assert rewards.dtype == np.float64
        assert np.isfinite(rewards).all()
        assert terminated.dtype == truncated.dtype == np.bool_
        assert not truncated.any()
        ends += terminated.sum()
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert ends > 64 * 4


@pytest.mark.parametrize("view", VIEWS)
def test_one_seed_is_one_episode_to_the_bit(view):
    make = lambda: SurrogateVectorEnv(8, actions=VIEWS[view], shape="any", blind=0.2)  # noqa: E731
    one, two, other = play(make(), 25), play(make(), 25), play(make(), 25, seed=1)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one[1][0], other[1][0])


def test_neighbours_do_not_matter():
    """Environment i of many, with its seed, lives as one alone does, whatever the others do.

    Up to rounding: vector instructions round the end of an array otherwise than its middle.
    """
    many = SurrogateVectorEnv(5, shape="any", optimizers=OPTIMIZERS)
    alone = SurrogateVectorEnv(1, shape="any", optimizers=OPTIMIZERS)
    rng = np.random.default_rng(0)
    together, single = many.reset(seed=3)[0], alone.reset(seed=5)[0]
    ends = 0
    for _ in range(60):
        np.testing.assert_allclose(together[2], single[0], atol=1e-3)
        actions = rng.integers(many.actions.size, size=5)
        together, rewards, over, _, _ = many.step(actions)
        single, reward, end, _, _ = alone.step(actions[2:3])
        assert rewards[2] == pytest.approx(reward[0], abs=1e-3)
        assert many.rates[2] == alone.rates[0]
        assert over[2] == end[0]
        ends += end[0]
    assert ends >= 6


def test_a_reset_without_a_seed_goes_on_and_seeds_may_be_listed():
    env = SurrogateVectorEnv(2)
    first, again = env.reset(seed=[4, 4])[0], env.reset()[0]
    np.testing.assert_array_equal(first[0], first[1])
    assert not np.array_equal(first, again)
    np.testing.assert_array_equal(first, env.reset(seed=[4, 4])[0])
    with pytest.raises(BadInput, match="give one for each of 2"):
        env.reset(seed=[1])


def test_ends_are_told_as_gymnasium_tells_them():
    env = SurrogateVectorEnv(32, spread=3.0, decisions=4)
    _, info = env.reset(seed=0)
    assert info["_rate"].all()
    assert set(info) >= {"step", "rate", "optimizer", "validation", "metric", "reason", "task"}
    returns, lives = np.zeros(32), np.zeros(32, dtype=int)
    reasons = set()
    for _ in range(40):
        observations, rewards, over, _, info = env.step(np.full(32, KEEP))
        returns, lives = returns + rewards, lives + 1
        if not over.any():
            assert "final_info" not in info
            continue
        np.testing.assert_array_equal(info["_final_obs"], over)
        np.testing.assert_array_equal(info["final_info"]["_metric"], over)
        for i in np.flatnonzero(over):
            final = info["final_info"]
            reasons.add(final["reason"][i])
            assert final["task"][i].endswith("/surrogate")
            assert 0 <= final["metric"][i] <= 1
            last = dict(zip(NAMES, info["final_obs"][i], strict=True))
            if final["reason"][i] is None:
                assert lives[i] == 4
                assert last["progress"] == 1.0
                change = last["validation_vs_initial"]
                assert abs(change) == 5.0 or returns[i] == pytest.approx(
                    max(-CEILING, math.copysign(math.sqrt(abs(change)), -change)), abs=1e-3
                )
            else:
                assert returns[i] == pytest.approx(-CEILING - PENALTY, abs=1e-5)
            now = dict(zip(NAMES, observations[i], strict=True))
            assert now["progress"] == now["rate_vs_start"] == 0.0
            assert info["step"][i] == 0
            assert info["reason"][i] is None
        returns[over], lives[over] = 0.0, 0
        assert all(info["final_obs"][i] is None for i in np.flatnonzero(~over))
    assert reasons == {None, "validation loss blew up"}


def test_the_recorder_reads_it():
    recorder = Recorder(SurrogateVectorEnv(16, spread=3.0))
    recorder.reset(seed=0)
    for _ in range(20):
        recorder.step(np.full(16, KEEP))
    assert len(recorder.returns) == len(recorder.metrics) >= 32
    assert 0 < recorder.divergences < len(recorder.returns)


@pytest.mark.parametrize("view", ["discrete", "switching"])
def test_rates_are_those_of_turn(view):
    """Multipliers, rollbacks, switches and bounds, for random actions over whole episodes."""
    env = SurrogateVectorEnv(16, actions=VIEWS[view], optimizers=OPTIMIZERS, spread=1.0)
    _, info = env.reset(seed=0)
    size = env._recipe.parameters
    knobs = [
        Knobs(rate, optimizer=o) for rate, o in zip(info["rate"], info["optimizer"], strict=True)
    ]
    starts = info["rate"].copy()
    for step in range(40):
        actions = acts(env, step)
        _, _, over, _, info = env.step(actions)
        for i, action in enumerate(actions):
            decision = decode(action, env.actions)
            low, high = starts[i] / EXPLORE, starts[i] * EXPLORE
            new = turn(knobs[i], decision, low=low, high=high, parameters=size)
            starts[i] *= exchange(knobs[i].optimizer, new.optimizer, size, "full")
            seen = info["final_info"] if over[i] else info
            assert seen["rate"][i] == pytest.approx(new.rate, rel=1e-12)
            assert seen["optimizer"][i] == new.optimizer
            knobs[i] = new
            if over[i]:
                knobs[i] = Knobs(info["rate"][i], optimizer=info["optimizer"][i])
                starts[i] = info["rate"][i]


@pytest.mark.parametrize("blind", [0.0, 1.0])
def test_observations_are_those_of_the_real_eyes(blind):
    """Each report, as a `Progress` and through `observe`, gives the row the environment gave."""
    actions = Actions()
    env = SurrogateVectorEnv(12, shape="any", blind=blind, optimizers=OPTIMIZERS)
    rows, _ = env.reset(seed=1)
    kept = [[] for _ in range(12)]

    def report(i, decision):
        now, draw = env._now, env._draw
        shape = ("constant", "linear", "cosine")[draw.shape[i]]
        losses = now.losses[: int(draw.updates[i]), i] if env._count[i] else ()
        count = int(env._count[i])
        return Progress(
            step=count * int(draw.updates[i]), rate=float(env.rates[i]),
            factor=factor(Knobs(shape=shape), count, 10), losses=tuple(map(float, losses)),
            validation=math.nan if blind else float(env._measured[i]),
            age=count if blind else 0, gradient=float(now.gradient[i]),
            clipped=float(now.clipped[i]), update=float(now.update[i]),
            cosine=float(now.cosine[i]), decision=decision,
        )  # fmt: skip

    for step in range(9):
        for i in range(12):
            if not env._count[i]:
                kept[i] = [report(i, Decision())]
            given, total = env._draw.given, int(env._draw.updates[i]) * 10
            context = Context(
                total, 10, env._recipe.parameters, int(given.rows[i]), int(given.classes[i]),
                "full", OPTIMIZERS[env._optimizer[i]], kept[i][0].rate,
            )  # fmt: skip
            np.testing.assert_allclose(rows[i], observe(kept[i], context), atol=2e-5, rtol=2e-5)
        chosen = acts(env, step)
        rows, *_ = env.step(chosen)
        for i in range(12):
            kept[i].append(report(i, decode(chosen[i], actions)))
    assert rows.shape == (12, SIZE)


def typical(**changes):
    """Laws and constants of one run, without jitter."""
    content = curves.load()
    constants = curves.constants_of(content)
    task = list(content["tasks"]).index(changes.pop("task", "tweets"))
    values = {"classes": 3.0, "prior": 1.05, "rows": 1000.0, "batch": 16.0, "noise": 0.0} | changes
    given = Settings(np.array([task]), *(np.array([value]) for value in values.values()))
    laws = curves.law(constants, given, np.zeros((len(curves.JITTER), 1)))
    return laws, constants.optimizer[:1].T


def run(pace, intervals=10, updates=10.0, **changes):
    """Training and validation losses of a run at a steady rate."""
    laws, optimizer = typical(**changes)
    now, before, seen = curves.fresh(laws), np.zeros(1), []
    for _ in range(intervals):
        now = curves.interval(now, laws, np.array([pace]), before, np.array([updates]), optimizer)
        before = np.array([pace])
        seen.append([float(loss[0]) for loss in curves.losses(now, laws)])
    return np.array(seen).T


def test_before_training_the_loss_is_that_of_guessing():
    laws, _ = typical()
    train, validation = curves.losses(curves.fresh(laws), laws)
    assert train[0] == validation[0] == pytest.approx(math.log(3))


def test_curves_have_the_shapes_that_runs_have():
    slow, good, hot, mad = (run(pace) for pace in (0.01, 0.4, 8.0, 80.0))
    assert math.log(3) > slow[1, -1] > good[1].min()  # a small rate is slow
    assert good[1].min() < hot[1, -1]  # a large one destroys
    assert mad[1, 0] > BLOWN * math.log(3)  # a huge one throws the loss up
    few, many = run(0.6, rows=200.0), run(0.6, rows=2000.0)
    assert few[0, -1] < many[0, -1]  # a small training set is memorised
    assert few[1, -1] - few[0, -1] > many[1, -1] - many[0, -1]
    assert few[1, -1] > few[1].min() + 0.02


def test_one_long_interval_is_as_two_halves():
    """The dynamics are closed forms in time: only memorising is stepped."""
    laws, optimizer = typical()
    pace, ten, five = np.array([0.2]), np.array([10.0]), np.array([5.0])
    whole = curves.interval(curves.fresh(laws), laws, pace, pace, ten, optimizer)
    half = curves.interval(curves.fresh(laws), laws, pace, pace, five, optimizer)
    halves = curves.interval(half, laws, pace, pace, five, optimizer)
    np.testing.assert_allclose(halves.modes, whole.modes, rtol=0.02)
    np.testing.assert_allclose(halves.head, whole.head, rtol=0.02)


def test_the_fitted_file_is_whole():
    content = curves.load()
    assert set(content["tasks"]) == {"trec6", "trec50", "sms", "movie", "amazon", "tweets"}
    assert tuple(content["optimizers"]) == OPTIMIZERS
    for name, keys in (("tasks", TASK), ("optimizers", OPTIMIZER)):
        assert all(set(keys) <= set(part) for part in content[name].values())
    assert set(content["shared"]) == set(SHARED)


def test_a_good_start_ends_well_and_a_bad_one_badly():
    env = SurrogateVectorEnv(600, vary=False)
    start = env.reset(seed=0)[0][:, NAMES.index("rate_vs_reference")]
    returns, lives = np.zeros(600), np.ones(600, dtype=bool)
    for _ in range(10):
        _, rewards, over, _, _ = env.step(np.full(600, KEEP))
        returns += rewards * lives
        lives &= ~over
    low, good, high = (
        returns[(a < start) & (start < b)].mean() for a, b in ((-1.5, -1), (-0.5, 0.3), (1, 1.5))
    )
    assert low < good - 0.2
    assert high < good - 0.2


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"num_envs": 0}, BadInput),
        ({"decisions": 0}, BadInput),
        ({"interval": 0}, BadInput),
        ({"spread": 4.0}, BadInput),
        ({"blind": -0.1}, BadInput),
        ({"optimizers": ()}, BadInput),
        ({"optimizers": ("adam",)}, UnknownName),
        ({"shape": "step"}, UnknownName),
        ({"tasks": ("trec7",)}, UnknownName),
    ],
)
def test_arguments_that_make_no_sense_are_refused(bad, error):
    with pytest.raises(error):
        SurrogateVectorEnv(**{"num_envs": 2, **bad})


def test_a_step_before_the_reset_raises():
    with pytest.raises(gymnasium.error.ResetNeeded):
        SurrogateVectorEnv(2).step([KEEP, KEEP])
    with pytest.raises(UnknownName):
        SurrogateVectorEnv(2).reset(options={"ratte": 1})


def mean_return(env, act, episodes=20):
    """Mean return of the episodes that begin with a seed of their own; its standard error."""
    recorder = Recorder(env)
    observations, _ = recorder.reset(seed=10_000)
    for _ in range(10 * episodes):
        observations, *_ = recorder.step(act(observations))
    returns = np.array(recorder.returns)
    return returns.mean(), returns.std() / math.sqrt(len(returns))


def test_q_learning_beats_keeping_the_rate():
    """On episodes it was not trained on, from starting rates over three decades."""
    actions = Actions(multipliers=(0.1, 0.3, 1.0, 3.0))
    env = SurrogateVectorEnv(128, actions=actions, shape="any")
    agent = TabularAgent(q_learning, actions.size, actions.keep, TabularConfig(episodes=4))
    for i in range(30):
        agent.learn(env, seed=i, share=i / 30)
    _, arrays = agent.network()
    table = arrays["table"].reshape(-1, actions.size)
    learned, error = mean_return(env, lambda seen: table[agent.states(seen)].argmax(1))
    kept, other = mean_return(env, lambda seen: np.full(128, actions.keep))
    assert learned - kept > max(0.05, 4 * math.hypot(error, other))
