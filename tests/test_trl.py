"""The callback over TRL's Trainers, whose losses are computed outside of the model."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from fakes import overheard
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from envs.errors import BadInput
from envs.knobs import Actions
from envs.observe import FEATURES
from envs.purpose import objective_of
from tuner.callback import LOG, TunerCallback

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL's own

STEPS, EVERY = 8, 2
PLACE = {feature.name: i for i, feature in enumerate(FEATURES)}
KEEP, UP = 3, 4


class Pilot:
    """Raises the rate at every decision but the first, and remembers what it saw."""

    def __init__(self, low=0.0):
        features = [SimpleNamespace(name=f.name, low=low, mean=0, deviation=1) for f in FEATURES]
        self.manifest = SimpleNamespace(actions=Actions(), decisions=4, features=features)
        self.sha256, self.seen = "5" * 64, []

    def act(self, observation):
        self.seen.append(observation)
        return UP if observation[0] > 0 else KEEP

    def outside(self, observation):
        return []


class Look(TrainerCallback):
    """Rates used, and losses logged."""

    def __init__(self):
        self.rates, self.losses = [], {}

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses[state.global_step] = logs["loss"]


@pytest.fixture(autouse=True)
def _quiet():
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    found = tiny.tokenizer()
    found.eos_token = "[SEP]"
    folder = tmp_path_factory.mktemp("tokenizer")
    found.save_pretrained(folder)
    return type(found).from_pretrained(folder)


def model_of(words, kind=LlamaForCausalLM):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=64,
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id,
        bos_token_id=words.cls_token_id, num_labels=1,
    )  # fmt: skip
    folder = Path(words.name_or_path) / kind.__name__
    if not folder.exists():  # TRL reads the reference model from the disk
        kind(config).save_pretrained(folder)
    return kind.from_pretrained(folder)


def texts(count=32):
    rng = random.Random(0)
    return [" ".join(rng.choice(tiny.FILLER) for _ in range(5)) for _ in range(count)]


def rows(name):
    """A few rows in the form that the Trainer wants."""
    good = [f" {text} cat dog" for text in texts()]
    bad = [f" {text} saw drill" for text in texts()]
    pairs = {"prompt": texts(), "chosen": good, "rejected": bad}
    if name == "Reward":
        pairs.pop("prompt")
    found = {
        "SFT": {"text": texts()},
        "KTO": {"prompt": texts(), "completion": good, "label": [i % 2 == 0 for i in range(32)]},
        "GRPO": {"prompt": texts()},
        "RLOO": {"prompt": texts()},
    }
    return datasets.Dataset.from_dict(found.get(name, pairs))


def reward(completions, **kwargs):
    """The share of words that are short."""
    return [sum(len(w) < 4 for w in c.split()) / (len(c.split()) + 1) for c in completions]


def trainer_of(name, words, folder, **more):
    kind = LlamaForSequenceClassification if name == "Reward" else LlamaForCausalLM
    reinforced = name in ("GRPO", "RLOO")
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": STEPS,
        "per_device_eval_batch_size": 8, "learning_rate": 5e-3, "use_cpu": True, "bf16": False,
        "lr_scheduler_type": "constant", "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False, "seed": 1,
    } | more  # fmt: skip
    if reinforced:
        settings |= {"num_generations": 4, "max_completion_length": 6}
    extra = {"reward_funcs": settings.pop("reward", reward)} if reinforced else {}
    data = rows(name)
    look = Look()
    trainer = getattr(trl, f"{name}Trainer")(
        model=model_of(words, kind), args=getattr(trl, f"{name}Config")(**settings),
        train_dataset=data, eval_dataset=data.select(range(16)), processing_class=words,
        callbacks=[look], **extra,
    )  # fmt: skip
    trainer.look = look
    return trainer


def steer(trainer, given=True, **more):
    """Runs it; what the tuner was told of the losses, interval by interval."""
    told, pilot = [], Pilot()
    callback = TunerCallback(pilot, mode="explore", trainer=trainer if given else None, **more)
    trainer.add_callback(overheard(callback, told))
    trainer.train()
    return told, np.array(pilot.seen)


ALL = [
    "SFT", "DPO", "Reward", pytest.param("KTO", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_with_the_trainer_each_updates_loss_is_seen(words, tmp_path, name):
    trainer = trainer_of(name, words, tmp_path, gradient_accumulation_steps=2)
    step = trainer.training_step
    told, seen = steer(trainer)
    assert len(told) == STEPS // EVERY
    losses = [loss for interval, _ in told for loss in interval]
    logged = [trainer.look.losses[i + 1] for i in range(len(losses))]
    assert len(losses) == STEPS - EVERY
    np.testing.assert_allclose(losses, logged, rtol=1e-4)
    # Validation losses are the Trainer's own, and leave its figures alone.
    assert all(math.isfinite(value) for _, value in told)
    assert seen[:, PLACE["has_validation"]].all()
    assert told[-1][1] < told[0][1]
    rates = trainer.look.rates
    assert rates[::EVERY] == pytest.approx([5e-3, 8e-3, 12.8e-3, 20.48e-3])
    assert trainer.training_step == step
    final = trainer.evaluate(trainer.eval_dataset)["eval_loss"]
    assert final < told[0][1]


def test_the_validation_loss_is_that_of_the_trainer(words, tmp_path):
    trainer = trainer_of("DPO", words, tmp_path, eval_on_start=True)
    told, _ = steer(trainer)
    first = next(log for log in trainer.state.log_history if "eval_loss" in log)
    assert told[0][1] == pytest.approx(first["eval_loss"], rel=1e-5)


def test_a_trainers_evaluation_data_without_rows_are_none(words, tmp_path, caplog):
    trainer = trainer_of("Reward", words, tmp_path)
    trainer.eval_dataset = trainer.eval_dataset.select([])
    told, seen = steer(trainer)
    assert len(told) == STEPS // EVERY
    assert not seen[:, PLACE["has_validation"]].any()
    assert "no validation losses" in caplog.text


@pytest.mark.parametrize("every", [1, 3, 100])
def test_without_the_trainer_the_log_tells(words, tmp_path, every):
    """At least one loss an interval, whatever the user logs; and the user's own evaluations."""
    trainer = trainer_of(
        "Reward", words, tmp_path, logging_steps=every, eval_strategy="steps", eval_steps=4
    )
    told, seen = steer(trainer, given=False)
    assert all(interval for interval, _ in told[1:])
    assert seen[:, PLACE["has_validation"]].tolist() == [0, 0, 1, 1]
    logged = [trainer.look.losses[step] for step in sorted(trainer.look.losses) if step <= 6]
    np.testing.assert_allclose([x for interval, _ in told for x in interval], logged)
    assert trainer.look.rates[-1] == pytest.approx(20.48e-3)


def test_advice_asks_for_no_log_line(words, tmp_path):
    """The run is the one without the callback, what it logs included."""
    plain, advised = (trainer_of("DPO", words, tmp_path / x, logging_steps=5) for x in "ab")
    plain.train()
    steer(advised, given=False, advise=True)
    steps = [[log["step"] for log in each.state.log_history] for each in (plain, advised)]
    assert steps[0] == steps[1]
    assert 5 in steps[0]
    for one, other in zip(plain.model.parameters(), advised.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_validation_losses_of_another_objective_are_not_used(words, tmp_path, caplog):
    """DPO's model gives the loss of plain language modelling besides; nobody trains it."""
    rows = [{"prompt_ids": [5, 6, 7, 8]}] * 4

    def plain(batch):
        ids = torch.tensor([row["prompt_ids"] for row in batch])
        return {"input_ids": ids, "labels": ids}

    trainer = trainer_of("DPO", words, tmp_path)
    pairs = trainer.data_collator
    trainer.data_collator = lambda batch: (pairs if "chosen_ids" in batch[0] else plain)(batch)
    told, seen = steer(trainer, given=False, eval_dataset=rows)
    assert told[0][1] is not None
    assert [value for _, value in told[1:]] == [None] * 3
    assert seen[:, PLACE["has_validation"]].tolist() == [1, 0, 0, 0]
    assert caplog.text.count("eval_dataset is not used") == 1


REINFORCED = ["RLOO", pytest.param("GRPO", marks=pytest.mark.slow)]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", REINFORCED)
def test_a_reward_is_the_measure_where_there_is_one(words, tmp_path, caplog, name, given):
    trainer = trainer_of(name, words, tmp_path)
    told, _ = steer(trainer, given=given)
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    costs = [x for interval, _ in told for x in interval]
    np.testing.assert_allclose(costs, [1 - r for r in rewards[: len(costs)]], rtol=1e-6)
    assert len(costs) == STEPS - EVERY
    assert "reward" not in caplog.text
    assert len((tmp_path / LOG).read_text().splitlines()) == STEPS // EVERY


@pytest.mark.parametrize("name", REINFORCED)
def test_an_update_that_reuses_completions_tells_no_cost(words, tmp_path, name):
    """TRL logs the loss alone there, and the loss is no measure."""
    trainer = trainer_of(name, words, tmp_path, num_iterations=2)
    told, _ = steer(trainer, given=False)
    lines = [log for log in trainer.state.log_history if "loss" in log]
    assert ["reward" in line for line in lines] == [True, False] * (STEPS // 2)
    costs = [x for interval, _ in told for x in interval]
    rewards = [line["reward"] for line in lines if "reward" in line]
    np.testing.assert_allclose(costs, [1 - r for r in rewards[: len(costs)]], rtol=1e-6)
    assert len(costs) == STEPS // EVERY - 1


@pytest.mark.parametrize("given", [True, False])
def test_rows_of_the_callbacks_own_are_refused_where_there_is_a_reward(
    words, tmp_path, caplog, given
):
    trainer = trainer_of("RLOO", words, tmp_path)
    with pytest.raises(BadInput, match=r"eval_dataset: where there is a reward .*leave it out, an"):
        steer(trainer, given, eval_dataset=trainer.eval_dataset)
    assert not trainer.model._forward_hooks
    trainer = trainer_of("RLOO", words, tmp_path, max_steps=1)
    steer(trainer, given, decisions=1)
    assert 'by training losses; let the Trainer evaluate (eval_strategy="steps")' in caplog.text


def test_evaluations_by_reward_are_seen(words, tmp_path):
    trainer = trainer_of("RLOO", words, tmp_path, eval_strategy="steps", eval_steps=2)
    told, _ = steer(trainer, given=False)
    found = [log["eval_reward"] for log in trainer.state.log_history if "eval_reward" in log]
    assert [value for _, value in told[1:]] == pytest.approx([1 - r for r in found[:3]])


@pytest.mark.parametrize("paid", [None, math.nan])
def test_rewards_that_are_none_are_said_once_and_are_not_known(words, tmp_path, caplog, paid):
    def silent(completions, **kwargs):
        return [paid for _ in completions]

    trainer = trainer_of("RLOO", words, tmp_path, reward=silent)
    told, _ = steer(trainer, given=False)
    assert trainer.state.global_step == STEPS
    assert [interval for interval, _ in told] == [()] * (STEPS // EVERY)
    assert caplog.text.count("reward: None is the mean since the last line of the log") == 1


def test_a_reward_that_is_none_for_some_on_purpose_is_left_alone(words, tmp_path, caplog):
    def first(completions, **kwargs):
        return [0.5, *[None] * (len(completions) - 1)]

    def rest(completions, **kwargs):
        return [None, *[0.25] * (len(completions) - 1)]

    trainer = trainer_of("RLOO", words, tmp_path, reward=[first, rest])
    told, _ = steer(trainer, given=False)
    assert [x for interval, _ in told for x in interval] == pytest.approx([1 - 1.25 / 4] * 6)
    assert "reward" not in caplog.text


@pytest.mark.slow
def test_rewards_out_of_range_are_said_to_be(words, tmp_path, caplog):
    def far(completions, **kwargs):
        return [-7.0 for _ in completions]

    trainer = trainer_of("RLOO", words, tmp_path, reward=far)
    told, _ = steer(trainer, given=False)
    assert [x for interval, _ in told for x in interval] == pytest.approx(
        [7 + math.log1p(math.exp(-7))] * 6
    )
    assert caplog.text.count("-7 is outside [0, 1]") == 1


class Turner(Pilot):
    """Triples beta at the second decision and at the third."""

    def __init__(self):
        super().__init__()
        self.manifest.actions = Actions(turns=(("beta", 3.0),))

    def act(self, observation):
        super().act(observation)
        return self.manifest.actions.size - 1 if len(self.seen) in (2, 3) else KEEP


class Beta(TrainerCallback):
    """The Trainer's beta at each update, after it was set if it is given."""

    def __init__(self, trainer, given=None, stop=None):
        self.trainer, self.given, self.stop, self.seen = trainer, given, stop, []
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.given:
            self.trainer.beta = self.given[state.global_step]
        self.seen.append(self.trainer.beta)
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO"])
def test_beta_is_turned_in_the_loss_and_given_back(words, tmp_path, name):
    """As if somebody had set it at these updates; also after a run that was cut short."""
    plain, by_hand, steered, cut = (trainer_of(name, words, tmp_path / x, beta=0.1) for x in "abcd")
    callbacks = [TunerCallback(Turner(), mode="explore", trainer=each) for each in (steered, cut)]
    for each, callback in zip((steered, cut), callbacks, strict=True):
        each.add_callback(callback)
    betas = [0.1] * 2 + [0.1 * 3] * 2 + [0.1 * 3 * 3] * 4
    looks = [Beta(plain), Beta(by_hand, betas), Beta(steered), Beta(cut, stop=6)]
    for each in (plain, by_hand, steered):
        torch.manual_seed(0)  # of what GRPO writes
        each.train()
    assert looks[2].seen == betas
    assert steered.beta == plain.beta == 0.1
    found = [torch.cat([p.detach().flatten() for p in each.model.parameters()])
             for each in (plain, by_hand, steered)]  # fmt: skip
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[2])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert cut.beta == betas[5]
    callbacks[1]._policy.seen.clear()
    cut.train()
    assert looks[3].seen[6:] == betas
    assert callbacks[1]._handles.given.beta == cut.beta == 0.1


@pytest.mark.parametrize(
    ("name", "given"),
    [("Reward", True), ("Reward", False), ("DPO", True),
     pytest.param("RLOO", True, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(words, tmp_path, name, given):
    """In the middle of an interval and, with losses of the log, at its end."""
    for save in (3, 4):
        more = {"save_strategy": "steps", "save_steps": save}
        whole, again = (trainer_of(name, words, tmp_path, **more) for _ in range(2))
        _, seen = steer(whole, given)
        trainer, pilot = again, Pilot()
        callback = TunerCallback(pilot, mode="explore", trainer=trainer if given else None)
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{save}"))
        assert trainer.look.rates == whole.look.rates[save:]
        np.testing.assert_array_equal(pilot.seen, seen[-len(pilot.seen) :])
        assert len(pilot.seen) == 2
        for one, other in zip(whole.model.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_another_trainer_is_refused(words, tmp_path):
    trainer, other = (trainer_of("Reward", words, tmp_path / x) for x in "ab")
    trainer.add_callback(TunerCallback(Pilot(), trainer=other))
    with pytest.raises(BadInput, match="callback: trainer: not the one that trains"):
        trainer.train()


def test_a_policy_that_needs_validation_losses_gets_them_of_the_trainer(words, tmp_path):
    trainer = trainer_of("Reward", words, tmp_path / "a")
    trainer.add_callback(TunerCallback(Pilot(low=1.0)))
    with pytest.raises(BadInput, match="never trained without validation losses; give eval_data"):
        trainer.train()
    trainer = trainer_of("Reward", words, tmp_path / "b")
    trainer.add_callback(TunerCallback(Pilot(low=1.0), trainer=trainer))
    trainer.train()
    lines = (tmp_path / "b" / LOG).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4, 6]


def test_an_objective_is_told_by_the_configuration_or_the_model(words, tmp_path):
    class Own(trl.DPOConfig):
        """As a user may write it."""

    model = model_of(words)
    names = {"dpo": trl.DPOConfig, "reward": trl.RewardConfig, "kto": trl.KTOConfig,
             "sft": trl.SFTConfig, "grpo": trl.RLOOConfig}  # fmt: skip
    for objective, config in names.items():
        args = config(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
        assert objective_of(args, model) == objective
    own = Own(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert objective_of(own, model) == "dpo"
    plain = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert objective_of(plain, torch.compile(model)) == "causal"
    for objective, kind, labels, problem in (
        ("classification", LlamaForSequenceClassification, 2, None),
        ("classification", LlamaForSequenceClassification, 1, "multi_label_classification"),
        ("regression", LlamaForSequenceClassification, 1, None),
        ("regression", LlamaForSequenceClassification, 3, "regression"),
        ("tokens", LlamaForTokenClassification, 2, None),
        ("own", LlamaForQuestionAnswering, 2, None),
    ):
        model.config.num_labels, model.config.problem_type = labels, problem
        assert objective_of(plain, kind(model.config)) == objective
    assert objective_of(plain, torch.nn.Linear(2, 2)) == "own"


def test_one_output_counts_as_two_classes(words, tmp_path):
    """A reward or a number has no classes; fewer than two are beyond what a policy has seen."""
    _, seen = steer(trainer_of("Reward", words, tmp_path))
    assert (seen[:, PLACE["classes"]] == 0).all()
