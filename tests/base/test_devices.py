"""A device's reported memory, and runs that exceed it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from coprune.base import processes
from coprune.base.devices import (
    DeviceMemory,
    accelerators,
    default_device,
    device_memory,
    enough_memory,
    reset_peak,
    synchronize,
)
from coprune.base.errors import BadInput, LostProcess, OutOfMemory
from coprune.base.progress import Reporter
from coprune.base.words import Set
from coprune.commands import app
from coprune.recipe.recipe import make_recipe
from coprune.run.context import NOTHING, Run
from coprune.run.phase_events import Phase

SECOND = torch.device("xpu", 1)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return torch's module for a kind of device, with two devices, the second one in use."""
    allocated, peak = {0: 0, 1: 300}, {0: 9999, 1: 700}

    def index(device: torch.device) -> int:
        return device.index

    def reset(device: torch.device) -> None:
        peak[index(device)] = allocated[index(device)]

    fake = SimpleNamespace(
        memory_allocated=lambda device: allocated[index(device)],
        max_memory_allocated=lambda device: peak[index(device)],
        memory_reserved=lambda device: 350,
        mem_get_info=lambda device: (600, 1000),
        reset_peak_memory_stats=reset,
    )
    monkeypatch.setattr(torch, "xpu", fake)
    return fake


def test_memory_is_that_of_the_device_itself(module: Any) -> None:
    # 50 of what the device counts as used are held by the allocator and free for tensors.
    assert device_memory(SECOND) == DeviceMemory("xpu:1", allocated=300, peak=700, available=650)
    reset_peak(SECOND)
    found = device_memory(SECOND)
    assert found is not None
    assert found.peak == 300
    assert device_memory(torch.device("cpu")) is None
    reset_peak(torch.device("cpu"))
    del module.mem_get_info
    told = device_memory(SECOND)
    assert told is not None
    assert told.available is None


def test_a_run_counts_its_own_device_from_its_start(module: Any) -> None:
    run, in_host_memory = (Run(make_recipe({"model": "none"}), NOTHING, Reporter(quiet=True)) for _ in range(2))
    run.count_from_here(SECOND)
    assert module.max_memory_allocated(SECOND) == 300, "the peak of whatever was there before"
    run.done(Phase.PREPARE)
    assert run.phases[0].device_bytes == 300
    in_host_memory.count_from_here(torch.device("cpu"))
    in_host_memory.done(Phase.PREPARE)
    assert in_host_memory.phases[0].device_bytes is None


TORCHS_WORDS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.10 GiB of which 1.10 GiB is free. "
    "If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(TORCHS_WORDS), RuntimeError(TORCHS_WORDS), MemoryError()],
    ids=["torch", "another allocator", "python"],
)
def test_no_memory_left_is_one_message(error: Exception) -> None:
    with pytest.raises(OutOfMemory) as caught, enough_memory(("it takes less with ", Set("batch_size", 1))):
        raise error
    said = str(caught.value)
    assert said.endswith("it takes less with batch_size=1.")
    assert len(said.splitlines()) == 1
    if str(error):
        assert "Tried to allocate 2.00 GiB" in said
        assert "PYTORCH_CUDA_ALLOC_CONF" not in said


def test_errors_other_than_out_of_memory_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes"), enough_memory("less"):
        raise RuntimeError("shapes do not match")


def test_a_command_ends_with_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_memory(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError(TORCHS_WORDS)

    monkeypatch.setattr(app, "app", no_memory)
    monkeypatch.setattr(sys, "argv", ["coprune", "eval", "model"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("coprune: CUDA out of memory")
    assert "a smaller batch" in said
    assert len(said.splitlines()) == 1


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return two GPUs of a kind as torch reports them, recording every request to them."""
    state = SimpleNamespace(kind="cuda", told=[])
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(state.kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: state.told.append(("wait", device)))
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: state.told.append(("take", index)))
    return state


def test_a_gpu_of_any_kind_with_float64_is_found(gpus: Any) -> None:
    assert (default_device(), accelerators()) == (torch.device("cuda"), 2)
    gpus.kind = "xpu"
    assert default_device() == torch.device("xpu")
    synchronize(SECOND)
    synchronize(torch.device("cpu"))
    assert gpus.told == [("wait", SECOND)]
    gpus.kind = "mps"
    assert (default_device(), accelerators()) == (torch.device("cpu"), 0)


@pytest.mark.parametrize(
    ("kind", "backend"), [("cuda", "cpu:gloo,cuda:nccl"), ("mps", "gloo"), ("privateuseone", "gloo")]
)
def test_processes_take_a_gpu_each_and_add_up_there(
    gpus: Any, kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus.kind = kind
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes._backend() == backend
    assert gpus.told == ([] if kind == "mps" else [("take", 1)])
    monkeypatch.setenv("LOCAL_RANK", "2")
    if kind != "mps":
        with pytest.raises(BadInput, match="no GPU of its own: there are only 2"):
            processes._backend()


def test_a_lost_process_is_reported_before_sums_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums on GPUs would wait for it until the timeout."""

    def gone(*arguments: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    def added_up(total: torch.Tensor) -> None:
        raise AssertionError("sums were begun")

    monkeypatch.setattr(dist, "all_gather_object", gone)
    monkeypatch.setattr(dist, "all_reduce", added_up)
    with pytest.raises(LostProcess, match="Connection closed"):
        processes.Processes(0, 2).add_up([torch.ones(2)], 1)
