"""Verify a saved checkpoint: reload it from disk and compare its masks and logits with the run's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from coprune.base.errors import VerificationError
from coprune.base.reading import to_host
from coprune.model.checkpoint.lazy import LazyCheckpoint
from coprune.model.checkpoint.locate import ModelFolder, check_folder
from coprune.model.edit import Configure, KeepExperts
from coprune.model.edits import Edits
from coprune.model.matrices import checksum_of, find_matrices, mask_bits
from coprune.model.routing import Ties
from coprune.model.walk.block_calls import input_device
from coprune.model.walk.model_structure import FoundModel, ProvenModel
from coprune.model.walk.walk import streamed_logits

COMPARED_TOKENS = 64
"""Number of tokens of a text whose logits are compared."""


def verify_saved(folder: Path, model: ProvenModel, edits: Edits) -> None:
    """Reload a saved folder, block by block, and compare every mask and the logits of one sample.

    Args:
        folder: the complete checkpoint.
        model: the pruned model that was saved, with the edits applied.
        edits: its edits.

    Raises:
        VerificationError: something differs; names the first difference.
    """
    location = check_folder(ModelFolder(folder, str(folder)))
    checksums, device = edits.checksums(), input_device(model.module)
    saved = LazyCheckpoint(location, device=device, experts_apart=not checksums)
    found = FoundModel.without_matrices(saved)
    saved.acquire_rest(found.names)
    for block in found.blocks:
        saved.acquire(block.name)
        matrices = [matrix for matrix in find_matrices(block.module, block.name) if matrix.name in checksums]
        # One copy from the device for all masks of a block.
        for matrix, bits in zip(matrices, to_host(*(mask_bits(m.stored()) for m in matrices)), strict=True):
            if bits is None or checksum_of(bits) != checksums[matrix.name]:
                raise VerificationError(f"the mask of {matrix.name} in {folder} differs from the run's")
        saved.release(block.name)
    if model.weights.streams and not edits.removals():
        # The run's own last files became this folder, so there are no other weights to compute logits from. If parts were
        # removed, these files are read as the large model with zeros.
        return
    kept = {name: e.experts for name, own in edits.by_block.items() for e in own if isinstance(e, KeepExperts)}
    ties, places = Ties(kept, model.module.dtype), {edits.place(block.name): block.name for block in model.blocks}
    with ties.noted({block.name: block.module for block in model.blocks}):
        before = _sample_logits(model)
    left, structure = [b.index for b in model.blocks if edits.place(b.name) is not None], model.structure
    there = [block for block in found.blocks if block.name in places]
    blocks = [replace(block, index=index) for index, block in enumerate(there)]
    answers, handed = [structure.answers[index] for index in left], [structure.handed[index] for index in left]
    with ties.followed({places[block.name]: block.module for block in blocks}):
        after = _sample_logits(
            ProvenModel(saved, blocks, found.chosen, replace(structure, answers=answers, handed=handed))
        )
    worst, largest = float((before - after).abs().max()), float(before.abs().max())
    # A tensor's alignment can change the order of additions, and so the last bits; leaving out zero channels changes more of
    # them. In half precision single logits may be off by some per cent, so all are compared at once: on SmolLM2, rounding gave
    # 1.5 %, one block's channels in a wrong order 7 to 120 %.
    cut, exact = any(isinstance(edit, Configure) for edit in edits.all()), model.module.dtype == torch.float32
    if cut and not exact:
        agrees = float((before - after).norm()) <= 4e-2 * float(before.norm())
    else:
        agrees = worst <= largest * (2e-2 if not exact else 3e-4 if cut else 32 * torch.finfo(torch.float32).eps)
    if not agrees:
        raise VerificationError(
            f"the logits of the model in {folder} differ from the pruned model's by up to {worst:g}"
        )


def _sample_logits(model: ProvenModel) -> Tensor:
    # Images are compared whole.
    sample = model.structure.sample
    sample = (sample if sample.ndim > 2 else sample[:, :COMPARED_TOKENS]).to(input_device(model.module))
    return streamed_logits(model, [sample], lambda logits, _: logits.to(torch.float32))[0]
