"""What running a block and the head costs, measured on one sample.

The time is processor time (see `clock`), the memory what lives at once within them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coprune.base.errors import UnsupportedModel
from coprune.evaluation.perplexity import window_nll
from coprune.model.blocks import Block
from coprune.model.matrices import Matrix
from coprune.model.walk.observe import Observe, Products, observe_products
from coprune.model.walk.prove import COMPARED_LOGITS
from coprune.model.walk.proven import FoundModel
from coprune.model.walk.record import chooses_positions, guess_call
from coprune.run.estimate.clock import seconds_of_call, seconds_of_reading
from coprune.run.estimate.live_bytes import LiveBytes

Shape = tuple[int, int]
"""(out, in) of a matrix."""
PROBE_TOKENS = 512
"""Of the sample that the walk is proved on, at most."""


@dataclass(frozen=True)
class BlockCosts:
    """What running the largest block costs."""

    read_seconds: float
    """To make its weights real."""
    weight_bytes: int
    seconds_per_token: float
    bytes_per_token: float
    """Most that lives at once within the block, besides its input."""
    waiting_bytes_per_token: float
    """Most that lives while a matrix waits to be pruned, likewise (`sequential`)."""
    hidden_bytes_per_token: float
    """Of the hidden states between two blocks."""
    training_bytes_per_token: float
    """Most that lives in a step of reconstruction, in float32, besides the weights and their gradients; 0 without one."""
    groups: tuple[tuple[Shape, ...], ...]
    """Shapes of its matrices; those of one group are fed by the same tensor."""


@torch.no_grad()
def measure_block(model: FoundModel, sample: Tensor, trained: bool = False) -> BlockCosts:
    """Read the largest block, run it on one sample, and let go of it.

    Args:
        model: its blocks are not read.
        sample: 1 × S int64 tokens, or pixels.
        trained: whether a step of reconstruction is to be measured too.

    Returns:
        What that cost.
    """
    weights, blocks, matrices = model.weights, model.blocks, model.chosen.blocks
    sizes = [sum(p.numel() * p.element_size() for p in block.module.parameters()) for block in blocks]
    block = blocks[max(range(len(blocks)), key=sizes.__getitem__)]
    read = seconds_of_reading(lambda: weights.acquire(block.name))
    try:
        hidden, call = guess_call(weights.model, blocks[: block.index + 1], sample)

        def run() -> Tensor:
            return call.run(block.module, hidden)

        products = _products(block, matrices[block.index], run)
        live, stops = LiveBytes(), [0]
        with live, Observe(matrices[block.index], lambda matrix, x: stops.append(live.now)):
            run()
        seconds = seconds_of_call(run, hidden.device)
        # The backward pass lets go of that step by step, and holds about what a forward pass holds at once.
        training = _kept_for_backward(run, block.module) + live.most if trained else 0.0
    finally:
        weights.release(block.name)
    tokens = hidden.shape[0] * hidden.shape[1]
    return BlockCosts(
        read_seconds=read,
        weight_bytes=max(sizes),
        seconds_per_token=seconds / tokens,
        bytes_per_token=live.most / tokens,
        waiting_bytes_per_token=max(stops) / tokens,
        hidden_bytes_per_token=hidden.nbytes / tokens,
        training_bytes_per_token=training / tokens,
        groups=tuple(
            tuple(matrix.shape for matrix in group)
            for group in [*products.groups, *([matrix] for matrix in products.unseen)]
        ),
    )


def _products(block: Block, matrices: Sequence[Matrix], run: Callable[[], Tensor]) -> Products:
    """What is multiplied while a block runs. Raises UnsupportedModel if it does not run as it is called here."""
    try:
        return observe_products(matrices, run)[1]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UnsupportedModel(
            f"{block.name} cannot be run alone: how it is called shows only when all blocks before it run"
        ) from error


def _kept_for_backward(run: Callable[[], Tensor], block: nn.Module) -> float:
    """What a forward pass in float32 leaves alive for the backward pass."""
    size = next(parameter.element_size() for parameter in block.parameters() if parameter.is_floating_point())
    try:
        block.requires_grad_(True)
        with torch.enable_grad(), LiveBytes() as live:
            output = run()
            kept = live.now if output.requires_grad else 0
    finally:
        block.requires_grad_(False)
    # In half precision everything takes half of what it will take in float32.
    return kept * 4 / size


@dataclass(frozen=True)
class HeadCosts:
    """What the logits of a model cost; zeros for one without a language head."""

    vocabulary: int
    bytes_per_value: int
    """Of a logit."""
    seconds_per_token: float
    """Of the logits and their likelihood."""
    compared_positions: int
    """So many positions' logits are compared when the walk is proved."""


@torch.no_grad()
def measure_head(model: nn.Module, device: torch.device, tokens: int = 64) -> HeadCosts:
    """Time the head on a few tokens."""
    compared = COMPARED_LOGITS if chooses_positions(model) else PROBE_TOKENS
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return HeadCosts(0, 4, 0.0, compared)
    weight = head.weight
    x = torch.ones(1, tokens, weight.shape[1], dtype=weight.dtype, device=device)
    targets = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    seconds = seconds_of_call(lambda: window_nll(head(x), targets), device)
    return HeadCosts(weight.shape[0], weight.element_size(), seconds / tokens, compared)
