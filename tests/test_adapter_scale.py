"""LoRA's scaling as a knob of the callback: what it scales, its bounds, and how it is left."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_callback import (
    EVERY,
    KEEP,
    ROLLBACK,
    STEPS,
    Stub,
    by_turns,
    equal,
    lines,
    own,
    task,  # noqa: F401  (a fixture)
    train,
    weights,
)
from test_switchable import OneSeed, cut_short
from torch import nn
from transformers import TrainerCallback

import tuner.checkpoint
from envs.handles import Handles
from envs.job import TorchJob
from envs.knobs import Actions, Knobs
from envs.parts import Parts
from tuner.audit import replay
from tuner.callback import LOG, TunerCallback

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

STEPPED = (("adapter_scale", 2.0), ("adapter_scale", 0.5), ("adapter_scale", 1e3),
           ("adapter_scale", 1e-3))  # fmt: skip
ACTIONS = Actions(turns=STEPPED)
AT = {ACTIONS.label(action): action for action in range(ACTIONS.size)}
UP, DOWN = "adapter_scale x2", "adapter_scale x0.5"


@pytest.fixture
def lora(task):  # noqa: F811
    return replace(task, adapter="lora")


def stub(*names):
    places = {**AT, "keep": KEEP, "rollback": ROLLBACK}
    policy = Stub(by_turns(*[places[name] for name in names]))
    policy.manifest.actions = ACTIONS
    return policy


def scalings(model):
    return [value for part in model.modules() if hasattr(part, "lora_A")
            for value in part.scaling.values()]  # fmt: skip


class Watch(TrainerCallback):
    """LoRA's scaling at each update, and what the model says after the last one."""

    def __init__(self, rows):
        self.seen, self.history, self._rows = [], [], rows

    @property
    def said(self):
        return self.history[-1]

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        (value,) = set(scalings(model))
        self.seen.append(value / 2)  # of 16 over 8

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.history.append(said(model, self._rows))


def said(model, rows):
    was = model.training
    model.eval()
    with torch.no_grad():
        found = model(**{k: v for k, v in rows.items() if k != "labels"})["logits"]
    model.train(was)
    return found


@pytest.fixture
def watch(lora):
    from test_callback import collate

    data = own(lora)
    return lambda: Watch(collate([data[i] for i in range(8)]))


# -- a model -----------------------------------------------------------------------------------


def adapted(**options):
    """A layer of nothing but an adapter, so that what it says is what the adapter adds."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False))
    nn.init.zeros_(net[0].weight)
    net[1].weight.data = torch.eye(4)[:3]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False, **options)
    return get_peft_model(net, config)


@pytest.mark.parametrize("rank_stable", [False, True])
def test_what_an_adapter_adds_is_scaled_exactly(rank_stable):
    net, rows = adapted(use_rslora=rank_stable), torch.randn(6, 5)
    parts, plain, found = Parts(net), net(rows), scalings(net)
    for scale in (2.0, 0.25, 1.0, 0.0, 8.0):
        parts.put(Knobs(adapter_scale=scale))
        assert torch.equal(net(rows), scale * plain)
        assert scalings(net) == [scale * found[0]]
    parts.settle(8.0)
    assert torch.equal(net(rows), 8 * plain)
    assert scalings(net) == found


def test_a_saved_adapter_is_the_scaled_one(tmp_path):
    from peft import PeftModel

    net, rows = adapted(), torch.randn(6, 5)
    base, parts = adapted().unload(), Parts(net)
    parts.put(Knobs(adapter_scale=2.5))
    net.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 10
    assert torch.equal(PeftModel.from_pretrained(base, str(tmp_path))(rows), net(rows))
    parts.settle(2.5)
    assert net.peft_config["default"].lora_alpha == 4


def test_an_adapter_that_is_not_trained_keeps_its_scaling():
    from peft import LoraConfig

    net = adapted()
    net.add_adapter("reference", LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    parts = Parts(net)  # the first is active and trained, as in DPO with a reference adapter
    parts.put(Knobs(adapter_scale=2.0))
    assert net.base_model.model[0].scaling == {"default": 4.0, "reference": 3.0}


def test_it_travels_as_a_number_and_is_known_from_a_checkpoint():
    args = SimpleNamespace(fsdp="", max_grad_norm=1.0, world_size=2)
    net = adapted()
    optimizer = torch.optim.AdamW(p for p in net.parameters() if p.requires_grad)
    handles = Handles(args, net, optimizer, 1e-3, ACTIONS)
    assert "adapter_scale" in handles.dials
    turned = replace(handles.given, adapter_scale=0.5)
    assert handles.knobs(turned.rate, *handles.numbers(turned)) == turned
    handles.put(turned, handles.given)
    assert scalings(net) == [1.0]
    again = Handles(args, net, optimizer, 1e-3, ACTIONS, scales=handles.scales)
    again.put(turned, again.given)
    assert scalings(net) == [1.0]
    for lacking in ({"fsdp": "full_shard"}, {"load_best_model_at_end": True}):
        few = Handles(SimpleNamespace(**vars(args) | lacking), net, optimizer, 1e-3, ACTIONS)
        assert "adapter_scale" not in few.dials
        assert few.given.adapter_scale is None
    assert Handles(args, net, optimizer, 1e-3, Actions()).given.adapter_scale is None


# -- a Trainer -----------------------------------------------------------------------------------

NAMES = (UP, "keep", UP, DOWN, "rollback", UP, "keep", DOWN, DOWN, UP)


def test_a_trainer_obeys_as_the_environments_job_does(lora, tmp_path, watch):
    """Observations and weights; after a rollback the weights have the scale they had."""
    policy, look = stub(*NAMES), watch()
    tuner = TunerCallback(policy, mode="explore", eval_dataset=own(lora), eval_rows=64, classes=3)
    trainer = train(lora, tmp_path, tuner, extra=[look])
    env = OneSeed(lora, actions=ACTIONS, make_job=TorchJob)
    seen, scales = [env.reset(seed=0, options={"rate": 2e-3})[0]], []
    for name in NAMES:
        seen.append(env.step({**AT, "keep": KEEP, "rollback": ROLLBACK}[name])[0])
        scales += [env._job.knobs.adapter_scale] * EVERY
    np.testing.assert_allclose(policy.seen, seen[:10], rtol=1e-4, atol=1e-4)
    assert look.seen == scales
    assert set(scales) == {1.0, 2.0, 4.0}
    assert [line["guard"] for line in lines(tmp_path)] == [""] * 10
    assert set(scalings(trainer.model)) == {2.0}
    # At the end the user's scaling is back, and the model is still the one that was trained.
    assert scales[-1] != 1
    assert torch.equal(said(trainer.model, look._rows), look.said)
    mine, job = dict(trainer.model.named_parameters()), dict(env._job._module.named_parameters())
    for name, weight in mine.items():
        factor = scales[-1] if "lora_B" in name else 1.0
        torch.testing.assert_close(weight, factor * job[name], rtol=1e-4, atol=1e-5)
    assert replay(tmp_path / LOG, policy) == []


@pytest.mark.parametrize("save", [8, 14, 22])
def test_a_resumed_run_is_the_whole_one_to_the_bit(lora, tmp_path, watch, save):
    args = {"save_strategy": "steps", "save_steps": save}

    def tuner():
        return TunerCallback(stub(*NAMES), mode="explore", eval_dataset=own(lora))

    first, again = watch(), watch()
    whole = train(lora, tmp_path, tuner(), dropout=0.1, extra=[first], **args)
    log = (tmp_path / LOG).read_bytes()
    resumed = train(lora, tmp_path, tuner(), dropout=0.1, extra=[again],
                    resume=str(tmp_path / f"checkpoint-{save}"), **args)  # fmt: skip
    assert again.seen == first.seen[save:]
    assert first.seen[save - 1] != 1
    assert (tmp_path / LOG).read_bytes() == log
    assert equal(weights(whole), weights(resumed))
    assert scalings(whole.model) == scalings(resumed.model)
    assert torch.equal(first.said, again.said)


@pytest.mark.parametrize("resumed", [False, True])
def test_an_interrupted_run_is_followed_by_one_with_the_users_scaling(
    lora, tmp_path, watch, resumed
):
    """A new run begins with the model that was trained, a resumed one with the checkpoint's."""
    args = {"save_strategy": "steps", "save_steps": 8}
    callback, look = TunerCallback(stub(*NAMES), mode="explore", eval_dataset=own(lora)), watch()
    first = watch()
    whole = train(lora, tmp_path, TunerCallback(stub(*NAMES), mode="explore",
                  eval_dataset=own(lora)), extra=[first], **args)  # fmt: skip
    trainer = cut_short(lora, tmp_path, callback, 14, extra=[look], **args)
    assert set(scalings(trainer.model)) == {2 * look.seen[-1]} != {2.0}
    found = []

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            found.append(said(model, look._rows))

    trainer.add_callback(Begin())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8") if resumed else None)
    assert callback._handles.scales == [2.0] * len(callback._handles.scales)
    assert torch.equal(found[0], (first.history[7] if resumed else look.history[13]))
    assert look.seen[14:] == first.seen[8:] if resumed else look.seen[14:17] == [2.0] * 3
    assert not resumed or equal(weights(whole), weights(trainer))
    assert set(scalings(trainer.model)) == {2.0}
    assert trainer.model.encoder.peft_config["default"].lora_alpha == 16


@pytest.mark.parametrize("how", ["fails", "diverges"])
def test_switched_off_it_gives_the_scaling_back_and_leaves_the_model(lora, tmp_path, watch, how):
    policy, look, models = stub(UP, "keep", "keep", UP, "keep"), watch(), {}
    choose = policy._choose

    def fail(seen):
        if how == "fails" and seen[0] > 0.45:
            raise RuntimeError("no more")
        return choose(seen)

    policy._choose = fail

    class Before(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            models[state.global_step] = said(model, look._rows)

    def spoil(trainer):
        trainer.model.register_forward_hook(
            lambda module, args, output: output | {"loss": output["loss"] * math.nan}
            if how == "diverges" and module.training and 12 <= trainer.state.global_step < 20
            else output
        )  # fmt: skip

    callback = TunerCallback(policy, mode="explore", eval_dataset=own(lora))
    trainer = train(lora, tmp_path, callback, before=spoil, extra=[Before(), look])
    assert "off" in lines(tmp_path)[-1]["guard"]
    assert look.seen[11] == 4.0
    assert (look.seen[-1], set(scalings(trainer.model))) == (1.0, {2.0})
    off = look.seen.index(1.0)
    assert set(look.seen[off:]) == {1.0}
    if how == "fails":  # the model is as it was after the last update
        assert torch.equal(models[off], look.history[off - 1])
    else:  # the best weights, at the scale they had
        best = [at for at in range(EVERY, 13) if torch.equal(models[off], look.history[at - 1])]
        assert best == [12]
    assert replay(tmp_path / LOG, policy) == []


def test_a_resumption_that_fails_leaves_the_model_and_the_users_scaling(
    lora, tmp_path, watch, monkeypatch
):
    first, args = watch(), {"save_strategy": "steps", "save_steps": 8}
    train(lora, tmp_path, TunerCallback(stub(*NAMES), mode="explore"), extra=[first], **args)

    class First(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            found.append((said(model, first._rows), set(scalings(model))))

    def fail(*_):
        raise MemoryError("no room for the best weights")

    found = []
    monkeypatch.setattr(tuner.checkpoint, "read_weights", fail)
    train(lora, tmp_path, TunerCallback(stub(*NAMES), mode="explore"), extra=[First()],
          resume=str(tmp_path / "checkpoint-8"), **args)  # fmt: skip
    assert first.seen[7] != 1
    assert torch.equal(found[0][0], first.history[7])
    assert [scaling for _, scaling in found] == [{2.0}] * (STEPS - 8)


@pytest.mark.parametrize(("mode", "low", "high"), [("careful", 0.1, 3.0), ("explore", 10**-1.5, 8)])
def test_a_hostile_policy_is_held_within_the_limits(lora, tmp_path, watch, mode, low, high):
    found = []
    for name in ("adapter_scale x1000", "adapter_scale x0.001"):
        look = watch()
        callback = TunerCallback(stub(name), mode=mode, eval_dataset=own(lora))
        train(lora, tmp_path, callback, extra=[look], lr_scheduler_type="constant")
        found += look.seen
    assert (min(found), max(found)) == (pytest.approx(low), pytest.approx(high))


def test_without_lora_it_is_refused_in_one_sentence(task, lora, tmp_path):  # noqa: F811
    refused = {"the adapter scale cannot be turned here"}
    train(task, tmp_path, TunerCallback(stub(UP), mode="explore"))
    assert {line["guard"] for line in lines(tmp_path)} == refused
    again = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps",
             "save_steps": STEPS, "eval_steps": STEPS}  # fmt: skip
    trainer = train(lora, tmp_path, TunerCallback(stub(UP), mode="explore"), **again)
    assert {line["guard"] for line in lines(tmp_path)} == refused
    assert set(scalings(trainer.model)) == {2.0}
