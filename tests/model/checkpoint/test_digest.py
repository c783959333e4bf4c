"""The digest of a model's files depends on their bytes, not on their location."""

from __future__ import annotations

import shutil
from pathlib import Path

from coprune.model.checkpoint.digest import source_digest
from coprune.model.checkpoint.locate import GgufFile, ModelFolder


def folder_at(path: Path) -> ModelFolder:
    path.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json", "tokenizer.json"):
        (path / name).write_text(name)
    return ModelFolder(path, path.name)


def test_the_same_bytes_elsewhere_have_the_same_digest(tmp_path: Path) -> None:
    one = folder_at(tmp_path / "one")
    shutil.copytree(one.path, tmp_path / "two")
    (tmp_path / "two" / "report.json").write_text("{}")
    assert source_digest(one) == source_digest(ModelFolder(tmp_path / "two", "two"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"weights")
    assert source_digest(GgufFile(tmp_path / "a.gguf", "a")) == source_digest(GgufFile(tmp_path / "b.gguf", "b"))


def test_the_digest_changes_with_any_byte_or_name(tmp_path: Path) -> None:
    one = folder_at(tmp_path / "one")
    found = {source_digest(one)}
    for name in ("model-2.safetensors", "config.json", "tokenizer.json"):
        (one.path / name).write_text(f"{name}!")
        found.add(source_digest(one))
    (one.path / "model-1.safetensors").rename(one.path / "model-3.safetensors")
    found.add(source_digest(one))
    assert len(found) == 5


def test_the_digest_covers_all_parts_of_a_split_file(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"same")
    before = source_digest(GgufFile(parts[0], "m"))
    parts[1].write_bytes(b"other")
    assert source_digest(GgufFile(parts[0], "m")) != before
