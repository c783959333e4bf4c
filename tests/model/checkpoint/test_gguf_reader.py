"""A GGUF file is read as the package gguf reads it, from a plain array."""

from __future__ import annotations

import gguf
import numpy as np

from coprune.model.checkpoint.load import gguf_reader
from coprune.model.checkpoint.locate import GgufFile, locate


def test_a_reader_says_what_that_of_the_package_says() -> None:
    file = locate("smollm2-135m")
    assert isinstance(file, GgufFile)
    ours, theirs = gguf_reader(file.path, field="model"), gguf.GGUFReader(file.path)
    assert type(ours.data) is np.ndarray  # not a memmap, each slice of which is one again
    assert list(ours.fields) == list(theirs.fields)
    for name in ("general.architecture", "tokenizer.ggml.tokens", "llama.block_count"):
        assert ours.fields[name].contents() == theirs.fields[name].contents()
    assert [(t.name, t.tensor_type, t.data_offset) for t in ours.tensors] == [
        (t.name, t.tensor_type, t.data_offset) for t in theirs.tensors
    ]
    assert all(np.array_equal(mine.data, own.data) for mine, own in zip(ours.tensors, theirs.tensors, strict=True))
