"""Sensitivity of a model to each weight of a GGUF file: the diagonal of the Fisher information, as rows × columns.

The mean squared gradient of the loss on tokens sampled from the model is the curvature of its KL divergence. So for small
errors, half of it times the squared errors of the weights, summed over all tensors, is the KL of the rounded model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coprune.base.errors import UnsupportedModel
from coprune.base.memory import return_free_memory
from coprune.base.precision import quickest_on_cpu
from coprune.base.progress import Reporter
from coprune.gguf_files.file_plan import read_example
from coprune.gguf_files.importance import HEAD, by_name, found_in
from coprune.gguf_files.llama_cpp import TOKEN_EMBEDDINGS
from coprune.gguf_files.smaller import exported
from coprune.model.blocks import Block, find_blocks
from coprune.model.checkpoint.locate import GgufFile
from coprune.model.checkpoint.mapped_gguf import LazyGguf
from coprune.model.checkpoint.weights import Weights
from coprune.model.matrix_choice import choose_matrices
from coprune.model.walk.block_calls import (
    Answer,
    Finished,
    forward_logits,
    hidden_of,
    replaced_forwards,
    run_after_blocks,
    split_call,
)

_SEED = 0
"""Seed for sampling tokens from the model."""


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of the model to a tensor, as an outer product."""

    rows: Tensor
    columns: Tensor
    """The outer product is the mean squared gradient of a token's loss for each weight."""


class _Squares:
    """Sums over tokens of a matrix's squared gradients, by row and by column."""

    def __init__(self) -> None:
        self.rows: Tensor | float = 0.0
        self.columns: Tensor | float = 0.0
        self.tokens = 0

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add tokens: their inputs, and the gradients of their outputs."""
        inputs = inputs.reshape(-1, inputs.shape[-1]).float().square()
        gradients = gradients.reshape(-1, gradients.shape[-1]).float().square()
        self.rows = self.rows + inputs.sum(1) @ gradients
        self.columns = self.columns + gradients.sum(1) @ inputs
        self.tokens += len(inputs)

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the outer product's factors, averaged over the tokens."""
        assert isinstance(self.rows, Tensor)
        assert isinstance(self.columns, Tensor)
        return self.rows / self.tokens, self.columns / self.rows.sum().clamp_min(torch.finfo().tiny)


def sensitivity_of(file: Path, tokens: Tensor, reporter: Reporter) -> Mapping[str, list[Sensitivity]]:
    """Measure a model's sensitivity to each matrix of its file, with one forward and one backward pass.

    Args:
        file: a 16-bit file.
        tokens: samples of token ids (N × S).
        reporter: shows the progress.

    Returns:
        The sensitivities by the tensor's name in the file. A tensor that is used twice (as embeddings and as head) has two,
        which add up.

    Raises:
        UnsupportedModel: its matrices are not plain linear layers, or cannot be found in the file.
        BadInput: transformers cannot read it.
    """
    location = GgufFile(file, file.name)
    passed = _pass(location, tokens, reporter)
    return_free_memory()
    source = exported(location)
    example = read_example(location, source, reporter)
    found = defaultdict[str, list[Sensitivity]](list)
    for name in example.pieces:
        own = [found_in(values, name, example, source) for values in (passed.rows, passed.columns)]
        if own[0] is not None and own[1] is not None and bool(own[0].isfinite().all()):
            found[name].append(Sensitivity(own[0][:, 0].clone(), own[1][0].clone()))
    in_blocks = [name for name, shape in example.shapes.items() if name.startswith("blk.") and len(shape) > 1]
    if unknown := [name for name in in_blocks if name not in found]:
        raise UnsupportedModel(f"the model's sensitivity to {unknown[0]} is unknown")
    count = example.shapes[TOKEN_EMBEDDINGS][0]
    found[HEAD if HEAD in example.shapes else TOKEN_EMBEDDINGS].append(passed.head)
    # Assume that all rows are read equally often, since nothing is known about those that the sample did not read.
    found[TOKEN_EMBEDDINGS].append(Sensitivity(torch.full((count,), 1 / count), passed.embedded))
    return found


@dataclass(frozen=True)
class _Passed:
    """The result of a pass; the model itself is freed before its file is read again."""

    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    """Factors for the blocks' matrices, by the checkpoint's names and in the shapes of the weights; NaN for others."""
    head: Sensitivity
    embedded: Tensor
    """The factor for the columns of the embedding table."""


def _pass(location: GgufFile, tokens: Tensor, reporter: Reporter) -> _Passed:
    """Run tokens forward and backward. Raises as `sensitivity_of` does."""
    weights, blocks = _opened(location)
    model = weights.model
    chosen = choose_matrices(model, blocks)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    for matrix in chosen.all():
        if not isinstance(matrix.owner, nn.Linear):
            raise UnsupportedModel(f"{matrix.name} is not a linear layer, so types cannot be chosen by tensor")
    if not isinstance(head, nn.Linear):
        raise UnsupportedModel("the model has no separate head, so types cannot be chosen by tensor")
    squares, embedded = defaultdict[int, _Squares](_Squares), _Squares()
    watched = {id(owner): owner for owner in (*(one.owner for one in chosen.all()), head)}
    generator = torch.Generator().manual_seed(_SEED)
    with ExitStack() as hooks, reporter.bar("Sensitivity of the weights", len(tokens)) as advance:
        for number, owner in watched.items():
            hooks.callback(owner.register_forward_hook(_watching(squares[number])).remove)
        hooks.callback(table.register_forward_hook(_watching_table(embedded)).remove)
        _read(weights, blocks, tokens, generator, advance)
    means = {number: one.means() for number, one in squares.items()}
    rows = by_name(location, model, chosen, lambda matrix: means[id(matrix.owner)][0][:, None])
    columns = by_name(location, model, chosen, lambda matrix: means[id(matrix.owner)][1][None])
    return _Passed(rows, columns, Sensitivity(*means[id(head)]), embedded.means()[0])


def _opened(location: GgufFile) -> tuple[LazyGguf, list[Block]]:
    """Open a 16-bit file, leaving its blocks on disk."""
    lazy = LazyGguf(location, quickest_on_cpu())
    blocks = find_blocks(lazy.model)
    lazy.acquire_rest([block.name for block in blocks])
    return lazy, blocks


def _read(
    weights: Weights,
    blocks: Sequence[Block],
    batch: Tensor,
    generator: torch.Generator,
    advance: Callable[[float], None],
) -> None:
    """Run a batch forward and backward.

    A block is in memory only while it runs: only its inputs are saved, and it is recomputed for the gradients. The whole
    batch reads each block twice, which takes no longer than one sample at a time with everything in memory.

    Args:
        weights: the model's.
        blocks: its blocks.
        batch: token ids (N × S).
        generator: samples the tokens whose losses are differentiated.
        advance: called with the number of samples just read.
    """
    model, answers, ends = weights.model, list[Answer](), list[Tensor]()
    share = len(batch) / len(blocks) / 2

    def forward(block: Block) -> Callable[..., Any]:
        own = block.module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            weights.acquire(block.name)
            try:
                return own(*args, **kwargs)
            finally:
                weights.release(block.name)
                advance(share)

        again = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = again(*args, **kwargs)
            answers.append(Answer.of(output, split_call(args, kwargs)[0]))
            if block is blocks[-1]:
                ends.append(hidden_of(output))
                raise Finished
            return output

        return recorded

    with replaced_forwards(blocks, forward), suppress(Finished):
        forward_logits(model, batch)
    gradients = torch.empty_like(ends[0])
    for own, tokens, into in zip(ends[0].detach().split(1), batch.split(1), gradients.split(1), strict=True):
        # One sample at a time, since logits over a large vocabulary take most of the memory.
        hidden = own.requires_grad_(True)
        logits = run_after_blocks(model, blocks, tokens, answers, hidden)[0].float()
        drawn = logits.detach().softmax(-1).multinomial(1, generator=generator)[:, 0]
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        assert hidden.grad is not None
        into.copy_(hidden.grad)
    ends[0].backward(gradients)


class _Seen(torch.autograd.Function):
    """Returns a matrix's outputs unchanged, and adds its inputs and output gradients to sums.

    The inputs are saved for the backward pass like autograd's own, so a recomputed block does not keep them.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, inputs: Tensor, squares: _Squares) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.squares = squares
        return out.clone()  # not a view, which could not be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.squares.add(ctx.saved_tensors[0], gradients[0])
        return gradients[0], None, None


def _watching(squares: _Squares) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def seen(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        if not out.requires_grad:
            return out
        found: Tensor = _Seen.apply(out, given[0].detach(), squares)  # type: ignore[no-untyped-call, unused-ignore]
        return found

    return seen


def _watching_table(squares: _Squares) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Return a hook that records the embeddings and enables their gradients."""

    def seen(module: Any, given: Any, out: Tensor) -> Tensor:
        # Some models scale their embeddings.
        scale = out.float().square().mean() / module.weight[given[0]].float().square().mean()
        out = out.detach().requires_grad_(True)

        out.register_hook(lambda gradients: squares.add(scale.sqrt().expand(gradients[..., :1].shape), gradients))
        return out

    return seen
