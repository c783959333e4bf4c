"""Packing folders: every file comes back byte for byte, and damaged folders are refused with a message."""

from __future__ import annotations

import base64
import json
import os
import shutil
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coprune.base.errors import BadInput
from coprune.packed.folder import is_packed_folder, pack, read_manifest, unpack
from coprune.packed.format import Format


def sparse(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * (torch.rand(*shape, generator=generator) < 0.5)).to(dtype)


@pytest.fixture
def dense_folder(tmp_path: Path) -> Path:
    """Two shards with an odd width, a fused three-dimensional parameter, dense, integer and empty tensors."""
    folder = tmp_path / "dense"
    (folder / "extra").mkdir(parents=True)
    first = {
        "a.weight": sparse(33, 47, seed=0),
        "a.bias": torch.randn(33),
        "odd": torch.ones(3, dtype=torch.bool),
        "b.weight": sparse(64, 40, seed=1, dtype=torch.bfloat16),
        "b.steps": torch.arange(5),
    }
    second = {"experts.gate_up": sparse(4, 16, 24, seed=2), "dense": torch.randn(16, 16), "none": torch.zeros(0, 4)}
    save_file(first, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(second, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt", "other": 'tool "x"'})
    size = sum(t.numel() * t.dtype.itemsize for t in (first | second).values())
    index: dict[str, Any] = {
        "metadata": {"total_size": size},
        "weight_map": dict.fromkeys(first, "model-00001-of-00002.safetensors"),
    }
    index["weight_map"] |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type":   "llama", "dtype": "float32"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra" / "note.txt").write_text("kept")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", ["auto", "bitmask", "nm"])
def test_every_file_comes_back_byte_for_byte(dense_folder: Path, tmp_path: Path, format: Format) -> None:
    sizes = pack(dense_folder, tmp_path / "packed", format)
    assert is_packed_folder(tmp_path / "packed")
    assert not is_packed_folder(dense_folder)
    unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(dense_folder)
    if format != "nm":
        assert sizes.names == ["a.weight", "b.weight", "experts.gate_up"]
        assert sizes.packed < sizes.dense
    assert sizes.bytes_after <= sizes.bytes_before
    index = json.loads((tmp_path / "packed" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sizes.packed


def test_negative_zeros_are_counted_and_can_be_dropped(dense_folder: Path, tmp_path: Path) -> None:
    sizes = pack(dense_folder, tmp_path / "exact")
    smaller = pack(dense_folder, tmp_path / "packed", drop_negative_zeros=True)
    assert sizes.negative_zeros == smaller.negative_zeros > 0  # the fixture multiplies by a mask
    assert smaller.packed < 0.85 * sizes.packed
    unpack(tmp_path / "packed", tmp_path / "again")
    for shard in dense_folder.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            again = load_file(tmp_path / "again" / shard.name)[name]
            assert torch.equal(again, tensor)
            if name in smaller.names:
                assert not torch.signbit(again[again == 0]).any()


def test_without_the_manifest_the_tensors_still_come_back(dense_folder: Path, tmp_path: Path) -> None:
    pack(dense_folder, tmp_path / "packed")
    (tmp_path / "packed" / "coprune_packed.json").unlink()
    unpack(tmp_path / "packed", tmp_path / "again")
    for shard in dense_folder.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert torch.equal(load_file(tmp_path / "again" / shard.name)[name], tensor)


def test_refusals_come_before_anything_is_written(dense_folder: Path, tmp_path: Path) -> None:
    pack(dense_folder, tmp_path / "packed")
    for source, target, message in (
        (tmp_path / "nowhere", tmp_path / "x", "not a folder"),
        (dense_folder, dense_folder, "the source itself"),
        (dense_folder, tmp_path / "packed", "not empty"),
        (tmp_path / "packed", tmp_path / "x", "already quantised or packed"),
        (dense_folder / "extra", tmp_path / "x", r"no config\.json"),
    ):
        with pytest.raises(BadInput, match=message):
            pack(source, target)
    with pytest.raises(BadInput, match="not a packed folder"):
        unpack(dense_folder, tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "packed"}


def test_two_hundred_damaged_folders_are_refused(dense_folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    pack(dense_folder, packed)
    generator = torch.Generator().manual_seed(0)
    originals = {path.name: path.read_bytes() for path in packed.glob("*.safetensors")}
    names = sorted(originals)

    def number(below: int) -> int:
        return int(torch.randint(0, below, (1,), generator=generator))

    for case in range(200):
        name = names[case % 2]
        data = bytearray(originals[name])
        header_end = 8 + int.from_bytes(data[:8], "little")
        kind = case % 5
        if kind == 0:
            data = data[: number(len(data))]
        elif kind == 1:  # anywhere in the data
            data[header_end + number(len(data) - header_end)] ^= 1 + number(255)
        elif kind == 2:  # the length of the header
            data[number(8)] ^= 1 + number(255)
        elif kind == 3:  # a hole of zeros in the data
            start = header_end + 64 * number((len(data) - header_end) // 64)
            data[start : start + 64] = bytes(range(1, 65))
        else:  # the start of the header, where coprune's own part is
            data[8 + number(200)] ^= 1 + number(255)
        (packed / name).write_bytes(data)
        try:
            unpack(packed, tmp_path / "again")
        except BadInput:
            assert not (tmp_path / "again").exists()
        else:
            # Only damage that changes nothing may pass, such as in a key of the header that nobody reads.
            assert kind == 4
            assert contents(tmp_path / "again") == contents(dense_folder)
            shutil.rmtree(tmp_path / "again")
        (packed / name).write_bytes(originals[name])


FILE = "model-00001-of-00002.safetensors"
MANIFESTS = [
    *("", "[]", '{"files": {"../x": "y"}}', '{"safetensors_headers": 3}', "\x00", "[" * 100_000),
    *('{"files": ["config.json"]}', '{"files": {"config.json": 3}}', '{"files": {"config.json": "\\ud800"}}'),
    *(json.dumps({"safetensors_headers": {FILE: header}}) for header in (3, None, ["a"], "ü", "AAAA", "eJw=")),
]


@pytest.mark.parametrize("text", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_damaged_manifest_is_refused(dense_folder: Path, tmp_path: Path, text: str) -> None:
    pack(dense_folder, tmp_path / "packed")
    (tmp_path / "packed" / "coprune_packed.json").write_text(text)
    with pytest.raises(BadInput):
        unpack(tmp_path / "packed", tmp_path / "again")


def test_a_small_manifest_that_stands_for_gigabytes_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coprune.packed.folder.MAX_HEADER_BYTES", 1_000_000)
    bomb = base64.b64encode(zlib.compress(bytes(1 << 25))).decode()
    (tmp_path / "manifest").write_text(json.dumps({"safetensors_headers": {FILE: bomb}}))
    tracemalloc.start()
    with pytest.raises(BadInput, match="too large"):
        read_manifest(tmp_path / "manifest")
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


def test_a_header_of_fewer_tensors_is_refused(dense_folder: Path, tmp_path: Path) -> None:
    pack(dense_folder, tmp_path / "packed")
    path = tmp_path / "packed" / "coprune_packed.json"
    manifest = json.loads(path.read_text())
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [33, 47], "data_offsets": [0, 33 * 47 * 4]}})
    manifest["safetensors_headers"][FILE] = base64.b64encode(zlib.compress(header.encode())).decode()
    path.write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="does not fit"):
        unpack(tmp_path / "packed", tmp_path / "again")


def test_a_configuration_comes_back_with_its_line_ends(dense_folder: Path, tmp_path: Path) -> None:
    (dense_folder / "config.json").write_bytes(b'{"model_type": "llama",\r\n "name": "\xc3\xbc"}\r\n')
    pack(dense_folder, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(dense_folder)


def test_a_swapped_header_in_the_manifest_is_refused(dense_folder: Path, tmp_path: Path) -> None:
    pack(dense_folder, tmp_path / "packed")
    path = tmp_path / "packed" / "coprune_packed.json"
    manifest = json.loads(path.read_text())
    first, second = sorted(manifest["safetensors_headers"])
    headers = manifest["safetensors_headers"]
    headers[first], headers[second] = headers[second], headers[first]
    path.write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="does not fit"):
        unpack(tmp_path / "packed", tmp_path / "again")


def test_a_folder_without_one_of_its_shards_is_refused(dense_folder: Path, tmp_path: Path) -> None:
    pack(dense_folder, tmp_path / "packed")
    for folder in (dense_folder, tmp_path / "packed"):
        (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match="names 2 shards, of which 1 are missing"):
        pack(dense_folder, tmp_path / "again")
    with pytest.raises(BadInput, match="names 2 shards, of which 1 are missing"):
        unpack(tmp_path / "packed", tmp_path / "back")
    (tmp_path / "packed" / "model.safetensors.index.json").unlink()
    with pytest.raises(BadInput, match=r"lacks model-00002-of-00002\.safetensors, which coprune_packed\.json names"):
        unpack(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["layer" * 40, "é" * 60])
def test_long_names_fit_in_the_header(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "dense"
    folder.mkdir()
    tensors = {f"{name}.{i}.weight": sparse(16, 16, seed=i) for i in range(40)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    pack(folder, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_folders_may_be_in_ones_home(dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pack("~/dense", "~/packed")
    assert unpack("~/packed", "~/again") == tmp_path / "again"
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(
        p.name for p in dense_folder.iterdir()
    )


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_a_pipe_is_not_waited_for(name: str, dense_folder: Path, tmp_path: Path) -> None:
    (dense_folder / name).unlink()
    os.mkfifo(dense_folder / name)
    with pytest.raises(BadInput, match=r"is not a file|are missing|holds neither"):
        pack(dense_folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_an_index_that_names_a_pickle_is_refused(dense_folder: Path, tmp_path: Path) -> None:
    file = dense_folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["a.bias"] = "pytorch_model.bin"
    file.write_text(json.dumps(index))
    (dense_folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadInput, match=r"names pytorch_model\.bin, which is no safetensors file"):
        pack(dense_folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
