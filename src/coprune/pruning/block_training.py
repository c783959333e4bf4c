"""Blocks trained toward the dense model's outputs when they are pruned, or when parts of them were removed."""

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
    """Relative error before."""
    end: float
    """Relative error of what was kept; that before where no step was better."""
    rate: float
    """Learning rate of what was kept, relative as in `Reconstruction`; the lowest that was tried where nothing was."""
    trained: str
    """Names of what was trained."""

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
    """Train a block toward the dense model's outputs; one in which nothing was pruned is left alone.

    Args:
        reconstruction: how.
        done: the pruned block.
        recording: the batches that go through it.
        results: what became of its matrices.
        fixed: parameters of the model that are not trained, since other blocks have them too.
        earlier: trainings of the blocks before, whose learning rate serves here too.

    Returns:
        The results with their masks as they are now, and what the training did.

    Raises:
        NumericalError: with the block's name, if a weight that was zero is not zero any more, or nothing is finite.
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
    """Train what is left of a block, after parts of it were removed, toward the dense model's outputs.

    Args:
        reconstruction: how.
        done: the block, in which what was removed is silent, and stays so. One that lost nothing may make up for others.
        recording: the batches that go through it.
        chosen: its matrices, all of which are trained.
        cut: what is kept of its parameters (bool, by name), and what became of matrices.
        earlier: as of `reconstruct_block`.

    Returns:
        As `reconstruct_block`. Raises NumericalError as that does.
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
    """Restrict the training of a parameter to its kept entries; a vector's entries are all trained."""
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
"""Blocks on which learning rates are tried; neighbouring blocks of a model have much the same."""


def rates_to_try(asked: Reconstruction, earlier: Sequence[BlockTraining]) -> tuple[float, ...]:
    """Return the learning rates to try on a block: the last block's, and its half and double while that is not settled.

    It is settled after a few blocks, and open again after a block that it gained nothing in. earlier: trainings of the blocks
    before.
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
