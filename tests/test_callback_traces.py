"""What a TunerCallback leaves behind: nothing, on a run, on a Trainer, or in another's folder."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_callback import (
    STEPS,
    TENFOLD,
    Recorder,
    Stub,
    always,
    by_turns,
    collate,
    equal,
    lines,
    own,
    task,  # noqa: F401  (the fixture)
    train,
    weights,
)
from test_head import Interrupt, stub
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from envs.errors import BadInput
from envs.slice import Slice
from tuner.audit import replay
from tuner.callback import LOG, TunerCallback

SAVE = {"save_strategy": "steps", "save_steps": 15}
ACTIONS = [4, 3, 5, 2, 4, 7, 3, 5, 7, 4]  # with rollbacks after the checkpoint


def roller(task):  # noqa: F811
    return TunerCallback(Stub(by_turns(*ACTIONS)), mode="explore", eval_dataset=own(task))


# -- whose weights a run comes back to -------------------------------------------------------------


class Kept(TrainerCallback):
    """What the tuner would come back to, as a run begins, and the weights that there are."""

    def __init__(self, callback):
        self.callback = callback

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.best = [weight.clone() for weight in self.callback._crew.snapshot]
        self.now = [p.detach().clone() for p in model.parameters()]


def test_the_best_weights_are_of_the_run_that_is_resumed(task, tmp_path, caplog):  # noqa: F811
    """Another run's checkpoint of that step lies in the output folder."""
    whole = train(task, tmp_path / "mine", roller(task), dropout=0.1, **SAVE)
    log = lines(tmp_path / "mine")
    train(task, tmp_path / "other", roller(task), seed=6, **SAVE)
    resume = str(tmp_path / "mine" / "checkpoint-15")
    callback = roller(task)
    kept = Kept(callback)
    train(task, tmp_path / "other", callback, dropout=0.1, resume=resume, extra=[kept], **SAVE)
    assert equal(kept.best, kept.now)
    assert caplog.text.count("other/checkpoint-15: the best weights are not there: these") == 1
    caplog.clear()
    again = train(
        task, tmp_path / "other", roller(task), dropout=0.1, resume=resume,
        resume_from_checkpoint=resume, **SAVE,
    )  # fmt: skip
    assert "the best weights" not in caplog.text
    assert again.recorder.rates == whole.recorder.rates[15:]
    assert equal(weights(whole), weights(again))
    assert [line["applied"] for line in lines(tmp_path / "other")[-5:]] == [
        line["applied"] for line in log[-5:]
    ]


def test_a_checkpoint_of_before_runs_had_numbers_is_resumed_to_the_bit(task, tmp_path, caplog):  # noqa: F811
    whole = train(task, tmp_path, roller(task), dropout=0.1, **SAVE)
    folder = tmp_path / "checkpoint-15"
    state = json.loads((folder / "trainer_state.json").read_text())
    number = state["stateful_callbacks"]["TunerCallback"]["attributes"]["saved"].pop("run")
    with safe_open(folder / "tuner.safetensors", "pt") as file:
        assert file.metadata() == {"step": "15", "run": str(number)}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    save_file(load_file(folder / "tuner.safetensors"), folder / "tuner.safetensors", {"step": "15"})
    again = train(task, tmp_path, roller(task), dropout=0.1, resume=str(folder), **SAVE)
    assert "the best weights" not in caplog.text
    assert again.recorder.rates == whole.recorder.rates[15:]
    assert equal(weights(whole), weights(again))


# -- a run that was interrupted, and one that is over ----------------------------------------------


@pytest.mark.parametrize("closed", [False, True])
def test_off_the_trainer_it_has_no_effect(task, tmp_path, closed):  # noqa: F811
    """The next run, from the same weights, is the plain one, though hooks of it are left."""

    def run(folder, callback):
        found, recorder = [], Recorder()
        with pytest.raises(KeyboardInterrupt):
            train(task, folder, callback, extra=[Interrupt(5)], before=found.append,
                  recorder=recorder)  # fmt: skip
        (trainer,) = found
        optimizer = trainer.optimizer.optimizer
        if callback is not None:
            assert len(optimizer._optimizer_step_pre_hooks) == 1
            trainer.remove_callback(TunerCallback)
            if closed:
                callback.close()
                callback.close()  # there is nothing left to give back
                hooks = (optimizer._optimizer_step_pre_hooks, trainer.model._forward_hooks,
                         optimizer._optimizer_step_post_hooks)  # fmt: skip
                assert not any(hooks)
                assert trainer.args.logging_nan_inf_filter
        with torch.no_grad():
            for number, weight in enumerate(trainer.model.parameters()):
                weight.copy_(torch.randn(weight.shape, generator=seeded(number)) / 10)
        optimizer.state.clear()
        recorder.rates.clear()
        trainer.train()
        return trainer, recorder.rates

    plain, expected = run(tmp_path / "plain", None)
    other, rates = run(tmp_path / "steered", TunerCallback(stub(), mode="explore"))
    assert rates == expected
    assert equal(weights(plain), weights(other))


def seeded(number):
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("how", ["ended", "closed"])
def test_the_rate_in_force_is_given_back(task, tmp_path, how):  # noqa: F811
    """An optimizer and a schedule of the user's own go on after the run."""
    found, recorder = [], Recorder()

    def before(trainer):
        trainer.optimizer = torch.optim.SGD(
            [{"params": trainer.model.encoder.parameters(), "lr": 7e-3},
             {"params": trainer.model.head.parameters(), "lr": 2e-3}], momentum=0.9,
        )  # fmt: skip
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: 0.99**step)
        found.append(trainer)

    callback = TunerCallback(Stub(always(4)), mode="explore", decisions=3)
    steps = 12
    if how == "ended":
        train(task, tmp_path, callback, before=before, recorder=recorder, max_steps=steps)
    else:
        with pytest.raises(KeyboardInterrupt):
            train(task, tmp_path, callback, before=before, recorder=recorder,
                  extra=[Interrupt(steps)])  # fmt: skip
        callback.close()
    (trainer,) = found
    scheduler = trainer.lr_scheduler
    assert max(recorder.rates) > 7e-3
    in_force = [base * 0.99**steps for base in (7e-3, 2e-3)]
    assert [group["lr"] for group in scheduler.optimizer.param_groups] == in_force
    assert scheduler.get_last_lr() == in_force
    assert scheduler.base_lrs == [7e-3, 2e-3]
    scheduler.optimizer.param_groups[0]["lr"] = 1.0  # the user's business from here on
    callback.close()
    assert scheduler.optimizer.param_groups[0]["lr"] == 1.0


# -- looks that leave no trace ---------------------------------------------------------------------


class Masks:
    """A collator that draws from a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, rows):
        batch = collate(rows)
        drop = torch.rand(batch["input_ids"].shape, generator=self.generator) < 0.2
        return batch | {"input_ids": batch["input_ids"].masked_fill(drop, 4)}


class Evaluates(TrainerCallback):
    """The user's evaluations leave an optimizer with modes in that of evaluation."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step in (6, 10)


@pytest.mark.parametrize("advise", [True, False])
@pytest.mark.parametrize("what", ["collator", "optimizer"])
def test_a_look_is_undone_to_the_bit(task, tmp_path, what, advise):  # noqa: F811
    args = {"lr_scheduler_type": "constant"}
    if what == "optimizer":
        pytest.importorskip("schedulefree")
        args["optim"] = "schedule_free_adamw"

    def run(folder, callback=None):
        def before(trainer):
            if what == "collator":
                trainer.data_collator = Masks()

        return train(task, folder, callback, before=before, extra=[Evaluates()], **args)

    plain = run(tmp_path / "plain")
    policy = Stub(always(TENFOLD)) if advise else Stub()
    callback = TunerCallback(policy, advise=advise, mode="explore", eval_dataset=own(task))
    looked = run(tmp_path / "looked", callback)
    assert len(policy.seen) == 10
    assert looked.recorder.losses == plain.recorder.losses
    assert equal(weights(plain), weights(looked))


class Halves(torch.optim.SGD):
    """Hands over half the weights, and comes back a little beside what it had."""

    training = True

    def eval(self):
        if self.training:
            self._scale(0.5)
        self.training = False

    def train(self):
        if not self.training:
            self._scale(2.001)
        self.training = True

    def _scale(self, times):
        with torch.no_grad():
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.mul_(times)


@pytest.mark.parametrize("training", [True, False])
def test_the_weights_that_are_handed_over_are_judged(training):
    """And in whichever mode the optimizer was asked, it is left in."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(3.0))

        def forward(self, x):
            return {"loss": (x * self.weight).mean()}

    class Loader:
        collate_fn = staticmethod(lambda rows: {"x": torch.tensor(rows)})

    model = Model()
    optimizer = Halves(model.parameters(), 0.1)
    if not training:
        optimizer.eval()
    before = model.weight.item()
    assert Slice([1.0, 3.0], 2, 2).loss(model, optimizer, Loader()) == 3.0
    assert (model.weight.item(), optimizer.training) == (before, training)


def test_a_collator_that_cannot_be_copied_is_used_itself_and_a_model_in_it_is_not_copied():
    model, seen = torch.nn.Linear(1, 1), []

    class Collator:
        def __init__(self, lock):
            self.model, self.lock = model, lock

        def __call__(self, rows):
            seen.append((self, self.model))
            return {"input": torch.tensor(rows)}

    class Loader:
        def __init__(self, lock):
            self.collate_fn = Collator(lock)

    for lock in (None, (x for x in ())):  # no generator can be copied
        loader = Loader(lock)
        assert Slice([[1.0]], 1, 1).loss(model, torch.optim.SGD(model.parameters()), loader) is None
        assert seen[-1][1] is model
        assert (seen[-1][0] is loader.collate_fn) == (lock is not None)


# -- refused in a sentence -------------------------------------------------------------------------


def refused(match, *args, **more):
    with pytest.raises(BadInput, match=match) as caught:
        train(*args, **more)
    assert "\n" not in str(caught.value)


def test_advice_on_a_steered_checkpoint_is_refused(task, tmp_path):  # noqa: F811
    """Its rate is not the user's; the other way round nothing stands against it."""
    resume = str(tmp_path / "checkpoint-15")
    for first in (False, True):
        policy = Stub(always(4))
        train(task, tmp_path, TunerCallback(policy, advise=first), **SAVE)
        callback = TunerCallback(policy, advise=not first)
        if not first:
            match = r"callback: advise: .* was steered, .*; resume without advise=True, or begin"
            refused(match, task, tmp_path, callback, resume=resume, **SAVE)
            continue
        for advise in (True, False):
            callback = TunerCallback(policy, advise=advise)
            trainer = train(task, tmp_path, callback, resume=resume, **SAVE)
            assert trainer.state.global_step == STEPS
            told = lines(tmp_path)[5]["applied"]["rate"] * 0.5
            assert trainer.recorder.rates[0] == pytest.approx(told)
            assert replay(tmp_path / LOG, policy) == []


def test_two_on_one_trainer_are_refused(task, tmp_path):  # noqa: F811
    two = [TunerCallback(Stub()), TunerCallback(Stub())]
    match = "callback: TunerCallback: the Trainer has two of them; remove one"
    refused(match, task, tmp_path, two[0], extra=[two[1]], **SAVE)
    refused(match, task, tmp_path, two[0], extra=[two[0]])  # the same one twice
    train(task, tmp_path, two[0], **SAVE)
    resume = str(tmp_path / "checkpoint-15")
    refused(match, task, tmp_path, two[0], extra=[two[1]], resume=resume, **SAVE)
    assert train(task, tmp_path, two[1]).state.global_step == STEPS


def test_a_policy_that_a_checkpoint_could_not_keep_is_told(task, tmp_path):  # noqa: F811
    train(task, tmp_path, TunerCallback(Stub()), **SAVE)
    refused(
        "callback: policy: .* as an object; .*restore_callback_states_from_checkpoint off",
        task, tmp_path, TunerCallback("default"), resume=str(tmp_path / "checkpoint-15"),
        restore_callback_states_from_checkpoint=True, **SAVE,
    )  # fmt: skip
