"""Verdicts: the bar of each claim about the tuner, and whether its figure reaches it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from baselines.figures import percent, spread, trials
from baselines.schedules import BestList

Suite = Mapping[str, Any]  # a suite's part of results/evidence.json
UNKNOWN = "not measured"
ROUNDING = 1e-9  # of a mean of whole and half wins


class Reading(NamedTuple):
    """A figure in words. holds: None where it can neither be said to hold nor to miss."""

    shown: str
    holds: bool | None


Read = Callable[[Suite], Reading | None]


@dataclass(frozen=True)
class Bar:
    """One claim, judged by one suite."""

    what: str
    bar: str
    suite: str
    read: Read

    def verdict(self, suites: Mapping[str, Suite]) -> str:
        """The figure, in bold where it misses; or that it was not measured."""
        found = self.read(suites[self.suite]) if self.suite in suites else None
        if found is None:
            return UNKNOWN
        scale = suites[self.suite]["scale"]
        shown = found.shown if scale == "full" else f"{found.shown}, at scale {scale}"
        if found.holds is None:
            return f"{shown}: too few trials to tell"
        return shown if found.holds else f"**{shown}: missed**"


def policy(suite: Suite, algorithm: str | None = None) -> str | None:
    """Name of the tuner in a suite, or of the first policy of that algorithm."""
    names = [p["name"] for p in suite["policies"] if algorithm in (None, p["algorithm"])]
    return next((name for name in names if name in suite["figures"]["judged"]), None)


def judged(suite: Suite, algorithm: str | None = None) -> Mapping[str, Any] | None:
    """What was found of that policy; None if it did not take part."""
    name = policy(suite, algorithm)
    return suite["figures"]["judged"][name] if name else None


def worth(
    search: str, least: float, low: float = 0, algorithm: str | None = None, key: str = "match"
) -> Read:
    """Trials to match of the median task, and the lower end of their interval."""

    def read(suite: Suite) -> Reading | None:
        found = judged(suite, algorithm)
        match = (found or {key: {}})[key].get(search)
        if not match or not match["median"]["n_max"]:
            return None
        median = match["median"]
        reached = [reaches(median["point"], median["n_max"], least),
                   reaches(median["low"], median["n_max"], low)]  # fmt: skip
        return Reading(trials(median), False if False in reached else None if None in reached
                       else True)  # fmt: skip

    return read


def agents(search: str, least: float, algorithm: str) -> Read:
    """The same of several agents of a kind, one a training seed: the median one, and all."""

    def read(suite: Suite) -> Reading | None:
        told = suite["figures"]["judged"]
        names = [p["name"] for p in suite["policies"] if p["algorithm"] == algorithm]
        found = [told[name]["match"].get(search) for name in names if name in told]
        medians = [match["median"] for match in found if match and match["median"]["n_max"]]
        if len(medians) < 2:
            return None
        medians.sort(key=lambda median: median["point"])
        middle = medians[(len(medians) - 1) // 2]  # the lower one of two
        each = ", ".join(trials(median).split(" (")[0] for median in medians)
        shown = f"{trials(middle)}; all {len(medians)}: {each}"
        return Reading(shown, reaches(middle["point"], middle["n_max"], least))

    return read


def reaches(number: float, most: float, bar: float) -> bool | None:
    """Whether a number of trials reaches a bar; None if it is only known to be over ``most``."""
    if math.isfinite(number):
        return number >= bar
    return True if most >= bar else None


def better(other: Callable[[str], str], least: float, above: float = -math.inf) -> Read:
    """Probability of improvement over a method, named after the policy's name."""

    def read(suite: Suite) -> Reading | None:
        found, name = judged(suite), policy(suite)
        chance = found["chance"].get(other(name)) if found and name else None
        if chance is None:
            return None
        reached = chance["point"] >= least - ROUNDING
        return Reading(spread(chance), reached and chance["low"] > above)

    return read


def everywhere(least: float) -> Read:
    """Probability of improvement over the user's own schedule in the job where it is least."""

    def read(suite: Suite) -> Reading | None:
        found = judged(suite)
        jobs = found["jobs"] if found else {}
        if not jobs:
            return None
        reached = [name for name, job in jobs.items() if job["chance"]["point"] >= least]
        worst = min(jobs, key=lambda name: jobs[name]["chance"]["point"])
        shown = f"{spread(jobs[worst]['chance'])} in {worst}; {len(reached)} of {len(jobs)} hold"
        return Reading(shown, len(reached) == len(jobs))

    return read


def harmless(most: float) -> Read:
    """Share of cells in which it ends clearly worse than the user's own schedule."""

    def read(suite: Suite) -> Reading | None:
        found = judged(suite)
        return rate(found["harm"], most) if found and found["harm"] else None

    return read


def steady(most: float) -> Read:
    """Share of steered runs that diverged."""

    def read(suite: Suite) -> Reading | None:
        found = judged(suite)
        return rate(found["diverged"], most) if found and found["diverged"]["of"] else None

    return read


def rate(share: Mapping[str, Any], most: float) -> Reading:
    """A share with its counts."""
    shown = f"{spread(share)}, {share['count']} of {share['of']}"
    return Reading(shown, share["point"] <= most)


def forgiving(most: float) -> Read:
    """What the worse of the misjudged rates loses of the right one's score."""

    def read(suite: Suite) -> Reading | None:
        found = suite["figures"]["offsets"].get(policy(suite))
        return Reading(spread(found["worst"]), found["worst"]["point"] <= most) if found else None

    return read


def budgeted(least: float) -> Read:
    """The smallest probability, over searchers, that the best of several steered runs is better."""

    def read(suite: Suite) -> Reading | None:
        name = next((n for n in suite["figures"]["judged"] if n.startswith(several(suite))), None)
        rows = [row for row in suite["figures"]["methods"] if row["kind"] == "search"]
        searches = [row["name"] for row in rows if row["name"] != BestList.name]
        chances = suite["figures"]["judged"][name]["chance"] if name else {}
        known = [(chances[s]["point"], s) for s in searches if chances.get(s)]
        if not known:
            return None
        point, worst = min(known)
        alike = ", ".join(name for other, name in sorted(known) if other == point)
        listed = chances.get(BestList.name)
        told = f"; against the best list {spread(listed)}" if listed else ""
        return Reading(
            f"{spread(chances[worst])}, against {alike}{told}", point >= least - ROUNDING
        )

    return read


def several(suite: Suite) -> str:
    """How the tuner's best of several runs is called, but for their number."""
    return f"{policy(suite)} best of "


def paid_back(most: float) -> Read:
    """Jobs until the tuner's training has paid for itself."""

    def read(suite: Suite) -> Reading | None:
        found = judged(suite)
        jobs = found["cost"]["break_even"] if found else None
        if not jobs:
            return None
        unknown = jobs["bound"] and jobs["point"] > most  # no more than that, and maybe fewer
        return Reading(jobs_in_words(jobs), None if unknown else jobs["point"] <= most)

    return read


def jobs_in_words(jobs: Mapping[str, Any]) -> str:
    """A number of jobs with its interval."""
    low, point, high = (f"{math.ceil(jobs[key]):,}" if math.isfinite(jobs[key]) else "never"
                        for key in ("low", "point", "high"))  # fmt: skip
    return f"{'at most ' if jobs['bound'] else ''}{point} ({low} to {high})"


def fixed(name: str) -> Callable[[str], str]:
    """A method that is called the same whatever the policy's name."""
    return lambda _: name


BARS = (
    Bar("trials of TPE that one steered run is worth, median job",
        "at least 16, lower end at least 8", "datasets", worth("tpe", 16, 8)),
    Bar("the same, its trials in the order in which it made them",
        "at least 16, lower end at least 8", "datasets",
        worth("tpe", 16, 8, key="match_in_order")),
    Bar("the same jobs on ten seeds: trials of TPE", "at least 16, lower end at least 8", "agents",
        worth("tpe", 16, 8)),
    Bar("the same, in the order in which it made them", "at least 16, lower end at least 8",
        "agents", worth("tpe", 16, 8, key="match_in_order")),
    Bar("trials of TPE in the tuner's own reach: with AdamW alone", "at least 16, lower end at "
        "least 8", "datasets", worth("tpe+adamw", 16, 8)),
    Bar("trials of TPE on a held-out pretrained encoder", "at least 8", "model", worth("tpe", 8)),
    Bar("better than the best fixed setting of the training tasks",
        "at least 75 %, lower end above 50 %", "datasets", better(fixed("fixed"), 0.75, 0.5)),
    Bar("the same on ten seeds", "at least 75 %, lower end above 50 %", "agents",
        better(fixed("fixed"), 0.75, 0.5)),
    Bar("better than the same policy with shuffled observations", "at least 90 %", "datasets",
        better(lambda name: f"{name} shuffled", 0.9)),
    Bar("better than what it opens runs with alone, the rate kept", "above 50 %", "datasets",
        better(fixed("opened"), 0.5)),
    Bar("better than a hand-written rule that opens runs alike and walks to the rule of thumb",
        "above 50 %", "datasets", better(fixed("rule"), 0.5)),
    Bar("careful: clearly worse than the user's own schedule", "at most 2 %", "careful",
        harmless(0.02)),
    Bar("careful: diverged", "0 %", "careful", steady(0.0)),
    Bar("careful: better than the user's own schedule", "at least 60 %", "careful",
        better(fixed("keep"), 0.6)),
    Bar("explore: what a rate 1.5 decades off costs of the right rate's result", "at most 3 %",
        "robust", forgiving(0.03)),
    Bar("best of 4 steered runs better than 4 trials of a searcher, the strongest one",
        "at least 80 %", "budget", budgeted(0.8)),
    Bar("Q-learning: trials of TPE that one steered run is worth", "at least 4", "datasets",
        worth("tpe", 4, algorithm="q-learning")),
    Bar("SARSA: the same", "at least 4", "datasets", worth("tpe", 4, algorithm="sarsa")),
    Bar("five agents of PPO: trials of TPE that a run of the median one is worth", "at least 16",
        "agents", agents("tpe", 16, "ppo")),
    Bar("five agents of Q-learning: the same", "at least 4", "agents",
        agents("tpe", 4, "q-learning")),
    Bar("five agents of SARSA: the same", "at least 4", "agents", agents("tpe", 4, "sarsa")),
    Bar("every other objective, from a rate a decade off: better than the user's own schedule",
        "at least 80 % in each", "objectives", everywhere(0.8)),
    Bar("a tuner of all objectives: trials of TPE that one steered run is worth", "at least 8",
        "objectives", worth("tpe", 8, algorithm="q-learning")),
    Bar("a tuner of classifications on a language model and on DPO: clearly worse than the user's "
        "own schedule", "at most 2 %", "objectives-careful", harmless(0.02)),
    Bar("jobs until the training of all agents and the choice of one have paid for themselves",
        "at most 100", "datasets",
        paid_back(100)),
)  # fmt: skip


def rows(suites: Mapping[str, Suite]) -> Iterator[tuple[str, str, str, str]]:
    """Claim, bar, figure with its interval, suite."""
    for bar in BARS:
        yield bar.what, bar.bar, bar.verdict(suites), bar.suite


def losses(suites: Mapping[str, Suite]) -> Iterator[tuple[str, ...]]:
    """Suite, method, job, opponent, its runs, chance at its whole budget and at equal spend."""
    for name, suite in suites.items():
        for steered, found in suite["figures"]["judged"].items():
            for lost in found["losses"]:
                chances = (f"{percent(lost[key]['point'])} %" for key in ("chance", "chance_equal"))
                yield (name, steered, lost["task"], lost["method"], f"{lost['runs']:.3g}", *chances,
                       str(lost["cells"]))  # fmt: skip
