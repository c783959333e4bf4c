"""A custom step in one file: merging."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file

from coprune.base.errors import BadInput
from coprune.model.checkpoint.digest import model_digest
from coprune.model.checkpoint.locate import holds_model
from coprune.model.checkpoint.shards import INDEX_FILE
from coprune.model.checkpoint.writer import CheckpointWriter
from coprune.run.step import Left, NamedStep, Taking, register_step
from coprune.store.notes import read_note, write_note


class Merged(BaseModel):
    """The record of a merge."""

    tensors: int


class MergeSettings(BaseModel):
    """Settings of a merge in a sweep. share: weight of the first model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    other: Path
    share: Annotated[float, Field(ge=0, le=1)] = 0.5


@register_step
@dataclass(frozen=True, kw_only=True)
class Merge(NamedStep):
    """The weighted mean of two models of the same shapes: the preceding step's and another, or two others."""

    name = "merge"
    asked = MergeSettings
    models: tuple[Path, ...]

    @classmethod
    def of(cls, asked: MergeSettings, folder: Path) -> Self:
        return cls(models=(asked.other,), folder=folder, settings={"share": asked.share})

    def check(self) -> None:
        if len(self.models) == 1 and not self.models[0].exists():
            raise BadInput(f"{self.models[0]} is missing")
        shapes = [{name: one.shape for name, one in tensors_of(model).items()} for model in self.models]
        if any(there and there != shapes[0] for there in shapes):
            raise BadInput(f"{self.models[0]} and {self.models[1]} have other shapes", fix="merge models of one kind")

    def sources(self, before: Left | None) -> Sequence[str]:
        return [model_digest(model) for model in self._merged(before)]

    def finished(self, before: Left | None) -> Left | None:
        note = read_note(self.folder / "merged.json", Merged)
        return None if note is None or not holds_model(self.model) else Left(note.record, self.model)

    def run(self, before: Left | None, taking: Taking) -> Left:
        models = self._merged(before)
        (first, second), share = map(tensors_of, models), self.settings["share"]
        with taking():
            self.folder.mkdir(parents=True, exist_ok=True)
        if not holds_model(self.model):
            writer = CheckpointWriter(self.model, [*first], sum(one.nbytes for one in first.values()))
            for name in first:
                if writer.recall(name) is None:
                    writer.write(name, {name: share * first[name] + (1 - share) * second[name]})
            for file in {*models[0].glob("*.json")} - {models[0] / INDEX_FILE}:
                shutil.copyfile(file, writer.partial / file.name)
            writer.finish()
        write_note(self.folder / "merged.json", merged := Merged(tensors=len(first)))
        return Left(merged, self.model)

    def _merged(self, before: Left | None) -> tuple[Path, ...]:
        return self.models if before is None or before.model is None else (before.model, *self.models)


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in sorted(model.glob("*.safetensors")) for name, one in load_file(file).items()}
