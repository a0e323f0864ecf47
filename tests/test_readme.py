"""The README's Python runs, and its tree is the disk's."""

import json
import re
from pathlib import Path

import gymnasium
from test_policy import example
from transformers import Trainer, TrainingArguments

from envs import workload
from envs.observe import FEATURES
from envs.task import TASKS
from tuner import TunerCallback, policy
from tuner.apply import TokenDataset

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_tree_is_the_disk():
    tree = README.split("## What is where")[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in tree.strip().splitlines()}
    on_disk = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert named == {name for name in on_disk - {"runs", "build"} if "egg-info" not in name}
    assert not list((ROOT / "mlflow").rglob("*.py"))


def test_the_callback_example_runs(tiny_task, tmp_path, monkeypatch):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    policy.save(example(), tmp_path / "runs/demo/policy.safetensors")
    monkeypatch.chdir(tmp_path)
    load = workload.load(tiny_task())
    arguments = TrainingArguments("out", max_steps=12, report_to="none", disable_tqdm=True,
                                  save_strategy="no", dataloader_pin_memory=False)  # fmt: skip
    trainer = Trainer(load.module(0), arguments, train_dataset=TokenDataset(load.rows["train"]))
    exec(BLOCKS[0], {"trainer": trainer})
    assert trainer.state.global_step == 12
    assert len(Path("out/tuner.jsonl").read_text().splitlines()) >= 3


def test_any_trainer_takes_the_callback_and_is_an_environment(tiny_task, tmp_path):
    load = workload.load(tiny_task())
    rows = {name: TokenDataset(load.rows[name]) for name in ("train", "validation")}

    def my_trainer(seed):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=12, report_to="none", disable_tqdm=True, save_strategy="no",
            dataloader_pin_memory=False, seed=seed, use_cpu=True,
        )  # fmt: skip
        return Trainer(load.module(seed), arguments, train_dataset=rows["train"],
                       eval_dataset=rows["validation"])  # fmt: skip

    names = {"trainer": my_trainer(0), "my_trainer": my_trainer, "TunerCallback": TunerCallback,
             "gym": gymnasium}  # fmt: skip
    exec(BLOCKS[1], names)
    names["trainer"].train()
    lines = [json.loads(x) for x in (tmp_path / "tuner.jsonl").read_text().splitlines()]
    place = [feature.name for feature in FEATURES].index("has_validation")
    assert lines[0]["observation"][place] == 1
    observation, _ = names["env"].reset(seed=0)
    assert names["env"].observation_space.contains(observation)


def test_the_list_of_examples_is_the_disk():
    named = re.findall(r"^- `examples/(\w+)\.py`: ", README, re.M)
    assert sorted(named) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def test_the_search_example_runs(tiny_task, tmp_path, monkeypatch):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    policy.save(example(), tmp_path / "runs/demo/policy.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TASKS, "trec6", tiny_task())
    names = {}
    exec(BLOCKS[2], names)
    trial = names["study"].ask()
    wanted = names["found"][0].rate
    assert trial.suggest_float("learning_rate", 1e-9, 10, log=True) == wanted


def test_the_environment_example_runs():
    names = {}
    exec(BLOCKS[3], names)
    assert names["env"].observation_space.contains(names["observation"])
    assert "Observation:" in names["envs"].env.FineTuneEnv.__doc__
