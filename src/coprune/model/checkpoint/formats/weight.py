"""A weight of a quantised checkpoint: stored tensors (codes, scales …) that form a matrix or a stack of matrices.

It can be decoded, encoded on its own grid, and cut without decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.words import Set
from coprune.model.checkpoint.formats.grids import Grid, Packing, Words
from coprune.model.kept_slices import KeptSlices

_STRETCH = 1 << 22
"""Approximate number of values decoded at a time."""
_LAST_BITS = 1e-6
"""Relative rounding error of float32 when a value is divided by its scale and multiplied again."""
CODES, SCALES, FACTOR, ZEROS, SHAPE = "codes", "scales", "factor", "zero points", "shape"
STACKED = (CODES, SCALES, ZEROS)
"""Parts that each matrix of a stack has for itself."""
Parts = Mapping[str, Tensor]
"""Stored tensors of a weight by role; those that are only copied, by name."""


@dataclass(frozen=True)
class Form:
    """Storage format of weights."""

    label: str
    grid: Grid
    packing: Packing
    exponents: bool = False
    """Whether scales are stored as exponents of two in one byte, with 127 for 1 (E8M0)."""
    divided: bool = False
    """Whether scales are divided by their common factor instead of multiplied."""
    transposed: bool = False
    """Whether the weight is stored transposed."""


@dataclass(frozen=True)
class Rounding:
    """The number of nonzero values that were rounded, and their error."""

    values: int = 0
    error: float = 0.0
    """Sum of squared differences."""
    energy: float = 0.0
    """Sum of squares of the values that were rounded."""

    @classmethod
    def between(cls, exact: Tensor, put: Tensor) -> Rounding:
        """Return the rounding between two tensors. exact: values before; put: after."""
        moved = (put - exact).abs() > _LAST_BITS * exact.abs()
        error, energy = (put - exact)[moved].double(), exact[moved].double()
        return cls(int(moved.sum()), float(error.square().sum()), float(energy.square().sum()))

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(self.values + other.values, self.error + other.error, self.energy + other.energy)


@dataclass(frozen=True)
class Weight:
    """A weight: its name in a dense checkpoint, and the names of its stored tensors.

    lead: length of the stack, None for one matrix. rows, columns: of a stored matrix. block: rows × columns that share one
    scale.
    """

    name: str
    form: Form
    rows: int
    columns: int
    block: tuple[int, int]
    lead: int | None = None
    parts: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        matrix = (self.columns, self.rows) if self.form.transposed else (self.rows, self.columns)
        return matrix if self.lead is None else (self.lead, *matrix)

    @property
    def label(self) -> str:
        """The format, what shares a scale, and in which steps rows and columns can be removed."""
        rows, columns = (min(self.block[0], self.rows), min(self.block[1], self.columns))
        whole = (rows == self.rows, columns == self.columns)
        of = {
            (True, True): "the matrix",
            (False, True): "a row" if rows == 1 else f"{rows} rows",
        }.get(whole, f"{columns} of a row" if rows == 1 else f"{rows} × {columns}")
        steps = [
            f"{axis} in blocks of {step}"
            for axis, step, all_of_it in zip(("rows", "columns"), (rows, columns), whole, strict=True)
            if step > 1 and not all_of_it
        ]
        return f"{self.form.label}, a scale for {of}" + (f"; {' and '.join(steps)} can go" if steps else "")

    def decode(self, stored: Parts, out: Tensor) -> Tensor:
        """Fill a tensor of the weight's shape with its values. Raises BadInput, naming a tensor, for NaN or infinite values."""
        self._require_sound(stored)
        for plane, target in zip(self._planes(stored), self._matrices(out), strict=True):
            for rows in self._stretches():
                values = self._values(plane, rows, self._codes(plane, rows))
                # The sum is NaN if a value is, and takes a tenth of the time of checking each.
                if not (bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())):
                    raise self._no_number(stored)
                target[rows] = values
        return out

    def encode(self, dense: Tensor, stored: Parts) -> tuple[dict[str, Tensor], Rounding]:
        """Round values to the weight's own grid.

        Unchanged values keep their code, zero gets the code of zero, and others the nearest code under the existing scale.

        Args:
            dense: the values, in the shape of the weight.
            stored: the parts that it was decoded from.

        Returns:
            The parts, with new codes, and the rounding.
        """
        found, rounding = dict(stored), Rounding()
        codes = stored[CODES].clone()
        grid, targets = self.form.grid, self._matrices(dense)
        planes = self._planes({**stored, CODES: codes})
        for plane, target in zip(planes, targets, strict=True):
            zeros = self._zeros(plane)
            for rows in self._stretches():
                before = self._codes(plane, rows)
                wanted = target[rows]
                same = self._values(plane, rows, before).to(dense.dtype) == wanted
                if bool(same.all()):
                    continue
                own = None if zeros is None else self._expanded(zeros, rows).expand_as(before)
                after, moved = torch.where(same, before, grid.zero(own)), ~same & (wanted != 0)
                if bool(moved.any()):
                    exact, scales = wanted[moved].float(), self._scales(plane, rows).expand_as(before)[moved]
                    zero = None if own is None else own[moved]
                    after[moved] = grid.nearest(exact / scales, zero)
                    put = grid.values(after[moved], zero) * scales
                    # A value that is on the grid up to the compute dtype's precision does not count as rounded.
                    rounding += Rounding.between(torch.where(put.to(dense.dtype) == wanted[moved], put, exact), put)
                plane[CODES][rows] = self.form.packing.pack(after)
        return found | {CODES: codes}, rounding

    def grid(self, stored: Parts) -> Callable[[Tensor, slice], Tensor]:
        """Return a function that rounds columns of a matrix to the values representable under its scales.

        stored: the parts of the weight.
        """
        every = slice(0, self.rows)
        scales, zeros = self._scales(stored, every), self._zeros(stored)
        zero = None if zeros is None else self._expanded(zeros, every)

        def nearest(values: Tensor, columns: slice) -> Tensor:
            scale = scales[:, columns] if scales.shape[1] > 1 else scales
            own = None if zero is None else (zero[:, columns] if zero.shape[1] > 1 else zero).expand_as(values)
            codes = self.form.grid.nearest(values / scale, own)
            return (self.form.grid.values(codes, own) * scale).masked_fill(values == 0, 0.0)

        return nearest

    def cut(self, stored: Parts, kept: KeptSlices) -> dict[str, Tensor]:
        """Cut a weight's codes and scales.

        Args:
            stored: its parts.
            kept: slices of the dense weight.

        Raises:
            UnsupportedModel: the cut runs through values that share a scale.
        """
        axis, indices = self._axis(kept), _indices(kept)
        if axis is None:
            stacked = [role for role in STACKED if role in stored]
            cut = {role: stored[role].index_select(0, indices[0]).contiguous() for role in stacked}
            return dict(stored) | cut | self._shaped(stored, 0, len(indices[0]))
        planes = [*self._planes(stored)]
        each = indices * len(planes) if len(indices) == 1 else indices
        own = [self._cut(plane, axis, left) for plane, left in zip(planes, each, strict=True)]
        if self.lead is None:
            return own[0]
        roles = [role for role in STACKED if role in stored]
        whole = {role: torch.stack([plane[role] for plane in own]) for role in roles}
        return dict(stored) | whole | self._shaped(stored, axis + 1, len(each[0]))

    def require_cut(self, kept: KeptSlices) -> None:
        """Raise UnsupportedModel where `cut` would."""
        axis = self._axis(kept)
        if axis is not None:
            for indices in _indices(kept):
                self._blocks_left(axis, indices)

    def _axis(self, kept: KeptSlices) -> int | None:
        """Return the cut axis of a stored matrix; None for the stack."""
        axis = kept.dim - (self.lead is not None)
        if axis < 0:
            return None
        return 1 - axis if self.form.transposed else axis

    def _cut(self, plane: Parts, axis: int, indices: Tensor) -> dict[str, Tensor]:
        found, packing = dict(plane), self.form.packing
        if axis == 0:
            found[CODES] = plane[CODES].index_select(0, indices)
        else:
            codes = packing.unpack(plane[CODES], self.columns).index_select(1, indices)
            found[CODES] = packing.pack(codes)
        blocks = self._blocks_left(axis, indices)
        if blocks is not None:
            found[SCALES] = _index(plane[SCALES], self._as_matrix(plane[SCALES]), axis, blocks)
            if ZEROS in plane:
                found[ZEROS] = self._cut_zeros(plane[ZEROS], axis, blocks)
        if self.lead is None:
            found |= self._shaped(plane, axis, len(indices))
        return {role: tensor.contiguous() for role, tensor in found.items()}

    def _shaped(self, stored: Parts, axis: int, size: int) -> dict[str, Tensor]:
        """Return the stored shape after a cut; it does not change if it lacks the axis (the stack)."""
        if SHAPE not in stored:
            return {}
        shape = stored[SHAPE].clone()
        place = axis - (2 if self.lead is None else 3)
        if -place <= len(shape):
            shape[place] = size
        return {SHAPE: shape}

    def _blocks_left(self, axis: int, indices: Tensor) -> Tensor | None:
        """Return the indices of the remaining scales along an axis; None if one scale spans it."""
        size, step = (self.rows, self.columns)[axis], self.block[axis]
        if step >= size:
            return None
        blocks = indices // step
        left = blocks[::step]
        if not torch.equal(left.repeat_interleave(step)[: len(blocks)], blocks):
            axes, how = ("rows", "columns")[axis], self.label.partition(";")[0]
            raise UnsupportedModel(
                f"{self.name} is stored as {how}, so {axes} can be removed in whole blocks of {step} only",
                fix=("write plain weights with ", Set("encoding", "dense")),
            )
        return left

    def _planes(self, stored: Parts) -> Iterator[dict[str, Tensor]]:
        """Yield views of the parts of every matrix of a stack."""
        if self.lead is None:
            yield dict(stored)
            return
        for index in range(self.lead):
            own = {role: stored[role][index] for role in STACKED if role in stored}
            yield {**stored, **own}

    def _matrices(self, dense: Tensor) -> Sequence[Tensor]:
        """Return views of the matrices of a dense weight as stored."""
        matrices = [dense] if self.lead is None else list(dense.unbind(0))
        return [matrix.T for matrix in matrices] if self.form.transposed else matrices

    def _stretches(self) -> Iterator[slice]:
        step = max(1, _STRETCH // max(1, self.columns))
        return (slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step))

    def _codes(self, plane: Parts, rows: slice) -> Tensor:
        return self.form.packing.unpack(plane[CODES][rows], self.columns)

    def _values(self, plane: Parts, rows: slice, codes: Tensor) -> Tensor:
        zeros = self._zeros(plane)
        own = None if zeros is None else self._expanded(zeros, rows)
        values, step = self.form.grid.values(codes, own).contiguous(), self.block[1]
        if self.columns % step:
            return values.mul_(self._scales(plane, rows))
        blocks = self._of_rows(self._factors(plane), rows)[..., None]
        return values.view(len(values), -1, step).mul_(blocks).view(values.shape)

    def _scales(self, plane: Parts, rows: slice) -> Tensor:
        """Return the scales of some rows, expanded to float32 per value."""
        return self._expanded(self._factors(plane), rows)

    def _factors(self, plane: Parts) -> Tensor:
        """Return each block's scale in float32."""
        scales = self._as_matrix(plane[SCALES])
        if self.form.exponents:
            exponents = scales.view(torch.uint8).float()
            found = torch.exp2(exponents - 127).masked_fill(exponents == 255, torch.nan)
        else:
            found = scales.float()
        if FACTOR in plane:
            factor = plane[FACTOR].float().reshape(())
            found = found / factor if self.form.divided else found * factor
        return found

    def _as_matrix(self, scales: Tensor) -> Tensor:
        return scales.reshape(-(-self.rows // self.block[0]), -(-self.columns // self.block[1]))

    def _expanded(self, scales: Tensor, rows: slice) -> Tensor:
        """Expand values per block to values per entry of some rows."""
        own = self._of_rows(scales, rows)
        return own if own.shape[1] == 1 else own.repeat_interleave(self.block[1], dim=1)[:, : self.columns]

    def _of_rows(self, scales: Tensor, rows: slice) -> Tensor:
        """Select the values of some rows, or the one that all rows share."""
        blocks = torch.arange(rows.start, rows.stop) // self.block[0]
        return scales if len(scales) == 1 else scales.index_select(0, blocks)

    def _zeros(self, plane: Parts) -> Tensor | None:
        """Return the codes of zero, one per block; None if all are the same."""
        if ZEROS not in plane:
            return None
        packed = self._zeros_unpacked(plane[ZEROS])
        return self.form.grid.coded(self._as_matrix(plane[ZEROS])) if packed is None else packed

    def _zeros_unpacked(self, stored: Tensor) -> Tensor | None:
        """Unpack zero points from words along the rows; None if they are not packed."""
        if not isinstance(self.form.packing, Words) or stored.dtype != torch.int32:
            return None
        return self.form.packing.unpack(stored.T.contiguous(), self.rows).T

    def _cut_zeros(self, stored: Tensor, axis: int, blocks: Tensor) -> Tensor:
        """Select the zero points of some blocks, stored as before."""
        packed = self._zeros_unpacked(stored)
        if packed is None:
            return _index(stored, self._as_matrix(stored), axis, blocks)
        return self.form.packing.pack(packed.index_select(axis, blocks).T.contiguous()).T

    def _require_sound(self, stored: Parts) -> None:
        """Raise BadInput for a stored shape or common factor that would silently decode to wrong values."""
        if FACTOR in stored and not bool(torch.isfinite(stored[FACTOR].float()).all()):
            raise self._damaged(FACTOR, "is NaN or infinite")
        if SHAPE in stored and stored[SHAPE].tolist()[-2:] != [self.rows, self.columns]:
            raise self._damaged(SHAPE, f"says {stored[SHAPE].tolist()}, but the codes are {self.rows} × {self.columns}")

    def _damaged(self, role: str, how: str) -> BadInput:
        return BadInput(f"{self.parts.get(role, self.name)} {how}", fix="fetch or save the checkpoint again")

    def _no_number(self, stored: Parts) -> BadInput:
        """Return the error about a NaN or infinite value, blaming the scales if they hold it."""
        scales = [self._scales(plane, slice(0, self.rows)) for plane in self._planes(stored)]
        role = CODES if all(bool(torch.isfinite(one).all()) for one in scales) else SCALES
        return self._damaged(role, f"holds {role} that are NaN or infinite")


def _indices(kept: KeptSlices) -> list[Tensor]:
    return [torch.cat([torch.arange(start, end) for start, end in one]) for one in kept.ranges]


def _index(like: Tensor, scales: Tensor, axis: int, blocks: Tensor) -> Tensor:
    """Select the scales of some blocks, keeping the number of dimensions. like: the stored scales."""
    left = scales.index_select(axis, blocks)
    return left if like.ndim == 2 else left.reshape(-1)
