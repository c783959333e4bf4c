"""Rotations of attention heads' values: turn them so that a pattern takes less of the weights' score.

A head's answer is a weighted mean of values, so an orthogonal matrix R before it and its inverse after it leave what the
model computes: W_v ← R W_v, W_o ← W_o Rᵀ. Which of the weights are small is another matter. DenoiseRotator (arXiv 2505.23049)
learns such matrices by the entropy of the weights' importance; here what is made small is the importance that the pattern
would take itself, which left less error for every pattern tried (LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS, _RATE = 30, 0.03


@dataclass(frozen=True)
class HeadValues:
    """What makes the values of key-value heads, and what reads the answers of their query heads.

    S key-value heads of D channels each, for R query heads each; I inputs of the values, O outputs of the consumer.
    """

    weight: Tensor
    """S × D × I float32: rows that give the values."""
    input_squares: Tensor
    """I float32: mean square of every input of the values."""
    consumer: Tensor
    """O × S × R × D float32: what is multiplied with the answers."""
    gram: Tensor
    """S × R × D × D float32: Gram matrix of every query head's answers."""

    def rotated(self, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """The two weights with every key-value head turned. rotation: S × D × D."""
        return rotation @ self.weight, torch.einsum("osrd,sed->osre", self.consumer, rotation)

    def scores(self, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Wanda's score, squared, of the two turned weights as matrices: S·D × I, and O × S·R·D."""
        weight, consumer = self.rotated(rotation)
        turn = rotation[:, None]
        squares = ((turn @ self.gram) * turn).sum(dim=-1)
        return (weight.square() * self.input_squares).flatten(0, 1), (consumer.square() * squares).flatten(1)


def lost_share(values: HeadValues, rotation: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
    """The share of both weights' scores that a pattern takes, added up.

    Args:
        values: of all heads.
        rotation: S × D × D float32, orthogonal.
        keep: chooses what is kept by a matrix of scores, as a bool matrix.

    Returns:
        A number between 0 and 2.
    """
    lost = [score.masked_fill(keep(score.detach()), 0.0).sum() / score.sum() for score in values.scores(rotation)]
    return torch.stack(lost).sum()


def learn_rotation(values: HeadValues, keep: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Turn the values of every key-value head so that a pattern takes less of the scores.

    The Q of a QR decomposition is learned by Adam, thirty steps (DenoiseRotator, arXiv 2505.23049). Other objectives and
    matrices that are not orthogonal did not do better (LOG.md).

    Args:
        values: of all heads.
        keep: chooses what is kept by a matrix of scores, as a bool matrix.

    Returns:
        S × D × D float32, orthogonal: the identity where nothing better was found. And the shares that are lost before and
        after, 2 float32.
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
            # The shares are small numbers beside Adam's ε.
            (100 * loss).backward()
            optimizer.step()
    found = torch.linalg.qr(free.detach())[0]
    after = lost_share(values, found, keep)
    better = after < before
    return torch.where(better, found, identity), torch.stack([before, torch.where(better, after, before)])
