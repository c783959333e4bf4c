"""Let zeros change places while a model is trained: ADMM between free weights and a mask that draws them (arXiv 2510.01650).

Training acts on weights x without zeros. Beside them stands a sparse z, the best part of what x came to, and a penalty
λ/2‖x − z + u‖² draws x to it, the more the longer the two differ: u sums up by how much they did. At the end x is cut
to its mask, and what is left of the training keeps the zeros where they are then.

Where ELSA has one budget for the model and starts from dense weights, this starts from a pruned model and keeps the
pattern and the number of zeros of each of its matrices, so that a chosen allocation stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from coprune.training.hold_zeros import hold_zeros
from coprune.training.masks import Masks, plain_parameters

STATE_FILE = "zeros.safetensors"
INTERVAL = 32
"""Steps between two choices of z."""
MOVING = 0.75
"""The share of the training in which zeros move."""
_STEPS, _MOVED, _TOTAL, _PRUNED = "steps", "moved", "total of ", "pruned of "


def penalty_gradient(weight: Tensor, total: Tensor, pruned: Tensor, strength: float) -> Tensor:
    """The gradient λ (x − z + u) of ADMM's penalty.

    Args:
        weight: x, any shape, float.
        total: s = x + u when z was chosen last. As z is s where weights are kept, and u, which is updated right after that,
            is s where they are pruned, s is all that has to be remembered of both.
        pruned: bool, True where z is zero.
        strength: λ.

    Returns:
        Of the weight's shape.
    """
    return strength * (weight - torch.where(pruned, -total, total))


def next_total(weight: Tensor, total: Tensor, pruned: Tensor) -> Tensor:
    """x + u of the next choice of z: u is what the last one left out. As `penalty_gradient`."""
    return weight + torch.where(pruned, total, 0)


def importance(total: Tensor, second_moment: Tensor) -> Tensor:
    """What it costs to set an entry to zero, by Adam's estimate of the curvature: v̂ s², of any shape."""
    return second_moment * total.square()


@dataclass
class _Moving:
    """What is remembered of one parameter between two choices."""

    weight: nn.Parameter
    total: Tensor
    pruned: Tensor


class MovingZeros:
    """The zeros of a model while they move. It takes part in an Adam's steps from its making on, until `stand`."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, masks: Masks, strength: float, share: Callable[[], float]
    ) -> None:
        """masks: are changed in place in the end; strength: λ; share: tells how much of the training is done."""
        self._model, self._optimizer, self._masks = model, optimizer, masks
        self._strength, self._share, self._steps = strength, share, 0
        self.moved: float | None = None
        """Once zeros stand: the share of the kept weights that were zeros before."""
        self._moving = {
            name: _Moving(weight, weight.detach().clone(), masks.pruned[name].to(weight.device, copy=True))
            for name, weight in plain_parameters(model).items()
            if name in masks.pruned and weight.requires_grad
        }
        # After gradients are clipped, since the penalty is no part of the loss whose norm is limited.
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._draw()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    @property
    def moving(self) -> bool:
        """Whether zeros may still change places."""
        return bool(self._hooks)

    @torch.no_grad()
    def _draw(self) -> None:
        for one in self._moving.values():
            if one.weight.grad is not None:
                one.weight.grad += penalty_gradient(one.weight, one.total, one.pruned, self._strength)

    def _after_step(self) -> None:
        self._steps += 1
        if self._share() >= MOVING:
            self.stand()
        elif self._steps % INTERVAL == 0:
            self._choose()

    @torch.no_grad()
    def _choose(self) -> None:
        """Choose z, and with it u, anew."""
        scores = {}
        for name, one in self._moving.items():
            one.total = next_total(one.weight, one.total, one.pruned)
            # What no gradient has reached, such as an expert that no token came to, has no moments: its zeros stay.
            if (moment := self._optimizer.state.get(one.weight, {}).get("exp_avg_sq")) is not None:
                scores[name] = importance(one.total, moment)
        for entry in self._masks.matrices:
            if entry.parameter in scores:
                keep = entry.pattern.choose(entry.rows_of(scores[entry.parameter]), entry.sparsity, "matrix")
                entry.rows_of(self._moving[entry.parameter].pruned).copy_(~keep)

    @torch.no_grad()
    def stand(self) -> None:
        """Cut the weights to the last mask, and keep its zeros from now on. Does nothing if that is done."""
        if not self.moving:
            return
        if self._steps % INTERVAL:
            self._choose()
        self.moved = self._count_moved()
        for name, one in self._moving.items():
            self._masks.pruned[name].copy_(one.pruned)
            one.weight.masked_fill_(one.pruned, 0)
            for moment in self._optimizer.state.get(one.weight, {}).values():
                if moment.shape == one.pruned.shape:
                    moment.masked_fill_(one.pruned, 0)
        self._hold()

    def _count_moved(self) -> float:
        kept = [(self._masks.pruned[name], ~one.pruned.cpu()) for name, one in self._moving.items()]
        return sum(int((before.cpu() & now).sum()) for before, now in kept) / max(
            1, sum(int(now.sum()) for _, now in kept)
        )

    def _hold(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._moving = [], {}
        hold_zeros(self._model, self._optimizer, self._masks)

    def save(self, folder: Path) -> None:
        """Keep in a folder what `load` goes on from."""
        pruned = {name: one.pruned for name, one in self._moving.items()} if self.moving else self._masks.pruned
        state = {_PRUNED + name: mask.cpu().contiguous() for name, mask in pruned.items()}
        state |= {_TOTAL + name: one.total.cpu().contiguous() for name, one in self._moving.items()}
        state |= {} if self.moved is None else {_MOVED: torch.tensor(self.moved, dtype=torch.float64)}
        save_file({_STEPS: torch.tensor(self._steps), **state}, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Go on from what another has kept, before the first step."""
        state = load_file(folder / STATE_FILE)
        self._steps = int(state[_STEPS])
        for name, one in self._moving.items():
            one.pruned = state[_PRUNED + name].to(one.weight.device)
            if (total := state.get(_TOTAL + name)) is not None:
                one.total = total.to(one.weight.device)
        if (moved := state.get(_MOVED)) is not None:
            self.moved = float(moved)
            for name in self._moving:
                self._masks.pruned[name].copy_(state[_PRUNED + name])
            self._hold()
