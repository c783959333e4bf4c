"""Embedding models: vectors of passages, by which the pruned model is compared with the dense one."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coprune.base.errors import BadInput, NumericalError
from coprune.base.progress import Advance, Reporter
from coprune.data.windows import EvaluationText
from coprune.evaluation.measurement import Embedded
from coprune.evaluation.tasks.task import Walked, joined, scored
from coprune.evaluation.tasks.text_task import TextInputs
from coprune.model.checkpoint.companions import modules_of
from coprune.model.checkpoint.locate import ModelFolder, locate
from coprune.model.checkpoint.shards import read_json
from coprune.model.loaded_model import Loaded
from coprune.recipe.recipe import Recipe

PASSAGE = 128
"""Default tokens of an embedded passage."""
PASSAGES = 1024
"""Maximum number of passages; each is compared with all others."""


class PassageVectors:
    """Vectors of passages, pooled as configured in the model's folder."""

    name = "Embeddings"
    figures: tuple[str, ...] = ("cosine", "overlap")

    def __init__(self, inputs: TextInputs) -> None:
        self._inputs = inputs
        self.pooling = Pooling.of_folder(_folder_of(inputs.recipe, inputs.loaded))

    def evaluation(self, reporter: Reporter) -> dict[str, EvaluationText]:
        return self._inputs.evaluation("Embeddings are", reporter, self._inputs.opened)

    def measure(self, data: EvaluationText, advance: Advance, walked: Walked | None = None) -> Embedded:
        inputs = self._inputs
        own = inputs.own_batches(data.tokens[: PASSAGES * inputs.seqlen], 1)
        parts, progress = ((batch, None) for batch in own), (advance, sum(map(len, own)))
        found = scored(inputs.loaded, parts, lambda hidden, _: self.pooling.of_hidden(hidden).cpu(), progress, walked)
        vectors = joined(inputs.processes, found)
        if not bool(vectors.isfinite().all()):
            raise NumericalError("the model's vectors are NaN for some passages")
        return Embedded.of(vectors, inputs.seqlen)


def _folder_of(recipe: Recipe, loaded: Loaded) -> Path | None:
    """Return the folder of a model's files, or None for a model in memory without one."""
    if (folder := Path(loaded.source)).is_dir():
        return folder
    with suppress(BadInput):
        location = locate(loaded.source, recipe.model.cache_dir, weights=False)
        return location.path if isinstance(location, ModelFolder) else None
    return None


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
        """Pool hidden states to one unit vector per text: B × (modes · H) float32. hidden: B × S × H, without padding."""
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
