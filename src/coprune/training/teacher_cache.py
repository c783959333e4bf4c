"""What a teacher says of every training window, found out ahead and kept on the disk: its likeliest tokens.

One file per so many windows, each written whole or not at all, so an interrupted pass goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from coprune.base.durable import write_durably

_WINDOWS_PER_FILE = 32


class TeacherCache:
    """Log probabilities (at a temperature) of the k likeliest tokens at every position of every window."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, windows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """What was kept of some windows: log probabilities B × S × k float32, token ids B × S × k int64."""
        values, indices = [], []
        for window in windows.tolist():
            with safe_open(self._file(window // _WINDOWS_PER_FILE), "pt") as file:
                row = window % _WINDOWS_PER_FILE
                values.append(file.get_slice("log_probabilities")[row])
                indices.append(file.get_slice("tokens")[row])
        return torch.stack(values).to(device), torch.stack(indices).to(device, torch.int64)

    @torch.inference_mode()
    def fill(
        self,
        teacher: nn.Module,
        tokens: Tensor,
        top_k: int,
        temperature: float,
        device: torch.device,
        advance: Callable[[float], None] = lambda windows: None,
    ) -> None:
        """Run the teacher over all windows (N × S int64) that an earlier pass did not reach."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(torch.split(tokens, _WINDOWS_PER_FILE)):
            if not self._file(number).is_file():
                kept = [_likeliest(teacher(input_ids=w[None].to(device)), top_k, temperature) for w in part]
                content = {
                    "log_probabilities": torch.cat([values for values, _ in kept]),
                    "tokens": torch.cat([indices for _, indices in kept]),
                }
                write_durably(self._file(number), lambda path, content=content: save_file(content, path))  # type: ignore[misc]
            advance(len(part))

    def _file(self, number: int) -> Path:
        return self.folder / f"teacher-{number:05d}.safetensors"


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits over a temperature, in float32; at temperature 1 themselves, as they are.

    logits: … × vocabulary.
    """
    # Logits are the largest tensors of a step, so none is copied that need not be.
    return logits if temperature == 1 else logits.to(torch.float32) / temperature


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Logarithms of the probabilities at a temperature, in float32.

    logits: … × vocabulary.
    """
    return functional.log_softmax(tempered(logits, temperature), dim=-1, dtype=torch.float32)


def _likeliest(output: Any, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    top = log_probabilities(output.logits, temperature).topk(top_k, dim=-1)
    return top.values.cpu().contiguous(), top.indices.to("cpu", torch.int32).contiguous()
