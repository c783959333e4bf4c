"""Notes: small records with a checksum, written whole or not at all; a damaged note counts as missing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from coprune.base.files import write_text

Record = TypeVar("Record", bound=BaseModel)


class Note(BaseModel, Generic[Record]):
    """A record, and the seconds of the work behind it."""

    record: Record
    seconds: float = 0.0


def write_note(file: Path, record: BaseModel, seconds: float = 0.0) -> None:
    """Write a note durably. Raises like `base.files.write_text`."""
    content = json.dumps({"record": record.model_dump(mode="json"), "seconds": seconds}, allow_nan=True)
    write_text(file, f"{_checksum(content)}\n{content}\n")


def read_note(file: Path, kind: type[Record]) -> Note[Record] | None:
    """Return a note; None if it is missing, damaged or of another kind."""
    try:
        checksum, content = file.read_text(encoding="utf-8").split("\n", 1)
        content = content.removesuffix("\n")
        return Note[kind].model_validate_json(content) if checksum == _checksum(content) else None  # type: ignore[valid-type]
    except (OSError, ValueError, ValidationError):
        return None


def _checksum(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
