"""A GGUF file, whole or split, streamed: the values of a full load, one block at a time, and resumable runs."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

import coprune
from coprune.base.errors import BadInput
from coprune.gguf_files.llama_cpp import has_llama_cpp
from coprune.gguf_files.metadata import read_fields, write_fields
from coprune.model.checkpoint import mapped_gguf
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import GgufFile, locate
from coprune.model.checkpoint.mapped_gguf import LazyGguf, decode
from support.killing import count_lines, killed_at
from support.pico import pico_model, pico_tokens
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.vocabularies import content_of

PRUNING: dict[str, Any] = {"dataset": pico_tokens(8, 32), "evaluate": False, "gate": False, "quiet": True}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pico Qwen3 mixture in 8 bits, with a tokenizer."""
    tokenizer = content_of("bytes")
    vocabulary = len(json.loads(tokenizer)["model"]["vocab"])
    model = distinct_norms(pico_model("qwen3_moe", vocab_size=vocabulary, norm_topk_prob=True, num_experts=8))
    return write_pico_gguf(model, tmp_path_factory.mktemp("gguf") / "big.gguf", "Q8_0", "qwen3moe", tokenizer)


@pytest.fixture(scope="module")
def parts(mixture: Path) -> list[Path]:
    """Split the file as llama.cpp does: the first part has the metadata and some tensors."""
    reader = GGUFReader(mixture)
    shares = np.array_split(np.arange(len(reader.tensors)), 3)
    files = [mixture.with_name(f"split-{number:05d}-of-00003.gguf") for number in (1, 2, 3)]
    for number, (file, share) in enumerate(zip(files, shares, strict=True)):
        with closing(GGUFWriter(file, "qwen3moe")) as writer:
            if number == 0:
                write_fields(writer, read_fields(reader, ("GGUF.", "general.architecture")))
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", len(files))
            writer.add_int32("split.tensors.count", len(reader.tensors))
            for stored in (reader.tensors[index] for index in share):
                writer.add_tensor(stored.name, stored.data, raw_dtype=stored.tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    return files


def tensors_of(file: Path) -> dict[str, bytes]:
    return {stored.name: stored.data.tobytes() for stored in GGUFReader(file).tensors}


def require_same(streamed: LazyGguf, file: Path) -> None:
    """Require that every parameter, block by block, equals transformers' load of the whole file."""
    whole, _ = load_model(GgufFile(file, file.name), processed=False)
    blocks = [f"model.layers.{number}" for number in range(3)]
    streamed.acquire_rest(blocks)
    for block in blocks:
        streamed.acquire(block)
        state = streamed.model.state_dict()
        assert all(
            (value.device.type == "meta") == name.startswith(tuple({*blocks} - {block}))
            for name, value in state.items()
        )
        for name, value in whole.state_dict().items():
            assert state[name].device.type == "meta" or torch.equal(state[name], value), name
        streamed.release(block)


def test_blocks_of_a_mixture_and_of_a_llama_have_the_values_that_transformers_reads(
    mixture: Path, tmp_path: Path
) -> None:
    require_same(LazyGguf(GgufFile(mixture, "big")), mixture)
    # The file stores its queries and keys in another order.
    llama = write_pico_gguf(distinct_norms(pico_model("llama")), tmp_path / "llama.gguf", "Q8_0")
    require_same(LazyGguf(GgufFile(llama, "llama")), llama)


def test_a_split_file_is_read_like_the_whole_one(mixture: Path, parts: list[Path]) -> None:
    require_same(LazyGguf(GgufFile(parts[1], "split")), mixture)


@pytest.fixture(scope="module")
def small(mixture: Path) -> Path:
    """Return the file that a run makes from the whole one."""
    return cut(mixture, "small")


def cut(source: Path, name: str) -> Path:
    """Remove two of eight experts and one of three blocks from a file; return the new one."""
    target = source.with_name(f"{name}.gguf")
    run: dict[str, Any] = {"save": source.with_name(f"{name}-run"), "save_model": target}
    coprune.prune(source, remove="experts=keep:6,blocks=0.34", **PRUNING, **run)
    return target


def test_a_split_file_is_cut_to_the_same_bytes_as_the_whole_one(small: Path, parts: list[Path]) -> None:
    assert cut(parts[0], "joined").read_bytes() == small.read_bytes()
    assert not [*small.parent.glob(".*.partial")]


def test_a_missing_part_of_a_split_file_is_named(parts: list[Path], tmp_path: Path) -> None:
    alone = tmp_path / parts[0].name
    alone.write_bytes(parts[0].read_bytes())
    with pytest.raises(BadInput, match=r"split-00002-of-00003\.gguf is not beside it"):
        locate(alone)


def test_a_duplicate_part_is_named_before_anything_starts(parts: list[Path], tmp_path: Path) -> None:
    for part in parts:
        (tmp_path / part.name).write_bytes(parts[0].read_bytes())
    with pytest.raises(BadInput, match=r"split-00002-of-00003\.gguf is part 1 of 3 by its metadata, but part 2 of 3"):
        locate(tmp_path / parts[0].name)


def test_parts_are_not_read_whole(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="one of several parts"):
        coprune.prune(parts[0], save_model=tmp_path / "folder", remove="experts=keep:6", **PRUNING)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_file(mixture: Path, small: Path) -> None:
    _, lines = count_lines(lambda: cut(mixture, "counted"), ("run/output",))
    assert killed_at(lambda: cut(mixture, "killed"), lines * 8 // 10, ("run/output",))
    journal = [*mixture.with_name(".killed.gguf.partial").glob("model-*.safetensors")]
    assert journal
    assert max(file.stat().st_size for file in journal) < 100  # no weights, only a record of the edits
    assert cut(mixture, "killed").read_bytes() == small.read_bytes()


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")
@pytest.mark.parametrize(
    "kind", ["Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K", "Q8_0", "Q4_0", "Q5_1", "IQ4_XS", "IQ4_NL", "MXFP4", "BF16"]
)
def test_llama_cpp_decodes_as_the_package_gguf(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = GGMLQuantizationType[kind]
    values, size = GGML_QUANT_SIZES[code]
    raw = np.random.default_rng(0).integers(0, 100, (6, 4 * size), dtype=np.uint8)

    class Stored:
        tensor_type, data, shape = code, raw, (4 * values, 6)

    found = decode(Stored())
    monkeypatch.setattr(mapped_gguf, "ggml_library", lambda: None)
    assert torch.equal(found, decode(Stored()))
    assert torch.equal(found, torch.from_numpy(np.array(quants.dequantize(raw, code))))
