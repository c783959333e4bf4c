"""Save a fine-tuned model as an ordinary checkpoint, after verifying that pruned weights are zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.base.errors import NumericalError
from coprune.base.files import write_text
from coprune.model.checkpoint.companions import CARD_FILE, Companions
from coprune.model.checkpoint.load import prepare
from coprune.model.checkpoint.names import is_below
from coprune.model.checkpoint.weights import InMemory
from coprune.model.checkpoint.writer import REST, CheckpointWriter
from coprune.model.edits import Edits
from coprune.model.loaded_model import in_memory
from coprune.model.verification import verify_saved
from coprune.model.walk.block_calls import input_device
from coprune.model.walk.model_structure import FoundModel
from coprune.model.walk.prove import prove_replay
from coprune.training.masks import Masks, plain_parameters


def save_model(
    model: PreTrainedModel, masks: Masks, beside: Companions, card: str, folder: Path, probe: Tensor
) -> None:
    """Write a model in memory to a folder, which gets its final name after it was reloaded and compared.

    Args:
        model: the model, with adapters merged.
        masks: of its zeros.
        beside: files to save with the weights, and the weights' dtype.
        card: its model card.
        folder: a folder that does not exist or is empty.
        probe: a sample on which the two models are compared.

    Raises:
        BrokenMask, NumericalError: before anything is written.
        BadInput: the folder is not empty, or the disk is full.
        VerificationError: the written model differs from the one in memory, and was deleted.
    """
    bring_to(prepare(model), getattr(torch, beside.dtype))
    masks.verify(plain_parameters(model))
    require_finite(model.named_parameters())
    weights = InMemory(model) if beside.location is None else in_memory(model, beside.location)
    found = FoundModel.without_matrices(weights)
    names = found.names
    proven = prove_replay(found, probe.to(input_device(model)))
    edits = edits_of(masks, names)
    writer = CheckpointWriter(folder, [REST, *names], weights.total_bytes)
    try:
        for name in names:
            writer.write(name, weights.original_tensors(name))
        writer.write(REST, weights.rest_tensors(names))
        weights.write_companions(writer.partial, beside)
        write_text(writer.partial / CARD_FILE, card)
        edits.write(writer.partial, beside.source)
        writer.finish(check=lambda partial: verify_saved(partial, proven, edits))
    except Exception:
        writer.discard()  # the model is still in memory and in the training's states
        raise


def bring_to(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert the saved tensors to a dtype, in place.

    Buffers that are recomputed on loading keep their dtype: rotary frequencies in half precision would shift every position.
    """
    for tensor in _floating(model):
        tensor.data = tensor.data.to(dtype)


def round_to(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the saved tensors to a dtype but keep their own, so that the next measurement is of the model that is saved."""
    for tensor in _floating(model):
        tensor.data = tensor.data.to(dtype).to(tensor.dtype)


def _floating(model: torch.nn.Module) -> Iterator[Tensor]:
    """Return the saved floating-point tensors of a model, without copying."""
    return (tensor for tensor in model.state_dict(keep_vars=True).values() if tensor.is_floating_point())


def require_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise NumericalError, naming the first tensor that holds NaN or infinities."""
    for name, tensor in tensors:
        if not bool(torch.isfinite(tensor.detach()).all()):
            raise NumericalError(f"{name} is not finite any more", fix="Nothing was saved")


def edits_of(masks: Masks, blocks: Sequence[str]) -> Edits:
    """Return the masks as edits of the model's blocks; masks outside of blocks are listed under the last one."""
    found: dict[str, dict[str, str]] = {block: {} for block in blocks}
    for entry in masks.matrices:
        own = next((block for block in blocks if is_below(entry.matrix.name, block)), blocks[-1])
        found[own][entry.matrix.name] = entry.matrix.mask_checksum()
    return Edits.of_results(found)
