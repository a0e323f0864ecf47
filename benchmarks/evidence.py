"""Evidence: docs/evidence.md with its figures, from the raw outcomes of `steersman benchmark`.

    python benchmarks/evidence.py --run runs/benchmark

The outcomes of a run are kept in results/outcomes.jsonl.gz (`raw`), their figures in
results/evidence.json, and the page and the README's table are made of that file alone. Without
``--run`` they are made anew; with ``--again`` the figures too, of the outcomes that are kept. A
suite that a run lacks stays as it was, or is called "not measured".
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import raw
from page import DOCS, table
from record import RESULTS, record
from verdicts import UNKNOWN, Suite, jobs_in_words, losses, rows
from verdicts import policy as name_of

from baselines import plates, report
from baselines.evidence import measure
from baselines.figures import percent, spread, trials
from baselines.report import REFERENCE
from tuner import policy
from tuner.policy import DEFAULT
from tuner.suites import PLAN, SUITES

HEAD = """# Evidence

What a trained tuner is worth on jobs it has never seen. `steersman benchmark POLICY` runs the plan,
`python benchmarks/evidence.py --run runs/benchmark` keeps the raw outcomes in
`benchmarks/results/outcomes.jsonl.gz`, makes `evidence.json` of them and this page of that file
alone; `--again` makes all of it from the outcomes that are kept (what the training of `default`
took is from `tuner.json`). The policies that took part are in `benchmarks/results/policies`. A
suite that has not been run to its end is not measured.

- A method's result in a cell (a job, a seed and a starting rate) is the test accuracy of its
  selection-best trial, or the metric of another objective (`docs/objectives.md`; of likelihoods,
  one over perplexity). Test rows are read once, by the referee. In a cell all methods have the same
  initial weights, data order and misjudged starting rate, and every update and evaluated row is
  charged.
- **Trials to match**: the smallest N for which the expected test score of the selection-best of N
  trials reaches that of one steered run, by the order statistics of all trials of a searcher, which
  is unbiased where trials are exchangeable (random search). "> 32" is more than were tried. TPE
  learns: its late trials are its best, and this estimate lends their quality to the first ones,
  against the tuner. A second table therefore takes the trials in the order in which they came: the
  mean over studies of the best so far. It is unbiased for any searcher, and rests on few studies.
  The median job of an even number is the lower one of the two in the middle. A trial that a pruner
  stopped counts as one, and costs less: what was spent is told beside it.
- **Probability of improvement**: over cells, paired; ties count half, jobs the same.
- **Normalised score**: 0 is the mean of the user's own schedule (`keep`), 1 the oracle: the best
  test score of any trial of any method and seed on that job. No method could have chosen it, and it
  is higher the more methods took part.
- **Harm**: worse than `keep` by more than 1 % of it or 2 standard deviations over seeds, whichever
  is less; with two or three seeds the deviation says little. Runs of one schedule that differ in
  their seed alone pass that bar often: that share is given beside it, where it was measured, and so
  is the share that is worse by both. Shares have exact binomial intervals; all others are 95 %
  bootstrap intervals that draw seeds again within jobs, each with all its starting rates, and for
  trials to match steered seeds and whole studies: with two or three of them they are too narrow.
  One agent stands for its kind in all suites but `agents`. The other seed's run has another head
  and another order of rows, too, which a steered run shares with `keep`.
- **Diverged** is a run whose loss is no longer finite. There is none in any suite, searches at
  rates up to 2 included, so beside it stands the worst loss that a run ended with. A search takes
  no rate from the user: where a suite has several, it is one search, and counts once.
- **Arms of the benchmark.** `fixed` and `list` were learned, too: of 60 settings on the six
  training tasks, three seeds, the one with the best mean rank, and those that help those before
  them most. `tpe+adamw` searches in the tuner's own reach; other searches have SGD and RMSprop as
  well. `opened` is what a policy opens runs with (a new head's rate), the user's rate kept;
  `shuffled` is the policy that sees simulated runs at any time of theirs: it tells that the state
  is used, not which part of it. With four trials, Optuna's samplers but CMA-ES
  still draw at random, and alike.
- **Break-even** charges all agents that were trained, their lessons and compilation, and the runs
  that chose one of them. It is told against TPE, and is a bound ("at most") where more trials would
  be needed than were tried; `list` and `fixed` need no search either, and against them there is
  little or nothing to save. Seconds are those of eight runs computed together, shared out by rows:
  what a policy, a sampler or an optimizer takes beyond them is spread over its pack.
- **Mean ranks** are over seeds of jobs; bars join methods that Wilcoxon's signed-rank test,
  adjusted after Holm, does not tell apart, and are left out where seeds are too few to tell any two
  apart. Seeds of one job count as independent, which they are only in part.
"""
LOSES = """## Where the tuner loses

Jobs and methods where a steered method is more often behind than ahead: at the end of the other's
whole budget, or when both have spent the same (a search has at least its first trial). Made of the
outcomes of all suites that were run.
"""
WHY = """## Why bars are missed, as far as it is known

- **Against the best fixed setting.** One rate, reached from anywhere, and a head's rate are all
  there is to win here (`docs/experiments.md`: rates, shapes, decays), and they are the same for
  nearly all jobs. The policy learned a good constant; the best fixed setting, near the rule of
  thumb with the same head's rate, is one by construction. In one run they differ by two points
  either way, which is luck, and the share moves with the seeds on which the setting is found. On
  ten seeds the policy is ahead, by a few tenths of a point. To be better in 75 % of the runs would
  take a gain of a point and a half, and nothing that was tried (a rate for each job, other shapes,
  a head's rate that moves, averaged weights, broader training) brought a point.
- **Against a hand-written rule.** For the same reason what was learned is no better than a rule
  that knows the rule of thumb, opens runs as the policy does and walks there: level in `datasets`,
  and in mode careful a little ahead of the policy, which acts only where it clearly prefers to.
  One steered run is worth a few of the settings of the best list.
- **Trials to match.** Six jobs of five seeds: one job's seeds decide whether a searcher of 32
  trials is ever matched, so the intervals are wide, and of the two jobs in the middle the lower one
  counts. Suite `agents` has ten seeds, the five and five more, taken after intervals that draw
  whole studies had put the lower end at 7: there it is above the bar, for all five agents and in
  either table. The same jobs gave 15 (7 to > 32) when TPE drew SGD's and RMSprop's rates around
  rules of thumb that were too high, in other studies: no change of the tuner lies between the two.
  Of the ten further searchers of suite `searchers`, none is matched within the budget of 16 runs in
  the median job (lower ends 7 to 43); after it the steered run is better in 47 % of the cells (GP)
  to 67 % (PBT), after as much spending as its own in 83 to 93 %.
- **A pretrained encoder.** With all weights of MiniLM-L6 the policy is behind the best fixed
  setting, which is 0.2 decades lower and warms up: the tiny encoders of the training tasks want
  neither. With LoRA it is level with that setting and with 8 trials of TPE (where it opened the
  head with twice the rate at first, it was behind in every run), and ahead of the rate that
  adapters are handed out with, 2e-4, in all nine runs: 60 updates are few for it. Three jobs of
  three seeds.
- **Break-even.** 1,978 seconds of training against runs of 0.6 s: with more than 32 trials to match
  it is below 102 jobs, and how far is not known. Imitation alone, without an episode, is as good.
- **A tuner of all objectives.** It and `default`, which never saw them, act alike: both are taught
  the same rate. They are behind on the language model, DPO, GRPO and translation. For GRPO twice
  the rule of thumb is better at this size (`docs/experiments.md` says why it is not raised), and a
  new bridge between encoder and decoder takes more, too.
- **Harm in mode careful.** Worse by 1 % is within the luck of a seed: it befalls the same
  schedule with another seed three times as often. A mode that reaches 2 % hardly acts, and
  was better in half of the runs, as one that does nothing is.

A language model and DPO are not harmed in mode careful because near the rule of thumb it leaves
alone what the policy was not trained on (`docs/adr/0008-careful-abroad.md`). Not wholly held out
are the two tables, whose constants were changed after held-out figures had been seen
(`docs/experiments.md`); other objectives, whose rules of thumb were found on the same corpora; a
language model and DPO in mode careful, which was made to leave them alone after they had been
harmed; and MiniLM-L6 with LoRA, where the head's rate was asked again because held-out figures had
shown a higher one to be ahead.
"""
ROOT = Path(__file__).parent
README = ROOT.parent / "README.md"
MARKS = ("<!-- benchmarks/evidence.py writes from here -->", "<!-- to here -->")
WAYS = {
    "match": "Trials to match, of all trials of a searcher",
    "match_in_order": "The same in the order in which the trials came",
}
METHODS = ("method", "runs", "test accuracy", "normalised", "steered is better", "at equal spend",
           "trials to match", "diverged", "rows", "seconds")  # fmt: skip


def summed_up(readme: str, suites: Mapping[str, Suite]) -> str:
    """The README with the verdict between its marks."""
    head, rest = readme.split(MARKS[0])
    told = [row[:3] for row in rows(suites)]
    table_now = table(("claim", "our bar", "seen"), told)
    return f"{head}{MARKS[0]}\n{table_now}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def measured(suite: raw.Raw) -> dict[str, Any]:
    """A suite with its figures in place of its outcomes."""
    about = {k: v for k, v in suite.items() if k != "outcomes"}
    policies = [charged(each) for each in suite["policies"]]
    return {**about, "figures": measure(suite["outcomes"], policies), "policies": policies}


def charged(given: Mapping[str, Any]) -> dict[str, Any]:
    """A policy with what its training took; of the shipped one, all agents and the choice too.

    In seconds of one core, from results/tuner.json.
    """
    known = json.loads((ROOT / "results" / "tuner.json").read_text())
    if given["sha256"] != known["sha256"]:
        return dict(given)
    return {**given, "training": {**given["training"], "seconds": known["seconds"]}}


def page(suites: Mapping[str, Suite], docs: Path) -> str:
    """The page's text; its figures are written to ``docs/evidence``."""
    told = [(*row, f"{suite}, *" if former(suites.get(suite)) else suite)
            for *row, suite in rows(suites)]  # fmt: skip
    parts = [HEAD, "## Verdict", table(("claim", "bar", "figure", "suite"), told)]
    if any(map(former, suites.values())):
        parts.append("\\* measured with the policy that was shipped before the present one.")
    parts.append(WHY)
    folder = docs / "evidence"
    for old in folder.glob("*.svg"):
        old.unlink()
    for name, suite in SUITES.items():
        parts += [f"## {name}", suite.purpose]
        parts += section(name, suites[name], folder) if name in suites else [f"{name}: {UNKNOWN}."]
    lost = list(losses(suites))
    head = ("suite", "method", "job", "against", "its runs", "whole budget", "equal spend", "cells")
    shown = table(head, lost) if lost else "Nowhere." if suites else f"Losses: {UNKNOWN}."
    parts += [LOSES, shown, machines(suites)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def section(name: str, suite: Suite, folder: Path) -> list[str]:
    """One suite: who took part, tables, pictures, harm, cost."""
    parts = [taking_part(suite), methods(suite), worth(suite)]
    for kind, plate in plates.draw(suite["figures"]).items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}-{kind}.svg").write_bytes(plate.svg)
        parts.append(f"![{name}: {plate.title}](evidence/{name}-{kind}.svg)")
    return [*parts, by_job(suite), harm(suite), ablations(suite), offsets(suite), cost(suite)]


def former(suite: Suite | None) -> bool:
    """Whether a suite was run without the policy that is shipped."""
    shipped = policy.load(DEFAULT).sha256
    return suite is not None and shipped not in (p["sha256"] for p in suite["policies"])


def taking_part(suite: Suite) -> str:
    """Jobs, seeds, budget and policies."""
    figures, config = suite["figures"], suite["config"]
    who = ", ".join(f"{p['name']} ({p['algorithm']}, sha256 {p['sha256'][:12]})"
                    for p in suite["policies"])  # fmt: skip
    stale = "" if suite["plan"] == PLAN else f", of plan {suite['plan']}, not {PLAN}"
    return (
        f"Scale {suite['scale']}{stale}. {figures['cells']} cells: "
        f"{', '.join(task['name'] for task in figures['tasks'])}; "
        f"{len(figures['seeds'])} seeds from {min(figures['seeds'])}; mode {config['mode']}; "
        f"a budget of {config['runs']:g} runs. Steered by {who}"
        f"{', the policy shipped before' if former(suite) else ''}."
        + "".join(f" Learned, {name}: {'; '.join(settings)}."
                  for name, settings in suite.get("learned", {}).items())
    )  # fmt: skip


def methods(suite: Suite) -> str:
    """Every method beside the tuner."""
    figures = suite["figures"]
    scores = (figures["normalised"] or {"methods": {}})["methods"]
    told = []
    for row in figures["methods"]:
        match = figures["match"].get(row["name"])
        score = scores.get(row["name"])
        told.append((
            row["name"], f"{row['runs']:.3g}", spread(row["test"]),
            f"{score['point']:.2f} ({score['low']:.2f} to {score['high']:.2f})" if score else "",
            *(spread(row[key]) if row[key] else "" for key in ("chance", "chance_equal")),
            trials(match["median"]) if match and match["median"]["n_max"] else "",
            f"{row['diverged']} of {row['trials']}", f"{row['rows']:,.0f}", f"{row['seconds']:.1f}",
        ))  # fmt: skip
    said = "Interquartile means over cells; rows and seconds are those of a cell."
    return f"{said}\n\n{table(METHODS, told)}"


def worth(suite: Suite) -> str:
    """Trials to match of each policy: every job against every searcher, in both ways."""
    tasks = [task["name"] for task in suite["figures"]["tasks"]]
    parts = []
    for key, words in WAYS.items():
        told = []
        for name, found in suite["figures"]["judged"].items():
            for search, match in found[key].items():
                numbers = (match["median"], *(match["tasks"].get(task) for task in tasks))
                shown = (trials(n) if n and n["n_max"] else "" for n in numbers)
                told.append((name, search, *shown))
        if told:
            parts.append(f"{words}:\n\n{table(('policy', 'searcher', 'median job', *tasks), told)}")
    return "\n\n".join(parts)


def by_job(suite: Suite) -> str:
    """The tuner against the user's own schedule, job by job."""
    name = name_of(suite)
    found = suite["figures"]["judged"][name]["jobs"] if name else {}
    told = []
    for job, of in found.items():
        means = ("–" if of[who] is None else f"{100 * of[who]:.3g} %" for who in ("own", "steered"))
        told.append((job, *means, spread(of["chance"])))
    head = ("job", "`keep`, mean", f"{name}, mean", "steered is better")
    return f"Job by job, from the same misjudged rates:\n\n{table(head, told)}" if told else ""


def harm(suite: Suite) -> str:
    """Harm, divergence and worst-case regret of every steered method."""
    told = []
    for name, found in suite["figures"]["judged"].items():
        diverged = found["diverged"]
        last = (found["last_loss"].get(who) for who in (name, REFERENCE))
        ends = ("–" if loss is None else f"{loss:.2f}" for loss in last)
        told.append((name, *_harm(found["harm"]),
                     f"{diverged['count']} of {diverged['of']}: {spread(diverged)}",
                     " and ".join(ends)))  # fmt: skip
    if chance := suite["figures"].get("chance_harm"):
        told.append(("chance: `keep` with other seeds", *_harm(chance), "", ""))
    head = ("steered", "harm: 1 % or 2 deviations", "1 % and 2 deviations",
            "worst regret against `keep`", "diverged",
            "worst loss at the end, its own and `keep`'s")  # fmt: skip
    return table(head, told) if told else ""


def _harm(found: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """By either bound, by both, and the worst case, in words."""
    if not found:
        return UNKNOWN, UNKNOWN, UNKNOWN
    either = f"{found['count']} of {found['of']}: {spread(found)}"
    return either, f"{percent(found['clear'])} %", f"{100 * found['worst']:.1f} points"


def ablations(suite: Suite) -> str:
    """The tuner against itself without its eyes, and against what needs no learning."""
    name, figures = name_of(suite), suite["figures"]
    if name is None:
        return ""
    others = (f"{name} shuffled", "random-actions", "opened", "rule")
    chances = figures["judged"][name]["chance"]
    told = [(other, spread(chances[other])) for other in others if chances.get(other)]
    return f"Ablations:\n\n{table(('in its place', f'{name} is better'), told)}" if told else ""


def offsets(suite: Suite) -> str:
    """What exactly misjudged rates cost of the result from the right one."""
    found = suite["figures"]["offsets"]
    if not found:
        return ""
    places = list(next(iter(found.values()))["lost"])
    told = [(name, *(f"{percent(of['lost'][place])} %" for place in places), spread(of["worst"]))
            for name, of in found.items()]  # fmt: skip
    words = ("Share of the result from the right rate that is lost, by decades from it: the mean "
             "over jobs of what medians over seeds lose.")  # fmt: skip
    return f"{words}\n\n{table(('method', *places, 'the worst'), told)}"


def cost(suite: Suite) -> str:
    """What training the tuner took, and after how many jobs it is paid for."""
    told = []
    for name, found in suite["figures"]["judged"].items():
        jobs = found["cost"]["break_even"]
        if jobs:
            told.append((name, f"{found['cost']['training_seconds']:,.0f} s",
                         f"{found['cost']['run_seconds']:.2f} s", found["cost"]["search"],
                         jobs_in_words(jobs)))  # fmt: skip
    head = ("policy", "training", "a run", "searcher", "break-even jobs")
    return table(head, told) if told else ""


def machines(suites: Mapping[str, Suite]) -> str:
    """What each suite ran on."""
    told = []
    for name, suite in suites.items():
        known = suite["figures"]["provenance"]
        versions = ", ".join(
            f"{k} {v}" for k, v in known.get("Versions", {}).items() if k != "code"
        )
        told.append((name, known.get("Hardware", {}).get("device", ""), versions,
                     f"{suite['figures']['seconds']:,.0f}"))  # fmt: skip
    head = ("suite", "machine", "versions", "seconds of all cells")
    return f"## Machines\n\n{table(head, told)}" if told else ""


def revive(value: Any, unknown: float = math.nan) -> Any:
    """Undo `report.finite`. A null is no score; more than were tried (``n_max``); or never."""
    if isinstance(value, list):
        return [math.nan if item is None else revive(item) for item in value]
    if not isinstance(value, dict):
        return value
    unknown = math.inf if "n_max" in value else unknown
    return {
        key: unknown if item is None and key in ("low", "point", "high")
        else revive(item, math.inf if key == "break_even" else math.nan)
        for key, item in value.items()
    }  # fmt: skip


def main() -> None:
    """Write the figures, if a run is given, and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of `steersman benchmark`")
    parser.add_argument("--again", action="store_true", help="measure all outcomes that are kept")
    arguments = parser.parse_args()
    path, kept = RESULTS / "evidence.json", RESULTS / "outcomes.jsonl.gz"
    known = json.loads(path.read_text())["suites"] if path.exists() else {}
    if arguments.run or arguments.again:
        if arguments.run and not arguments.run.is_dir():
            parser.error(f"{arguments.run}: no such folder; give the --out of the benchmark")
        new = raw.gather(arguments.run) if arguments.run else {}
        every = raw.load(kept) | new
        raw.save(kept, {name: every[name] for name in (*SUITES, raw.CHOICE) if name in every})
        told = raw.load(kept)
        fresh = {name: measured(told[name]) for name in SUITES
                 if name in (told if arguments.again else new)}  # fmt: skip
        suites = {name: fresh.get(name, known.get(name)) for name in SUITES}
        suites = {name: suite for name, suite in suites.items() if suite is not None}
        seeds = {name: suite["figures"]["seeds"] for name, suite in suites.items()}
        record("evidence", report.finite({"plan": PLAN, "suites": suites}), seeds=seeds)
        known = json.loads(path.read_text())["suites"]
    (DOCS / "evidence.md").write_text(page(revive(known), DOCS))
    README.write_text(summed_up(README.read_text(), revive(known)))
    print(DOCS / "evidence.md")


if __name__ == "__main__":
    main()
