"""Activations spilled to disk are the same tensors, leave no file behind, and change no result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coprune.base.devices import DeviceMemory
from coprune.model.walk import lockstep
from coprune.model.walk.activations import Activations, DeviceRoom, device_room
from coprune.model.walk.lockstep import Paging
from coprune.model.walk.recording import record_batches
from coprune.model.walk.walk import Walk
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver, prune_walk
from coprune.recipe.pattern import NM, Target
from support.other_device import OTHER, OtherDevice
from support.pico import FAMILIES, MIXTURES, pico_model, pico_tokens
from support.sample import sampled
from support.walking import MOVES, Propagation, prove

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
shapes = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 33)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=30)
@given(shapes, st.integers(0, 20_000), st.sampled_from(DTYPES), st.data())
def test_activations_behave_like_a_list(
    sizes: list[tuple[int, int, int]], limit: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    plain = [torch.randn(size).to(dtype) for size in sizes]
    activations = Activations(plain, limit)
    other = activations.copy()
    for _ in range(4):
        index = data.draw(st.integers(0, len(plain) - 1))
        new = torch.randn(data.draw(st.sampled_from(sizes))).to(dtype)
        plain[index] = activations[index] = new
    assert len(activations) == len(plain)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(activations, plain, strict=True))
    assert [tuple(tensor.shape) for tensor in other] == sizes  # the copy is unaffected
    assert activations.bytes_in_memory <= limit


def test_tensors_above_the_limit_are_in_an_unnamed_file(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3)
    activations = Activations([tensor, tensor, tensor], limit=30, folder=tmp_path)
    assert activations.bytes_in_memory == 24
    assert activations.bytes_on_disk > 0
    assert list(tmp_path.iterdir()) == []
    activations[1].zero_()  # in-place changes do not reach the file
    assert torch.equal(activations[1], tensor)


ROOMS = st.one_of(st.none(), st.builds(DeviceRoom, st.integers(0, 20_000), st.booleans()))


@settings(deadline=None, max_examples=30)
@given(shapes, st.one_of(st.none(), st.integers(0, 20_000)), ROOMS, st.data())
def test_device_tensors_are_the_same_wherever_they_are_stored(
    sizes: list[tuple[int, int, int]], limit: int | None, room: DeviceRoom | None, data: st.DataObject
) -> None:
    with OtherDevice():
        plain = [torch.randn(size) for size in sizes]
        activations = Activations([tensor.to(OTHER) for tensor in plain], limit, room=room)
        other = activations.copy()
        for _ in range(4):
            index = data.draw(st.integers(0, len(plain) - 1))
            plain[index] = torch.randn(data.draw(st.sampled_from(sizes)))
            activations[index] = plain[index].to(OTHER)
        found, copied = [*activations], [*other]
        assert all(tensor.device == OTHER for tensor in [*found, *copied])
        assert all(torch.equal(tensor.cpu(), wanted) for tensor, wanted in zip(found, plain, strict=True))
    assert [tuple(tensor.shape) for tensor in copied] == sizes
    if room is not None:
        assert activations.bytes_on_device <= room.nbytes
        assert limit is None or activations.bytes_in_memory <= limit
        # Waiting batches must keep a limit that the user requested.
        assert activations.spare == (room.nbytes - activations.bytes_on_device if room.asked else None)


def test_a_device_is_filled_first_then_the_host_then_the_disk(tmp_path: Path) -> None:
    with OtherDevice():
        tensors = [torch.full((2, 3), float(number)).to(OTHER) for number in range(4)]
        activations = Activations(tensors, limit=30, folder=tmp_path, room=DeviceRoom(50, asked=True))
        assert (activations.bytes_on_device, activations.bytes_in_memory) == (48, 24)
        assert activations.bytes_on_disk > 0
        activations[0] = torch.zeros(2, 6).to(OTHER)  # too large for the space of its predecessor
        assert (activations.bytes_on_device, activations.bytes_in_memory) == (24, 24)
        assert [float(tensor.cpu().mean()) for tensor in activations] == [0, 1, 2, 3]


def test_by_default_activations_take_half_of_the_free_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    there = DeviceMemory("xpu:0", allocated=0, peak=0, available=10 << 30)
    monkeypatch.setattr("coprune.model.walk.activations.device_memory", lambda device: there)
    assert device_room(OTHER, None) == DeviceRoom(5 << 30, asked=False)
    assert device_room(OTHER, 0.5) == DeviceRoom(1 << 29, asked=True)
    assert device_room(torch.device("cpu"), 0.5) is None
    there = replace(there, available=None)
    assert device_room(OTHER, None) is None


def prune_within(
    family: str, propagation: Propagation, limit: int | None
) -> tuple[dict[str, torch.Tensor], list[str], int]:
    """Prune a pico model with limited activations; return weights, masks, and the bytes on disk."""
    model = pico_model(family)
    proven, hidden = prove(model, pico_tokens(1)), Activations(limit=limit)
    recording = record_batches(proven, list(pico_tokens().split(1)), hidden)
    solver = Solver(METHODS["sparsegpt"])
    walk = Walk(proven, recording, solver.statistic, MOVES[propagation])
    results = prune_walk(walk, solver, lambda matrix: Target(NM(2, 4), 0.5))
    return dict(model.state_dict()), [result.mask_checksum for result in results], hidden.bytes_on_disk


@pytest.mark.parametrize(
    ("propagation", "family", "limit"),
    # 4 batches of 32 × 64 float32: room for one of them.
    [
        ("block", "llama", 8192),
        ("sequential", "llama", 8192),
        *sampled(
            [("sequential", family, 0) for family in FAMILIES | MIXTURES],
            quick=[("sequential", family, 0) for family in ("gpt2", "gemma3_text", "mixtral", "deepseek_v3")],
        ),
    ],
)
def test_pruning_is_bit_identical_with_activations_on_the_disk(
    propagation: Propagation, family: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep, "SMALLEST", 256)
    state, masks, _ = prune_within(family, propagation, None)
    other_state, other_masks, on_disk = prune_within(family, propagation, limit)
    assert on_disk > 0
    assert masks == other_masks
    assert all(torch.equal(state[name], other_state[name]) for name in state)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 400_000), st.lists(st.sampled_from("snaivw"), min_size=1, max_size=30))
def test_paged_tensors_equal_those_in_memory(limit: int, steps: list[str]) -> None:
    def play(stop: Callable[[], None]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        held = [torch.randn(130, 130, generator=generator)]
        for step in steps:
            if step == "s":
                stop()
            elif step == "n":
                held.append(held[-1] * 2)
            elif step == "a":
                held.append(held[0] + held[len(held) // 2])
            elif step == "i":
                held[len(held) // 2].mul_(0.5)
            elif step == "v":
                held.append(held[-1].T)
            elif len(held) > 1:
                held.pop(0)
        return held

    plain = play(lambda: None)
    pages = Paging(limit)
    with pages:
        paged = play(pages.stop)
        pages.stop()
    # Memory above the limit has been released.
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in paged}
    assert sum(storages.values()) <= limit
    for tensor, expected in zip(paged, plain, strict=True):
        pages.release(tensor)
        assert torch.equal(tensor, expected)
