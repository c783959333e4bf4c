"""Pairs of what an encoder reads and what a decoder writes, in step, as one tensor."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class Pairs(Tensor):
    """Tokens that a decoder reads (N × T int64), with what its encoder reads for each: token ids or audio features.

    Rows that are taken, split or moved take what the encoder reads with them; whatever else is computed is of the tokens alone.
    """

    source: Tensor
    """N × S int64, or N × features floating."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(source: Tensor, tokens: Tensor) -> Pairs:
        """Join what the encoder reads with the decoder's tokens. Both have one row, or more, for every sample."""
        found = cast(Pairs, tokens.as_subclass(Pairs))
        found.source = source
        return found

    @property
    def written(self) -> Tensor:
        """The decoder's tokens alone."""
        return self.as_subclass(Tensor)

    def __getitem__(self, rows: Any) -> Any:
        taken = self.written[rows]
        if isinstance(rows, tuple):  # rows, and positions of the tokens
            rows = rows[0]
        return Pairs.of(self.source[rows], taken) if taken.ndim == self.ndim else taken

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move both. As `Tensor.to`, to a device."""
        return Pairs.of(self.source.to(*args, **kwargs), self.written.to(*args, **kwargs))

    def split(self, size: Any, dim: int = 0) -> Any:
        """Split into parts of some rows."""
        parts = zip(self.source.split(size), self.written.split(size), strict=True)
        return tuple(Pairs.of(source, tokens) for source, tokens in parts)

    def __iter__(self) -> Any:
        return iter(self.written)
