"""Small files that claim huge models are refused before anything is built."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.model.checkpoint.locate import GgufFile, locate
from support.pico_folder import save_pico


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("claims") / "model", num_hidden_layers=1)


@pytest.mark.parametrize("count", [-1, -(10**9), 10**5, 10**9, 10**30])
@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "n_layer", "num_local_experts", "n_routed_experts", "num_labels"]
)
def test_more_layers_or_experts_than_tensors_are_refused(name: str, count: int, model: Path) -> None:
    kept = (model / "config.json").read_text()
    for content in ({name: count}, {"text_config": {name: count}}):
        (model / "config.json").write_text(json.dumps({**json.loads(kept), **content}))
        try:
            with pytest.raises(BadInput, match=f"{name} is {count:,}"):
                locate(model)
        finally:
            (model / "config.json").write_text(kept)
    locate(model)


def text(content: str | bytes) -> bytes:
    """Encode a text as in a GGUF file."""
    written = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(written)) + written


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")


def gguf(path: Path, count: int, tensors: int = 3, token: str | bytes = "b", first: bytes = ARCHITECTURE) -> Path:
    """Write a GGUF file: a text, a list of texts, a number of blocks, and tensors of eight numbers."""
    entries = [
        first,
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text(token),
        text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<2f", 1, 2),
        text("llama.block_count") + struct.pack("<IQ", 10, count),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(entries)) + b"".join(entries)
    head += b"".join(text("t") + struct.pack("<IQIQ", 1, 8, 0, 32 * number) for number in range(tensors))
    path.write_bytes(head + b"\0" * (-len(head) % 32 + 32 * tensors))
    return path


def test_more_blocks_than_a_gguf_file_has_tensors_are_refused(tmp_path: Path) -> None:
    file = gguf(tmp_path / "model.gguf", 10**9)
    with pytest.raises(BadInput, match=r"llama\.block_count is 1,000,000,000"):
        locate(file)
    assert locate(gguf(file, 3)) == GgufFile(file, "model.gguf")


@pytest.mark.parametrize("end", [5, 23, 40, 60, 100, -150, -96, -1])
def test_a_gguf_file_that_ends_early_is_one_message(end: int, tmp_path: Path) -> None:
    file = gguf(tmp_path / "model.gguf", 3)
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:end])
    said = f"is cut off: it has {whole + end:,} of {whole:,} bytes" if end in (-96, -1) else "is cut off or damaged"
    with pytest.raises(BadInput, match=said):
        locate(file)


def test_nested_lists_in_a_gguf_file_are_one_message(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9)
    file.write_bytes(head + struct.pack("<IQ", 9, 1) * 100_000)
    with pytest.raises(BadInput, match="cut off or damaged"):
        locate(file)


@pytest.mark.parametrize("name", ["z-00001-of-00000.gguf", "z-00000-of-00001.gguf", "z-00003-of-00002.gguf"])
def test_an_impossible_part_number_of_a_split_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"says that it is part \d of \d"):
        locate(gguf(tmp_path / name, 3))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"first": text("general.name") + struct.pack("<I", 8) + text("a")}, r"has no general\.architecture"),
        ({"first": text("general.architecture") + struct.pack("<II", 4, 1)}, r"general\.architecture cannot be 1"),
        ({"token": b"\xff\xfe"}, r"tokenizer\.ggml\.tokens of .* holds a string that is not UTF-8"),
        ({"first": text("split.no") + struct.pack("<I", 8) + text("a")}, r"has no general\.architecture"),
    ],
)
def test_meaningless_metadata_is_refused_by_name(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=told):
        locate(gguf(tmp_path / "model.gguf", 3, **changes))
