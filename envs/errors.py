"""The error tree, and name look-up with "did you mean".

SteersmanError
├── BadInput           the user's input cannot be used; nothing was written   (exit 2)
│   ├── UnknownName    a name that no table holds, with the nearest that one does
│   └── BadArtifact    a policy file that must not be loaded
└── RunFailed          something went wrong at run time; the state is recorded (exit 1)
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")
MANY = 15  # names that a message lists


class SteersmanError(Exception):
    """Root of every error this project raises on purpose; its text is one line for a person."""

    exit_code = 1


class BadInput(SteersmanError):
    """Input that cannot be used: ``<where>: <field>: <problem>; <fix>``."""

    exit_code = 2


class UnknownName(BadInput):
    """A name that is not in a table of names."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        names = sorted(known, key=lambda each: ("/" in each, each))
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
        known = ", ".join(names[:MANY])
        super().__init__(f"no {kind} {str(name)[:80]!r}.{hint} Known: {known}{more}.")


class BadArtifact(BadInput):
    """A policy file that is damaged, unsafe or made for another version."""


class RunFailed(SteersmanError):
    """A run that stopped for an outside reason: disk, memory, a killed worker."""


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """``table[name]``, or `UnknownName` with the nearest known name."""
    try:
        return table[name]
    except (KeyError, TypeError):
        raise UnknownName(kind, name, table) from None
