"""What packing a folder replaced, kept beside the packed tensors, so that unpacking restores every byte."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coprune.base.errors import BadInput
from coprune.model.checkpoint.header import MAX_HEADER_BYTES
from coprune.model.checkpoint.shards import read_json
from coprune.packed.header import VERSION

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "coprune_packed.json"
CARD = "README.md"


def write_manifest(path: Path, files: Mapping[str, bytes], headers: Mapping[str, bytes]) -> None:
    """Keep the configuration, index and card, and every safetensors file's header, as they were."""
    content = {
        "version": VERSION,
        "files": {name: file.decode("utf-8") for name, file in files.items()},
        "safetensors_headers": {
            name: base64.b64encode(zlib.compress(header)).decode() for name, header in headers.items()
        },
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files and headers that were replaced. Raises BadInput if the manifest is damaged."""
    content = read_json(path)
    try:
        files, headers = content.get("files", {}), content.get("safetensors_headers", {})
        if not set(files) <= {CONFIG, INDEX, CARD}:
            raise ValueError("it names other files")
        restored = {name: text.encode("utf-8") for name, text in files.items()}
        return restored, {name: _inflated(header) for name, header in headers.items()}
    except (binascii.Error, zlib.error, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} is damaged ({str(error)[:100]})", fix="copy or pack the model again") from error


def _inflated(header: Any) -> bytes:
    """A header as it was. A small one can stand for gigabytes, so no more is written than a header may have."""
    stream = zlib.decompressobj()
    found = stream.decompress(base64.b64decode(header, validate=True), MAX_HEADER_BYTES + 1)
    if len(found) > MAX_HEADER_BYTES or not stream.eof:
        raise ValueError("a header is cut off or too large")
    return found
