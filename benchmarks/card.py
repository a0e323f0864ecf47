"""Card: docs/default.md, what the shipped policy is, from the artifact and the recorded figures.

    python benchmarks/card.py

Training and envelope are read from `tuner/default.safetensors`, the choice among agents from
results/tuner.json, the scores from results/evidence.json; only its limits are told in words here.
"""

import json
from collections.abc import Iterator
from typing import Any

from evidence import revive
from page import DOCS, table
from record import RESULTS
from verdicts import BARS, UNKNOWN

from envs.dials import label
from tuner import policy
from tuner.policy import DEFAULT, Policy
from tuner.train import MUTE

HEAD = """# The default policy

`TunerCallback("default")` and `steersman apply default` use this policy. `make tuner` trains it
again from scratch; figures of such a training differ from these as those of its agents differ.
"""
LIMITS = """## Limits

- It has been trained on short English texts and small encoders alone. What it does elsewhere rests
  on features that are relative: losses as ratios, the rate in decades from a rule of thumb for the
  model's size. That rule was made for encoders that are fine-tuned with AdamW.
- It gives a classifier's new head ten times the rate from the first update on, and turns the rate
  of all weights; optimizers other than AdamW it has not seen.
- In mode `careful` the head gets three times the rate at most, the tuner acts only where it
  clearly prefers to, and stays within 0.1 to 3 times of the user's schedule; in runs of another
  objective than classification it leaves a rate near the rule of thumb alone; out of the envelope
  above it eases back, and after three such observations in a row it is off.
- One rate, set well, is nearly as good as each job's own best (`docs/experiments.md`): where the
  starting rate is right there is the head's rate to win, and that is the same for all jobs.
"""


def facts(default: Policy) -> Iterator[tuple[str, str]]:
    """What it is and where it comes from."""
    manifest = default.manifest
    origin: dict[str, Any] = dict(manifest.provenance)
    config = origin["config"]
    yield "sha256", f"`{default.sha256}`"
    yield "algorithm", manifest.algorithm + (" after imitation" if config.get("imitate") else "")
    yield "network", json.dumps(manifest.network.model_dump(mode="json"))
    yield "actions", ", ".join(f"x{m:g}" for m in manifest.actions.multipliers)
    yield "opens runs with", ", ".join(map(label, manifest.actions.opens))
    yield "decisions in a run", str(manifest.decisions)
    yield "training tasks", ", ".join(map(str, config["tasks"]))
    yield "last stage", ", ".join(map(str, config["larger"]))
    yield (
        "relatives of a task",
        "class subsets, 200 to 2,000 rows, up to a fifth of the labels wrong",
    )
    yield "updates in a run", ", ".join(f"{config['steps'] * h:g}" for h in config["horizons"])
    yield "starting rates", f"within {manifest.start_decades:g} decades of the rule of thumb"
    yield "training", (f"{origin['episodes']:,} runs, {origin['seconds']:,.0f} s, "
                       f"{origin['threads']} thread")  # fmt: skip


def envelope(default: Policy) -> Iterator[tuple[str, str, str, str]]:
    """The range of each feature in training; what never varied the policy does not see."""
    for feature in default.manifest.features:
        mute = feature.deviation >= MUTE
        known = (f"{feature.low:.3g}", f"{feature.high:.3g}")
        ends = ("never varied", "not seen") if mute else known
        yield feature.name, feature.unit, *ends


def agents(known: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Every agent that was trained, and fixed rates, on the jobs that judged them."""
    for name, row in known["scores"].items():
        if name != "base":
            shown = f"{name}, chosen" if name == f"agent{known['chosen']}" else name
            yield shown, f"{row['test']:.3f}", f"{row['gain']:+.3f}", f"{row['standard_error']:.3f}"


def page() -> str:
    """The card, of the artifact and of the figures in results."""
    default = policy.load(DEFAULT)
    chosen = json.loads((RESULTS / "tuner.json").read_text())
    suites = revive(json.loads((RESULTS / "evidence.json").read_text())["suites"])
    mine = {
        name: suite
        for name, suite in suites.items()
        if default.sha256 in (each["sha256"] for each in suite["policies"])
    }
    scores = [(bar.what, bar.bar, bar.verdict(mine) if mine else UNKNOWN) for bar in BARS]
    parts = [
        HEAD,
        table(("", ""), facts(default)),
        "## The choice\n\nTest accuracy on 8 jobs of the corpus for choosing and on the 6 training "
        "tasks, the mean of jobs and seeds; the difference to the chosen agent over the same runs, "
        f"and its standard error. Training all {chosen['agents']} agents, lessons and compilation "
        f"included, and judging them took {chosen['seconds']:,} s of one core.",
        table(("agent or rate", "accuracy", "difference", "error"), agents(chosen)),
        "## Scores\n\nOn held-out jobs (`docs/evidence.md`).",
        table(("claim", "bar", "figure"), scores),
        LIMITS,
        "## Envelope",
        table(("feature", "unit", "lowest", "highest"), envelope(default)),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    """Write the page."""
    (DOCS / "default.md").write_text(page())
    print(DOCS / "default.md")


if __name__ == "__main__":
    main()
