"""A step that coprune does not have, in one file: leaving out the last blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoModelForCausalLM, AutoTokenizer

from coprune.base.files import whole_folder
from coprune.model.checkpoint.digest import model_digest
from coprune.model.checkpoint.load import quiet_transformers
from coprune.model.checkpoint.locate import holds_model
from coprune.run.step import Left, NamedStep, Taking, register_step
from coprune.store.notes import read_note, write_note


class Shortened(BaseModel):
    """What is left."""

    blocks: int


class ShorterSettings(BaseModel):
    """What a fit says of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Annotated[int, Field(ge=1)] = 1


@register_step
@dataclass(frozen=True, kw_only=True)
class Shorter(NamedStep):
    """A Llama without its last blocks."""

    name = "shorter"
    asked = ShorterSettings

    @classmethod
    def of(cls, asked: ShorterSettings, folder: Path) -> Self:
        return cls(folder=folder, settings={"by": asked.by})

    def sources(self, before: Left | None) -> Sequence[str]:
        return [] if before is None or before.model is None else [model_digest(before.model)]

    def finished(self, before: Left | None) -> Left | None:
        note = read_note(self.folder / "shortened.json", Shortened)
        return None if note is None or not holds_model(self.model) else Left(note.record, self.model)

    def run(self, before: Left | None, taking: Taking) -> Left:
        assert before is not None
        assert before.model is not None
        model = AutoModelForCausalLM.from_pretrained(before.model)
        model.model.layers = model.model.layers[: -self.settings["by"]]
        model.config.num_hidden_layers = len(model.model.layers)
        with taking(), quiet_transformers(), whole_folder(self.model) as out:
            model.save_pretrained(out)
            AutoTokenizer.from_pretrained(before.model).save_pretrained(out)
        write_note(self.folder / "shortened.json", left := Shortened(blocks=len(model.model.layers)))
        return Left(left, self.model)
