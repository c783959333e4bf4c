"""Settings of `coprune generate` besides model, file and prompts, for the command and for Python."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from coprune.base.errors import BadInput
from coprune.base.files import require_file
from coprune.base.words import Setting
from coprune.recipe.parts import CacheFolder, Device, DtypeOfModel


class GenerateSettings(BaseModel):
    """How a model generates texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    samples: Annotated[int | None, Field(description="Texts. [one per prompt, or 16]", ge=1)] = None
    seqlen: Annotated[
        int | None,
        Field(description="Maximum tokens per text, without its prompt. [512, or the model's limit]", ge=1),
    ] = None
    temperature: Annotated[float, Field(description="Divisor of the logits; 0 takes the likeliest tokens.", ge=0)] = 1.0
    top_p: Annotated[
        float, Field(description="Sample from the likeliest tokens with this total probability.", gt=0, le=1)
    ] = 1.0
    seed: Annotated[int, Field(description="Seed of the sampling.")] = 0
    column: Annotated[str | None, Field(description="Column of the prompts. [prompt]")] = None
    template: Annotated[
        Literal["chat", "none"] | None,
        Field(description="Whether prompts go through the chat template. [chat, if there is one]"),
    ] = None
    dtype: DtypeOfModel = "auto"
    device: Device = "auto"
    cache_dir: CacheFolder = None


def require_free(target: Path) -> None:
    """Raise BadInput if the file to write exists, has the wrong suffix, or cannot be written."""
    if target.exists():
        raise BadInput(f"{target} already exists", field="target", value=target, fix="name another file")
    if target.suffix != ".jsonl":
        fix = ("name the file to write; prompts are read from a file, with ", Setting("prompts"))
        raise BadInput(f"{target} does not end in .jsonl", field="target", value=target, fix=fix)
    require_file(target, "target")
