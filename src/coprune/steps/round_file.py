"""Rounding of a quantised GGUF file's matrices again, with compensation, in the file's types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.base.progress import Reporter
from coprune.gguf_files.importance import TextWalk, read_text
from coprune.model.checkpoint.formats.block_types import BLOCK_TYPES
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.checkpoint.locate import Location
from coprune.model.checkpoint.mapped_gguf import decode_into
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
Arranged = Callable[[Mapping[str, Tensor]], Iterator[tuple[str, Tensor]]]
"""Yields the tensors of a file, by their names in it, from values by the checkpoint's names."""


@dataclass(frozen=True)
class _Part:
    """Rows of a file's tensor, with the rows and columns of the matrix that they hold."""

    stored: Any
    """The tensor in gguf's reader."""
    places: Tensor
    """The rows of the tensor, int64."""
    rows: Tensor
    """The matrix's row for each of these rows."""
    columns: Tensor
    """The matrix's column for each of the tensor's columns."""

    def read(self) -> Tensor:
        """Return its values in the file, float32."""
        data = self.stored.data.reshape(-1, self.stored.data.shape[-1])[self.places.numpy()]
        values = torch.empty(len(self.places), len(self.columns))
        decode_into(self.stored, data, values)
        return values

    def write(self, file: Path, stored: Tensor) -> None:
        """Replace its bytes in the file. stored: rows × bytes uint8."""
        size = int(self.stored.n_bytes)
        held = np.memmap(file, np.uint8, mode="r+", offset=int(self.stored.data_offset), shape=(size,))
        held.reshape(-1, stored.shape[1])[self.places.numpy()] = stored.numpy()
        held.flush()

    def round(self, weight: Tensor, statistic: Statistic | None) -> Rounded | None:
        """Round this part of a matrix; None if its type is left to the quantiser or its inputs are unknown."""
        kind = BLOCK_TYPES.get(self.stored.tensor_type.name.lower())
        if kind is None or not isinstance(statistic, Gram):
            return None
        loss = statistic.remember(("loss", tuple(self.columns.tolist())), lambda: _loss(statistic.gram, self.columns))
        return round_columns(weight[self.rows][:, self.columns], loss, kind)


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
    parts = _parts(text, stored, arranged)
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


def _round_matrix(file: Path, matrix: Matrix, inputs: Inputs | None, parts: Sequence[_Part]) -> set[str]:
    """Round all parts of a matrix in a file; return the names of the tensors."""
    if not parts:
        return set()
    statistic, _ = usable_statistic(inputs)
    weight, found = matrix.read(), set()
    for part in parts:
        try:
            made = part.round(weight, statistic)
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


def _parts(text: TextWalk, stored: Mapping[str, Any], arranged: Arranged) -> dict[str, list[_Part]]:
    """Locate each matrix in a file, by name, by arranging tensors of matrix, row and column numbers."""
    matrices = [*text.chosen.all()]
    numbers = {matrix.name: torch.tensor([[float(number)]]) for number, matrix in enumerate(matrices)}
    every = torch.arange(max((max(matrix.shape) for matrix in matrices), default=0), dtype=torch.float32)
    owners = _by_row(arranged(text.by_name(lambda matrix: numbers[matrix.name])))
    rows = _by_row(arranged(text.by_name(lambda matrix: every[: matrix.shape[0], None])))
    found: dict[str, list[_Part]] = {}
    for name, tensor in arranged(text.by_name(lambda matrix: every[None, : matrix.shape[1]])):
        columns, one, own = tensor.reshape(-1, tensor.shape[-1]), owners.get(name), rows.get(name)
        if one is None or own is None or not bool(columns.isfinite().all()):
            continue
        for number in one.unique().tolist():
            places = (one == number).nonzero().flatten()
            first = columns[places[0]]
            if bool((columns[places] == first).all()):
                part = _Part(stored[name], places, own[places].long(), first.long())
                found.setdefault(matrices[int(number)].name, []).append(part)
    return found


def _by_row(arranged: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the value of each row of the tensors whose rows hold one value each, by name."""
    found = {}
    for name, tensor in arranged:
        flat = tensor.reshape(-1, tensor.shape[-1])
        if bool((flat == flat[:, :1]).all()):  # NaN is not
            found[name] = flat[:, 0].clone()
    return found
