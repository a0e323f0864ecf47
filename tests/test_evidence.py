"""Evidence: known numbers from hand-made outcomes, verdicts that hold and miss, and the page."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_report import outcome, trial

from baselines import report, stats
from baselines.evidence import measure
from baselines.ledger import Ledger
from tuner import policy
from tuner.benchmark import finished
from tuner.policy import DEFAULT
from tuner.suites import PLAN, SUITES

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # scripts, run from their folder

import card
import evidence as book
import raw
import record
import verdicts
from choose import spent

TASKS = ("bbc/tiny-32", "health/tiny-32")
TUNER = {"name": "steersman", "algorithm": "ppo", "sha256": "a" * 64,
         "training": {"episodes": 9, "seconds": 600.0}}  # fmt: skip


def pool(size=32):
    """Trials 0.50, 0.51 ...: the best of N is worth more the larger N is."""
    return [trial(0.5 + i / 100, spent=100.0 * (i + 1)) for i in range(size)]


def steered(task, seed, test, **extra):
    return outcome("steersman", task, seed, [trial(test, spent=120.0)], steered=True, **extra)


def several(test, size=32):
    """Two jobs, five seeds: the tuner, its ablation, keep at 0.7, fixed at 0.75, and TPE."""
    return [
        made
        for task in TASKS
        for seed in range(5)
        for made in (
            steered(task, seed, test),
            outcome("keep", task, seed, [trial(0.7)]),
            outcome("fixed", task, seed, [trial(0.75)]),
            outcome("steersman shuffled", task, seed, [trial(0.6)]),
            outcome("tpe", task, seed, pool(size)),
        )
    ]


def suite(outcomes, policies=(TUNER,), scale="full", name="datasets"):
    """As `measured` makes it of a ledger, through JSON and back."""
    about = {"plan": PLAN, "scale": scale, "purpose": "Why.", "policies": list(policies),
             "config": SUITES[name].config(scale).model_dump(mode="json")}  # fmt: skip
    whole = report.finite(about | {"figures": measure(outcomes, policies)})
    return book.revive(json.loads(json.dumps(whole, allow_nan=False)))


def verdict_of(what, **suites):
    return next(bar for bar in verdicts.BARS if bar.what.startswith(what)).verdict(suites)


@pytest.fixture(scope="module")
def good():
    return suite(several(0.80))


@pytest.fixture(scope="module")
def bad():
    return suite(several(0.65))


def test_a_claim_that_holds_and_one_that_misses(good, bad):
    worth = "trials of TPE"
    assert "missed" not in verdict_of(worth, datasets=good)
    # Of 0.50 to 0.81 the best of N is worth 0.50 + 0.33 N / (N + 1) - 0.01: 0.65 needs one.
    assert verdict_of(worth, datasets=bad).startswith("**1 (1 to ")
    assert verdict_of(worth, datasets=bad).endswith("missed**")
    assert verdict_of("better than the best fixed", datasets=good).startswith("100.0 % (100.0")
    assert verdict_of("better than the best fixed", datasets=bad) == (
        "**0.0 % (0.0 to 0.0): missed**"
    )
    assert verdict_of("better than the same policy", datasets=bad).startswith("100.0 %")


def test_trials_to_match_is_that_of_stats(good):
    scores = [0.5 + i / 100 for i in range(32)]
    want = stats.trials_to_match([0.8], scores, scores, resamples=5).interval.point
    assert good["figures"]["judged"]["steersman"]["match"]["tpe"]["median"]["point"] == want >= 16


def test_more_than_were_tried_is_no_proof_of_a_higher_bar():
    few = suite(several(0.80, size=6), scale="quick")
    assert verdict_of("trials of TPE", datasets=few) == (
        "> 6 (> 6 to > 6), at scale quick: too few trials to tell"
    )
    assert verdict_of("trials of TPE on a held-out", model=few).endswith("too few trials to tell")
    ten = suite(several(0.80, size=10))
    assert verdict_of("trials of TPE on a held-out", model=ten) == "> 10 (> 10 to > 10)"
    assert [verdicts.reaches(math.inf, n, 8) for n in (6, 8)] == [None, True]


def test_what_did_not_take_part_is_not_measured(good):
    assert verdict_of("Q-learning", datasets=good) == "not measured"
    assert verdict_of("trials of TPE") == "not measured"
    lone = suite([o for o in several(0.8) if o["method"] == "keep"])
    for bar in verdicts.BARS:
        assert bar.verdict(dict.fromkeys(SUITES, lone)) == "not measured"


def test_policies_are_told_apart_by_their_algorithm():
    sarsa = TUNER | {"name": "sarsa", "algorithm": "sarsa"}
    ppo = TUNER | {"name": "ppo"}
    found = []
    for o in several(0.65):
        if o["method"] == "steersman":
            found += [o | {"method": "ppo", "trials": [trial(0.8, spent=120.0)]},
                      o | {"method": "sarsa"}]  # fmt: skip
        else:
            found.append(o)
    both = suite(found, [ppo, sarsa])
    assert verdict_of("SARSA", datasets=both).startswith("**1 (")
    assert "missed" not in verdict_of("trials of TPE", datasets=both)
    assert both["figures"]["steered"] == "ppo"
    assert set(both["figures"]["judged"]["sarsa"]["match"]) == {"tpe"}


def test_of_several_agents_the_median_one_is_told_and_all_of_them():
    agents = [TUNER | {"name": f"sarsa {n}", "algorithm": "sarsa"} for n in range(3)]
    found = [o for o in several(0.8) if o["method"] in ("keep", "tpe")]
    for agent, test in zip(agents, (0.505, 0.77, 0.9), strict=True):
        found += [outcome(agent["name"], task, seed, [trial(test)], steered=True)
                  for task in TASKS for seed in range(5)]  # fmt: skip
    told = verdict_of("five agents of SARSA", agents=suite(found, agents, name="agents"))
    # The best of n of 32 evenly spaced trials is expected at 33 n / (n + 1) of them: 28 at n = 6.
    assert told == "6 (6 to 6); all 3: 1, 6, > 32"  # all studies are alike
    found = [o for o in found if o["method"] not in ("sarsa 1", "sarsa 2")]
    one = suite(found, agents[:1], name="agents")
    assert verdict_of("five agents of SARSA", agents=one) == "not measured"


def test_harm_and_divergence_are_counted():
    """Of twenty cells one is 0.69 against 0.70 (1.4 % worse), one 0.695 (0.7 %), one diverged."""
    tests = [0.72] * 17 + [0.69, 0.695, 0.72]
    found = []
    for seed, test in enumerate(tests):
        run = trial(test, spent=120.0, state="diverged" if seed == 19 else "complete")
        # Its own seeds spread too much for the bound of two standard deviations.
        own = 0.70 if seed >= 17 else 0.65 + seed / 400
        found += [outcome("steersman", TASKS[0], seed, [run], steered=True),
                  outcome("keep", TASKS[0], seed, [trial(own)])]  # fmt: skip
    careful = suite(found, name="careful")
    judged = careful["figures"]["judged"]["steersman"]
    assert (judged["harm"]["count"], judged["harm"]["of"]) == (1, 20)
    assert judged["harm"]["worst"] == pytest.approx(0.01)
    assert (judged["diverged"]["count"], judged["diverged"]["of"]) == (1, 20)
    assert judged["harm"]["high"] == pytest.approx(0.2487, abs=1e-3)  # Clopper & Pearson
    assert verdict_of("careful: clearly", careful=careful).startswith("**5.0 % (0.1 to 24.9), 1 of")
    assert verdict_of("careful: diverged", careful=careful).endswith("1 of 20: missed**")
    assert verdict_of("careful: better", careful=careful).startswith("90.0 %")
    sound = suite([steered(TASKS[0], s, 0.7) for s in range(4)]
                  + [outcome("keep", TASKS[0], s, [trial(0.7)]) for s in range(4)])  # fmt: skip
    assert verdict_of("careful: clearly", careful=sound) == "0.0 % (0.0 to 60.2), 0 of 4"


def test_what_misjudged_rates_cost():
    found = []
    for task, level in zip(TASKS, (0.8, 0.4), strict=True):
        for seed in range(3):
            for offset, share in ((-1.5, 0.95), (0.0, 1.0), (1.5, 0.99)):
                cell = {"offset": offset}
                found.append(steered(task, seed, level * share, start_rate=10**offset, cell=cell))
    robust = suite(found, name="robust")
    lost = robust["figures"]["offsets"]["steersman"]
    assert lost["lost"] == pytest.approx({"-1.5": 0.05, "+0": 0.0, "+1.5": 0.01})
    assert lost["worst"] == pytest.approx({"low": 0.05, "point": 0.05, "high": 0.05})
    assert verdict_of("explore", robust=robust) == "**5.0 % (5.0 to 5.0): missed**"


def test_the_budget_is_judged_by_the_strongest_searcher():
    found = [o for o in several(0.7) if o["method"] in ("steersman", "keep")]
    for task in TASKS:
        for seed in range(5):
            best = [trial(0.7, spent=120.0), trial(0.8, spent=240.0)]
            found += [
                outcome("steersman best of 4", task, seed, best, steered=True),
                outcome("random", task, seed, pool(4)),
                outcome("tpe", task, seed, [trial(0.7), trial(0.9 if seed < 2 else 0.7)]),
            ]  # fmt: skip
    budget = suite(found, name="budget")
    words = verdict_of("best of 4", budget=budget)
    assert words.startswith("**60.0 % (")
    assert words.endswith("against tpe: missed**")


def test_break_even_is_training_over_what_a_job_saves(good):
    cost = good["figures"]["judged"]["steersman"]["cost"]
    n = good["figures"]["judged"]["steersman"]["match"]["tpe"]["median"]["point"]
    run = 2.0 / 32  # seconds of a cell over its runs
    assert cost["break_even"]["point"] == pytest.approx(600 / ((n - 1) * run))
    assert "missed" in verdict_of("jobs until", datasets=good)
    nothing = suite(several(0.5))
    assert verdict_of("jobs until", datasets=nothing).startswith("**never (")
    assert suite(several(0.8), [TUNER | {"training": {"seconds": None}}])["figures"]["judged"][
        "steersman"
    ]["cost"]["break_even"] is None  # fmt: skip


def test_normalised_scores_lie_between_keep_and_the_best_trial(good):
    scores = good["figures"]["normalised"]
    assert scores["jobs"][TASKS[0]] == pytest.approx({"default": 0.7, "oracle": 0.81})
    assert scores["methods"]["keep"]["point"] == pytest.approx(0.0)
    assert scores["methods"]["tpe"]["point"] == pytest.approx(1.0)
    assert scores["methods"]["steersman"]["point"] == pytest.approx(0.1 / 0.11)
    profile = dict(zip(np.round(scores["taus"], 3), scores["profiles"]["fixed"], strict=True))
    assert (profile[0.45], profile[0.475]) == (1.0, 0.0)  # 0.05 / 0.11


def test_losses_are_where_it_is_more_often_behind(good, bad):
    lost = good["figures"]["judged"]["steersman"]["losses"]
    assert [(each["task"], each["method"]) for each in lost] == [(task, "tpe") for task in TASKS]
    found = list(verdicts.losses({"datasets": bad}))
    assert {row[3] for row in found} == {"tpe", "fixed", "keep"}
    tpe = next(row for row in found if row[3] == "tpe")
    assert tpe[4:] == ("32", "0.0 %", "100.0 %", "5")  # after 1.2 runs it has its 0.50 only


def test_ranks_are_told_of_seeds_not_of_their_starting_rates():
    once = several(0.8)
    again = [*once, *(o | {"start_rate": 1e-2} for o in once)]
    ranks = measure(once, [TUNER])["ranks"]
    assert ranks["blocks"] == 10
    assert measure(again, [TUNER])["ranks"] == ranks


def test_ranks_and_cliques_of_known_scores():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 1))
    scores = np.hstack([base + 1, base + rng.normal(scale=1e-3, size=(40, 2)), base - 1])
    ranks = stats.mean_ranks(scores)
    assert (ranks[0], ranks[3]) == (1.0, 4.0)
    assert ranks[1] + ranks[2] == 5.0
    p = stats.wilcoxon_holm(scores)
    assert np.array_equal(p, p.T)
    assert (p[0, 1] < 0.001, p[1, 2] > 0.05, p[3, 3]) == (True, True, 1.0)
    assert [sorted(group) for group in stats.cliques(ranks, p)] == [[1, 2]]
    same = stats.wilcoxon_holm(np.ones((5, 3)))
    assert same.min() == 1.0
    assert stats.cliques(stats.mean_ranks(np.ones((5, 3))), same) == [[0, 1, 2]]


def test_holm_multiplies_by_the_hypotheses_that_are_left():
    from scipy.stats import wilcoxon

    rng = np.random.default_rng(3)
    scores = rng.normal(loc=(0.0, 0.4, 1.0), size=(30, 3))
    pairs = [(0, 1), (0, 2), (1, 2)]
    raw = {pair: wilcoxon(scores[:, pair[0]] - scores[:, pair[1]], method="asymptotic").pvalue
           for pair in pairs}  # fmt: skip
    p, highest = stats.wilcoxon_holm(scores), 0.0
    for left, pair in zip((3, 2, 1), sorted(pairs, key=raw.get), strict=True):
        highest = max(highest, left * raw[pair])
        assert p[pair] == pytest.approx(min(1.0, highest))


def test_a_page_of_nothing_says_not_measured_everywhere(tmp_path):
    text = book.page({}, tmp_path)
    verdict = text.split("## Verdict")[1].split("\n## ")[0].strip().splitlines()[2:]
    assert len(verdict) == len(verdicts.BARS)
    assert all(line.split(" | ")[2] == "not measured" for line in verdict)
    for name in SUITES:
        assert f"{name}: not measured." in text
    assert "Losses: not measured." in text
    assert not list(tmp_path.rglob("*.svg"))


def test_the_page_shows_verdicts_figures_and_losses(good, bad, tmp_path):
    text = book.page({"datasets": bad, "model": good}, tmp_path)
    assert "**0.0 % (0.0 to 0.0): missed**" in text
    named = set(re.findall(r"\]\((evidence/[^)]+)\)", text))
    drawn = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.svg")}
    assert named == drawn
    assert {f"evidence/model-{kind}.svg" for kind in ("match", "quality", "profiles", "ranks")} < (
        drawn
    )
    before = {name: (tmp_path / name).read_bytes() for name in drawn}
    assert book.page({"datasets": bad, "model": good}, tmp_path) == text
    assert {name: (tmp_path / name).read_bytes() for name in drawn} == before
    assert max(map(len, before.values())) < 60_000
    assert "| datasets | steersman | bbc/tiny-32 | tpe | 32 | 0.0 % | 100.0 % | 5 |" in text
    assert "| steersman shuffled | 100.0 % (100.0 to 100.0) |" in text
    assert "inf" not in text.replace("information", "")
    assert "nan" not in text


def test_a_failed_run_is_written_and_not_hidden(tmp_path):
    failed = [outcome("steersman", TASKS[0], s, [], steered=True) for s in range(2)]
    rest = [o for o in several(0.8) if o["method"] != "steersman" and o["seed"] < 2]
    found = suite(failed + [o for o in rest if o["task"] == TASKS[0]])
    assert "– % (–" in book.page({"datasets": found}, tmp_path)
    assert found["figures"]["judged"]["steersman"]["harm"]["count"] == 2


def test_the_shipped_tuner_is_charged_all_agents_and_the_choice():
    known = json.loads((record.RESULTS / "tuner.json").read_text())
    shipped = {**TUNER, "sha256": known["sha256"]}
    assert book.charged(TUNER) == TUNER
    assert book.charged(shipped)["training"] == {"episodes": 9, "seconds": known["seconds"]}
    assert known["seconds"] > known["agents"] * 180


def test_a_choice_costs_all_agents_and_the_runs_that_judged_them(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for number, o in enumerate(several(0.8)[:4]):
        ledger.plan([(str(number), {"task": {"dataset": o["task"]}})])
        ledger.commit(str(number), {**o, "seconds": 2.5})
    known = SimpleNamespace(manifest=SimpleNamespace(provenance={"seconds": 100.0}))
    agents = [SimpleNamespace(policy=known)] * 3
    assert spent(agents, tmp_path / "ledger.sqlite") == 310.0


def test_the_readme_tells_what_the_figures_say():
    known = json.loads((record.RESULTS / "evidence.json").read_text())["suites"]
    text = book.README.read_text()
    assert book.summed_up(text, book.revive(known)) == text


def test_the_card_tells_what_the_figures_say():
    assert card.page() == (book.DOCS / "default.md").read_text(), "run: python benchmarks/card.py"


def test_every_policy_that_took_part_is_kept():
    suites = json.loads((record.RESULTS / "evidence.json").read_text())["suites"]
    wanted = {each["sha256"] for suite in suites.values() for each in suite["policies"]}
    kept = [DEFAULT, *(record.RESULTS / "policies").glob("*.safetensors")]
    assert wanted <= {policy.load(path).sha256 for path in kept}


def test_outcomes_of_a_ledger_become_the_json_and_the_page(tmp_path, monkeypatch):
    (tmp_path / "careful").mkdir()
    ledger = Ledger(tmp_path / "careful" / "ledger.sqlite")
    cells = [o for o in several(0.8) if o["method"] in ("steersman", "keep")]
    for number, o in enumerate(cells):
        ledger.plan([(str(number), {"task": {"dataset": o["task"]}})])
        ledger.commit(str(number), o)
    assert finished(tmp_path, SUITES) == {}, "unfinished"
    about = {"plan": PLAN, "scale": "full", "purpose": "Why.", "policies": [TUNER],
             "config": SUITES["careful"].full.model_dump(mode="json")}  # fmt: skip
    ledger.set_meta("suite", about)
    ledger.set_meta("cells of the latest comparison", json.dumps([str(n) for n in range(20)]))
    monkeypatch.setattr(book, "DOCS", tmp_path)
    monkeypatch.setattr(book, "README", tmp_path / "README.md")
    book.README.write_text(f"Above.\n{book.MARKS[0]}\nold\n{book.MARKS[1]}\nBelow.\n")
    for module in (book, record):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--run", str(tmp_path)])
    book.main()
    text = (tmp_path / "evidence.md").read_text()
    assert "0.0 % (0.0 to 30.8), 0 of 10" in text
    known = json.loads((tmp_path / "evidence.json").read_text(), parse_constant=pytest.fail)
    assert known["seeds"] == {"careful": [0, 1, 2, 3, 4]}
    assert {"hardware", "versions", "plan"} < set(known)
    told = book.README.read_text()
    assert told.startswith("Above.\n")
    assert told.endswith("\nBelow.\n")
    assert "| 0 % | 0.0 % (0.0 to 30.8), 0 of 10 |" in told
    assert "old" not in told
    (tmp_path / "empty").mkdir()  # what a run lacks stays as it was
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--run", str(tmp_path / "empty")])
    book.main()
    monkeypatch.setattr(sys, "argv", ["evidence.py"])  # the page alone, from the JSON
    book.main()
    assert (tmp_path / "evidence.md").read_text() == text
    assert book.README.read_text() == told
    (tmp_path / "evidence.json").unlink()
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--again"])  # all of it, from the raw outcomes
    book.main()
    assert (tmp_path / "evidence.md").read_text() == text
    assert json.loads((tmp_path / "evidence.json").read_text())["suites"] == known["suites"]
    kept = raw.load(tmp_path / "outcomes.jsonl.gz")["careful"]["outcomes"]
    assert [o["trials"][0]["test"] for o in kept] == [o["trials"][0]["test"] for o in cells]
    assert not any("curve" in each for o in kept for each in o["trials"])
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--run", str(tmp_path / "absent")])
    with pytest.raises(SystemExit):
        book.main()
    assert (tmp_path / "evidence.md").read_text() == text
