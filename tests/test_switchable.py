"""A Trainer's optimizer that changes on the way, and its other knobs at the policy's hand."""

import copy
import json
import math
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_callback import (
    EVERY,
    KEEP,
    STEPS,
    Recorder,
    Stub,
    by_turns,
    equal,
    lines,
    own,
    task,  # noqa: F401  (the fixture)
    train,
    weights,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

import tuner.callback
import tuner.checkpoint
import tuner.processes
import tuner.sight
from envs import optim
from envs.env import FineTuneEnv
from envs.errors import BadInput, UnknownName
from envs.handles import Handles
from envs.job import TorchJob
from envs.knobs import OPTIMIZERS, Actions, Knobs
from envs.progress import Context, Progress
from envs.switchable import SwitchableOptimizer
from tuner.audit import replay
from tuner.callback import LOG, TunerCallback
from tuner.guard import FAR
from tuner.steer import Helm

ACTIONS = Actions(
    optimizers=OPTIMIZERS,
    turns=(("weight_decay", 3.0), ("clip", 0.3), ("depth", -1.0), ("depth", 1.0), ("clip", 3.0)),
)
AT = {ACTIONS.label(action): action for action in range(ACTIONS.size)}
RATES = {"adamw": 1e-2, "sgd": 1e-1, "rmsprop": 1e-3}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def run(net, optimizer, updates, first=0, scheduler=None):
    for number in range(first, first + updates):
        torch.manual_seed(number)
        net(torch.randn(6, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_unswitched_it_is_torchs_own_to_the_bit(kind):
    found = []
    for make in (
        lambda p, knobs: optim.make(p, knobs),
        lambda p, knobs: SwitchableOptimizer(p, kind, lr=knobs.rate, weight_decay=0.1),
    ):
        net = model()
        optimizer = make([*net.parameters()], Knobs(RATES[kind], optimizer=kind, weight_decay=0.1))
        scheduler = LambdaLR(optimizer, lambda step: 1 - step / 20)
        found.append(run(net, optimizer, 10, scheduler=scheduler))
    assert torch.equal(*found)


@pytest.mark.parametrize("old", OPTIMIZERS)
@pytest.mark.parametrize("new", OPTIMIZERS)
def test_a_switch_hands_over_and_a_resumed_one_goes_on_to_the_bit(old, new):
    net, other = model(), model()
    before = Knobs(RATES[old], optimizer=old, weight_decay=0.1)
    mine = SwitchableOptimizer(net.parameters(), old, lr=RATES[old], weight_decay=0.1)
    plain = optim.make([*other.parameters()], before)
    run(net, mine, 5), run(other, plain, 5)
    mine.switch(new)
    if old != new:
        plain = optim.hand_over(
            plain, [*other.parameters()], Knobs(RATES[old], optimizer=new, weight_decay=0.1)
        )
    assert mine.kind == new
    assert torch.equal(run(net, mine, 2, 5), run(other, plain, 2, 5))
    saved, again = copy.deepcopy(mine.state_dict()), copy.deepcopy(net)
    assert saved["kind"] == new
    fresh = SwitchableOptimizer(again.parameters(), old, lr=1.0)
    fresh.load_state_dict(saved)
    assert torch.equal(run(again, fresh, 4, 7), run(net, mine, 4, 7))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_makes_the_same_next_steps(again):
    net = model()
    optimizer = SwitchableOptimizer(net.parameters(), lr=RATES["adamw"], weight_decay=0.1)
    run(net, optimizer, 3)
    optimizer.switch("rmsprop")
    other, theirs = again((net, optimizer))
    assert theirs.kind == "rmsprop"
    theirs.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = RATES["rmsprop"]
    assert torch.equal(run(other, theirs, 3, 3), run(net, optimizer, 3, 3))
    theirs.switch("sgd")
    assert optimizer.kind == "rmsprop"


def test_groups_keep_their_own_settings_through_a_switch():
    net = model()
    groups = [
        {"params": [net[0].weight], "lr": 1e-2, "weight_decay": 0.3, "name": "low"},
        {"params": [net[2].weight], "lr": 1e-3},
    ]
    optimizer = SwitchableOptimizer(groups, lr=5.0)
    LambdaLR(optimizer, lambda step: 1.0)
    optimizer.switch("sgd")
    kept = [
        {key: group.get(key) for key in ("lr", "weight_decay", "name", "initial_lr", "momentum")}
        for group in optimizer.param_groups
    ]
    assert kept == [
        {"lr": 1e-2, "weight_decay": 0.3, "name": "low", "initial_lr": 1e-2, "momentum": 0.9},
        {"lr": 1e-3, "weight_decay": 0.0, "name": None, "initial_lr": 1e-3, "momentum": 0.9},
    ]
    with pytest.raises(UnknownName, match="adamw"):
        optimizer.switch("adam")


# -- in a Trainer ----------------------------------------------------------------------------


def switchable(kind="adamw", rate=2e-3, decay=0.0):
    def put(trainer):
        trainer.optimizer = SwitchableOptimizer(
            trainer.model.parameters(), kind, lr=rate, weight_decay=decay
        )

    return put


def stub(*names):
    policy = Stub(by_turns(*[KEEP if name == "keep" else AT[name] for name in names]))
    policy.manifest.actions = ACTIONS
    return policy


class Watch(TrainerCallback):
    """What the optimizer of each update was."""

    def __init__(self):
        self.seen = []

    def on_optimizer_step(self, args, state, control, optimizer=None, model=None, **kwargs):
        inner, group = optimizer.optimizer, optimizer.param_groups[0]
        frozen = sum(not p.requires_grad for p in model.parameters()) > 0
        self.seen.append((getattr(inner, "kind", ""), group["weight_decay"], args.max_grad_norm,
                          frozen))  # fmt: skip


class OneSeed(FineTuneEnv):
    def _draw(self, options):
        given, knobs, _ = super()._draw(options)
        return given, knobs, 5


NAMES = ("weight_decay x3", "sgd", "weight_decay x3", "clip x0.3", "depth -1",
         "rmsprop", "keep", "depth +1", "adamw", "x0.6")  # fmt: skip


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]])
def test_a_trainer_obeys_as_the_environments_job_does(task, tmp_path, order):  # noqa: F811
    """Observations, rates and weights, through switches and turns of every knob."""
    policy = stub(*order)
    tuner = TunerCallback(policy, mode="explore", eval_dataset=own(task), eval_rows=64, classes=3)
    trainer = train(task, tmp_path, tuner, before=switchable())
    env = OneSeed(task, actions=ACTIONS, make_job=TorchJob)
    seen, rates = [env.reset(seed=0, options={"rate": 2e-3})[0]], []
    for name in order:
        observation, *_, info = env.step(KEEP if name == "keep" else AT[name])
        seen.append(observation)
        rates += [info["rate"] * (STEPS - len(rates) - i) / STEPS for i in range(EVERY)]
    assert len(policy.seen) == 10
    guards = [""] * 10
    if order[2] == "depth +1":  # all are in training already
        guards[2] = "depth held at 2"
    assert [line["guard"] for line in lines(tmp_path)] == guards
    np.testing.assert_allclose(policy.seen, seen[:10], rtol=1e-4, atol=1e-4)
    assert trainer.recorder.rates == pytest.approx(rates, rel=1e-12)
    for mine, other in zip(weights(trainer), env._job._module.parameters(), strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-4, atol=1e-5)
    assert replay(tmp_path / LOG, policy) == []


@pytest.mark.parametrize("save", [8, 15, 22])
def test_a_run_that_switched_is_resumed_to_the_bit(task, tmp_path, save):  # noqa: F811
    args = {"save_strategy": "steps", "save_steps": save, "weight_decay": 0.02}

    def tuner():
        return TunerCallback(stub(*NAMES), mode="explore", eval_dataset=own(task))

    watch, again = Watch(), Watch()
    begin = switchable("rmsprop", 1e-3, 0.02)
    whole = train(task, tmp_path, tuner(), dropout=0.1, before=begin, extra=[watch], **args)
    log, found = (tmp_path / LOG).read_bytes(), weights(whole)
    path = str(tmp_path / f"checkpoint-{save}")
    resumed = train(task, tmp_path, tuner(), dropout=0.1, before=begin, extra=[again],
                    resume=path, **args)  # fmt: skip
    assert again.seen == watch.seen[save:]
    assert resumed.recorder.rates == whole.recorder.rates[save:]
    assert (tmp_path / LOG).read_bytes() == log
    assert equal(found, weights(resumed))
    kinds = [kind for kind, *_ in watch.seen]
    assert (kinds[0], kinds[4], kinds[16], kinds[-1]) == ("rmsprop", "sgd", "rmsprop", "adamw")
    decays = [round(decay, 6) for _, decay, *_ in watch.seen]
    assert (decays[0], decays[7], decays[-1]) == (0.06, 0.18, 0.18)
    assert {round(clip, 6) for *_, clip, _ in watch.seen} == {1.0, 0.3}
    assert [frozen for *_, frozen in watch.seen[9:24:3]] == [False, True, True, True, False]
    for trainer in (whole, resumed):
        assert trainer.args.max_grad_norm == 1.0  # as it was found
        assert all(p.requires_grad for p in trainer.model.parameters())


def test_a_plain_optimizer_is_not_switched(task, tmp_path, caplog):  # noqa: F811
    train(task, tmp_path, TunerCallback(stub("sgd"), mode="explore"), max_grad_norm=0.0)
    assert {line["guard"] for line in lines(tmp_path)} == {"the optimizer cannot be switched here"}
    train(task, tmp_path, TunerCallback(stub("clip x0.3"), mode="explore"), max_grad_norm=0.0)
    assert {line["guard"] for line in lines(tmp_path)} == {"the clip cannot be turned here"}
    assert caplog.text.count("turns: clip: the policy turns them, and this run cannot") == 2
    train(task, tmp_path, TunerCallback(stub("keep"), mode="explore"))
    assert caplog.text.count("this run cannot") == 2


def test_once_off_the_users_settings_rule_again(task, tmp_path):  # noqa: F811
    """The second divergence switches the tuner off."""
    watch = Watch()

    def spoil(trainer):
        switchable(decay=0.01)(trainer)
        trainer.model.register_forward_hook(
            lambda module, args, output: output | {"loss": output["loss"] * math.nan}
            if module.training and 12 <= trainer.state.global_step < 20 else output
        )  # fmt: skip

    policy = stub("sgd", "weight_decay x3", "clip x0.3", "depth -1", "keep")
    trainer = train(task, tmp_path, TunerCallback(policy, mode="explore"), before=spoil,
                    extra=[watch], weight_decay=0.01)  # fmt: skip
    assert "off" in lines(tmp_path)[-1]["guard"]
    assert watch.seen[11] == ("sgd", pytest.approx(0.03), pytest.approx(0.3), True)
    assert watch.seen[-1] == ("adamw", 0.01, 1.0, False)
    last = trainer.recorder.rates[-1] * STEPS
    applied = lines(tmp_path)[-1]["applied"]
    assert applied["optimizer"] == "adamw"
    assert last == pytest.approx(applied["multiplier"] * 2e-3) == pytest.approx(applied["rate"])
    assert replay(tmp_path / LOG, policy) == []


def test_a_policy_that_fails_leaves_the_users_settings(task, tmp_path):  # noqa: F811
    watch, policy = Watch(), stub("sgd", "weight_decay x3", "depth -1", "keep")
    choose = policy._choose

    def fail(seen):
        if seen[0] > 0.35:
            raise RuntimeError("no more")
        return choose(seen)

    policy._choose = fail
    trainer = train(task, tmp_path, TunerCallback(policy, mode="explore"), extra=[watch],
                    before=switchable())  # fmt: skip
    assert watch.seen[11][0] == "sgd"
    assert watch.seen[-1] == ("adamw", 0.0, 1.0, False)
    assert trainer.recorder.rates[-1] == pytest.approx(2e-3 / STEPS)
    last = lines(tmp_path)[-1]
    assert last["guard"].startswith("off: failed")
    assert (last["applied"]["rate"], last["applied"]["optimizer"]) == (2e-3, "adamw")


class Always:
    """Wants the same always, in the second half of a run with a broken policy."""

    sha256 = "a" * 64

    def __init__(self, name, broken=False):
        self.manifest = SimpleNamespace(actions=ACTIONS, decisions=10)
        self._action, self._broken = AT[name], broken

    def act(self, observation):
        if self._broken and observation[0] > 0.45:
            raise RuntimeError("no more")
        return self._action

    def outside(self, observation):
        return ["gap"] if observation[0] > 0.45 else []


@pytest.mark.parametrize("broken", [False, True])
def test_a_helm_that_gives_up_gives_the_users_optimizer_back(tmp_path, broken):
    """Without a callback, also after a resumption; the log says what is carried out."""
    log, policy = tmp_path / "log", Always("sgd", broken)
    context = Context(100, 10, 150_000, 1000, 6, "full", "adamw", 1e-3)
    helm = Helm(policy, replace(FAR, switch=True), 1e-3, log=log)
    helm.start()
    knobs, history, kinds = Knobs(1e-3), [Progress(0, 1e-3, 1.0)], []
    for number in range(10):
        if number == 3:
            state = json.loads(json.dumps(helm.state()))
            helm = Helm(policy, replace(FAR, switch=True), 1e-3, log=log)
            helm.load_state(state)
        knobs = helm.decide(history, context, knobs).turn(knobs, context)
        kinds.append(knobs.optimizer)
        history.append(Progress(10 * number + 10, knobs.rate, 1.0, (1.0, 0.9)))
    at = 5 if broken else 7
    assert kinds == ["sgd"] * at + ["adamw"] * (10 - at)
    assert knobs.rate == pytest.approx(1e-3)
    found = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(found) == at + 1
    applied = [line["applied"] for line in found]
    assert applied[0]["rate"] == pytest.approx(12e-3)
    assert [each["multiplier"] for each in applied] == pytest.approx([1.0] * len(applied))
    assert (applied[-1]["rate"], applied[-1]["optimizer"]) == (pytest.approx(1e-3), "adamw")
    assert replay(log, policy) == []


HOSTILE = Actions(
    turns=(("weight_decay", 1e3), ("weight_decay", 1e-3), ("clip", 1e3), ("clip", 1e-3),
           ("depth", -2.0)),
)  # fmt: skip


@pytest.mark.parametrize("mode", ["careful", "explore"])
@pytest.mark.parametrize(
    "names",
    [["weight_decay x1000"], ["weight_decay x0.001"], ["clip x1000"], ["clip x0.001"],
     ["depth -2"], ["weight_decay x1000", "clip x0.001"]],
)  # fmt: skip
def test_hostile_turns_stay_within_the_limits(task, tmp_path, mode, names):  # noqa: F811
    at = {HOSTILE.label(action): action for action in range(HOSTILE.size)}
    policy, watch = Stub(by_turns(*[at[name] for name in names])), Watch()
    policy.manifest.actions = HOSTILE
    callback = TunerCallback(policy, mode=mode, eval_dataset=own(task))
    trainer = train(task, tmp_path, callback, extra=[watch], weight_decay=0.01, warmup_steps=6)
    low, high, up, down = (0.1, 3, 1.5, 2) if mode == "careful" else (10**-1.5, 10**1.5, 1e3, 1e3)
    for values in ([seen[1] / 0.01 for seen in watch.seen], [seen[2] for seen in watch.seen]):
        values = np.array([1.0, *values])
        assert values.min() >= low * (1 - 1e-12)
        assert values.max() <= high * (1 + 1e-12)
        assert (values[1:] / values[:-1]).max() <= up * (1 + 1e-12)
        assert (values[1:] / values[:-1]).min() >= 1 / down * (1 - 1e-12)
        assert mode == "explore" or set(values[:7]) == {1.0}  # the warm-up
    assert trainer.state.global_step == STEPS
    assert watch.seen[-1][1:] != (0.01, 1.0, False)
    assert replay(tmp_path / LOG, policy) == []


def test_one_layer_at_least_stays_in_training(task, tmp_path):  # noqa: F811
    """Where nothing else is trained, as with LoRA, the run would break without it."""

    def alone(trainer):
        trainer.model.requires_grad_(False)
        trainer.model.encoder.encoder.layer.requires_grad_(True)

    policy = stub("depth -1")
    trainer = train(task, tmp_path, TunerCallback(policy, mode="explore"), before=alone)
    assert trainer.state.global_step == STEPS
    assert {line["guard"] for line in lines(tmp_path)} == {"depth held at 1"}

    class Args:
        fsdp, max_grad_norm, world_size = "", 1.0, 1

    handles = Handles(Args, trainer.model, trainer.optimizer.optimizer, 1e-3, ACTIONS)
    assert [handles.fit(Knobs(depth=depth)).depth for depth in (0, 1, 2)] == [1, 1, 1]


def test_a_resumption_that_fails_leaves_the_users_settings(task, tmp_path, monkeypatch, caplog):  # noqa: F811
    """The checkpoint brings the tuner's, in the schedule, in the optimizer, and in its kind."""
    args = {"save_strategy": "steps", "save_steps": 13, "weight_decay": 0.02}
    begin = switchable(decay=0.02)
    train(task, tmp_path, TunerCallback(stub(*NAMES), mode="explore"), before=begin, **args)

    def fail(*_):
        raise MemoryError("no room for the best weights")

    def elsewhere(numbers, device, failed=False):
        return [*numbers], True

    places = {
        "read_weights": tuner.checkpoint, "Eyes": tuner.sight, "Context": tuner.callback,
        "share": tuner.processes,
    }  # fmt: skip
    for place, module in places.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, place, elsewhere if place == "share" else fail)
            watch = Watch()
            trainer = train(
                task, tmp_path, TunerCallback(stub(*NAMES), mode="explore"), before=begin,
                extra=[watch], resume=str(tmp_path / "checkpoint-13"), **args,
            )  # fmt: skip
        assert "no room for the best weights" in caplog.text
        assert set(watch.seen) == {("adamw", 0.02, 1.0, False)}
        plain = [2e-3 * (STEPS - step) / STEPS for step in range(13, STEPS)]
        assert trainer.recorder.rates == pytest.approx(plain, rel=1e-12)
        assert trainer.lr_scheduler.base_lrs == [2e-3] * len(trainer.lr_scheduler.base_lrs)


class Stop(TrainerCallback):
    """Ctrl-C, once."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.at = None
            raise KeyboardInterrupt


def cut_short(task, folder, callback, at, **more):  # noqa: F811
    """A Trainer whose run was interrupted after update ``at``; it can go on."""
    trainers = []

    def keep(trainer):
        more.get("before", lambda trainer: None)(trainer)
        trainers.append(trainer)

    extra = [*more.pop("extra", ()), Stop(at)]
    with pytest.raises(KeyboardInterrupt):
        train(task, folder, callback, **(more | {"before": keep}), extra=extra)
    return trainers[0]


ALTERED = ("sgd", "weight_decay x3", "clip x0.3", "depth -1", "x3", "keep", "keep", "keep",
           "keep", "keep")  # fmt: skip


def test_after_an_interruption_the_next_run_has_the_users_settings(task, tmp_path):  # noqa: F811
    watch, recorder = Watch(), Recorder()
    callback = TunerCallback(stub(*ALTERED), mode="explore")
    trainer = cut_short(task, tmp_path, callback, 17, extra=[watch], weight_decay=0.02,
                        before=switchable(decay=0.02), recorder=recorder)  # fmt: skip
    first = callback._handles.given
    assert watch.seen[-1] == ("sgd", pytest.approx(0.06), pytest.approx(0.3), True)
    trainer.train()
    assert callback._handles.given == first == Knobs(2e-3, weight_decay=0.02, depth=2)
    assert watch.seen[17:] == [("sgd", 0.02, 1.0, False)] * 3 + watch.seen[3:17] + (
        [watch.seen[16]] * 13
    )
    assert recorder.rates[17:34] == recorder.rates[:17]
    assert trainer.args.max_grad_norm == 1.0
    assert trainer.optimizer.optimizer.kind == "adamw"
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.02}
    assert all(p.requires_grad for p in trainer.model.parameters())


@pytest.mark.parametrize("where", ["same", "another callback", "another process", "older"])
def test_an_interrupted_run_is_resumed_to_the_bit(task, tmp_path, where):  # noqa: F811
    """The Trainer's arguments and model are as the interrupted run left them, or new."""
    args = {"save_strategy": "steps", "save_steps": 7, "weight_decay": 0.02, "dropout": 0.1,
            "before": switchable(decay=0.02)}  # fmt: skip

    def tuner():
        return TunerCallback(stub(*ALTERED), mode="explore", eval_dataset=own(task))

    whole = train(task, tmp_path, tuner(), **args)
    log, found, rates = (tmp_path / LOG).read_bytes(), weights(whole), whole.recorder.rates
    path, callback = tmp_path / "checkpoint-7", tuner()
    trainer = cut_short(task, tmp_path, callback, 17, **args)
    assert trainer.args.max_grad_norm == pytest.approx(0.3)
    if where == "older":
        text = json.loads((path / "trainer_state.json").read_text())
        user = text["stateful_callbacks"]["TunerCallback"]["attributes"]["saved"]["user"]
        for name in ("clip", "beta", "depth"):
            del user[name]
        (path / "trainer_state.json").write_text(json.dumps(text))
    if where in ("same", "another callback"):
        if where == "another callback":
            trainer.remove_callback(callback)
            callback = tuner()
            trainer.add_callback(callback)
        trainer.recorder = Recorder()
        trainer.add_callback(trainer.recorder)
        trainer.train(resume_from_checkpoint=str(path))
    else:
        trainer = train(task, tmp_path, callback := tuner(), resume=str(path), **args)
    assert callback._handles.given == Knobs(2e-3, weight_decay=0.02, depth=2)
    assert trainer.recorder.rates == rates[7:]
    assert (tmp_path / LOG).read_bytes() == log
    assert equal(found, weights(trainer))
    assert trainer.args.max_grad_norm == 1.0
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_sharded_weights_are_refused(task):  # noqa: F811
    class Args:
        fsdp, max_grad_norm, world_size = ["full_shard"], 1.0, 1

    optimizer = SwitchableOptimizer(model().parameters())
    with pytest.raises(BadInput, match=r"^trainer: fsdp: .*; use a plain one"):
        Handles(Args, model(), optimizer, 1e-3, ACTIONS)


def test_settings_travel_as_numbers_and_layers_stay_in_several_processes():
    class Args:
        fsdp, max_grad_norm, world_size = "", 1.0, 1

    net = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)] * 1))
    handles = Handles(Args, net, SwitchableOptimizer(net.parameters()), 1e-3, ACTIONS)
    assert handles.dials == ("weight_decay", "clip", "depth")
    for knobs in (handles.given, Knobs(2e-3, optimizer="sgd", weight_decay=0.3, clip=7.0, depth=1)):
        assert handles.knobs(knobs.rate, *handles.numbers(knobs)) == knobs
    rich = Handles(
        Args, net, SwitchableOptimizer(net.parameters()), 1e-3, ACTIONS,
        trainer=SimpleNamespace(beta=0.1, args=Args, model=SimpleNamespace(objective="dpo")),
    )  # fmt: skip
    assert rich.dials == ("weight_decay", "clip", "beta", "depth")
    turned = replace(rich.given, beta=0.3)
    assert rich.knobs(turned.rate, *rich.numbers(turned)) == turned
    rich.put(turned, rich.given)
    assert rich._trainer.beta == 0.3
    rich.leave(turned)
    assert rich._trainer.beta == 0.1
    Args.world_size = 2
    several = Handles(Args, net, SwitchableOptimizer(net.parameters()), 1e-3, ACTIONS)
    assert several.dials == ("weight_decay", "clip")
    assert several.knobs(1e-3, *several.numbers(several.given)).depth is None
