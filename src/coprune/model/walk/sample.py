"""A few rows of what a matrix is multiplied with, to measure layer errors on."""

from __future__ import annotations

import torch
from torch import Tensor

from coprune.base.precision import total
from coprune.base.processes import Processes


class InputSample:
    """A few of a matrix's input tokens, evenly spaced over every batch, to measure layer errors on.

    A Gram matrix would give the error exactly but costs as much as the products themselves; for methods that do not
    need one, the error on about a thousand tokens is within a few per cent of it at a fiftieth of the cost.
    """

    tokens = 1024

    def __init__(self, width: int, batches: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        self._device = device
        self._per_batch = max(1, -(-self.tokens // max(batches, 1)))
        self._rows: list[Tensor] = []
        self.count = 0  # tokens seen, not kept

    def update(self, x: Tensor, kept: int | None = None) -> None:
        """Keep some rows of a batch of inputs (T × I, any leading dimensions). kept: how many at most; None for as many as of
        every other batch."""
        kept = self._per_batch if kept is None else kept
        x_TI = x.reshape(-1, self.width)
        self.count += x_TI.shape[0]
        step = max(1, x_TI.shape[0] // kept)
        self._rows.append(x_TI[step // 2 :: step][:kept].to(torch.float32, copy=True))

    def reduce(self, processes: Processes, needed: bool) -> None:
        """Put in place what the samples of all processes hold together; needed: whether its rows are, or only the count."""
        if needed:
            self.restore(*processes.gather_rows(self.inputs, self.count, self.tokens))
        else:
            self.count = sum(processes.gather(self.count))

    def restore(self, inputs: Tensor, count: int) -> None:
        """Take over rows that were kept. inputs: N × I float32; count: tokens that they were chosen from."""
        self._rows = [inputs]
        self.count = count

    @property
    def inputs(self) -> Tensor:
        """Kept inputs, N × I float32 (N = 0 if no token was seen)."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, self.width, device=self._device)

    def squared_errors(self, weight: Tensor, pruned: Tensor) -> Tensor:
        """‖X(W − Ŵ)ᵀ‖² and ‖XWᵀ‖² on the kept tokens (2 float64). weight, pruned: O × I."""
        x = self.inputs
        return torch.stack([total((x @ rows.T).square()) for rows in (weight - pruned, weight)])
