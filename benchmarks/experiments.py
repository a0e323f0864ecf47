"""Experiments: how a tuner is best trained, a question at a time.

    python benchmarks/experiments.py [--only NAME ...] [--out DIR] [--seeds N] [--budget 5m]

Every question changes one thing of `BASE`. A variant is trained with several agent seeds for the
same time and steers the same runs: relatives of the tasks for choosing (never held-out ones), from
starting rates up to 1.5 decades off. A command that is repeated goes on where it stopped; figures
go to results/experiments.json, raw outcomes stay in the ledger of DIR. `docs/experiments.md` tells
what was concluded.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from headroom import TRAINED
from numpy.typing import NDArray
from record import merge

from baselines.compare import compare
from baselines.ledger import key_of
from baselines.method import Method
from baselines.schedules import STATIC, Fixed
from envs import reward, workload
from envs.knobs import Knobs
from envs.observe import FEATURES
from envs.task import Task, find, vary
from tuner import sb3, train
from tuner.agent import Normaliser
from tuner.curriculum import TrainConfig
from tuner.evaluate import PolicyMethod

BASE: dict[str, Any] = {
    "agent": "ppo",
    "iterations": 0,
    "workers": 0,
    "surrogate": 0.1,
    "steps": 100,
    "interval": 10,
    "length": 24,
    "horizons": (0.6, 1.0, 1.0, 1.5),
    "multipliers": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    "rollback": False,
    "pack": 8,
    "compile": True,
}
CHOOSING, RELATIVES, JOB_SEEDS = ("nyt", "nyt/tiny-64"), 3, range(4)
WIDER = tuple(f"{name}/tiny-64" for name in TRAINED)
STARTS = 2.0  # runs of a budget: one, and what its validation costs

NAMES = tuple(feature.name for feature in FEATURES)
LOSSES = tuple(
    name
    for name in NAMES
    if name.startswith(("train_", "validation_")) or name in ("gap", "since_best")
)
HISTORY = (
    "train_vs_initial", "train_vs_best", "train_vs_previous", "train_trend", "validation_vs_best",
    "validation_vs_previous", "validation_trend", "since_best", "gradient_vs_median",
    "gradient_cosine", "last_change", "rolled_back",
)  # fmt: skip
WEIGHTS = ("update_ratio", "gradient_vs_median", "clipped", "gradient_cosine")
RULER = ("progress", "schedule", "rate_vs_reference")

survey, above_others = train.survey, sb3.above_others


def hiding(*names: str) -> dict[str, Any]:
    """A variant that does not see some features: to its normaliser they are mute."""

    def hidden(recorder: Any, seed: int) -> Normaliser:
        look = survey(recorder, seed)
        mute = np.isin(NAMES, names)
        return Normaliser(look.mean, np.where(mute, train.MUTE, look.deviation).astype(np.float32))

    return {"tuner.train.survey": hidden}


def in_spreads(
    rewards: NDArray[np.float32], ends: NDArray[np.bool_], group: int
) -> NDArray[np.float32]:
    """As `above_others`, in spreads of a group: every job counts alike (Shao et al. 2024, GRPO)."""
    paid = above_others(rewards, ends, group)
    episode = ends.cumsum(0) - ends
    for first in range(0, paid.shape[1], group):
        part = slice(first, first + group)
        for number in range(int(ends[:, part].sum(0).max(initial=0))):
            mine = ends[:, part] & (episode[:, part] == number)
            paid[:, part][mine] /= max(float(paid[:, part][mine].std()), 1e-3)
    return paid


def plain_log(loss: Any, start: Any) -> Any:
    """As `reward.potential`, without the root: log(start / loss), bounded below likewise."""
    known = np.isfinite(loss) & np.isfinite(start) & (np.asarray(start) > 0)
    fall = np.log(np.where(known, start, 1.0) / np.maximum(np.where(known, loss, 1), reward.LEAST))
    value = np.where(known, np.maximum(fall, -reward.CEILING), -reward.CEILING)
    return value if value.ndim else float(value)


@dataclass(frozen=True)
class Question:
    """One thing that is changed, in one or more ways.

    swaps: by variant, what stands in for a function of the project, by its dotted name.
    """

    asks: str
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    swaps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


QUESTIONS: Mapping[str, Question] = {
    "reach": Question(
        "How far should one decision move the rate?",
        {
            "a decade at most": {"multipliers": (0.1, 0.3, 1.0, 3.0, 10.0)},
            "finer": {"multipliers": (0.03, 0.1, 0.3, 0.6, 1.0, 1.6, 3.0, 10.0, 30.0)},
        },
    ),
    "rollback": Question("Does a tuner that may roll back do better?", {"may": {"rollback": True}}),
    "surrogate": Question(
        "How much of the time should go to simulated runs?",
        {"none": {"surrogate": 0.0}, "two fifths": {"surrogate": 0.4}},
    ),
    "curriculum": Question(
        "When should a wider encoder come?",
        {"at last": {"larger": WIDER, "last": 0.2}, "all along": {"tasks": (*TRAINED, *WIDER)}},
    ),
    "instances": Question(
        "Which jobs should it learn from?",
        {"two corpora": {"tasks": ("trec6", "movie")}, "no relatives": {"vary": False}},
    ),
    "observation": Question(
        "Which part of the observation does it need?",
        swaps={
            "no ruler": hiding("rate_vs_reference"),
            "no losses": hiding(*LOSSES),
            "no history": hiding(*HISTORY),
            "no gradients": hiding(*WEIGHTS),
            "ruler alone": hiding(*(name for name in NAMES if name not in RULER)),
        },
    ),
    "reward": Question(
        "How should returns of different jobs be weighed?",
        swaps={
            "plain log": {"envs.reward.potential": plain_log},
            "in spreads of the job": {"tuner.sb3.above_others": in_spreads},
        },
    ),
    "groups": Question(
        "Is an episode judged better against others of the same job?",
        {"by itself": {"group": 1}},
    ),
}


def tasks() -> list[Task]:
    """Jobs for choosing: the corpus set apart for it and random relatives, then trained corpora."""
    rng, found = np.random.default_rng(0), list[Task]()
    for name in CHOOSING:
        base = find(name)
        found.append(base)
        while len(found) % (1 + RELATIVES):
            relative = vary(base, workload.load(base).classes, rng)
            if relative not in found:
                found.append(relative)
    return found + [find(name) for name in TRAINED]


def judge(
    methods: Sequence[Method],
    out: Path,
    workers: int = 0,
    seeds: Sequence[int] = JOB_SEEDS,
    read: Callable[[Mapping[str, Any]], float] = lambda trial: trial["test"],
) -> dict[str, np.ndarray]:
    """By method, (jobs x seeds,), of the same runs in the same order: what is read of each.

    read: of the run as it was handed in; its test score.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = compare(
        methods, tasks(), seeds, out / "ledger.sqlite", runs=STARTS, workers=workers, pack=8,
        compiled=True,
    )  # fmt: skip
    scores: dict[str, list[float]] = {}
    for outcome in found:
        scores.setdefault(outcome["method"], []).append(read(outcome["trials"][0]))
    return {name: np.array(values) for name, values in scores.items()}


def learn(
    changes: Mapping[str, Any], swaps: Mapping[str, Any], label: str, budget: str, seed: int,
    out: Path,
) -> PolicyMethod:  # fmt: skip
    """A tuner trained with some of `BASE` changed, and some functions swapped meanwhile."""
    config = TrainConfig.model_validate({**BASE, **changes, "budget": budget, "seed": seed})
    swapped = {"swapped": label} if swaps else {}
    key = key_of(config.model_dump(mode="json") | swapped)[:12]
    with ExitStack() as stack:
        for target, swap in swaps.items():
            stack.enter_context(mock.patch(target, swap))
        return PolicyMethod(train.train(config, out / key), f"{key} {seed}")


def rivals() -> list[Method]:
    """What needs no learning: the user's rate kept, one rate for every job, and one for heads."""
    fixed = [
        Fixed(Knobs(10.0**decades, "linear"), True, f"{decades:+g} decades")
        for decades in (-0.5, -0.25, 0.0)
    ]
    lifted = Fixed(Knobs(10.0**-0.25, "linear", head_rate=10.0), True, "-0.25 decades, head x10")
    return [STATIC["keep"](), *fixed, lifted]


def figures(
    scores: Mapping[str, np.ndarray], groups: Mapping[str, Iterable[str]]
) -> dict[str, Any]:
    """For each variant: its mean test score, agents apart, and how it stands to the base."""
    rows = {}
    for name, members in groups.items():
        mine = np.array([scores[member] for member in members])
        base = np.array([scores[member] for member in groups["base"]])
        gain = mine.mean(0) - base.mean(0)
        error = gain.std(ddof=1) / np.sqrt(len(gain))
        rows[name] = {
            "test": round(float(mine.mean()), 4),
            "agents": [round(float(each.mean()), 4) for each in mine],
            "choosing": round(float(mine[:, : half(mine)].mean()), 4),
            "gain": round(float(gain.mean()), 4),
            "standard_error": round(float(error), 4),
            "better": round(float(((gain > 0) + 0.5 * (gain == 0)).mean()), 3),
        }
    return rows


def half(scores: np.ndarray) -> int:
    """How many of the runs are of the corpus for choosing."""
    return scores.shape[1] * len(CHOOSING) * (1 + RELATIVES) // len(tasks())


def main() -> None:
    """Train what is missing, judge, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--seeds", type=int, default=2, help="agents of each variant")
    parser.add_argument("--budget", default="5m", help="time to train an agent")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(options.seeds)

    def agents(question: Question, label: str) -> list[PolicyMethod]:
        changes, swaps = question.variants.get(label, {}), question.swaps.get(label, {})
        return [learn(changes, swaps, label, options.budget, seed, options.out) for seed in seeds]

    groups = {"base": agents(Question(""), "base")}
    plain = rivals()
    for name in options.only:
        question = QUESTIONS[name]
        mine = {label: agents(question, label) for label in (*question.variants, *question.swaps)}
        every = groups | mine
        scores = judge([*plain, *(agent for part in every.values() for agent in part)], options.out)
        told = figures(
            scores,
            {label: [agent.name for agent in part] for label, part in every.items()}
            | {method.name: [method.name] for method in plain},
        )
        found = {"asks": question.asks, "budget": options.budget, "variants": told}
        merge("experiments", name, found, seeds=list(seeds))
        print(name, question.asks)
        for label, row in told.items():
            print(f"  {label:18} {row}")


if __name__ == "__main__":
    main()
