"""What a setting decides: every field of a recipe, and of a fine-tuning, says it for itself.

An interrupted run goes on only where everything that decides its result is the same, but for its last bits. A sweep takes
a finished run over if nothing differs that decides its result or what was measured, and an estimate if nothing differs
that decides memory and time.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, Flag, auto
from typing import Any

from pydantic.fields import FieldInfo


class Decides(Flag):
    """What changes when a setting does; several at once with `|`."""

    WHERE = 0
    """Nothing but where things are read from, written to and told."""
    RESULT = auto()
    """The weights, and what is noted of them while they are pruned or trained."""
    ROUNDING = auto()
    """The last bits of the result: in which order sums are added up."""
    MEASUREMENT = auto()
    """What is measured of the result."""
    COST = auto()
    """Memory and time."""
    WHETHER = auto()
    """Only whether it is given counts, not what it says."""
    WHOLE = RESULT | ROUNDING | MEASUREMENT
    """The result to the last bit, and what is measured of it."""


class Shown(Enum):
    """Where `--help` shows the setting."""

    COMMON = auto()
    """In the short help, since most people need it at some time; every other one in `--help-all`."""


def is_common(field: FieldInfo) -> bool:
    """Return whether the field says that most people need it."""
    return Shown.COMMON in field.metadata


def decided_by(field: FieldInfo) -> Decides:
    """What a field decides, as its annotation says. Raises TypeError if it does not say."""
    for note in field.metadata:
        if isinstance(note, Decides):
            return note
    raise TypeError("a setting does not say what it decides; annotate it with Decides.")


def deciding(values: Mapping[str, Any], fields: Mapping[str, FieldInfo], what: Decides) -> dict[str, Any]:
    """Those of some settings that decide something.

    Args:
        values: settings by name.
        fields: the fields that they are values of, under the same names.
        what: what they have to decide, any of it.
    """
    found = {}
    for name, field in fields.items():
        decides = decided_by(field)
        if decides & what:
            given = "not given" if values[name] is None else "given"
            found[name] = given if Decides.WHETHER in decides else values[name]
    return found
