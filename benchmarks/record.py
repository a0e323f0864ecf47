"""Records: a benchmark's figures, with what they were measured on, in one JSON file."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from envs.files import write_atomic

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "transformers", "peft", "gymnasium", "stable-baselines3", "sb3-contrib", "optuna",
    "numpy",
)  # fmt: skip


def record(name: str, figures: Mapping[str, Any], *, seeds: Any) -> Path:
    """Write ``results/<name>.json``: the figures first, then everything needed to repeat them."""
    path = RESULTS / f"{name}.json"
    write_atomic(path, _text({**figures, **provenance(seeds)}))
    return path


def merge(name: str, part: str, figures: Mapping[str, Any], *, seeds: Any) -> Path:
    """Put one part into ``results/<name>.json`` and leave the others as they were.

    Each part keeps its own provenance: parts may be measured on different machines.
    """
    path = RESULTS / f"{name}.json"
    parts = json.loads(path.read_text()) if path.exists() else {}
    parts[part] = {**figures, **provenance(seeds)}
    write_atomic(path, _text(dict(sorted(parts.items()))))
    return path


def provenance(seeds: Any) -> dict[str, Any]:
    """The seeds, the command, the hardware and the versions. A path of this machine is hidden."""
    shown = ["PATH" if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    arguments = [Path(sys.argv[0]).name, *shown]
    return {
        "seeds": seeds,
        "command": shlex.join(["python", f"benchmarks/{arguments[0]}", *arguments[1:]]),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def hardware() -> dict[str, Any]:
    """The processor, the cores this process may use, PyTorch's threads, and the GPU."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
