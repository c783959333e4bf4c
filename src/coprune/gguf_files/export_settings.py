"""Settings of `coprune export` besides the files and the type, for the command and for Python."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from coprune.base.validation import path_as_text

PathText = Annotated[str | None, BeforeValidator(path_as_text, json_schema_input_type=str | Path | None)]
Converter = Annotated[
    PathText,
    Field(
        description="llama.cpp's convert_hf_to_gguf.py, or its folder; for a model folder without like. [in $LLAMA_CPP, or on "
        "the PATH]"
    ),
]
NONE, AUTO = "none", "auto"
"""Importance matrices: none, or measured."""


class ExportSettings(BaseModel):
    """Settings of an export to a GGUF file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    like: Annotated[
        PathText,
        Field(
            description="GGUF file of the source model, in any type: its metadata, tokenizer and order are used. [the one "
            "that the model was made from, or the converter's output]"
        ),
    ] = None
    converter: Converter = None
    padded: Annotated[
        bool, Field(description="Keep channels and heads that are all zeros, which pad blocks to one width.")
    ] = False
    imatrix: Annotated[
        PathText,
        Field(
            description="How much each input of a matrix matters, for llama.cpp's quantised types: auto (measured on the "
            "dataset), a file from llama-imatrix, or none. Types below iq3_s need it."
        ),
    ] = NONE
    compensate: Annotated[
        bool,
        Field(
            description="Round the blocks' matrices column by column, so that later columns compensate for each one's "
            "error on the dataset (GPTQ): same type and size, closer to the model."
        ),
    ] = False
    distill: Annotated[
        int,
        Field(
            ge=0,
            description="Number of tokens of the dataset on which the scales of the quantised blocks are trained toward the "
            "model's own outputs: same type and size, closer to the model. 30720 are a good start.",
        ),
    ] = 0
    dataset: Annotated[
        str, Field(description="Text to calibrate the importance of inputs and the compensation on, and to train on.")
    ] = "embedded"
    save_imatrix: Annotated[
        Path | None, Field(description="Also write the importance to this file, in llama.cpp's format.")
    ] = None
    modelfile: Annotated[
        bool,
        Field(
            description="Write an Ollama Modelfile beside the file: its stop tokens, and the chat template if it is proven "
            "to be the same in Ollama's template language."
        ),
    ] = False
