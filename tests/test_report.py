"""The report: known numbers, a page that says the same, and nothing from elsewhere."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from baselines import figures, report, stats
from baselines.figures import INK
from envs.knobs import Knobs


def trial(test, selection=None, spent=100.0, state="complete", decisions=()):
    """A trial of two intervals; ``decisions``: (label, guard) each."""
    labels = [*decisions, *[("", "")] * (2 - len(decisions))]
    return {
        "knobs": vars(Knobs(rate=1e-3)),
        "selection": test if selection is None else selection,
        "selection_loss": 1.0,
        "test": test,
        "test_loss": 1.0,
        "state": state,
        "steps": 20,
        "spent": spent,
        "curve": [
            {"step": 10 * (i + 1), "rate": 1e-3 * 3**i, "factor": 0.5, "train_loss": 1.0,
             "selection_loss": 1.0 / (i + 1), "selection": test, "validation_loss": math.nan,
             "decision": label, "guard": guard}
            for i, (label, guard) in enumerate(labels)
        ],
    }  # fmt: skip


def outcome(method, task, seed, trials, **extra):
    spent = trials[-1]["spent"] if trials else 0.0
    return {"method": method, "task": task, "seed": seed, "start_rate": 1e-3, "budget": 1000.0,
            "spent": spent, "run_cost": 100.0, "seconds": 2.0, "trials": trials,
            } | extra  # fmt: skip


def several():
    """Two tasks, four seeds: steered 0.8, keep 0.7, a search with 1 good trial in 10."""
    found = []
    for task in ("bbc/tiny-32", "sms/tiny-32"):
        for seed in range(4):
            pool = [trial(0.9 if i == seed else 0.5 + i / 100, spent=100.0 * (i + 1))
                    for i in range(10)]  # fmt: skip
            steps = [("x3", ""), ("rollback", "rate ceiling")]
            found += [
                outcome("steersman", task, seed, [trial(0.8, spent=120.0, decisions=steps)],
                        steered=True, versions={"torch": "2.13"}, device="cpu"),
                outcome("random", task, seed, pool),
                outcome("keep", task, seed, [trial(0.7 if seed else 0.81)]),
            ]  # fmt: skip
    return found


@pytest.fixture(scope="module")
def summary():
    return report.summarise(several(), [{"seconds": 600.0}, {"seconds": 600.0}])


def row(summary, name):
    return next(row for row in summary["methods"] if row["name"] == name)


def test_known_numbers(summary):
    assert summary["steered"] == "steersman"
    assert [row["kind"] for row in summary["methods"]] == ["steered", "search", "schedule"]
    ours, random, keep = (row(summary, name) for name in ("steersman", "random", "keep"))
    assert ours["test"] == pytest.approx({"low": 0.8, "point": 0.8, "high": 0.8})
    assert ours["runs"] == pytest.approx(1.2)
    assert ours["chance"] is None
    assert keep["chance"]["point"] == pytest.approx(0.75)  # all seeds but the first
    assert random["chance"]["point"] == 0.0  # the search has found 0.9 by the end
    # After 1.2 runs it has one trial: 0.9 for seed 0, else 0.5.
    assert random["chance_equal"]["point"] == pytest.approx(0.75)
    assert (random["trials"], random["diverged"], random["cells"]) == (80, 0, 8)
    assert summary["harm"]["rate"] == pytest.approx(2 / 8)
    assert summary["harm"]["worst"] == pytest.approx(0.01)
    assert {task["name"]: task["role"] for task in summary["tasks"]} == {
        "bbc/tiny-32": "held-out", "sms/tiny-32": "train"
    }  # fmt: skip
    assert summary["seconds"] == 48.0


def test_table_of_the_command_line(summary):
    chance = summary["table"][2][3]
    assert summary["table"][0] == ["steersman", "1.2", "80.0 % (80.0 to 80.0)", "", "", "0 of 8"]
    assert chance.startswith("75.0 % (")
    assert summary["table"][1][4].endswith(")")


def test_trials_to_match_is_that_of_stats(summary):
    pool = [[0.9 if i == seed else 0.5 + i / 100 for i in range(10)] for seed in range(4)]
    want = stats.trials_to_match([0.8] * 4, pool, pool).interval.point
    assert summary["match"]["random"]["median"]["point"] == want
    assert 6 < want < 10  # the good one is in N of ten with chance N / 10: 0.75 of the way up
    assert summary["match"]["random"]["tasks"]["bbc/tiny-32"]["n_max"] == 10
    # 1,200 s of training over (N - 1) trials saved at 0.2 s a run.
    assert summary["cost"]["jobs"] == math.ceil(1200 / ((want - 1) * 0.2))


def test_curve_is_the_best_so_far(summary):
    curve = summary["curves"]["random"]
    assert (curve["runs"][0], curve["runs"][-1]) == (1.0, 10.0)
    assert curve["point"][-1] == pytest.approx(0.9)
    assert curve["point"][0] == pytest.approx(stats.iqm([[0.9, 0.5, 0.5, 0.5]] * 2))
    assert summary["curves"]["steersman"]["runs"] == [1.2]


def test_interval_agrees_with_stats():
    rng = np.random.default_rng(1)
    jobs = [rng.normal(size=9), rng.normal(size=7)]
    got, want = report.interval_of(jobs), stats.bootstrap(stats.iqm, jobs)
    assert got["point"] == pytest.approx(want.point)
    assert got["low"] == pytest.approx(want.low, abs=0.12)
    assert got["high"] == pytest.approx(want.high, abs=0.12)


def test_the_same_again_from_another_rate_is_no_further_evidence(summary):
    once = several()
    twice = report.summarise([*once, *(o | {"start_rate": 1e-2} for o in once)])
    assert (twice["cells"], twice["trials"]) == (2 * summary["cells"], summary["trials"])
    for one, two in zip(summary["methods"], twice["methods"], strict=True):
        assert [two[key] for key in ("test", "chance", "chance_equal")] == [
            one[key] for key in ("test", "chance", "chance_equal")
        ]
    assert twice["match"] == summary["match"]
    scores = report.scores_of(report.table_of(once)["keep"])
    assert [job.shape for job in scores] == [(4, 1)] * 2


def test_the_end_of_the_budget_makes_no_trial_but_a_pruner_does():
    done, cut = trial(0.5), trial(0.4, state="pruned")
    assert report._whole([done, cut]) == [done]
    assert report._whole([done, cut, cut]) == [done, cut, cut]


def test_failed_run_is_the_worst():
    failed = [outcome("steersman", "bbc/tiny-32", s, [], steered=True) for s in range(2)]
    found = report.summarise([*several()[2:12:3], *failed])
    assert row(found, "steersman")["test"]["point"] == -math.inf
    assert "– %" in found["verdict"]


def test_verdict_tells_good_news_and_bad(summary):
    words = summary["verdict"]
    assert words.startswith("On 2 tasks, 1 held out, one steered run reached 80.0 % (80.0 to 80.0)")
    assert "10.0 points more" in words
    assert "0 of 8 runs" in words
    worse = [o | {"trials": [trial(0.6)]} if o.get("steered") else o for o in several()]
    assert "10.0 points less" in report.summarise(worse)["verdict"]
    assert "None of them is a steered run" in report.summarise(several()[1:3])["verdict"]


class Page(HTMLParser):
    """Rows of the table of methods, all attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.attributes, self.text, self.tags = [], [], "", []
        self._in = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "table":
            self._in = ("id", "methods") in attributes
        if self._in and tag == "tr":
            self.rows.append([])
        if self._in and tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._in = self._in and tag != "table"

    def handle_data(self, data):
        self.text += data
        if self._in and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    audit = [{"step": 0, "applied": {"multiplier": 3.0, "rollback": False, "rate": 3e-5},
              "guard": ""}]  # fmt: skip
    curve = [{"step": 10, "rate": 3e-5, "train_loss": 1.0, "validation_loss": None}]
    steered = [{"task": "mine <b>", "mode": "safe", "curve": curve, "decisions": audit}]
    training = [{"return_mean": 0.1 * i, "return_low": 0.0, "return_high": math.nan,
                 "decisions": 10, "seconds": 600.0} for i in range(2)]  # fmt: skip
    summary = report.write(folder, several(), steered=steered, training=training,
                           facts={"Tuner": {"name": "<script>alert(1)</script>"}})  # fmt: skip
    return folder, summary, (folder / "report.html").read_text()


def test_every_number_in_the_table_is_the_summarys(written):
    _, summary, text = written
    rows = Page(text).rows[1:]
    assert len(rows) == len(summary["methods"])
    for cells, row in zip(rows, summary["methods"], strict=True):
        name, runs, test, equal, full, trials, diverged = (" ".join(c.split()) for c in cells)
        assert name == row["name"]
        assert runs == f"{row['runs']:.3g}"
        low, point, high = (f"{100 * row['test'][k]:.1f}" for k in ("low", "point", "high"))
        assert test == f"{point} % {low} to {high}"
        for cell, key in ((equal, "chance_equal"), (full, "chance")):
            low, point, high = (f"{100 * row[key][k]:.0f}" if row[key] else ""
                                for k in ("low", "point", "high"))  # fmt: skip
            assert cell == (f"{point} % {low} to {high}" if row[key] else "–")
        assert (trials, diverged) == (str(row["trials"]), str(row["diverged"]))


def test_page_is_self_contained(written):
    _, _, text = written
    page = Page(text)
    assert not re.search(r"(https?:)?//\w|@import|url\((?!#)", text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [n for n, _ in page.attributes if n.startswith("on") or n == "src"]
    assert "<script>alert" not in text
    assert "mine <b>" not in text
    names = [value for name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    asked = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert {a or b for a, b in asked} <= set(names)


def test_every_figure_has_words_and_follows_the_page(written):
    folder, _, text = written
    figures = text.count("<svg")
    assert figures == text.count('role="img" aria-label="') == text.count("<figure")
    assert INK not in text
    assert "var(--ink)" in text
    files = sorted(path.name for path in folder.glob("figures/*.png"))
    assert len(files) == figures
    assert {"final.png", "match.png", "quality.png", "training.png"} < set(files)
    assert all((folder / "figures" / f).read_bytes()[:4] == b"\x89PNG" for f in files)
    assert "2 decisions: x3, rollback" in text


def test_summary_on_disk_is_strict_json(written):
    folder, summary, _ = written
    found = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert found["verdict"] == summary["verdict"]


def test_provenance_comes_from_the_outcomes(written):
    assert report.provenance(several()) == {
        "Versions": {"torch": "2.13"}, "Hardware": {"device": "cpu"}
    }  # fmt: skip
    assert "2.13" in Page(written[2]).text


def test_one_colour_for_each_method(summary):
    styles = figures.styles(summary)
    assert len({colour for colour, _ in styles.values()}) == len(styles) == 3


def test_nothing_to_report():
    empty = report.summarise([])
    text = report.render(empty, figures.draw_all(empty))
    assert "nothing can be said" in text


def test_running_best_follows_selection_not_test():
    handed = [trial(0.9, selection=0.1, spent=100.0), trial(0.4, selection=0.2, spent=200.0)]
    assert report.score_of(outcome("random", "a", 0, handed)) == 0.4
    assert report.score_of(outcome("random", "a", 0, handed), runs=1.0) == 0.9
    assert report.score_of(outcome("random", "a", 0, handed), runs=0.1) == 0.9
