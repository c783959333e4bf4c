"""The errors that coprune raises on purpose: each says the cause and the fix in one message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CopruneError(Exception):
    """Anything that stops a run with a message instead of a traceback; the command exits with 2."""


class BadInput(CopruneError):
    """What was asked for cannot be done as asked: an unknown name, a ratio out of range, a missing file."""


class NumericalError(CopruneError):
    """The numbers do not allow an honest result: NaN activations, a Hessian that no damping repairs."""


class UnsupportedModel(CopruneError):
    """The model does something between or inside its blocks that the walk cannot reproduce."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> BadInput:
    """Build the error for a name that is not in a table, with the nearest match if there is one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return BadInput(f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}.")
