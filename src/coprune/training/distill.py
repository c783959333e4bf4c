"""Distillation: train a pruned model toward the dense one's outputs and hidden states.

The loss is the divergence of the next-token distributions at a temperature (Hinton et al., arXiv 1503.02531) plus the error of
every block's hidden states relative to their size (SquareHead, arXiv 2310.06927), here per token, since the first token of
many models is a thousand times larger than the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from coprune.base.devices import PerMemory, in_host_memory


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Return logits over a temperature, in float32; at temperature 1 the logits themselves.

    logits: … × vocabulary.
    """
    # Logits are the largest tensors of a step, so copies are avoided.
    return logits if temperature == 1 else logits.to(torch.float32) / temperature


_LOGITS = PerMemory(host=2**18, gpu=2**24)
"""Number of logits compared at once: per CPU thread as many as fit its cache, on a GPU enough for few launches."""


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T²·KL(teacher ‖ student) of distributions at temperature T, in nats, mean over the tokens.

    student, teacher: … × vocabulary logits. T² keeps the gradient's size independent of T.
    """
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    kl: Tensor = _Divergence.apply(student, teacher, temperature)  # type: ignore[no-untyped-call, unused-ignore]
    return kl


class _Divergence(torch.autograd.Function):
    """The divergence and its gradient of a few tokens at a time, whose logits then stay in the processor's cache.

    Logits are the largest tensors of a step: a pass of all over memory for every operation took an eighth of it.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Compute the loss and its gradient. student, teacher: N × vocabulary."""
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        threads = torch.get_num_threads() if in_host_memory(student.device) else 1
        tokens = threads * max(1, _LOGITS.on(student.device) // student.shape[-1])
        for start in range(0, len(student), tokens):
            part = slice(start, start + tokens)
            ours, theirs = (tempered(logits[part], temperature).to(torch.float32) for logits in (student, teacher))
            (found, log_found), (expected, log_expected) = _probabilities(ours), _probabilities(theirs)
            total += (torch.linalg.vecdot(expected, theirs - ours) + log_expected - log_found).sum()
            if gradient is not None:
                torch.sub(found, expected, out=gradient[part]).mul_(temperature / len(student))
        ctx.gradient = gradient
        return total * (temperature**2 / len(student))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        """Return the gradient: the difference of the probabilities, over T."""
        # In place, since allocating another tensor of this size costs four times as much as the product.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(gradients[0]), None, None


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities (N × vocabulary float32), and by how much their logarithms exceed the logits (N).

    logits: N × vocabulary float32, already over the temperature.
    """
    probabilities = functional.softmax(logits, dim=-1)
    return probabilities, probabilities.amax(dim=-1).log() - logits.amax(dim=-1)


def hidden_error(student: Sequence[Tensor], teacher: Iterable[Tensor]) -> Tensor:
    """Return the squared error of every block's hidden states relative to the dense ones, mean over tokens and blocks.

    student, teacher: per block B × S × H.
    """
    errors = []
    for mine, dense in zip(student, teacher, strict=True):
        target = dense.to(torch.float32)
        error = (mine.to(torch.float32) - target).square().sum(dim=-1)
        errors.append((error / target.square().sum(dim=-1).clamp_min(1e-12)).mean())
    return torch.stack(errors).mean()


class Objective(Protocol):
    """A loss of a model on a batch of samples."""

    def __call__(self, model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
        """Return the mean loss. inputs: the model's, and `labels`."""
        ...


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy with the labels.

    logits: B × S × V with labels B × S, each position's for the next one (text), or B × classes with labels B (images).
    """
    if logits.ndim == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return functional.cross_entropy(logits.to(torch.float32), labels)


@dataclass(frozen=True)
class Distillation:
    """The loss of distillation from a teacher beside the student."""

    teacher: nn.Module
    temperature: float
    hidden: bool
    """Whether hidden states are compared, too."""
    counterparts: Sequence[int] = ()
    """Teacher's hidden state for each block, if blocks are missing; else all in order."""

    def __call__(self, model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
        """Return the loss: see `Objective`."""
        taken: dict[str, Any] = {name: value for name, value in inputs.items() if name != "labels"}
        if "input_ids" in inputs:
            taken |= {"output_hidden_states": self.hidden, "use_cache": False}
        student = model(**taken)
        with torch.no_grad():
            dense = self.teacher(**taken)
        loss = divergence(student.logits, dense.logits, self.temperature)
        if not self.hidden:
            return loss
        # The first entry is the embeddings, which a mask does not touch.
        teacher = [dense.hidden_states[i] for i in self.counterparts] or dense.hidden_states[1:]
        return loss + hidden_error(student.hidden_states[1:], teacher)
