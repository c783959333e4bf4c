"""Packing one tensor: every bit comes back, nothing grows, and damage is an error."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.selection import keep_n_of_m
from coprune.packed.format import BITS_OF_SIZE, Format, check_packed, pack_tensor, unpack_tensor
from coprune.packed.header import DTYPE_CODES, is_packed, read_header
from coprune.packed.operator import dense_matrix, for_kernels, native_matrix, row_starts

shapes = st.lists(st.integers(1, 37), min_size=2, max_size=4).filter(lambda shape: math.prod(shape) < 40_000)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = BITS_OF_SIZE[a.dtype.itemsize]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(bits), b.view(bits))


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, sparsity: float, seed: int) -> torch.Tensor:
    """Any bit pattern, NaN payloads, infinities and subnormals included."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (math.prod(shape), dtype.itemsize), generator=generator, dtype=torch.uint8)
    bits[torch.rand(len(bits), generator=generator) < sparsity] = 0
    return bits.reshape(-1).view(dtype).reshape(shape)


@settings(max_examples=150, deadline=None)
@given(
    shapes,
    st.sampled_from(list(DTYPE_CODES)),
    st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    st.sampled_from(["auto", "bitmask", "nm"]),
    st.integers(0, 2**31),
)
def test_every_bit_comes_back_and_nothing_grows(
    shape: tuple[int, ...], dtype: torch.dtype, sparsity: float, format: Format, seed: int
) -> None:
    dense = random_bits(tuple(shape), dtype, sparsity, seed)
    blob = pack_tensor(dense, format)
    if blob is not None:
        assert is_packed(blob)
        assert blob.numel() < dense.numel() * dtype.itemsize
        assert same_bits(unpack_tensor(blob), dense)


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_values_are_little_endian_on_every_machine(
    dtype: torch.dtype, format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine of the other order, on which the same numbers lie in memory with their bytes reversed."""
    dense = random_bits((24, 64), dtype, 0.7, 0).reshape(-1, 4)
    dense[:, 1::2] = 0
    here = pack_tensor(dense.reshape(24, 64), format)
    assert here is not None
    monkeypatch.setattr("sys.byteorder", "big")
    swapped = dense.view(torch.uint8).reshape(-1, dtype.itemsize).flip(1).reshape(-1).view(dtype).reshape(24, 64)
    there = pack_tensor(swapped, format)
    assert there is not None
    assert torch.equal(there, here)
    assert same_bits(unpack_tensor(there), swapped)
    if dtype.itemsize > 1:  # torch has no such operation for smaller ones
        assert same_bits(dense_matrix(for_kernels(there), read_header(for_kernels(there))), swapped)
    blob, header = for_kernels(there), read_header(for_kernels(there))
    assert native_matrix(blob, row_starts(blob, header), header, None) is None


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(1, 4), (2, 4), (3, 8), (1, 16), (3, 32)]),
    st.integers(1, 30),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_nm_patterns_with_missing_values(
    pattern: tuple[int, int], rows: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, m = pattern
    score = torch.rand(rows, groups * m, generator=generator)
    dense = (torch.randn(rows, groups * m, generator=generator) * keep_n_of_m(score, n, m)).to(dtype)
    dense[torch.rand(dense.shape, generator=generator) < 0.1] = 0.0
    blob = pack_tensor(dense, "nm")
    if blob is not None:
        assert check_packed(blob).layout == "nm"
        assert same_bits(unpack_tensor(blob), dense)


def test_special_values_are_kept_bit_for_bit() -> None:
    bits = torch.zeros(64, 64, dtype=torch.int32)
    bits[0, :4] = torch.tensor([-(2**31), 0x7FC00001, 0x7F800001, 1], dtype=torch.int32)  # -0, two NaNs, subnormal
    dense = bits.view(torch.float32)
    blob = pack_tensor(dense)
    assert blob is not None
    assert check_packed(blob).kept == 4
    assert same_bits(unpack_tensor(blob), dense)


@pytest.mark.parametrize(("dtype", "sparsity", "limit"), [
    (torch.float32, 0.5, 0.535), (torch.bfloat16, 0.5, 0.57), (torch.bfloat16, 0.8, 0.27), (torch.float32, 0.8, 0.235),
])  # fmt: skip
def test_sizes_are_what_information_theory_has(dtype: torch.dtype, sparsity: float, limit: float) -> None:
    dense = torch.randn(576, 576, generator=torch.Generator().manual_seed(0)).to(dtype)
    dense.view(-1)[
        torch.randperm(dense.numel(), generator=torch.Generator().manual_seed(1))[: int(sparsity * 576**2)]
    ] = 0
    blob = pack_tensor(dense)
    assert blob is not None
    assert blob.numel() / (dense.numel() * dtype.itemsize) < limit


def test_the_smaller_layout_is_chosen() -> None:
    score = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) + 1
    layouts = {}
    for n, m in ((1, 4), (2, 4), (4, 8)):
        blob = pack_tensor(score * keep_n_of_m(score, n, m))
        assert blob is not None
        layouts[f"{n}:{m}"] = check_packed(blob).layout
    # 2 bits per kept value: half a bit per weight for 1:4, and one bit, as the bitmask, for 2:4.
    assert layouts == {"1:4": "nm", "2:4": "bitmask", "4:8": "bitmask"}


@pytest.mark.parametrize(
    "dense", [torch.zeros(10), torch.zeros(0, 5), torch.zeros(4, 4, dtype=torch.int64), torch.ones(8, 8)]
)
def test_what_cannot_shrink_stays_dense(dense: Tensor) -> None:
    assert pack_tensor(dense) is None


def test_unknown_format() -> None:
    with pytest.raises(BadInput, match="did you mean 'bitmask'"):
        pack_tensor(torch.zeros(8, 8), "bitmsk")  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_two_hundred_damaged_tensors_are_refused(format: Format) -> None:
    generator = torch.Generator().manual_seed(3)
    score = torch.rand(32, 64, generator=generator)
    blob = pack_tensor(score * keep_n_of_m(score, 1, 4), format)
    assert blob is not None
    for case in range(200):
        damaged = blob.clone()
        at = int(torch.randint(0, 120 if case % 2 else blob.numel(), (1,), generator=generator))
        if case % 4 == 3:
            damaged = damaged[:at]
        else:
            damaged[at] ^= int(torch.randint(1, 256, (1,), generator=generator))
        with pytest.raises(BadInput):
            unpack_tensor(damaged)
