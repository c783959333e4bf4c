"""What `coprune export` is asked for beside the files and the type, by the command and by Python alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from coprune.base.validation import path_as_text

PathText = Annotated[str | None, BeforeValidator(path_as_text, json_schema_input_type=str | Path | None)]
Converter = Annotated[
    PathText,
    Field(
        description="llama.cpp's convert_hf_to_gguf.py, or its folder, for a model folder without like. [in $LLAMA_CPP, or on "
        "the PATH]"
    ),
]
NONE, AUTO = "none", "auto"
"""Importance matrices: without, and measured."""


class ExportSettings(BaseModel):
    """How a model becomes a GGUF file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    like: Annotated[
        PathText,
        Field(
            description="GGUF file of the source model, in any type: its metadata, tokenizer and order are taken over. [the one "
            "that the model was made from, or what the converter makes]"
        ),
    ] = None
    converter: Converter = None
    padded: Annotated[
        bool, Field(description="Keep channels and heads that are all zeros, which pad blocks to one width.")
    ] = False
    imatrix: Annotated[
        PathText,
        Field(
            description="How much every input of a matrix matters, for types of llama.cpp's quantiser: auto (measured on the "
            "dataset), a file of llama-imatrix, or none. Types below iq3_s need it."
        ),
    ] = NONE
    compensate: Annotated[
        bool,
        Field(
            description="Round the matrices of the blocks one column after another, so that later columns make up for each one's "
            "error on the dataset (GPTQ): same type and size, nearer to the model."
        ),
    ] = False
    dataset: Annotated[
        str, Field(description="Text that the importance of inputs and the compensation calibrate on.")
    ] = "embedded"
    save_imatrix: Annotated[Path | None, Field(description="Write that to this file too, in llama.cpp's format.")] = (
        None
    )
    modelfile: Annotated[
        bool,
        Field(
            description="Write an Ollama Modelfile beside the file: its stop tokens, and the chat template where that is proven "
            "to be the same in Ollama's language."
        ),
    ] = False
