"""The loop of learning from feedback: generate, collect, reward, fit, optimise, evaluate, repeat.

python examples/feedback/loop.py --out runs/feedback
"""

import json
import random
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import rewards
import show
import torch
import training
import typer
from candidates import Item, generate
from evaluation import evaluate
from form import Form
from rich.progress import track
from sources import File, Model, Source, Terminal
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from envs import texts
from envs.errors import BadInput
from envs.files import write_atomic
from envs.setups import tokenizer_of
from envs.task import Task
from envs.workload import load_tokenizer, pretrained
from tuner import app

SOURCES = ("model", "file", "terminal", "web")
REWARD = "tiny-64"  # what the reward model begins as: an encoder that knows words
ROWS = 2000  # of training data in a run, at most: more than this `default` was not trained for


@dataclass(frozen=True)
class Settings:
    """What decides the result; a folder holds one run of it."""

    rounds: int = 3
    source: str = "model"
    kind: str = "scores"
    seed: int = 0
    model: str = "tiny-gpt-64"
    prompts: int = 200  # that are asked about in a round
    held_out: int = 256  # prompts of the evaluation
    rater_epochs: int = 2
    imitation_steps: int = 200
    reward_steps: int = 150
    policy_steps: int = 40

    def __post_init__(self) -> None:
        for name, known in (("source", SOURCES), ("kind", rewards.KINDS)):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise BadInput(f"loop: {name}: {value!r}; give one of {', '.join(known)}")
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < (name != "seed"):
                raise BadInput(f"loop: {name}: {value} is too small; give 1 or more")


def run(settings: Settings, out: Path, source: Source | None = None) -> list[dict[str, Any]]:
    """The whole loop; what ``out`` holds already is not done again. Returns the evaluations.

    source: who is asked; None is the model that stands in for a person.
    """
    talk = {split: _short(split) for split in ("train", "test")}
    shown, ask = talk["train"][:ROWS], [prompt for prompt, _ in talk["train"][ROWS:]]
    random.Random(settings.seed).shuffle(ask)
    practice, ask = ask[:ROWS], ask[ROWS:]
    if settings.rounds * settings.prompts > len(ask):
        raise BadInput(
            f"loop: prompts: {settings.prompts} in each of {settings.rounds} rounds are more than "
            f"the {len(ask)} that there are; give fewer, or fewer rounds"
        )
    _begin(settings, out)
    held_out = [prompt for prompt, _ in talk["test"][: settings.held_out]]
    seed = 1000 * settings.seed

    judges = _judges(settings, out)
    if source is None:
        source = Model(judges["rater"], [reply for _, reply in shown], seed)

    start = policy = out / "start" / "policy"
    learn = partial(training.imitate, base=settings.model, shown=shown,
                    steps=settings.imitation_steps, seed=seed)  # fmt: skip
    _stage("start: imitate people's answers", policy, learn)
    judge = partial(_evaluate, start=start, prompts=held_out, judges=judges)
    evaluation = out / "start" / "evaluation"
    found = [_stage("start: evaluate", evaluation, partial(judge, policy=policy))]

    pairs: list[rewards.Pair] = []
    for number in range(1, settings.rounds + 1):
        here, at = out / f"round-{number}", seed + 10 * number
        title = f"round {number}: "
        about = ask[(number - 1) * settings.prompts : number * settings.prompts]

        write = partial(_write, policy=policy, prompts=about, name=f"r{number}", seed=at)
        _stage(title + "generate candidates", here / "candidates", write)
        items = _read(here / "candidates")

        pairs += _feedback(here, items, settings.kind, source, pairs)
        random.Random(at).shuffle(pairs)

        fit = partial(training.train_reward_model, base=REWARD, pairs=pairs[:ROWS],
                      steps=settings.reward_steps, seed=at)  # fmt: skip
        _stage(title + "fit the reward model", here / "reward", fit)

        learn = partial(training.optimise, start=policy, prompts=practice, reward=here / "reward",
                        steps=settings.policy_steps, seed=at)  # fmt: skip
        policy = here / "policy"
        _stage(title + "optimise the policy", policy, learn)

        evaluation = here / "evaluation"
        found.append(_stage(title + "evaluate", evaluation, partial(judge, policy=policy)))
    show.plot(found, out)
    return found


def _judges(settings: Settings, out: Path) -> dict[str, Callable[[Any], list[float]]]:
    """Two models of people's ratings, of different sizes, that have no text in common.

    The first stands in for the person who is asked. The second is asked nothing: what the policy
    learns about the first one's mistakes, and not about good answers, does not please it.
    """
    rated = texts.ratings()
    plans = {
        "rater": ("tiny-64", rated["train"]),
        "second": ("tiny-32", [*rated["validation"], *rated["selection"]]),
    }
    judges = {}
    for place, (name, (base, rows)) in enumerate(plans.items()):
        folder = out / "judges" / name
        fit = partial(training.train_rater, base=base, rows=rows, held_out=rated["test"],
                      epochs=settings.rater_epochs, seed=place)  # fmt: skip
        _stage(f"judges: fit the {name} to people's ratings", folder, fit)
        judges[name] = training.load_rater(folder).rate
    return judges


def _write(folder: Path, *, policy: Path, prompts: list[str], name: str, seed: int) -> None:
    items = generate(_model(policy), load_tokenizer(str(policy)), prompts, name=name, seed=seed)
    write_atomic(folder / "candidates.jsonl", "".join(_line(asdict(i)) for i in items).encode())


def _read(folder: Path) -> list[Item]:
    rows = _lines(folder / "candidates.jsonl")
    return [Item(r["id"], r["prompt"], tuple(r["texts"]), tuple(r["ways"])) for r in rows]


def _evaluate(
    _: Path, *, policy: Path, start: Path, prompts: list[str], judges: dict[str, Any]
) -> dict[str, Any]:
    tokenizer = load_tokenizer(str(policy))
    return evaluate(_model(policy), _model(start), tokenizer, prompts, judges)


def _feedback(
    here: Path, items: list[Item], kind: str, source: Source, before: Sequence[rewards.Pair] = ()
) -> list[rewards.Pair]:
    """Each row is kept as soon as it is there, so that nobody is asked twice.

    A file is read anew until the round is done. It is done when there is something to learn from,
    with the pairs from ``before``; else what told nothing is asked again.
    """
    path, done = here / "feedback.jsonl", here / "feedback.done"
    anew = isinstance(source, File) and not done.exists()
    rows = {} if anew else {row["id"]: row for row in _lines(path)}
    asked = [item for item in items if item.texts]
    if not done.exists():
        write_atomic(path, "".join(map(_line, rows.values())).encode())
        left = [item for item in asked if item.id not in rows]
        given, title = source.ask(left, kind) if left else (), f"{here.name}: collect {kind}"
        person = isinstance(source, Terminal | Form)
        with open(path, "a", encoding="utf-8") as file:
            for row in track(given, title, len(left), disable=person):
                rows[row["id"]] = row
                file.write(_line(row))
                file.flush()
    found = {
        item.id: rewards.pairs(kind, item.prompt, item.texts, rows[item.id][kind])
        for item in items
        if item.id in rows
    }
    pairs = [pair for each in found.values() for pair in each]
    told = {pair.prompt for pair in (*before, *pairs)}
    if len(told) < 2 or (asked and not rows):
        done.unlink(missing_ok=True)
        write_atomic(path, "".join(_line(rows[name]) for name in found if found[name]).encode())
        some = f"{len(told)} prompts have a better and a worse text, and 2 must"
        raise BadInput(
            f"{here.name}: feedback: {some if rows else 'there is none'}; give {kind} that tell "
            "texts apart, and repeat the command"
        )
    write_atomic(done, b"")
    return pairs


def _stage(title: str, folder: Path, work: Callable[[Path], Any]) -> Any:
    """Does the work unless it is done; ``done.json``, written last, holds what it returned."""
    done = folder / "done.json"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        app.console.print(title, style="bold")
        result = work(folder)
        _say(folder, result)
        write_atomic(done, json.dumps(result).encode())
    return json.loads(done.read_bytes())


def _say(folder: Path, result: Any) -> None:
    """What the stage found, and what the tuner did in it."""
    for name, value in (result or {}).items():
        if isinstance(value, int | float):
            app.console.print(f"  {name}: {value:,.4g}")
    if turns := _lines(folder / "tuner.jsonl"):
        rates = " ".join(f"{turn['applied']['rate']:.1e}" for turn in turns)
        app.console.print(f"  the tuner's learning rates: {rates}")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; the last may have been cut off by a crash, and is no row then."""
    whole = path.read_text("utf-8").rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.split("\n") if line]


def _begin(settings: Settings, out: Path) -> None:
    """Refuses what cannot go well before anything is done."""
    tokenizer = tokenizer_of(Task("feedback", settings.model, max_length=64))
    if tokenizer.eos_token is None:
        raise BadInput(f"{settings.model}: tokenizer: no end token; set eos_token, save it")
    path, mine = out / "settings.json", json.loads(json.dumps(asdict(settings)))
    if path.exists():
        if (theirs := json.loads(path.read_bytes())) != mine:
            changed = [f"{n} {theirs.get(n)!r}" for n in mine if mine[n] != theirs.get(n)]
            raise BadInput(
                f"{out}: out: holds a run with {', '.join(changed)}; give another folder"
            )
    elif out.exists() and any(out.iterdir()):
        raise BadInput(
            f"{out}: out: is not empty and holds no run of the loop; give another folder"
        )
    write_atomic(path, json.dumps(mine, indent=1).encode())


def _short(split: Any) -> list[tuple[str, str]]:
    """Lines of films and answers to them that the tiny models can hold."""
    return [
        (turn.statement, turn.reply)
        for turn in texts.dialogue()[split]
        if len(turn.statement) <= 60 and 3 <= len(turn.reply) <= 60
    ]


def _model(folder: Path) -> Any:
    return pretrained(AutoModelForCausalLM, str(folder), dtype=torch.float32)


cli = typer.Typer(add_completion=False)


@cli.command()
def main(
    out: Annotated[Path, typer.Option(help="the folder of the run; repeat the command to go on")],
    source: Annotated[str, typer.Option(help="model, file, terminal or web")] = "model",
    kind: Annotated[str, typer.Option(help=", ".join(rewards.KINDS))] = "scores",
    rounds: int = 3,
    prompts: Annotated[int, typer.Option(help="that are asked about in a round")] = 200,
    file: Annotated[Path | None, typer.Option(help="of the source file: JSON lines")] = None,
    port: Annotated[int, typer.Option(help="of the source web; 0 takes a free one")] = 0,
    model: Annotated[str, typer.Option(help="a causal language model")] = "tiny-gpt-64",
    seed: int = 0,
) -> None:
    """Learn from feedback, round by round, each stage steered."""
    settings = Settings(rounds, source, kind, seed, model, prompts)
    if (source == "file") != (file is not None):
        raise BadInput("loop: file: belongs to the source file; give both or neither")
    sources: dict[str, Callable[[], Source | None]] = {
        "model": lambda: None,
        "file": lambda: File(file or Path()),
        "terminal": Terminal,
        "web": lambda: Form(port, app.console.print),
    }
    print(show.table(run(settings, out, sources[source]())))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # of libraries
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # on models this small, more threads only wait for each other
    app.run(cli)
