"""Rounding of a quantised GGUF file's matrices again, with compensation, in the file's types."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.base.progress import Reporter
from coprune.gguf_files.importance import read_text
from coprune.gguf_files.matrix_rows import Arranged, Part, parts_in_file
from coprune.model.checkpoint.formats.block_types import BLOCK_TYPES
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.checkpoint.locate import Location
from coprune.model.matrices import Matrix
from coprune.model.walk.block_events import MatricesReady
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.recording import BY_BLOCK, Sequential
from coprune.model.walk.statistics import Gram, Statistic
from coprune.pruning.linear_algebra import factor_inverse, unless_all_zero
from coprune.pruning.pruner import usable_statistic
from coprune.pruning.rounding import Loss, Rounded, round_columns

_DAMPING = 0.01
"""Added to the Gram matrix's diagonal, as a fraction of its mean."""
_EXACT = ("F32", "F16", "BF16")
_SHOWN = 3
"""Maximum number of names listed."""


def _rounded(part: Part, weight: Tensor, statistic: Statistic | None) -> Rounded | None:
    """Round a part of a matrix; None if its type is left to the quantiser or its inputs are unknown."""
    kind = BLOCK_TYPES.get(part.stored.tensor_type.name.lower())
    if kind is None or not isinstance(statistic, Gram):
        return None
    loss = statistic.remember(("loss", tuple(part.columns.tolist())), lambda: _loss(statistic.gram, part.columns))
    return round_columns(weight[part.rows][:, part.columns], loss, kind)


def _loss(gram: Tensor, columns: Tensor) -> Loss:
    own = gram if torch.equal(columns, torch.arange(len(gram))) else gram[columns][:, columns]
    factor, diagonal = factor_inverse(own, _DAMPING), own.diagonal()
    diagonal.add_(_DAMPING * unless_all_zero(diagonal).mean())
    return Loss(own, factor, diagonal / diagonal.mean())


@torch.no_grad()
def round_file(file: Path, location: Location, data: str | Tensor, arranged: Arranged, reporter: Reporter) -> None:
    """Round the matrices of a file's blocks again in place, each on the inputs that the rounded ones before it produce.

    Tensors of types outside `BLOCK_TYPES`, or outside the blocks' matrices, stay as they are.

    Args:
        file: a quantised file of the model.
        location: the model.
        data: calibration text, or samples of token ids (N × S).
        arranged: makes the file's tensors.
        reporter: shows progress and reports what stayed.

    Raises:
        BadInput: the text cannot be read.
        UnsupportedModel: the model cannot be walked.
        NumericalError: a matrix cannot be factorised; the message names it.
    """
    text = read_text(location, data, "float32")
    stored = {one.name: one for one in gguf_reader(file, field="output").tensors}
    parts = parts_in_file([*text.chosen.all()], text.by_name, stored, arranged)
    moves = BY_BLOCK if text.proven.structure.reused else Sequential()
    rounded: set[str] = set()
    with reporter.bar("Rounding with compensation", len(text.proven.blocks)) as advance:
        for event in text.walk(Gram, moves, advance):
            if isinstance(event, MatricesReady):
                for matrix in event.matrices:
                    rounded |= _round_matrix(file, matrix, event.inputs, parts.get(matrix.name, ()))
    left = [name for name, one in stored.items() if name not in rounded and one.tensor_type.name not in _EXACT]
    reporter.say(
        f"{len(rounded)} matrices are rounded with compensation, {len(left)} as the quantiser does{_listed(left)}"
    )


def _round_matrix(file: Path, matrix: Matrix, inputs: Inputs | None, parts: Sequence[Part]) -> set[str]:
    """Round all parts of a matrix in a file; return the names of the tensors."""
    if not parts:
        return set()
    statistic, _ = usable_statistic(inputs)
    weight, found = matrix.read(), set()
    for part in parts:
        try:
            made = _rounded(part, weight, statistic)
        except NumericalError as error:
            raise error.within(matrix.name) from error
        if made is not None:
            part.write(file, made.stored)
            found.add(part.stored.name)
        weight[part.rows[:, None], part.columns] = part.read() if made is None else made.values
    matrix.write(weight)
    return found


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
    return f" ({shown})" if names else ""
