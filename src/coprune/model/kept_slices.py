"""The kept slices of a tensor as data, to cut it and to restore removed slices as zeros."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor


class KeptSlices(BaseModel):
    """Kept slices of a tensor along one of its dimensions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int
    size: int
    """Size of the source tensor along that dimension."""
    ranges: list[list[tuple[int, int]]]
    """First and last + 1 of every run of kept slices: one list, or one per entry of the first dimension (experts), all of
    which keep the same number."""

    def _indices(self, tensor: Tensor) -> Tensor:
        rows = [torch.cat([torch.arange(start, end) for start, end in one]) for one in self.ranges]
        return torch.stack(rows).to(tensor.device)

    def cut(self, tensor: Tensor) -> Tensor:
        """Return the kept slices of a tensor."""
        indices = self._indices(tensor)
        if len(self.ranges) == 1:
            return tensor.index_select(self.dim, indices[0]).contiguous()
        return torch.stack([part.index_select(self.dim - 1, own) for part, own in zip(tensor, indices, strict=True)])

    def uncut(self, tensor: Tensor) -> Tensor:
        """Return the tensor at full size, with zeros in place of removed slices."""
        whole = tensor.new_zeros([*tensor.shape[: self.dim], self.size, *tensor.shape[self.dim + 1 :]])
        indices = self._indices(tensor)
        if len(self.ranges) == 1:
            return whole.index_copy_(self.dim, indices[0], tensor)
        for part, own, kept in zip(whole, indices, tensor, strict=True):
            part.index_copy_(self.dim - 1, own, kept)
        return whole


def runs_of(keep: Tensor) -> list[tuple[int, int]]:
    """Return the start and end of every run of kept entries. keep: bool."""
    edges = torch.diff(keep.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32))
    starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return list(zip(starts, ends, strict=True))
