"""Places: folders that record whose work they hold, so that only the same work is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from coprune.base.errors import BadInput
from coprune.base.words import Setting
from coprune.store.notes import read_note, write_note
from coprune.store.store import Key, key_of

FILE = "place.json"
Differences = list[tuple[str, Any, Any]]
"""Names with their earlier and present values."""


class Identity(BaseModel):
    """What decides a result: the contents of its key by name, kept to report differences."""

    model_config = ConfigDict(frozen=True)

    step: str
    version: int
    decides: dict[str, Any]
    """Settings and digests that must be equal."""
    besides: dict[str, Any] = {}
    """Settings that may differ when work is resumed: they only change last bits or what is measured."""
    earlier: tuple[dict[str, Any], ...] = ()
    """Their values in the earlier runs whose work is resumed."""

    @classmethod
    def of(cls, step: str, version: int, decides: Mapping[str, Any], besides: Mapping[str, Any] | None = None) -> Self:
        """Return the identity of a result; values that JSON cannot hold are converted to text."""
        return cls(step=step, version=version, decides=_plain(decides), besides=_plain(besides or {}))

    @property
    def key(self) -> Key:
        """Key of the result."""
        return key_of(self.step, self.version, **self.decides)

    def changes(self) -> Differences:
        """Return the differences in `besides` from run to run."""
        runs = [*self.earlier, self.besides]
        return [one for before, now in pairwise(runs) for one in _differing(before, now)]


class Place:
    """A folder in which a result is made."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder, self.identity = folder, identity

    def differing(self, finished: bool = False) -> Differences | None:
        """Return the differences to the work in this folder; None if there is none. finished: whether `besides` counts."""
        there = self._there()
        if there is None:
            return None
        found = _differing(there.decides, self.identity.decides)
        return found + _differing(there.besides, self.identity.besides) if finished else found

    def begin(self) -> None:
        """Record whose work this folder holds from now on. Raises like `base.files.write_text`."""
        there = self._there()
        if there is not None and there.key == self.identity.key:
            before = (*there.earlier, there.besides) if there.besides != self.identity.besides else there.earlier
            self.identity = self.identity.model_copy(update={"earlier": before})
            if there == self.identity:
                return
        write_note(self.folder / FILE, self.identity)

    def takes_up(self, holds_work: bool, field: str, named: Path) -> bool:
        """Return whether the folder holds unfinished work of the same key, to be resumed.

        Args:
            holds_work: whether there is anything to resume.
            field: the setting that names the folder.
            named: its value.

        Raises:
            BadInput: the work belongs to another run.
        """
        differing = self.differing()
        if differing is None or (differing and not holds_work):
            return False
        if differing:
            raise BadInput(
                f"{self.folder} belongs to an unfinished run in which {said(differing)}",
                field=field,
                value=named,
                fix=(
                    "Finish that run with its own settings, remove the folder, or name another one with ",
                    Setting(field),
                ),
            )
        self.begin()
        return True

    def _there(self) -> Identity | None:
        note = read_note(self.folder / FILE, Identity)
        same = note is not None and (note.record.step, note.record.version) == (
            self.identity.step,
            self.identity.version,
        )
        return note.record if note is not None and same else None


def said(differing: Differences) -> str:
    """Return differences in words."""
    return "; ".join(f"{name} was {before!r} and is {now!r}" for name, before, now in differing)


def settings_in(folder: Path) -> dict[str, Any] | None:
    """Return what decides the work in a folder; None if there is none."""
    note = read_note(folder / FILE, Identity)
    return None if note is None else note.record.decides


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    return [(name, before.get(name), now.get(name)) for name in {**now, **before} if before.get(name) != now.get(name)]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(dict(values), default=str))
    return found
