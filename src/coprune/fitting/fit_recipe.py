"""The recipe written by a fit, from which the same bytes can be rebuilt without a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from coprune.base.errors import BadInput
from coprune.base.validation import explain, read_yaml
from coprune.fitting.calibration import read_passages
from coprune.fitting.candidates import EMBEDDINGS, FOREIGN, GIVEN, MIXED, TYPES, Candidate, Cut, is_step
from coprune.fitting.fit_notes import Asked
from coprune.fitting.fit_settings import Runtime
from coprune.gguf_files.llama_cpp import TYPES as ALL_TYPES
from coprune.gguf_files.types_by_tensor import TENSOR_TYPES

RECIPE_FILE, TEXT_FILE = "recipe.yaml", "text.jsonl"
_MOST_TRAINED = 1 << 24
"""Maximum tokens of a distillation; a search uses far fewer."""
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_REMOVED = r"vocabulary=[1-9]\d{0,8}|(experts|channels|blocks)=0\.\d{1,6}"
_STEP = r"[a-z]\w{0,99}(:.{1,4000})?"
_Part = Annotated[str, StringConstraints(pattern=rf"^({_REMOVED}|{_STEP})$")]


_Tensor = Annotated[str, StringConstraints(pattern=r"^[\w.]{1,200}$")]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class RecipeCut(_Checked):
    """Parts removed before the model is quantised."""

    removed: Annotated[list[_Part], Field(max_length=16)] = []
    tokens: Annotated[int, Field(ge=0, le=_MOST_TRAINED)] = 0


class FitRecipe(_Checked):
    """A candidate and everything needed to rebuild it."""

    model: Annotated[str, Field(min_length=1)]
    source: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    """Digest of the model's files."""
    like: str | None = None
    runtime: Runtime
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    text: Literal["text.jsonl"] = "text.jsonl"
    """File of calibration text in the recipe's folder."""
    cut: RecipeCut
    type: str
    embedding: str | None = None
    bits: Annotated[float, Field(ge=0, le=16)] = 0.0
    types: Annotated[dict[_Tensor, str], Field(max_length=1 << 20)] = {}
    """Types of tensors by name, if `type` is mixed."""
    file: Annotated[str, Field(min_length=1)] | None = None
    """Path of the candidate, if it is a given file."""
    bytes: Annotated[int, Field(gt=0)]
    sha256: _Digest

    @field_validator("type")
    @classmethod
    def _known_type(cls, said: str) -> str:
        if said not in (GIVEN, FOREIGN, MIXED, *ALL_TYPES):
            raise ValueError(f"it should be one of {', '.join(TYPES)}")
        return said

    @field_validator("embedding")
    @classmethod
    def _known_embedding(cls, said: str | None) -> str | None:
        if said not in (None, *EMBEDDINGS):
            raise ValueError(f"it should be one of {', '.join(EMBEDDINGS)}")
        return said

    @field_validator("types")
    @classmethod
    def _known_types(cls, said: dict[str, str]) -> dict[str, str]:
        if not {*said.values()} <= {*TENSOR_TYPES}:
            raise ValueError(f"they should be of {', '.join(TENSOR_TYPES)}")
        return said

    @model_validator(mode="after")
    def _named_file(self) -> Self:
        if (self.type == FOREIGN) != (self.file is not None):
            raise ValueError(f"file goes with type {FOREIGN}")
        if (self.type == MIXED) != bool(self.types):
            raise ValueError(f"types go with type {MIXED}")
        return self

    @property
    def candidate(self) -> Candidate:
        """The candidate that it describes. Raises BadInput if that is a missing file."""
        if self.file is not None:
            return next(iter(self.asked.foreign))
        cut = Cut(tuple(self.cut.removed), self.cut.tokens)
        return Candidate(cut, self.type, self.embedding, self.bits, tuple(self.types.items()))

    @property
    def asked(self) -> Asked:
        """The inputs of a fit that makes this candidate."""
        files = () if self.file is None else (self.file,)
        steps = tuple(part for part in self.cut.removed if is_step(part))
        return Asked(self.model, (), self.seed, None, self.like, self.runtime, files, steps)

    @classmethod
    def of(cls, asked: Asked, chosen: Candidate, size: int, digest: str) -> Self:
        """Describe a candidate. size, digest: of its file."""
        cut = RecipeCut(removed=[*chosen.cut.removed], tokens=chosen.cut.tokens)
        file = str(asked.foreign[chosen]) if chosen.type == FOREIGN else None
        return cls(
            model=asked.model,
            source=asked.digests["model"],
            like=asked.like,
            runtime=asked.runtime,
            seed=asked.seed,
            cut=cut,
            type=chosen.type,
            embedding=chosen.embedding,
            bits=chosen.bits,
            types=dict(chosen.types),
            file=file,
            bytes=size,
            sha256=digest,
        )

    def written(self) -> str:
        """Return the recipe as YAML."""
        said = yaml.safe_dump(self.model_dump(), sort_keys=False)
        return f"# Rebuild the model: coprune fit {RECIPE_FILE} -o OUT\n{said}"

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a recipe and check its calibration text. Raises BadInput if either is damaged or missing."""
        said = read_yaml(file, "the recipe of a fit", "model")
        try:
            found = cls.model_validate(said)
        except ValidationError as error:
            raise explain(error, lambda place: ("model", ".".join(place))).within(
                f"{file} is not the recipe of a fit"
            ) from None
        text = file.with_name(found.text)
        try:
            passages = read_passages(text)
        except FileNotFoundError:
            raise BadInput(f"the recipe needs {text}, which is missing", field="model", value=str(file)) from None
        except (OSError, ValueError) as error:
            why = f"it is not the text that a fit leaves ({next(iter(str(error).splitlines()), repr(error))})"
            raise BadInput(f"{text} cannot be used: {why}", field="model", value=str(file)) from None
        if not passages:
            raise BadInput(f"{text} is empty", field="model", value=str(file))
        return found
