"""The pooling of hidden states to one vector per text in a sentence-transformers folder; the mean without such files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.model.checkpoint.companions import modules_of
from coprune.model.checkpoint.shards import read_json

_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_OLD = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "weightedmean": "weightedmean_tokens"}


@dataclass(frozen=True)
class Pooling:
    """Concatenated pooling modes."""

    modes: tuple[str, ...] = ("mean",)

    @classmethod
    def of_folder(cls, folder: Path | None) -> Pooling:
        """Read a folder's pooling. Raises BadInput for an unknown mode."""
        for module in modules_of(folder):
            config = module / "config.json"
            said = read_json(config) if config.is_file() else {}
            if not any(key.startswith("pooling_mode") for key in said):
                continue
            modes = said.get("pooling_mode") or [m for m in _MODES if said.get(f"pooling_mode_{_OLD.get(m, m)}")]
            modes = (modes,) if isinstance(modes, str) else tuple(map(str, modes)) or ("mean",)
            if not set(modes) <= set(_MODES):
                raise BadInput(f"{config} pools by {', '.join(modes)}, which coprune does not know", field="model")
            return cls(modes)
        return cls()

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """Return a unit vector per text: B × (modes · H) float32. hidden: B × S × H, without padding."""
        found = torch.cat([_pooled(hidden.to(torch.float32), mode) for mode in self.modes], dim=-1)
        return torch.nn.functional.normalize(found, dim=-1)


def _pooled(hidden: Tensor, mode: str) -> Tensor:
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        return hidden[:, -1]
    if mode == "max":
        return hidden.amax(dim=1)
    if mode == "weightedmean":
        weights = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype, device=hidden.device)
        return (hidden * weights[:, None]).sum(dim=1) / weights.sum()
    return hidden.mean(dim=1)  # a text's length does not change its direction
