"""After saving: reload the checkpoint from the disk and compare its masks and logits with what the run made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from coprune.base.errors import CopruneError
from coprune.evaluation.streamed import streamed_logits
from coprune.model.blocks import Block, find_blocks
from coprune.model.checkpoint.lazy import LazyCheckpoint
from coprune.model.checkpoint.locate import ModelFolder, check_folder
from coprune.model.checkpoint.weights import InMemory, Weights
from coprune.model.matrices import find_matrices
from coprune.model.walk.prove import Structure
from coprune.model.walk.record import input_device
from coprune.pruning.pruner import MatrixResult

_TOKENS = 64  # of text, whose logits are compared


class VerificationError(CopruneError):
    """The saved checkpoint does not hold what the run made."""


def verify_saved(
    folder: Path, weights: Weights, blocks: Sequence[Block], structure: Structure, results: Sequence[MatrixResult]
) -> None:
    """Reload a saved folder, block by block, and compare every mask and the logits of one sample.

    weights: the pruned model that was saved. Raises VerificationError naming the first difference.
    """
    saved = LazyCheckpoint(check_folder(ModelFolder(folder, str(folder))), device=input_device(weights.model))
    saved_blocks = find_blocks(saved.model)
    saved.acquire_rest([block.name for block in saved_blocks])
    expected = {result.name: result.mask_checksum for result in results}
    for block in saved_blocks:
        saved.acquire(block.name)
        for matrix in find_matrices(block.module, block.name):
            if matrix.name in expected and matrix.mask_checksum() != expected[matrix.name]:
                raise VerificationError(f"the mask of {matrix.name} in {folder} differs from the one that was made.")
        saved.release(block.name)
    if not isinstance(weights, InMemory):
        # The run's own last files became this folder, so there are no other weights to compute logits from.
        return
    before = _sample_logits(weights, blocks, structure)
    after = _sample_logits(saved, saved_blocks, structure)
    worst = float((before - after).abs().max())
    # Where a tensor begins in memory may decide how a product is summed up, so the last bits may differ.
    tolerance = 32 * torch.finfo(torch.float32).eps if weights.model.dtype == torch.float32 else 2e-2
    if not worst <= tolerance * float(before.abs().max()):
        raise VerificationError(
            f"the logits of the model in {folder} differ from the pruned model's by up to {worst:g}."
        )


def _sample_logits(weights: Weights, blocks: Sequence[Block], structure: Structure) -> Tensor:
    # Images are compared whole.
    sample = structure.sample if structure.sample.ndim > 2 else structure.sample[:, :_TOKENS]
    sample = sample.to(input_device(weights.model))
    return streamed_logits(weights, blocks, structure, [sample], lambda logits, _: logits.to(torch.float32))[0]
