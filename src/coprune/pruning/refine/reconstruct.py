"""Block reconstruction: train what a mask has left of a block against the dense block's outputs.

A few hundred steps of AdamW on the kept weights, norms and biases of one block (see `trained.py`), on the calibration
inputs behind the pruned blocks, toward what the dense model gives at the same place (EBFT, arXiv 2402.12419; Wanda++,
arXiv 2503.04992). Autograd reaches through one block only, so memory is that of one block. A block in half precision
is trained as the same block in float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from coprune.base.errors import NumericalError
from coprune.base.options import require_not_negative, require_positive
from coprune.pruning.refine.trained import Trained


@dataclass(frozen=True)
class Examples:
    """What a block is trained on, batch by batch."""

    inputs: Sequence[Tensor]
    """B × S × H per batch, in the model's dtype."""
    targets: Sequence[Tensor]
    """What the dense block gives, likewise."""
    shares: Sequence[float]
    """By how much every batch counts; one of 0 is not looked at."""
    counted: Sequence[Tensor] | None = None
    """Which tokens count, B × S bool per batch; None for all."""

    def error(self, batch: int, output: Tensor) -> Tensor:
        """The relative error of what the block gives for a batch, mean over the tokens that count."""
        errors = _relative_errors(output, self.targets[batch])
        return errors.mean() if self.counted is None else errors[self.counted[batch]].mean()


@dataclass(frozen=True)
class Reconstruction:
    """Masked AdamW on one block after it was pruned.

    Paper: EBFT, arXiv 2402.12419; Wanda++, arXiv 2503.04992.
    """

    steps: int = 100
    """Steps per block (per part, if parts are trained separately)."""
    learning_rate: float = 1e-3
    """Peak learning rate; it rises over the first tenth of the steps and falls along a cosine."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the block computes in; its weights are float32 while they are trained."""
    parts: Literal["together", "separate"] = "together"
    """Train the whole block, or its children that hold pruned weights (attention, MLP) one after the other."""
    held_out: float = 0.1
    """Share of the calibration batches that only watch for overfitting; 0 turns early stopping off."""
    seed: int = 0
    """Order of the batches."""

    def __post_init__(self) -> None:
        require_positive(steps=self.steps, learning_rate=self.learning_rate)
        require_not_negative(held_out=self.held_out)

    def improve(
        self,
        block: nn.Module,
        trained: Sequence[Trained],
        run: Callable[[int, Tensor], Tensor],
        examples: Examples,
    ) -> tuple[float, float]:
        """Train a pruned block in place; zeros stay zeros, and the best state that was seen is the one that stays.

        Args:
            block: the pruned block.
            trained: which of its parameters may change.
            run: (batch, float32 hidden states) → the block's output, differentiable.
            examples: what it is trained on.

        Returns:
            The relative error on the watched batches before and after.

        Raises:
            NumericalError: the loss is not finite before the first step.
        """
        inputs, shares = examples.inputs, examples.shares
        watched, batches = self._split(shares)

        def loss_of(batch: int) -> Tensor:
            with torch.autocast(inputs[batch].device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
                output = run(batch, inputs[batch].to(torch.float32))
            return shares[batch] * examples.error(batch, output)

        def watch() -> float:
            with torch.no_grad():
                return sum(float(loss_of(batch)) for batch in watched) / sum(shares[batch] for batch in watched)

        with _in_float32(block):
            before = best = watch()
            if not math.isfinite(before):
                raise NumericalError("the block's outputs are not finite, so it cannot be reconstructed")
            for part in self._parts(block, trained):
                best = self._train(block, part, loss_of, watch, batches, best)
        return before, best

    def batches_used(self, shares: Sequence[float]) -> set[int]:
        """Numbers of the batches that are looked at: short trainings do not see all of them. shares: as of `Examples`."""
        watched, trained = self._split(shares)
        return {*watched, *islice(_endless(trained, self.seed), self.steps)}

    def _split(self, shares: Sequence[float]) -> tuple[list[int], list[int]]:
        """Numbers of the batches to watch and to train on; too few batches serve for both."""
        everything = [batch for batch, share in enumerate(shares) if share > 0]
        batches = len(everything)
        held_out = round(batches * self.held_out) if self.held_out == 0 else max(1, round(batches * self.held_out))
        if held_out == 0 or batches - held_out < 2:
            return everything, everything
        return everything[-held_out:], everything[:-held_out]

    def _parts(self, block: nn.Module, trained: Sequence[Trained]) -> list[list[Trained]]:
        """What is trained at the same time."""
        if self.parts == "together":
            return [list(trained)]
        parts = [[one for one in trained if one.name.startswith(f"{name}.")] for name, _ in block.named_children()]
        return [part for part in parts if any(one.entries is not None for one in part)]

    def _train(
        self,
        block: nn.Module,
        part: Sequence[Trained],
        loss_of: Callable[[int], Tensor],
        watch: Callable[[], float],
        batches: Sequence[int],
        best: float,
    ) -> float:
        """Train one part and leave the block in the best state; returns its error on the watched batches."""
        parameters = [one.parameter for one in part]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        order = _endless(batches, self.seed)
        best_state, patience = copy.deepcopy(block.state_dict()), 3
        # Watching takes a tenth of the batches, which would cost short trainings more than their steps.
        every = max(10, self.steps // 10)
        with _trainable(parameters):
            for step in range(1, self.steps + 1):
                optimizer.zero_grad(set_to_none=True)
                loss_of(next(order)).backward()
                for one in part:
                    if one.parameter.grad is not None and one.entries is not None:
                        one.parameter.grad.mul_(one.entries)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                # A gradient of zero leaves Adam's moments and so the weight at zero: nothing to mask afterwards.
                if step % every == 0 or step == self.steps:
                    error = watch()
                    if error < best:
                        best, best_state, patience = error, copy.deepcopy(block.state_dict()), 3
                    elif (patience := patience - 1) == 0:
                        break
        block.load_state_dict(best_state)
        return best

    def _rate(self, step: int) -> float:
        warm = max(1, self.steps // 10)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def _relative_errors(output: Tensor, target: Tensor) -> Tensor:
    """Squared error, token by token relative to the size of the dense hidden state.

    The next block normalises each token by its size; without that weight the first token of many models, a thousand
    times larger than the others, would be all that counts.
    """
    dense = target.to(torch.float32)
    error = (output.to(torch.float32) - dense).square().sum(dim=-1)
    return error / dense.square().sum(dim=-1).clamp_min(1e-12)


def _endless(batches: Sequence[int], seed: int) -> Iterator[int]:
    """All batches in a random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for position in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[position]


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def _in_float32(block: nn.Module) -> Iterator[None]:
    """Hold the block's parameters and buffers in float32 for a while; small updates would vanish in half precision."""
    tensors = [tensor for tensor in [*block.parameters(), *block.buffers()] if tensor.is_floating_point()]
    dtypes = [tensor.dtype for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(torch.float32)
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
