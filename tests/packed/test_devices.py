"""Packing a model whose weights are on a device that the host cannot read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from coprune.packed.accelerate import accelerate
from coprune.packed.header import read_header
from coprune.packed.linear import PackedLinear, PackedSlot, pack_linears
from coprune.packed.operator import pack_matrix
from support.other_device import OTHER, OtherDevice


@pytest.fixture(autouse=True)
def other_device() -> Iterator[None]:
    with OtherDevice(), torch.no_grad():
        yield


def pruned_linear(rows: int = 32, columns: int = 64) -> nn.Linear:
    linear = nn.Linear(columns, rows).requires_grad_(False)
    linear.weight.mul_(torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.4)
    return linear


def placed(linear: nn.Linear) -> nn.Linear:
    """The layer with its parameters on the device."""
    for name, parameter in list(linear.named_parameters()):
        setattr(linear, name, nn.Parameter(parameter.detach().to(OTHER), requires_grad=False))
    return linear


def test_a_layer_is_packed_where_it_is() -> None:
    linear, x = pruned_linear(), torch.randn(4, 64)
    wanted = linear(x)
    packed = PackedLinear.from_linear(placed(linear))
    assert packed is not None
    assert packed.packed.device == OTHER
    assert torch.equal(packed(x.to(OTHER)).cpu(), wanted)
    assert torch.equal(packed.to_linear().weight.cpu(), linear.weight.cpu())
    packed.load_state_dict({name: tensor.cpu() for name, tensor in packed.state_dict().items()})
    assert packed.packed.device == OTHER
    assert torch.equal(packed(x.to(OTHER)).cpu(), wanted)


def test_a_packed_weight_that_arrives_on_a_device_is_taken_up_there() -> None:
    linear, x = pruned_linear(), torch.randn(4, 64)
    wanted, packed = linear(x), pack_matrix(linear.weight)
    assert packed is not None
    slot = PackedSlot(read_header(packed), placed(linear))
    slot._buffers["weight"] = packed.to(OTHER)
    slot.fill()
    assert slot.packed.device == OTHER
    assert torch.equal(slot(x.to(OTHER)).cpu(), wanted)


def test_a_model_is_packed_and_accelerated_where_it_is() -> None:
    layers = [placed(pruned_linear(64, 64)) for _ in range(2)]
    model, x = nn.Sequential(*layers), torch.randn(1, 64).to(OTHER)
    wanted = model(x)
    assert {choice.kind for choice in accelerate(model, repeats=1)} <= {"dense", "packed"}
    assert torch.equal(model(x).cpu(), wanted.cpu())
    assert pack_linears(nn.Sequential(*layers)) == ["0", "1"]
