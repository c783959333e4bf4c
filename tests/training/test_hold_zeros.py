"""Pruned weights, and the optimiser's state for them, stay zero under any optimiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from coprune.training.keep_zeros import hold_zeros
from coprune.training.masks import find_masks
from support.pruned import Restless, pruned_model, zeros_of

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False),
    "restless": Restless,
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        for part in range(2):
            generator = torch.Generator().manual_seed(10 * step + part)
            tokens = torch.randint(1002, (2, 16), generator=generator)
            model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_mask_is_the_same_bit_for_bit_after_training(name: str, family: str) -> None:
    model = pruned_model(family).requires_grad_(True)
    masks = find_masks(model)
    before, weights = zeros_of(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = OPTIMIZERS[name](model.parameters())
    hold_zeros(model, optimizer, masks)
    train(model, optimizer)
    after = zeros_of(model)
    parameters = dict(model.named_parameters())
    for parameter, pruned in masks.pruned.items():
        assert torch.equal(before[parameter], after[parameter])
        kept = ~pruned
        assert bool((parameters[parameter][kept] != weights[parameter][kept]).any())
        for state in optimizer.state[parameters[parameter]].values():
            if isinstance(state, torch.Tensor) and state.shape == pruned.shape:
                assert not bool(state[pruned].any())


@pytest.mark.parametrize("before", [False, True])
def test_zeros_stay_with_gradients_that_were_set_directly(before: bool) -> None:
    model = pruned_model().requires_grad_(True)
    masks, parameters, zeros = find_masks(model), dict(model.named_parameters()), zeros_of(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    if not before:
        hold_zeros(model, optimizer, masks)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    if before:  # with the state of an earlier training
        for name, pruned in masks.pruned.items():
            parameters[name].data[pruned] = 0
        hold_zeros(model, optimizer, masks)
    train(model, optimizer)
    after = zeros_of(model)
    assert all(torch.equal(zeros[name], after[name]) for name in masks.pruned)


def test_state_stays_zero_where_parameters_were_swapped_and_lost_their_hooks() -> None:
    model = pruned_model().requires_grad_(True)
    masks = find_masks(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    hold_zeros(model, optimizer, masks)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        nn.Module.to(model, "cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    tokens = torch.arange(32).reshape(2, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    parameters = dict(model.named_parameters())
    for name, pruned in masks.pruned.items():
        gradient = parameters[name].grad
        assert gradient is not None
        assert bool(gradient[pruned].any())  # no hook was called
    optimizer.step()
    for name, pruned in masks.pruned.items():
        assert not bool(parameters[name][pruned].any())
        assert not bool(optimizer.state[parameters[name]]["exp_avg"][pruned].any())


def test_without_masks_zeros_are_lost() -> None:
    model = pruned_model().requires_grad_(True)
    masks = find_masks(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, steps=1)
    parameters = dict(model.named_parameters())
    assert all(bool(parameters[name][pruned].any()) for name, pruned in masks.pruned.items())


def test_masked_gradients_are_not_part_of_the_clipped_norm() -> None:
    model = pruned_model().requires_grad_(True)
    masks = find_masks(model)
    hold_zeros(model, OPTIMIZERS["sgd"](model.parameters()), masks)
    tokens = torch.arange(32).reshape(2, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        if name in masks.pruned:
            assert parameter.grad is not None
            assert not bool(parameter.grad[masks.pruned[name]].any())
            assert bool(parameter.grad[~masks.pruned[name]].any())
