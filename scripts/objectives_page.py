"""Write docs/objectives.md, which says what works with what, from the code.

python scripts/objectives_page.py
"""

from pathlib import Path

from envs.dials import DIALS, REACH
from envs.examples import FIELDS, KINDS
from envs.handles import MOMENTA
from envs.knobs import OPTIMIZERS, RATE_CEILING, RATE_FLOOR
from envs.objectives import CARDS
from envs.refusals import REFUSED
from envs.task import OBJECTIVE_TASKS, TASKS
from tuner import policy

PAGE = Path(__file__).parent.parent / "docs" / "objectives.md"
ROLES = {
    "TorchJob": "the project's own loop, for classification",
    "packs": "many such runs of small models in one batched model",
    "TrainerJob": "any Trainer as an environment",
    "TunerCallback": "a user's Trainer in one process",
    "DDP": "the same in several processes",
    "FSDP2": "the same with weights in shards",
}
PROCESSES = {
    "One process": "TunerCallback",
    "DDP, by `torchrun` or `accelerate launch`": "DDP",
    "FSDP2": "FSDP2",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell or "–" for cell in line) + " |" for line in lines)


def objectives() -> str:
    """Each objective, what trains it and what judges it."""
    names = {task.objective: name for name, task in reversed(OBJECTIVE_TASKS.items())}
    rows = []
    for objective, card in CARDS.items():
        name = names.get(objective, "trec6")
        task = (TASKS | OBJECTIVE_TASKS)[name]
        native = "and natively" if objective == "classification" else ""
        rows.append(
            [objective, f"`{card.trainer}` ({card.library}) {native}".strip(), card.cost,
             card.metric, ", ".join(card.marks), f"`{name}`", f"{task.dataset}, {task.model}",
             f"[`{objective}.py`](../examples/{objective}.py)"]
        )  # fmt: skip
    head = ["objective", "trainer", "cost, lower is better", "metric on test, higher is better",
            "marks of what it writes", "task", "its data and model", "example"]  # fmt: skip
    return table(head, rows)


def own_data() -> str:
    """What a line of one's own JSON lines holds."""
    rows = [
        [objective, ", ".join(f"`{field}`" for field in FIELDS[kind])]
        for objective, kind in KINDS.items()
    ]
    return table(["objective", "fields"], rows)


def knobs() -> str:
    """Each knob, its unit and range, and where it can be turned."""
    own = {
        "rate": ("peak of the schedule", f"{RATE_FLOOR:g} to {RATE_CEILING:g}"),
        "rollback": ("to the best weights seen, at half the rate", ""),
        "optimizer": (", ".join(OPTIMIZERS), ""),
    }
    described = own | {
        name: (dial.unit, f"{dial.low:g} to {dial.high:g}") for name, dial in DIALS.items()
    }
    rows = [[name, *described[name], *cells.values()] for name, cells in REACH.items()]
    return table(["knob", "unit", "range", *ROLES], rows)


def engines() -> str:
    """Each engine, and the knobs that are turned under it."""
    rows = []
    for engine, place in PROCESSES.items():
        turned = [name for name, cells in REACH.items() if cells[place]]
        rows.append([engine, ", ".join(turned)])
    rows += [[name, "refused before the first update"] for name in REFUSED]
    return table(["engine", "knobs"], rows)


def envelope() -> str:
    """How large the data are that the default policy knows."""
    found = {each.name: each for each in policy.load(policy.DEFAULT).manifest.features}
    low, high = found["rows"].low, found["rows"].high
    slack = policy.SLACK + policy.SLACK_SHARE * (high - low)
    seen = [round(1000 * 10**edge) for edge in (low, high)]
    least = round(1000 * 10 ** (low - slack), -1)
    return (
        f"and has seen {seen[0]:,} to {seen[1]:,} training rows of classification alone. More "
        f"count as {seen[1]:,}; below {least:,.0f}\nit is out of its range"
    )


def page() -> str:
    """The page."""
    places = "\n".join(f"- {name}: {what}" for name, what in ROLES.items())
    return f"""# Objectives, trainers and knobs

What works with what. This page is made from the code by `python scripts/objectives_page.py`; a
test fails when it is stale.

## Objectives

{objectives()}

All of them train all weights or LoRA (`adapter: lora`); GRPO's reward is any function from texts to
numbers from 0 to 1, such as a trained reward model
([`judge.py`](../examples/judge.py)). `steersman apply default --task dpo` runs a task, steered, and
`gymnasium.make("Steersman/FineTune-v0", task="dpo")` is its environment. Marks (chrF and BLEU from
0 to 100, the others from 0 to 1) are given by `apply` alone, to the trained model on test. Any
other transformers or TRL Trainer takes the callback, and is an environment by
`Steersman/Trainer-v0` ([`own_trainer_env.py`](../examples/own_trainer_env.py)).

A task's `dataset` may be a JSONL file of one's own, with the fields below on each line (`scores` is
a list of numbers from -4 to 4, `words` and `tags` are lists of texts):
`steersman apply default --task pairs.jsonl --objective dpo`. Model and settings are those of the
objective's task above, but for what is given (`--model`, `--max-length`). A prompt is cut to half
of `max_length`, and preferences that are equal once they are cut are dropped. Classification also
takes CSV files and datasets, by the columns `text` and `label`.

{own_data()}

## Knobs

{knobs()}

{places}

The task `grpo` has no beta: it is TRL's default of 0, no KL term. A `GRPOTrainer` of one's own that
was given one above 0 has it.

A policy turns the knobs it was trained to turn. The one that is shipped, `default`, turns the rate
{envelope()}, and leaves the schedule as it is. From the first
update on the new head of a classifier gets ten times the rate in mode explore, three times in mode
careful. Mode careful leaves a rate near the rule of thumb alone in runs of other objectives.

## Engines

{engines()}

The optimizer may be AdamW or one that takes its rates, RMSprop, or SGD with a momentum of
{MOMENTA[0]:g} to {MOMENTA[1]:g}. Others (Lion, Prodigy, Muon) the callback refuses: it does not
know which rates suit them.

Gradient accumulation and bf16 change nothing in these rows. The tests run on the CPU; those of
several processes (two, `tests/test_scale.py`) turn the rate and, in DDP, LoRA's scaling, and roll
back; they turn no other knobs.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
