"""The examples: short, with a --help, in the README's list, and (slowly) run."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NAMES = [path.stem for path in SCRIPTS]
LINES = 60
SHORT = {"causal": "20", "dpo": "20", "kto": "20", "grpo": "10", "judge": "10", "sft": "20",
         "smollm_lora": "2", "translation": "20", "headlines": "20"}  # fmt: skip


def launched(name):
    """The command by which an example is run."""
    if name == "distributed":
        return ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    return ()


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_an_example_is_short_and_adds_one_line(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LINES
    assert f"examples/{path.name}" in text  # its own command
    lines = [line for line in text.splitlines() if "TunerCallback(" in line]
    assert len(lines) == (path.stem != "own_trainer_env")


@pytest.mark.filterwarnings("ignore")  # of the libraries that it imports
@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_an_example_says_what_it_takes(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert "--rate" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(name, tmp_path):
    known = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    steps = ["--steps", SHORT[name]] if name in SHORT else []
    if name == "smollm_lora":
        steps += ["--test-rows", "4"]
    script = str(ROOT / "examples" / f"{name}.py")
    done = subprocess.run(
        [sys.executable, *launched(name), script, *steps], cwd=tmp_path, env=os.environ | known,
        capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for way in ("unsteered", "steered"):
        (found,) = re.findall(rf"^{way}: .*?(-?[\d.]+)", done.stdout, re.MULTILINE)
        assert float(found) > -100
    assert "on 1 processes" not in done.stdout
    assert "the tuner failed" not in done.stderr
    assert "the tuner is off" not in done.stderr
