"""Recordings that a model hears: WAV files of a folder, perhaps with what is said in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput

ENDINGS = (".wav",)
HINT = (
    "name a folder of .wav files, each perhaps with its words in a .txt file of the same name, or in rows of metadata.jsonl "
    'like {"file_name": "one.wav", "text": "…"}'
)
_TEXTS = ("text", "transcription", "sentence")


@dataclass(frozen=True)
class Recording:
    """One file."""

    file: Path
    said: str | None
    """Its words, if somebody tells."""


@dataclass(frozen=True)
class Recordings:
    """The recordings of a folder, in the order of their names."""

    rows: Sequence[Recording]
    source: str

    def __len__(self) -> int:
        return len(self.rows)


def holds_recordings(path: Path) -> bool:
    """Return whether a path is a WAV file, or a folder of them."""
    if path.is_dir():
        return any(file.suffix.lower() in ENDINGS for file in path.rglob("*"))
    return path.suffix.lower() in ENDINGS


def read_recordings(name: str) -> Recordings:
    """Find the recordings of a folder. Raises BadInput if there are none, or what is said in them cannot be read."""
    path = expand_home(name)
    if not path.is_dir() or not holds_recordings(path):
        raise BadInput(f"{name} is no folder of recordings, and the model writes what it hears", fix=HINT)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS)
    told = _metadata(path / "metadata.jsonl")
    return Recordings(
        [Recording(file, _said(file, told.get(str(file.relative_to(path))))) for file in files], str(path)
    )


def _said(file: Path, told: str | None) -> str | None:
    beside = file.with_suffix(".txt")
    if told is not None or not beside.is_file():
        return told
    try:
        return beside.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{beside} cannot be read as text ({error})", fix=HINT) from error


def _metadata(file: Path) -> dict[str, str]:
    """Return the transcript of each file."""
    found: dict[str, str] = {}
    if not file.is_file():
        return found
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            row = None
        if not isinstance(row, Mapping):
            raise BadInput(f"line {number} of {file} is no JSON object", fix=HINT)
        said = next((row[key] for key in _TEXTS if isinstance(row.get(key), str)), None)
        if said is not None:
            found[str(row.get("file_name"))] = said
    return found


def waveform(file: Path, rate: int) -> NDArray[np.float32]:
    """Read a WAV file as one channel at a rate of samples a second. Raises BadInput if it is damaged."""
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    try:
        own, samples = wavfile.read(file)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{file} cannot be read as sound ({error})", fix="mend or remove it") from error
    whole = np.issubdtype(samples.dtype, np.integer)
    limits: Any = np.iinfo(samples.dtype) if whole else None
    middle = (limits.max + limits.min + 1) / 2 if whole else 0.0  # of one byte a sample, which has no sign
    values = (samples.astype(np.float32) - middle) / (limits.max - middle if whole else 1.0)
    if values.ndim == 2:
        values = values.mean(axis=1)
    if not values.size:
        raise BadInput(f"{file} holds no sound", fix="mend or remove it")
    return np.asarray(values if own == rate else resample_poly(values, rate, own), dtype=np.float32)


def words_of(text: str) -> list[str]:
    """Return the words of a text, without case and punctuation."""
    return re.findall(r"[\w']+", text.lower())


def word_errors(said: str, heard: str) -> tuple[int, int]:
    """Return the minimum of inserted, deleted and substituted words, and the number of spoken words."""
    words, found = words_of(said), words_of(heard)
    row = list(range(len(found) + 1))
    for number, word in enumerate(words, start=1):
        before, row[0] = row[0], number
        for place, other in enumerate(found, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != other))
    return row[-1], len(words)
