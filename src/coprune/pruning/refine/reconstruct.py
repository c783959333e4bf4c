"""Block reconstruction: train the kept weights of a block toward the dense block's outputs.

A few hundred steps of AdamW on the block's kept weights, norms and biases (see `trainable_parameters.py`), with
calibration inputs from the pruned blocks before it, toward the dense model's hidden states (EBFT, arXiv 2402.12419;
Wanda++, arXiv 2503.04992). Memory is that of one block, trained in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from coprune.base.devices import kind_of
from coprune.base.errors import NumericalError
from coprune.base.method_options import require_not_negative, require_positive
from coprune.base.precision import held_in_float32, precision_on
from coprune.pruning.refine.trainable_parameters import Trained, sizes_of

FIRST_RATE = 5e-3
"""First learning rate to try, relative to the root mean square of the trained entries."""


class Improved(NamedTuple):
    """The effect of a training: errors on the watched batches, as in `Examples.error`."""

    before: float
    after: float
    """Same as `before` if no rate lowered it."""
    rate: float
    """Learning rate of the kept state; the lowest tried if none lowered the error."""


@dataclass(frozen=True)
class Reconstruction:
    """Masked AdamW on one block after it was pruned.

    Paper: EBFT, arXiv 2402.12419; Wanda++, arXiv 2503.04992.
    """

    steps: int = 100
    """Steps per block."""
    tokens: int = 0
    """Minimum number of training tokens; steps are added to reach it. 0: no minimum."""
    learning_rate: float | None = None
    """Peak learning rate, times the root mean square of each parameter's trainable entries; None: found by trials.

    It rises over the first tenth of the steps (at least two of six or more) and falls along a cosine.
    """
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype in which the block computes; the trained weights are float32."""
    held_out: float = 0.1
    """Share of calibration batches held out for early stopping; 0 turns it off."""
    seed: int = 0
    """Seed of the order of batches."""

    def __post_init__(self) -> None:
        require_positive(
            steps=self.steps, learning_rate=FIRST_RATE if self.learning_rate is None else self.learning_rate
        )
        require_not_negative(held_out=self.held_out, tokens=self.tokens)

    def on(self, positions: Sequence[int]) -> Reconstruction:
        """Return the settings with `tokens` converted to steps, for batches with these numbers of positions, one per step."""
        needed = -(-self.tokens * len(positions) // max(1, sum(positions)))
        return replace(self, steps=max(self.steps, needed), tokens=0)

    def improve(
        self,
        module: nn.Module,
        trained: Sequence[Trained],
        run: Callable[[int, Tensor], Tensor],
        examples: Examples,
        rates: Sequence[float] = (),
    ) -> Improved:
        """Train a pruned block in place and keep the best state; zeros stay zeros.

        Args:
            module: the block.
            trained: its trainable parameters.
            run: (batch, float32 hidden states) → the block's output, differentiable.
            examples: the training data.
            rates: learning rates to try, each from the same start; by default that of the settings.

        Returns:
            The effect of the training.

        Raises:
            NumericalError: the loss is not finite before the first step.
        """
        inputs, shares = examples.inputs, examples.shares
        watched, batches = self._split(shares)
        weights = examples.weights(sorted(self.batches_used(shares)))

        def loss_of(batch: int) -> Tensor:
            x = inputs[batch]
            half = precision_on(x.device, self.dtype) == torch.bfloat16
            with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
                output = run(batch, x.to(torch.float32))
            return shares[batch] * examples.error(batch, output, weights)

        def watch() -> float:
            with torch.no_grad():
                return sum(float(loss_of(batch)) for batch in watched) / sum(shares[batch] for batch in watched)

        with held_in_float32(module):
            before = watch()
            if not math.isfinite(before):
                raise NumericalError("the block's outputs are not finite, so it cannot be reconstructed")
            tried = [*rates] or [self.learning_rate or FIRST_RATE]
            best, best_rate = before, min(tried)
            parameters = [one.parameter for one in trained]
            start = best_state = _copies(parameters)
            for rate in tried if trained else ():
                error, state = self._train(trained, rate, loss_of, watch, batches, before)
                if error < best:
                    best, best_rate, best_state = error, rate, state
                _restore(parameters, start)
            _restore(parameters, best_state)
        return Improved(before, best, best_rate)

    def batches_used(self, shares: Sequence[float]) -> set[int]:
        """Return the numbers of the batches used, fewer in a short training. shares: as in `Examples`."""
        watched, trained = self._split(shares)
        return {*watched, *islice(endless(trained, self.seed), self.steps)}

    def passes(self, shares: Sequence[float]) -> float:
        """Return the number of times each batch is trained on. shares: as in `Examples`."""
        return self.steps / max(1, len(self._split(shares)[1]))

    def _split(self, shares: Sequence[float]) -> tuple[list[int], list[int]]:
        """Return the numbers of the held-out and the training batches; too few batches serve as both."""
        everything = [batch for batch, share in enumerate(shares) if share > 0]
        batches = len(everything)
        held_out = round(batches * self.held_out) if self.held_out == 0 else max(1, round(batches * self.held_out))
        if held_out == 0 or batches - held_out < 2:
            return everything, everything
        return everything[-held_out:], everything[:-held_out]

    def _train(
        self,
        trained: Sequence[Trained],
        rate: float,
        loss_of: Callable[[int], Tensor],
        watch: Callable[[], float],
        batches: Sequence[int],
        best: float,
    ) -> tuple[float, list[Tensor]]:
        """Train at a rate; return the least error on the watched batches, initially `best`, and its state."""
        parameters = [one.parameter for one in trained]
        optimizer = _optimizer(trained, rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        every, patience = self._watching
        order, best_state, left = endless(batches, self.seed), list[Tensor](), patience
        masked = [(one.parameter, one.entries) for one in trained if one.entries is not None]
        with _trainable(parameters):
            for step in range(1, self.steps + 1):
                optimizer.zero_grad(set_to_none=True)
                loss_of(next(order)).backward()
                for parameter, entries in masked:
                    if parameter.grad is not None:
                        parameter.grad.mul_(entries)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                # Zero gradients keep Adam's moments and the weight at zero, so nothing has to be masked afterwards.
                if step % every == 0 or step == self.steps:
                    error = watch()
                    if error < best:
                        best, best_state, left = error, _copies(parameters), patience
                    elif (left := left - 1) == 0:
                        break
        return best, best_state

    @property
    def _watching(self) -> tuple[int, int]:
        """Steps between checks of the held-out error, and the number of checks without improvement that end training."""
        # A check runs a tenth of the batches; after every few steps it would cost more than the training.
        if self.steps >= 20:
            return max(10, self.steps // 10), 3
        # Adam's first steps have full length whatever the gradient, so an early check says nothing.
        return (-(-self.steps // 3) if self.steps >= 6 else self.steps), 2

    def _rate(self, step: int) -> float:
        warm = max(2 if self.steps >= 6 else 1, self.steps // 10)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def _optimizer(trained: Sequence[Trained], rate: float) -> torch.optim.AdamW:
    parameters = [one.parameter for one in trained]
    sizes = sizes_of((one.parameter, one.entries) for one in trained)
    groups = [{"params": [one], "lr": rate * size} for one, size in zip(parameters, sizes, strict=True)]
    # One pass over each parameter instead of a dozen; only devices built into torch support it.
    fused = kind_of(parameters[0].device) != "other"
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)


@torch.no_grad()
def _copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.clone() for parameter in parameters]


@torch.no_grad()
def _restore(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


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


_TINY = 1e-12
"""Lower bound of divisors."""
_SMALLEST_PART = 1e-4
"""Lower bound of a feature's part relative to the mean, so that a nearly silent feature does not dominate."""


@dataclass(frozen=True)
class Examples:
    """The training data of a block, batch by batch."""

    inputs: Sequence[Tensor]
    """B × S × H per batch, in the model's dtype."""
    targets: Sequence[Tensor]
    """The dense block's outputs, in the same shapes."""
    shares: Sequence[float]
    """Weight of each batch; batches with 0 are skipped."""
    counted: Sequence[Tensor] | None = None
    """Mask of counted tokens, B × S bool per batch; None for all."""

    @torch.no_grad()
    def weights(self, batches: Iterable[int]) -> Tensor:
        """Return the weight of errors in each feature: one over its share of the dense hidden states.

        Features differ by orders of magnitude, and the layers that read them scale large ones down, so errors in the largest
        would dominate the loss and hardly matter to the model. The ideal weight, the squared gradient of the loss by a feature
        (BRECQ, arXiv 2102.05426), is nearly proportional to this one, which needs no backward pass through the whole model.

        Args:
            batches: numbers of the batches to use.

        Returns:
            H float32; all 1 if all features have the same size.
        """
        numbers = [*batches]
        total = torch.zeros((), device=self.targets[numbers[0]].device)
        for batch in numbers:
            squares = self.targets[batch].to(torch.float32).square()
            parts = squares / squares.sum(dim=-1, keepdim=True).clamp_min(_TINY)
            parts = parts.flatten(0, -2) if self.counted is None else parts[self.counted[batch]]
            total = total + self.shares[batch] * parts.mean(dim=0)
        shares = sum(self.shares[batch] for batch in numbers)
        return 1 / (total * (len(total) / shares)).clamp_min(_SMALLEST_PART)

    def error(self, batch: int, output: Tensor, weights: Tensor) -> Tensor:
        """Return a block's output error for a batch, averaged over counted tokens: e, or 1 + log e above 1.

        e is the relative error of a token. A few tokens may become many times larger than in the dense model and would
        dominate the mean and its gradient, though the next norm limits their effect. weights: H float32, of the features.
        """
        relative = _relative_errors(output, self.targets[batch], weights)
        errors = torch.where(relative < 1, relative, 1 + relative.clamp_min(1).log())
        return errors.mean() if self.counted is None else errors[self.counted[batch]].mean()


def endless(batches: Sequence[int], seed: int) -> Iterator[int]:
    """Yield all batches in random order, endlessly."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for position in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[position]


def _relative_errors(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted squared error of each token relative to its dense hidden state.

    The next block normalises each token by its size; without this, the first token of many models, a thousand times larger
    than the others, would dominate.
    """
    dense = target.to(torch.float32)
    error = ((output.to(torch.float32) - dense).square() * weights).sum(dim=-1)
    return error / (dense.square() * weights).sum(dim=-1).clamp_min(_TINY)
