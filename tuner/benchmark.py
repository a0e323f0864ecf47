"""The benchmark: the suites' comparisons, one after another in folders of their own."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from baselines.ledger import Ledger
from baselines.method import Method
from envs.errors import RunFailed
from envs.files import make_folder
from envs.knobs import Knobs
from tuner.evaluate import (
    LEARNED,
    Tick,
    check,
    learn,
    names_of,
    run_comparison,
    shown,
    size,
)
from tuner.policy import Policy
from tuner.settings import CompareConfig
from tuner.suites import PLAN, Scale, Suite

_FINISHED = "suite"  # in a ledger: what the finished comparison was


def run_benchmark(
    suites: Sequence[Suite],
    policies: list[Policy],
    out: Path,
    tick: Tick,
    *,
    scale: Scale = "full",
    workers: int = 2,
) -> None:
    """Run what the suites' ledgers lack; what is `LEARNED` is found once for all of them.

    A suite in which cells fail does not keep the others from running; `RunFailed` at the end
    tells of the first.
    """
    changes = {"workers": workers}
    configs = [suite.config(scale).model_copy(update=changes) for suite in suites]
    for config in configs:
        check(config, policies)
    sizes = [size(config, policies) for config in configs]
    make_folder(out)
    asking = tuple(name for name in LEARNED if any(name in config.methods for config in configs))
    learned = learn(configs[0].model_copy(update={"methods": asking}), out, tick)
    broken: list[RunFailed] = []
    for number, (suite, config) in enumerate(zip(suites, configs, strict=True)):
        before, total = sum(sizes[:number]), sum(sizes)

        def on_cell(done: int, _: int, words: str, name: str = suite.name, before: int = before,
                    total: int = total) -> None:  # fmt: skip
            tick(before + done, total, f"{name}: {words}")

        try:
            run_comparison(config, policies, out / suite.name, on_cell, learned)
        except RunFailed as error:
            broken.append(error)
            continue
        about = describe(suite, config, policies, scale) | {"learned": _told(learned)}
        Ledger(out / suite.name / "ledger.sqlite").set_meta(_FINISHED, about)
    if broken:
        raise broken[0]
    tick(sum(sizes), sum(sizes), "")


def describe(
    suite: Suite, config: CompareConfig, policies: Sequence[Policy], scale: Scale
) -> dict[str, Any]:
    """What a comparison of the plan was, JSON-ready."""
    return {
        "plan": PLAN,
        "scale": scale,
        "purpose": suite.purpose,
        "config": config.model_dump(mode="json"),
        "policies": [_origin(*pair) for pair in zip(names_of(policies), policies, strict=True)],
    }


def _told(learned: Mapping[str, Method]) -> dict[str, list[str]]:
    """What was found on the training tasks, in words."""
    told = {}
    for name, method in learned.items():
        settings: tuple[Any, ...] = getattr(method, "settings", (method,))
        told[name] = [_words(setting.knobs) for setting in settings]
    return told


def _words(knobs: Knobs) -> str:
    """A fixed setting; its rate in decades from the rule of thumb."""
    return (f"{math.log10(knobs.rate):+g} decades, {knobs.shape}, warm-up {knobs.warmup:g}, "
            f"head x{knobs.head_rate or 1:g}")  # fmt: skip


def _origin(name: str, policy: Policy) -> dict[str, Any]:
    origin = policy.manifest.provenance
    cost = {key: origin.get(key) for key in ("episodes", "seconds")}
    return {"name": name, "algorithm": policy.manifest.algorithm, "sha256": policy.sha256,
            "training": cost}  # fmt: skip


def finished(out: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The finished suites of a benchmark's folder: what each was, and its raw outcomes."""
    found = {}
    for name in names:
        path = out / name / "ledger.sqlite"
        ledger = Ledger(path) if path.is_file() else None
        about = ledger.meta(_FINISHED) if ledger else None
        if ledger and about:
            found[name] = about | {"outcomes": shown(ledger)}
    return found
