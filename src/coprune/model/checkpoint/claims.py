"""What a configuration claims of a model's size, against what its file holds: before anything is built after it.

A few bytes can ask for a thousand million blocks. They would be built one by one, without weights, until the memory is
full, and only then would be found out that the file has no weights for them.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from coprune.base.errors import BadInput

# Of composite models one part may be missing from a file: so many are built in seconds, whoever asks for them.
_HARMLESS = 1000
_COUNTS = re.compile(
    r"(?:(?:n|num)_(?:\w+_)?|\w+\.)?(?:layers?|layer_count|block_count|experts?|expert_count|labels|classes)"
)
_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_TEXT, _ARRAY = 8, 9
_MOST_GROWTH, _HUGE = 32, 10**9


def check_claims(config: Mapping[str, Any], most: int | None, file: Path) -> None:
    """Raise BadInput for a number of layers, experts or classes that no checkpoint of this size can have.

    Args:
        config: a configuration, with others inside it or not.
        most: how many the tensors can make up, each layer and expert having at least one (or one slice of one); None where
            there are no tensors.
        file: where it stands, for the message.
    """
    for name, count in _counts(config):
        if count < 0 or count > max(most or 0, _HARMLESS):
            unproven = f"without weights no more than {_HARMLESS:,} are believed"
            there = unproven if most is None else f"there are weights for no more than {most:,}"
            raise BadInput(
                f"{file} says that {name} is {count:,}, and {there}",
                fix="fetch or save the model again",
            )


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    left = [config]
    while left:
        for name, value in left.pop().items():
            if isinstance(value, Mapping):
                left.append(value)
            elif type(value) is int and _COUNTS.fullmatch(str(name)):
                yield str(name), value


def check_tokenizer(file: Path) -> None:
    """Raise BadInput if what a tokenizer does to a text makes it many times as long: replacements one after another.

    What is no tokenizer's file is left to who reads it.
    """
    try:
        content = json.loads(file.read_bytes())
        steps = [content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor")]
        times = max(_growth(step) for step in steps)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return
    if times > _MOST_GROWTH:
        raise BadInput(
            f"{file} makes a text up to {times:,} times as long, as no tokenizer does", fix="fetch the model again"
        )


def _growth(step: Any) -> int:
    """How many times as long a text may get, at most."""
    if not isinstance(step, Mapping):
        return 1
    inner = [one for value in step.values() if isinstance(value, list) for one in value]
    if step.get("type") == "TemplateProcessing":
        return sum(len(one["ids"]) for one in step["special_tokens"].values())
    if step.get("type") == "Replace":
        pattern, content = step["pattern"], len(step["content"])
        if "String" in pattern:
            return max(1, -(-content // max(1, len(pattern["String"]))))
        return content + 1 if _finds_nothing(pattern["Regex"]) else max(1, content)
    if step.get("type") == "Prepend":
        return 1 + len(step["prepend"])
    return min(math.prod(_growth(one) for one in inner), _HUGE)


def _finds_nothing(pattern: str) -> bool:
    """Whether a pattern may be found between two characters; as far as Python, whose patterns are a little different, tells."""
    try:
        return any(found.start() == found.end() for found in re.finditer(re.sub(r"\\[pP]\{\w+\}", ".", pattern), "a b"))
    except re.error:
        return False


def check_gguf(file: Path) -> None:
    """Raise BadInput if a GGUF file's metadata are cut off, or claim more blocks than it has tensors."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise BadInput(f"{file} is cut off or not a GGUF file", fix="fetch it again")
        try:
            version, tensors, entries = struct.unpack("<IQQ", stream.read(20))
            if version not in (2, 3):
                return  # transformers says what it thinks of it
            found = {name: value for name, value in _metadata(stream, entries) if value is not None}
        except (struct.error, ValueError, KeyError, OverflowError, OSError, RecursionError) as error:
            raise BadInput(f"{file} is cut off or damaged", fix="fetch it again") from error
    check_claims(found, tensors, file)


def _metadata(stream: BinaryIO, entries: int) -> Iterator[tuple[str, int | None]]:
    """The keys of a GGUF file, and the values that are whole numbers; the others are None."""
    for _ in range(entries):
        name = _text(stream).decode()
        (kind,) = struct.unpack("<I", stream.read(4))
        if kind in _GGUF_INTEGERS:
            (value,) = struct.unpack(_GGUF_INTEGERS[kind], stream.read(_GGUF_SIZES[kind]))
            yield name, value
        else:
            _skip(stream, kind)
            yield name, None


def _skip(stream: BinaryIO, kind: int) -> None:
    if kind == _TEXT:
        _text(stream)
    elif kind != _ARRAY:
        stream.seek(_GGUF_SIZES[kind], 1)
    else:
        inner, count = struct.unpack("<IQ", stream.read(12))
        if inner in _GGUF_SIZES:
            stream.seek(_GGUF_SIZES[inner] * count, 1)
        else:
            for _ in range(count):
                _skip(stream, inner)


def _text(stream: BinaryIO) -> bytes:
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > 1 << 30:
        raise ValueError("a text of this length")
    found = stream.read(length)
    if len(found) < length:
        raise ValueError("cut off")
    return found
