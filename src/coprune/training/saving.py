"""Save a fine-tuned model as an ordinary checkpoint, unless a pruned weight in it is not zero."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.model.checkpoint.companions import Companions
from coprune.model.checkpoint.load import prepare
from coprune.model.checkpoint.weights import InMemory, is_below
from coprune.model.checkpoint.writer import REST, CheckpointWriter
from coprune.model.edit import Edits
from coprune.model.verify import verify_saved
from coprune.model.walk.prove import prove_replay
from coprune.model.walk.proven import FoundModel
from coprune.model.walk.record import input_device
from coprune.training.masks import Masks, plain_parameters


def save_model(model: PreTrainedModel, masks: Masks, beside: Companions, folder: Path, probe: Tensor) -> None:
    """Write a model in memory to a folder, and reload it to compare.

    beside: what lies beside the weights, and their dtype; probe: one sample to compare the two models with.
    Raises BrokenMask before anything is written, BadInput if the folder is taken or the disk is full, and
    VerificationError if what was written is not what was in memory.
    """
    torch.nn.Module.to(prepare(model), dtype=getattr(torch, beside.dtype))
    masks.verify(plain_parameters(model))
    weights = InMemory(model)
    found = FoundModel.without_matrices(weights)
    names = found.names
    writer = CheckpointWriter(folder, [REST, *names], weights.total_bytes)
    for name in names:
        writer.write(name, weights.original_tensors(name))
    writer.write(REST, weights.rest_tensors(names))
    weights.write_companions(writer.partial, beside)
    edits = edits_of(masks, names)
    edits.write(writer.partial)
    writer.finish()
    proven = prove_replay(found, probe.to(input_device(model)))
    verify_saved(folder, proven, edits)


def edits_of(masks: Masks, blocks: Sequence[str]) -> Edits:
    """The masks as edits of the model's blocks; what lies outside of them stands under the last one."""
    found: dict[str, dict[str, str]] = {block: {} for block in blocks}
    for entry in masks.matrices:
        own = next((block for block in blocks if is_below(entry.matrix.name, block)), blocks[-1])
        found[own][entry.matrix.name] = entry.matrix.mask_checksum()
    return Edits.of_results(found)
