"""Common parts of the tasks: kinds of data, and scoring of a model's outputs, in memory or block by block."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from coprune.base.processes import Processes
from coprune.base.progress import Advance
from coprune.data.images import LabelledImages
from coprune.data.labelled_text import LabelledTexts
from coprune.data.speech import Recordings
from coprune.data.windows import EvaluationText
from coprune.evaluation.batches import inference_logits
from coprune.evaluation.measurement import Measured
from coprune.model.loaded_model import Loaded
from coprune.model.walk.activations import Activations
from coprune.model.walk.block_calls import input_device
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.walk import streamed_logits

Data = EvaluationText | LabelledImages | LabelledTexts | Recordings
Tokens = TypeVar("Tokens")
Beside = TypeVar("Beside")


class Remember(Protocol):
    """Returns what was read before under the same key, or reads it now."""

    def __call__(self, key: tuple[Hashable, ...], read: Callable[[], Tokens], /) -> Tokens: ...


def read_anew(key: tuple[Hashable, ...], read: Callable[[], Tokens]) -> Tokens:
    """Read without a cache."""
    return read()


def texts_of(data: Mapping[str, Data]) -> list[EvaluationText]:
    """Return the evaluation data that are streams of tokens."""
    return [one for one in data.values() if isinstance(one, EvaluationText)]


def named(found: Measured, name: str, data: Data) -> Measured:
    """Add the data to a measurement. name: as requested."""
    return found.on(name, data.source, data.fingerprint if isinstance(data, EvaluationText) else "")


@dataclass(frozen=True)
class Walked:
    """The model of a run, whose blocks may be streamed, with an empty list for its hidden states."""

    model: ProvenModel
    activations: Activations | None


def scored(
    loaded: Loaded,
    parts: Iterable[tuple[Tensor, Beside]],
    score: Callable[[Tensor, Beside], Tensor],
    progress: tuple[Advance, int],
    walked: Walked | None,
) -> list[Tensor]:
    """Run batches through a model, in memory or block by block, and score its outputs.

    Args:
        loaded: the model.
        parts: batches, each with additional inputs of its score. A streamed model processes all batches together.
        score: (logits or hidden states, additional inputs) → the batch's scores.
        progress: called with the share just done, and the total number of inputs, which may be spread over several calls.
        walked: the model of a run; None for one in memory.

    Returns:
        The scores of every batch, in order.
    """
    advance, total = progress
    if walked is not None and walked.model.weights.streams:
        there, given, beside = input_device(walked.model.module), list[Tensor](), list[Beside]()
        for batch, own in parts:
            given.append(batch.to(there))
            beside.append(own)
        if not given:
            return []  # there are fewer inputs than processes
        rest, share = iter(beside), sum(map(len, given)) / total / len(walked.model.blocks)
        return streamed_logits(
            walked.model,
            given,
            lambda outputs, _: score(outputs, next(rest)),
            lambda done: advance(done * share),
            walked.activations,
        )
    found = list[Tensor]()
    with inference_logits(loaded.model) as outputs_of:
        for batch, own in parts:
            found.append(score(outputs_of(batch), own))
            advance(len(batch) / total)
    return found


def joined(processes: Processes, scores: Sequence[Tensor]) -> Tensor:
    """Concatenate the scores of all processes, in the order of their shares."""
    return torch.cat([one for own in processes.gather(list(scores)) for one in own])
