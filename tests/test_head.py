"""The head's own rate: the same as a parameter group, in a plain run and in a pack."""

import math
from dataclasses import replace

import pytest
import torch
from test_callback import (
    KEEP,
    Stub,
    equal,
    lines,
    task,  # noqa: F401  (a fixture)
    train,
    weights,
)
from test_trainer_job import (
    ROWS,
    factory,  # noqa: F401  (a fixture)
    score,
    texts,  # noqa: F401  (a fixture)
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    TrainerCallback,
)

from baselines.schedules import grid
from baselines.search import HEAD, draw
from envs.dials import parse
from envs.errors import BadInput
from envs.hardware import Plan
from envs.head import head_of, is_new
from envs.job import TorchJob
from envs.knobs import Actions, Knobs, opened, plain
from envs.lockstep import Lockstep, PackedJob
from envs.task import Task
from envs.trainer_job import Setup, TrainerJob
from tuner.callback import TunerCallback
from tuner.guard import CAREFUL, within

KINDS = ("adamw", "sgd", "rmsprop")
X10 = Actions(opens=(parse("head_rate x10"),))


def grouped(parameters, knobs):
    """An optimizer whose head, the last two weights, has ten times the rate."""
    groups = [
        {"params": part, "lr": rate, "weight_decay": 0.0}
        for part, rate in ((parameters[:-2], knobs.rate), (parameters[-2:], 10 * knobs.rate))
    ]
    kinds = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    more = {"alpha": 0.99} if knobs.optimizer == "rmsprop" else {}
    if knobs.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return kinds[knobs.optimizer](groups, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lifted_head_moves_as_a_parameter_group_of_its_own(tiny_task, kind):
    knobs = Knobs(1e-3, "constant", optimizer=kind, head_rate=10.0)
    job = TorchJob(tiny_task(), 3, knobs)
    other = TorchJob(tiny_task(), 3, knobs.having(head_rate=None))
    other._optimizer = grouped(other._parameters, knobs)
    assert [p.shape for p in other._parameters[-2:]] == [p.shape for p in job._head]

    groups = other._optimizer.param_groups  # the loop sets one rate for all: undo it
    other._optimizer.register_step_pre_hook(lambda *_: groups[1].update(lr=10 * groups[0]["lr"]))
    assert job.advance(6).losses == pytest.approx(other.advance(6).losses, rel=1e-5)
    for mine, its in zip(job._head, other._parameters[-2:], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-5)
    plainly = TorchJob(tiny_task(), 3, knobs.having(head_rate=None))
    plainly.advance(6)
    assert not torch.allclose(plainly._head[0], job._head[0], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_lifts_the_heads_of_those_runs_that_ask_for_it(tiny_task, kind):
    lockstep = Lockstep(Plan("cpu", 2))
    for head in (10.0, None, 0.5):
        knobs = Knobs(1e-2, optimizer=kind, weight_decay=0.1, head_rate=head)
        jobs = [make(tiny_task(), 3, knobs) for make in (TorchJob, lockstep.open)]
        assert isinstance(jobs[1], PackedJob)
        assert jobs[0].knobs == jobs[1].knobs
        for job in jobs:
            job.advance(3)
            job.apply(Knobs(5e-3, optimizer=kind, weight_decay=0.1))  # says nothing of the head
            job.advance(3)
        assert jobs[0].knobs.head_rate == jobs[1].knobs.head_rate == head
        scores = [job.evaluate("validation").loss for job in jobs]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_a_head_that_is_trained_alone_has_no_rate_of_its_own(tiny_task):
    lockstep = Lockstep(Plan("cpu", 2))
    for make in (TorchJob, lockstep.open):
        job = make(tiny_task(trainable_layers=0), 3, Knobs(1e-2, head_rate=10.0))
        assert job.knobs.head_rate is None
        job.apply(Knobs(1e-2, head_rate=10.0))
        assert job.knobs.head_rate is None


def test_a_head_at_its_own_rate_is_the_plain_run_bit_for_bit(tiny_task):
    jobs = [TorchJob(tiny_task(), 3, Knobs(1e-2, head_rate=head)) for head in (None, 1.0)]
    assert jobs[0].advance(4).losses == jobs[1].advance(4).losses


def test_a_run_is_opened_with_what_the_actions_say():
    assert opened(Knobs(), X10) == Knobs(head_rate=10.0)
    assert opened(Knobs(head_rate=3.0), X10) == Knobs(head_rate=3.0)
    assert opened(Knobs(), Actions()) == Knobs()
    assert plain(X10)["opens"] == (("head_rate", 10.0),)
    assert "opens" not in plain(Actions())
    twice = (("head_rate", 10.0), ("head_rate", 3.0))
    for opens in ((("clip", 2.0),), (("adapter_scale", 2.0),), (("depth", -1.0),), twice):
        with pytest.raises(BadInput, match="opened with nothing else"):
            Actions(opens=opens)
    for opens in ((("head_rate", math.nan),), (("head_rate", 1e9),), (("head_rate",),)):
        with pytest.raises(BadInput, match="actions: opens"):
            Actions(opens=opens)


BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
        "intermediate_size": 32}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50}


def test_a_classifier_has_a_new_head_until_it_is_trained():
    model = AutoModelForSequenceClassification.from_config(BertConfig(**BERT, num_labels=5))
    head = head_of(model)
    assert {id(p) for p in head} == {id(p) for p in model.classifier.parameters()}
    assert is_new(model, head)
    with torch.no_grad():
        model.classifier.bias[0] = 0.1
    assert not is_new(model, head)
    model.classifier.requires_grad_(False)
    assert head_of(model) == []
    assert not is_new(model, [])


def test_what_rates_labels_tokens_or_writes_has_none_that_counts():
    config = GPT2Config(**GPT, num_labels=3, pad_token_id=0)
    sorting = AutoModelForSequenceClassification.from_config(config)
    assert [p.shape for p in head_of(sorting)] == [(3, 32)]
    config.num_labels = 1
    assert head_of(AutoModelForSequenceClassification.from_config(config)) == []
    assert head_of(AutoModelForTokenClassification.from_config(BertConfig(**BERT))) == []
    assert head_of(AutoModelForCausalLM.from_config(GPT2Config(**GPT))) == []
    assert head_of(torch.nn.Linear(2, 2)) == []


@pytest.mark.filterwarnings("ignore")
def test_under_lora_the_head_is_what_is_saved_with_it():
    from peft import LoraConfig, get_peft_model

    model = AutoModelForSequenceClassification.from_config(BertConfig(**BERT, num_labels=5))
    tuned = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    head = head_of(tuned)
    assert sorted(tuple(p.shape) for p in head) == [(5,), (5, 32)]
    assert is_new(tuned, head)


def test_a_trainers_job_lifts_the_head_as_a_group_of_its_own_would(factory):  # noqa: F811
    def make(_, seed, knobs):
        return Setup(factory(seed, learning_rate=1e-3), score, ROWS, 3)

    def apart(_, seed, knobs):
        trainer = factory(seed, learning_rate=1e-3)
        model = trainer.model
        trainer.optimizer = torch.optim.AdamW(
            [{"params": [*model.bert.parameters()], "lr": 1e-3},
             {"params": [*model.classifier.parameters()], "lr": 1e-2}],
            weight_decay=0.0,
        )  # fmt: skip
        return Setup(trainer, score, ROWS, 3)

    own = Task("trainer", objective="own", steps=8, interval=4, batch=8, rows=ROWS)
    lifted = TrainerJob(own, 3, Knobs(1e-3, head_rate=10.0), make=make)
    grouped = TrainerJob(own, 3, Knobs(1e-2), make=apart)  # a Trainer's rate is its largest
    plain = TrainerJob(own, 3, Knobs(1e-3), make=make)
    assert lifted.knobs.head_rate == 10.0
    seen = [job.advance(6).losses for job in (lifted, grouped, plain)]
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)
    assert seen[0] != pytest.approx(seen[2], rel=1e-3)
    lifted.apply(Knobs(1e-3))  # says nothing of the head
    assert lifted.knobs.head_rate == 10.0
    assert lifted.advance(2).losses != plain.advance(2).losses


# -- a Trainer ---------------------------------------------------------------------------------


def stub(choose=lambda seen: KEEP):
    policy = Stub(choose)
    policy.manifest.actions = X10
    return policy


def head_apart(times):
    """What a user would write: a group of its own for the head, with a multiple of the rate."""

    def split(trainer):
        model, rate = trainer.model, trainer.args.learning_rate
        trainer.optimizer = torch.optim.AdamW(
            [{"params": [*model.encoder.parameters()], "lr": rate},
             {"params": [*model.head.parameters()], "lr": times * rate}],
            weight_decay=0.0,
        )  # fmt: skip

    return split


def losses(trainer):
    return [loss for loss, _ in trainer.recorder.losses]


@pytest.mark.parametrize(("mode", "times"), [("explore", 10), ("careful", 3)])
def test_the_callback_gives_a_new_head_its_rate_from_the_first_update(task, tmp_path, mode, times):  # noqa: F811
    plain = train(task, tmp_path / "plain")
    apart = train(task, tmp_path / "apart", before=head_apart(times))
    steered = train(task, tmp_path / "own", TunerCallback(stub(), mode=mode))
    assert losses(steered) == pytest.approx(losses(apart), rel=1e-3)
    assert losses(steered) != pytest.approx(losses(plain), rel=1e-3)
    records = lines(tmp_path / "own")
    assert records[0]["evidence"]["opened"] == {"head_rate": times}
    assert "opened" not in records[1]["evidence"]
    assert not steered.optimizer.optimizer._optimizer_step_pre_hooks
    assert not steered.optimizer.optimizer._optimizer_step_post_hooks


def test_it_only_tells_or_leaves_rates_that_the_user_set_apart(task, tmp_path):  # noqa: F811
    for before in (None, head_apart(10)):
        plain = train(task, tmp_path / "plain", before=before)
        advise = before is None
        callback = TunerCallback(stub(), mode="explore", advise=advise)
        steered = train(task, tmp_path / "own", callback, before=before)
        assert equal(weights(plain), weights(steered))


class Interrupt(TrainerCallback):
    """Ends the first run it is in by Ctrl-C, before an update."""

    def __init__(self, step):
        self.step, self.done = step, False

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.done:
            self.done = True
            raise KeyboardInterrupt


@pytest.mark.parametrize(("step", "hooks"), [(0, 1), (4, 0)])  # by then the head is trained
def test_a_run_after_an_interrupted_one_is_opened_once(task, tmp_path, step, hooks):  # noqa: F811
    made = {}

    def hold(trainer):
        made["trainer"] = trainer

    callback = TunerCallback(stub(), mode="explore")
    with pytest.raises(KeyboardInterrupt):
        train(task, tmp_path, callback, before=hold, extra=[Interrupt(step)])
    trainer, seen = made["trainer"], []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            seen.append(len(optimizer.optimizer._optimizer_step_pre_hooks))

    trainer.add_callback(Look())
    trainer.train()
    assert set(seen) == {hooks}


def test_groups_apart_are_seen_during_warm_up_too(task, tmp_path):  # noqa: F811
    plain = train(task, tmp_path / "plain", before=head_apart(10), warmup_steps=4)
    callback = TunerCallback(stub(), mode="explore")
    steered = train(task, tmp_path / "own", callback, before=head_apart(10), warmup_steps=4)
    assert equal(weights(plain), weights(steered))


def test_a_head_on_an_encoder_that_is_not_trained_is_left_alone():
    model = AutoModelForSequenceClassification.from_config(BertConfig(**BERT, num_labels=5))
    model.bert.requires_grad_(False)
    assert head_of(model) == []


@pytest.mark.parametrize(("amount", "opened_with"), [(10.0, 3.0), (2.0, 2.0), (1e-3, 1 / 3)])
def test_the_limits_bound_what_a_run_is_opened_with(amount, opened_with):
    actions = Actions(opens=(("head_rate", amount),))
    knobs = opened(Knobs(), within(actions, CAREFUL))
    assert knobs.head_rate == pytest.approx(opened_with)


def test_a_tuner_that_is_off_gives_the_heads_rate_back(task, tmp_path):  # noqa: F811
    def choose(seen):
        if round(float(seen[0]) * 10) == 4:
            raise RuntimeError("no idea")
        return KEEP

    callback = TunerCallback(stub(choose), mode="explore")
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(callback._handles._lift.times)

    train(task, tmp_path, callback, extra=[Look()])
    assert seen == [10.0] * 12 + [1.0] * 18


@pytest.mark.parametrize("save", [15, 16])
def test_a_resumed_run_keeps_the_heads_rate(task, tmp_path, save):  # noqa: F811
    more = {"save_strategy": "steps", "save_steps": save, "dropout": 0.1}

    def run(**resumed):
        return train(task, tmp_path, TunerCallback(stub(), mode="explore"), **more, **resumed)

    whole = run()
    again = run(resume=str(tmp_path / f"checkpoint-{save}"))
    assert equal(weights(whole), weights(again))


class Asked:
    """An Optuna trial that writes down what it is asked, and gives the lowest."""

    def __init__(self):
        self.known = {}

    def suggest_float(self, name, low, high, *, log=False):
        self.known[name] = (low, high)
        return low

    def suggest_categorical(self, name, choices):
        self.known[name] = choices
        return choices[0]


def test_searchers_and_the_best_fixed_setting_reach_it_too(tiny_task):
    asked = Asked()
    knobs, _ = draw(asked, 1e-3, 1.0, tiny_task(), 0)
    assert asked.known["head_rate"] == HEAD == (0.3, 30.0)
    assert knobs.head_rate == 0.3
    writes = Asked()
    knobs, _ = draw(writes, 1e-3, 1.0, replace(tiny_task(), objective="causal"), 0)
    assert "head_rate" not in writes.known
    assert knobs.head_rate is None
    assert {each.knobs.head_rate for each in grid()} == {1.0, 10.0}
