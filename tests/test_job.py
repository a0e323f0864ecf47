import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from job_conformance import STEPS, JobConformance
from torch import nn

from envs import probe, workload
from envs.errors import BadInput
from envs.job import TorchJob, forward, report_start, with_validation
from envs.knobs import KEEP, OPTIMIZERS, Knobs, factor
from envs.rows import split_of

SEED = 3


class TestTorchJob(JobConformance):
    @pytest.fixture(autouse=True)
    def _task(self, tiny_task):
        self.task = tiny_task(steps=STEPS, interval=4, dropout=0.1)

    def open(self, seed=SEED, rate=JobConformance.RATE):
        return TorchJob(self.task, seed, Knobs(rate))


def weights(job):
    return torch.cat([p.detach().reshape(-1) for p in job._module.parameters()])


def applied_rates(job):
    return {group["lr"] for group in job._optimizer.param_groups}


def by_hand(task, knobs, seed, updates, fused=True):
    """The same run as a plain loop: its own module and order of the data, PyTorch's optimizers."""
    order, head, _ = (int(x) for x in np.random.SeedSequence(seed).generate_state(3))
    load = workload.load(task)
    module = load.module(head)
    rows = load.rows["train"]
    groups = [
        {"params": [p for p in module.parameters() if p.ndim >= 2],
         "weight_decay": knobs.weight_decay},
        {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]  # fmt: skip
    make = {
        "adamw": lambda g, lr: torch.optim.AdamW(g, lr, fused=fused),
        "sgd": lambda g, lr: torch.optim.SGD(g, lr, momentum=0.9),
        "rmsprop": torch.optim.RMSprop,
    }
    optimizer = make[knobs.optimizer](groups, lr=knobs.rate)
    generator = torch.Generator().manual_seed(order)
    losses = []
    module.train()
    while len(losses) < updates:
        for index in torch.randperm(len(rows), generator=generator).split(task.batch):
            if len(index) < task.batch or len(losses) == updates:
                break
            length = int(rows.mask[index].sum(1).max())
            states = module.encoder(rows.ids[index, :length], rows.mask[index, :length])[0]
            mask = rows.mask[index, :length, None].float()
            logits = module.head((states * mask).sum(1) / mask.sum(1))
            loss = nn.functional.cross_entropy(logits, rows.labels[index])
            optimizer.zero_grad()
            loss.backward()
            if knobs.clip:
                nn.utils.clip_grad_norm_(module.parameters(), knobs.clip)
            for group in optimizer.param_groups:
                group["lr"] = knobs.rate * factor(knobs, len(losses), task.steps)
            optimizer.step()
            losses.append(loss.item())
    return losses, torch.cat([p.detach().reshape(-1) for p in module.parameters()])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_a_job_is_the_plain_loop(tiny_task, optimizer, clip):
    """Two epochs and a bit, to the bit."""
    task = tiny_task(rows=36, steps=10, interval=3)
    knobs = Knobs(3e-3, "cosine", 0.2, optimizer, weight_decay=0.1, clip=clip)
    job = TorchJob(task, SEED, knobs)
    losses = [loss for steps in (3, 6, 1) for loss in job.advance(steps).losses]
    expected, final = by_hand(task, knobs, SEED, 10)
    assert torch.equal(weights(job), final)
    assert losses == expected


def test_fused_adamw_is_adamw(tiny_task):
    """Within rounding; it makes steps of keys' biases, whose gradient is nought but for that."""
    task, knobs = tiny_task(rows=36, steps=10), Knobs(3e-3)
    losses = TorchJob(task, SEED, knobs).advance(10).losses
    assert losses == pytest.approx(by_hand(task, knobs, SEED, 10, fused=False)[0], abs=1e-6)


def test_same_seed_same_run_and_another_seed_another(tiny_task):
    task = tiny_task(dropout=0.2, steps=6, interval=3)
    runs = []
    for seed in (0, 0, 1):
        job = TorchJob(task, seed, Knobs(1e-2))
        reports = [job.advance(3), job.advance(3)]
        runs.append((reports, weights(job)))
        random.random(), np.random.rand(), torch.rand(3)
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])
    assert runs[0][0][0].losses != runs[2][0][0].losses


def test_runs_of_one_seed_are_paired_across_knobs_and_intervals(tiny_task):
    """The same head, the same order of the data: the first losses agree whatever the knobs."""
    first = [
        TorchJob(tiny_task(interval=interval), SEED, knobs)
        for interval, knobs in (
            (4, Knobs(1e-3)),
            (10, Knobs(1e-1, "constant", optimizer="sgd", clip=0.0)),
        )
    ]
    assert torch.equal(weights(first[0]), weights(first[1]))
    assert first[0].advance(1).losses == first[1].advance(1).losses
    assert [next(job._order).tolist() for job in first].count(next(first[0]._order).tolist()) == 0
    for _ in range(30):
        a, b = (TorchJob(tiny_task(), SEED)._order for _ in first)
        assert torch.equal(next(a), next(b))


def test_dropout_acts_in_training_only(tiny_task):
    plain, dropped = (TorchJob(tiny_task(dropout=p), SEED) for p in (0.0, 0.5))
    assert plain.evaluate("test") == dropped.evaluate("test") == dropped.evaluate("test")
    assert plain.advance(2).losses != dropped.advance(2).losses


def test_evaluation_does_not_change_training(tiny_task):
    task = tiny_task(dropout=0.1, steps=8)
    looked_at, left_alone = (TorchJob(task, SEED, Knobs(1e-2)) for _ in range(2))
    for _ in range(2):
        for split in ("train", "validation", "selection", "test"):
            looked_at.evaluate(split)
        looked_at.snapshot()
        assert looked_at.advance(4) == left_alone.advance(4)
    assert torch.equal(weights(looked_at), weights(left_alone))


def test_a_score_is_the_mean_over_the_whole_split(tiny_task):
    """Whatever the sizes of the batches it was computed in."""
    task = tiny_task(test_rows=64, rows=250)
    job = TorchJob(task, SEED)
    for split in ("test", "train"):  # 64 rows; 250 rows, two batches
        rows = workload.load(task).rows[split]
        with torch.no_grad():
            result = job._module.eval()(rows.ids, rows.mask, rows.labels)
        score = job.evaluate(split)
        assert score.loss == pytest.approx(result["loss"].item(), abs=1e-5)
        assert score.metric == (result["logits"].argmax(1) == rows.labels).double().mean().item()


def test_restoring_brings_the_weights_back_to_the_bit_and_leaves_the_rate(tiny_task):
    job = TorchJob(tiny_task(), SEED, Knobs(1e-2, "constant"))
    job.advance(4)
    kept, before, score = job.snapshot(), weights(job), job.evaluate("test")
    job.advance(4)
    assert not torch.equal(weights(job), before)
    job.apply(replace(job.knobs, rate=3e-3))
    job.restore(kept)
    assert torch.equal(weights(job), before)
    assert job.evaluate("test") == score
    assert not job._optimizer.state
    assert (job.knobs.rate, job.step) == (3e-3, 8)
    job.advance(2)
    assert applied_rates(job) == {3e-3}
    assert torch.equal(torch.cat([part.reshape(-1) for part in kept]), before)


def test_the_optimizer_uses_the_rate_that_was_asked_for(tiny_task):
    """Through the schedule, a change of rate, of optimizer, of weight decay, and a restore."""
    job = TorchJob(tiny_task(), SEED, Knobs(1e-2, "linear", 0.1))
    kept = job.snapshot()
    for change in (
        {},
        {"rate": 2e-3},
        {"optimizer": "sgd", "rate": 0.1},
        {"weight_decay": 0.1},
        {"optimizer": "rmsprop", "rate": 1e-3},
        {"rate": 5e-4},
    ):
        job.apply(replace(job.knobs, **change))
        job.restore(kept)
        progress = job.advance(3)
        assert progress.rate == job.knobs.rate
        assert applied_rates(job) == {job.knobs.rate * factor(job.knobs, job.step - 1, 20)}
        assert progress.factor == factor(job.knobs, job.step, 20)


def test_a_job_outlives_a_divergence(tiny_task):
    """It reports what happened; once restored with a gentler rate it trains on."""
    job = TorchJob(tiny_task(), SEED, Knobs(1e-2, "constant"))
    job.advance(2)
    kept, good = job.snapshot(), job.evaluate("validation").loss
    with torch.no_grad():
        job._parameters[0][0, 0] = math.nan
    progress = job.advance(2)
    assert not progress.finite
    assert math.isnan(progress.losses[-1])
    assert math.isnan(job.evaluate("validation").loss)
    job.restore(kept)
    assert job.evaluate("validation").loss == good
    progress = job.advance(4)
    assert progress.finite
    assert all(map(math.isfinite, progress.losses))


def exact(job, updates):
    """The probe's figures from every weight, by hand, for ``updates`` updates from here."""
    gradients = []
    for _ in range(updates):
        rate = job._knobs.rate * factor(job._knobs, job._step, job.task.steps)
        for group in job._optimizer.param_groups:
            group["lr"] = rate
        forward(job._module, job._load.rows["train"], next(job._order))["loss"].backward()
        matrices = [p for p in job._parameters if p.ndim >= 2]
        gradients.append(torch.cat([probe.gradient_of(p).reshape(-1) for p in matrices]).clone())
        nn.utils.clip_grad_norm_(job._parameters, job._knobs.clip)
        clipped = torch.cat([probe.gradient_of(p).reshape(-1) for p in matrices]).norm()
        before = torch.cat([p.detach().reshape(-1) for p in matrices]).clone()
        job._optimizer.step()
        after = torch.cat([p.detach().reshape(-1) for p in matrices])
        job._optimizer.zero_grad()
        job._step += 1
    last = gradients[-1]
    cosine = nn.functional.cosine_similarity(last, gradients[-2], dim=0) if updates > 1 else None
    return (
        last.norm().item(),
        (clipped / last.norm()).item(),
        ((after - before).norm() / before.norm()).item(),
        cosine.item() if updates > 1 else math.nan,
    )


def test_the_sample_is_evenly_spaced_however_the_tensor_lies_in_memory():
    numbers = torch.arange(3 * 4 * 5.0).view(3, 4, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "SAMPLE", 7)
        assert probe.view(numbers[0, 0]).tolist() == [0, 1, 2, 3, 4]
        assert probe.view(numbers[1]).tolist() == [20, 23, 26, 29, 32, 35, 38]
        assert probe.view(numbers[1].T).tolist() == [20, 35, 31, 27, 23, 38, 34]
        assert probe.view(numbers.half()).tolist() == [0, 9, 18, 27, 36, 45, 54]
        assert probe.view(numbers.half()).dtype == torch.float32


@pytest.mark.parametrize("updates", [3, 1])
def test_the_probe_is_exact_where_its_sample_is_everything(tiny_task, updates):
    jobs = [TorchJob(tiny_task(), SEED, Knobs(1e-2, clip=0.1)) for _ in range(2)]
    largest = max(p.numel() for p in jobs[0]._parameters)
    assert len([p for p in jobs[0]._parameters if p.ndim >= 2]) <= probe.TENSORS
    assert largest > probe.SAMPLE  # the embedding; so that the sample is a part of it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "SAMPLE", largest)
        found = jobs[0].advance(updates)
    figures = (found.gradient, found.clipped, found.update, found.cosine)
    assert figures == pytest.approx(exact(jobs[1], updates), rel=1e-4, nan_ok=True)
    assert found.clipped < 1


def test_a_sample_is_near_the_whole(tiny_task):
    whole, part = (TorchJob(tiny_task(), SEED, Knobs(1e-2)) for _ in range(2))
    seen = part.advance(4)
    gradient, _, update, cosine = exact(whole, 4)
    assert seen.update == pytest.approx(update, rel=0.3)
    assert seen.gradient == pytest.approx(gradient, rel=0.5)
    assert seen.cosine == pytest.approx(cosine, abs=0.3)


def trained(job):
    return {name for name, p in job._module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_only_the_uppermost_layers_are_trained(tiny_task, layers):
    job = TorchJob(tiny_task(trainable_layers=layers), SEED, Knobs(1e-2))
    before = {name: p.detach().clone() for name, p in job._module.named_parameters()}
    job.advance(3)
    moved = {n for n, p in job._module.named_parameters() if not torch.equal(p, before[n])}
    expected = {
        n
        for n in before
        if n.startswith("head.") or any(f"encoder.layer.{i}." in n for i in range(2 - layers, 2))
    }
    assert trained(job) == expected
    assert moved <= expected
    assert {n for n in expected if n.endswith("weight")} <= moved


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
def test_an_adapter_leaves_the_base_alone(tiny_task):
    job = TorchJob(tiny_task(adapter="lora"), SEED, Knobs(1e-2))
    base = {n: p.detach().clone() for n, p in job._module.named_parameters() if "lora" not in n}
    full = TorchJob(tiny_task(), SEED)
    assert {n.split(".")[0] if n.startswith("head") else "lora" for n in trained(job)} == {
        "head", "lora",
    }  # fmt: skip
    assert job.context.parameters > full.context.parameters
    job.advance(4)
    for name, parameter in job._module.named_parameters():
        if name in base and not name.startswith("head"):
            assert torch.equal(parameter, base[name]), name
    assert any(p.abs().sum() > 0 for n, p in job._module.named_parameters() if "lora_B" in n)
    assert job.context.adapter == "lora"
    kept, before = job.snapshot(), weights(job)
    job.advance(2)
    job.restore(kept)
    assert torch.equal(weights(job), before)


def test_jobs_do_not_share_weights(tiny_task):
    first, second = TorchJob(tiny_task(), SEED), TorchJob(tiny_task(), SEED)
    before = weights(second)
    first.advance(3)
    assert torch.equal(weights(second), before)
    assert torch.equal(weights(TorchJob(tiny_task(), SEED)), before)


def test_a_subset_of_the_classes(tiny_task):
    task = tiny_task(classes=("tool", "animal"), rows=90)
    load = workload.load(task)
    every = workload.load(tiny_task(rows=10**6))
    assert load.classes == ("tool", "animal")
    for rows in load.rows.values():
        assert set(rows.labels.tolist()) == {0, 1}
    tools = every.rows["train"].ids[every.rows["train"].labels == every.classes.index("tool")]
    mine = load.rows["train"].ids[load.rows["train"].labels == 0]
    assert torch.equal(mine, tools[: len(mine)])
    assert TorchJob(task, SEED).context.classes == 2
    with pytest.raises(BadInput, match="no class 'plant'; it has animal, city, tool"):
        workload.load(tiny_task(classes=("plant", "tool")))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_label_noise_flips_that_share_of_the_training_labels_alone(tiny_task, share):
    clean, noisy = (workload.load(tiny_task(rows=270, noise=s)) for s in (0.0, share))
    flipped = (clean.rows["train"].labels != noisy.rows["train"].labels).float().mean()
    assert flipped == pytest.approx(share, abs=0.08)
    for split in ("validation", "selection", "test"):
        assert torch.equal(clean.rows[split].labels, noisy.rows[split].labels)
    again = workload.load(tiny_task(rows=270, noise=share, steps=40))
    assert torch.equal(again.rows["train"].labels, noisy.rows["train"].labels)
    assert (clean.fingerprint == noisy.fingerprint) == (share == 0)


def refused(task, problem):
    with pytest.raises(BadInput, match=problem) as error:
        TorchJob(task, SEED)
    assert "\n" not in str(error.value)
    assert "; " in str(error.value)


def test_data_that_cannot_be_learned_from_is_refused(tiny_task, tmp_path):
    one, few, none = (tmp_path / f"{name}.csv" for name in ("one", "few", "none"))
    one.write_text("text,label\n" + "".join(f"cat {i},animal\n" for i in range(40)))
    few.write_text("text,label\n" + "".join(f"cat {i},{'ab'[i % 2]}\n" for i in range(9)))
    refused(tiny_task(dataset=str(one)), "one class")
    refused(tiny_task(dataset=str(few), rows=200), r"(no rows|is larger than the \d training rows)")
    refused(tiny_task(dataset=str(none)), "not found")
    refused(tiny_task(rows=1000, batch=900), "900 is larger than the")


def test_an_empty_split_is_refused(tiny_task, tmp_path):
    """The rows of a rare class may all fall in the training split."""
    rare = [text for text in (f"rare {i}" for i in range(60)) if split_of(text) == "train"][:8]
    rows = [f"cat {i},{'ab'[i % 2]}" for i in range(80)]
    rows += [f"{text},{'cd'[i % 2]}" for i, text in enumerate(rare)]
    data = tmp_path / "rare.csv"
    data.write_text("\n".join(["text,label", *rows]))
    refused(tiny_task(dataset=str(data), classes=("c", "d")), "validation: no rows of c, d")
    splits = workload._splits(str(data), "text", "label")
    nothing = {
        **splits,
        "test": replace(splits["test"], texts=(), labels=splits["test"].labels[:0]),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "_splits", lambda *_: nothing)
        refused(tiny_task(dataset="nothing.csv"), "test: no rows")


def test_a_text_without_a_token_is_refused(tiny_task, tmp_path, tiny_model):
    bare = tiny.tokenizer()
    bare._tokenizer.post_processor = None
    model = tiny.write_model(tmp_path / "bare")
    bare.save_pretrained(model)
    data = tmp_path / "odd.csv"
    rows = [f"{'cat' if i % 2 else 'saw'} {i},{'ab'[i % 2]}" for i in range(80)]
    data.write_text("\n".join(["text,label", *rows, "\u200b\u00ad,a"]))
    refused(tiny_task(dataset=str(data), model=str(model)), "a text without any token")


def test_a_tokenizer_must_pad_and_fit_its_model(tiny_task, tmp_path):
    unpadded = tiny.write_model(tmp_path / "unpadded")
    words = tiny.tokenizer()
    words.pad_token = None
    words.save_pretrained(unpadded)
    refused(tiny_task(model=str(unpadded)), "no pad token")
    small = tiny.write_model(tmp_path / "small", vocab_size=50)
    refused(tiny_task(model=str(small)), "tokens, the model knows 50")
    refused(tiny_task(max_length=64), "max_length: 64 is longer than the 16 positions")


def test_a_side_of_padding_does_not_matter(tiny_task, monkeypatch):
    """Tokenizers of decoders pad on the left; a batch is cut to its longest row on the right."""
    left = tiny.tokenizer()
    left.padding_side = "left"
    plain = workload.load(tiny_task())
    monkeypatch.setattr(workload, "load_tokenizer", lambda model: left)
    workload._tokens.cache_clear()
    padded = workload.load(tiny_task(steps=19))
    workload._tokens.cache_clear()
    assert torch.equal(padded.rows["train"].ids, plain.rows["train"].ids)


def test_a_seed_must_not_be_negative(tiny_task):
    with pytest.raises(BadInput, match="seed: -1 is negative; give"):
        TorchJob(tiny_task(), -1)


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(OPTIMIZERS, 2)))
def test_a_new_optimizer_inherits_what_it_can_use(tiny_task, old, new):
    rates = {"adamw": 5e-3, "sgd": 5e-2, "rmsprop": 2e-3}
    job = TorchJob(tiny_task(), SEED, Knobs(rates[old], "constant", optimizer=old))
    before = job.advance(6)
    had = {p: dict(job._optimizer.state[p]) for p in job._parameters}
    job.apply(replace(job.knobs, optimizer=new, rate=rates[new]))
    assert type(job._optimizer).__name__.lower() == new
    for p in job._parameters:
        has, was = job._optimizer.state.get(p, {}), had[p]
        grown = (1 - 0.999**6) / (1 - 0.99**6)
        if (old, new) == ("adamw", "sgd"):
            torch.testing.assert_close(has["momentum_buffer"], was["exp_avg"] / (1 - 0.9))
        elif (old, new) == ("adamw", "rmsprop"):
            torch.testing.assert_close(has["square_avg"], was["exp_avg_sq"] / grown)
        elif (old, new) == ("rmsprop", "adamw"):
            torch.testing.assert_close(has["exp_avg_sq"], was["square_avg"] * grown)
            assert has["exp_avg"].count_nonzero() == 0
            assert has["step"] == 6
        else:
            assert not has  # nothing of use: it starts afresh
        for tensor in has.values():
            assert all(tensor.data_ptr() != other.data_ptr() for other in was.values())
    after = job.advance(6)
    assert after.finite
    assert max(after.losses) < 2 * max(before.losses)
    assert 0.02 < after.update / before.update < 50


def test_a_switch_and_back_loses_only_the_momentum(tiny_task):
    job = TorchJob(tiny_task(), SEED, Knobs(5e-3))
    job.advance(5)
    second = [job._optimizer.state[p]["exp_avg_sq"].clone() for p in job._parameters]
    for optimizer in ("rmsprop", "adamw"):
        job.apply(replace(job.knobs, optimizer=optimizer))
    torch.testing.assert_close(
        [job._optimizer.state[p]["exp_avg_sq"] for p in job._parameters], second
    )


def test_weight_decay_changes_with_the_moments_in_place(tiny_task):
    job = TorchJob(tiny_task(), SEED, Knobs(5e-3))
    job.advance(5)
    had = [job._optimizer.state[p]["exp_avg"].clone() for p in job._parameters]
    job.apply(replace(job.knobs, weight_decay=0.3))
    assert [group["weight_decay"] for group in job._optimizer.param_groups] == [0.3, 0.0]
    torch.testing.assert_close([job._optimizer.state[p]["exp_avg"] for p in job._parameters], had)


def test_reports_carry_the_last_known_validation_loss(tiny_task):
    job = TorchJob(tiny_task(), SEED)
    start = report_start(job, 1.5)
    assert (start.step, start.losses, start.validation, start.age) == (0, (), 1.5, 0)
    later = with_validation(job.advance(2), start, None, KEEP)
    assert (later.validation, later.age) == (1.5, 1)
    latest = with_validation(job.advance(2), later, 1.25, KEEP)
    assert (latest.validation, latest.age) == (1.25, 0)


def test_the_context_says_what_the_job_is(tiny_task):
    job = TorchJob(tiny_task(rows=10**6), SEED, Knobs(2e-3, optimizer="sgd"))
    context = job.context
    assert context.parameters == sum(p.numel() for p in job._module.parameters())
    assert context.rows == len(workload.load(job.task).rows["train"]) < 480
    assert (context.total, context.decisions, context.classes) == (20, 5, 3)
    assert (context.optimizer, context.start_rate) == ("sgd", 2e-3)
