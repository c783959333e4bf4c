"""A GGUF file is read once on loading, with the same values as the package gguf, which is left unmodified."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from coprune.base.errors import BadInput
from coprune.model.checkpoint.gguf_reader import gguf_reader, reading_once
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import GgufFile, Location, ModelFolder
from support.pico import pico_model
from support.pico_gguf import write_pico_gguf
from support.vocabularies import SIZE, content_of


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    model = pico_model("llama", vocab_size=SIZE)
    return GgufFile(
        write_pico_gguf(model, tmp_path_factory.mktemp("gguf") / "a.gguf", "Q4_1", tokenizer=content_of("bytes")), "a"
    )


def test_our_gguf_reader_agrees_with_the_package(file: GgufFile) -> None:
    ours, theirs = gguf_reader(file.path, field="model"), gguf.GGUFReader(file.path)
    assert type(ours.data) is np.ndarray  # not a memmap, whose slices are memmaps again
    assert list(ours.fields) == list(theirs.fields)
    for mine, own in zip(ours.fields.values(), theirs.fields.values(), strict=True):
        assert (mine.offset, mine.name, mine.data, mine.types) == (own.offset, own.name, own.data, own.types)
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(mine.parts, own.parts, strict=True))
    assert [(t.name, t.tensor_type, t.data_offset) for t in ours.tensors] == [
        (t.name, t.tensor_type, t.data_offset) for t in theirs.tensors
    ]
    assert all(np.array_equal(mine.data, own.data) for mine, own in zip(ours.tensors, theirs.tensors, strict=True))


def test_a_file_cut_short_within_its_metadata_is_refused(file: GgufFile, tmp_path: Path) -> None:
    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        short, field = tmp_path / f"{name}.gguf", gguf.GGUFReader(file.path).fields[name]
        short.write_bytes(file.path.read_bytes()[: field.offset + 100])
        with pytest.raises(BadInput, match="cannot be read"):
            gguf_reader(short, field="model")


def test_a_file_is_read_once_for_model_and_tokenizer(file: GgufFile, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            read.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    model, tokenizer = load_model(file)
    assert len(read) == 1
    assert model.config.num_hidden_layers == 3
    assert tokenizer("a").input_ids
    assert gguf.GGUFReader is Counted


def test_the_package_is_left_as_it_was_after_an_error(file: GgufFile) -> None:
    own = gguf.GGUFReader, gguf.get_tensor_name_map

    @reading_once
    def stop(location: Location) -> None:
        raise RuntimeError(gguf.GGUFReader is own[0])

    with pytest.raises(RuntimeError, match="False"):
        stop(file)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own


def test_other_files_are_loaded_without_the_gguf_package(file: GgufFile, tmp_path: Path) -> None:
    @reading_once
    def look(location: Location) -> bool:
        return isinstance(gguf.GGUFReader, type)

    assert look(ModelFolder(tmp_path, "model"))
    assert not look(file)
