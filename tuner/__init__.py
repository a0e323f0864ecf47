"""The agent, and its use on new jobs."""

from typing import Any

__all__ = ["TunerCallback"]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; the policy and the command line do without it.
    if name == "TunerCallback":
        from tuner.callback import TunerCallback

        return TunerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
