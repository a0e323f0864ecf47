import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from envs import first, workload

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))  # its scripts are run from their own folder

import cases  # noqa: E402
import claims  # noqa: E402
import harness  # noqa: E402
import inputs  # noqa: E402
import page  # noqa: E402
import record  # noqa: E402
import roofline  # noqa: E402
from harness import Case, Side  # noqa: E402

SEEDS = [0]


def nothing(*_):
    pass


def encoder(width):
    model = copy.deepcopy(workload._encoder(f"tiny-{width}"))
    model.set_attn_implementation("eager")  # the counter does not see the fused one
    first.shorten(model)
    return workload.Classifier(model, torch.nn.Linear(width, inputs.CLASSES), "first")


@pytest.mark.parametrize("width", [32, 64])
def test_counts_of_the_roofline_are_those_of_torch(width):
    module, batch, tokens = encoder(width), 4, 8
    ids = torch.randint(0, 5400, (batch, tokens))
    with FlopCounterMode(display=False) as counter:
        mask, labels = torch.zeros(batch, 1, 1, tokens), torch.zeros(batch, dtype=torch.long)
        module(ids, mask, labels)["loss"].backward()
    assert roofline.arithmetic(width, batch, tokens) == counter.get_total_flops()
    assert roofline.weights(width, 5400) == sum(p.numel() for p in module.parameters())


def test_sides_take_turns_and_a_figure_is_worked_out_within_each_round(monkeypatch):
    ran = []

    def run(side):
        ran.append(side.name)
        slow = 1.0 + len(ran)  # the machine gets slower all the time
        return {"seconds": slow * (3.0 if side.name == "b" else 1.0), "engine": side.name}

    monkeypatch.setattr(harness, "run", run)
    case = Case("x", [Side("a", ""), Side("b", "")], {"ratio": cases.faster("a", "b")})
    found = harness.rounds(case, 2, nothing, nothing)
    assert ran == ["a", "b", "b", "a"]
    told = harness.summary(case, found)
    assert told["figures"]["ratio"]["values"] == [4.5, 2.4]  # 3 x 3/2 and 3 x 4/5
    assert told["figures"]["ratio"]["median"] == 3.45
    assert told["sides"]["b"]["engine"] == "b"
    assert told["sides"]["b"]["seconds"]["median"] == 10.5


def test_a_side_runs_alone_with_one_thread_and_what_breaks_says_where(tmp_path, monkeypatch):
    (tmp_path / "sides.py").write_text(
        "import os, torch\n"
        "def ask(n): return {'threads': torch.get_num_threads(), 'pid': os.getpid(), 'n': n}\n"
        "def fail(): raise ValueError('no such pack')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first = harness.run(Side("ask", "sides:ask", {"n": 7}))
    assert (first["threads"], first["n"]) == (1, 7)
    with pytest.raises(harness.Broken, match=r"lost: sides:fail.*\n(.|\n)*no such pack"):
        harness.run(Side("lost", "sides:fail"))


def test_merging_a_case_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.merge("speed", "b", {"figures": {"n": 1}}, seeds=SEEDS)
    path = record.merge("speed", "a", {"figures": {"n": 2}}, seeds=SEEDS)
    record.merge("speed", "b", {"figures": {"n": 3}}, seeds=SEEDS)
    content = json.loads(path.read_text())
    assert [(name, part["figures"]["n"]) for name, part in content.items()] == [("a", 2), ("b", 3)]
    assert content["a"]["versions"]["torch"] == torch.__version__


def test_every_figure_of_a_case_has_its_claim():
    named = {name for case in cases.cases("python") for name in case.figures}
    assert named <= set(claims.CLAIMS)
    skipped = {case.name for case in cases.cases(None) if case.missing}
    assert "dacbench" in skipped
    assert ("gpu" in skipped) != torch.cuda.is_available()


def test_the_best_pack_is_chosen_within_a_round():
    figure = next(case for case in cases.cases(None) if case.name == "packed").figures
    seconds = {f"pack-32-{n}": 1.0 + abs(n - 16) for n in cases.PACKS}
    results = {name: {"seconds": s} for name, s in seconds.items()}
    assert figure["packed_trainer_32"](results | {"trainer-32": {"seconds": 7.0}}) == 7.0


def test_the_prediction_of_memory_is_judged_at_the_worst_of_all_widths():
    case = next(case for case in cases.cases(None) if case.name == "memory")
    assert {side.arguments["width"] for side in case.sides} == set(cases.WIDTHS)
    results = {side.name: {"megabytes": 100.0, "predicted": 100.0} for side in case.sides}
    assert case.figures["memory"](results) == 0
    worst = next(side.name for side in case.sides if side.arguments["width"] == 64)
    results[worst] = {"megabytes": 80.0, "predicted": 100.0}
    assert case.figures["memory"](results) == pytest.approx(0.2)


def step(engine, runs, seconds, width=32, tokens=16):
    number = {"median": seconds, "quartiles": [seconds, seconds], "values": [seconds]}
    return {
        "seconds": number, "engine": engine, "runs": runs, "width": width, "batch": 16,
        "tokens": tokens, "model": f"tiny-{width}", "adapter": "full", "trainable_layers": None,
        "pooling": "first",
    }  # fmt: skip


def test_page_of_nothing_says_so(tmp_path):
    text = page.page({}, tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("| best pack over the trans")]
    assert "at least 6x | not measured" in lines[0]
    assert "against the runs in the pack: not measured" in text
    assert not list(tmp_path.rglob("*.svg"))


def test_page_shows_figures_misses_and_plots(tmp_path):
    low = {"median": 5.0, "quartiles": [4.5, 5.5], "values": [5.0]}
    share = {"median": 0.05, "quartiles": [0.04, 0.06], "values": [0.05]}
    case = {
        "rounds": 1, "load": {"before": 0.1, "after": 0.2},
        "figures": {"packed_trainer_32": low, "ppo_outside": share},
        "sides": {"t": step("Trainer", 1, 4e-3), "p1": step("Pack", 1, 3e-3),
                  "p8": step("Pack", 8, 1e-3)},
        **record.provenance(SEEDS),
    }  # fmt: skip
    text = page.page({"packed": case}, tmp_path)
    assert "**5x (4.5 to 5.5): missed**" in text
    assert "| at most 15 % | 5.0 % (4.0 to 6.0) |" in text
    assert "| Pack | 8 | tiny-32 | all | 16 x 16 | first | 1 (1 to 1) |" in text
    drawn = sorted(path.name for path in tmp_path.rglob("*.svg"))
    assert drawn == ["pack-size.svg"]  # one width and one length make no line
    again = (tmp_path / "performance" / "pack-size.svg").read_bytes()
    page.page({"packed": case}, tmp_path)
    assert (tmp_path / "performance" / "pack-size.svg").read_bytes() == again
    assert page.fastest({"packed": case}, 32, "Pack") == 1e-3


def test_page_says_how_far_memory_is_from_the_prediction(tmp_path):
    side = {"width": 64, "runs": 4, "megabytes": {"median": 33.0}, "predicted": {"median": 30.0}}
    text = page.memory({"memory": {"sides": {"memory-64-4": side}}})
    assert "| 64 | 4 | 33.0 | 30.0 | +10.0 % |" in text
