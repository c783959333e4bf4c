"""Distillation: train a pruned model toward the dense one's outputs and hidden states.

The loss is the divergence of the next-token distributions at a temperature (Hinton et al., arXiv 1503.02531) plus the error of
every block's hidden states relative to their size (SquareHead, arXiv 2310.06927), here per token, since the first token of
many models is a thousand times larger than the others. A model that embeds has no distributions: its vectors are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from coprune.base.devices import PerMemory, in_host_memory
from coprune.data.text import NOTHING, lengths_of
from coprune.model.checkpoint.load import evaluating
from coprune.model.walk.block_calls import takes


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
    """The divergence and its gradient, computed for a few tokens at a time so that their logits stay in the cache.

    Logits are the largest tensors of a step; one pass over all of them per operation took an eighth of its time.
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
        # In place: allocating another tensor of this size takes four times as long as the product.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(gradients[0]), None, None


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities (N × vocabulary float32), and by how much their logarithms exceed the logits (N).

    logits: N × vocabulary float32, already over the temperature.
    """
    probabilities = functional.softmax(logits, dim=-1)
    return probabilities, probabilities.amax(dim=-1).log() - logits.amax(dim=-1)


def hidden_error(student: Sequence[Tensor], teacher: Iterable[Tensor], counted: Tensor | None = None) -> Tensor:
    """Return the squared error of every block's hidden states relative to the dense ones, mean over tokens and blocks.

    student, teacher: per block B × S × H. counted: tokens that count, B × S bool; None for all.
    """
    errors = []
    for mine, dense in zip(student, teacher, strict=True):
        if counted is not None:
            mine, dense = mine[counted], dense[counted]
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
class Batch:
    """A batch of samples as the model's arguments; pairs are padded at the end."""

    taken: dict[str, Any]
    labels: Tensor | None
    """Label of each position of the logits, B × S int64, `NOTHING` where it does not count; without pairs, the samples' own."""
    read: Tensor | None = None
    """Positions of the encoder's text, B × S bool; None where all count."""

    @classmethod
    def of(cls, inputs: dict[str, Tensor]) -> Batch:
        """Prepare samples. inputs: the model's, and `labels`; for pairs also `written`, the decoder's tokens."""
        taken: dict[str, Any] = {name: value for name, value in inputs.items() if name not in ("labels", "written")}
        written = inputs.get("written")
        if written is None:
            return cls(taken, inputs.get("labels"))
        written = written[:, : int(lengths_of(written).max())]
        taken["decoder_input_ids"], read = written[:, :-1].clamp_min(0), None
        if (tokens := inputs.get("input_ids")) is not None:
            tokens = tokens[:, : int(lengths_of(tokens).max())]
            read = tokens != NOTHING
            taken |= {"input_ids": tokens.clamp_min(0), "attention_mask": read.to(torch.int64)}
        return cls(taken, written[:, 1:], read)

    def states(self, answer: Any) -> Iterator[tuple[Sequence[Tensor], Tensor | None]]:
        """Yield the hidden states of each list of blocks, starting with its embeddings, and the positions that count."""
        if "decoder_input_ids" not in self.taken:
            yield answer.hidden_states, None
        else:
            assert self.labels is not None
            yield answer.encoder_hidden_states, self.read
            yield answer.decoder_hidden_states, self.labels != NOTHING


def target_loss(model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the targets (masked tokens or a decoder's output), an `Objective`."""
    batch = Batch.of(inputs)
    assert batch.labels is not None
    logits = model(**batch.taken).logits
    return functional.cross_entropy(
        logits.flatten(0, 1).to(torch.float32), batch.labels.flatten(), ignore_index=NOTHING
    )


@dataclass(frozen=True)
class Distillation:
    """The distillation loss between a student and its teacher."""

    teacher: nn.Module
    temperature: float
    hidden: bool
    """Whether hidden states are compared as well."""
    counterparts: Sequence[Sequence[int]] = ()
    """Index of the teacher's hidden state for each block, per list of blocks; empty if no block was removed."""
    pooled: Callable[[Tensor], Tensor] | None = None
    """Makes unit vectors of the last hidden states of a model without logits."""

    def __call__(self, model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
        """Return the loss: see `Objective`."""
        batch = Batch.of(inputs)
        options: dict[str, Any] = {"output_hidden_states": True} if self.hidden else {}
        if "pixel_values" not in inputs and takes(self.teacher, "use_cache"):
            options["use_cache"] = False
        with self._settled(model):
            student = model(**batch.taken, **options)
        with torch.no_grad():
            dense = self.teacher(**batch.taken, **options)
        loss = self._difference(student, dense, batch)
        if not self.hidden:
            return loss
        errors = []
        pairs = zip(batch.states(student), batch.states(dense), strict=True)
        for number, ((mine, counted), (theirs, _)) in enumerate(pairs):
            # The first entry is the embeddings, which masks do not change.
            aims = [theirs[i] for i in self.counterparts[number]] if self.counterparts else theirs[1:]
            errors.append(hidden_error(mine[1:], aims, counted))
        return loss + torch.stack(errors).mean()

    def _settled(self, model: Any) -> AbstractContextManager[None]:
        """Switch dropout off, as in the teacher, unless activations are recomputed, which requires training mode."""
        recomputes = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
        return nullcontext() if recomputes else evaluating(model)

    def _difference(self, student: Any, teacher: Any, batch: Batch) -> Tensor:
        """Return the distance of the outputs: 1 − cosine of vectors, squared error of single scores, else the divergence."""
        if self.pooled is not None:
            mine, dense = (self.pooled(answer.last_hidden_state) for answer in (student, teacher))
            return 1 - (mine * dense).sum(dim=-1).mean()
        mine, dense = student.logits, teacher.logits
        if "decoder_input_ids" in batch.taken:
            assert batch.labels is not None
            mine, dense = (logits[batch.labels != NOTHING] for logits in (mine, dense))
        if mine.shape[-1] == 1:
            return functional.mse_loss(mine.to(torch.float32), dense.to(torch.float32))
        return divergence(mine, dense, self.temperature)
