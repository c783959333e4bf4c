"""Expert matrices that stay in their files until they are multiplied, one at a time.

The parameter of a layer's experts is a lazy tensor that knows where its matrices lie. Splitting and joining it (transformers
does both, between a checkpoint's layout and its own) only rearranges these locations; computing with it reads and decodes
the matrices in use, and frees them afterwards. Such a tensor is read-only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from coprune.model.checkpoint.shards import DTYPES, TensorEntry, read_tensor

aten: Any = torch.ops.aten


@dataclass(frozen=True, eq=False)
class InFile:
    """A matrix in a file."""

    entry: TensorEntry
    dtype: torch.dtype
    finish: Callable[[Tensor], Tensor] | None = None
    """Applied after reading."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def cast(self, dtype: torch.dtype) -> InFile | None:
        """Return a copy with another dtype; None if that would round twice."""
        return replace(self, dtype=dtype) if self.dtype in (dtype, DTYPES[self.entry.dtype]) else None

    def read_into(self, out: Tensor) -> None:
        """Fill a tensor of the same shape."""

        def buffer(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            direct = dtype == out.dtype and out.is_contiguous() and self.finish is None
            return out if direct else torch.empty(shape, dtype=dtype)

        found = read_tensor(self.entry, buffer)
        if found is not out:
            out.copy_(found if self.finish is None else self.finish(found))


@dataclass(frozen=True, eq=False)
class Part:
    """A range of rows (0) or columns (1) of a matrix, which is read whole for it."""

    whole: InFile
    dim: int
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.whole.shape
        return (self.end - self.start, columns) if self.dim == 0 else (rows, self.end - self.start)

    def cast(self, dtype: torch.dtype) -> Part | None:
        """Return a copy with another dtype; None if that would round twice."""
        cast = self.whole.cast(dtype)
        return None if cast is None else replace(self, whole=cast)

    def read_into(self, out: Tensor) -> None:
        """Fill a tensor of the same shape."""
        whole = torch.empty(self.whole.shape, dtype=self.dtype)
        self.whole.read_into(whole)
        out.copy_(whole.narrow(self.dim, self.start, self.end - self.start))


@dataclass(frozen=True, eq=False)
class Filled:
    """A matrix of identical rows, columns or entries, such as the mask of a whole expert."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    value: Tensor
    """Two-dimensional, with size 1 along axes that repeat."""

    def cast(self, dtype: torch.dtype) -> Filled:
        """Return a copy with another dtype."""
        return replace(self, dtype=dtype)

    def read_into(self, out: Tensor) -> None:
        """Fill a tensor of the same shape."""
        out.copy_(self.value)


@dataclass(frozen=True, eq=False)
class Joined:
    """Matrices concatenated along rows (0) or columns (1)."""

    parts: tuple[InFile | Part | Filled, ...]
    dim: int

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first = [*self.parts[0].shape]
        first[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(first)

    def cast(self, dtype: torch.dtype) -> Joined | None:
        """Return a copy with another dtype; None if that would round a matrix twice."""
        cast = [part.cast(dtype) for part in self.parts]
        return replace(self, parts=tuple(one for one in cast if one is not None)) if None not in cast else None

    def read_into(self, out: Tensor) -> None:
        """Fill a tensor of the same shape."""
        for part, own in zip(
            self.parts, out.split([part.shape[self.dim] for part in self.parts], self.dim), strict=True
        ):
            part.read_into(own)


_Piece: TypeAlias = InFile | Part | Filled
_Matrix: TypeAlias = _Piece | Joined


@dataclass(frozen=True, eq=False)
class Stack:
    """Matrices of one shape, stacked to a three-dimensional tensor."""

    parts: tuple[_Matrix, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    def cast(self, dtype: torch.dtype) -> Stack | None:
        """Return a copy with another dtype; None if that would round a matrix twice."""
        cast = [part.cast(dtype) for part in self.parts]
        return Stack(tuple(one for one in cast if one is not None)) if None not in cast else None

    def read_into(self, out: Tensor) -> None:
        """Fill a tensor of the same shape."""
        for part, own in zip(self.parts, out, strict=True):
            part.read_into(own)


_Place: TypeAlias = _Matrix | Stack


class Deferred(Tensor):
    """A tensor that is read when an operation needs its values."""

    place: _Place

    @staticmethod
    def __new__(cls, place: _Place) -> Deferred:
        made: Deferred = torch.Tensor._make_wrapper_subclass(
            cls, place.shape, dtype=place.dtype, device=torch.device("cpu")
        )
        made.place = place
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if (moved := _MOVES.get(func)) is not None and (places := moved(*args, **kwargs)) is not None:
            return [Deferred(place) for place in places] if isinstance(places, list) else Deferred(places)
        if func in _LIKE:
            like = torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
            return func(
                like, *args[1:], **{"device": torch.device("cpu"), **{k: v for k, v in kwargs.items() if v is not None}}
            )
        for given, argument in zip(args, func._schema.arguments, strict=False):
            if isinstance(given, Deferred) and argument.alias_info is not None and argument.alias_info.is_write:
                raise TypeError(f"{func} would change a matrix that stays in its file")
        return func(*tree_map(held, args), **tree_map(held, kwargs))


def deferred(entry: TensorEntry, finish: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
    """Return a deferred matrix or stack of matrices; None for a tensor of another shape.

    Args:
        entry: its location.
        finish: applied after reading.
    """
    dtype = DTYPES[entry.dtype]
    if len(entry.shape) == 2:
        return Deferred(InFile(entry, dtype, finish))
    own = [entry.at(index) for index in range(entry.shape[0])] if len(entry.shape) == 3 else []
    parts = [InFile(one, dtype) for one in own if one is not None]
    if not parts or len(parts) < len(own):
        return None
    if finish is not None:  # it may reorder the matrices, and fill in zeros
        numbers = finish(torch.arange(1, len(parts) + 1).view(-1, 1, 1)).flatten().tolist()
        nothing = replace(parts[0], finish=torch.zeros_like)
        parts = [parts[number - 1] if number else nothing for number in numbers]
    return Deferred(Stack(tuple(parts)))


def filled(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a float32 matrix or stack that repeats values without taking memory for the copies.

    Args:
        values: with as many dimensions as the result, and size 1 along those that repeat.
        shape: of the result.
    """
    if len(shape) == 3:
        return torch.stack([filled(value, shape[1:]) for value in values.expand(shape[0], -1, -1)])
    return Deferred(Filled((*shape,), torch.float32, values))


def values_of(tensor: Tensor) -> list[float] | None:
    """Return the constant value of each matrix of a stack, or of one matrix; None if one is not known to be constant."""
    place = tensor.place if isinstance(tensor, Deferred) else None
    parts = place.parts if isinstance(place, Stack) else [place]
    found = [part.value.item() for part in parts if isinstance(part, Filled) and part.value.numel() == 1]
    return found if len(found) == len(parts) else None


def untouched(tensor: Tensor, entry: TensorEntry) -> bool:
    """Return whether a tensor is still the unread content of an entry."""
    place = tensor.place if isinstance(tensor, Deferred) else None
    if isinstance(place, InFile):
        return place.entry == entry
    return (
        isinstance(place, Stack)
        and place.shape == entry.shape
        and all(isinstance(part, InFile) and part.entry == entry.at(index) for index, part in enumerate(place.parts))
    )


def address_of(tensor: Tensor) -> int:
    """Return a number that a tensor shares with full views of it, valid while they live."""
    return id(tensor.place) if isinstance(tensor, Deferred) else tensor.data_ptr()


def held(value: Any) -> Any:
    """Read a deferred tensor into memory; return anything else unchanged."""
    if not isinstance(value, Deferred):
        return value
    out = torch.empty(value.shape, dtype=value.dtype)
    value.place.read_into(out)
    return out


def _same(tensor: Deferred) -> _Place:
    return tensor.place


def _select(tensor: Deferred, dim: int, index: int) -> _Place | None:
    return tensor.place.parts[index] if isinstance(tensor.place, Stack) and dim in (0, -3) else None


def _squeeze(tensor: Deferred, dim: int) -> _Place | None:
    return _select(tensor, dim, 0) if tensor.shape[dim] == 1 else None


def _narrow(place: _Place, dim: int, start: int, end: int) -> Any:
    """Return a slice along a dimension; None if it cuts through matrices."""
    dim %= len(place.shape)
    if (start, end) == (0, place.shape[dim]):
        return place
    if isinstance(place, Stack) and dim == 0:
        return Stack(place.parts[start:end])
    if isinstance(place, Stack):
        parts = [_narrow(part, dim - 1, start, end) for part in place.parts]
        return Stack(tuple(parts)) if None not in parts else None
    if isinstance(place, InFile):
        return Part(place, dim, start, end)
    if isinstance(place, Filled):
        shape = tuple(end - start if d == dim else size for d, size in enumerate(place.shape))
        value = place.value.narrow(dim, start, end - start) if place.value.shape[dim] > 1 else place.value
        return replace(place, shape=shape, value=value)
    if isinstance(place, Joined) and place.dim == dim:
        ends = [0, *accumulate(part.shape[dim] for part in place.parts)]
        if start in ends and end in ends:
            own = place.parts[ends.index(start) : ends.index(end)]
            return own[0] if len(own) == 1 else Joined(own, dim)
    return None


def _slice(tensor: Deferred, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    size = tensor.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    return _narrow(tensor.place, dim, first, last) if step == 1 and first < last else None


def _split_sizes(tensor: Deferred, sizes: Sequence[int], dim: int = 0) -> list[Any] | None:
    ends = [0, *accumulate(sizes)]
    parts = [_narrow(tensor.place, dim, start, end) for start, end in pairwise(ends)]
    return parts if None not in parts else None


def _split(tensor: Deferred, size: int, dim: int = 0) -> list[Any] | None:
    length = tensor.shape[dim]
    return _split_sizes(tensor, [min(size, length - start) for start in range(0, length, size)], dim)


def _unbind(tensor: Deferred, dim: int = 0) -> list[Any] | None:
    return [*tensor.place.parts] if isinstance(tensor.place, Stack) and dim == 0 else None


def _index_select(tensor: Deferred, dim: int, index: Tensor) -> Any:
    if not isinstance(tensor.place, Stack) or dim != 0:
        return None
    return Stack(tuple(tensor.place.parts[number] for number in index.tolist()))


def _index(tensor: Any, indices: Sequence[Tensor | None]) -> Any:
    (first, *others) = indices
    if not isinstance(tensor, Deferred) or others or first is None or first.ndim != 1:
        return None
    return _index_select(tensor, 0, first.nonzero().flatten() if first.dtype == torch.bool else first)


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    places = [getattr(tensor, "place", None) for tensor in tensors]
    matrices = all(isinstance(place, _Matrix) for place in places)
    return Stack(tuple(places)) if matrices and dim == 0 else None  # type: ignore[arg-type]


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    dim %= tensors[0].ndim
    places: list[Any] = [getattr(tensor, "place", None) for tensor in tensors]
    if all(isinstance(place, _Piece) for place in places):
        return _joined(tuple(places), dim)
    if not all(isinstance(place, Stack) for place in places):
        return None
    if dim == 0:
        return Stack(tuple(part for place in places for part in place.parts))
    rows = [*zip(*(place.parts for place in places), strict=True)]
    pieces = all(isinstance(part, _Piece) for row in rows for part in row)
    return Stack(tuple(_joined(row, dim - 1) for row in rows)) if pieces else None


def _joined(pieces: tuple[_Piece, ...], dim: int) -> _Matrix:
    """Join matrices; if they are all parts of one matrix, return that matrix."""
    parts = [piece for piece in pieces if isinstance(piece, Part) and piece.dim == dim]
    if len(parts) == len(pieces) and len({(part.whole.entry, part.dtype) for part in parts}) == 1:
        ends = [0, *(part.end for part in parts)]
        if [part.start for part in parts] == ends[:-1] and ends[-1] == parts[0].whole.shape[dim]:
            return parts[0].whole
    return Joined(pieces, dim)


def _to_copy(tensor: Deferred, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Any:
    here = device is None or torch.device(device).type == "cpu"
    return tensor.place.cast(dtype or tensor.dtype) if here else None


_MOVES: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.select.int: _select,
    aten.squeeze.dim: _squeeze,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_sizes,
    aten.unbind.int: _unbind,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.stack.default: _stack,
    aten.cat.default: _cat,
    aten._to_copy.default: _to_copy,
}
"""Functions that split or join tensors: they return locations, or None if values have to be read."""
_LIKE = (aten.empty_like.default, aten.new_empty.default, aten.new_zeros.default, aten.zeros_like.default)
"""Functions that read only the shape of a tensor."""
