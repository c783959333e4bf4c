"""Distillation: train a pruned model toward the dense one's outputs and hidden states.

The loss is the divergence of the next-token distributions at a temperature (Hinton et al., arXiv 1503.02531) plus the error of
every block's hidden states relative to their size (SquareHead, arXiv 2310.06927), here per token, since the first token of
many models is a thousand times larger than the others. A precomputed teacher stores its largest logits; the rest are compared
as one outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from coprune.base.devices import PerMemory, in_host_memory
from coprune.base.files import write_durably

_WINDOWS_PER_FILE = 32


class TeacherCache:
    """Log probabilities (at a temperature) of the k likeliest tokens at every position of every window."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, windows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the stored log probabilities (B × S × k float32) and token ids (B × S × k int64) of some windows."""
        values, indices = [], []
        for window in windows.tolist():
            with safe_open(self._file(window // _WINDOWS_PER_FILE), "pt") as file:
                row = window % _WINDOWS_PER_FILE
                values.append(file.get_slice("log_probabilities")[row])
                indices.append(file.get_slice("tokens")[row])
        return torch.stack(values).to(device), torch.stack(indices).to(device, torch.int64)

    @torch.inference_mode()
    def fill(
        self,
        teacher: nn.Module,
        tokens: Tensor,
        top_k: int,
        temperature: float,
        device: torch.device,
        advance: Callable[[float], None] = lambda windows: None,
    ) -> None:
        """Run the teacher over all windows (N × S int64) that an earlier pass did not reach."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(torch.split(tokens, _WINDOWS_PER_FILE)):
            if not self._file(number).is_file():
                kept = [_likeliest(teacher(input_ids=w[None].to(device)), top_k, temperature) for w in part]
                content = {
                    "log_probabilities": torch.cat([values for values, _ in kept]),
                    "tokens": torch.cat([indices for _, indices in kept]),
                }
                write_durably(self._file(number), lambda path, content=content: save_file(content, path))  # type: ignore[misc]
            advance(len(part))

    def _file(self, number: int) -> Path:
        return self.folder / f"teacher-{number:05d}.safetensors"


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Return logits over a temperature, in float32; at temperature 1 the logits themselves.

    logits: … × vocabulary.
    """
    # Logits are the largest tensors of a step, so copies are avoided.
    return logits if temperature == 1 else logits.to(torch.float32) / temperature


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Return log probabilities at a temperature, in float32.

    logits: … × vocabulary.
    """
    return functional.log_softmax(tempered(logits, temperature), dim=-1, dtype=torch.float32)


def _likeliest(output: Any, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    top = log_probabilities(output.logits, temperature).topk(top_k, dim=-1)
    return top.values.cpu().contiguous(), top.indices.to("cpu", torch.int32).contiguous()


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


def divergence_of_top(student: Tensor, log_teacher: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Compute `divergence` with the teacher's k likeliest tokens and all others taken as one outcome.

    student: … × vocabulary logits; log_teacher: … × k, log probabilities at the temperature; indices: … × k.
    Never more than the whole divergence, and equal to it where k is the vocabulary.
    """
    log_student = log_probabilities(student, temperature)
    top = log_student.gather(-1, indices)
    kl = (log_teacher.exp() * (log_teacher - top)).sum(dim=-1)
    rest_teacher = (1 - log_teacher.exp().sum(dim=-1)).clamp_min(1e-9)
    rest_student = (1 - top.exp().sum(dim=-1)).clamp_min(1e-9)
    rest = rest_teacher * (rest_teacher.log() - rest_student.log())
    return (kl + rest).mean() * temperature**2


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

    def __call__(self, model: Callable[..., Any], inputs: dict[str, Tensor], windows: Tensor) -> Tensor:
        """Return the mean loss. inputs: the model's, and `labels`; windows: B int64, the samples' numbers."""
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
    """The loss of distillation from a teacher beside the student, or from one that was run ahead."""

    teacher: nn.Module | TeacherCache
    temperature: float
    kl_weight: float
    hidden_weight: float
    text_weight: float
    counterparts: Sequence[int] = ()
    """Teacher's hidden state for each block, if blocks are missing; else all in order."""

    def __call__(self, model: Callable[..., Any], inputs: dict[str, Tensor], windows: Tensor) -> Tensor:
        """Return the loss: see `Objective`."""
        taken: dict[str, Any] = {name: value for name, value in inputs.items() if name != "labels"}
        hidden = self.hidden_weight > 0 and not isinstance(self.teacher, TeacherCache)
        if "input_ids" in inputs:
            taken |= {"output_hidden_states": hidden, "use_cache": False}
        student = model(**taken)
        loss = torch.zeros((), device=student.logits.device)
        if isinstance(self.teacher, TeacherCache):
            log_teacher, indices = self.teacher.read(windows, student.logits.device)
            loss = loss + self.kl_weight * divergence_of_top(student.logits, log_teacher, indices, self.temperature)
        else:
            with torch.no_grad():
                dense = self.teacher(**taken)
            if self.kl_weight:
                loss = loss + self.kl_weight * divergence(student.logits, dense.logits, self.temperature)
            if hidden:
                # The first entry is the embeddings, which a mask does not touch.
                teacher = [dense.hidden_states[i] for i in self.counterparts] or dense.hidden_states[1:]
                error = hidden_error(student.hidden_states[1:], teacher)
                loss = loss + self.hidden_weight * error
        if self.text_weight:
            loss = loss + self.text_weight * label_loss(student.logits, inputs["labels"])
        return loss
