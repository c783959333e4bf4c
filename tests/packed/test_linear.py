"""PackedLinear computes what nn.Linear computes, and behaves as a module."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from coprune.base.errors import BadInput
from coprune.base.native.product import IN_KERNEL
from coprune.packed.format import pack_tensor
from coprune.packed.linear import PackedLinear, pack_linears


def pruned_linear(columns: int, rows: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(columns * 1000 + rows)
    linear = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(torch.rand_like(linear.weight) < 0.4)
    return linear.to(dtype)


def packed(linear: nn.Linear) -> PackedLinear:
    result = PackedLinear.from_linear(linear)
    assert result is not None
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (2, IN_KERNEL[torch.float32]), (0,), ()])
@torch.no_grad()
def test_same_outputs_as_the_dense_layer(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    linear = pruned_linear(67, 45, dtype=dtype)
    x = torch.randn(*shape, 67).to(dtype)
    y = packed(linear)(x)
    assert y.shape == (*shape, 45)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(y, linear(x), rtol=tolerance, atol=tolerance)


def test_a_view_that_is_not_contiguous() -> None:
    linear = pruned_linear(64, 64, bias=False)
    x = torch.randn(64, 7).t()
    with torch.no_grad():
        torch.testing.assert_close(packed(linear)(x), linear(x), rtol=1e-5, atol=1e-5)


def test_weight_is_the_dense_weight_and_memory_is_smaller() -> None:
    linear = pruned_linear(64, 64)
    layer = packed(linear)
    assert torch.equal(layer.weight, linear.weight)
    assert layer.packed.numel() < linear.weight.numel() * 4
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert layer.header.kept == int(linear.weight.count_nonzero())
    assert float(torch.signbit(linear.weight[linear.weight == 0]).float().mean()) > 0.1  # masks leave −0.0 behind
    assert torch.equal(layer.to_linear().weight, linear.weight)


def test_gradients_flow_to_the_input() -> None:
    linear = pruned_linear(32, 16)
    x = torch.randn(4, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(packed(linear)(x).square().sum(), x)
    (expected,) = torch.autograd.grad(linear(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


@torch.no_grad()
def test_copies_pickles_and_state_dicts() -> None:
    linear, other = pruned_linear(40, 24), pruned_linear(40, 24)
    layer = packed(linear)
    x = torch.randn(1, 40)
    expected = layer(x)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), expected)
    other.weight.masked_fill_(torch.rand_like(other.weight) < 0.5, 0.0)
    target = packed(other)
    target(x)
    target.load_state_dict(layer.state_dict())
    assert torch.equal(target(x), expected)
    with pytest.raises(BadInput, match="does not fit"):
        target.load_state_dict(packed(pruned_linear(24, 40)).state_dict())


@torch.no_grad()
def test_moving_and_casting_keep_the_packed_weight() -> None:
    layer = packed(pruned_linear(40, 24))
    x = torch.randn(1, 40)
    expected = layer(x)
    assert torch.equal(layer.to("cpu")(x), expected)
    assert layer.half()(x.half()).dtype == torch.float16
    assert layer.packed.dtype == torch.uint8


def test_wrong_width_is_an_error_not_a_crash() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="takes 40"):
        packed(pruned_linear(40, 24))(torch.randn(2, 20))


@torch.no_grad()
def test_nm_layout_is_accepted() -> None:
    weight = torch.zeros(8, 32)
    weight[:, ::4] = torch.randn(8, 8)
    weight[0, 0] = 0.0  # a group with nothing in it
    blob = pack_tensor(weight, "nm")
    assert blob is not None
    x = torch.randn(3, 32)
    torch.testing.assert_close(PackedLinear(blob)(x), x @ weight.T)


def test_damage_is_refused() -> None:
    blob = pack_tensor(pruned_linear(40, 24).weight)
    assert blob is not None
    blob[100] ^= 1
    with pytest.raises(BadInput):
        PackedLinear(blob)


def test_only_layers_that_shrink_and_are_not_tied_are_replaced() -> None:
    model = nn.Sequential(
        pruned_linear(32, 32), nn.Linear(32, 32), pruned_linear(32, 50, bias=False), nn.Embedding(50, 32)
    )
    model[3].weight = model[2].weight
    assert pack_linears(model) == ["0"]
    assert isinstance(model[0], PackedLinear)


def test_torch_compile_sees_a_plain_product() -> None:
    layer = packed(pruned_linear(40, 24)).requires_grad_(False)
    x = torch.randn(2, 40)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), layer(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_layer_does_not_keep_the_bytes_it_was_made_from(tmp_path: Path) -> None:
    linear = pruned_linear(256, 256, bias=False)
    file = tmp_path / "packed.safetensors"
    save_file({"other": torch.ones(4), "weight": packed(linear).packed}, file)
    mapped = load_file(file)
    layer = PackedLinear(mapped["weight"])
    x = torch.randn(2, 256)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
    if layer._native is not None:
        assert layer.packed.data_ptr() % 64 == 0
        assert layer.packed.data_ptr() != mapped["weight"].data_ptr()
        assert layer.packed.untyped_storage().nbytes() == layer.packed.numel()  # not the region that it lies in
    assert torch.equal(mapped["weight"], packed(linear).packed)  # taken out of memory, and still what it was
