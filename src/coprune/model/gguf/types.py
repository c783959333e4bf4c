"""How a GGUF file stores its tensors: types that the gguf package makes, and those that llama.cpp's own quantiser makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from coprune.base.errors import BadInput, unknown_name
from coprune.base.words import Set
from coprune.model.gguf.llama_cpp import require_llama_cpp

PLAIN = ("f32", "f16", "bf16")
QUANTISED = {"q8_0": 8, "q5_1": 5, "q5_0": 5, "q4_1": 4, "q4_0": 4}
"""Types of blocks of 32 that the gguf package makes, with their bits."""
BY_LLAMA_CPP = (
    *("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
"""Types that llama.cpp's quantiser makes without an importance matrix."""
TYPES = (*PLAIN, *QUANTISED, *BY_LLAMA_CPP)
_BLOCK = 32
_LARGEST_HALF = 65504.0


def require_type(name: str) -> None:
    """Raise BadInput for a type that there is not, or whose package is not installed."""
    if name not in TYPES:
        raise unknown_name("type", name, TYPES, "type")
    if name in BY_LLAMA_CPP:
        require_llama_cpp(f"the type {name} is made by llama.cpp's own quantiser", "type", name)


def file_type(name: str) -> int:
    """The number by which a file says what most of its tensors are."""
    from gguf import LlamaFileType

    return int(LlamaFileType["ALL_F32" if name == "f32" else f"MOSTLY_{name.upper()}"])


def tensor_type(name: str, shape: Sequence[int], asked: str, source_type: str, mixed: bool) -> str:
    """How one tensor is stored.

    Vectors, and what the source file kept in float32 beside other types, stay float32. What lies outside the blocks, the
    embeddings above all, gets eight bits where the others get fewer, and rows that no blocks of 32 fill get sixteen.

    Args:
        name: of the tensor in the file.
        shape: of the tensor, rows last.
        asked: the type that was asked for, one that the gguf package makes.
        source_type: what the source file has it in.
        mixed: whether the source file has matrices in other types than float32.
    """
    if len([size for size in shape if size > 1]) < 2 or (mixed and source_type.lower() == "f32"):
        return "f32"
    if asked in PLAIN:
        return asked
    if shape[-1] % _BLOCK:
        return "f16"
    return asked if name.startswith("blk.") else "q8_0"


def encode(tensor: Tensor, kind: str) -> Any:
    """A float32 tensor as the bytes of a type, in an array of numpy. Raises BadInput where float16 cannot hold it."""
    from gguf import GGMLQuantizationType, quants

    values = tensor.contiguous().numpy()
    if kind == "f32":
        return values
    if kind == "f16":
        largest = float(tensor.abs().max())
        if largest > _LARGEST_HALF:
            raise BadInput(
                f"weights of up to {largest:g} are too large for float16",
                field="type",
                fix=("use ", Set("type", "bf16")),
            )
        return values.astype(np.float16)
    return quants.quantize(values, GGMLQuantizationType[kind.upper()])


def decode(stored: Any) -> Tensor:
    """A tensor of a reader of the gguf package, dequantised to float32."""
    import torch
    from gguf import quants

    return torch.from_numpy(np.array(quants.dequantize(stored.data, stored.tensor_type), dtype=np.float32))


def encoded_bytes(shape: Sequence[int], kind: str) -> tuple[int, tuple[int, ...]]:
    """How many bytes a tensor of a type has, and the shape of the array that holds them."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    code = GGMLQuantizationType[kind.upper()]
    values, size = GGML_QUANT_SIZES[code]
    count = int(np.prod(shape))
    if kind in ("f32", "f16"):
        return count * size, tuple(shape)
    return count * size // values, tuple(quant_shape_to_byte_shape(tuple(shape), code))
