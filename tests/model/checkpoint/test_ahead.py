"""Prefetching the next block to a device: in order, never used before it is complete, and never a hindrance."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coprune.base.devices import DeviceMemory
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint import lazy
from coprune.model.checkpoint.lazy import Ahead, LazyCheckpoint, ahead_to, channel_to
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.source_encoding import checkpoint_entries
from coprune.recipe.recipe import make_recipe
from coprune.runner.run_recipe import run_recipe
from support.pico_folder import listing, save_pico, write_words

HERE = torch.device("cpu")


@dataclass
class StandIn:
    """A stand-in for copies to a device that happen only when waited for; until then tensors hold NaN."""

    log: list[str] = field(default_factory=list)
    full: bool = False
    readers: set[str] = field(default_factory=set)

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.readers.add(threading.current_thread().name)
        return torch.empty(shape, dtype=dtype)

    def send(self, held: Tensor) -> OnItsWay:
        self.log.append("sent")
        if self.full:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return OnItsWay(self, held, torch.full_like(held, torch.nan))


@dataclass
class OnItsWay:
    channel: StandIn
    held: Tensor
    tensor: Tensor

    def arrive(self) -> Tensor:
        self.channel.log.append("arrived")
        return self.tensor.copy_(self.held)


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Stream folders to host memory as if it were a device with a gigabyte free."""
    channel = StandIn()
    memory = DeviceMemory("cuda:0", allocated=0, peak=0, available=1 << 30)
    monkeypatch.setattr(lazy, "device_memory", lambda device: memory)
    monkeypatch.setattr(lazy, "ahead_to", lambda device: Ahead(channel, device))
    return channel


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / request.param
    save_pico(folder, request.param)
    return folder


def opened(folder: Path) -> tuple[LazyCheckpoint, list[str]]:
    found = LazyCheckpoint(ModelFolder(folder, folder.name))
    names = [block.name for block in find_blocks(found.model)]
    found.acquire_rest(names)
    return found, names


def tensors(weights: LazyCheckpoint, block: str) -> dict[str, Tensor]:
    weights.acquire(block)
    found = {name: tensor.clone() for name, tensor in weights.original_tensors(block).items()}
    weights.release(block)
    return found


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_expected_block_is_prefetched_and_used_once_complete(
    folder: Path, channel: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, (first, second, *_) = opened(folder)
    early = tensors(weights, first)
    weights.prefetch(second)
    fetched = tensors(weights, second)
    count = len(fetched)
    assert sorted(channel.log) == ["arrived"] * count + ["sent"] * count, "once each, and the first block as ever"
    assert channel.log[0] == "sent"
    assert channel.readers == {"coprune-ahead_0"}
    monkeypatch.setattr(lazy, "ahead_to", ahead_to)
    plain, _ = opened(folder)
    assert plain._ahead is None, "nothing is fetched in host memory"
    assert same(early, tensors(plain, first))
    assert same(fetched, tensors(plain, second))


def test_unused_prefetched_blocks_are_discarded(folder: Path, channel: StandIn) -> None:
    weights, (first, second, third) = opened(folder)
    wanted = tensors(weights, second)
    weights.prefetch(first)
    weights.prefetch(third)
    assert same(tensors(weights, second), wanted)
    assert "arrived" not in channel.log
    weights.prefetch(second)
    weights.read_from(next(iter(weights._entries.values())).file)  # a file written meanwhile is read from the disk
    assert same(tensors(weights, second), wanted)


def test_a_full_device_is_retried_once(folder: Path, channel: StandIn) -> None:
    weights, (first, *_) = opened(folder)
    wanted = tensors(weights, first)
    channel.full = True
    weights.prefetch(first)
    assert same(tensors(weights, first), wanted)
    assert "sent" in channel.log
    assert "arrived" not in channel.log


def test_a_block_is_prefetched_only_with_ample_device_memory(
    folder: Path, channel: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, (first, *_) = opened(folder)
    wanted = tensors(weights, first)
    size = sum(tensor.nbytes for tensor in wanted.values())
    for available, fetched in ((8 * size - 1, False), (None, False), (8 * size, True)):
        there = DeviceMemory("cuda:0", allocated=0, peak=0, available=available)
        monkeypatch.setattr(lazy, "device_memory", lambda device, there=there: there)
        weights.prefetch(first)
        assert same(tensors(weights, first), wanted)
        assert bool(channel.log) is fetched
    monkeypatch.setattr(lazy, "device_memory", lambda device: None)
    assert not lazy.has_room(0, HERE)


def test_a_truncated_file_is_reported_when_its_tensor_is_needed(folder: Path, channel: StandIn, tmp_path: Path) -> None:
    entry = next(iter(checkpoint_entries(folder).values()))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(entry.file.read_bytes()[: entry.start + 8])
    fetching, lost = Ahead(channel, HERE), replace(entry, file=cut)
    assert fetching.begin([lost])
    with pytest.raises(BadInput, match="cut off"):
        fetching.take(lost)
    assert fetching.take(lost) is None


def test_a_run_with_prefetching_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pico(tmp_path / "model", "llama")
    words, channel = write_words(tmp_path / "words.txt"), StandIn()
    usual: dict[str, Any] = {"model": str(tmp_path / "model"), "method": "wanda", "dataset": str(words), "nsamples": 4}

    def pruned(name: str) -> bytes | None:
        more = {"seqlen": 16, "evaluate": False, "stream": True, "save": str(tmp_path / f"{name}-run")}
        run_recipe(make_recipe({**usual, **more, "save_model": str(tmp_path / name)}), reporter=Reporter(quiet=True))
        return listing(tmp_path / name)["model.safetensors"]

    plain = pruned("plain")
    monkeypatch.setattr(lazy, "device_memory", lambda device: DeviceMemory("cuda:0", 0, 0, 1 << 30))
    monkeypatch.setattr(lazy, "ahead_to", lambda device: Ahead(channel, device))
    assert pruned("fetched") == plain
    assert channel.log.count("arrived") > 0


def test_nothing_is_prefetched_to_host_memory() -> None:
    assert channel_to(HERE) is None
    assert ahead_to(HERE) is None
