"""What `coprune fit` is asked for beside model, tasks and output, by the command and by Python alike.

Nothing heavy is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from coprune.base.errors import BadInput
from coprune.base.words import LeaveOut
from coprune.fitting.candidates import TYPES
from coprune.gguf_files.export_settings import Converter, PathText

Target = Literal["size", "speed", "memory"]
Runtime = Literal["llama.cpp", "transformers"]
Change = Literal["vocabulary", "experts", "blocks", "channels", "embedding", "mixed"]
_BUDGET = re.compile(r"(\d+\.?\d*)\s*(h|m|s|)")
_LONGEST = 366 * 86_400.0
"""Seconds of a search at most."""
_SECONDS = {"h": 3600, "m": 60, "": 60, "s": 1}


def _seconds(said: Any) -> float:
    """Read `60m`, `2h`, or minutes; a validator."""
    found = _BUDGET.fullmatch(str(said).strip().lower())
    seconds = 0.0 if found is None else float(found[1]) * _SECONDS[found[2]]
    if not 0 < seconds <= _LONGEST:
        cause = f"{str(said)[:40]!r} is not a time of a search"
        raise BadInput(cause, field="budget", value=said, fix="write 60m, 2h, or minutes, up to a year")
    return seconds


def _names(said: Any) -> Any:
    """Read names from a comma-separated text or a list of such; a validator."""
    parts = [said] if isinstance(said, str) else said
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        return said
    return tuple(name.strip() for part in parts for name in part.split(",") if name.strip())


def _files(said: Any) -> Any:
    """Read one path or a list of them; a validator."""
    parts = [said] if isinstance(said, str | Path) else said
    if not isinstance(parts, list | tuple):
        return said
    return tuple(str(part) if isinstance(part, Path) else part for part in parts)


class FitSettings(BaseModel):
    """How the smallest file is searched for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: Annotated[
        Target,
        Field(description="What to minimise: size of the file, memory with 2,048 tokens, or time of a token (speed)."),
    ] = "size"
    runtime: Annotated[
        Runtime, Field(description="Where it will run: llama.cpp (a GGUF file), or transformers (a folder).")
    ] = "llama.cpp"
    budget: Annotated[
        float,
        BeforeValidator(_seconds, json_schema_input_type=str | float),
        Field(description="Time of the search and the proof: 60m, 2h, or minutes; the best by then. [60m]"),
    ] = 3600.0
    items: Annotated[int | None, Field(description="Items of each task at most. [all]", ge=1)] = None
    text: Annotated[str | None, Field(description="More text to calibrate and distill on. [what the model writes]")] = (
        None
    )
    like: Annotated[
        PathText,
        Field(
            description="Any GGUF file of the model, in any type: needed where that is a folder, unless there is a converter."
        ),
    ] = None
    converter: Converter = None
    without: Annotated[
        tuple[Change, ...],
        BeforeValidator(_names, json_schema_input_type=str | Sequence[str]),
        Field(
            description="Do not try this: vocabulary, experts, blocks, channels, embedding, mixed (types by tensor)."
        ),
    ] = ()
    types: Annotated[
        tuple[str, ...],
        BeforeValidator(_names, json_schema_input_type=str | Sequence[str]),
        Field(description="Types of llama.cpp to try, with commas between. [q8_0 to iq2_xs]", min_length=1),
    ] = TYPES
    candidate: Annotated[
        tuple[str, ...],
        BeforeValidator(_files, json_schema_input_type=str | Path | Sequence[str | Path]),
        Field(description="GGUF file of the model from elsewhere, which is measured like those made here; repeatable."),
    ] = ()
    workers: Annotated[
        int, Field(description="Candidates that are measured at a time, by processes of this machine.", ge=1)
    ] = 1
    ray: Annotated[str | None, Field(description="Or by a Ray cluster (host:port, auto, local).")] = None
    seed: Annotated[int, Field(description="Of the halves, and of what is drawn.", ge=0)] = 0
    trust_tasks: Annotated[
        bool, Field(description="Let task definitions run the code that they name; read it first.")
    ] = False

    @model_validator(mode="after")
    def _of_its_runtime(self) -> Self:
        if self.runtime == "transformers":
            if "types" in self.model_fields_set:
                raise BadInput("types are of llama.cpp", field="types", value=self.types, fix=LeaveOut("types"))
            if self.candidate:
                cause, fix = "a GGUF file is measured in llama.cpp", LeaveOut("candidate")
                raise BadInput(cause, field="candidate", value=self.candidate, fix=fix)
        return self
