"""Training of a quantised GGUF file's scales toward the model that it was made from.

Codes stay as they are. Every block of weights has one or two float16 numbers to which its values are proportional, and these
are trained on the divergence from the model's outputs, as in PEQA (arXiv 2305.14152) and EfficientQAT's second phase (arXiv
2407.11062).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coprune.base.errors import NumericalError, UnsupportedModel
from coprune.base.precision import quickest_on_cpu
from coprune.base.progress import Reporter
from coprune.data.bos import begun_by
from coprune.data.windows import calibration_windows
from coprune.gguf_files.importance import by_name
from coprune.gguf_files.matrix_rows import Arranged, Part, parts_in_file
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import Location
from coprune.model.generation import positions_of
from coprune.model.matrices import Matrix
from coprune.model.matrix_choice import choose_matrices
from coprune.training.distill import divergence

NUMBERS: Mapping[str, Sequence[int]] = {
    **dict.fromkeys(
        ("q4_0", "q5_0", "q8_0", "iq4_nl", "iq4_xs", "iq3_xxs", "iq3_s", "iq2_xxs", "iq2_xs", "iq2_s"), (0,)
    ),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    "q6_k": (208,),
    "q3_k": (108,),
    "q2_k": (80, 82),
    "iq1_s": (0,),
}
"""Offsets of the float16 numbers in a block's bytes, by type. A block's values are a sum of terms, each proportional to one."""
_SEQLEN, _BATCH = 256, 2
"""Tokens of a sample, and samples of a step."""
_RATE, _BETAS, _WARMUP = 1e-3, (0.9, 0.95), 5
"""The highest learning rate of Adam, relative to the scales; its averages; number of steps in which the rate rises."""
_CHECKED = 4
"""Number of samples on which the file is compared before and after."""


@dataclass(frozen=True)
class _Trained:
    """A part of a matrix whose scales are trained."""

    part: Part
    weight: nn.Parameter
    terms: Tensor
    """Numbers × rows × blocks × values of a block: what each number contributes, in the model's dtype."""
    factors: nn.Parameter
    """Numbers × rows × blocks × 1 float32, multiplied with the numbers; 1 at first."""

    def apply(self) -> None:
        """Set the rows of the weight."""
        values = (self.terms * self.factors.detach()).sum(dim=0).flatten(1)
        self.weight.data[self.part.rows] = values.to(self.weight.dtype)

    def collect(self) -> None:
        """Compute the gradient of the factors from the weight's, if it was used."""
        self.factors.grad = None
        if self.weight.grad is None:
            return
        gradients = self.weight.grad[self.part.rows].view_as(self.terms[0])
        self.factors.grad = torch.stack(
            [(gradients * term).sum(dim=2, keepdim=True, dtype=torch.float32) for term in self.terms]
        )

    def write(self, file: Path) -> None:
        """Multiply the numbers in the file."""
        data = self.part.bytes()
        for number, factors in zip(_numbers(self.part.stored, data), self.factors.detach(), strict=True):
            number *= factors[..., 0].numpy()
        self.part.write(file, torch.from_numpy(data))


def _numbers(stored: Any, data: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Return views of the float16 numbers in rows of blocks, rows × blocks each."""
    from gguf import GGML_QUANT_SIZES

    blocks = data.reshape(len(data), -1, GGML_QUANT_SIZES[stored.tensor_type][1])
    return [blocks[..., at : at + 2].view(np.float16)[..., 0] for at in NUMBERS[stored.tensor_type.name.lower()]]


def terms(part: Part) -> Tensor:
    """Return what each of its blocks' numbers contributes to the values: numbers × rows × blocks × values, float32."""
    from gguf import GGML_QUANT_SIZES

    size, data = GGML_QUANT_SIZES[part.stored.tensor_type][0], part.bytes()
    found = []
    for kept in range(len(_numbers(part.stored, data))):
        own = data.copy()
        for place, number in enumerate(_numbers(part.stored, own)):
            if place != kept:
                number[:] = 0
        found.append(part.decode(own).unflatten(1, (-1, size)))
    return torch.stack(found)


def train_scales(
    file: Path, location: Location, data: str, tokens: int, arranged: Arranged, reporter: Reporter
) -> None:
    """Train the scales of a file's matrices and tables in place, unless that does not bring it nearer to the model.

    Args:
        file: a quantised file of the model.
        location: the model.
        data: text to train on.
        tokens: to train on.
        arranged: makes the file's tensors.
        reporter: shows progress and reports the divergence.

    Raises:
        BadInput: the text or the model cannot be read.
        UnsupportedModel: no scale can be trained.
        NumericalError: the divergence is not finite.
    """
    teacher, tokenizer = load_model(location, quickest_on_cpu())
    seqlen = min(_SEQLEN, positions_of(teacher) or _SEQLEN)
    count = _CHECKED + _BATCH * -(-tokens // (_BATCH * seqlen))
    samples = begun_by(tokenizer, calibration_windows(data, tokenizer, count, seqlen, seed=0).tokens)
    checked, batches = samples[:_CHECKED].split(1), samples[_CHECKED:].split(_BATCH)
    student = deepcopy(teacher)
    trained = _trained(file, location, student, arranged)

    def loss(batch: Tensor) -> Tensor:
        with torch.no_grad():
            aim = teacher(input_ids=batch, use_cache=False).logits
        return divergence(student(input_ids=batch, use_cache=False).logits, aim, 1.0)

    def measure() -> float:
        with torch.no_grad():
            return sum(float(loss(sample)) for sample in checked) / len(checked)

    before = measure()
    _train(trained, [*batches], loss, reporter)
    after = measure()
    if not after < before:
        reporter.say(f"Training the scales raises the KL to the model from {before:.4f} to {after:.4f}, so they stay")
        return
    for one in trained:
        one.write(file)
    reporter.say(
        f"Training {sum(one.factors.numel() for one in trained):,} scales lowers the KL to the model from "
        f"{before:.4f} to {after:.4f}"
    )


def _train(trained: Sequence[_Trained], batches: Sequence[Tensor], loss: Any, reporter: Reporter) -> None:
    """Train the factors, one step per batch."""
    optimizer = torch.optim.Adam([one.factors for one in trained], _RATE, _BETAS, fused=True)
    with reporter.bar("Training the scales", len(batches)) as advance:
        for step, batch in enumerate(batches):
            found = loss(batch)
            if not bool(found.isfinite()):
                raise NumericalError(f"the divergence from the model is not finite at step {step}")
            found.backward()
            for one in trained:
                one.collect()
            for one in trained:
                one.weight.grad = None
            optimizer.param_groups[0]["lr"] = _RATE * min(1.0, (step + 1) / _WARMUP) * (1 - step / len(batches))
            optimizer.step()
            for one in trained:
                one.apply()
            advance(1)


def _trained(file: Path, location: Location, student: Any, arranged: Arranged) -> list[_Trained]:
    """Give a model the file's values and return the parts whose scales can be trained. Raises UnsupportedModel if none can."""
    chosen = choose_matrices(student, find_blocks(student))
    chosen = replace(chosen, outside=_tables(student))
    stored = {one.name: one for one in gguf_reader(file, field="output").tensors}
    matrices, found = [*chosen.all()], list[_Trained]()
    parts = parts_in_file(matrices, partial(by_name, location, student, chosen), stored, arranged)
    student.requires_grad_(False)
    for matrix in matrices:
        weight = matrix.read()
        for part in parts.get(matrix.name, ()):
            if not torch.equal(part.columns, torch.arange(weight.shape[1])):
                weight[part.rows[:, None], part.columns] = part.read()
                continue
            weight[part.rows] = part.read()
            if isinstance(matrix.owner, nn.Linear | nn.Embedding) and _kind(part) in NUMBERS:
                parameter = getattr(matrix.owner, matrix.attribute).requires_grad_(True)
                own = terms(part)
                factors = nn.Parameter(torch.ones(*own.shape[:3], 1))
                found.append(_Trained(part, parameter, own.to(parameter.dtype), factors))
        matrix.write(weight)
    if not found:
        raise UnsupportedModel("the file has no scales that can be trained")
    return found


def _kind(part: Part) -> str:
    return str(part.stored.tensor_type.name).lower()


def _tables(model: Any) -> list[Matrix]:
    """Return the embeddings and the head, one of them if they share their weights. Raises UnsupportedModel without a head."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise UnsupportedModel("the model predicts no tokens, so its scales cannot be trained on its predictions")
    both = {id(one.weight): one for one in (table, head)}
    return [Matrix(f"table {place}", one, "weight", input_dim=1) for place, one in enumerate(both.values())]
