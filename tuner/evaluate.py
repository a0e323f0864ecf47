"""The tuner as a contestant, and the comparison that the command line runs."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from baselines import report
from baselines.compare import compare, outcomes, plan
from baselines.evidence import normalised, ranks
from baselines.feedback import FEEDBACK
from baselines.ledger import Ledger, key_of
from baselines.method import Arena, Best, BudgetSpent, Method, Point, Trial, point
from baselines.optimizers import OPTIMIZERS
from baselines.population import POPULATIONS
from baselines.schedules import STATIC, KeepAgain, best_fixed, best_list, grid
from baselines.search import KNOTS, Search
from envs.dials import DIALS, label
from envs.errors import BadInput, UnknownName
from envs.files import make_folder
from envs.job import report_start, with_validation
from envs.knobs import Decision, Knobs, opened
from tuner.ablations import Ablation, Opened, RandomActions, Rule, Shuffled
from tuner.audit import Pilot
from tuner.folder import read_json
from tuner.guard import limits_of, within
from tuner.policy import Policy
from tuner.restarts import Ended, next_start, opening_rate
from tuner.settings import CompareConfig
from tuner.steer import Helm

Tick = Callable[[int, int, str], None]  # done, total, a few words
SAMPLERS = ("random", "tpe", "tpe-independent", "gp", "cmaes")
KNOTTED = ("random+knots", "tpe+knots")
SAME_REACH = ("random+adamw", "tpe+adamw")  # of a tuner that does not switch the optimizer
LEARNED = ("fixed", "list")  # found on the training tasks
_PLACES = dict.fromkeys(LEARNED, grid()[0])  # until they are found
SHOWN = "cells of the latest comparison"
SINGLE = STATIC | {KeepAgain.name: KeepAgain} | FEEDBACK | OPTIMIZERS  # of one run, by name
KNOWN = (*SINGLE, *LEARNED, *SAMPLERS, *(f"{name}+hyperband" for name in SAMPLERS), *KNOTTED,
         *SAME_REACH, *POPULATIONS)  # fmt: skip


@dataclass(frozen=True)
class PolicyMethod:
    """Runs steered by a policy, from the user's starting rate: one, or as many as the budget has.

    An ablation takes the policy's place under the same guard; it counts as no steered run. Where
    each further run starts: `tuner.restarts`.
    """

    policy: Policy | Ablation
    name: str = "steersman"
    runs: float = 1
    mode: str = "explore"

    @property
    def steered(self) -> bool:
        """Whether it is a learned tuner that steers."""
        return not isinstance(self.policy, Ablation)

    def describe(self) -> dict[str, Any]:
        """What tells it from another: the artifact, not where it lies."""
        policy = self.policy
        pilot = policy.describe() if isinstance(policy, Ablation) else {"policy": policy.sha256}
        return pilot | {"runs": self.runs, "mode": self.mode}

    def run(self, arena: Arena) -> None:
        """Steer; every validation pass that feeds an observation is charged."""
        ended: list[Ended] = []
        for number in range(math.ceil(self.runs)):
            policy = self.policy
            pilot = policy.pilot(arena.seed, number) if isinstance(policy, Ablation) else policy
            start = next_start(ended, arena.seed) if ended else arena.start_rate
            trial = steer(arena, pilot, start, self.mode)
            knobs = trial.ended or trial.knobs
            rate = opening_rate(knobs.rate, knobs.optimizer, trial.knobs.optimizer)
            ended.append(Ended(trial.selection, rate))


def steer(arena: Arena, policy: Pilot, start: float, mode: str) -> Trial:
    """One steered run: a trial."""
    limits, actions, task = limits_of(mode), policy.manifest.actions, arena.task
    knobs = opened(Knobs(rate=start), within(actions, limits))
    job = arena.open(knobs)
    knobs = knobs.having(head_rate=job.knobs.head_rate)  # a model without a new head has none
    best, curve, state = Best(), list[Point](), "complete"
    own = tuple(name for name in DIALS if getattr(job.knobs, name) is not None)
    switch = task.objective == "classification"
    helm = Helm(policy, replace(limits, switch=switch, turns=own), start)
    try:
        first = job.evaluate("validation").loss
        history, lowest, snapshot = [report_start(job, first)], first, job.snapshot()
        while job.step < job.task.steps:
            ruling = helm.decide(history, job.context, job.knobs)
            if ruling.decision.rollback:
                job.restore(snapshot)
            before = job.knobs
            job.apply(ruling.turn(before, job.context))
            progress = job.advance(min(job.task.interval, job.task.steps - job.step))
            loss = job.evaluate("validation").loss
            history.append(with_validation(progress, history[-1], loss, ruling.decision))
            if math.isfinite(loss) and loss < lowest:
                lowest, snapshot = loss, job.snapshot()
            score = job.evaluate("selection")
            best.offer(score, job)
            words = _words(ruling.decision, job.knobs.rate / before.rate)
            curve.append(
                point(
                    progress, job.knobs, score, validation_loss=loss, decision=words,
                    guard=ruling.guard,
                )
            )  # fmt: skip
        if not all(map(math.isfinite, (*history[-1].losses, history[-1].validation))):
            state = "diverged"
    except BudgetSpent:
        if curve:
            arena.hand_in(job, best, curve, "pruned", knobs)
        raise
    return arena.hand_in(job, best, curve, state, knobs)


def make_method(name: str) -> Method:
    """A contestant by its name on the command line; those `LEARNED` have to be found first."""
    if name in SINGLE:
        return SINGLE[name]()
    if name in POPULATIONS:
        return POPULATIONS[name]()
    if name not in KNOWN or name in LEARNED:
        raise UnknownName("method", name, KNOWN)
    sampler, _, extra = name.partition("+")
    if extra == "knots":
        return Search(sampler, knots=KNOTS)  # type: ignore[arg-type]
    if extra == "adamw":
        return Search(sampler, optimizers=("adamw",))  # type: ignore[arg-type]
    return Search(sampler, extra or None)  # type: ignore[arg-type]


def run_comparison(
    config: CompareConfig,
    policies: list[Policy],
    out: Path,
    tick: Tick,
    learned: Mapping[str, Method] | None = None,
) -> list[dict[str, Any]]:
    """Run what the ledger of a run folder lacks. Policies enter as methods among others.

    learned: those that are `LEARNED`, if they are known; else they are found in this folder.
    """
    check(config, policies)
    make_folder(out)
    if learned is None:
        learned = learn(config, out, tick)
    found, parts = [], groups(config, policies, learned)
    total, before = size(config, policies), 0

    def on_cell(done: int, _: int, cell: dict[str, Any]) -> None:
        tick(before + done, total, _cell_words(cell))

    for methods, seeds, offset in parts:
        known = compare(
            methods,
            config.jobs(config.tasks),
            range(config.seed, config.seed + seeds),
            out / "ledger.sqlite",
            runs=config.runs,
            decades=config.decades,
            offset=offset,
            workers=config.workers,
            pack=config.pack,
            compiled=config.compile,
            on_cell=on_cell,
        )
        before += len(known)
        found += known
    _show(out / "ledger.sqlite", found)
    return found


def shown(ledger: Ledger) -> list[dict[str, Any]]:
    """Outcomes of a ledger's latest comparison; all where it does not say."""
    keys = ledger.meta(SHOWN)
    return outcomes(ledger, None if keys is None else json.loads(keys))


def _show(ledger: Path, found: Sequence[Mapping[str, Any]]) -> None:
    Ledger(ledger).set_meta(SHOWN, json.dumps([key_of(outcome["cell"]) for outcome in found]))


def check(config: CompareConfig, policies: Sequence[Policy]) -> None:
    """Raise `BadInput` for what cannot be compared, before hours go into what is `LEARNED`."""
    for methods, seeds, offset in groups(config, policies, _PLACES):
        plan(
            methods,
            config.jobs(config.tasks),
            range(config.seed, config.seed + seeds),
            runs=config.runs,
            decades=config.decades,
            offset=offset,
        )


def size(config: CompareConfig, policies: Sequence[Policy]) -> int:
    """How many cells a comparison has, without the search for the best fixed setting."""
    jobs, parts = len(config.jobs(config.tasks)), groups(config, policies, _PLACES)
    return sum(len(methods) * jobs * seeds for methods, seeds, _ in parts)


def groups(
    config: CompareConfig, policies: Sequence[Policy], learned: Mapping[str, Method]
) -> list[tuple[list[Method], int, float | None]]:
    """What is compared in one go: methods, how many seeds, how far the rate is off."""
    once, searches = contestants(config, policies)
    for name, side in zip(LEARNED, (once, searches), strict=True):
        side += [learned[name]] if name in config.methods else []
    sides = ((once, config.seeds), (searches, config.search_seeds))
    return [(methods, seeds, offset) for methods, seeds in sides if methods
            for offset in config.offsets or (None,)]  # fmt: skip


def contestants(
    config: CompareConfig, policies: Sequence[Policy]
) -> tuple[list[Method], list[Method]]:
    """Those of one run and those that spend the whole budget, without what is `LEARNED`."""
    for name in config.methods:
        if name not in LEARNED:
            make_method(name)
    config.jobs(config.tasks)
    if not config.methods and not policies:
        raise BadInput("compare: methods: none given; name one or give a policy")
    once = [make_method(name) for name in config.methods if name in SINGLE]
    searches = [make_method(name) for name in config.methods if name not in (*SINGLE, *LEARNED)]
    names = names_of(policies)
    for name, policy in zip(names, policies, strict=True):
        once.append(PolicyMethod(policy, name, mode=config.mode))
        if config.best_of:
            several = f"{name} best of {config.best_of}"
            searches.append(PolicyMethod(policy, several, config.best_of, config.mode))
    if config.ablations:
        once += ablations(names, policies, config.mode)
    return once, searches


def names_of(policies: Sequence[Policy]) -> list[str]:
    """What each policy is called in a comparison: ``steersman`` if it is the only one."""
    if len(policies) == 1:
        return ["steersman"]
    algorithms: list[str] = [policy.manifest.algorithm for policy in policies]
    if len(set(algorithms)) == len(algorithms):
        return algorithms
    return [f"{policy.manifest.algorithm} {policy.sha256[:6]}" for policy in policies]


def ablations(
    names: Sequence[str], policies: Sequence[Policy], mode: str = "explore"
) -> list[PolicyMethod]:
    """Each policy without its eyes, and what needs no policy but the actions of the first."""
    if not policies:
        raise BadInput("compare: ablations: of no policy; give one")
    actions = policies[0].manifest.actions
    blind: list[tuple[Ablation, str]] = [
        *((Shuffled(p), f"{name} shuffled") for name, p in zip(names, policies, strict=True)),
        (RandomActions(actions), "random-actions"),
        (Opened(actions), "opened"),
        (Rule(opens=actions.opens), "rule"),
    ]  # fmt: skip
    return [PolicyMethod(pilot, name, mode=mode) for pilot, name in blind]


def learn(config: CompareConfig, out: Path, tick: Tick) -> dict[str, Method]:
    """The best fixed setting and the best list, from the tuner's own training tasks.

    Those that are asked for; through a ledger of their own.
    """
    asked = [name for name in LEARNED if name in config.methods]
    if not asked:
        return {}
    candidates = grid()
    found = compare(
        candidates,
        config.jobs(config.training),
        range(config.seed, config.seed + config.training_seeds),
        out / "fixed.sqlite",
        runs=1,
        workers=config.workers,
        pack=config.pack,
        compiled=config.compile,
        on_cell=lambda done, total, cell: tick(done, total, "best fixed setting"),
    )
    _show(out / "fixed.sqlite", found)
    makes: dict[str, Callable[..., Method]] = {"fixed": best_fixed, "list": best_list}
    return {name: makes[name](candidates, found) for name in asked}


def write_report(folder: Path) -> dict[str, Any]:
    """Write a run folder's report from its raw outcomes alone -> the summary."""
    path = folder / "ledger.sqlite"
    if not path.is_file():
        raise BadInput(f"{folder}: no comparison here; run `steersman compare --out {folder}`")
    training = _lines(folder / "train.jsonl")
    steered = [
        json.loads(file.read_text()) | {"decisions": _lines(file.parent / "audit.jsonl"),
                                        "curve": _lines(file.parent / "curve.jsonl")}
        for file in sorted(folder.glob("steered/*/summary.json"))
    ]  # fmt: skip
    facts = read_json(folder / "config.json")
    found = shown(Ledger(path))
    if not found:
        raise BadInput(f"{path}: no cell is finished; run `steersman compare --out {folder}`")
    table = report.table_of(found)
    beyond = {"normalised": normalised(table), "ranks": ranks(table)}
    return report.write(
        folder, found, steered=steered, training=training, facts=facts, beyond=beyond
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _words(decision: Decision, factor: float) -> str:
    if decision.rollback:
        return "rollback"
    if decision.turns:
        return ", ".join(map(label, decision.turns))
    if decision.optimizer:
        return decision.optimizer
    return "keep" if abs(factor - 1) < 1e-9 else f"x{factor:.2g}"


def _cell_words(cell: dict[str, Any]) -> str:
    return f"{cell['method']['name']} on {cell['task']['dataset']}, seed {cell['seed']}"
