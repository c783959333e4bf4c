"""Rotation of attention heads' values before pruning, which leaves the model's function unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from coprune.base.precision import full_float32
from coprune.base.processes import ALONE, Processes
from coprune.base.words import per_cent
from coprune.model.checkpoint.weights import require_in_memory
from coprune.model.folding import Fold, Layout, bias_of, close
from coprune.model.matrices import Matrix
from coprune.model.proven_folds import known_folds
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.recording import Dense, Recording
from coprune.model.walk.statistics import Gram, Statistic
from coprune.model.walk.walk import Walk
from coprune.recipe.pattern import Target


@dataclass
class Rotated:
    """The result of a rotation: the matrices involved, and the shares of score that the pattern removes before and after."""

    shares: list[Tensor] = field(default_factory=list)
    """Shares removed before and after, for each rotated fold."""
    names: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Return the result as one line."""
        if not self.names:
            return "No attention head's values could be rotated without changing the model, so it was left as it is."
        before, after = torch.stack(self.shares).sum(dim=0).tolist()
        less = 1 - after / before if before else 0.0  # a pattern with few zeros may remove nothing
        return (
            f"Rotated the values of attention heads, written or read by {len(self.names)} matrices: the pattern removes "
            f"{per_cent(less)} less of their score."
        )


@torch.no_grad()
def rotate_model(
    model: ProvenModel,
    recording: Recording,
    target: Target,
    processes: Processes = ALONE,
    advance: Callable[[float], None] = lambda blocks: None,
) -> Rotated:
    """Rotate the values of every attention head in place, so that the pattern removes less of the score.

    A block whose output on a calibration batch then differs by more than rounding is restored, for instance one with a norm
    with gains between the values and the matrix that reads the attention's output.

    Args:
        model: a model in memory.
        recording: calibration batches used here only, since their hidden states advance.
        target: target of every matrix.
        processes: all that measure the model together.
        advance: called with the share of a block just done.

    Returns:
        The rotated matrices and the shares that the pattern removes.

    Raises:
        BadInput: the model's blocks are on disk.
        NumericalError: the activations are not finite.
    """
    require_in_memory(model.weights, "rotate")
    reused = model.structure.reused
    folds = {
        name: [fold for fold in found if _may_rotate(fold, reused, target)]
        for name, found in known_folds(model).items()
    }
    matrices = {matrix.name for found in folds.values() for fold in found for matrix in _matrices(fold)}
    rotated, known = Rotated(), dict[str, Statistic]()
    moves = Dense(keep=Tensor.clone, batches=1)
    for event in Walk(model.only(matrices), recording, Gram, moves, processes=processes, advance=advance):
        if not isinstance(event, BlockDone):
            known |= event.statistics()
            continue
        holds = partial(_reproduces, recording, event)
        for fold in folds.get(event.block.name, []):
            names = [matrix.name for matrix in _matrices(fold)]
            if all(name in known for name in names):
                with full_float32():
                    shares = _rotate(fold, known, target, holds, processes)
                if shares is not None:
                    rotated.names += names
                    rotated.shares.append(shares)
        known = {}
    return rotated


def _may_rotate(fold: Fold, reused: Sequence[str], target: Target) -> bool:
    """Return whether a fold consists of attention heads that may be rotated.

    A gate multiplies single channels, and rotation would fill the zeros of an earlier pruning. The few zeros from rounding
    to few bits, a tenth at four bits, do not count.
    """
    matrices = _matrices(fold)
    if not fold.layout.is_heads() or fold.gate is not None or len(matrices) != 2:
        return False
    most = target.sparsity / 2
    return not any(m.name in reused or m.zeros() > most * m.shape[0] * m.shape[1] for m in matrices)


def _matrices(fold: Fold) -> list[Matrix]:
    return [*fold.consumers, *(producer for producers in fold.producers for producer in producers)]


def _reproduces(recording: Recording, done: BlockDone) -> bool:
    """Return whether a block reproduces its recorded outputs on the first batch, up to rounding."""
    return close(recording.run(done.block, 0, done.before[0]), done.after[0])


def _rotate(
    fold: Fold, known: dict[str, Statistic], target: Target, holds: Callable[[], bool], processes: Processes
) -> Tensor | None:
    """Learn a rotation for one fold and apply it; undo it if the block's output changes.

    All processes use the first one's results. holds: whether the output is unchanged.

    Returns:
        The shares that the pattern removes before and after; None if the rotation was undone.
    """
    consumer, producer = _matrices(fold)
    before, bias = [consumer.read(), producer.read()], bias_of(producer)
    kept = None if bias is None else bias.clone()
    values = _values_of(fold.layout, before, known[producer.name], known[consumer.name])
    rotation, shares = processes.from_first(lambda: [one.cpu() for one in learn_rotation(values, target.keep)])
    rotation, rows = rotation.to(before[1].device), fold.layout.channels().to(before[1].device)
    weight, turned = values.rotated(rotation)
    consumer.write(turned.flatten(1))
    producer.write(before[1].index_copy(0, rows.flatten(), weight.flatten(0, 1)))
    if bias is not None and kept is not None:
        bias[rows] = (rotation @ kept[rows].to(rotation.dtype)[..., None])[..., 0].to(bias.dtype)
    if processes.from_first(holds):
        return shares
    consumer.write(before[0])
    producer.write(before[1])
    if bias is not None and kept is not None:
        bias.copy_(kept)
    return None


def _values_of(layout: Layout, weights: Sequence[Tensor], values: Statistic, answers: Statistic) -> HeadValues:
    """Return weights and inputs by head. weights: of the consumer and of the values' producer."""
    assert isinstance(values, Gram)
    assert isinstance(answers, Gram)
    segments, repeats, size = layout.segments, layout.repeats, layout.size
    consumer, producer = weights
    gram = answers.gram.view(segments * repeats, size, segments * repeats, size)
    heads = torch.arange(segments * repeats, device=gram.device)
    return HeadValues(
        weight=producer[layout.channels().to(producer.device)],
        input_squares=values.gram.diagonal(),
        consumer=consumer.view(-1, segments, repeats, size),
        gram=gram[heads, :, heads].view(segments, repeats, size, size),
    )


_STEPS, _RATE = 30, 0.03


@dataclass(frozen=True)
class HeadValues:
    """The matrices that produce the values of key-value heads, and those that read the outputs of their query heads.

    S key-value heads of D channels each, for R query heads each; I inputs of the values, O outputs of the consumer.
    """

    weight: Tensor
    """S × D × I float32: rows that give the values."""
    input_squares: Tensor
    """I float32: mean square of every input of the values."""
    consumer: Tensor
    """O × S × R × D float32: the weight applied to the heads' outputs."""
    gram: Tensor
    """S × R × D × D float32: Gram matrix of each query head's outputs."""

    def rotated(self, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two weights with every key-value head rotated. rotation: S × D × D."""
        return rotation @ self.weight, torch.einsum("osrd,sed->osre", self.consumer, rotation)

    def scores(self, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Return Wanda's score, squared, of the two rotated weights as matrices: S·D × I, and O × S·R·D."""
        weight, consumer = self.rotated(rotation)
        turn = rotation[:, None]
        squares = ((turn @ self.gram) * turn).sum(dim=-1)
        return (weight.square() * self.input_squares).flatten(0, 1), (consumer.square() * squares).flatten(1)


def lost_share(values: HeadValues, rotation: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the shares of both weights' scores that a pattern removes, added up.

    Args:
        values: of all heads.
        rotation: S × D × D float32, orthogonal.
        keep: returns the mask of kept entries for a matrix of scores.

    Returns:
        A number between 0 and 2.
    """
    lost = [score.masked_fill(keep(score.detach()), 0.0).sum() / score.sum() for score in values.scores(rotation)]
    return torch.stack(lost).sum()


def learn_rotation(values: HeadValues, keep: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Learn a rotation of each key-value head's values with which a pattern removes less of the scores.

    Adam trains the Q of a QR decomposition for thirty steps (DenoiseRotator, arXiv 2505.23049). Other objectives, and
    matrices that are not orthogonal, did no better (LOG.md).

    Args:
        values: of all heads.
        keep: returns the mask of kept entries for a matrix of scores.

    Returns:
        S × D × D float32, orthogonal: the identity if nothing better was found. And the shares removed before and after,
        2 float32.
    """
    segments, size = values.weight.shape[:2]
    identity = torch.eye(size, device=values.weight.device).repeat(segments, 1, 1)
    before = lost_share(values, identity, keep)
    with torch.enable_grad():
        free = identity.clone().requires_grad_()
        optimizer = torch.optim.Adam([free], lr=_RATE)
        for _ in range(_STEPS):
            loss = lost_share(values, torch.linalg.qr(free)[0], keep)
            optimizer.zero_grad()
            # The shares are small compared with Adam's ε.
            (100 * loss).backward()
            optimizer.step()
    found = torch.linalg.qr(free.detach())[0]
    after = lost_share(values, found, keep)
    better = after < before
    return torch.where(better, found, identity), torch.stack([before, torch.where(better, after, before)])
