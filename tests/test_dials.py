"""The knobs beyond the rate: how they move, and that jobs, packs, files and the guard obey."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from envs.dials import DIALS, label, parse
from envs.env import EXPLORE, FineTuneEnv
from envs.errors import BadInput, UnknownName
from envs.hands import decode_many
from envs.hardware import Plan
from envs.job import TorchJob
from envs.knobs import KEEP, Actions, Decision, Knobs, decode, opened, plain, turn
from envs.lockstep import Lockstep, PackedJob
from envs.progress import Context, Progress
from tuner import policy as policies
from tuner.audit import replay
from tuner.curriculum import TrainConfig
from tuner.guard import CAREFUL, FAR, GuardState, rule
from tuner.logbook import Logbook
from tuner.policy import DEFAULT
from tuner.steer import Helm

TURNS = (("weight_decay", 3.0), ("clip", 0.3), ("depth", -1.0))
ACTIONS = Actions(turns=TURNS)
PEFT = "ignore:.is_gradient_checkpointing:FutureWarning"  # peft's own
WIDE = {"low": 1e-9, "high": 10.0}
FIRST = len(ACTIONS.multipliers) + ACTIONS.rollback  # the first action that turns a further knob


def weights(job):
    return {name: p.detach().clone() for name, p in job._module.named_parameters()}


# -- how they move ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "amount", "expected"),
    [
        ("weight_decay", 0.1, 3.0, 0.3),
        ("weight_decay", 0.5, 3.0, 1.0),  # the top
        ("weight_decay", 0.0, 3.0, 1e-3),  # from nothing to the floor
        ("weight_decay", 0.0, 0.3, 0.0),
        ("weight_decay", 2e-3, 0.3, 0.0),  # below the floor is nothing
        ("weight_decay", 1e-5, 3.0, 1e-3),
        ("clip", 1.0, 0.3, 0.3),
        ("clip", 0.02, 0.3, 0.01),
        ("clip", 0.0, 3.0, 0.0),  # off stays off
        ("clip", 1e5, 3.0, 1e5),  # what began outside is not pulled in, nor goes further
        ("clip", 1e5, 0.3, 3e4),
        ("adapter_scale", 1.0, 2.0, 2.0),
        ("adapter_scale", 0.2, 0.5, 0.0),
        ("adapter_scale", 0.0, 2.0, 0.125),
        ("adapter_scale", 6.0, 2.0, 8.0),
        ("beta", 0.1, 10.0, 1.0),
        ("beta", 5.0, 10.0, 10.0),
        ("depth", 3, -1.0, 2),
        ("depth", 0, -1.0, 0),
        ("depth", 0, 2.0, 2),
    ],
)
def test_a_step_of_a_knob(name, value, amount, expected):
    turned = turn(Knobs().having(**{name: value}), Decision(turns=((name, amount),)), **WIDE)
    assert getattr(turned, name) == pytest.approx(expected)
    assert turned.having(**{name: value}) == Knobs().having(**{name: value})  # nothing else moved
    assert type(getattr(turned, name)) is (int if name == "depth" else float)


@given(st.sampled_from(sorted(DIALS)), st.lists(st.floats(1e-3, 1e3), max_size=20))
def test_a_knob_stays_in_its_range(name, steps):
    dial = DIALS[name]
    value = {"weight_decay": 0.0, "depth": 2}.get(name, 1.0)
    for step in steps:
        value = dial.turned(value, round(math.log10(step)) if dial.way == "plus" else step)
        assert dial.low <= value <= dial.high
        assert value == 0 or value >= dial.floor


def test_a_knob_that_a_run_has_not_is_left_alone():
    wish = Decision(turns=(("beta", 3.0), ("depth", -1.0), ("adapter_scale", 2.0)))
    assert turn(Knobs(), wish, **WIDE) == Knobs()


@pytest.mark.parametrize(
    "bad",
    [(("weight_decay", 1.0),), (("clip", 0.0),), (("clip", math.nan),), (("depth", 0.5),),
     (("depth", 0),), (("clip", "3"),), (("clip", True),), ("clip",), (["clip", 3.0],)],
)  # fmt: skip
def test_turns_that_make_no_sense_are_refused(bad):
    with pytest.raises(BadInput, match=r"^actions: turns: .*; give"):
        Actions(turns=bad)
    with pytest.raises(UnknownName, match="Did you mean 'weight_decay'"):
        Actions(turns=(("weightdecay", 3.0),))
    with pytest.raises(BadInput, match="only the discrete view"):
        Actions("continuous", turns=TURNS)


@pytest.mark.parametrize(
    "bad", [{"adapter_scale": 9.0}, {"beta": -1.0}, {"depth": 1.5}, {"depth": True}]
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(BadInput, match=r"^knobs: .*; give"):
        Knobs(**bad)


# -- actions ---------------------------------------------------------------------------------


def test_a_turn_is_an_action_of_its_own_after_all_others():
    actions = replace(ACTIONS, optimizers=("sgd",))
    found = [decode(action, actions) for action in range(actions.size)]
    assert found[FIRST:] == [Decision(optimizer="sgd"), *(Decision(turns=(t,)) for t in TURNS)]
    labels = [actions.label(action) for action in range(actions.size)]
    assert labels[FIRST:] == ["sgd", "weight_decay x3", "clip x0.3", "depth -1"]
    assert found[: FIRST + 1] == [
        decode(action, replace(actions, turns=())) for action in range(FIRST + 1)
    ]
    decided = decode_many(np.array([FIRST + 1, FIRST + 3]), actions, 2)
    assert decided.change.tolist() == [1.0, 1.0]


def test_a_configuration_names_turns_as_labels_do():
    for each in TURNS:
        assert parse(label(each)) == each
    config = TrainConfig(tasks=("trec6",), turns=("weight_decay x3", "clip x0.3", "depth -1"))
    assert config.actions().turns == TURNS
    for bad in ("weight_decay", "depth less", "clip x", "clip xnan"):
        with pytest.raises(BadInput, match=r"turns: .*; (write|give)"):
            parse(bad)


def test_a_run_is_opened_with_what_is_to_be_turned():
    assert opened(Knobs(), Actions()) == Knobs()
    assert opened(Knobs(), ACTIONS) == Knobs(depth=100)
    scale = Actions(turns=(("adapter_scale", 2.0), ("beta", 2.0)))
    assert opened(Knobs(), scale) == Knobs(adapter_scale=1.0)
    assert opened(Knobs(adapter_scale=2.0), scale) == Knobs(adapter_scale=2.0)


# -- jobs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_depth_from_the_start_is_a_task_of_so_many_layers(tiny_task, depth):
    """To the bit: frozen by the knob or by the task."""
    knobs = Knobs(3e-3, weight_decay=0.1, clip=0.5)
    job = TorchJob(tiny_task(), 3, replace(knobs, depth=depth))
    other = TorchJob(tiny_task(trainable_layers=depth), 3, knobs)
    assert job.knobs.depth == depth
    assert job.advance(8).losses == other.advance(8).losses
    mine, others = weights(job), weights(other)
    assert all(torch.equal(mine[name], others[name]) for name in others)


def test_all_layers_are_a_plain_run(tiny_task):
    job, other = TorchJob(tiny_task(), 3, Knobs(depth=100)), TorchJob(tiny_task(), 3, Knobs())
    assert (job.knobs.depth, other.knobs.depth) == (3, None)  # two layers and the embeddings
    assert job.advance(8).losses == other.advance(8).losses


def test_layers_frozen_on_the_way_rest_and_come_back_with_their_moments(tiny_task):
    job = TorchJob(tiny_task(), 3, Knobs(3e-3, weight_decay=0.1, depth=3))
    job.advance(4)
    before = weights(job)
    name = "encoder.encoder.layer.0.output.dense.weight"
    parameter = dict(job._module.named_parameters())[name]
    moments = job._optimizer.state[parameter]["exp_avg"].clone()
    job.apply(replace(job.knobs, depth=1))
    job.advance(4)
    after = weights(job)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved == {n for n in after if "layer.1." in n or n.startswith("head")}
    assert torch.equal(job._optimizer.state[parameter]["exp_avg"], moments)
    job.apply(replace(job.knobs, depth=100))
    assert job.knobs.depth == 3
    job.advance(1)
    again = weights(job)
    assert all(not torch.equal(again[n], after[n]) for n in again)
    job.apply(Knobs(1e-3))  # says nothing of the depth
    assert job.knobs.depth == 3


@pytest.mark.filterwarnings(PEFT)
def test_an_adapter_scaled_to_nothing_is_the_base_model(tiny_task):
    job = TorchJob(tiny_task(adapter="lora"), 3, Knobs(3e-2, adapter_scale=1.0))
    plain_run = TorchJob(tiny_task(adapter="lora"), 3, Knobs(3e-2))
    assert job.advance(8).losses == plain_run.advance(8).losses
    tuned = job.evaluate("validation").loss
    job.apply(replace(job.knobs, adapter_scale=0.0))
    without = job.evaluate("validation").loss
    with job._module.encoder.disable_adapter():
        assert job.evaluate("validation").loss == without
    assert without != tuned
    job.apply(replace(job.knobs, adapter_scale=2.0))
    doubled = job.evaluate("validation").loss
    job.apply(replace(job.knobs, adapter_scale=1.0))
    assert job.evaluate("validation").loss == tuned
    with torch.no_grad():
        for name, parameter in job._module.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    assert job.evaluate("validation").loss == pytest.approx(doubled, rel=1e-6)


@pytest.mark.filterwarnings(PEFT)
def test_weights_are_put_back_with_the_scale_they_were_trained_under(tiny_task):
    job = TorchJob(tiny_task(adapter="lora"), 3, Knobs(3e-2, adapter_scale=1.0))
    job.advance(4)
    kept, loss = job.snapshot(), job.evaluate("validation").loss
    job.apply(replace(job.knobs, adapter_scale=4.0, clip=0.5))
    job.advance(4)
    job.restore(kept)
    assert job.knobs == Knobs(3e-2, adapter_scale=1.0, depth=None, clip=0.5)
    assert job.evaluate("validation").loss == loss


@pytest.mark.filterwarnings(PEFT)
def test_a_run_says_which_knobs_it_has(tiny_task):
    every = Knobs(adapter_scale=1.0, beta=0.1, depth=100)
    assert TorchJob(tiny_task(), 3, every).knobs == Knobs(depth=3)
    assert TorchJob(tiny_task(adapter="lora"), 3, every).knobs == Knobs(adapter_scale=1.0, depth=2)
    assert TorchJob(tiny_task(trainable_layers=1), 3, every).knobs == Knobs(depth=1)


# -- packs and environments ------------------------------------------------------------------


def test_a_pack_decays_and_clips_and_leaves_the_others_to_plain_runs(tiny_task, caplog):
    """The same episode packed and plain; a depth that may be turned makes it plain, with a word."""
    lockstep = Lockstep(Plan("cpu", 2))
    for turns, kind in ((TURNS[:2], PackedJob), (TURNS, TorchJob)):
        actions = Actions(turns=turns)
        envs = [
            FineTuneEnv(tiny_task(), actions=actions, make_job=make)
            for make in (TorchJob, lockstep.open)
        ]
        seen = [env.reset(seed=1)[0] for env in envs]
        for number in range(len(turns)):
            steps = [env.step(FIRST + number) for env in envs]
            seen = [step[0] for step in steps]
            np.testing.assert_allclose(*seen, rtol=1e-3, atol=1e-3)
            assert steps[0][4]["weight_decay"] == steps[1][4]["weight_decay"] == 1e-3
        assert isinstance(envs[1]._job, kind)
        assert envs[0]._job.knobs == envs[1]._job.knobs
        assert steps[0][4]["clip"] == pytest.approx(0.3)
    assert steps[0][4]["depth"] == 2
    assert "depth: cannot be turned in a pack; its runs are computed one by one" in caplog.text
    assert isinstance(lockstep.open(tiny_task(), 0, Knobs(adapter_scale=1.0)), PackedJob)
    assert isinstance(lockstep.open(tiny_task(), 0, Knobs(depth=None)), PackedJob)


def test_what_a_job_has_not_changes_nothing(tiny_task):
    env = FineTuneEnv(tiny_task(), actions=Actions(turns=(("beta", 3.0),)))
    plain_env = FineTuneEnv(tiny_task())
    env.reset(seed=1), plain_env.reset(seed=1)
    step, other = env.step(FIRST), plain_env.step(plain_env.actions.keep)
    assert math.isnan(step[4].pop("beta"))
    assert step[4] == other[4]
    np.testing.assert_array_equal(step[0], other[0])


# -- files -----------------------------------------------------------------------------------


def test_the_shipped_policy_is_what_it_was_and_turns_nothing_else():
    policy = policies.load(DEFAULT)
    assert policy.manifest.actions.turns == ()
    assert "turns" not in plain(policy.manifest.actions)
    assert policies.to_bytes(policy) == DEFAULT.read_bytes()


def test_a_policy_file_keeps_its_turns(tmp_path):
    shipped = policies.load(DEFAULT)
    actions = replace(shipped.manifest.actions, turns=TURNS)
    arrays = {name: array.copy() for name, array in shipped.arrays.items()}
    last = max(name for name in arrays if name.endswith("bias"))[: -len(".bias")]
    for part in ("weight", "bias"):
        extra = np.zeros((len(TURNS), *arrays[f"{last}.{part}"].shape[1:]), np.float32)
        arrays[f"{last}.{part}"] = np.concatenate([arrays[f"{last}.{part}"], extra])
    network = shipped.manifest.network
    layers = (*network.layers[:-1], actions.size)
    fields = {name: getattr(shipped.manifest, name) for name in (
        "algorithm", "decisions", "start_decades", "provenance")}  # fmt: skip
    made = policies.make(
        arrays=arrays, actions=actions, network=network.model_copy(update={"layers": layers}),
        features=shipped.manifest.features, **fields,
    )  # fmt: skip
    policies.save(made, tmp_path / "p.safetensors")
    again = policies.load(tmp_path / "p.safetensors")
    assert again.manifest.actions == actions
    assert decode(again.manifest.actions.size - 1, again.manifest.actions) == Decision(
        turns=(("depth", -1.0),)
    )


def test_a_logbook_keeps_its_turns():
    decision = Decision(turns=(("clip", 0.3),))
    book = Logbook(history=[Progress(4, 1e-3, 1.0, (1.0,), decision=decision)], applied=decision)
    again = Logbook.from_json(json.loads(json.dumps(book.to_json())))
    assert again.applied == decision
    assert again.history[0].decision == decision
    old = {"multiplier": 3.0, "rollback": False, "optimizer": None}  # before there were turns
    assert Logbook.from_json({**book.to_json(), "applied": old}).applied == Decision(3.0)


# -- the guard -------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [CAREFUL, FAR])
def test_the_guard_lets_nobody_turn_what_cannot_be_turned(limits):
    wish = Decision(turns=(("weight_decay", 3.0),))
    given = {"rate": 1e-3, "start": 1e-3}
    _, ruling = rule(GuardState(), wish, limits, **given)
    assert ruling.decision == KEEP
    assert ruling.guard == "the weight decay cannot be turned here"
    _, ruling = rule(GuardState(), wish, replace(limits, turns=("weight_decay",)), **given)
    gentle = limits is CAREFUL
    assert ruling.decision == (Decision(turns=(("weight_decay", 1.5),)) if gentle else wish)
    assert ruling.guard == ("at most weight decay x1.5 in a decision" if gentle else "")


@pytest.mark.parametrize(
    ("name", "amount", "now", "user", "careful", "explore"),
    [
        ("weight_decay", 1000.0, 0.01, 0.01, 0.015, 0.01 * EXPLORE),
        ("weight_decay", 1000.0, 0.025, 0.01, 0.03, 0.01 * EXPLORE),
        ("weight_decay", 1000.0, 1e-5, 1e-5, 3e-5, 1e-5 * EXPLORE),  # not up to the floor
        ("weight_decay", 0.001, 1.5e-3, 1.5e-3, 1.5e-4, 1.5e-3 / EXPLORE),  # nor down to nothing
        ("weight_decay", 1000.0, 0.0, 0.0, 1e-3, 1e-3),
        ("weight_decay", 1000.0, 2.5e-3, 0.0, 3e-3, 1e-3 * EXPLORE),
        ("clip", 0.001, 1.0, 1.0, 0.5, 1.0 / EXPLORE),
        ("clip", 0.001, 0.1, 1.0, 0.1, 1.0 / EXPLORE),
        ("depth", -3.0, 6, 6, 5, 3),
        ("depth", -3.0, 1, 6, 1, 1),
        ("depth", 3.0, 5, 6, 6, 6),
        ("depth", 1.0, 6, 6, 6, 6),
    ],
)
def test_the_guard_bounds_a_turn(name, amount, now, user, careful, explore):
    """In a decision, and by the user's own setting; said so where it is not what was wished."""
    wish, before = Decision(turns=((name, amount),)), Knobs().having(**{name: now})
    context = Context(100, 10, 150_000, 1000, 6, "full", "adamw", 1e-3)
    for limits, expected in ((CAREFUL, careful), (FAR, explore)):
        limits = replace(limits, turns=(name,))
        given = {"rate": 1e-3, "start": 1e-3, "dials": {name: [now, user]}}
        _, ruling = rule(GuardState(), wish, limits, **given)
        after = getattr(ruling.turn(before, context), name)
        assert after == pytest.approx(expected)
        assert bool(ruling.decision.turns) == (after != now)
        wished = DIALS[name].turned(now, amount)
        assert name.replace("_", " ") in ruling.guard or after == pytest.approx(wished)
        _, ruling = rule(GuardState(cooldown=2), wish, limits, **given)
        assert ruling.turn(before, context) == replace(before, rate=1e-3)
        assert "is not turned after a divergence" in ruling.guard
        _, ruling = rule(GuardState(), wish, limits, warming=True, **given)
        assert (ruling.turn(before, context) == before) == (limits.gentle or after == now)


def test_a_choice_for_each_knob_is_bounded_knob_by_knob():
    wish = Decision(10.0, turns=(("weight_decay", 10.0), ("clip", 0.9)))
    limits = replace(CAREFUL, turns=("weight_decay", "clip"))
    given = {"rate": 1e-3, "start": 1e-3, "dials": {"weight_decay": [0.1, 0.1], "clip": [1, 1]}}
    _, ruling = rule(GuardState(), wish, limits, **given)
    assert ruling.decision == Decision(1.5, turns=(("weight_decay", 1.5), ("clip", 0.9)))
    assert ruling.guard == "at most x1.5 in a decision; at most weight decay x1.5 in a decision"
    _, ruling = rule(GuardState(), wish, limits, warming=True, **given)
    assert ruling.decision == KEEP


class Turning:
    """Turns the weight decay each time."""

    sha256 = "a" * 64
    manifest = SimpleNamespace(actions=ACTIONS, decisions=10)

    def act(self, observation):
        return FIRST

    def outside(self, observation):
        return []


def test_switched_off_the_tuner_puts_the_users_setting_back(tmp_path):
    limits = replace(FAR, turns=("weight_decay",))
    helm = Helm(Turning(), limits, 1e-3, log=tmp_path / "log.jsonl")
    helm.start()
    knobs, history = Knobs(1e-3, weight_decay=0.01, clip=0.5), [Progress(0, 1e-3, 1.0)]
    context = Context(100, 10, 150_000, 1000, 6, "full", "adamw", 1e-3)
    for wanted in (0.03, 0.09):
        ruling = helm.decide(history, context, knobs)
        knobs = ruling.turn(knobs, context)
        assert knobs.weight_decay == pytest.approx(wanted)
        assert replace(knobs, weight_decay=0.01) == Knobs(1e-3, weight_decay=0.01, clip=0.5)
        history.append(Progress(history[-1].step + 10, 1e-3, 1.0, (1.0,)))
    resumed = Helm(Turning(), limits, 1e-3)
    resumed.load_state(json.loads(json.dumps(helm.state())))
    history.append(Progress(30, 1e-3, 1.0, (math.nan,)))
    for each in (helm, resumed):
        each.decide(history, context, knobs)
        off = each.decide(history, context, knobs)
        assert off.off
        assert off.turn(knobs, context).weight_decay == 0.01
        assert each.decide(history, context, knobs).turn(knobs, context).weight_decay == 0.01
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["applied"]["turns"] == [["weight_decay", 3.0]]
    assert "turns" not in lines[-1]["applied"]
    assert replay(tmp_path / "log.jsonl", Turning()) == []
