"""What the environment costs: a step over the bare loop, a reset, and a policy's decision.

    python benchmarks/env_overhead.py [--repeats 15]

A run of `FineTuneEnv` is compared with the same fine-tuning as a plain PyTorch loop: the same
module, batches, rates, clipping, fused AdamW, and evaluations. The two take turns in one
process, so that a busy machine slows both; their final weights are checked to be equal. Times
are of the processor (`time.process_time`) and of the wall clock; a ratio is the median over
pairs. Needs no fetched data.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record
from torch import nn

from envs import workload
from envs.env import FineTuneEnv
from envs.job import TorchJob
from envs.knobs import Actions
from envs.observe import FEATURES, SIZE, observe
from envs.task import Task
from tuner import policy
from tuner.policy import Policy

STEPS, INTERVAL, BATCH, RATE = 100, 10, 16, 2e-3
BARS = {"step_ratio": 1.02, "reset_ms": 20.0}


def write_data(path: Path, rows: int = 1800) -> Path:
    """Rows of twelve common words, of which three tell the class."""
    rng = np.random.default_rng(0)
    groups = (["horse", "river", "forest"], ["money", "market", "price"], ["music", "art", "poem"])
    filler = ["the", "a", "of", "and", "in", "to", "was", "it", "that", "he", "she", "with"]
    texts: dict[str, int] = {}
    while len(texts) < rows:
        label = len(texts) % 3
        words = [*rng.choice(groups[label], 3), *rng.choice(filler, 9)]
        texts[" ".join(rng.permutation(words))] = label
    lines = [f"{text},class{label}" for text, label in texts.items()]
    path.write_text("\n".join(["text,label", *lines]))
    return path


def bare(task: Task, seed: int, rate: float) -> torch.Tensor:
    """The fine-tuning of one episode that keeps its rate, written as anybody would."""
    order, head, _ = (int(x) for x in np.random.SeedSequence(seed).generate_state(3))
    load = workload.load(task)
    module = load.module(head)
    train, validation = load.rows["train"], load.rows["validation"]
    decayed = [p for p in module.parameters() if p.ndim >= 2]
    plain = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": plain}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: max(0.0, 1 - s / task.steps))
    generator = torch.Generator().manual_seed(order)
    batches: list[torch.Tensor] = []
    evaluate(module, validation)
    for step in range(1, task.steps + 1):
        module.train()
        if not batches:
            permutation = torch.randperm(len(train), generator=generator)
            batches = [b for b in permutation.split(task.batch) if len(b) == task.batch]
        index = batches.pop(0)
        length = train.lengths[index].max()
        loss = module(train.ids[index, :length], train.mask[index, :length], train.labels[index])
        loss["loss"].backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % task.interval == 0:
            evaluate(module, validation)
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def evaluate(module: nn.Module, rows: workload.Tokens) -> tuple[float, float]:
    """Mean loss and accuracy."""
    module.eval()
    loss, right = 0.0, 0.0
    with torch.inference_mode():
        for start in range(0, len(rows), 128):
            part = slice(start, start + 128)
            length = rows.lengths[part].max()
            labels = rows.labels[part]
            result = module(rows.ids[part, :length], rows.mask[part, :length], labels)
            loss += result["loss"].item() * len(labels)
            right += (result["logits"].argmax(-1) == labels).sum().item()
    return loss / len(rows), right / len(rows)


def steered(env: FineTuneEnv, seed: int) -> tuple[torch.Tensor, float]:
    """An episode that keeps its rate: the final weights, and the rate."""
    _, info = env.reset(seed=seed, options={"rate": RATE})
    over = False
    while not over:
        *_, over, _, info = env.step(env.actions.keep)
    assert env._job is not None
    return torch.cat([part.reshape(-1) for part in env._job.snapshot()]), info["rate"]


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the processor and of the wall clock."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.process_time() - cpu, time.perf_counter() - wall


def job_seed(env: FineTuneEnv, seed: int) -> int:
    """The seed that an episode's job gets from the environment's."""
    seeds: list[int] = []
    make, env._make_job = env._make_job, lambda t, s, k: seeds.append(s) or make(t, s, k)
    env.reset(seed=seed, options={"rate": RATE})
    env._make_job = make
    return seeds[0]


def steps(task: Task, repeats: int) -> dict[str, Any]:
    """(a) Whole runs: the environment's over the bare loop's."""
    env = FineTuneEnv(task)
    inner = job_seed(env, 0)
    weights, rate = steered(env, 0)
    equal = torch.equal(weights, bare(task, inner, rate))
    pairs = []
    for turn in range(repeats):
        both = {"env": lambda: steered(env, 0), "bare": lambda: bare(task, inner, rate)}
        order = list(both) if turn % 2 else list(reversed(both))
        times = {name: timed(both[name]) for name in order}
        pairs.append((times["env"], times["bare"]))
    result: dict[str, Any] = {"equal_weights": equal}
    for clock, name in enumerate(("cpu", "wall")):
        ratios = [env[clock] / bare[clock] for env, bare in pairs]
        quarters = statistics.quantiles(ratios, n=4)
        result[f"ratio_{name}"] = round(quarters[1], 4)
        result[f"ratio_{name}_quartiles"] = [round(quarters[0], 4), round(quarters[2], 4)]
        result[f"bare_run_ms_{name}"] = median_ms(bare[clock] for _, bare in pairs)
    return result


def over_bare(pairs: int = 10) -> dict[str, Any]:
    """The ratio alone, for `speed.py`: processor time of an environment's run over the bare one."""
    with tempfile.TemporaryDirectory() as folder:
        data = str(write_data(Path(folder) / "words.csv"))
        task = Task(data, steps=STEPS, interval=INTERVAL, batch=BATCH)
        found = steps(task, pairs)
        size = sum(p.numel() for p in workload.load(task).module(0).parameters())
    return {
        "ratio": found["ratio_cpu"], "ratio_wall": found["ratio_wall"],
        "bare_ms_an_update": found["bare_run_ms_cpu"] / STEPS,
        "equal_weights": found["equal_weights"], "model": "tiny-32", "parameters": size,
        "updates": STEPS, "updates_a_step": INTERVAL, "batch": BATCH, "tokens": task.max_length,
        "evaluated_rows_a_step": task.validation_rows, "pairs": pairs,
    }  # fmt: skip


def resets(task: Task, repeats: int) -> dict[str, Any]:
    """(b) Pretrained weights in place, a new head, a new order; then with the first evaluation."""
    opened = [timed(lambda seed=seed: TorchJob(task, seed)) for seed in range(repeats)]
    result: dict[str, Any] = {}
    for clock, kind in enumerate(("cpu", "wall")):
        result[f"reset_ms_{kind}"] = median_ms(t[clock] for t in opened)
    for name, vary in (("with_evaluation", False), ("with_evaluation_varied", True)):
        env = FineTuneEnv(task, vary=vary)
        env.reset(seed=0)
        times = [timed(env.reset) for _ in range(repeats)]
        for clock, kind in enumerate(("cpu", "wall")):
            result[f"{name}_ms_{kind}"] = median_ms(t[clock] for t in times)
    return result


def decisions(task: Task, repeats: int) -> dict[str, Any]:
    """(c) What a decision takes: the observation of the longest history, and the policy's act."""
    learned = random_policy(64)
    env = FineTuneEnv(task)
    steered(env, 0)
    history, context = env.history, env.context
    observation = observe(history, context)
    return {
        "observe_ms_wall": median_ms(
            timed(lambda: observe(history, context))[1] for _ in range(repeats)
        ),
        "act_ms_wall": median_ms(
            timed(lambda: learned.act(observation))[1] for _ in range(repeats)
        ),
    }


def random_policy(width: int) -> Policy:
    """Two hidden layers of that width, the size that PPO trains here."""
    actions, rng = Actions(), np.random.default_rng(0)
    layers = [SIZE, width, width, actions.size]
    arrays = {}
    for i, (inward, outward) in enumerate(pairwise(layers)):
        arrays[f"layer{i}.weight"] = rng.normal(0, 0.1, (outward, inward)).astype(np.float32)
        arrays[f"layer{i}.bias"] = np.zeros(outward, np.float32)
    numbers = {"mean": 0.0, "deviation": 1.0, "low": -5.0, "high": 5.0}
    return policy.make(
        arrays=arrays,
        algorithm="ppo",
        features=[feature._asdict() | numbers for feature in FEATURES],
        network={"kind": "mlp", "layers": layers, "activation": "tanh"},
        actions=actions,
        decisions=10,
        start_decades=1.5,
        provenance={},
    )


def median_ms(seconds: Any) -> float:
    """Median, in ms."""
    return round(1000 * statistics.median(seconds), 3)


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="pairs of runs, and 4 x resets")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = str(write_data(Path(folder) / "words.csv"))
        task = Task(data, steps=STEPS, interval=INTERVAL, batch=BATCH)
        figures = {
            "bars": BARS,
            "task": {"steps": STEPS, "interval": INTERVAL, "batch": BATCH, "rows": task.rows,
                     "validation_rows": task.validation_rows, "tokens": task.max_length},
            "step": {"model": "tiny-32", "pairs": repeats, **steps(task, repeats)},
            "reset": {
                "model": "tiny-64",
                "resets": 4 * repeats,
                **resets(replace(task, model="tiny-64"), 4 * repeats),
            },
            "decision": {"layers": [SIZE, 64, 64], **decisions(task, 1000)},
        }  # fmt: skip
    figures["passed"] = (
        figures["step"]["ratio_cpu"] <= BARS["step_ratio"]
        and figures["reset"]["reset_ms_cpu"] <= BARS["reset_ms"]
        and figures["step"]["equal_weights"]
    )
    print(json.dumps(figures, indent=2))
    print(record("env_overhead", figures, seeds=[0]))


if __name__ == "__main__":
    main()
