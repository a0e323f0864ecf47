"""Any Trainer is a job: the plain run to the bit, halted where a decision is due."""

import gc
import math
import random
import re
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import tiny
import torch
from accelerate import DistributedType
from gymnasium.utils.env_checker import check_env
from job_conformance import SEED, STEPS, JobConformance
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from envs import catalog
from envs.chance import put_back
from envs.env import FineTuneEnv
from envs.errors import BadInput, RunFailed
from envs.handles import beta_of
from envs.knobs import Actions, Knobs
from envs.switchable import SwitchableOptimizer
from envs.task import Task
from envs.trainer_env import score, trainer_env
from envs.trainer_job import Setup, TrainerJob

logging.set_verbosity_error()
logging.disable_progress_bar()

KEEP, TENTH = 3, 0
ROWS = 48


class Texts(Dataset):
    """Rows of the tiny data set, tokenised."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Stream(IterableDataset):
    """The same rows, without saying how many."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tiny.write_data(tmp_path_factory.mktemp("own") / "words.csv", rows=ROWS + 40)
    coded, rows = tiny.tokenizer(), []
    for line in path.read_text().splitlines()[1:]:
        text, label = line.split(",")
        row = coded(text, padding="max_length", truncation=True, max_length=12)
        rows.append({**dict(row), "labels": tiny.CLASSES.index(label)})
    return SimpleNamespace(train=Texts(rows[:ROWS]), eval=Texts(rows[ROWS:]))


@pytest.fixture(scope="module")
def factory(tmp_path_factory, texts):
    """A seed -> a Trainer with dropout, as a user would write it."""
    model = tiny.write_model(tmp_path_factory.mktemp("own") / "bert")
    folder = tmp_path_factory.mktemp("out")

    def make(seed, kind=Trainer, callbacks=(), train=texts.train, eval_dataset=texts.eval,
             **changes):  # fmt: skip
        torch.manual_seed(seed)
        settings = {
            "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 8,
            "learning_rate": 1e-2, "seed": seed, "report_to": "none", "save_strategy": "no",
            "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no",
        } | changes  # fmt: skip
        return kind(
            model=AutoModelForSequenceClassification.from_pretrained(model, num_labels=3),
            args=TrainingArguments(**settings),
            train_dataset=train,
            eval_dataset=eval_dataset,
            callbacks=list(callbacks),
        )

    return make


def opened(factory, seed=SEED, rate=1e-2, steps=STEPS, dials=None, **changes):
    """The same as `trainer_env` makes of a factory."""

    def make(task, seed, knobs):
        trainer = factory(seed, learning_rate=knobs.rate, **changes)
        return Setup(trainer, score, ROWS, 3)

    task = Task("trainer", objective="own", steps=steps, interval=4, batch=8, rows=ROWS)
    return TrainerJob(task, seed, Knobs(rate, **dials or {}), make=make)


def weights(job):
    return torch.cat([part.reshape(-1) for part in job.snapshot()])


class TestTrainerJob(JobConformance):
    @pytest.fixture(autouse=True)
    def _factory(self, factory):
        self.factory = factory

    def open(self, seed=SEED, rate=JobConformance.RATE):
        return opened(self.factory, seed, rate)


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 2}, {"lr_scheduler_type": "cosine", "warmup_steps": 3},
     {"optim": "sgd"}, {"eval_strategy": "steps", "eval_steps": 5}],
    ids=["plain", "accumulation", "cosine", "sgd", "evaluations"],
)  # fmt: skip
def test_left_alone_it_is_the_plain_run_to_the_bit(factory, changes):
    """With evaluations and snapshots in between."""
    _is_the_plain_run(factory, **changes)


def _is_the_plain_run(factory, **changes):
    job = opened(factory, **changes)
    for _ in range(3):
        job.evaluate("validation")
        job.snapshot()
        job.advance(4)
    trainer = factory(SEED, **changes)
    trainer.train()
    plain = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
    assert torch.equal(weights(job), plain)


def test_a_stream_of_rows_is_trained_and_judged_on(factory, texts):
    """It has as many rows as the run sees."""
    streams = {"train": Stream(texts.train.rows), "eval_dataset": Stream(texts.eval.rows)}
    _is_the_plain_run(factory, **streams)
    env = trainer_env(lambda seed: factory(seed, **streams), decisions=3, spread=0.0)
    env.reset(seed=0)
    assert env.context.rows == STEPS * 8
    assert math.isfinite(env.step(KEEP)[4]["validation"])
    halves = streams | {"gradient_accumulation_steps": 2}
    env = trainer_env(lambda seed: factory(seed, **halves), decisions=3)
    env.reset(seed=0)
    assert env.context.rows == STEPS * 16


def test_the_losses_are_those_of_the_updates(factory):
    """Also where each update is of several micro-batches."""
    seen = []

    class Watched(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            seen.append(loss.item())
            return loss

    assert opened(factory, kind=Watched).advance(6).losses == pytest.approx(seen)
    seen.clear()
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    losses = opened(factory, kind=Watched, **halves).advance(3).losses
    pairs = np.asarray(seen).reshape(3, 2)
    assert losses == pytest.approx(pairs.mean(1).tolist())  # of BERT each is a mean of its own rows


def test_the_schedule_is_the_trainers_own(factory):
    rates = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    job = opened(factory, rate=1e-2, callbacks=[Watch()])
    job.advance(4)
    job.apply(Knobs(2e-2))
    report = job.advance(4)
    shape = [1 - step / STEPS for step in range(9)]
    assert rates == pytest.approx([1e-2 * x for x in shape[:4]] + [2e-2 * x for x in shape[4:8]])
    assert report.factor == pytest.approx(shape[8])


def test_the_other_settings_are_the_trainers_own_until_they_are_turned(factory):
    seen = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            decays = {group["weight_decay"] for group in optimizer.param_groups}
            seen.append((max(decays), min(decays), args.max_grad_norm))

    class DPOConfig(TrainingArguments):
        """As TRL's is called: the objective is told by it."""

    class Weighed(Trainer):
        beta = 0.1

        def __init__(self, **given):
            super().__init__(**given)
            self.args.__class__ = DPOConfig

    changes = {"weight_decay": 0.02, "max_grad_norm": 0.3, "callbacks": [Watch()]}
    job = opened(factory, kind=Weighed, **changes)
    assert (job.knobs.weight_decay, job.knobs.clip, job.knobs.beta) == (0.02, 0.3, 0.1)
    job.advance(1)
    job.apply(replace(job.knobs, weight_decay=0.5, clip=2.0, beta=0.4))
    job.advance(1)
    assert seen == [(0.02, 0.0, 0.3), (0.5, 0.0, 2.0)]  # of biases there is no decay
    assert job._setup.trainer.beta == 0.4
    with pytest.raises(BadInput, match="optimizer: is the Trainer's own"):
        job.apply(replace(job.knobs, optimizer="sgd"))
    assert opened(factory).knobs.beta is None


def test_a_beta_of_another_meaning_is_left_alone(factory):
    """As that of TRL's distillation, or one that is only shown, as of its online DPO."""

    class Shown(Trainer):
        beta = property(lambda self: 0.1)

    class Mixed(Trainer):
        beta = 0.1

    class DPOConfig(TrainingArguments):
        """As TRL's is called."""

    for kind in (Mixed, Shown):
        trainer = factory(SEED, kind=kind)
        assert beta_of(trainer) is None
        trainer.args.__class__ = DPOConfig
        assert beta_of(trainer) == (None if kind is Shown else 0.1)


def test_an_optimizer_that_can_be_switched_is_switched(factory):
    def make(task, seed, knobs):
        trainer = factory(seed)
        weights = list(trainer.model.parameters())
        trainer.optimizer = SwitchableOptimizer([{"params": weights}], lr=knobs.rate)
        return Setup(trainer, score, ROWS, 3)

    task = Task("trainer", objective="own", steps=STEPS, interval=4, batch=8, rows=ROWS)
    job = TrainerJob(task, SEED, Knobs(1e-2), make=make)
    job.advance(4)
    job.apply(replace(job.knobs, optimizer="sgd"))
    assert job.advance(4).finite
    assert job._setup.trainer.optimizer.optimizer.kind == "sgd"


PEFT = "ignore:.is_gradient_checkpointing:FutureWarning"  # peft's own


def adapted(model, **more):
    """A Trainer of LoRA adapters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    return Trainer(model=get_peft_model(model, config), **more)


@pytest.mark.filterwarnings(PEFT)
@pytest.mark.parametrize(("kind", "depth", "scale"), [(Trainer, 3, math.nan), (adapted, 2, 1.0)])
def test_dials_that_are_not_turned_leave_the_plain_run(factory, kind, depth, scale):
    """To the bit, though the run was opened with them."""
    make = partial(factory, kind=kind)
    actions = Actions(turns=(("depth", -1.0), ("adapter_scale", 2.0)))
    env = trainer_env(make, actions=actions, decisions=3, spread=0.0)
    env.reset(seed=0)
    for _ in range(3):
        info = env.step(KEEP)[4]
    assert info["depth"] == depth
    assert info["adapter_scale"] == pytest.approx(scale, nan_ok=True)
    trainer = make(env._job._setup.trainer.args.seed)
    trainer.train()
    plain = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()
                       if p.requires_grad])  # fmt: skip
    assert torch.equal(weights(env._job)[: len(plain)], plain)


def test_layers_are_frozen_on_the_way_and_come_back(factory):
    """The optimizer has them all, even where a run is opened with a few."""

    def moved(job, depth):
        job.apply(replace(job.knobs, depth=depth))
        before = {name: p.detach().clone() for name, p in job._model.named_parameters()}
        assert job.advance(4).finite
        after = dict(job._model.named_parameters())
        return {name for name in after if not torch.equal(after[name], before[name])}

    job = opened(factory, dials={"depth": 1})
    assert job.knobs.depth == 1
    few = moved(job, 0)
    assert job.knobs.depth == 1  # or nothing might be left to train
    names = dict(job._model.named_parameters())
    assert few == {n for n in names if "layer.1." in n or "pooler" in n or "classifier" in n}
    assert moved(job, 100) == {*names}
    assert job.knobs.depth == 3
    assert moved(job, 2) == {name for name in names if "embeddings" not in name}
    assert opened(factory).knobs.depth is None


@pytest.mark.filterwarnings(PEFT)
def test_an_adapter_is_scaled_and_comes_back_with_its_scale(factory):
    def scalings(job):
        return {value for part in job._model.modules() if hasattr(part, "lora_A")
                for value in part.scaling.values()}  # fmt: skip

    job = opened(factory, kind=adapted, dials={"adapter_scale": 2.0})
    job.advance(4)
    assert (job.knobs.adapter_scale, scalings(job)) == (2.0, {4.0})
    kept, loss = job.snapshot(), job.evaluate("validation").loss
    job.apply(replace(job.knobs, adapter_scale=8.0, clip=0.5))
    assert job.evaluate("validation").loss != loss
    job.advance(4)
    assert scalings(job) == {16.0}
    job.restore(kept)
    assert job.knobs == replace(job.knobs, adapter_scale=2.0, clip=0.5)
    assert job.evaluate("validation").loss == loss
    job.advance(4)
    assert scalings(job) == {4.0}
    assert opened(factory, kind=adapted).knobs.adapter_scale is None


@pytest.mark.filterwarnings(PEFT)
def test_a_new_head_beside_adapters_is_opened_as_beside_all_weights(factory):
    lifted = {"head_rate": 10.0}
    for kind in ({}, {"kind": adapted}):
        assert opened(factory, dials=lifted, **kind).knobs.head_rate == 10.0


def test_what_the_trainer_raises_is_raised(factory):
    class Broken(Trainer):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise KeyError("no such column")
            return super().compute_loss(*args, **kwargs)

    job = opened(factory, kind=Broken)
    job.advance(4)
    with pytest.raises(KeyError, match="no such column"):
        job.advance(4)


def test_a_trainer_that_raises_for_broken_weights_has_diverged(factory):
    """As sampling does: a distribution of NaN."""

    class Sampler(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if torch.is_tensor(loss):  # in training
                torch.multinomial(loss.detach().exp().view(1, 1), 1)
            return loss

    job = opened(factory, kind=Sampler)
    job.advance(4)
    good = job.snapshot()
    job.restore([torch.full_like(part, math.nan) for part in good])
    reports = [job.advance(4)]
    job.restore(good)  # the weights are back, the loop is not
    assert math.isfinite(job.evaluate("validation").loss)
    reports.append(job.advance(4))
    assert [r.finite for r in reports] == [False, True]
    assert [r.step for r in reports] == [8, 12]
    assert all(math.isnan(loss) for r in reports for loss in r.losses)


def test_running_statistics_come_back_with_the_weights(factory):
    class Normed(Trainer):
        def __init__(self, model, **given):
            norm = torch.nn.BatchNorm1d(model.classifier.in_features)
            model.classifier = torch.nn.Sequential(norm, model.classifier)
            super().__init__(model, **given)

    job = opened(factory, kind=Normed)
    job.advance(4)
    good, loss = job.snapshot(), job.evaluate("validation").loss
    job.restore([torch.full_like(part, math.nan) for part in good])
    assert not job.advance(4).finite
    job.restore(good)
    assert job.evaluate("validation").loss == loss
    assert job.advance(4).finite


def test_a_trainer_that_stops_early_is_named(factory):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    job = opened(factory, callbacks=[Stop()])
    job.advance(4)
    with pytest.raises(RunFailed, match="stopped by itself at update 6 of 12"):
        job.advance(4)


def test_a_dropped_job_ends_its_loop_and_is_freed(factory):
    """In the middle of an update's preparation, with the Trainer's own clean-up."""
    left = []

    class Tidy(Trainer):
        def _inner_training_loop(self, *args, **kwargs):
            try:
                return super()._inner_training_loop(*args, **kwargs)
            finally:
                left.append(self.state.global_step)

    for close in (True, False):
        job = opened(factory, kind=Tidy)
        job.advance(4)
        model = weakref.ref(job._model)
        if close:
            job.close()
            assert left == [4]
        del job
        gc.collect()
        assert model() is None
    assert left == [4, 4]


def test_a_job_that_was_closed_trains_no_more(factory):
    for updates in (0, 4):
        job = opened(factory)
        if updates:
            job.advance(updates)
        before = weights(job)
        job.close()
        job.close()
        with pytest.raises(RunFailed, match="job: it was closed"):
            job.advance(4)
        assert torch.equal(weights(job), before)


# -- the environment of a user's own Trainer ---------------------------------------------------


def test_the_registered_environment_passes_the_checker(factory):
    env = gymnasium.make("Steersman/Trainer-v0", trainer_factory=factory, decisions=3)
    check_env(env.unwrapped, skip_render_check=True)


def test_its_trainer_is_left_when_it_is_closed_or_reset(factory):
    left = []

    class Tidy(Trainer):
        def _inner_training_loop(self, *args, **kwargs):
            try:
                return super()._inner_training_loop(*args, **kwargs)
            finally:
                left.append(self.state.global_step)

    env = gymnasium.make("Steersman/Trainer-v0", decisions=3,
                         trainer_factory=partial(factory, kind=Tidy))  # fmt: skip
    env.reset(seed=0)
    env.step(KEEP)
    job = env.unwrapped._job  # as a debugger or a traceback may hold it
    env.reset()
    assert left == [4]
    assert job._loop.dead
    env.step(KEEP)
    env.step(KEEP)
    env.close()
    assert left == [4, 8]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.unwrapped.step(KEEP)
    env.close()


def test_to_make_one_leaves_the_callers_random_states_alone(factory):
    def drawn():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    with put_back([]):
        random.seed(99), np.random.seed(99), torch.manual_seed(99)
        with put_back([]):
            wanted = drawn()
        gymnasium.make("Steersman/Trainer-v0", trainer_factory=factory)
        assert drawn() == wanted


def test_an_episode_of_keep_is_the_users_own_run(factory):
    env = trainer_env(factory, decisions=3, spread=0.0)
    env.reset(seed=0)
    over, rewards = False, []
    while not over:
        _, reward, over, truncated, info = env.step(KEEP)
        assert not truncated
        rewards.append(reward)
    assert info["step"] == STEPS
    assert info["rate"] == pytest.approx(1e-2)
    job = env._job
    trainer = factory(job._setup.trainer.args.seed)
    trainer.train()
    plain = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
    assert torch.equal(weights(job), plain)
    assert info["validation"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    env.reset(seed=1)
    env.step(TENTH)
    env.reset()  # in the middle
    assert env.step(KEEP)[4]["step"] == 4


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_optimizer_of_the_users_own_is_left_as_it_is(factory, kind):
    """Its rate is the centre, its decay the run's, and left alone the run is the plain one."""

    def own(seed):
        trainer = factory(seed, lr_scheduler_type="constant")
        make = torch.optim.AdamW if kind == "adamw" else SwitchableOptimizer
        more = {} if kind == "adamw" else {"kind": "sgd"}
        trainer.optimizer = make(trainer.model.parameters(), lr=5e-2, weight_decay=0.1, **more)
        return trainer

    env = trainer_env(own, decisions=3, spread=0.0)
    env.reset(seed=0)
    for _ in range(3):
        info = env.step(KEEP)[4]
    assert info["rate"] == pytest.approx(5e-2)
    assert info["optimizer"] == env.context.optimizer == kind
    assert env._job.knobs.weight_decay == 0.1
    trainer = own(env._job._setup.trainer.args.seed)
    trainer.train()
    plain = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
    assert torch.equal(weights(env._job), plain)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("again", [False, True])
def test_an_optimizer_that_the_trainer_makes_itself_is_left_as_it_is(factory, kind, again):
    """Also one that draws random numbers, or is made anew at each call, with a schedule."""

    class Own(Trainer):
        def create_optimizer(self, model=None):
            if self.optimizer is None or again:
                torch.rand(3)
                groups = [{"params": [*self.model.parameters()], "weight_decay": 5.0}]
                rate = self.args.learning_rate
                self.optimizer = (
                    torch.optim.AdamW(groups, lr=rate) if kind == "adamw"
                    else SwitchableOptimizer(groups, "sgd", lr=rate)
                )  # fmt: skip
            if self.lr_scheduler is None:
                self.create_scheduler(self.args.max_steps, self.optimizer)
            return self.optimizer

    make = partial(factory, kind=Own)
    env = trainer_env(make, decisions=3, spread=0.0)
    _, info = env.reset(seed=0)
    assert info["optimizer"] == env.context.optimizer == kind
    for _ in range(3):
        info = env.step(KEEP)[4]
    assert info["optimizer"] == kind
    trainer = make(env._job._setup.trainer.args.seed)
    trainer.train()
    plain = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
    assert torch.equal(weights(env._job), plain)


def test_an_optimizer_that_the_trainer_makes_itself_can_be_switched(factory):
    class Own(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = SwitchableOptimizer(self.model.parameters(), lr=1e-2)
            return self.optimizer

    job = opened(factory, kind=Own)
    job.apply(replace(job.knobs, optimizer="sgd"))
    assert job.advance(4).finite
    assert job._setup.trainer.optimizer.optimizer.kind == "sgd"


def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def rewarded(tmp_path, reward):
    """A seed -> a Trainer that learns by that reward."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    path = catalog.model_path("tiny-gpt-32")
    prompts = datasets.Dataset.from_dict({"prompt": ["a king", "the sea", "my house", "a word"]})

    def make(seed):
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(path)
        args = trl.GRPOConfig(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, seed=seed,
            num_generations=4, max_completion_length=6, learning_rate=1e-3, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
            per_device_eval_batch_size=4, activation_checkpointing=False,
        )  # fmt: skip
        return trl.GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(path), reward, args, prompts, prompts,
            processing_class=tokenizer,
        )  # fmt: skip

    return make


def test_a_trainer_that_learns_by_reward_is_judged_by_it(tmp_path):
    """The loss of GRPO is about 0 and may be negative: one less the reward is the cost."""
    env = trainer_env(rewarded(tmp_path, vowels), decisions=2, spread=0.0)
    env.reset(seed=0)
    for done in (False, True):
        info = env.step(KEEP)[2:]
        assert info[0] is done
        assert info[2]["reason"] is None
        assert 0 < info[2]["metric"] < 1
        assert info[2]["validation"] == pytest.approx(1 - info[2]["metric"])
    assert [len(report.losses) for report in env.history] == [0, 1, 1]
    assert all(0 < loss <= 1 for report in env.history for loss in report.losses)


@pytest.mark.parametrize("paid", [None, math.nan, math.inf])
def test_a_reward_that_is_no_number_is_refused_before_the_run(tmp_path, paid):
    """It would look like a run that diverged; for some texts, of which others judge, it may be."""
    env = trainer_env(rewarded(tmp_path, lambda completions, **_: [paid] * len(completions)))
    with pytest.raises(BadInput, match=r"trainer: reward_funcs: (nan|inf) is the mean reward befo"):
        env.reset(seed=0)
    asked = []

    def some(completions, **_):
        asked.append(1)
        return vowels(completions) if len(asked) % 2 else [None] * len(completions)

    _, info = trainer_env(rewarded(tmp_path, some)).reset(seed=0)
    assert len(asked) > 1
    assert 0 < info["validation"] < 1


def test_a_reward_function_that_returns_no_list_of_numbers_is_refused(tmp_path):
    answers = []

    def bad(completions, **_):
        return answers[-1]

    class Later:
        async def __call__(self, completions, **_):
            return answers[-1]

    for reward, name in ((bad, "bad"), (partial(bad), "bad"), (Later(), "Later")):
        env = trainer_env(rewarded(tmp_path, [vowels, reward]), decisions=2, spread=0.0)
        for answer, problem in (
            (None, "None; let it return a list with a number, or None, for each text"),
            (["good"] * 4, "['good', 'good', 'good', 'good']; let it return a list"),
            ([1.0], "1 numbers for 4 texts; let it return one, or None, for each"),
        ):
            answers.append(answer)
            wanted = re.escape(f"trainer: reward_funcs: {name} returned {problem}")
            with pytest.raises(BadInput, match=f"^{wanted}"):
                env.reset(seed=0)
        answers.append([0.5, None, np.float32(0.25), torch.tensor(1.0)])
        assert 0 < env.reset(seed=0)[1]["metric"] < 2


def test_an_episode_of_keep_by_reward_is_the_users_own_run(tmp_path):
    make = rewarded(tmp_path, [vowels, lambda completions, **_: torch.rand(len(completions))])
    env = trainer_env(make, decisions=2, spread=0.0)
    env.reset(seed=0)
    for _ in range(2):
        env.step(KEEP)
    trainer = make(env._job._setup.trainer.args.seed)
    trainer.train()
    plain = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
    assert torch.equal(weights(env._job), plain)


def test_what_cannot_be_an_environment_is_refused(factory):
    with pytest.raises(BadInput, match="eval_dataset: the Trainer has none"):
        trainer_env(lambda seed: factory(seed, eval_dataset=None))
    with pytest.raises(BadInput, match="gave a NoneType without 'args'"):
        trainer_env(lambda seed: None)
    with pytest.raises(BadInput, match="decisions: 0 is not a count"):
        trainer_env(factory, decisions=0)

    some = Texts([{"labels": 0}])
    for empty, lack in (
        ({}, "the Trainer has none"), (Texts([]), "no rows in it for train"),
        ({"rest": some, "validation": Texts([])}, "no rows in it for validation"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=f"eval_dataset: {lack}, so nothing says how good"):
            trainer_env(lambda seed, empty=empty: factory(seed, eval_dataset=empty))
    with pytest.raises(BadInput, match="eval_dataset: no rows in it for test, so nothing says"):
        opened(factory, eval_dataset=Texts([])).evaluate("test")
    for train, changes, lack in (
        (Texts([]), {}, "no batch in it, so there is"),
        (Texts([]), {"train_sampling_strategy": "sequential"}, "no batch in it, so there is"),
        (None, {}, "the Trainer has none, so there is nothing to learn; give it rows"),
    ):
        with pytest.raises(BadInput, match=f"^trainer: train_dataset: {lack}"):
            trainer_env(lambda seed, t=train, c=changes: factory(seed, train=t, **c))
    for changes in ({"max_steps": 0}, {"num_train_epochs": 0, "max_steps": -1}):
        name = next(iter(changes))
        with pytest.raises(BadInput, match=f"^trainer: {name}: 0 is no update; give more"):
            trainer_env(lambda seed, changes=changes: factory(seed, **changes))
    for rate in (0.0, math.nan):
        with pytest.raises(BadInput, match=rf"rate: {rate} cannot train anything; give a number"):
            trainer_env(lambda seed, rate=rate: factory(seed, learning_rate=rate))
        with pytest.raises(BadInput, match=rf"rate: {rate} cannot train anything; give a number"):
            FineTuneEnv(center=rate)
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
    with pytest.raises(BadInput, match="lr_scheduler_type: ReduceLROnPlateau cannot be scaled"):
        trainer_env(lambda seed: factory(seed, **plateau))


@pytest.mark.parametrize(
    ("kind", "count", "problem"),
    [("DEEPSPEED", 1, "deepspeed: a job needs whole weights in one process"),
     ("FSDP", 1, "fsdp: a job needs whole"), ("MULTI_CPU", 2, "multi_cpu: a job needs whole"),
     ("NO", 1, "model_init: the Trainer would make its model anew"),
     ("NO", 0, "gradient_accumulation_steps: 0 is not a count; give 1 or more")],
)  # fmt: skip
def test_a_trainer_that_cannot_be_a_job_is_refused(factory, kind, count, problem):
    """As a job and as an environment."""

    class Spread(TrainingArguments):
        world_size = count

    def make(seed, **changes):
        trainer = factory(seed, **changes)
        if kind == "NO":
            trainer.args.gradient_accumulation_steps = count
            trainer.model_init = lambda: trainer.model
        else:
            trainer.args.__class__ = Spread
            trainer.accelerator = SimpleNamespace(distributed_type=DistributedType[kind])
        return trainer

    for refused in (trainer_env, opened):
        with pytest.raises(BadInput, match=f"trainer: {problem}"):
            refused(make)
