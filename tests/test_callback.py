"""The policy at the tiller of a Trainer: same eyes, same hands, and no harm."""

import gc
import json
import logging
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from fakes import overheard
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

import tuner.crew
import tuner.processes
import tuner.sight
from envs import shards, workload
from envs.env import FineTuneEnv
from envs.errors import BadInput
from envs.gauge import Gauge
from envs.handles import kind_of, refuse_unknown
from envs.job import batches, spread
from envs.knobs import Actions
from envs.observe import FEATURES, SIZE
from envs.progress import Progress
from envs.switchable import SwitchableOptimizer
from envs.task import Task
from tuner import policy as artifacts
from tuner.audit import replay
from tuner.callback import LOG, TunerCallback
from tuner.logbook import Logbook

KEEP, ROLLBACK, TENTH, TENFOLD = 3, 7, 0, 6
STEPS, BATCH, EVERY = 30, 8, 3


class Stub:
    """A policy that is a function of the observation, and remembers what it saw."""

    def __init__(self, choose=lambda seen: KEEP, outside=lambda seen: [], decisions=10):
        self._choose, self._outside = choose, outside
        self.manifest = SimpleNamespace(actions=Actions(), decisions=decisions, features=())
        self.sha256 = "5" * 64
        self.seen = []

    def act(self, observation):
        assert observation.shape == (SIZE,)
        assert np.isfinite(observation).all()
        self.seen.append(observation)
        return self._choose(observation)

    def outside(self, observation):
        return self._outside(observation)


def by_turns(*actions):
    """The actions one after the other, told by the share of the run that is done."""
    return lambda seen: actions[round(float(seen[0]) * 10) % len(actions)]


always = by_turns


class Rows(Dataset):
    def __init__(self, tokens, order):
        self.tokens, self.order = tokens, order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        row = self.order[i]
        return {
            "input_ids": self.tokens.ids[row],
            "attention_mask": self.tokens.mask[row],
            "labels": self.tokens.labels[row],
        }


def collate(rows):
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    length = int(batch["attention_mask"].sum(1).max())
    return {name: value[:, :length] if value.ndim == 2 else value for name, value in batch.items()}


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class Recorder(TrainerCallback):
    """What was used, update by update."""

    def __init__(self):
        self.rates, self.losses = [], []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append((logs["loss"], logs["learning_rate"]))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A small task on made-up words, with a random one-layer encoder."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    gc.collect()
    gc.freeze()  # or every Trainer collects all that was imported
    folder = tmp_path_factory.mktemp("task")
    words = [f"w{i}" for i in range(60)]
    (folder / "model").mkdir()
    vocabulary = folder / "model" / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config()).save_pretrained(folder / "model")
    rng, rows = random.Random(0), ["text,label"]
    for i in range(900):
        near = words[i % 3 * 20 : i % 3 * 20 + 25]
        rows.append(" ".join(rng.choice(near) for _ in range(rng.randint(4, 9))) + f",c{i % 3}")
    (folder / "rows.csv").write_text("\n".join(rows) + "\n")
    yield Task(
        dataset=str(folder / "rows.csv"), model=str(folder / "model"), rows=STEPS * BATCH,
        batch=BATCH, steps=STEPS, interval=EVERY, max_length=12, validation_rows=64,
    )  # fmt: skip
    gc.unfreeze()


def config(**changes):
    return BertConfig(
        vocab_size=65, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
        **({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | changes),
    )  # fmt: skip


def seeds(seed):
    return [int(x) for x in spread(seed, 3)]


def train(task, folder, callback=None, *, seed=5, resume=None, recorder=None, extra=(),
          optimizers=(None, None), dropout=0.0, before=None, **args):  # fmt: skip
    """A Trainer run over the rows in the order of `TorchJob`'s first epoch."""
    data = workload.load(replace(task, dropout=dropout))
    order, head, _ = seeds(seed)
    rows = torch.cat([next(b) for b in [batches(STEPS * BATCH, BATCH, order)] for _ in
                      range(STEPS)]).tolist()  # fmt: skip
    recorder = recorder or Recorder()
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": BATCH, "seed": 1,
        "per_device_eval_batch_size": 128, "max_steps": STEPS, "learning_rate": 2e-3,
        "lr_scheduler_type": "linear", "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "weight_decay": 0.0,
        "label_names": ["labels"],
    } | args  # fmt: skip
    try:
        trainer = InOrder(
            model=data.module(head),
            args=TrainingArguments(**settings),
            train_dataset=Rows(data.rows["train"], rows),
            eval_dataset=Rows(data.rows["validation"], range(64)),
            data_collator=collate,
            callbacks=[*([callback] if callback else []), recorder, *extra],
            optimizers=optimizers,
        )
        trainer.pop_callback(next(c for c in trainer.callback_handler.callbacks
                                  if type(c).__name__ == "PrinterCallback"))  # fmt: skip
        if before:
            before(trainer)
        trainer.train(resume_from_checkpoint=resume)
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])
    trainer.recorder = recorder
    return trainer


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def own(task):
    """The rows that `TorchJob` validates on."""
    return Rows(workload.load(task).rows["validation"], range(64))


class OneSeed(FineTuneEnv):
    warmup = 0.0

    def _draw(self, options):
        task, knobs, _ = super()._draw(options)
        return task, replace(knobs, warmup=self.warmup), 5


def episode(task, actions, rate, shape, warmup=0.0):
    """Observations, rates and weights of a recorded `FineTuneEnv` episode."""
    env = OneSeed(task, shape=shape)
    env.warmup = warmup
    seen, _ = env.reset(seed=0, options={"rate": rate})
    observations, rates = [seen], []
    for action in actions:
        seen, _, over, _, info = env.step(action)
        observations.append(seen)
        rates += [info["rate"]] * EVERY
    assert over
    return observations, rates, env._job.snapshot(), env


ACTIONS = {
    "mixed": [4, KEEP, 5, 2, 4, ROLLBACK, KEEP, 5, 1, KEEP],
    "low": [1, 4, KEEP, ROLLBACK, 5, 5, 4, 2, KEEP, 4],
}


@pytest.mark.parametrize(
    ("shape", "warmup", "name"),
    [("linear", 0, "mixed"), ("constant", 0, "mixed"), ("cosine", 0, "low"),
     ("linear", 6, "low"), ("cosine", 6, "mixed"), ("constant", 6, "low")],
)  # fmt: skip
def test_the_same_observations_and_rates_as_the_environment(task, tmp_path, shape, warmup, name):
    actions = ACTIONS[name]
    expected, _, final, env = episode(task, actions, 2e-3, shape, warmup / STEPS)
    assert env.history[1].factor != env.history[2].factor or shape == "constant"
    policy = Stub(by_turns(*actions))
    kind = "constant_with_warmup" if shape == "constant" and warmup else shape
    trainer = train(
        task, tmp_path,
        TunerCallback(policy, mode="explore", eval_dataset=own(task), classes=3),
        lr_scheduler_type=kind, warmup_steps=warmup,
    )  # fmt: skip
    assert len(policy.seen) == 10
    for step, (seen, wanted) in enumerate(zip(policy.seen, expected, strict=False)):
        np.testing.assert_array_equal(seen, wanted, err_msg=f"decision {step}")
    rates = [
        report.rate * _factor(shape, warmup, step)
        for report, start in zip(env.history[1:], range(0, STEPS, EVERY), strict=True)
        for step in range(start, start + EVERY)
    ]
    assert trainer.recorder.rates == rates
    assert [rate for _, rate in trainer.recorder.losses] == rates
    assert equal(weights(trainer), final)


def _factor(shape, warmup, step):
    from envs.knobs import Knobs, factor

    return factor(Knobs(shape=shape, warmup=warmup / STEPS), step, STEPS)


def lines(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


@pytest.mark.parametrize("advise", [True, False])
def test_without_a_turn_of_the_knobs_the_run_is_the_plain_one(task, tmp_path, advise):
    plain = train(task, tmp_path / "a", dropout=0.1)
    choose = always(TENFOLD) if advise else always(KEEP)
    callback = TunerCallback(Stub(choose), advise=advise, eval_dataset=own(task), mode="explore")
    steered = train(task, tmp_path / "b", callback, dropout=0.1)
    assert equal(weights(plain), weights(steered))
    assert plain.recorder.losses == steered.recorder.losses
    assert len(lines(tmp_path / "b")) == 10
    assert bool(lines(tmp_path / "b")[0]["guard"]) == advise


@pytest.mark.parametrize("save", [15, 16, 17, 21])
def test_a_resumed_run_is_the_uninterrupted_one(task, tmp_path, save):
    """Checkpoints in the middle of an interval, one update before its end, and at its end."""
    actions = [4, KEEP, 5, 2, 4, ROLLBACK, KEEP, 5, ROLLBACK, 4]
    save_args = {
        "save_strategy": "steps", "save_steps": save, "eval_strategy": "steps", "eval_steps": 7
    }  # fmt: skip

    def callback(rows):
        policy = Stub(by_turns(*actions), decisions=7)
        return TunerCallback(policy, mode="explore", eval_dataset=rows, decisions=8)

    for rows, name in ((own(task), "own"), (None, "user's")):
        folder = tmp_path / name
        whole = train(task, folder, callback(rows), dropout=0.1, **save_args)
        log = (folder / LOG).read_bytes()
        rates = whole.recorder.rates
        again = train(
            task, folder, callback(rows), dropout=0.1,
            resume=str(folder / f"checkpoint-{save}"), **save_args,
        )  # fmt: skip
        assert again.recorder.rates == rates[save:]
        assert (folder / LOG).read_bytes() == log
        assert equal(weights(whole), weights(again))
        assert again.lr_scheduler.base_lrs == whole.lr_scheduler.base_lrs
    assert len(set(rates)) > 5


def test_best_weights_that_another_process_lacks_are_lost_to_all(
    task, tmp_path, monkeypatch, caplog
):
    """As where each has a disk of its own: they would come back to different weights."""
    args = {"save_strategy": "steps", "save_steps": 15}
    train(task, tmp_path, TunerCallback(Stub(), mode="explore", eval_dataset=own(task)), **args)
    asked, share = [], tuner.processes.share

    def lacking(numbers, device, failed=False):
        asked.append(failed)
        numbers, failed = share(numbers, device, failed)
        return numbers, failed or len(asked) == 2  # the first is whether all could begin

    monkeypatch.setattr(tuner.processes, "share", lacking)
    policy = Stub(always(ROLLBACK))
    callback = TunerCallback(policy, mode="explore", eval_dataset=own(task))
    resumed = train(task, tmp_path, callback, resume=str(tmp_path / "checkpoint-15"), **args)
    assert asked[:2] == [False, False]
    assert "checkpoint-15: the best weights are not there: these take their place" in caplog.text
    assert len(policy.seen) == 5
    assert resumed.state.global_step == STEPS


def test_what_was_best_under_another_objective_is_forgotten():
    book = Logbook(history=[Progress(0, 2e-3, 1.0, (0.7,), validation=0.1)])
    assert book.is_best()
    assert not book.is_best()
    book.forget_validation()
    book.add(Progress(3, 2e-3, 1.0, (0.6,), age=3))
    assert book.is_best(after=10)
    assert Logbook.from_json(book.to_json()) == book


def test_another_policy_does_not_take_over(task, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 15}
    train(task, tmp_path, TunerCallback(Stub()), **args)
    other = Stub()
    other.sha256 = "6" * 64
    with pytest.raises(BadInput, match="the policy that the run began with"):
        train(task, tmp_path, TunerCallback(other), resume=str(tmp_path / "checkpoint-15"), **args)


def test_a_checkpoint_without_a_tuner_can_be_resumed_with_one(task, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 15}
    train(task, tmp_path, **args)
    trainer = train(
        task, tmp_path, TunerCallback(Stub(always(4))), resume=str(tmp_path / "checkpoint-15"),
        **args,
    )  # fmt: skip
    assert trainer.state.global_step == STEPS
    assert lines(tmp_path)[0]["step"] == 15


@pytest.mark.parametrize("mode", ["careful", "explore"])
@pytest.mark.parametrize("actions", [[TENFOLD], [TENTH], [TENFOLD, TENTH], [ROLLBACK]])
def test_hostile_policies_stay_within_the_limits(task, tmp_path, mode, actions):
    policy = Stub(by_turns(*actions))
    callback = TunerCallback(policy, mode=mode, eval_dataset=own(task))
    trainer = train(task, tmp_path, callback, lr_scheduler_type="constant")
    rates = np.array(trainer.recorder.rates) / 2e-3
    low, high, up, down = (0.1, 3, 1.5, 2) if mode == "careful" else (10**-1.5, 10**1.5, 10, 10)
    assert rates.min() >= low * (1 - 1e-12)
    assert rates.max() <= high * (1 + 1e-12)
    moves = rates[1:] / rates[:-1]
    assert moves.max() <= up * (1 + 1e-12)
    assert moves.min() >= 1 / down * (1 - 1e-12)
    assert all(torch.isfinite(w).all() for w in weights(trainer))
    assert replay(tmp_path / LOG, policy) == []


class Blow(TrainerCallback):
    """Somebody else's bug: the weights are spoilt at some updates."""

    def __init__(self, *steps, value=math.nan):
        self.steps, self.value = steps, value

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            with torch.no_grad():
                model.head.weight.view(-1)[0] = self.value


@pytest.mark.parametrize("mode", ["careful", "explore"])
def test_a_divergence_is_undone_once_and_then_the_users_schedule_rules(task, tmp_path, mode):
    policy = Stub(always(4))
    trainer = train(
        task, tmp_path, TunerCallback(policy, mode=mode, eval_dataset=own(task)),
        extra=[Blow(7, 16)], lr_scheduler_type="constant",
    )  # fmt: skip
    log = lines(tmp_path)
    events = [line for line in log if "diverged" in line["guard"]]
    assert [line["step"] for line in events] == [9, 18]
    assert all(line["applied"]["rollback"] for line in events)
    assert events[0]["applied"]["multiplier"] == 0.5
    assert log[-1] == events[1]
    assert trainer.recorder.rates[9:12] == [1e-3] * 3
    # Whoever explores does not trust the schedule: half the rate that diverged.
    assert trainer.recorder.rates[18:] == [2e-3 if mode == "careful" else 5e-4] * 12
    assert all(torch.isfinite(w).all() for w in weights(trainer))
    assert replay(tmp_path / LOG, policy) == []


def test_weights_that_are_not_finite_are_never_saved(task, tmp_path):
    """Spoilt in the middle of an interval, just before a checkpoint; and at the very end."""
    for steps, decisions in (((13,), 3), ((29,), 10)):
        folder = tmp_path / str(decisions)
        train(
            task, folder, TunerCallback(Stub(), decisions=decisions, eval_dataset=own(task)),
            extra=[Blow(*steps)], save_strategy="steps", save_steps=7,
        )  # fmt: skip
        for path in folder.glob("checkpoint-*/model.safetensors"):
            assert all(torch.isfinite(w).all() for w in load_file(path).values()), path
        assert sum("diverged" in line["guard"] for line in lines(folder)) == 1
        steps_logged = [line["step"] for line in lines(folder)]
        assert steps_logged == sorted(set(steps_logged))


class Stop(TrainerCallback):
    """Somebody else ends the run early, after the tuner has seen the update."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("stop", [14, 15])
def test_weights_that_are_not_finite_are_not_handed_over_at_an_early_stop(task, tmp_path, stop):
    """In the middle of an interval, and at its end; spoilt by the last update."""
    callback = TunerCallback(Stub(), eval_dataset=own(task))
    trainer = train(task, tmp_path, callback, extra=[Blow(stop - 1), Stop(stop)])
    assert trainer.state.global_step == stop
    assert all(torch.isfinite(w).all() for w in weights(trainer))
    assert lines(tmp_path)[-1]["step"] == stop


@pytest.mark.parametrize(
    ("decisions", "mode", "checked", "kept"),
    [
        # Every third update and at the start; the losses fall, so that each time is the best.
        (10, "explore", range(0, 31, 3), range(0, 30, 3)),
        (10, "careful", range(0, 31, 3), [0, 12, 24]),
        # The losses of a long interval are looked at between.
        (1, "careful", [0, 25, 30], [0]),
    ],
)
def test_all_weights_are_read_once_a_decision(
    task, tmp_path, monkeypatch, decisions, mode, checked, kept
):
    reads, copies, recorder = [], [], Recorder()

    def noting(function, steps):
        def run(*args, **kwargs):
            steps.append(len(recorder.rates))
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(tuner.sight, "finite", noting(tuner.sight.finite, reads))
    monkeypatch.setattr(tuner.crew, "remember", noting(tuner.crew.remember, copies))
    callback = TunerCallback(Stub(), mode=mode, eval_dataset=own(task), decisions=decisions)
    train(task, tmp_path, callback, recorder=recorder, lr_scheduler_type="constant")
    assert reads == list(checked)
    assert copies == list(kept)


@pytest.mark.parametrize("mode", ["careful", "explore"])
def test_a_rate_beyond_reason_ends_finite(task, tmp_path, mode):
    """The user's own rate is near the ceiling, and the policy wants ten times as much."""
    callback = TunerCallback(Stub(always(TENFOLD)), mode=mode, eval_dataset=own(task))
    trainer = train(
        task, tmp_path, callback, learning_rate=0.5, max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    assert max(trainer.recorder.rates) <= 10.0
    assert all(torch.isfinite(w).all() for w in weights(trainer))


@pytest.mark.parametrize("at", [0, 4])
def test_a_policy_that_raises_leaves_the_users_schedule(task, tmp_path, at, caplog):
    def choose(seen):
        if round(float(seen[0]) * 10) == at:
            raise RuntimeError("no idea")
        return TENFOLD

    plain = train(task, tmp_path / "plain")
    trainer = train(task, tmp_path, TunerCallback(Stub(choose), mode="explore"))
    assert trainer.recorder.rates[3 * at :] == plain.recorder.rates[3 * at :]
    assert trainer.lr_scheduler.base_lrs == plain.lr_scheduler.base_lrs
    found = [r for r in caplog.records if "no idea" in r.getMessage()]
    assert len(found) == 1
    assert found[0].levelno == logging.WARNING
    assert not trainer.model._forward_hooks
    assert "no idea" in lines(tmp_path)[-1]["guard"]


def test_out_of_range_eases_and_then_switches_off(task, tmp_path):
    def outside(seen):
        return ["gap"] if seen[0] >= 0.45 else []

    policy = Stub(always(4), outside)
    trainer = train(
        task, tmp_path, TunerCallback(policy, mode="explore"), lr_scheduler_type="constant"
    )
    rates = [trainer.recorder.rates[i] / 2e-3 for i in range(0, STEPS, EVERY)]
    top = 1.6**5
    assert rates == pytest.approx([1.6, 1.6**2, 1.6**3, 1.6**4, top, top**0.5, top**0.25, 1, 1, 1])
    assert trainer.recorder.rates[-1] == 2e-3
    assert len(lines(tmp_path)) == 8
    assert replay(tmp_path / LOG, policy) == []


def test_accumulated_micro_batches_make_the_losses_of_the_big_batch(task, tmp_path):
    """Also where the model divides its loss by the items of the whole batch, and where not."""

    def run(folder, micro, seen, model):
        policy = Stub(by_turns(4, KEEP, 2))

        told = []

        def prepare(trainer):
            if model is not None:
                with torch.random.fork_rng():
                    torch.manual_seed(3)
                    trainer.model = trainer.model_wrapped = model()
                trainer.model_accepts_loss_kwargs = True

        callback = overheard(TunerCallback(policy, mode="explore"), told)
        train(
            task, folder, callback, per_device_train_batch_size=micro,
            gradient_accumulation_steps=BATCH // micro, before=prepare,
            remove_unused_columns=False,
        )  # fmt: skip
        seen.extend(loss for losses, _ in told for loss in losses)
        return np.array(policy.seen)

    def bert():
        return Shared(config(num_labels=3))

    for model in (None, bert):
        losses = [], []
        big = run(tmp_path / "big", 8, losses[0], model)
        small = run(tmp_path / "small", 2, losses[1], model)
        assert len(losses[0]) >= STEPS - EVERY
        np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)
        np.testing.assert_allclose(big, small, atol=2e-3)


class Shared(BertForSequenceClassification):
    """A model that, like the causal ones, divides by the items of the accumulated batch."""

    def forward(self, num_items_in_batch=None, labels=None, **inputs):
        output = super().forward(**inputs)
        total = torch.nn.functional.cross_entropy(output.logits, labels, reduction="sum")
        output.loss = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return output


def test_what_is_known_of_the_validation_loss(task, tmp_path):
    names = [feature.name for feature in FEATURES]
    known, age = names.index("has_validation"), names.index("age")

    def observations(folder, rows=None, **args):
        policy = Stub()
        train(task, folder, TunerCallback(policy, eval_dataset=rows), **args)
        return np.array(policy.seen)

    none = observations(tmp_path / "none")
    assert not none[:, known].any()
    users = observations(tmp_path / "users", eval_strategy="steps", eval_steps=6)
    assert users[:, known].tolist() == [0, 0] + [1] * 8
    assert users[2:, age].tolist() == pytest.approx([0, 0.1] * 4)
    mine = observations(tmp_path / "mine", own(task))
    assert mine[:, known].all()
    both = observations(tmp_path / "both", eval_strategy="steps", eval_steps=3, eval_on_start=True)
    np.testing.assert_allclose(both, mine, atol=1e-5)  # the Trainer sums in another order


def test_groups_keep_their_ratios_and_their_own_schedule(task, tmp_path):
    def split(trainer):
        model = trainer.model
        trainer.optimizer = torch.optim.AdamW(
            [{"params": model.encoder.parameters(), "lr": 7e-4},
             {"params": model.head.parameters(), "lr": 3e-3}]
        )  # fmt: skip

    class Groups(Recorder):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    trainer = train(
        task, tmp_path, TunerCallback(Stub(by_turns(4, KEEP, 2)), mode="explore"), before=split,
        recorder=Groups(), warmup_steps=4, lr_scheduler_type="cosine",
    )  # fmt: skip
    rates = np.array(trainer.recorder.rates)[1:]
    np.testing.assert_allclose(rates[:, 0] / rates[:, 1], 7 / 30, rtol=1e-12)
    assert [rate for _, rate in trainer.recorder.losses] == [r[0] for r in trainer.recorder.rates]


def test_never_raised_during_warm_up(task, tmp_path):
    trainer = train(task, tmp_path, TunerCallback(Stub(always(4))), warmup_steps=7)
    plain = train(task, tmp_path / "plain", warmup_steps=7)
    ratio = np.array(trainer.recorder.rates[1:]) / plain.recorder.rates[1:]
    assert ratio[:8].tolist() == [1.0] * 8
    assert ratio[9] == pytest.approx(1.5)


@pytest.mark.parametrize("steps", [STEPS, 500])
def test_a_warm_up_that_the_run_does_not_outlast_is_told(task, tmp_path, caplog, steps):
    told = f"warmup_steps: {steps} in a run of {STEPS} updates: the rate never reaches its peak"
    train(task, tmp_path, TunerCallback(Stub()), warmup_steps=steps, lr_scheduler_type="constant")
    train(task, tmp_path, TunerCallback(Stub()), warmup_steps=STEPS - 1)
    assert "warmup_steps" not in caplog.text
    train(task, tmp_path, TunerCallback(Stub()), warmup_steps=steps)
    assert caplog.text.count(told) == 1


def test_updates_of_no_batches_are_refused(task, tmp_path):
    match = "trainer: gradient_accumulation_steps: 0 is not a count; give 1 or more"
    with pytest.raises(BadInput, match=match):
        train(task, tmp_path, TunerCallback(Stub()), gradient_accumulation_steps=0)
    trainer = train(task, tmp_path, max_steps=1)
    trainer.args.gradient_accumulation_steps = 0
    with pytest.raises(BadInput, match=match):
        TunerCallback(Stub(), trainer=trainer)


@pytest.mark.parametrize(
    "args",
    [
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 9},
        {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 9},
        {"learning_rate": 0.0},
        {"learning_rate": 1e30},
    ],
)
def test_runs_that_cannot_be_steered_are_refused_at_once(task, tmp_path, args):
    with pytest.raises(BadInput) as caught:
        train(task, tmp_path, TunerCallback(Stub()), **args)
    assert "\n" not in str(caught.value)


def test_a_policy_never_trained_without_validation_losses_needs_some(task, tmp_path, caplog):
    def policy(low):
        found = Stub()
        found.manifest.features = [
            SimpleNamespace(name=f.name, low=low, mean=0.0, deviation=1.0) for f in FEATURES
        ]
        return found

    with pytest.raises(BadInput, match=r"callback: eval_dataset: there is none.*; give eval_data"):
        train(task, tmp_path, TunerCallback(policy(1.0)))
    train(task, tmp_path, TunerCallback(policy(1.0), eval_dataset=own(task)))
    with pytest.raises(BadInput, match=r"callback: eval_dataset: no rows .*; give some, or leave"):
        train(task, tmp_path, TunerCallback(policy(0.0), eval_dataset=[]))
    train(task, tmp_path, TunerCallback(policy(1.0)), eval_strategy="steps", eval_steps=3)
    assert "no validation losses" not in caplog.text
    train(task, tmp_path, TunerCallback(policy(0.0)))
    assert caplog.text.count("no validation losses: the tuner goes by training losses; give") == 1


def test_more_decisions_than_updates_and_runs_of_none_are_refused(task, tmp_path):
    with pytest.raises(BadInput, match=r"decisions: 31 are more than the run's 30 .*; give 30"):
        train(task, tmp_path, TunerCallback(Stub(), decisions=31))
    callback = TunerCallback(Stub(), decisions=30)
    train(task, tmp_path, callback)
    assert len(lines(tmp_path)) == STEPS
    with pytest.raises(BadInput, match="max_steps: 0 leaves nothing to steer; ask for 1"):
        train(task, tmp_path, TunerCallback(Stub()), max_steps=-1, num_train_epochs=0)
    # A policy of more decisions than the run has updates decides at each.
    train(task, tmp_path, TunerCallback(Stub(decisions=50)))
    assert len(lines(tmp_path)) == STEPS


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_engines_that_keep_the_weights_to_themselves_are_refused(task, tmp_path, engine):
    def prepare(trainer):
        wrap = trainer.accelerator.prepare_optimizer

        def prepared(*args, **kwargs):
            optimizer = wrap(*args, **kwargs)
            optimizer.accelerator_state = SimpleNamespace(distributed_type=DistributedType[engine])
            return optimizer

        trainer.accelerator.prepare_optimizer = prepared

    with pytest.raises(BadInput, match=f"trainer: {engine.lower()}: not supported .*; train with"):
        train(task, tmp_path, TunerCallback(Stub()), before=prepare)


WEIGHT = torch.nn.Parameter(torch.zeros(2, 2))


def named(name, **fields):
    """An optimizer that is known by its name alone."""
    return type(name, (torch.optim.Optimizer,), {})([WEIGHT], {"lr": 1.0, **fields})


def around(optimizer, name="optimizer"):
    return SimpleNamespace(**{name: optimizer}, param_groups=optimizer.param_groups)


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (torch.optim.AdamW([WEIGHT]), "adamw"),
        (type("Ours", (torch.optim.AdamW,), {})([WEIGHT]), "adamw"),
        (torch.optim.NAdam([WEIGHT]), "adamw"),
        (named("PagedAdamW8bit"), "adamw"),
        (named("AdEMAMix8bit"), "adamw"),
        (named("AdamWScheduleFree"), "adamw"),
        (named("Adafactor", scale_parameter=False, relative_step=False), "adamw"),
        (named("Adafactor", scale_parameter=True), None),
        (torch.optim.Adafactor([WEIGHT]), None),
        (torch.optim.RMSprop([WEIGHT]), "rmsprop"),
        (named("RMSprop8bit"), "rmsprop"),
        (torch.optim.SGD([WEIGHT], 0.1, momentum=0.9), "sgd"),
        (torch.optim.SGD([WEIGHT], 0.1), None),
        (SwitchableOptimizer([WEIGHT], "sgd", lr=0.1), "sgd"),
        (around(around(torch.optim.AdamW([WEIGHT]), "optim")), "adamw"),
        (named("Lion"), None),
        (named("Prodigy"), None),
        (named("DAdaptAdam"), None),
        (named("MuonWithAuxAdam"), None),
        (named("SignSGD"), None),
        (named("SGDScheduleFree"), None),
        (torch.optim.Muon([WEIGHT]), None),
        (torch.optim.ASGD([WEIGHT]), None),
    ],
)
def test_optimizers_whose_rates_are_of_another_scale_are_refused(optimizer, kind):
    for each in (optimizer, around(optimizer)):  # the latter as accelerate has it
        if kind is None:
            name = type(optimizer).__name__
            with pytest.raises(BadInput, match=f"optimizer: {name}: .*; train with AdamW, RMSprop"):
                refuse_unknown(each)
        else:
            refuse_unknown(each)
            assert kind_of(each) == kind


def test_the_callback_refuses_such_an_optimizer_before_the_first_update(task, tmp_path):
    def lion(trainer):
        kind = type("Lion", (torch.optim.Optimizer,), {"step": lambda self, closure=None: None})
        trainer.optimizer = kind(trainer.model.parameters(), {"lr": 1e-4})

    with pytest.raises(BadInput, match="Lion"):
        train(task, tmp_path, TunerCallback(Stub()), before=lion)


def test_weights_that_are_spread_in_ways_that_cannot_be_read_are_refused():
    model = torch.nn.Linear(2, 2)
    model.weight._local_tensor = torch.zeros(1, 2)
    with pytest.raises(BadInput, match=r"trainer: model: its weights are spread .*; use FSDP2 or"):
        shards.sharded(model)

    class FullyShardedDataParallel(torch.nn.Sequential):
        pass

    with pytest.raises(BadInput, match=r"trainer: fsdp: version 1 .*; set version 2"):
        shards.sharded(FullyShardedDataParallel(torch.nn.Linear(2, 2)))


def test_what_a_log_line_says_of_the_cost(caplog):
    assert Gauge().cost({"loss": -0.5, "eval_loss": 2.0}) == -0.5
    assert Gauge().cost({"loss": -0.5, "eval_loss": 2.0}, "eval_") == 2.0
    assert Gauge().cost({"train_loss": 1.0}) is None
    inside = Gauge()
    lines = [{"loss": 9.0, "reward": r} for r in (None, math.nan, 0.25, 1.0, 3.0, -0.5)]
    assert [inside.cost(line) for line in lines] == [None, None, 0.75, 1e-3, 1e-3, 1.5]
    assert inside.cost({"loss": 9.0}) is None
    none, above = caplog.messages
    assert "reward: None is the mean" in none
    assert "reward: 3 is outside [0, 1], and the first was not" in above
    assert inside.cost({"reward": 4.0}) == 1e-3
    assert len(caplog.messages) == 2
    caplog.clear()
    outside = Gauge()
    costs = [outside.cost({"reward": r}) for r in (2.0, 0.0, -800.0)]
    assert costs == pytest.approx([math.log1p(math.exp(-2)), math.log(2), 800.0])
    assert caplog.text.count("outside [0, 1]") == 1


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_each_trial_of_a_search_is_a_run_of_its_own(task, tmp_path):
    """A model, an optimizer and a rate of its own for each; the log is the latest's."""
    data, policy, recorder = workload.load(task), Stub(always(4)), Recorder()
    rows = Rows(data.rows["train"], range(48))
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    trainer = Trainer(
        model_init=lambda: BertForSequenceClassification(config(num_labels=3)),
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=BATCH, max_steps=6,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            lr_scheduler_type="constant", eval_strategy="steps", eval_steps=2,
        ),
        train_dataset=rows, eval_dataset=rows, data_collator=collate,
        callbacks=[TunerCallback(policy, mode="explore", decisions=3), recorder],
    )  # fmt: skip
    try:
        best = trainer.hyperparameter_search(
            lambda trial: {"learning_rate": trial.suggest_categorical("rate", [1e-3, 1e-4])},
            backend="optuna", n_trials=2, direction="minimize",
        )  # fmt: skip
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])
    assert math.isfinite(best.objective)
    steps = np.array(recorder.rates).reshape(2, 6)
    np.testing.assert_allclose(steps / steps[:, :1], [[1, 1, 1.6, 1.6, 2.56, 2.56]] * 2)
    assert len(policy.seen) == 6
    assert len(lines(tmp_path)) == len((tmp_path / f"{LOG}.old").read_text().splitlines()) == 3


def test_an_encoder_decoder_under_its_own_trainer(tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config
    from transformers import T5ForConditionalGeneration as Model

    torch.manual_seed(0)
    model = Model(
        T5Config(
            vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    rng = np.random.default_rng(0)
    rows = [{"input_ids": (x := rng.integers(2, 20, 6).tolist()), "labels": x[::-1]}
            for _ in range(64)]  # fmt: skip
    told, recorder = [], Recorder()

    callback = TunerCallback(Stub(always(4)), eval_dataset=rows[:16], decisions=4)
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, logging_steps=1,
            gradient_accumulation_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True,
            disable_tqdm=True, save_strategy="no", predict_with_generate=True,
        ),
        train_dataset=rows, data_collator=lambda batch: {
            name: torch.tensor([row[name] for row in batch]) for name in batch[0]
        },
        callbacks=[recorder, overheard(callback, told)],
    )  # fmt: skip
    trainer.loss_is_scaled_for_ga = False  # T5's is not, whatever the Trainer thinks
    trainer.train()
    losses = [loss for interval, _ in told for loss in interval]
    np.testing.assert_allclose(losses, [loss for loss, _ in recorder.losses[:6]], rtol=1e-4)
    assert told[-1][1] < told[0][1]
    assert recorder.rates[2] == pytest.approx(1e-2 * 1.5**2 * 6 / 8)


def test_the_shipped_policy_steers_by_its_name(task, tmp_path):
    callback = TunerCallback("default")
    train(task, tmp_path, callback)
    log = [json.loads(line) for line in (tmp_path / "tuner.jsonl").read_text().splitlines()]
    assert len(log) > 3
    assert {entry["sha256"] for entry in log} == {artifacts.load(artifacts.DEFAULT).sha256}
    assert artifacts.DEFAULT.stat().st_size < 1_000_000


def test_a_bad_call_is_refused():
    with pytest.raises(BadInput, match="mode"):
        TunerCallback(Stub(), mode="bold")
    with pytest.raises(BadInput, match="eval_rows"):
        TunerCallback(Stub(), eval_rows=0)
    with pytest.raises(BadInput):
        TunerCallback("no-such-file.safetensors")


def outside(trainer):
    """The loss is none of the model's: it is seen in the log alone."""
    trainer.compute_loss_func = lambda out, labels, num_items_in_batch=None: (
        torch.nn.functional.cross_entropy(out["logits"], labels)
    )


@pytest.mark.parametrize("alone", [True, False])
def test_the_filter_that_hides_a_loss_of_nan_is_off_where_the_log_is_all(
    task, tmp_path, caplog, alone
):
    inside = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            inside.append(args.logging_nan_inf_filter)

    before = outside if alone else None
    trainer = train(task, tmp_path, TunerCallback(Stub()), extra=[Look()], before=before)
    assert inside == [not alone] * STEPS
    assert trainer.args.logging_nan_inf_filter
    assert ("logging_nan_inf_filter" in caplog.text) == alone


def test_a_log_that_cannot_be_written_is_refused_at_once(task, tmp_path):
    (tmp_path / "file").write_text("")
    callback = TunerCallback(Stub(), log=tmp_path / "file" / "log.jsonl")
    with pytest.raises(BadInput, match="log: cannot be written"):
        train(task, tmp_path / "a", callback)


def test_the_state_is_plain_json(task, tmp_path):
    train(task, tmp_path, TunerCallback(Stub()), save_strategy="steps", save_steps=20)
    text = (tmp_path / "checkpoint-20" / "trainer_state.json").read_text()
    saved = json.loads(text)["stateful_callbacks"]["TunerCallback"]
    assert saved["args"]["sha256"] == "5" * 64
    assert saved["attributes"]["saved"]["book"]["next"] == 21


def test_one_line_with_a_policy_file(task, tmp_path):
    """A real artifact; its hash is pinned, and its log replays."""
    actions = Actions()
    features = [
        {"name": f.name, "unit": f.unit, "mean": 0.0, "deviation": 1.0, "low": -5.0, "high": 5.0}
        for f in FEATURES
    ]
    number = np.arange(actions.size)
    weight = np.zeros((actions.size, SIZE))
    weight[:, 0] = number  # the later, the further down the list of actions
    policy = artifacts.make(
        algorithm="ppo", features=features, actions=actions, decisions=10, start_decades=1.5,
        network={"kind": "mlp", "layers": (SIZE, actions.size), "activation": "tanh"},
        provenance={}, arrays={"layer0.weight": weight, "layer0.bias": -(number**2) / 16},
    )  # fmt: skip
    path = tmp_path / "policy.safetensors"
    digest = artifacts.save(policy, path)
    args = {"save_strategy": "steps", "save_steps": 14}
    whole = train(task, tmp_path, TunerCallback(path, sha256=digest), **args)
    log = (tmp_path / LOG).read_bytes()
    resume = str(tmp_path / "checkpoint-14")
    again = train(task, tmp_path, TunerCallback(str(path)), resume=resume, **args)
    assert equal(weights(whole), weights(again))
    assert (tmp_path / LOG).read_bytes() == log
    assert lines(tmp_path)[0]["sha256"] == digest
    assert len(lines(tmp_path)[0]["normalised"]) == SIZE
    assert len({line["proposed"] for line in lines(tmp_path)}) > 1
    assert replay(tmp_path / LOG, artifacts.load(path)) == []
    kept = json.loads((tmp_path / "checkpoint-14" / "trainer_state.json").read_text())
    assert kept["stateful_callbacks"]["TunerCallback"]["args"]["policy"] == str(path)
    restored = train(
        task, tmp_path, TunerCallback(path), resume=resume,
        restore_callback_states_from_checkpoint=True, **args,
    )  # fmt: skip
    assert equal(weights(whole), weights(restored))


class Below(TrainerCallback):
    """The loss with so much taken off, as of a density: it may be negative."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        forward = model.forward
        model.forward = lambda **given: (lambda out: out | {"loss": out["loss"] - 3})(
            forward(**given)
        )


def test_a_negative_loss_is_no_divergence(task, tmp_path):
    plain = train(task, tmp_path / "plain", extra=[Below()])
    callback = TunerCallback(Stub(), eval_dataset=own(task))
    trainer = train(task, tmp_path, callback, extra=[Below()])
    assert trainer.recorder.losses[-1][0] < -1
    assert not any(line["guard"] for line in lines(tmp_path))
    assert equal(weights(plain), weights(trainer))


def normed(trainer):
    """Put a batch norm before the head."""
    model, head = trainer.model, trainer.model.head
    norm = torch.nn.BatchNorm1d(head.in_features)
    model.head = torch.nn.Sequential(norm, head)


class BlowEncoder(Blow):
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            with torch.no_grad():
                next(model.encoder.parameters()).fill_(self.value)


def test_running_statistics_are_put_back_with_the_weights(task, tmp_path):
    callback = TunerCallback(Stub(decisions=3), eval_dataset=own(task))
    trainer = train(
        task, tmp_path, callback, before=normed, extra=[BlowEncoder(13)], save_strategy="steps",
        save_steps=17,
    )  # fmt: skip
    assert [line["step"] for line in lines(tmp_path) if line["guard"]] == [17]
    found = [
        load_file(tmp_path / "checkpoint-17" / "model.safetensors"),
        trainer.model.state_dict(),
    ]
    for tensors in found:
        assert "head.0.running_var" in tensors
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_statistics_that_are_not_finite_are_never_saved(task, tmp_path):
    """Of finite weights: one batch was beyond the range of its numbers."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 13:
                model.head[0].running_var[0] = math.inf

    callback = TunerCallback(Stub(), eval_dataset=own(task))
    trainer = train(task, tmp_path, callback, before=normed, extra=[Spoil()])
    assert [line["guard"] for line in lines(tmp_path) if line["guard"]] == [
        "diverged: weights are not finite"
    ]
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())


def test_running_statistics_are_resumed(task, tmp_path):
    args = {"before": normed, "save_strategy": "steps", "save_steps": 14}
    choose = by_turns(*[KEEP] * 6, ROLLBACK)

    def run(resume=None):
        callback = TunerCallback(Stub(choose), mode="explore", eval_dataset=own(task))
        return train(task, tmp_path, callback, resume=resume, **args).model.state_dict()

    whole, resume = run(), tmp_path / "checkpoint-14"
    again = run(str(resume))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    path = resume / "tuner.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    kept = load_file(path)
    count = sum(name.startswith("weight") for name in kept)
    for i in (count - 2, count - 1):  # an older version kept none
        assert kept.pop(f"weight{i}").shape == whole["head.0.running_var"].shape
    path.write_bytes(save(kept, about))
    older = run(str(resume))
    assert all(torch.isfinite(tensor).all() for tensor in older.values())
    assert torch.equal(older["head.0.num_batches_tracked"], whole["head.0.num_batches_tracked"])


class Nan(TrainerCallback):
    """One batch whose loss is NaN, and no update made of it, as by a loss scaler."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        forward = model.forward

        def once(**given):
            out = forward(**given)
            self.calls += model.training
            spoilt = model.training and self.calls == self.at
            return {name: each * math.nan for name, each in out.items()} if spoilt else out

        model.forward = once

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.calls == self.at:
            for parameter in model.parameters():
                parameter.grad = None


@pytest.mark.parametrize("before", [None, outside])
def test_a_loss_of_nan_is_one_event(task, tmp_path, before):
    callback = TunerCallback(Stub(), eval_dataset=None if before else own(task))
    trainer = train(task, tmp_path, callback, extra=[Nan(8)], before=before)
    events = [line["guard"] for line in lines(tmp_path) if line["guard"]]
    assert events == ["diverged: training loss is not finite"]
    logged = [loss for loss, _ in trainer.recorder.losses]
    assert len(logged) == STEPS
    assert all(map(math.isfinite, logged[:7]))
    assert all(map(math.isfinite, logged)) == (before is None)
