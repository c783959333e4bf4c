from __future__ import annotations

import json
import mmap
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from coprune.base.errors import BadInput
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.lazy import LazyCheckpoint
from coprune.model.checkpoint.load import prepare
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.weights import InMemory
from support.forking import forked
from support.pico import pico_tokens
from support.sample import crossed
from support.saved import MODELS, assert_same_tensors, load_clean, save_model, tensors_of
from support.short import NO_THREADS


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the users' number of threads."""
    monkeypatch.delenv(NO_THREADS)


def block_names(model: nn.Module) -> list[str]:
    return [block.name for block in find_blocks(model)]


def open_lazy(folder: Path, **options: object) -> tuple[LazyCheckpoint, list[str]]:
    lazy = LazyCheckpoint(ModelFolder(folder, folder.name), **options)  # type: ignore[arg-type]
    return lazy, block_names(lazy.model)


@pytest.mark.parametrize(("name", "dtype"), crossed([*MODELS], [torch.float32, torch.bfloat16]), ids=str)
def test_streamed_blocks_are_unchanged(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(name, tmp_path, dtype)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    lazy, blocks = open_lazy(tmp_path)
    assert all(parameter.is_meta for parameter in lazy.model.parameters())
    assert not any(buffer.is_meta for buffer in lazy.model.buffers())
    lazy.acquire_rest(blocks)
    written = lazy.rest_tensors(blocks)
    for block in blocks:
        lazy.acquire(block)
        real = [other for other in blocks if not any(p.is_meta for p in lazy.model.get_submodule(other).parameters())]
        assert real == [block]
        written |= lazy.original_tensors(block)
        lazy.release(block)
        assert all(parameter.is_meta for parameter in lazy.model.get_submodule(block).parameters())
    original = tensors_of(tmp_path)
    assert_same_tensors(written, original)
    assert lazy.total_bytes == sum(tensor.nbytes for tensor in original.values())


@pytest.mark.parametrize(("name", "dtype"), crossed([*MODELS], [torch.float32, torch.bfloat16]), ids=str)
def test_acquired_blocks_equal_transformers_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(name, tmp_path, dtype)
    expected = prepare(load_clean(tmp_path))
    lazy, blocks = open_lazy(tmp_path)
    lazy.acquire_rest(blocks)
    for block in blocks:
        lazy.acquire(block)
    assert_same_tensors(dict(lazy.model.named_parameters()), dict(expected.named_parameters()))
    assert_same_tensors(dict(lazy.model.named_buffers()), dict(expected.named_buffers()))
    tokens = pico_tokens()
    assert torch.equal(lazy.model(tokens).logits, expected(tokens).logits)
    assert not any(parameter.requires_grad for parameter in lazy.model.parameters())


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked to read ahead")
def test_only_the_expected_block_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("llama", tmp_path, torch.float32)
    lazy, blocks = open_lazy(tmp_path)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, count, advice: asked.append((start, count)))
    lazy.prefetch(blocks[1])
    names = {name for name in tensors_of(tmp_path) if name.startswith(blocks[1] + ".")}
    assert sorted(asked) == sorted((e.start, e.nbytes) for e in (lazy._entries[name] for name in names))
    assert all(parameter.is_meta for parameter in lazy.model.parameters())


def test_position_tables_are_not_rounded_to_the_dtype_of_the_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gptj", vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, rotary_dim=4)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    lazy, _ = open_lazy(tmp_path)
    expected = dict(load_clean(tmp_path).named_buffers())
    assert expected
    assert_same_tensors(dict(lazy.model.named_buffers()), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_memory_gives_the_tensors_that_save_pretrained_writes(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    for weights in (InMemory(model), InMemory(load_clean(tmp_path))):
        blocks = block_names(weights.model)
        written = weights.rest_tensors(blocks)
        for block in blocks:
            weights.acquire(block)
            written |= weights.original_tensors(block)
            weights.release(block)
        assert_same_tensors(written, tensors_of(tmp_path))
        assert weights.total_bytes == sum(tensor.nbytes for tensor in written.values())


def test_a_changed_expert_is_saved_under_its_own_name(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    lazy, blocks = open_lazy(tmp_path)
    lazy.acquire(blocks[1])
    experts = lazy.model.get_parameter(f"{blocks[1]}.mlp.experts.down_proj")
    with torch.no_grad():
        experts[2].zero_()
    original = tensors_of(tmp_path)
    changed = {
        name for name, tensor in lazy.original_tensors(blocks[1]).items() if not torch.equal(tensor, original[name])
    }
    (name,) = changed
    assert ".experts.2." in name


def test_a_requested_dtype_is_used_for_computing_and_writing(tmp_path: Path) -> None:
    save_model("llama", tmp_path, torch.bfloat16)
    lazy, blocks = open_lazy(tmp_path, dtype="float32")
    lazy.acquire(blocks[0])
    assert {parameter.dtype for parameter in lazy.model.get_submodule(blocks[0]).parameters()} == {torch.float32}
    original = tensors_of(tmp_path)
    expected = {name: tensor.float() for name, tensor in original.items() if name.startswith(f"{blocks[0]}.")}
    assert_same_tensors(lazy.original_tensors(blocks[0]), expected)
    assert lazy.total_bytes == 2 * sum(tensor.nbytes for tensor in original.values())


def test_unchanged_weights_are_not_rounded_to_the_dtype_of_the_computation(tmp_path: Path) -> None:
    """Files may store single tensors in float32 although the configuration says bfloat16."""
    save_model("llama", tmp_path, torch.bfloat16, shards="1GB")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    names = ["model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"]
    torch.manual_seed(1)
    for name in names:
        tensors[name] = torch.randn(tensors[name].shape)
    save_file(tensors, file, metadata={"format": "pt"})
    lazy, blocks = open_lazy(tmp_path)
    lazy.acquire(blocks[0])
    norm, matrix = (lazy.model.get_parameter(name) for name in names)
    assert norm.dtype == matrix.dtype == torch.bfloat16
    with torch.no_grad():
        matrix[0].zero_()
    written = lazy.original_tensors(blocks[0])
    assert torch.equal(written[names[0]], tensors[names[0]])
    expected = tensors[names[1]].bfloat16().float()
    expected[0] = 0
    assert torch.equal(written[names[1]], expected)


def test_names_without_the_prefix_of_the_base_model_are_kept(tmp_path: Path) -> None:
    """GPT-2's own files have `h.0.…` for the model's `transformer.h.0.…`, and masks that are never loaded."""
    save_model("gpt2", tmp_path, shards="1GB")
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    tensors["somebody.elses"] = torch.ones(1)
    save_file(tensors, file, metadata={"format": "pt"})
    lazy, blocks = open_lazy(tmp_path)
    assert lazy.carried_entries.keys() == {"h.0.attn.bias", "somebody.elses"}
    lazy.acquire_rest(blocks)
    written = lazy.rest_tensors(blocks)
    for block in blocks:
        lazy.acquire(block)
        written |= lazy.original_tensors(block)
    assert_same_tensors(written, tensors)


def test_a_finished_block_can_be_read_from_elsewhere(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    lazy, blocks = open_lazy(tmp_path)
    lazy.acquire(blocks[0])
    finished = {name: tensor * 2 for name, tensor in lazy.original_tensors(blocks[0]).items()}
    save_file(finished, tmp_path / "finished")
    lazy.release(blocks[0])
    lazy.read_from(tmp_path / "finished")
    lazy.acquire(blocks[0])
    assert_same_tensors(lazy.original_tensors(blocks[0]), finished)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_memory_takes_over_a_finished_block(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path)
    weights = InMemory(load_clean(tmp_path))
    blocks = block_names(weights.model)
    finished = {key: tensor * 2 for key, tensor in weights.original_tensors(blocks[1]).items()}
    others = [weights.original_tensors(blocks[0]), weights.original_tensors(blocks[2]), weights.rest_tensors(blocks)]
    save_file({key: tensor.contiguous() for key, tensor in finished.items()}, tmp_path / "finished")
    weights.read_from(tmp_path / "finished")
    assert_same_tensors(weights.original_tensors(blocks[1]), finished)
    for before, after in zip(
        others,
        [weights.original_tensors(blocks[0]), weights.original_tensors(blocks[2]), weights.rest_tensors(blocks)],
        strict=True,
    ):
        assert_same_tensors(after, before)
    assert not any(parameter.requires_grad for parameter in weights.model.parameters())


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_checkpoint_that_lacks_a_weight_is_refused_at_once(lost: str, tmp_path: Path) -> None:
    save_model("llama", tmp_path, shards="1GB")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=lost):
        open_lazy(tmp_path)


def test_a_configuration_of_another_size_is_refused(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    lazy, blocks = open_lazy(tmp_path)
    with pytest.raises(BadInput, match="where the configuration says"):
        lazy.acquire(blocks[0])


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_a_file_larger_than_the_address_space_allowed_is_streamed(tmp_path: Path) -> None:
    """A sparse file with 1 GB of weights in 32 blocks, which takes no disk space."""
    sizes: dict[str, Any] = dict(vocab_size=64, hidden_size=768, intermediate_size=2048, num_hidden_layers=32)
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=8, dtype="float32", tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config).named_parameters()}
    header, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        size = 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    assert end > 800_000_000
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)

    def stream() -> None:
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # every thread reserves address space
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + end // 2
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with pytest.raises((OSError, MemoryError, RuntimeError)):
            mmap.mmap(-1, end)
        lazy = LazyCheckpoint(ModelFolder(tmp_path, "sparse"))
        for number in range(32):
            lazy.acquire(f"model.layers.{number}")
            lazy.release(f"model.layers.{number}")

    assert os.waitpid(forked(stream), 0)[1] == 0
