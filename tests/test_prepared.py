"""``steersman apply`` on another objective: its own Trainer, steered, beside the same unsteered."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_adapter_scale import stub
from test_cli import policy_file, run  # noqa: F401  (fixtures)
from test_objectives import PAIR, decoder, made_up, task_of, written  # noqa: F401  (likewise)
from transformers import Trainer

from envs import objectives
from envs.errors import BadInput
from envs.job import Score
from envs.knobs import Knobs
from envs.observe import FEATURES
from envs.task import OBJECTIVE_TASKS, Task
from tuner.apply import steer_trainer
from tuner.folder import _steered
from tuner.prepared import Keeper
from tuner.settings import ApplyConfig

pytest.importorskip("trl")

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL's own
FEW = ("--threads", "1", "--mode", "explore", "--rate", "1e-3", "--steps", "12")


def enough(task_of, objective):  # noqa: F811
    """A tiny task with as many rows as the policy has ever seen."""
    return replace(task_of(objective, made_up(objective, 500), steps=12), rows=200)


def test_a_preference_job_is_steered_and_judged(
    run, task_of, monkeypatch, tmp_path  # noqa: F811
):  # fmt: skip
    task = enough(task_of, "dpo")
    monkeypatch.setitem(OBJECTIVE_TASKS, "dpo", task)
    command = ("apply", "default", "--task", "dpo", *FEW, "--out", tmp_path / "out")
    code, out, err = run(*command, "--keep")
    assert code == 0, err
    assert "test pairs in the right order" in out
    (folder,) = (tmp_path / "out" / "steered").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert folder.name.startswith("dpo-")
    assert summary["metric"] == "pairs in the right order"
    # The unsteered run is the task's own Trainer at that rate; the steered one is not.
    plain = objectives.prepare(replace(task, interval=1), 0, Knobs(rate=1e-3))
    plain.trainer.train()
    score = plain.score(plain.trainer, "test")
    assert summary["keep"]["final"]["test"] == pytest.approx(score.metric)
    kept, steered = summary["keep"]["final"], summary["final"]
    assert kept["validation_loss"] == pytest.approx(plain.score(plain.trainer, "validation").loss)
    assert steered["validation_loss"] != kept["validation_loss"]
    lines = (folder / "audit.jsonl").read_text().splitlines()
    decisions = [json.loads(line) for line in lines]
    assert [each["step"] for each in decisions] == list(range(len(decisions)))
    assert decisions[0]["applied"]["multiplier"] > 1
    place = [feature.name for feature in FEATURES].index("has_validation")
    assert all(each["observation"][place] == 1 for each in decisions)
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve] == list(range(1, 13))
    assert curve[1]["rate"] > 1e-3
    assert (folder / "model" / "model.safetensors").is_file()
    assert run(*command, "--keep")[0] == 0  # repeated: done before
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_the_best_weights_of_several_runs_are_kept(
    run, task_of, monkeypatch, tmp_path  # noqa: F811
):  # fmt: skip
    task, read = enough(task_of, "dpo"), []
    monkeypatch.setitem(OBJECTIVE_TASKS, "dpo", task)
    real = objectives.prepare

    def prepare(*words):
        setup = real(*words)

        def score(trainer, split):
            read.append(split)
            return setup.score(trainer, split)

        return replace(setup, score=score)

    monkeypatch.setattr(objectives, "prepare", prepare)
    command = ("apply", "default", "--task", "dpo", *FEW)
    code, out, err = run(*command, "--trials", "2", "--out", tmp_path / "best")
    assert code == 0, err
    assert out.count("selection pairs in the right order") == 2
    assert read.count("test") == 1  # of the one chosen
    (folder,) = (tmp_path / "best" / "steered").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    trials = summary["trials"]
    chosen = trials[summary["chosen"] - 1]
    assert chosen["selection"] == max(trial["selection"] for trial in trials)
    assert trials[1]["start_rate"] != trials[0]["start_rate"]
    assert run(*command, "--trials", "2", "--out", tmp_path / "best")[0] == 0  # done before
    assert not list(folder.glob("trial-*/*.safetensors")), "kept twice"
    # What is kept is the checkpoint that was judged best, and test is that model's.
    setup = real(replace(task, interval=1), 0, Knobs())
    weights = load_file(folder / "model" / "model.safetensors")
    assert not setup.trainer.model.load_state_dict(weights, strict=False).unexpected_keys
    kept = setup.score(setup.trainer, "selection")
    assert kept.metric == pytest.approx(chosen["selection"])
    assert kept.loss == pytest.approx(chosen["selection_loss"], rel=1e-5)
    assert setup.score(setup.trainer, "test").metric == summary["final"]["test"]
    # To be judged on the way changes nothing of a run.
    assert run(*command, "--out", tmp_path / "plain")[0] == 0
    (plain,) = (tmp_path / "plain" / "steered").iterdir()
    for name in ("curve.jsonl", "audit.jsonl"):
        assert (folder / "trial-1" / name).read_text() == (plain / name).read_text()


def test_a_disk_that_is_full_is_told_in_one_line_and_the_trial_is_made_again(
    run, task_of, monkeypatch, tmp_path  # noqa: F811
):  # fmt: skip
    monkeypatch.setitem(OBJECTIVE_TASKS, "dpo", enough(task_of, "dpo"))
    command = ("apply", "default", "--task", "dpo", *FEW, "--trials", "2", "--out", tmp_path)

    def full(trainer, folder):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as now:
        now.setattr(Trainer, "save_model", full)
        code, _, err = run(*command)
    assert (code, err.count("\n")) == (1, 1)
    assert "trial-1: a checkpoint cannot be written: I/O error: No space left" in err
    code, out, err = run(*command)
    assert code == 0, err
    assert out.count("selection pairs in the right order") == 2


def test_weights_kept_on_the_way_know_nothing_of_a_scaling(tmp_path):
    policy = stub("keep")
    config = ApplyConfig(task="bbc/tiny-32", adapter="lora", trials=2)
    with pytest.raises(BadInput, match="trials: 2 with a policy that turns LoRA's scaling"):
        steer_trainer(policy, config, tmp_path, lambda *_: None)
    assert not list(tmp_path.iterdir())


RATED = {"text": "a", "scores": [5]}
LONG = [
    PAIR | {"prompt": str(n), "chosen": "a" * 99 + "b", "rejected": "a" * 99} for n in range(99)
]


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        ([RATED], "--objective regression", "line 1: has a score outside -4 to 4; rescale"),
        ([PAIR, PAIR | {"chosen": "b"}], "--objective dpo", "line 2: is a tie, which prefers"),
        ([PAIR | {"chosen": " "}], "--objective kto", "line 1: has an empty answer; remove it"),
        ([], "--objective reward", "file: holds no rows; give one JSON object a line"),
        ([RATED], "--objective dpo", "line 1: prompt: missing or of the wrong type; give prompt, "),
        (LONG, "--objective reward --batch 4", "max_length: of 66 pairs of train, the answers of"),
        (LONG, "--objective dpo --batch 4 --max-length 1", "what 1 tokens leave of them; raise it"),
        ([PAIR] * 9, "--objective dpo", "no rows are left for this split; give more"),
        ([PAIR], "--objective dpi", "--objective: no value 'dpi'. Did you mean 'dpo'?"),
        ([PAIR], "--objective own", "--objective: no value 'own'."),
        ([PAIR], "--objective dpo --text review", "apply: text: 'review' for dpo, whose fields"),
        ([PAIR], "--objective dpo --model tiny-33", "Did you mean 'tiny-32'?"),
        ([PAIR], "--objective dpo --task kto", "apply: objective: dpo for kto, which is for kto"),
        ([PAIR], "--objective dpo --task bbc", "dpo for bbc, which is for classification"),
        ([PAIR], "--objective dpo --task my.csv", "my.csv: dataset: not .jsonl; give JSON lines"),
        ([PAIR], "--objective dpo --task no.jsonl", "no.jsonl: file: not found"),
    ],
)
def test_own_data_that_cannot_be_used_are_refused_in_one_sentence(
    run, policy_file, tmp_path, rows, words, said  # noqa: F811
):  # fmt: skip
    own = ("--task", written(rows, tmp_path / "own.jsonl"), *words.split())
    code, _, err = run("apply", policy_file, *own, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert said in err
    assert not (tmp_path / "out" / "steered").exists()


def test_own_data_are_steered_like_the_task_of_their_objective(run, tmp_path):  # noqa: F811
    for name, task in OBJECTIVE_TASKS.items():
        config = ApplyConfig(task="own.jsonl", objective=task.objective)
        assert config.job() == replace(task, dataset="own.jsonl")
        assert ApplyConfig(task=name, objective=task.objective).job() == task
    assert ApplyConfig(task="a.csv").job() == Task("a.csv")
    assert ApplyConfig(task="a.csv", objective="classification", text="b").job().text == "b"
    path = written(made_up("dpo", 200), tmp_path / "own.jsonl")
    few = ("--rows", "100", "--max-length", "40", "--out", tmp_path / "out")
    code, out, err = run("apply", "default", "--task", path, "--objective", "dpo", *FEW, *few)
    assert code == 0, err
    assert "test pairs in the right order" in out
    (folder,) = (tmp_path / "out" / "steered").iterdir()
    assert folder.name == "dpo-own-tiny-gpt-32-0"
    assert (folder / "model" / "model.safetensors").is_file()
    assert (folder / "audit.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(OBJECTIVE_TASKS) - {"dpo"}))
def test_every_objective_is_steered(run, name, task_of, monkeypatch, tmp_path):  # noqa: F811
    objective = OBJECTIVE_TASKS[name].objective
    monkeypatch.setitem(OBJECTIVE_TASKS, name, enough(task_of, objective))
    code, out, err = run("apply", "default", "--task", name, *FEW, "--out", tmp_path / "out")
    assert code == 0, err
    assert f"test {objectives.CARDS[objective].metric}" in out
    (folder,) = (tmp_path / "out" / "steered").iterdir()
    assert (folder / "audit.jsonl").read_text()


def test_marks_are_given_once_and_to_the_trained_model(
    run, task_of, monkeypatch, tmp_path  # noqa: F811
):  # fmt: skip
    task, given = enough(task_of, "regression"), []
    real = objectives.prepare

    def prepare(*words):
        def marks(trainer, split):
            given.append((split, trainer.state.global_step))
            return {"style": len(given) + 0.25, "wit": 7.0}

        return replace(real(*words), marks=marks)

    monkeypatch.setitem(OBJECTIVE_TASKS, "ratings", task)
    monkeypatch.setattr(objectives, "prepare", prepare)
    words = ("--task", "ratings", *FEW, "--keep", "--out", tmp_path / "out")
    code, out, err = run("apply", "default", *words)
    assert code == 0, err
    assert given == [("test", 12)] * 2
    lines = out.splitlines()
    steered = next(at for at, line in enumerate(lines) if line.startswith("steered  "))
    told = [lines[steered + 1].strip(), lines[steered + 3].strip()]
    assert told == [f"what it writes on test: style {n}.25, wit 7" for n in (2, 1)]
    (folder,) = (tmp_path / "out" / "steered").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["final"]["marks"] == {"style": 2.25, "wit": 7.0}
    assert summary["keep"]["final"]["marks"] == {"style": 1.25, "wit": 7.0}
    (item,) = _steered(folder)
    assert ("final.style", 2.25, 0) in item.numbers
    assert run("apply", "default", *words)[1].count("style") == 2  # repeated: nothing anew
    assert len(given) == 2


def test_what_a_translator_writes_is_marked(run, task_of, monkeypatch, tmp_path):  # noqa: F811
    pytest.importorskip("sacrebleu")
    task = enough(task_of, "translation")
    monkeypatch.setitem(OBJECTIVE_TASKS, "verses", task)
    words = ("--task", "verses", *FEW, "--keep", "--out", tmp_path / "out")
    code, out, err = run("apply", "default", *words)
    assert code == 0, err
    assert (out.count("chrF"), out.count("BLEU")) == (2, 2)
    (folder,) = (tmp_path / "out" / "steered").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    plain = objectives.prepare(replace(task, interval=1), 0, Knobs(rate=1e-3))
    plain.trainer.train()
    kept, steered = summary["keep"]["final"]["marks"], summary["final"]["marks"]
    assert kept == pytest.approx(plain.marks(plain.trainer, "test"))
    assert set(steered) == set(objectives.CARDS["translation"].marks)


def test_running_statistics_are_kept_with_the_weights():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    scored = iter([0.5, 0.9])
    setup = SimpleNamespace(
        trainer=SimpleNamespace(model=model), score=lambda *_: Score(next(scored), 0.0)
    )
    keeper = Keeper(setup, 1)
    for step in (1, 2):
        model(step + torch.randn(8, 3))
        keeper.on_step_end(None, SimpleNamespace(global_step=step, max_steps=2), None)
        if step == 1:
            kept = model[0].running_mean.clone()
    keeper.put()
    assert torch.equal(model[0].running_mean, kept)
