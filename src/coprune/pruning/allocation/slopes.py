"""What the matrices of a model lose by the slopes of its own distributions, from some forwards and backwards of all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coprune.base.errors import NumericalError, UnsupportedModel
from coprune.base.processes import ALONE, Processes
from coprune.model.blocks import Block
from coprune.model.choosing import Chosen
from coprune.model.matrices import Matrix
from coprune.model.walk.proven import FoundModel
from coprune.model.walk.record import forward_logits, replaced_forwards
from coprune.pruning.allocation.base import unit_name
from coprune.pruning.allocation.fisher import ByFisher, drawn_slopes, goes_at, shares_of_outputs, squared_changes
from coprune.recipe.pattern import Target


@dataclass(frozen=True)
class Watched:
    """A matrix whose gradient is looked at as soon as it is there, and let go of."""

    matrix: Matrix
    step: int
    """Of so many rows one counts."""
    goes: Tensor
    """At which target each of its weights goes, as bytes."""
    lost: Tensor
    """By target, float64, added to."""
    by_row: Tensor | None
    """Of each row's gradient, the sum of squares, float64, added to; None where nobody asks for it."""

    @classmethod
    def of(cls, matrix: Matrix, step: int, squares: Tensor, grid: Sequence[Target], outputs: bool) -> Watched:
        rows = matrix.view()[::step].float()
        goes = goes_at(rows, squares.to(rows.device), grid).to(torch.uint8)
        lost = torch.zeros(len(grid), dtype=torch.float64, device=rows.device)
        return cls(matrix, step, goes, lost, lost.new_zeros(matrix.shape[0]) if outputs else None)

    def look(self) -> None:
        """Add up what one sample's gradient says."""
        everything = self.matrix.slopes()
        if self.by_row is not None:
            self.by_row.add_(everything.float().square().sum(dim=1))
        rows, slopes = self.matrix.view()[:: self.step].float(), everything[:: self.step].float()
        changes = squared_changes(rows, slopes, self.goes.long(), len(self.lost))
        self.lost.add_(changes, alpha=self.matrix.shape[0] / (2 * len(rows)))


Sample = tuple[Tensor, Tensor | None]
"""A batch of one, and which of its tokens count (1 × S bool; None for all)."""


def watch(allocation: ByFisher, chosen: Chosen, squares: Mapping[str, Tensor], target: Target) -> list[Watched]:
    """What is to be looked at.

    Args:
        allocation: says at which targets, and on which rows.
        chosen: the matrices.
        squares: sums of squares of the inputs, by name of unit; matrices without any are left out.
        target: the overall one.
    """
    grid, outputs, matrices = allocation.grid(target), allocation.tells_outputs(target), list(chosen.all())
    units = [unit_name(matrix.name) for matrix in matrices]
    experts = Counter(units)
    return [
        Watched.of(matrix, allocation.step(matrix.shape[0], experts[unit]), squares[unit], grid, outputs)
        for matrix, unit in zip(matrices, units, strict=True)
        if unit in squares
    ]


def lost_by_slopes(
    model: FoundModel,
    watched: Sequence[Watched],
    samples: Sequence[Sample],
    processes: Processes = ALONE,
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, Tensor]:
    """What every unit loses at the targets that it is watched at, in nats, of all samples together.

    The blocks are run again backwards, so that only one of them holds what its gradients take.

    Args:
        model: dense, in memory.
        watched: its matrices.
        samples: this process's.
        processes: those that look at the model together.
        advance: called with the share of the work that was just done.

    Returns:
        Float64, by name of unit.

    Raises:
        UnsupportedModel: the model has no gradients.
        NumericalError: they are not finite.
    """
    # A sample's draws are its own, in whichever process it is.
    before = sum(processes.gather(len(samples))[: processes.rank])
    with _looking(watched), replaced_forwards(model.blocks, _run_again):
        for seed, sample in enumerate(samples, before):
            _run_backwards(model, sample, seed)
            advance(1 / len(samples))
    return _added_up(watched, processes)


def outputs_by_slopes(watched: Sequence[Watched], power: float) -> dict[str, Tensor]:
    """By how much errors in each output count, by name of matrix, after `lost_by_slopes`; nothing where it was not asked for.

    power: as in `shares_of_outputs`.
    """
    return {one.matrix.name: shares_of_outputs(one.by_row, power).cpu() for one in watched if one.by_row is not None}


def _run_backwards(model: FoundModel, sample: Sample, seed: int) -> None:
    """Give every parameter that is looked at its gradient; logits are let go of before the next sample makes others."""
    tokens, counted = sample
    logits = forward_logits(model.module, tokens).flatten(0, -2)
    if not logits.requires_grad:
        raise UnsupportedModel("the model's logits have no gradients, which allocation fisher needs")
    slopes = drawn_slopes(logits, seed)
    if counted is not None:
        slopes *= counted.to(slopes.device).flatten()[:, None]
    logits.backward(slopes)


@contextmanager
def _looking(watched: Sequence[Watched]) -> Iterator[None]:
    """For a while, look at every gradient when it is there; none is kept."""
    parameters: dict[nn.Parameter, list[Watched]] = {}
    for one in watched:
        parameters.setdefault(getattr(one.matrix.owner, one.matrix.attribute), []).append(one)

    @torch.no_grad()
    def look(parameter: nn.Parameter) -> None:
        for one in parameters[parameter]:
            one.look()
        parameter.grad = None

    with ExitStack() as stack, torch.enable_grad():
        for parameter in parameters:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            handle = parameter.requires_grad_(True).register_post_accumulate_grad_hook(look)
            stack.callback(handle.remove)
        yield


def _run_again(block: Block) -> Callable[..., Any]:
    """A block's forward that keeps its inputs alone, and runs again when its gradients are wanted."""
    return partial(checkpoint, block.module.forward, use_reentrant=False, preserve_rng_state=False)


def _added_up(watched: Sequence[Watched], processes: Processes) -> dict[str, Tensor]:
    """What was lost by name of unit, of all processes together."""
    processes.add_up([sums for one in watched for sums in (one.lost, one.by_row) if sums is not None], 0)
    found: dict[str, Tensor] = {}
    for one in watched:
        name, lost = unit_name(one.matrix.name), one.lost.cpu()
        found[name] = found[name] + lost if name in found else lost
    for name, lost in found.items():
        if not lost.isfinite().all():
            raise NumericalError(f"the gradients of {name} are not finite")
    return found
