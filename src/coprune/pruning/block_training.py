"""Training of blocks toward the dense model's outputs after pruning or removing parts."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.model.matrices import Matrix, find_matrices, mask_checksum
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.recording import Recording
from coprune.pruning.pruner import MatrixResult
from coprune.pruning.refine.reconstruct import FIRST_RATE, Examples, Reconstruction
from coprune.pruning.refine.trainable_parameters import Trained, names_of, trained_in


class BlockTraining(BaseModel):
    """Effect of training a block toward the dense model's outputs, on held-out batches."""

    model_config = ConfigDict(frozen=True)

    block: str
    start: float
    """Relative error before training."""
    end: float
    """Relative error of the kept state; `start` if no step was better."""
    rate: float
    """Learning rate of the kept state, relative as in `Reconstruction`; the lowest tried if none helped."""
    trained: str
    """Names of the trained parameters."""

    @property
    def is_idle(self) -> bool:
        """Whether the training gained nothing."""
        return self.end >= self.start


def reconstruct_block(
    reconstruction: Reconstruction,
    done: BlockDone,
    recording: Recording,
    results: list[MatrixResult],
    fixed: Container[str] = (),
    earlier: Sequence[BlockTraining] = (),
) -> tuple[list[MatrixResult], BlockTraining | None]:
    """Train a block toward the dense model's outputs; leave it alone if nothing in it was pruned.

    Args:
        reconstruction: how to train.
        done: the pruned block.
        recording: the batches that run through it.
        results: results of its matrices.
        fixed: parameters that are not trained, since other blocks share them.
        earlier: trainings of earlier blocks, from whose learning rate to start.

    Returns:
        The results with updated masks, and the effect of the training.

    Raises:
        NumericalError: a pruned weight changed or values are not finite; the message names the block.
    """
    if not results:
        return results, None
    matrices = {matrix.name: matrix for matrix in find_matrices(done.block.module, done.block.name)}
    before = {name: matrix.stored() == 0 for name, matrix in matrices.items()}
    trained = trained_in(done.block, [matrices[result.name] for result in results], fixed)
    training = _train(reconstruction, done, recording, trained, earlier)
    for name, zeros in before.items():
        if bool((matrices[name].stored()[zeros] != 0).any()):
            raise NumericalError(f"{name}: reconstruction changed a weight that was pruned")
    return _with_masks(results, {result.name: matrices[result.name].mask_checksum() for result in results}), training


def reconstruct_cut(
    reconstruction: Reconstruction,
    done: BlockDone,
    recording: Recording,
    chosen: Sequence[Matrix],
    cut: tuple[Mapping[str, Tensor], list[MatrixResult]],
    earlier: Sequence[BlockTraining] = (),
) -> tuple[list[MatrixResult], BlockTraining]:
    """Train the rest of a block toward the dense model's outputs after parts of it were removed.

    Args:
        reconstruction: how to train.
        done: the block, whose removed parts are silent and stay so; one that lost nothing may compensate for others.
        recording: the batches that run through it.
        chosen: its matrices, all of which are trained.
        cut: masks of its kept parameters (bool, by name), and results of its matrices.
        earlier: as in `reconstruct_block`.

    Returns:
        As for `reconstruct_block`, and raises NumericalError likewise.
    """
    masks, results = cut
    kept = {name.removeprefix(f"{done.block.name}."): mask for name, mask in masks.items()}
    trained = [_only(one, kept.get(one.name)) for one in trained_in(done.block, chosen)]
    training = _train(reconstruction, done, recording, trained, earlier)
    for name, mask in kept.items():
        if bool((done.block.module.get_parameter(name)[~mask] != 0).any()):
            raise NumericalError(f"{done.block.name}.{name}: reconstruction changed what was removed")
    matrices = {matrix.name: matrix for matrix in chosen}
    checksums = {result.name: _checksum_of_rest(matrices[result.name], masks) for result in results}
    return _with_masks(results, checksums), training


def _only(trained: Trained, kept: Tensor | None) -> Trained:
    """Restrict the training of a parameter to its kept entries; all entries of a vector are trained."""
    if kept is None:
        return trained
    return replace(trained, entries=kept if trained.entries is None else trained.entries & kept)


def _checksum_of_rest(matrix: Matrix, masks: Mapping[str, Tensor]) -> str:
    """Return `mask_checksum` of a consumer without its removed columns."""
    mask, stored = masks[matrix.parameter], matrix.stored()
    kept = matrix.part_of(mask)
    left = stored[:, kept.any(dim=0)] if matrix.input_dim == 1 else stored[kept.any(dim=1)]
    return mask_checksum(left)


_SEARCHED = 3
"""Number of blocks on which learning rates are tried; neighbouring blocks need much the same."""


def rates_to_try(asked: Reconstruction, earlier: Sequence[BlockTraining]) -> tuple[float, ...]:
    """Return the learning rates to try on a block: the last block's, and half and double that until it is settled.

    The rate settles after a few blocks and is reopened by a block that gained nothing. earlier: trainings of the earlier
    blocks.
    """
    if asked.learning_rate is not None:
        return (asked.learning_rate,)
    rate = earlier[-1].rate if earlier else FIRST_RATE
    settled = len(earlier) >= _SEARCHED and not earlier[-1].is_idle
    return (rate,) if settled else (rate, rate / 2, 2 * rate)


def _train(
    reconstruction: Reconstruction,
    done: BlockDone,
    recording: Recording,
    trained: Sequence[Trained],
    earlier: Sequence[BlockTraining],
) -> BlockTraining:
    """Train parameters of a block in place."""
    block = done.block

    def run(batch: int, hidden: Tensor) -> Tensor:
        return recording.run_in_float32(block, batch, hidden)

    try:
        examples = Examples(done.before, done.after, recording.shares, recording.counted)
        rates = rates_to_try(reconstruction, earlier)
        found = reconstruction.on(recording.positions).improve(block.module, trained, run, examples, rates)
    except NumericalError as error:
        raise error.within(block.name) from error
    return BlockTraining(
        block=block.name, start=found.before, end=found.after, rate=found.rate, trained=names_of(trained)
    )


def _with_masks(results: Sequence[MatrixResult], checksums: Mapping[str, str]) -> list[MatrixResult]:
    return [result.model_copy(update={"mask_checksum": checksums[result.name]}) for result in results]
