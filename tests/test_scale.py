"""A single job at scale: processes, accumulation, bf16 and shards make no other decisions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--num_cpu_threads_per_process", "1")  # fmt: skip
HERE = Path(__file__).parent
SHARDS = {
    "kind": "llama", "micro": 4, "fsdp": True,
    "fsdp_config": {
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": False,
    },
}  # fmt: skip


def launch(folder, *runs, by=TORCHRUN):
    """Each run's findings of both processes: (name, options) -> [rank 0's, rank 1's]."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *by, str(HERE / "ranks.py"), str(folder), json.dumps(runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for name, options in runs:
        files = [folder / name / f"rank{r}-{options.get('resume', 0)}.pt" for r in (0, 1)]
        found.append([torch.load(file, weights_only=False) for file in files])
    return found, done.stderr


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def same(two, one):
    """Two processes, bit for bit the same, did what one process does on the whole batch."""
    first, second = two
    assert equal(first["weights"], second["weights"])
    assert first["rates"] == second["rates"] == one["rates"]
    assert len(first["seen"]) == len(one["seen"]) == 10
    assert len(second["seen"]) == 0
    np.testing.assert_allclose(first["seen"], one["seen"], atol=1e-3)
    np.testing.assert_allclose(first["logs"], one["logs"], rtol=1e-4)
    for a, b in zip(first["weights"], one["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def turns_in(log):
    lines = map(json.loads, log.read_text().splitlines())
    return [tuple(turn) for line in lines for turn in line["applied"].get("turns", ())]


def resumed(whole, again, at):
    assert again["rates"] == whole["rates"][at:]
    assert equal(again["weights"], whole["weights"])
    known = len(whole["seen"]) - len(again["seen"])
    np.testing.assert_array_equal(again["seen"], whole["seen"][known:])


def test_two_processes_are_one_with_the_same_batch(tmp_path):
    """Also where the model divides by the tokens of all processes and micro-batches."""
    runs = (
        ("bert", {"micro": 4}),
        ("llama", {"kind": "llama", "micro": 2, "accumulation": 2}),
        ("outside", {"micro": 4, "given": True}),
        ("scaling", {"micro": 4, "scaling": True}),
        ("broken", {"micro": 4, "broken": 7}),
    )
    (bert, llama, outside, scaling, broken), errors = launch(tmp_path, *runs)
    same(bert, ranks.run(tmp_path / "one"))
    same(llama, ranks.run(tmp_path / "big", kind="llama"))
    same(outside, ranks.run(tmp_path / "outside one", given=True))
    same(scaling, ranks.run(tmp_path / "scaling one", scaling=True))
    turned = [turns_in(tmp_path / name / "tuner.jsonl") for name in ("scaling", "scaling one")]
    assert turned[0] == turned[1]
    assert [name for name, _ in turned[0]] == ["adapter_scale"] * 5
    assert len(set(bert[0]["rates"])) == ranks.STEPS
    # What breaks on one process switches the tuner off on both, at the next decision.
    plain = ranks.run(tmp_path / "plain", plain=True)
    assert broken[0]["rates"] == broken[1]["rates"]
    assert broken[0]["rates"][:8] == bert[0]["rates"][:8]
    assert broken[0]["rates"][8:] == plain["rates"][8:]
    assert equal(broken[0]["weights"], broken[1]["weights"])
    assert "another process failed" in broken[0]["off"]
    assert "no memory here" in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "by"),
    [({"micro": 4}, TORCHRUN), (SHARDS, TORCHRUN), ({"micro": 4}, ACCELERATE)],
    ids=["ddp", "fsdp", "accelerate launch"],
)
def test_two_processes_resume_exactly(tmp_path, options, by):
    """In the middle of an interval, after a rollback; with weights in shards as well."""
    saved = options | {"save": 13}
    runs = ("run", saved), ("run", saved | {"resume": 13})
    (whole, again), _ = launch(tmp_path, *runs, by=by)
    kind = options.get("kind", "bert")
    same(whole, ranks.run(tmp_path / "one", kind=kind))
    for one, other in zip(whole, again, strict=True):
        assert one["sharded"] == ("fsdp" in options)
        resumed(one, other, 13)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_accumulation_makes_no_other_decisions_and_resumes_exactly(tmp_path, kind):
    one = ranks.run(tmp_path / "one", kind=kind)
    options = {"kind": kind, "micro": 2, "accumulation": 4, "save": 13}
    many = ranks.run(tmp_path / "many", **options)
    assert many["rates"] == one["rates"]
    np.testing.assert_allclose(many["seen"], one["seen"], atol=1e-3)
    np.testing.assert_allclose(many["logs"], one["logs"], rtol=1e-4)
    resumed(many, ranks.run(tmp_path / "many", **options, resume=13), 13)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_bf16_decides_alike_and_resumes_exactly(tmp_path, kind):
    one = ranks.run(tmp_path / "one", kind=kind)
    options = {"kind": kind, "bf16": True, "save": 13}
    half = ranks.run(tmp_path / "half", **options)
    assert half["rates"] == one["rates"]
    assert not equal(half["weights"], one["weights"])
    # Losses of three digits: what is a difference of two of them has less.
    np.testing.assert_allclose(half["seen"][:2], one["seen"][:2], atol=0.1)
    np.testing.assert_allclose(half["logs"][:5], one["logs"][:5], rtol=0.05)
    resumed(half, ranks.run(tmp_path / "half", **options, resume=13), 13)
