"""Wanda and SparseGPT as published, written directly from the formulas, as the baseline for times.

One sample at a time, every block run twice (once to look at its inputs, once with its pruned weights), a statistic per
matrix even where matrices share their input, a Python loop over columns or groups of columns. Imports nothing of coprune.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

COLUMNS = 128  # SparseGPT's block of columns
DAMPING = 0.01


class Stop(Exception):
    """Ends a forward before its first block."""


@torch.no_grad()
def prune_published(model: nn.Module, tokens: Tensor, method: str, group: tuple[int, int] | None) -> None:
    """Prune a decoder model in place to half of its weights. tokens: samples × S; group: (N, M), N kept of M, or None."""
    decoder: Any = model.model
    layers = decoder.layers
    inputs, arguments = first_inputs(model, layers[0], tokens)
    for layer in layers:
        matrices = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        statistics = [Hessian(m) if method == "sparsegpt" else SquaredNorm(m) for m in matrices]
        hooks = [m.register_forward_pre_hook(s.hear) for m, s in zip(matrices, statistics, strict=True)]
        for x in inputs:
            layer(x, **arguments)
        for hook in hooks:
            hook.remove()
        for matrix, statistic in zip(matrices, statistics, strict=True):
            statistic.prune(matrix, group)
        inputs = [hidden(layer(x, **arguments)) for x in inputs]


def hidden(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def first_inputs(model: nn.Module, first: nn.Module, tokens: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """Every sample's input of the first block, and the block's other arguments."""
    inputs: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0])
        arguments.update(kwargs)
        raise Stop

    hook = first.register_forward_pre_hook(catch, with_kwargs=True)
    for sample in tokens:
        with suppress(Stop):
            model(sample[None], use_cache=False)
    hook.remove()
    return inputs, arguments


class SquaredNorm:
    """Wanda: the running mean of every input's squared norm, and |W| times its root as the score."""

    def __init__(self, matrix: nn.Linear) -> None:
        self.samples = 0
        self.mean = torch.zeros(matrix.in_features)

    def hear(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float().T
        self.mean *= self.samples / (self.samples + 1)
        self.samples += 1
        self.mean += torch.norm(x, dim=1).square() / self.samples

    def prune(self, matrix: nn.Linear, group: tuple[int, int] | None) -> None:
        score = matrix.weight.abs() * self.mean.sqrt()
        falls = torch.zeros_like(score, dtype=torch.bool)
        if group is None:
            order = score.sort(dim=1, stable=True).indices
            falls.scatter_(1, order[:, : score.shape[1] // 2], True)
        else:
            kept, size = group
            for start in range(0, score.shape[1], size):
                least = score[:, start : start + size].topk(size - kept, dim=1, largest=False).indices
                falls.scatter_(1, start + least, True)
        matrix.weight[falls] = 0


class Hessian:
    """SparseGPT: the running mean of XᵀX, and the column by column update through the Cholesky factor of its inverse."""

    def __init__(self, matrix: nn.Linear) -> None:
        self.samples = 0
        self.mean = torch.zeros(matrix.in_features, matrix.in_features)

    def hear(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).T.float()
        self.mean *= self.samples / (self.samples + 1)
        self.samples += 1
        scaled = x * (2 / self.samples) ** 0.5
        self.mean += scaled @ scaled.T

    def prune(self, matrix: nn.Linear, group: tuple[int, int] | None) -> None:
        weight = matrix.weight.float().clone()
        dead = self.mean.diagonal() == 0
        self.mean[dead, dead] = 1
        weight[:, dead] = 0
        self.mean.diagonal().add_(DAMPING * self.mean.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.mean))
        upper = torch.linalg.cholesky(inverse, upper=True)
        for start in range(0, weight.shape[1], COLUMNS):
            stop = min(start + COLUMNS, weight.shape[1])
            errors = prune_columns(weight[:, start:stop], upper[start:stop, start:stop], group)
            weight[:, stop:] -= errors @ upper[start:stop, stop:]
        matrix.weight.copy_(weight)


def prune_columns(weight: Tensor, upper: Tensor, group: tuple[int, int] | None) -> Tensor:
    """Prune some columns in place, one after another; returns their errors for the columns after them."""
    pivots = upper.diagonal()
    score: Callable[[slice], Tensor] = lambda part: weight[:, part].square() / pivots[part].square()  # noqa: E731
    falls = torch.zeros_like(weight, dtype=torch.bool)
    errors = torch.zeros_like(weight)
    if group is None:
        everything = score(slice(None))
        falls = everything <= everything.flatten().sort().values[everything.numel() // 2 - 1]
    for i in range(weight.shape[1]):
        if group is not None and i % group[1] == 0:
            least = score(slice(i, i + group[1])).topk(group[1] - group[0], dim=1, largest=False).indices
            falls.scatter_(1, i + least, True)
        column = weight[:, i]
        left = column.masked_fill(falls[:, i], 0)
        error = (column - left) / pivots[i]
        weight[:, i:] -= error[:, None] * upper[i, i:]
        weight[:, i] = left
        errors[:, i] = error
    return errors
