"""Torch's semi-structured product of packed 2:4 weights, by torch's own conversions: no GPU is here that makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.sparse import _semi_structured_conversions as conversions

from coprune.packed import timing
from coprune.packed.accelerate import accelerate
from coprune.packed.bench import make_forms
from coprune.packed.format import check_packed
from coprune.packed.header import Header, read_header
from coprune.packed.linear import PackedLinear
from coprune.packed.operator import on_gpu, pack_matrix
from coprune.packed.semi_structured import metadata, product_serves, semi_structured_linear
from coprune.packed.timing import Timing

DTYPES = (torch.float16, torch.bfloat16)


def halved(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    """A layer whose every four inputs keep two, at random."""
    generator = torch.Generator().manual_seed(rows)
    linear = nn.Linear(columns, rows, dtype=dtype).requires_grad_(False)
    keep = torch.rand(rows, columns // 4, 4, generator=generator).argsort(dim=2) < 2
    values = torch.rand(rows, columns, generator=generator) + 0.1  # none is zero
    linear.weight.copy_(
        values * keep.view(rows, columns) * (1 - 2 * torch.bernoulli(values.clamp(max=1), generator=generator))
    )
    return linear


def packed(linear: nn.Linear) -> PackedLinear:
    made = PackedLinear.from_linear(linear)
    assert made is not None
    return made


@pytest.fixture
def torchs_product() -> Iterator[list[tuple[int, ...]]]:
    """Torch's CUTLASS product on a CPU: what torch unpacks of values and metadata, times the inputs. Gives their shapes."""
    shapes: list[tuple[int, ...]] = []

    def multiply(values: Tensor, codes: Tensor, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        if x.shape[1] % 8 or x.stride(0) != 1:
            raise RuntimeError("not so on a GPU")
        shapes.append(tuple(x.shape))
        return conversions.sparse_semi_structured_to_dense_cutlass(values, codes) @ x

    timing.TRIED.clear()
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_sparse_semi_structured_mm", multiply, "CPU")
        yield shapes
    timing.TRIED.clear()


@pytest.fixture
def it_wins(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def decide(whether: bool) -> None:
        times = {"candidate": Timing(*[1.0 + (not whether)] * 3), "known": Timing(*[1.5] * 3)}
        monkeypatch.setattr("coprune.packed.timing.time_in_turns", lambda calls, repeats: times)

    return decide


def run(layer: PackedLinear, x: Tensor) -> Tensor:
    return on_gpu(x, *layer._weight())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 64), (96, 128), (64, 320)])
def test_values_and_metadata_are_those_that_torch_makes_of_the_dense_weight(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    linear = halved(*shape, dtype)
    blob = packed(linear).packed
    header = read_header(blob)
    values, codes = conversions.sparse_semi_structured_from_dense_cutlass(linear.weight)
    assert torch.equal(metadata(blob, header), codes)
    assert torch.equal(blob[header.values_at :][: header.values_bytes].view(dtype).view(shape[0], -1), values)
    assert codes.nbytes == header.pattern_bytes


def test_what_does_not_store_exactly_two_of_every_four_is_told_apart() -> None:
    linear, fewer, moved, narrow = halved(32, 64), halved(32, 64), halved(32, 64), halved(32, 80)
    fewer.weight[:8] = 0.0
    moved.weight[:, :4], moved.weight[:, 4:8] = 0.0, 1.0  # half of every row, but not of every four
    assert packed(linear).two_of_four
    for other in (fewer, moved, narrow, halved(48, 64), halved(32, 64, torch.float32)):
        assert not packed(other).two_of_four
    layer = packed(fewer)
    layer.load_state_dict(packed(linear).state_dict())
    assert layer.two_of_four
    layer.load_state_dict(packed(fewer).state_dict())
    assert not layer.two_of_four


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_zero_by_itself_is_stored_so_that_every_four_store_two(dtype: torch.dtype) -> None:
    linear, x = halved(64, 128, dtype), torch.randn(3, 128, dtype=dtype)
    linear.weight[3, :8] = 0.0  # two whole groups
    linear.weight[5, int(linear.weight[5].nonzero()[0])] = 0.0
    linear.weight[63, int(linear.weight[63].nonzero()[-1])] = 0.0
    blob = pack_matrix(linear.weight)
    assert blob is not None
    layer = packed(linear)
    assert layer.two_of_four
    assert layer.header.kept == read_header(blob).kept + 6 == 64 * 64
    assert torch.equal(layer.weight, linear.weight)
    assert check_packed(layer.packed) == layer.header
    torch.testing.assert_close(layer(x), linear(x), rtol=2e-2, atol=2e-2)
    assert torch.equal(layer.starts, torch.arange(65) * 64)


def test_many_such_zeros_or_a_full_group_are_left_as_they_are() -> None:
    many, full = halved(64, 128), halved(64, 128)
    many.weight[0] = 0.0  # more than a hundredth
    full.weight[0, :4], full.weight[1] = 1.0, full.weight[1] * 0
    full.weight[1, 8:] = halved(64, 128).weight[1, 8:]
    for linear in (many, full):
        blob = pack_matrix(linear.weight)
        assert blob is not None
        assert torch.equal(packed(linear).packed, blob)
        assert not packed(linear).two_of_four


def test_shapes_and_dtypes_that_torch_refuses_are_not_asked_for() -> None:
    def header(rows: int, columns: int, dtype: torch.dtype) -> Header:
        return Header("bitmask", dtype, (rows, columns), rows * columns // 2)

    x = torch.zeros(20, 64, dtype=torch.bfloat16)
    assert product_serves(x, header(32, 64, torch.bfloat16))
    assert not product_serves(x, header(48, 64, torch.bfloat16))
    assert not product_serves(x[:, :32], header(32, 32, torch.bfloat16))
    assert not product_serves(x, header(32, 64, torch.float16))
    assert not product_serves(x.float(), header(32, 64, torch.float32))
    assert not product_serves(x[:0], header(32, 64, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_inputs_are_multiplied_by_torchs_product_where_it_wins(
    dtype: torch.dtype, torchs_product: list[tuple[int, ...]], it_wins: Callable[[bool], None]
) -> None:
    linear = halved(64, 128, dtype)
    layer = packed(linear)
    it_wins(True)
    x = torch.randn(3, 7, 128, dtype=dtype)
    y = run(layer, x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, linear(x), rtol=2e-2, atol=2e-2)
    assert torchs_product == [(128, 24)] * 2  # tried, then used; 21 inputs are filled up to 24
    torch.testing.assert_close(run(layer, x[:, :6]), linear(x[:, :6]), rtol=2e-2, atol=2e-2)
    assert len(torchs_product) == 3  # of as many bits: not tried again
    run(layer, torch.randn(40, 128, dtype=dtype))
    assert len(torchs_product) == 5  # of more: tried
    assert len(timing.TRIED) == 2


def test_an_unpacked_copy_is_used_where_torchs_product_does_not_win(
    torchs_product: list[tuple[int, ...]], it_wins: Callable[[bool], None]
) -> None:
    linear, x = halved(64, 128), torch.randn(24, 128).bfloat16()
    layer = packed(linear)
    it_wins(False)
    for _ in range(2):
        assert torch.equal(run(layer, x), linear(x))
    assert len(torchs_product) == 1


def test_an_unpacked_copy_is_used_where_torch_refuses_or_differs(
    torchs_product: list[tuple[int, ...]], it_wins: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, x = halved(64, 128), torch.randn(24, 128).bfloat16()
    layer = packed(linear)
    it_wins(True)
    for wrong in (lambda *_: torch.full((64, 8), 17, dtype=torch.int16), lambda *_: torch.zeros(3)):
        timing.TRIED.clear()
        monkeypatch.setattr("coprune.packed.semi_structured.metadata", wrong)
        assert torch.equal(run(layer, x), linear(x))
        assert list(timing.TRIED.values()) == [False]


def test_without_a_gpu_torch_itself_refuses_and_nobody_is_told() -> None:
    timing.TRIED.clear()
    linear, x = halved(64, 128), torch.randn(24, 128).bfloat16()
    assert torch.equal(run(packed(linear), x), linear(x))
    assert list(timing.TRIED.values()) == [False]
    timing.TRIED.clear()


def test_other_packed_weights_are_never_tried(
    torchs_product: list[tuple[int, ...]], it_wins: Callable[[bool], None]
) -> None:
    linear, x = halved(64, 128), torch.randn(24, 128).bfloat16()
    linear.weight[0] = 0.0
    it_wins(True)
    assert torch.equal(run(packed(linear), x), linear(x))
    assert not torchs_product


def test_gradients_pass_through_the_operator_with_a_two_of_four_weight() -> None:
    linear = halved(32, 64)
    layer = packed(linear)
    grads = []
    for one in (layer, linear):
        x = torch.linspace(-1, 1, 20 * 64).reshape(20, 64).bfloat16().requires_grad_()
        one(x).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)


def test_a_layer_that_torch_does_not_convert_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = halved(64, 128)
    assert semi_structured_linear(linear) is None  # torch: only CUDA tensors
    monkeypatch.setattr("coprune.packed.semi_structured.capability", lambda device: (9, 0))
    model = nn.Sequential(linear)
    assert "semi-structured" not in {choice.kind for choice in accelerate(model, repeats=1)}
    assert "semi-structured" not in make_forms(nn.Sequential(linear))
