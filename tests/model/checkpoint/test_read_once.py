"""A GGUF file that is loaded is read once, and the package gguf is afterwards as it was."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from coprune.model.checkpoint.load import load_model, reading_once
from coprune.model.checkpoint.locate import Location, ModelFolder, locate


def test_a_file_is_read_once_for_model_and_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            read.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    model, tokenizer = load_model(locate("smollm2-135m"))
    assert len(read) == 1
    assert model.config.num_hidden_layers == 30
    assert tokenizer("a").input_ids
    assert gguf.GGUFReader is Counted


def test_the_package_is_left_as_it_was_after_an_error() -> None:
    own = gguf.GGUFReader, gguf.get_tensor_name_map

    @reading_once
    def stop(location: Location) -> None:
        raise RuntimeError(gguf.GGUFReader is own[0])

    with pytest.raises(RuntimeError, match="False"):
        stop(locate("smollm2-135m"))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own


def test_what_is_no_gguf_file_is_loaded_without_the_package(tmp_path: Path) -> None:
    @reading_once
    def look(location: Location) -> bool:
        return isinstance(gguf.GGUFReader, type)

    assert look(ModelFolder(tmp_path, "model"))
    assert not look(locate("smollm2-135m"))
