"""Weights that do not fit the memory of their device are refused before they are read."""

from __future__ import annotations

import pytest
import torch

from coprune.base.devices import DeviceMemory
from coprune.base.errors import BadInput
from coprune.model import room
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.room import require_room
from support.pico_folder import save_pico

GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(save_pico(tmp_path_factory.mktemp("room") / "model"), "pico")


def of_size(available: int | None) -> DeviceMemory:
    return DeviceMemory("cuda:0", allocated=0, peak=0, available=available)


def test_a_device_without_room_is_named(location: ModelFolder) -> None:
    with pytest.raises(BadInput, match=r"take .* GiB on cuda:0 at a time.*stream=True.*check_memory=False"):
        require_room(location, 1, GPU, lambda device: of_size(1000))
    with pytest.raises(BadInput, match="device='cpu'"):
        require_room(location, 2, GPU, lambda device: of_size(1000))
    for reader in (lambda device: of_size(None), lambda device: of_size(10**9), lambda device: None):
        require_room(location, 1, GPU, reader)


def test_host_memory_is_checked_only_for_weights_that_go_there(
    location: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda: 1000)
    require_room(location, 1, GPU, lambda device: of_size(10**9))
    with pytest.raises(BadInput, match="of memory at a time"):
        require_room(location, 1, torch.device("cpu"))
