"""Check that a GGUF file belongs to the same source model, and that the written file equals its plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from coprune.base.errors import BadInput, UnsupportedModel, VerificationError
from coprune.gguf_files.llama_cpp import LlamaCpp, has_llama_cpp, how_to_install
from coprune.gguf_files.metadata import Plan
from coprune.gguf_files.smaller import Exported, whole_tensors
from coprune.gguf_files.tensor_matching import Piece, distance
from coprune.model.checkpoint.deferred import held
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.checkpoint.locate import GgufFile
from coprune.model.checkpoint.mapped_gguf import decode

_SAME_SOURCE = 0.9
"""Minimum cosine between a matrix and the source's, which at least one matrix reaches even after pruning and training."""
STORED_ERROR = {
    "f32": 1e-2,
    "f16": 1e-2,
    "bf16": 1e-2,
    "q8_0": 2e-2,
    "q6_k": 5e-2,
    "q5_1": 0.1,
    "q5_0": 0.1,
    "q5_k": 0.1,
    "q4_1": 0.2,
    "q4_0": 0.2,
    "q4_k": 0.2,
}
"""Maximum relative error of a tensor by type, for a source that may have had sixteen bits."""
WORST_ERROR = 0.5
_TOLERANCE = STORED_ERROR | {"f32": 1e-5, "f16": 1e-3}  # some norms add and subtract 1, which rounds


def require_same_source(
    pieces: Mapping[str, Sequence[Piece]], reference: Mapping[str, Tensor], source: Exported, example: GgufFile
) -> None:
    """Raise BadInput if no matrix of the model resembles the one in the GGUF file that it is to replace."""
    if source.location == example:
        return
    best, names = 0.0, {piece.names[0] for own in pieces.values() for piece in own}
    for name in sorted(names, key=lambda name: reference[name].numel()):
        if reference[name].ndim < 2 or (read := source.read(name)) is None:
            continue
        tensor, mask = read
        if tensor.shape != reference[name].shape:
            raise BadInput(
                f"{name} is {'×'.join(map(str, tensor.shape))} in the model and {'×'.join(map(str, reference[name].shape))} in "
                f"{example.name}, and there is no record of what was removed",
                field="like",
                fix="name a GGUF file of the same shapes, or export the folder that coprune wrote",
            )
        before = held(reference[name]) if mask is None else reference[name] * mask
        best = max(best, float(torch.cosine_similarity(tensor.flatten(), before.flatten(), dim=0)))
    if best < _SAME_SOURCE:
        raise BadInput(
            f"{example.name} is of another model: no matrix has a cosine above {best:.2f} with the same one there",
            field="like",
            fix="name a GGUF file of the model that this one was made from",
        )


def require_same(file: Path, source: Exported, kind: str) -> str | None:
    """Load the written file with transformers and compare it with the model.

    Args:
        file: the written file.
        source: the model.
        kind: its storage type.

    Returns:
        A remark if only llama.cpp can read it back: for some architectures, transformers derives the width of a head from the
        number of heads.

    Raises:
        UnsupportedModel: no installed runtime can read it.
        VerificationError: its content differs.
    """
    try:
        written = whole_tensors(GgufFile(file, file.name))
    except BadInput as error:
        if not has_llama_cpp():
            raise UnsupportedModel(
                "transformers cannot read the file back, and llama.cpp is not installed to try it",
                fix=how_to_install(),
            ) from error
        if not _loads(file):
            raise UnsupportedModel(
                "no installed runtime can load the file: a GGUF file of this architecture cannot express what was removed"
            ) from error
        return f"llama.cpp can load it, but its values were not compared, since {error.cause}"
    for name, found in written.items():
        expected = source.tensor(name)
        if expected.shape != found.shape:
            raise VerificationError(f"{name} in {file} differs from the model's")
        _require_close(file, name, (held(found), expected), kind)
    return None


def require_written(file: Path, plan: Plan, values: Callable[[str], Tensor]) -> None:
    """Compare a written file with its plan, tensor by tensor.

    Args:
        file: the file.
        plan: its planned content.
        values: returns a tensor in float32 by its name in the source file.

    Raises:
        VerificationError: it differs.
    """
    stored = {one.name: one for one in gguf_reader(file, field="output").tensors}
    for name, planned in plan.tensors.items():
        _require_close(file, name, (decode(stored[name]), values(planned.source)), planned.kind)


def _require_close(file: Path, name: str, pair: tuple[Tensor, Tensor], kind: str) -> None:
    """Raise VerificationError if a written tensor differs too much from the planned one. pair: the two."""
    found, expected = pair
    if expected.numel() != found.numel():
        raise VerificationError(f"{name} in {file} differs from the model's")
    off = distance(found.flatten(), expected.flatten()) / float(expected.norm().clamp_min(1e-30))
    if not off <= _TOLERANCE[kind]:
        raise VerificationError(f"{name} has a relative error of {off:.2g} in {file}, more than {kind} explains")


def _loads(file: Path) -> bool:
    try:
        LlamaCpp(file, context=8).close()
    except BadInput:
        return False
    return True
