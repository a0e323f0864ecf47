"""Checkpoints: what one keeps of a steered run, and how the run is taken up from it."""

import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from envs.errors import BadInput
from envs.instruments import read_weights, write_weights
from envs.knobs import Knobs
from envs.snapshot import remember
from tuner import processes
from tuner.crew import Crew
from tuner.logbook import Logbook

logger = logging.getLogger(__name__)

WEIGHTS = "tuner.safetensors"


def folder_of(args: Any, step: int) -> Path:
    """Where the Trainer keeps its checkpoint of that step."""
    return Path(args.output_dir) / f"checkpoint-{step}"


def folders_of(args: Any, step: int) -> list[Path]:
    """Where the checkpoint that is resumed may be: the Trainer tells its callbacks no path."""
    named = args.resume_from_checkpoint
    return [*([Path(named)] if named and isinstance(named, str) else []), folder_of(args, step)]


def found_in(stored: Any) -> dict[str, Any] | None:
    """The callback's part of a checkpoint's state; None if it had none."""
    stored = stored[-1] if isinstance(stored, list) and stored else stored
    found: dict[str, Any] | None = stored.get("attributes", {}).get("saved") if stored else None
    return found and {**found, "advise": stored["args"]["advise"]}


def kept_of(crew: Crew) -> dict[str, Any]:
    """Everything a resumed run needs, apart from weights, as JSON."""
    handles, sight = crew.handles, crew.sight
    return {
        "run": crew.run,
        "base_rates": crew.rates.base,
        "rate": crew.knobs.rate,
        "knobs": asdict(crew.knobs),
        "user": {
            "decays": handles.decays,
            "kind": handles.kind,
            "scales": handles.scales,
            "clip": handles.given.clip,
            "beta": handles.given.beta,
            "depth": handles.given.depth,
            "headed": handles.headed,
        },
        "helm": crew.helm.state(),
        "book": crew.book.to_json(),
        "losses": sight.eyes.fetch(),
        "kept": crew.snapshot is not None,
        "kept_scale": crew.scale,
        "own_evaluation": sight.own,
        "total": crew.context.total,
        "bounded": sight.gauge.bounded,
        "dropped": sight.own and not sight.validates,
    }


def resume(crew: Crew, saved: dict[str, Any], folders: Iterable[Path], step: int) -> None:
    """Go on from `kept_of`, and from the weights of `write` in the first folder that has them."""
    sight = crew.sight
    if crew.helm.advise and not saved["advise"]:
        raise BadInput(
            "callback: advise: the checkpoint's run was steered, and its settings are the tuner's; "
            "resume without advise=True, or begin a new run"
        )
    if saved["own_evaluation"] != sight.own:
        raise BadInput(
            "callback: eval_dataset: the checkpoint's run "
            f"{'had one' if saved['own_evaluation'] else 'had none'}; give the same, and leave "
            "restore_callback_states_from_checkpoint off"
        )
    if (total := saved["total"]) != crew.context.total:
        logger.warning("the run was planned for %d updates: resuming is not exact", total)
    crew.helm.load_state(saved["helm"])
    crew.book = Logbook.from_json(saved["book"])
    sight.eyes.losses = list(saved["losses"])
    if not crew.helm.advise:
        crew.turn(knobs_of(saved, crew.handles.given), anew=True)
    sight.gauge.bounded = saved.get("bounded")
    if saved.get("dropped"):
        sight.drop()
    crew.scale = saved.get("kept_scale")
    mark = _mark(saved.get("run"), step)
    for folder in folders:
        gradient, crew.snapshot = read_weights(_weights(crew, folder), mark, sight.eyes)
        sight.eyes.last_gradient = gradient
        if gradient is not None:
            sight.probe.gradient(gradient)
        if gradient is not None or crew.snapshot is not None:
            break


def knobs_of(saved: dict[str, Any], given: Knobs) -> Knobs:
    """Those in force when the checkpoint was made. given: the user's."""
    return Knobs(**saved.get("knobs", asdict(given) | {"rate": saved["rate"]}))


def agree(crew: Crew, saved: dict[str, Any], folder: Path) -> None:
    """All processes come back to the best weights, or none: their disks may differ."""
    if processes.share([], crew.sight.eyes.device, crew.snapshot is None)[1]:
        crew.snapshot = None
        if saved["kept"]:
            logger.warning(
                "%s: the best weights are not there: these take their place; where a checkpoint is "
                "elsewhere, TrainingArguments(resume_from_checkpoint=...) says where",
                folder,
            )
            crew.snapshot = remember(crew.sight.eyes.parameters)
            crew.scale = crew.knobs.adapter_scale


def write(crew: Crew, folder: Path, step: int) -> None:
    """Put the weights to come back to beside the Trainer's checkpoint."""
    eyes = crew.sight.eyes
    sample = eyes.last_gradient if eyes.watching else None
    mine = crew.rank == 0 or eyes.sharded
    if mine and folder.is_dir() and (crew.snapshot or sample is not None):
        mark = _mark(crew.run, step)
        write_weights(_weights(crew, folder), mark, sample, crew.snapshot or [])


def _mark(run: int | None, step: int) -> dict[str, str]:
    """What the weights' file says of its checkpoint. run: None for those of before it was said."""
    return {"step": str(step)} | ({} if run is None else {"run": str(run)})


def _weights(crew: Crew, folder: Path) -> Path:
    """Under FSDP each process keeps its own."""
    return folder / (f"{crew.rank}.{WEIGHTS}" if crew.sight.eyes.sharded else WEIGHTS)
