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

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "gymnasium", "stable-baselines3", "optuna", "numpy")


def record(name: str, figures: Mapping[str, Any], *, seeds: Any) -> Path:
    """Write ``results/<name>.json``: the figures first, then everything needed to repeat them."""
    arguments = [Path(sys.argv[0]).name, *sys.argv[1:]]
    content = {
        **figures,
        "seeds": seeds,
        "command": shlex.join(["python", f"benchmarks/{arguments[0]}", *arguments[1:]]),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def hardware() -> dict[str, Any]:
    """The processor, the cores this process may use, PyTorch's threads, and the GPU."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


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
