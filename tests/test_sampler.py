"""A study that begins where a steered run ended: what is tried first, and what comes after."""

import importlib.util
import math
import pickle
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from fakes import OPTIMUM, FakeJob
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import RandomSampler, TPESampler
from test_evaluate import Scripted
from test_policy import example

from envs.errors import BadInput, RunFailed
from envs.task import Task
from tuner import policy
from tuner.sampler import NAMES, Start, SteersmanSampler, find_start, warm_start

TASK = Task("trec6", steps=20, interval=2)
FOUND = (Start(2e-3, "cosine", "adamw", 0.9), Start(5e-4, "linear", "sgd", 0.8))
ALL = {"rate": "learning_rate", "shape": "schedule", "optimizer": "optim"}
SPACE = {
    "learning_rate": FloatDistribution(1e-6, 1e-1, log=True),
    "schedule": CategoricalDistribution(["constant", "linear", "cosine"]),
    "optim": CategoricalDistribution(["sgd", "adamw"]),
    "decay": FloatDistribution(0.0, 0.1),
}


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def objective(trial):
    """Best at a rate of 1e-3, without decay."""
    rate = trial.suggest_float("learning_rate", 1e-6, 1e-1, log=True)
    trial.suggest_categorical("schedule", ["constant", "linear", "cosine"])
    trial.suggest_categorical("optim", ["sgd", "adamw"])
    return -abs(math.log10(rate / 1e-3)) - trial.suggest_float("decay", 0.0, 0.1)


def study_of(sampler=None, **options):
    return optuna.create_study(direction="maximize", sampler=sampler, **options)


def run(sampler, trials, study=None):
    """Parameters of a study's trials."""
    study = study or study_of(sampler)
    study.optimize(objective, n_trials=trials)
    return [trial.params for trial in study.trials]


def away(params, start):
    return abs(math.log10(params["learning_rate"] / start.rate))


# find_start


def test_a_start_is_the_rate_in_force_at_the_best_checkpoint_the_best_first():
    """x3 once, then keep: every checkpoint is better than the one before."""
    pilot = Scripted([5] + [3] * 29)
    found = find_start(pilot, TASK, runs=3, rate=OPTIMUM / 9, make_job=FakeJob)
    assert len(found) == 3
    assert min(abs(math.log10(start.rate / (OPTIMUM / 3))) for start in found) < 1e-9
    assert [start.score for start in found] == sorted((s.score for s in found), reverse=True)
    assert {(start.shape, start.optimizer) for start in found} == {("linear", "adamw")}
    assert found == find_start(Scripted([5] + [3] * 29), TASK, runs=3, rate=OPTIMUM / 9,
                               make_job=FakeJob)  # fmt: skip


def test_a_policy_file_and_a_real_task(tiny_task, tmp_path):
    policy.save(example("ppo"), tmp_path / "p.safetensors")
    (start,) = find_start(tmp_path / "p.safetensors", tiny_task(), rate=1e-2)
    assert start == find_start(example("ppo"), tiny_task(), rate=1e-2)[0]
    assert 0 < start.score <= 1
    assert 10**-1.5 <= start.rate / 1e-2 <= 10**1.5


def test_a_start_tells_with_which_head_it_was_found(tiny_task):
    actions = replace(example("ppo").manifest.actions, opens=(("head_rate", 10.0),))
    pilot = Scripted([actions.keep] * 20)
    pilot.manifest = SimpleNamespace(actions=actions, decisions=10, features=())
    (start,) = find_start(pilot, tiny_task(), rate=1e-2)
    assert start.head_rate == 10.0
    study = optuna.create_study()
    warm_start(study, [start], {"rate": "learning_rate", "head_rate": "head"})
    assert study.trials[0].system_attrs["fixed_params"]["head"] == 10.0


def test_a_start_is_what_was_in_force_not_what_the_run_was_opened_with(tiny_task):
    actions = replace(
        example("ppo").manifest.actions, optimizers=("sgd",), turns=(("head_rate", 3.0),)
    )
    switch, turn = actions.size - 2, actions.size - 1
    pilot = Scripted([switch, turn, turn] + [actions.keep] * 20)
    pilot.manifest = SimpleNamespace(actions=actions, decisions=10, features=())
    (start,) = find_start(pilot, replace(tiny_task(), interval=2), rate=1e-3)
    assert start.optimizer == "sgd"
    assert start.rate == pytest.approx(12e-3)
    assert start.head_rate in (3.0, 9.0)


def test_runs_that_all_diverge_are_no_start():
    with pytest.raises(RunFailed, match="give a lower rate"):
        find_start(Scripted([3] * 99), TASK, rate=9.0, make_job=lambda *a: Diverging(*a))
    with pytest.raises(BadInput, match="runs"):
        find_start(Scripted([]), TASK, runs=0, rate=1e-3)


class Diverging(FakeJob):
    def _finite(self):
        return self.step == 0


# warm_start


def test_what_was_found_is_run_first_with_exactly_those_values():
    study = study_of(TPESampler(seed=0))
    enqueued = warm_start(study, FOUND, ALL)
    assert enqueued == [
        {"learning_rate": 2e-3, "schedule": "cosine", "optim": "adamw"},
        {"learning_rate": 5e-4, "schedule": "linear", "optim": "sgd"},
    ]
    ran = run(None, 3, study)
    for params, wanted in zip(ran, enqueued, strict=False):
        assert wanted.items() <= params.items()
    assert not any(wanted.items() <= ran[2].items() for wanted in enqueued)
    warm_start(study, FOUND, ALL)
    assert len(study.trials) == 3, "what was tried is not enqueued again"


def test_every_process_of_a_shared_study_may_call_it(tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    first = study_of(study_name="s", storage=storage)
    warm_start(first, FOUND)
    second = optuna.load_study(study_name="s", storage=storage)
    warm_start(second, FOUND)
    assert [t.system_attrs["fixed_params"] for t in second.trials] == [
        {"learning_rate": 2e-3}, {"learning_rate": 5e-4},
    ]  # fmt: skip
    assert second.ask(SPACE).params["learning_rate"] == 2e-3


def test_rates_are_clipped_to_a_range_that_is_known():
    narrow = {"learning_rate": FloatDistribution(1e-5, 1e-3, log=True)}
    assert warm_start(study_of(), FOUND, space=narrow)[0] == {"learning_rate": 1e-3}
    study = study_of()
    study.ask(narrow)
    assert warm_start(study, FOUND)[0] == {"learning_rate": 1e-3}
    assert warm_start(study_of(), FOUND)[0] == {"learning_rate": 2e-3}


# the sampler


def test_first_what_was_found_then_a_band_around_it_then_the_base_sampler():
    trials = run(SteersmanSampler(FOUND, RandomSampler(seed=1), names=ALL, trials=40, seed=0), 60)
    for number, params in enumerate(trials[:40]):
        start = FOUND[number % 2]
        assert (params["schedule"], params["optim"]) == (start.shape, start.optimizer)
        assert away(params, start) <= (1e-9 if number < 2 else 0.6 + 1e-9)
    spread = [away(params, FOUND[n % 2]) for n, params in enumerate(trials[2:40], 2)]
    assert 0.1 < np.mean(spread) < 0.4
    assert len({params["learning_rate"] for params in trials}) > 50
    assert max(away(params, FOUND[0]) for params in trials[40:]) > 1


def test_what_is_not_named_and_what_comes_after_is_the_base_samplers_own():
    """The base draws decay alone in the first trials, and all in the later ones."""

    def one(trial):
        return trial.suggest_float("learning_rate", 1e-6, 1e-1, log=True)

    warm = study_of(SteersmanSampler(FOUND, RandomSampler(seed=5), trials=4, seed=0))
    plain = study_of(RandomSampler(seed=5))
    for study, count in ((warm, 10), (plain, 6)):
        study.optimize(one, n_trials=count)
    assert [t.params for t in warm.trials[4:]] == [t.params for t in plain.trials]


@pytest.mark.parametrize("multivariate", [True, False])
def test_later_trials_are_those_of_tpe_with_the_same_seed_and_history(multivariate):
    names = {"rate": "learning_rate"}

    def one(trial):
        return -abs(math.log10(trial.suggest_float("learning_rate", 1e-6, 1e-1, log=True) + 3))

    def base():
        return TPESampler(seed=5, multivariate=multivariate, n_startup_trials=4)

    warm = study_of(SteersmanSampler(FOUND, base(), names=names, trials=6, seed=0))
    warm.optimize(one, n_trials=12)
    plain = study_of(base())
    plain.add_trials(warm.trials[:6])
    plain.optimize(one, n_trials=6)
    assert [t.params for t in warm.trials] == [t.params for t in plain.trials]


def test_draws_depend_on_the_seed_and_the_trials_number_alone(tmp_path):
    def sampler(seed=7):
        return SteersmanSampler(FOUND, RandomSampler(seed=0), seed=seed)

    whole = [params["learning_rate"] for params in run(sampler(), 8)]
    storage = f"sqlite:///{tmp_path}/study.db"
    for _ in range(4):  # each with a sampler that knows nothing of the others, as a process has
        study = study_of(sampler(), study_name="s", storage=storage, load_if_exists=True)
        study.sampler.reseed_rng()
        rates = [params["learning_rate"] for params in run(None, 2, study)]
    assert rates == whole
    assert [p["learning_rate"] for p in run(pickle.loads(pickle.dumps(sampler())), 8)] == whole
    assert [p["learning_rate"] for p in run(sampler(8), 8)][2:] != whole[2:]
    assert run(SteersmanSampler(FOUND), 4)[2:] != run(SteersmanSampler(FOUND), 4)[2:]


def test_enqueued_trials_are_run_as_they_are():
    study = study_of(SteersmanSampler(FOUND, names=ALL, seed=0))
    study.enqueue_trial({"learning_rate": 1e-6, "schedule": "constant"})
    first, second = run(None, 2, study)
    assert (first["learning_rate"], first["schedule"], first["optim"]) == (
        1e-6,
        "constant",
        "adamw",
    )
    assert second["learning_rate"] == FOUND[1].rate


def test_draws_stay_in_the_studys_range():
    def narrow(trial):
        return trial.suggest_float("learning_rate", 1e-3, 2e-3, log=True)

    study = study_of(SteersmanSampler(FOUND, seed=0))
    study.optimize(narrow, n_trials=10)
    assert {t.params["learning_rate"] for t in study.trials} >= {1e-3, 2e-3}
    assert all(1e-3 <= t.params["learning_rate"] <= 2e-3 for t in study.trials)


@pytest.mark.parametrize("base", ["grid", "cmaes", "qmc", "group"])
def test_any_base_sampler(base):
    samplers = {
        "grid": lambda: optuna.samplers.GridSampler({name: [0.01] if name == "decay" else values
                        for name, values in GRID.items()}, seed=0),
        "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=0, warn_independent_sampling=False),
        "qmc": lambda: optuna.samplers.QMCSampler(seed=0, warn_independent_sampling=False,
                                                  warn_asynchronous_seeding=False),
        "group": lambda: TPESampler(seed=0, multivariate=True, group=True, n_startup_trials=2),
    }  # fmt: skip
    with pytest.warns() if base in ("qmc", "group") else nullcontext():
        sampler = samplers[base]()
    trials = run(SteersmanSampler(FOUND, sampler, names=ALL, trials=5, seed=0), 12)
    assert len(trials) == 12
    assert all(away(params, FOUND[n % 2]) <= 0.6 + 1e-9 for n, params in enumerate(trials[:5]))


GRID = {"learning_rate": [1e-6, 1e-5, 1e-4, 1e-3], "schedule": ["linear", "constant"],
        "optim": ["sgd", "adamw"], "decay": [0.01]}  # fmt: skip


# bad input


@pytest.mark.parametrize("begin", [
    lambda found, **options: SteersmanSampler(found, **options),
    lambda found, **options: warm_start(study_of(), found, **options),
])  # fmt: skip
@pytest.mark.parametrize(("found", "names", "said"), [
    ((), NAMES, "found"),
    ((2e-3,), NAMES, "holds no start"),
    (FOUND, {"rte": "learning_rate"}, "Did you mean 'rate'"),
    (FOUND, {}, "name each once"),
    (FOUND, {"rate": "x", "shape": "x"}, "name each once"),
])  # fmt: skip
def test_bad_beginnings_are_one_sentence(begin, found, names, said):
    with pytest.raises(BadInput, match=said) as error:
        begin(found, names=names)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("names", "space", "said"), [
    ({"rate": "decay"}, SPACE, "log=True"),
    ({"rate": "schedule"}, SPACE, "log=True"),
    ({"optimizer": "schedule"}, SPACE, "leave 'optimizer' out of names"),
    ({"shape": "decay"}, SPACE, "leave 'shape' out of names"),
])  # fmt: skip
def test_names_that_do_not_fit_the_study_are_one_sentence(names, space, said):
    study = study_of()
    with pytest.raises(BadInput, match=said) as error:
        warm_start(study, FOUND, names, space)
    assert "\n" not in str(error.value)
    assert not study.trials
    with pytest.raises(BadInput, match=said):
        run(SteersmanSampler(FOUND, names=names), 1)


def test_a_name_that_no_trial_has_had_is_told(tmp_path):
    said = "Did you mean 'learning_rate'"
    names = {"rate": "learning_rat"}
    with pytest.raises(BadInput, match=said):
        warm_start(study_of(), FOUND, names, SPACE)
    with pytest.warns(UserWarning, match=said):
        run(SteersmanSampler(FOUND, names=names, seed=0), 1)


def test_a_conditional_space_may_leave_out_what_was_named():
    """Optimizers without a rate, for one."""

    def one(trial):
        if trial.suggest_categorical("kind", ["adafactor", "adamw"]) == "adafactor":
            return 0.0
        return trial.suggest_float("learning_rate", 1e-6, 1e-1, log=True)

    study = study_of(SteersmanSampler(FOUND, RandomSampler(seed=0), trials=8, seed=0))
    study.enqueue_trial({"kind": "adamw"})
    study.optimize(one, n_trials=12)
    had = ["learning_rate" in trial.params for trial in study.trials]
    assert had[0]
    assert not all(had)
    adafactor = study_of()
    adafactor.add_trial(study.trials[had.index(False)])
    with pytest.warns(UserWarning, match="no trial so far"):
        assert warm_start(adafactor, FOUND)


def test_a_base_sampler_that_stays_with_its_first_space_gets_all_of_it():
    """CMA-ES draws nothing itself otherwise, to the end of the study."""

    def one(trial):
        rate = trial.suggest_float("learning_rate", 1e-6, 1e-1, log=True)
        return -sum(trial.suggest_float(name, -1.0, 1.0) ** 2 for name in "xy") - rate

    base = optuna.samplers.CmaEsSampler(seed=0, warn_independent_sampling=False)
    study = study_of(SteersmanSampler(FOUND, base, trials=5, seed=0))
    study.optimize(one, n_trials=12)
    by_cma = ["cma:generation" in trial.system_attrs for trial in study.trials]
    assert by_cma == [False] * 5 + [True] * 7


def test_bad_settings_are_refused():
    for bad in ({"rate": 0.0}, {"rate": math.nan}, {"rate": 1e-3, "shape": "linaer"}):
        with pytest.raises(BadInput):
            Start(**bad)
    with pytest.raises(BadInput, match="trials"):
        SteersmanSampler(FOUND, trials=0)


def test_the_example(tiny_task, capsys):
    path = Path(__file__).parent.parent / "examples" / "search" / "warm_start.py"
    assert len(path.read_text().splitlines()) <= 60
    spec = importlib.util.spec_from_file_location("warm_start_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    studies = module.main(example("ppo"), tiny_task(), trials=3)
    warm, cold = studies["warm"], studies["cold"]
    assert len(warm.trials) == len(cold.trials) == 3
    printed = capsys.readouterr().out
    rate = float(printed.partition("rate ")[2].partition(",")[0])
    assert warm.trials[0].params["learning_rate"] == pytest.approx(min(rate, 0.1), rel=0.05)
