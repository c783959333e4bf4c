"""A GGUF file with fewer tokens: rows are copied as stored, and no old id remains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType

from coprune.base.progress import Reporter
from coprune.gguf_files.llama_cpp import LlamaCpp
from coprune.gguf_files.metadata import Field
from coprune.gguf_files.vocabulary_metadata import named_ids, without_tokens
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import GgufFile, ModelFolder
from coprune.steps.export import export
from coprune.vocabulary.choose import Kept, choose
from coprune.vocabulary.folder_cut import cut_folder
from coprune.vocabulary.gguf import Gguf
from support.pico import pico_model
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.vocabularies import content_of

QUIET = Reporter(quiet=True)
SIZE = 640


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pico llama as GGUF, in q8_0."""
    tokenizer = content_of("bytes")
    model = distinct_norms(
        pico_model("llama", vocab_size=len(json.loads(tokenizer)["model"]["vocab"]), tie_word_embeddings=False)
    )
    return write_pico_gguf(model, tmp_path_factory.mktemp("gguf") / "whole.gguf", "Q8_0", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def kept(whole: Path) -> Kept:
    source = Gguf(GgufFile(whole, whole.name))
    vocabulary = source.vocabulary
    weights = np.random.default_rng(0).random(source.rows)
    essential = {number for number in vocabulary.essential() | source.named if number < source.rows}
    return choose(SIZE, weights, essential, vocabulary.parts)


@pytest.fixture(scope="module")
def small(whole: Path, kept: Kept) -> Path:
    return Gguf(GgufFile(whole, whole.name)).cut(whole.with_name("small.gguf"), kept, QUIET)


def test_rows_keep_their_bytes_and_metadata_is_updated(whole: Path, small: Path, kept: Kept) -> None:
    before, after = GGUFReader(whole), GGUFReader(small)
    for old, new in zip(before.tensors, after.tensors, strict=True):
        cut = old.name in ("token_embd.weight", "output.weight")
        assert np.array_equal(new.data, old.data[kept.rows] if cut else old.data)
        assert (old.name, old.tensor_type) == (new.name, new.tensor_type)
    told = {key: field.contents() for key, field in after.fields.items() if not key.startswith("GGUF.")}
    tokens = before.fields["tokenizer.ggml.tokens"].contents()
    assert told["tokenizer.ggml.tokens"] == [tokens[number] for number in kept.old]
    assert told["llama.vocab_size"] == SIZE
    assert told.keys() == {key for key in before.fields if not key.startswith("GGUF.")}
    eos = before.fields["tokenizer.ggml.eos_token_id"].contents()
    assert told["tokenizer.ggml.eos_token_id"] == kept.new[eos]
    made = {"".join(merge.split(" ")) for merge in told["tokenizer.ggml.merges"]}
    assert made
    assert made <= set(told["tokenizer.ggml.tokens"])


def test_ids_outside_the_tokenizers_keys_are_updated() -> None:
    fields = {
        "tokenizer.ggml.tokens": Field(["a", "b", "c"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        "t5.decoder_start_token_id": Field(2, GGUFValueType.UINT32),
    }
    assert named_ids(fields) == {2}
    assert without_tokens(fields, "t5", [0, 2])["t5.decoder_start_token_id"].value == 1


def test_llama_cpp_computes_the_same_logits(whole: Path, small: Path, kept: Kept) -> None:
    new = torch.randint(0, SIZE, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    cut, dense = LlamaCpp(small, 32), LlamaCpp(whole, 32)
    expected = dense.logits([kept.old[token] for token in new])[:, torch.from_numpy(kept.rows)]
    assert torch.equal(cut.logits(new), expected)


def test_a_folder_with_fewer_tokens_is_exported_with_the_whole_file_as_template(
    whole: Path, kept: Kept, tmp_path: Path
) -> None:
    model, tokenizer = load_model(GgufFile(whole, whole.name))
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    cut_folder(ModelFolder(tmp_path / "dense", "dense"), tmp_path / "small", kept, QUIET, str(whole))
    made = export(tmp_path / "small", tmp_path / "out.gguf", type="q8_0", quiet=True)
    exported, cut = GGUFReader(made.path), Gguf(GgufFile(whole, whole.name)).cut(tmp_path / "cut.gguf", kept, QUIET)
    other = GGUFReader(cut)
    for key in ("tokens", "token_type", "merges", "eos_token_id"):
        name = f"tokenizer.ggml.{key}"
        assert exported.fields[name].contents() == other.fields[name].contents()
    assert json.loads((tmp_path / "small" / "config.json").read_text())["vocab_size"] == SIZE
    shapes = {stored.name: tuple(stored.shape) for stored in other.tensors}
    assert {stored.name: tuple(stored.shape) for stored in exported.tensors} == shapes
