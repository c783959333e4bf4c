"""Recordings for speech models: WAV files of a folder, optionally with transcripts."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.files import open_given, read_given
from coprune.base.validation import explain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ENDINGS = (".wav",)
HINT = (
    "name a folder of .wav files, optionally with transcripts in .txt files of the same names, or in rows of metadata.jsonl "
    'like {"file_name": "one.wav", "text": "…"}'
)
_MOST_SECONDS = 3_600
_TEXTS = ("text", "transcription", "sentence")


@dataclass(frozen=True)
class Recording:
    """One file."""

    file: Path
    said: str | None
    """Its reference transcript, if any."""


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
    """Find the recordings of a folder. Raises BadInput if there are none, or a transcript cannot be read."""
    path = expand_home(name)
    if not path.is_dir() or not holds_recordings(path):
        raise BadInput(f"{name} is not a folder of recordings, but the model transcribes speech", fix=HINT)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS)
    for file in files:
        look_at_sound(file)
    told = _metadata(path / "metadata.jsonl")
    return Recordings(
        [Recording(file, _said(file, told.get(str(file.relative_to(path))))) for file in files], str(path)
    )


def _said(file: Path, told: str | None) -> str | None:
    beside = file.with_suffix(".txt")
    if told is not None or not beside.is_file():
        return told
    try:
        return read_given(beside).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{beside} cannot be read as text ({error})", fix=HINT) from error


def _metadata(file: Path) -> dict[str, str]:
    """Return the transcript of each file."""
    found: dict[str, str] = {}
    if not file.is_file():
        return found
    for number, line in enumerate(_lines(file), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            row = None
        if not isinstance(row, Mapping):
            raise BadInput(f"line {number} of {file} is not a JSON object", fix=HINT)
        said = next((row[key] for key in _TEXTS if isinstance(row.get(key), str)), None)
        if said is not None:
            found[str(row.get("file_name"))] = said
    return found


def _lines(file: Path) -> list[str]:
    with open_given(file) as stream:
        return stream.read().decode("utf-8", errors="replace").splitlines()


class Sound(BaseModel):
    """The header of a WAV file."""

    model_config = ConfigDict(frozen=True)

    channels: Annotated[int, Field(ge=1, le=64)]
    rate: Annotated[int, Field(ge=1_000, le=768_000)]
    """Samples per second."""
    bits: Annotated[int, Field(ge=8, le=64, multiple_of=8)]
    """Size of a sample."""
    bytes: Annotated[int, Field(ge=0)]
    """Size of all samples."""

    @property
    def seconds(self) -> float:
        """Length of the recording."""
        return self.bytes / (self.rate * self.channels * self.bits // 8)


def look_at_sound(file: Path) -> Sound:
    """Read the header of a WAV file. Raises BadInput if it is damaged, or the recording is too long to fit in memory."""
    try:
        with open_given(file) as stream:
            sound = Sound.model_validate(_header(stream))
    except ValidationError as error:
        raise explain(error).within(str(file)) from error
    except (OSError, ValueError, struct.error) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{file} cannot be read as sound ({error})", fix="repair or remove it") from error
    if sound.seconds > _MOST_SECONDS:
        raise BadInput(
            f"{file} holds {sound.seconds:,.0f} seconds of sound, more than the limit of {_MOST_SECONDS:,}",
            fix="cut it into pieces",
        )
    return sound


def _header(stream: BinaryIO) -> dict[str, int]:
    """Return the fields of a WAV file's header. Raises ValueError, struct.error if it has none."""
    magic, _, kind = struct.unpack("<4sI4s", stream.read(12))
    if magic not in (b"RIFF", b"RIFX", b"RF64") or kind != b"WAVE":
        raise ValueError("it is not a WAV file")
    order = ">" if magic == b"RIFX" else "<"
    found: dict[str, int] = {}
    size = os.fstat(stream.fileno()).st_size
    while stream.tell() < size:
        name, length = struct.unpack(f"{order}4sI", stream.read(8))
        if name == b"fmt ":
            _, channels, rate, _, _, bits = struct.unpack(f"{order}HHIIHH", stream.read(16))
            found |= {"channels": channels, "rate": rate, "bits": bits}
            length -= 16
        elif name == b"data":
            return found | {"bytes": min(length, size - stream.tell())}
        stream.seek(max(0, length + length % 2), os.SEEK_CUR)
    return found


def waveform(file: Path, rate: int) -> NDArray[np.float32]:
    """Read a WAV file as one channel at a sampling rate. Raises BadInput if it is damaged."""
    import numpy as np  # imported here, since recordings are found before anything slow is imported
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    look_at_sound(file)
    try:
        own, samples = wavfile.read(file)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{file} cannot be read as sound ({error})", fix="repair or remove it") from error
    whole = np.issubdtype(samples.dtype, np.integer)
    limits: Any = np.iinfo(samples.dtype) if whole else None
    middle = (limits.max + limits.min + 1) / 2 if whole else 0.0  # not 0 for 8-bit samples, which are unsigned
    values = (samples.astype(np.float32) - middle) / (limits.max - middle if whole else 1.0)
    if values.ndim == 2:
        values = values.mean(axis=1)
    if not values.size:
        raise BadInput(f"{file} holds no sound", fix="repair or remove it")
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
