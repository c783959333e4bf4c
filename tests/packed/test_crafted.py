"""Packed folders that somebody made to let a kernel read or write beside a matrix: refused before anything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from coprune.base.errors import BadInput
from coprune.packed.folder import pack, unpack
from coprune.packed.header import read_header
from coprune.packed.linear import PackedLinear, PackedSlot
from coprune.packed.operator import pack_matrix
from coprune.packed.quantizer import load_packed
from coprune.packed.registration import register_with_transformers

register_with_transformers()
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed model whose products have biases."""
    place = tmp_path_factory.mktemp("crafted")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4, attention_bias=True))
    for parameter in model.parameters():
        parameter.data.masked_fill_(torch.rand(parameter.shape) < 0.6, 0.0)
    model.save_pretrained(place / "dense")
    pack(place / "dense", place / "packed", "bitmask")
    return place / "packed"


def blob_of(rows: int, columns: int) -> Tensor:
    """A packed matrix of 1024 weights with 400 values: as many bytes whatever its shape."""
    weight = torch.zeros(1024)
    weight[:400] = 1.0
    packed = pack_matrix(weight.view(rows, columns))
    assert packed is not None
    return packed


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the folder with other tensors, and nothing said about them in the header."""
    target.mkdir()
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("keep_packed", [True, False])
@pytest.mark.parametrize("larger_first", [True, False])
def test_two_tensors_that_become_one_parameter_are_refused(
    larger_first: bool, keep_packed: bool, packed_folder: Path, tmp_path: Path
) -> None:
    """transformers knows a layer by either name: one would give the slot its size, the other its bytes."""
    shapes = [(64, 16), (32, 32)] if larger_first else [(32, 32), (64, 16)]

    def both(tensors: dict[str, Tensor]) -> None:
        tensors[QUERY], tensors[QUERY.removeprefix("model.")] = (blob_of(*shape) for shape in shapes)

    folder = changed(packed_folder, tmp_path / "crafted", both)
    with pytest.raises(BadInput, match="are both"):
        load_packed(folder, keep_packed)
    with pytest.raises(BadInput, match="are both"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_one_name_in_two_files_is_refused(packed_folder: Path, tmp_path: Path) -> None:
    folder = changed(packed_folder, tmp_path / "crafted", lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    tensors = load_file(folder / "model-00001-of-00002.safetensors")
    save_file({QUERY: blob_of(64, 16)}, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    index = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {"more": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with pytest.raises(BadInput, match="too"):
        load_packed(folder)


def test_a_weight_of_another_shape_is_not_multiplied_from(packed_folder: Path, tmp_path: Path) -> None:
    def other(tensors: dict[str, Tensor]) -> None:
        tensors[QUERY] = blob_of(64, 16)

    folder = changed(packed_folder, tmp_path / "crafted", other)
    with pytest.raises((BadInput, RuntimeError), match="mismatch"):
        load_packed(folder)


def test_a_folder_cannot_ask_for_packed_products_itself(packed_folder: Path, tmp_path: Path) -> None:
    folder = changed(packed_folder, tmp_path / "crafted", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["keep_packed"] = True
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert any(isinstance(module, PackedLinear) for module in load_packed(folder).modules())


def test_what_comes_into_a_slot_must_be_what_it_was_made_for() -> None:
    slot = PackedSlot(read_header(blob_of(32, 32)), nn.Linear(32, 32))
    slot._buffers["weight"] = blob_of(64, 16)
    with pytest.raises(BadInput, match="not the expected one"):
        slot.fill()


@pytest.mark.parametrize("length", [1, 31, 64])
def test_a_bias_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(BadInput, match="bias"):
        PackedLinear(blob_of(32, 32), torch.zeros(length))


def test_two_layers_of_one_shape_cannot_change_places(packed_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "swapped"
    shutil.copytree(packed_folder, folder)
    file = folder / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = file.read_bytes()[8 : 8 + length]
    entries = json.loads(header)
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    entries[up], entries[gate] = entries[gate], entries[up]
    text = json.dumps(entries, separators=(",", ":")).encode()
    file.write_bytes(length.to_bytes(8, "little") + text.ljust(length) + file.read_bytes()[8 + length :])
    with pytest.raises(BadInput, match="checksum"):
        load_packed(folder)
    with pytest.raises(BadInput, match="checksum"):
        unpack(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
