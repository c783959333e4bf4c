"""What packing did to the size of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from coprune.base.shown import Sheet, Shown
from coprune.base.words import Set, say
from coprune.packed.format import negative_zeros


@dataclass(repr=False)
class Sizes(Shown):
    """Bytes of a checkpoint's tensors, dense and packed."""

    folder: Path
    """Of the packed checkpoint."""
    dense: int = 0
    packed: int = 0
    bytes_before: int = 0
    """Dense bytes of those tensors that were packed."""
    bytes_after: int = 0
    """Packed bytes of the same tensors."""
    negative_zeros: int = 0
    """−0.0 found in matrices. Stored as values, they make a checkpoint larger than its zeros would suggest."""
    drops_negative_zeros: bool = False
    names: list[str] = field(default_factory=list)
    """The tensors that were packed."""

    def count(self, name: str, tensor: Tensor, packed: Tensor | None) -> None:
        """Add a dense tensor, and what it was packed into; None where it stayed as it was."""
        if tensor.ndim >= 2 and tensor.is_floating_point():
            self.negative_zeros += int(negative_zeros(tensor).sum())
        dense = tensor.numel() * tensor.dtype.itemsize
        self.dense += dense
        if packed is not None:
            self.names.append(name)
            self.bytes_before += dense
            self.bytes_after += packed.numel()

    @property
    def ratio(self) -> float:
        """Packed over dense bytes."""
        return self.packed / max(self.dense, 1)

    def headline(self) -> str:
        """Where the checkpoint is, and its size."""
        return f"{self.folder}: {self.packed:,} bytes, {self.ratio:.3f} of dense"

    def sheet(self) -> Sheet:
        """Bytes before and after."""
        rows = [
            ("packed", f"{len(self.names)} tensors, {self.bytes_before:,} → {self.bytes_after:,} bytes"),
            ("in all", f"{self.dense:,} → {self.packed:,} bytes ({self.ratio:.3f}) in {self.folder}"),
        ]
        if self.negative_zeros and not self.drops_negative_zeros:
            smaller = say((Set("drop_negative_zeros", True), " makes it smaller"))
            rows.append(("note", f"{self.negative_zeros:,} weights are -0.0 and kept; {smaller}"))
        return Sheet(self.headline(), rows)
