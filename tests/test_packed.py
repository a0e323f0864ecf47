"""Packed runs: equal to plain ones, and apart from their neighbours."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from job_conformance import STEPS, JobConformance

from baselines.compare import compare
from baselines.schedules import CosineWarmup, Keep
from baselines.search import Search
from envs import batched, workload
from envs.env import FineTuneEnv
from envs.errors import BadInput
from envs.feed import Order, Texts, chunks
from envs.hardware import Plan
from envs.job import TorchJob, batches
from envs.knobs import Knobs
from envs.layout import lay_out
from envs.lockstep import Lockstep, PackedJob
from envs.packed import Pack
from envs.stack import Stack, Turn

ROUNDING = 3e-5  # of weights after a few updates; processors differ


class TestPackedJob(JobConformance):
    @pytest.fixture(autouse=True)
    def _task(self, tiny_task):
        self.task = tiny_task(steps=STEPS, interval=4)  # lanes share the draws of dropout
        self.lockstep = Lockstep(Plan("cpu", 2), classes=4)

    def open(self, seed=3, rate=JobConformance.RATE):
        return self.lockstep.open(self.task, seed, Knobs(rate))


SETTINGS = (
    Knobs(1e-3),
    Knobs(2e-3, "constant", weight_decay=0.1, clip=0.05),
    Knobs(1e-1, "cosine", optimizer="sgd"),
    Knobs(1e-1, optimizer="sgd", weight_decay=0.01, clip=0.0),
    Knobs(2e-4, optimizer="rmsprop"),
    Knobs(1e-4, "constant", 0.2, optimizer="rmsprop", weight_decay=0.01),
)


def distance(job, found):
    """Relative difference of the trained weights.

    But for biases of attention's keys: they shift all scores of a query alike, so that their
    gradient is zero but for rounding, which an optimizer that normalises makes large.
    """
    plain = {n: p.detach() for n, p in job._module.named_parameters() if p.requires_grad}
    assert found.keys() == plain.keys()
    plain = {n: p for n, p in plain.items() if not n.endswith(("key.bias", "k_lin.bias"))}
    apart = torch.cat([(found[name] - plain[name]).reshape(-1) for name in plain])
    return (apart.norm() / torch.cat([p.reshape(-1) for p in plain.values()]).norm()).item()


def alike(progress, other):
    assert progress.losses == pytest.approx(other.losses, rel=1e-4, nan_ok=True)
    for name in ("gradient", "clipped", "update", "cosine"):
        seen = getattr(progress, name)
        assert seen == pytest.approx(getattr(other, name), rel=1e-3, abs=1e-4, nan_ok=True), name
    for name in ("step", "rate", "factor", "finite"):
        assert getattr(progress, name) == getattr(other, name)


def test_packed_runs_equal_plain_ones_through_rollbacks(tiny_task):
    """Fifty updates of each optimizer, tasks of several sizes, a rollback and new rates."""
    tasks = [tiny_task(steps=50, interval=10, **changes) for changes in (
        {}, {"classes": ("tool", "city")}, {"rows": 90, "noise": 0.1},
    )]  # fmt: skip
    pack = Pack(tasks[0], len(SETTINGS), 4)
    jobs = []
    for lane, knobs in enumerate(SETTINGS):
        task = tasks[lane % 3]
        pack.open(lane, task, lane, knobs)
        jobs.append(TorchJob(task, lane, knobs))
        assert pack.context(lane) == jobs[lane].context
        assert distance(jobs[lane], pack.named(lane)) == 0
    lanes = range(len(jobs))
    kept = {}
    for interval in range(5):
        reports = pack.advance(dict.fromkeys(lanes, 10))
        scores = pack.evaluate(dict.fromkeys(lanes, "validation"))
        for lane, job in enumerate(jobs):
            alike(reports[lane], job.advance(10))
            score = job.evaluate("validation")
            assert scores[lane].loss == pytest.approx(score.loss, rel=1e-5)
            assert scores[lane].metric == pytest.approx(score.metric)
            assert distance(job, pack.named(lane)) <= ROUNDING
            if interval == 1:
                kept[lane] = pack.snapshot(lane), job.snapshot()
            if interval == 3:
                pack.restore(lane, kept[lane][0])
                job.restore(kept[lane][1])
                slower = replace(job.knobs, rate=job.knobs.rate / 2)
                pack.apply(lane, slower)
                job.apply(slower)
                assert distance(job, pack.named(lane)) <= ROUNDING


@pytest.mark.parametrize("old", range(0, len(SETTINGS), 2))
@pytest.mark.parametrize("new", range(0, len(SETTINGS), 2))
def test_a_new_optimizer_inherits_the_same_moments(tiny_task, old, new):
    task = tiny_task()
    pack, job = Pack(task, 1, 4), TorchJob(task, 0, SETTINGS[old])
    pack.open(0, task, 0, SETTINGS[old])
    for knobs in (SETTINGS[old], SETTINGS[new], replace(SETTINGS[new], weight_decay=0.2)):
        pack.apply(0, knobs)
        job.apply(knobs)
        alike(pack.advance({0: 4})[0], job.advance(4))
        assert distance(job, pack.named(0)) <= ROUNDING


def test_a_diverging_run_leaves_its_neighbours_alone_to_the_bit(tiny_task):
    """And it can be put back."""
    task = tiny_task(steps=40)

    def trained(spoil):
        pack = Pack(task, 3, 4)
        for lane in range(3):
            pack.open(lane, task, lane, Knobs(2e-3))
        pack.advance(dict.fromkeys(range(3), 4))
        kept = pack.snapshot(1)
        if spoil:
            pack._stack.row.weights[1, 0] = math.nan
        report = pack.advance(dict.fromkeys(range(3), 4))[1]
        assert report.finite != spoil
        if spoil:
            assert math.isnan(report.losses[-1])
            pack.restore(1, kept)
            assert pack.advance({1: 2})[1].finite
            assert math.isfinite(pack.evaluate({1: "test"})[1].loss)
        others = pack.advance({0: 4, 2: 4})
        return others, pack.named(0), pack.named(2)

    good, bad = trained(False), trained(True)
    assert good[0] == bad[0]
    for before, after in zip(good[1:], bad[1:], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_lanes_may_wait_and_end_at_different_times(tiny_task):
    task = tiny_task()
    pack, jobs = Pack(task, 3, 4), [TorchJob(task, seed, Knobs(2e-3)) for seed in range(3)]
    for lane in range(3):
        pack.open(lane, task, lane, Knobs(2e-3))
    for wanted in ({0: 3, 1: 1, 2: 5}, {2: 2}, {0: 2, 1: 4}):
        for lane, report in pack.advance(wanted).items():
            alike(report, jobs[lane].advance(wanted[lane]))
            assert distance(jobs[lane], pack.named(lane)) <= ROUNDING


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize("changes", [{}, {"adapter": "lora"}, {"trainable_layers": 1},
                                     {"trainable_layers": 0}])  # fmt: skip
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_what_is_left_out_changes_no_number(tiny_task, changes, pooling):
    """Frozen weights are shared, frozen layers and tokens that nothing reads are not computed."""
    task = tiny_task(pooling=pooling, **changes)
    frozen = changes.get("trainable_layers")
    assert batched.fit(task) == batched.Fit(
        trunk=frozen is not None, first=pooling == "first" and frozen != 0
    )
    pack, jobs = Pack(task, 2, 4), [TorchJob(task, seed, Knobs(2e-3)) for seed in range(2)]
    for lane in range(2):
        pack.open(lane, task, lane, Knobs(2e-3))
        assert pack.context(lane) == jobs[lane].context
    for _ in range(3):
        reports = pack.advance({0: 4, 1: 4})
        for lane, job in enumerate(jobs):
            alike(reports[lane], job.advance(4))
            assert distance(job, pack.named(lane)) <= ROUNDING
            assert pack.evaluate({lane: "test"})[lane].loss == pytest.approx(
                job.evaluate("test").loss, rel=1e-5
            )


def test_what_cannot_share_a_pack_is_refused(tiny_task):
    pack = Pack(tiny_task(), 1, 2)
    with pytest.raises(BadInput, match=r"batch=4.*cannot share one with.*batch=8"):
        pack.open(0, tiny_task(batch=4), 0, Knobs())
    with pytest.raises(BadInput, match="3 classes; it has room for 2"):
        pack.open(0, tiny_task(), 0, Knobs())


@pytest.mark.parametrize("knobs", SETTINGS)
def test_all_lanes_at_once_is_the_same_as_one_by_one(tiny_task, knobs):
    """The two ways to step a stack: a GPU's and a CPU's."""
    task, results = tiny_task(), []
    model = batched.BatchedModel(task, batched.Fit(), compiled=False, device=torch.device("cpu"))
    for together in (False, True):
        layout, random = lay_out(model, 4), torch.Generator().manual_seed(0)
        stack = Stack(layout, 10, 3, 2, torch.device("cpu"))
        for part in (stack.row, stack.table):
            part.weights.copy_(torch.randn(part.weights.shape, generator=random))
        for age in range(1, 4):
            for part in (stack.row, stack.table):
                part.slope.copy_(torch.randn(part.slope.shape, generator=random))
            turns = [Turn(lane, knobs, knobs.rate * (lane + 1), age, 10) for lane in range(2)]
            (stack._clip_together if together else stack.clip)(turns)
            (stack._step_together if together else stack.step)(turns)
        results.append(torch.cat([stack.row.weights, stack.table.weights], 1))
    torch.testing.assert_close(*results)


def test_words_of_the_training_rows_come_first(tiny_task):
    load = workload.load(tiny_task())
    texts = Texts(load, 100, torch.device("cpu"))
    used = sorted(set(load.rows["train"].ids.view(-1).tolist()))
    assert texts.used == len(used) < 100
    assert texts.tokens[: len(used)].tolist() == used
    assert sorted(texts.tokens.tolist()) == list(range(100))
    assert torch.equal(texts.tokens[texts.place], torch.arange(100))
    assert torch.equal(texts.tokens[texts.rows("test", False).ids], load.rows["test"].ids)


@pytest.mark.parametrize("knobs", [Knobs(1e-2), Knobs(1e-2, weight_decay=0.1)])
def test_a_lane_that_is_used_again_begins_as_a_new_one(tiny_task, knobs):
    """After a run of the same task, whose rows that did not move stay, and of another."""
    task, other = tiny_task(), tiny_task(rows=90)
    pack = Pack(task, 1, 4)
    for before in (task, other):
        pack.open(0, before, 5, knobs)
        pack.advance({0: 3})
        pack.restore(0, pack.snapshot(0))
        pack.open(0, task, 1, Knobs(1e-3))
        job = TorchJob(task, 1, Knobs(1e-3))
        assert distance(job, pack.named(0)) == 0
        alike(pack.advance({0: 4})[0], job.advance(4))
        assert distance(job, pack.named(0)) <= ROUNDING


def test_an_order_is_that_of_a_plain_run():
    order, source = Order(10, 3, 0), batches(10, 3, 0)
    expected = torch.stack([next(source) for _ in range(9)])
    assert torch.equal(order.take(0, 9), expected)
    assert torch.equal(order.take(2, 3), expected[2:5])
    assert chunks(5, 2).tolist() == [[0, 1], [2, 3], [4, 4]]


def test_environments_in_lockstep_live_the_episodes_of_plain_ones(tiny_task):
    """Other tasks, other lengths, rollbacks among the actions: the same observations."""
    lockstep = Lockstep(Plan("cpu", 4), classes=4)
    tasks = [tiny_task(), tiny_task(steps=12), tiny_task(classes=("tool", "city"), steps=16)]

    def episode(env, seed):
        observations, rewards, over = [env.reset(seed=seed)[0]], [], False
        rng = np.random.default_rng(seed)
        while not over:
            seen, reward, over, _, _ = env.step(int(rng.integers(env.actions.size)))
            observations.append(seen)
            rewards.append(reward)
        return np.stack(observations), rewards

    packed = lockstep.run([
        lambda task=task, seed=seed: episode(FineTuneEnv(task, make_job=lockstep.open), seed)
        for seed, task in enumerate(tasks)
    ])  # fmt: skip
    for seed, (task, (seen, rewards)) in enumerate(zip(tasks, packed, strict=True)):
        plain, wanted = episode(FineTuneEnv(task), seed)
        np.testing.assert_allclose(seen, plain, atol=2e-3)
        assert rewards == pytest.approx(wanted, abs=3e-4)


def test_a_lane_is_free_again_when_its_job_is_gone(tiny_task):
    lockstep = Lockstep(Plan("cpu", 2), classes=4)
    jobs = [lockstep.open(tiny_task(), seed) for seed in range(3)]
    assert all(isinstance(job, PackedJob) for job in jobs)
    packs = next(iter(lockstep._packs.values()))
    assert len(packs) == 2
    del jobs
    assert [pack.free for pack in packs] == [0, 0]


def test_a_model_that_cannot_be_batched_runs_alone_with_a_notice(
    tiny_task, tmp_path, monkeypatch, caplog
):
    """Found at the start, named in one sentence, and not a different result."""
    forward = torch.nn.LayerNorm.forward

    def nosy(self, states):
        if float(states.detach().sum()) == 0.5:  # data-dependent control flow
            return states
        return forward(self, states)

    model = tiny.write_model(tmp_path / "nosy")
    task = tiny_task(model=str(model))
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", nosy)
    lockstep = Lockstep(Plan("cpu", 2), classes=4)
    jobs = [lockstep.open(task, 0), lockstep.open(task, 1)]
    assert all(isinstance(job, TorchJob) for job in jobs)
    assert len(caplog.messages) == 1
    assert "torch.func cannot batch it" in caplog.text
    assert jobs[0].advance(2) == TorchJob(task, 0).advance(2)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "distilbert", "roberta"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_other_families_of_models(tiny_task, tmp_path, kind, pooling):
    from transformers import AutoConfig, AutoModel

    words = tiny.tokenizer()
    sizes = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0},
        "llama": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "intermediate_size": 32, "num_key_value_heads": 1},
        "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        "roberta": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "intermediate_size": 32, "pad_token_id": 0},
    }[kind]  # fmt: skip
    config = AutoConfig.for_model(kind, vocab_size=len(words), max_position_embeddings=18, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    task = tiny_task(model=str(tmp_path), pooling=pooling)
    assert batched.fit(task) == batched.Fit(
        causal=kind in ("gpt2", "llama"), first=kind == "roberta" and pooling == "first"
    )
    pack, job = Pack(task, 2, 4), TorchJob(task, 0, Knobs(1e-3))
    pack.open(0, task, 0, Knobs(1e-3))
    alike(pack.advance({0: 8})[0], job.advance(8))
    assert distance(job, pack.named(0)) <= ROUNDING


def test_cells_in_a_pack_have_the_outcomes_of_cells_one_by_one(tmp_path, monkeypatch):
    """Schedules and searches, with a pruner, of two tasks and two seeds; seconds apart.

    Names without a folder: rates and samplers are seeded by the task, its paths included.
    """
    monkeypatch.chdir(tmp_path)
    base = tiny.task(tiny.write_data(Path("words.csv")), tiny.write_model(Path("bert")))
    methods = [Keep(), CosineWarmup(), Search("random"), Search("tpe", "hyperband")]
    tasks = [base, replace(base, classes=("tool", "city"))]
    options = {"runs": 2.5, "decades": 0.5}
    alone = compare(methods, tasks, (0, 1), tmp_path / "alone", **options)
    packed = compare(methods, tasks, (0, 1), tmp_path / "packed", pack=4, **options)
    assert [outcome.get("packed") for outcome in packed] == [4] * len(packed)
    smooth = 0
    for one, other in zip(alone, packed, strict=True):
        assert [t["knobs"] for t in one["trials"]] == [t["knobs"] for t in other["trials"]]
        assert [t["state"] for t in one["trials"]] == [t["state"] for t in other["trials"]]
        assert one["spent"] == other["spent"]
        for mine, theirs in zip(one["trials"], other["trials"], strict=True):
            losses = [point["train_loss"] for point in theirs["curve"]]
            if max(*losses, mine["test_loss"]) < 2:  # a loss that shoots up magnifies rounding
                assert mine["test"] == theirs["test"]
                assert mine["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-3)
                smooth += 1
            assert len(mine["curve"]) == len(theirs["curve"])
    assert smooth > 20
