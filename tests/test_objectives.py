"""The Trainers of other objectives: they train, are judged rightly, and refuse what is wrong."""

import gc
import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from tokenizers import processors

from envs import objectives, preferences, texts, workload, writing
from envs.errors import BadInput, UnknownName
from envs.examples import FIELDS, KINDS
from envs.instruments import describe
from envs.knobs import Knobs
from envs.setups import IGNORED
from envs.task import TASKS, Task, find

DECODERS = ("causal", "reward", "dpo", "kto", "sft", "grpo")
OBJECTIVES = tuple(KINDS)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return tiny.write_decoder(tmp_path_factory.mktemp("decoder") / "gpt2")


def written(rows, path):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def made_up(objective, count=64):
    """Rows whose answer can be read off one word."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        kind = tiny.CLASSES[number % 2]
        other = tiny.CLASSES[1 - number % 2]
        filler = [f"{rng.choice(tiny.FILLER)}" for _ in range(2)]
        text = " ".join([*rng.choice(tiny.WORDS[kind], 2), *filler, str(number)])
        rows.append(
            {
                "regression": {"text": text, "scores": [3 * (number % 2) - 1, 3 * (number % 2)]},
                "tokens": {
                    "words": text.split(),
                    "tags": [kind, kind, "other", "other", "other"],
                },
                "causal": {"text": text},
                "translation": {"source": text, "target": kind},
                "headlines": {"title": kind, "body": text},
                "sft": {"statement": text, "reply": kind},
                "grpo": {"statement": text, "reply": kind},
            }.get(
                objective,
                {"prompt": f"{number}", "chosen": "cat cat", "rejected": other[:3] + " dog"},
            )
        )
    return rows


@pytest.fixture
def task_of(tmp_path, tiny_model, decoder):
    """A tiny task of an objective on made-up rows, or on rows of one's own."""

    def make(objective, rows=None, **changes):
        rows = made_up(objective) if rows is None else rows
        settings = {
            "dataset": written(rows, tmp_path / f"{objective}.jsonl"),
            "model": str(decoder if objective in DECODERS else tiny_model),
            "objective": objective,
            "rows": 32, "batch": 8, "steps": 3, "interval": 1,
            "max_length": 40 if objective in DECODERS else 16,
            "validation_rows": 32, "selection_rows": 32, "test_rows": 32,
        }  # fmt: skip
        return Task(**settings | changes)

    return make


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    gc.collect()
    gc.freeze()  # or every Trainer collects all that was imported


@pytest.fixture(autouse=True)
def _rated(monkeypatch):
    """The lexicon of `kindness`, without fetched data."""
    rows = [texts.Rated("good cat", (4.0, 4.0), "own"), texts.Rated("bad dog", (-4.0,), "own")] * 5
    monkeypatch.setattr(texts, "ratings", lambda: {"train": rows})
    writing._lexicon.cache_clear()
    yield
    writing._lexicon.cache_clear()


@pytest.fixture
def _letters(monkeypatch):
    """What pays a random model, which writes no words: the share of early letters."""
    monkeypatch.setattr(writing, "kindness", letters)


def letters(completions, **_):
    return [sum(c < "m" for c in text) / max(1, len(text)) for text in completions]


def weights(trainer):
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])


def trained(task, seed=0, **knobs):
    """A setup after its run, which begins from random states that follow the seed."""
    setup = objectives.prepare(task, seed, Knobs(**{"rate": 1e-3} | knobs))
    with workload.seeded(seed):
        setup.trainer.train()
    return setup


@pytest.mark.usefixtures("_letters")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_trains_and_is_judged(objective, task_of):
    task = task_of(objective)
    setup = objectives.prepare(task, 0, Knobs(rate=1e-2))
    first, before = weights(setup.trainer), setup.score(setup.trainer, "validation")
    setup.trainer.train()
    assert setup.trainer.state.global_step == 3
    assert not torch.equal(weights(setup.trainer), first)
    assert torch.isfinite(weights(setup.trainer)).all()
    for split in ("train", "validation", "selection", "test"):
        cost, metric = setup.score(setup.trainer, split)
        assert 0 <= cost < 20
        assert np.isfinite(metric)
    assert setup.score(setup.trainer, "validation") != before
    rows = len(objectives.load(task).rows["train"])
    assert setup.rows == (2 * rows if objective == "kto" else rows)  # a verdict on each side


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_diverged_run_has_no_cost_and_a_finite_metric(objective, task_of):
    setup = objectives.prepare(task_of(objective), 0, Knobs())
    setup.score(setup.trainer, "test")
    with torch.no_grad():
        for p in setup.trainer.model.parameters():
            p.fill_(float("nan"))
    for split in ("validation", "test"):
        cost, metric = setup.score(setup.trainer, split)
        assert np.isnan(cost)
        assert np.isfinite(metric)


@pytest.mark.slow
@pytest.mark.usefixtures("_letters")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_adapter_trains_alone(objective, task_of):
    setup = objectives.prepare(task_of(objective, adapter="lora"), 0, Knobs(rate=1e-2))
    named = dict(setup.trainer.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    setup.trainer.train()
    moved = {name for name, p in named.items() if not torch.equal(p, before[name])}
    assert any("lora_" in name for name in moved)
    new = ("lora_", "modules_to_save", "head")
    assert all(any(part in name for part in new) for name in moved)
    assert setup.score(setup.trainer, "validation").loss >= 0


@pytest.mark.usefixtures("_letters")
def test_a_ruler_is_for_the_width_and_not_for_the_number_of_stacks(task_of):
    """An encoder-decoder made of an encoder twice is judged as if it were about that encoder."""
    task = task_of("translation")
    model = objectives.prepare(task, 0, Knobs()).trainer.model
    halves = [sum(p.numel() for p in half.parameters()) for half in (model.encoder, model.decoder)]
    found = describe(model, None, None, 8)["parameters"]
    assert found == max(halves) < sum(halves) == sum(p.numel() for p in model.parameters())
    wrapped = objectives.prepare(task_of("translation", adapter="lora"), 0, Knobs()).trainer.model
    assert max(halves) < describe(wrapped, None, None, 8)["parameters"] < sum(halves)


@pytest.mark.usefixtures("_letters")
@pytest.mark.parametrize("objective", ["regression", "translation", "kto", "grpo"])
def test_a_seed_is_a_run(objective, task_of):
    task = task_of(objective, dropout=0.1)
    one = weights(trained(task, 1).trainer)
    torch.rand(3)
    assert torch.equal(weights(trained(task, 1).trainer), one)
    assert not torch.equal(weights(trained(task, 2).trainer), one)


def test_preparing_leaves_the_callers_random_states_alone(task_of):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for objective in ("regression", "dpo"):
        objectives.prepare(task_of(objective), 1, Knobs())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


@pytest.mark.parametrize(
    "objective", ["regression", "tokens", "causal", "translation", "reward", "dpo", "kto", "sft"]
)
def test_the_cost_is_the_loss_that_the_trainer_minimises(objective, task_of):
    task = task_of(objective)
    setup = trained(task, rate=1e-2)
    assert setup.score(setup.trainer, "train").loss == pytest.approx(loss(setup, task), rel=1e-5)


def loss(setup, task):
    """What the trainer would minimise in a batch of all its rows."""
    trainer = setup.trainer
    trainer.model.eval()
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    if task.objective == "kto":  # crossed within this batch, not within each of the run's
        tokenizer, pairs = preferences._pairs(task)
        order = [row["prompt"] for row in pairs["train"]]

        def place(row):
            prompt = tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
            return order.index(prompt), not row["label"]

        rows, away = sorted(rows, key=place), len(order) // 2 * 2
        for row, other in zip(rows, rows[away:] + rows[:away], strict=True):
            row["KL_completion_ids"] = other["completion_ids"]
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
    if task.objective == "kto":
        assert trainer._metrics["eval"]["kl"][-1] > 1e-3  # or it would not matter
    return found


@pytest.fixture
def wrapping(decoder, tmp_path):
    """The decoder with a tokenizer that puts marks around every text: ``wrapping("<eos> $A")``."""

    def make(around):
        folder = shutil.copytree(decoder, tmp_path / "wrapping")
        words = workload.load_tokenizer(str(folder))
        words.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[("<eos>", words.eos_token_id)]
        )
        words.save_pretrained(folder)
        return str(folder)

    return make


AROUND = pytest.mark.parametrize("around", ["<eos> $A", "<eos> $A <eos>"])


@AROUND
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_cost_is_the_loss_when_a_tokenizer_adds_marks(objective, around, task_of, wrapping):
    """Long answers, too, which the marks push over the task's length."""
    rows = [
        {"prompt": f"{row['prompt']} {'why ' * 9}", "chosen": f"{row['chosen']} {'a' * (i % 30)}",
         "rejected": f"{row['rejected']} {'b' * (i % 23)}"}
        for i, row in enumerate(made_up(objective))
    ]  # fmt: skip
    task = task_of(objective, rows, model=wrapping(around))
    setup = trained(task, rate=1e-2)
    assert setup.score(setup.trainer, "train").loss == pytest.approx(loss(setup, task), rel=1e-5)


@AROUND
def test_an_answer_gets_no_marks_of_its_own(around, task_of, wrapping):
    task = task_of("sft", model=wrapping(around), max_length=64)
    setup, decode = objectives.prepare(task, 0, Knobs()), workload.load_tokenizer(task.model).decode
    for row, turn in zip(
        setup.trainer.train_dataset, objectives.load(task).rows["train"], strict=True
    ):
        labels = setup.trainer.data_collator([row])["labels"][0].tolist()
        learned = [token for token in labels if token != IGNORED]
        end = around.replace("<eos> $A", turn.reply + "<eos>").replace(" ", "")
        assert decode(learned) == end
        assert decode(row["input_ids"]) == f"<eos>{turn.statement}\n{end}"


@pytest.mark.parametrize(
    ("prompts", "crossed"),
    [
        ("pqr", ["p c1", "p r1", "q c2", "q r2", "r c0", "r r0"]),
        ("ppqq", ["p c2", "p r2", "p c3", "p r3", "q c0", "q r0", "q c1", "q r1"]),
    ],
)
def test_a_crossed_answer_is_that_of_another_row(prompts, crossed, decoder):
    """And of another prompt, though one's rows are neighbours."""
    tokenizer = workload.load_tokenizer(str(decoder))
    rows = [
        {"prompt": f"{prompt} ", "chosen": f"c{i}", "rejected": f"r{i}"}
        for i, prompt in enumerate(prompts)
    ]
    (batch,) = preferences._Judge(tokenizer, {"test": rows}, 40)._batches("test", "crossed")
    assert tokenizer.batch_decode(batch["input_ids"]) == [f"{pair}<eos>" for pair in crossed]
    answers = [[i for i in row if i != IGNORED] for row in batch["labels"].tolist()]
    assert tokenizer.batch_decode(answers) == [f"{pair[2:]}<eos>" for pair in crossed]


@pytest.mark.parametrize("objective", ["regression", "tokens", "causal", "translation", "reward"])
def test_an_update_of_micro_batches_is_that_of_the_whole_batch(objective, task_of):
    moved = []
    for parts in (1, 2):
        task = task_of(objective, steps=1, batch=8 // parts)
        setup = objectives.prepare(task, 0, Knobs(rate=0.1, optimizer="sgd", clip=0.0))
        setup.trainer.args.gradient_accumulation_steps = parts
        setup.trainer.train()
        moved.append(weights(setup.trainer))
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-6)


def test_known_costs_before_any_update(task_of):
    """A policy is its own reference: log 2 for DPO, one half for KTO."""
    for objective, cost in (("dpo", np.log(2)), ("kto", 0.5)):
        setup = objectives.prepare(task_of(objective), 0, Knobs())
        assert setup.score(setup.trainer, "validation").loss == pytest.approx(cost, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "metric", "rate"),
    [
        ("regression", 0.8, 1e-2),
        ("reward", 0.95, 1e-2),
        ("dpo", 0.95, 1e-2),
        ("tokens", 0.95, 2e-2),
    ],
)
def test_what_can_be_read_off_one_word_is_learned(objective, metric, rate, task_of):
    setup = trained(task_of(objective, steps=40), rate=rate)
    assert setup.score(setup.trainer, "validation").metric > metric


@pytest.mark.parametrize(
    ("objective", "names"),
    [("causal", {"chrF", "distinct-2"}), ("translation", {"chrF", "BLEU"}),
     ("headlines", {"ROUGE-L"})],
)  # fmt: skip
def test_what_a_model_writes_has_marks(objective, names, task_of):
    """In the fields' own ranges; and a comparison goes by the likelihood, one over perplexity."""
    setup = trained(task_of(objective, steps=2), rate=1e-3)
    marks = setup.marks(setup.trainer, "test")
    assert set(marks) == names == set(objectives.CARDS[objective].marks)
    assert all(0 <= mark <= 100 for mark in marks.values())
    cost, metric = setup.score(setup.trainer, "test")
    assert metric == pytest.approx(np.exp(-cost))


def test_the_arguments_are_those_of_the_knobs(task_of):
    task = task_of("regression", steps=10)
    knobs = Knobs(3e-4, "constant", 0.2, "sgd", weight_decay=0.1, clip=0.5)
    trainer = objectives.prepare(task, 0, knobs).trainer
    trainer.create_optimizer_and_scheduler(10)
    group = trainer.optimizer.param_groups[0]
    assert type(trainer.optimizer).__name__ == "SGD"
    assert (group["momentum"], group["weight_decay"]) == (0.9, 0.1)
    rates = []
    for _ in range(4):
        rates.append(group["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([0.0, 1.5e-4, 3e-4, 3e-4])
    assert trainer.args.max_grad_norm == 0.5
    assert objectives.arguments(task, 0, knobs, max_steps=7)["max_steps"] == 7


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda texts: None, "returned None"),
        (lambda texts: [None] * len(texts), "return a number for each text"),
        (lambda texts: [float("nan")] * len(texts), "nan is out of range"),
        (lambda texts: [0.5], "1 numbers for 2 texts"),
        (lambda texts: [1.5] * len(texts), "1.5 is out of range"),
    ],
)
def test_a_bad_reward_is_refused_before_the_run(returned, said, task_of):
    def paid(completions, **_):
        return returned(completions)

    with pytest.raises(BadInput, match=f"grpo: reward paid: .*{said}"):
        writing.grpo(task_of("grpo"), 0, Knobs(), judge=paid)


def test_a_reward_that_turns_bad_ends_the_run(task_of):
    def paid(completions, **_):
        return [0.5] * len(completions) if len(completions) == 2 else [float("inf")]

    setup = writing.grpo(task_of("grpo"), 0, Knobs(), judge=paid)
    with pytest.raises(BadInput, match="grpo: reward paid: returned 1 numbers for 8"):
        setup.trainer.train()


def test_kindness_is_the_mean_rating_of_the_words():
    assert writing.kindness(["Good cat", "bad", "zzz good", ""]) == [1.0, 0.0, 0.75, 0.5]


def test_a_batch_that_no_group_fills_is_refused(task_of):
    with pytest.raises(BadInput, match="batch: 6 is no multiple of the 4 completions"):
        objectives.prepare(task_of("grpo", batch=6), 0, Knobs())


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("objective", "rows", "said"),
    [
        ("regression", [{"text": "a", "scores": [5]}], "line 1: has a score outside -4 to 4"),
        ("regression", [{"text": "a", "scores": [10**400]}], "has a score outside -4 to 4"),
        ("regression", [{"text": "a", "scores": [float("nan")]}], "has a score outside -4 to 4"),
        ("regression", [{"text": "a", "scores": []}], "line 1: has no text or no score"),
        ("regression", [{"text": "a", "scores": "4"}], "scores: missing or of the wrong type"),
        ("dpo", [PAIR | {"rejected": "a"}], "line 1: is a tie, which prefers nothing; remove it"),
        ("dpo", [PAIR, PAIR | {"chosen": " "}], "line 2: has an empty answer"),
        ("reward", [], "file: holds no rows; give one JSON object a line"),
        ("kto", [{"prompt": "p"}], "line 1: chosen: missing or of the wrong type"),
        ("reward", [PAIR], "no rows are left for this split; give more"),
        ("tokens", [{"words": ["a"], "tags": []}], "has 1 words and 0 tags"),
        ("sft", [{"statement": "a", "reply": ""}], "has an empty text"),
        ("causal", [["a"]], "line 1: is not a JSON object; give one with text"),
        ("dpo", [PAIR, PAIR | {"prompt": "\ud800"}], "line 2: is not valid Unicode; repair"),
        ("tokens", [{"words": ["\ud800"], "tags": ["n"]}], "line 1: is not valid Unicode"),
    ],
)
def test_bad_rows_are_refused_in_one_sentence(objective, rows, said, task_of):
    with pytest.raises(BadInput, match=said) as caught:
        objectives.load(task_of(objective, rows))
    assert "\n" not in str(caught.value)


def test_a_line_ends_at_a_newline_alone(task_of, tmp_path):
    """JSON leaves other separators of lines unescaped."""
    found = [f"a{number}\u2028b\u2029c\x85d" for number in range(64)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in found]
    path = tmp_path / "marks.jsonl"
    path.write_bytes("\r\n".join([*lines, ""]).encode())
    task = replace(task_of("causal", dataset=str(path)), rows=64)
    rows = objectives.load(task).rows
    assert sum(map(len, rows.values())) == 64


def test_a_long_prompt_leaves_room_for_the_answers(task_of):
    rows = [row | {"prompt": f"{row['prompt']} {'why ' * 40}"} for row in made_up("reward")]
    setup = objectives.prepare(task_of("reward", rows), 0, Knobs())
    pairs = [(row["chosen_ids"], row["rejected_ids"]) for row in setup.trainer.train_dataset]
    assert len(pairs) == setup.rows == 32
    assert all(chosen != rejected for chosen, rejected in pairs)
    assert max(len(ids) for pair in pairs for ids in pair) <= 40


@pytest.mark.parametrize("objective", ["reward", "dpo", "kto"])
def test_answers_that_are_cut_alike_are_no_pairs(objective, task_of, tmp_path):
    def named(name, rows):
        return task_of(objective, dataset=written(rows, tmp_path / f"{name}.jsonl"))

    good = made_up(objective, 96)
    alike = [row | {"chosen": "a" * 60 + "c", "rejected": "a" * 60 + "r"} for row in good]
    some = named("some", good[:72] + alike[72:])
    kept = [row for row in objectives.load(some).rows["train"] if len(row.chosen) < 60]
    assert 8 <= len(kept) < 32
    sides = 2 if objective == "kto" else 1
    assert objectives.prepare(some, 0, Knobs()).rows == sides * len(kept)
    said = "max_length: of 32 pairs of train, the answers of {} differ in what 40 tokens"
    with pytest.raises(BadInput, match=said.format(0)):
        objectives.prepare(named("all", alike), 0, Knobs())
    with pytest.raises(BadInput, match=said.format("[1-7]")):  # less than a batch
        objectives.prepare(named("few", good[:12] + alike[12:]), 0, Knobs())


def test_rows_and_objective_must_fit(task_of):
    with pytest.raises(BadInput, match="dialogue: dataset: its rows are no Rated; take ratings"):
        objectives.load(Task("dialogue", objective="regression"))
    with pytest.raises(
        UnknownName, match=r"no dataset of examples 'rating'\. Did you mean 'ratings'"
    ):
        objectives.load(Task("rating", objective="regression"))
    with pytest.raises(UnknownName, match="objective"):
        objectives.prepare(Task("trec6"), 0, Knobs())
    with pytest.raises(BadInput, match=r"noise: only for classification; leave it 0\.0"):
        objectives.load(task_of("sft", noise=0.1))
    rows = [{"text": f"a{i}", "scores": [1]} for i in range(64)]
    with pytest.raises(BadInput, match="scores: all training texts are rated alike"):
        objectives.prepare(task_of("regression", rows), 0, Knobs())


def test_a_model_that_cannot_hold_the_text_is_refused(task_of):
    with pytest.raises(BadInput, match="max_length: 65 is longer than the 64 positions"):
        objectives.prepare(task_of("causal", max_length=65), 0, Knobs())


@pytest.mark.parametrize("objective", ["causal", "sft", "grpo"])
def test_an_encoder_is_no_language_model(objective, task_of):
    with pytest.raises(BadInput, match="tiny-32: model: not a decoder; give a causal language mod"):
        objectives.prepare(task_of(objective, model="tiny-32"), 0, Knobs())


def test_data_have_an_identity(task_of, tmp_path):
    task = task_of("tokens")
    data = objectives.load(task)
    assert data.classes == ("animal", "city", "other")
    assert objectives.load(replace(task, rows=16)).fingerprint != data.fingerprint
    firsts = [{row.words for row in data.rows[split]} for split in ("train", "test")]
    assert not firsts[0] & firsts[1]
    assert set(FIELDS) == set(KINDS.values())


def test_shipped_tasks_are_found_by_name():
    assert find("ratings").objective == "regression"
    assert find("dpo", steps=12).steps == 12
    everything = {**TASKS, **objectives.TASKS}
    assert len(everything) == len(TASKS) + len(objectives.TASKS)
    assert {task.objective for task in objectives.TASKS.values()} == set(KINDS)
    assert len({task.name for task in objectives.TASKS.values()}) == len(objectives.TASKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", objectives.TASKS)
def test_a_shipped_task_learns_from_the_fetched_data(name, monkeypatch):
    monkeypatch.undo()  # the real ratings
    setup = objectives.prepare(find(name), 0, Knobs(rate=2e-3))
    before = setup.score(setup.trainer, "validation").loss
    with workload.seeded(0):
        setup.trainer.train()
    assert setup.score(setup.trainer, "validation").loss < before
