"""The architecture `deci`: Llama with a separate width for every block."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.gguf_files.file_plan import Example
from coprune.gguf_files.llama_cpp import LlamaCpp, tensor_type
from coprune.gguf_files.metadata import Field, Fields, Plan
from coprune.gguf_files.smaller import Exported, planned_shape

ARCHITECTURE = "deci"
_READS = re.compile(
    r"(vocab_size|context_length|embedding_length|block_count|feed_forward_length|attention\.(head_count|head_count_kv|key_length|"
    r"value_length|layer_norm_rms_epsilon)|rope\.(dimension_count|freq_base|scale_linear|scaling\..*))"
)
"""Metadata numbers that this architecture reads; others would be lost."""
_ROTARY = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")
_PROBE = 32
"""Number of tokens that both files are run on."""
_ROUNDING = 1e-2
"""Maximum relative difference of centred logits; float16 rounds the input of every matrix."""


@dataclass(frozen=True)
class Deci:
    """The plan of a file in this architecture, and how its values are computed."""

    plan: Plan
    head: int
    """Width of a head."""
    halves: bool
    """Whether rotary embeddings pair the halves of a head instead of neighbouring channels."""

    def arrange(self, name: str, tensor: Tensor) -> Tensor:
        """Reorder rows of queries and keys for this architecture. name: in the source file."""
        if not self.halves or not _ROTARY.fullmatch(name):
            return tensor
        halves: Tensor = tensor.reshape(-1, 2, self.head // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)


def deci_plans(padded: Plan, example: Example, source: Exported) -> Iterator[Deci]:
    """Yield plans of a file whose blocks have different widths, one for each order of a head's rows.

    Args:
        padded: the plan in the source's architecture, with all blocks of the same width.
        example: the template file.
        source: the model, each block with its own width.

    Raises:
        UnsupportedModel: the metadata have a number that this architecture does not read.
    """
    shapes, mixed = example.shapes, example.mixed
    tensors = {}
    for name, tensor in padded.tensors.items():
        shape = planned_shape(example.pieces[tensor.source], shapes[tensor.source], source) or tensor.shape
        kind = tensor_type(tensor.source, shape, padded.kind, example.types[tensor.source], mixed)
        tensors[name] = replace(tensor, shape=shape, kind=kind)
    head = _head_width(padded)
    fields = _fields(padded, {name: tensor.shape for name, tensor in tensors.items()}, head)
    for halves in (False, True):
        yield Deci(Plan(ARCHITECTURE, fields, padded.kind, tensors), head, halves)


def _head_width(padded: Plan) -> int:
    said = padded.fields.get(f"{padded.arch}.attention.key_length")
    if said is not None:
        return int(said.value)
    width, heads = (padded.fields.get(f"{padded.arch}.{key}") for key in ("embedding_length", "attention.head_count"))
    if width is None or heads is None or not isinstance(heads.value, int):
        raise UnsupportedModel("the metadata do not say how wide an attention head is")
    return int(width.value // heads.value)


def _fields(padded: Plan, shapes: Mapping[str, tuple[int, ...]], head: int) -> Fields:
    own = f"{padded.arch}."
    unread = [key for key in padded.fields if key.startswith(own) and not _READS.fullmatch(key.removeprefix(own))]
    if unread:
        raise UnsupportedModel(f"the architecture {ARCHITECTURE} does not read {unread[0]}")
    found = {
        f"{ARCHITECTURE}.{key.removeprefix(own)}" if key.startswith(own) else key: field
        for key, field in padded.fields.items()
    }
    number = padded.fields[f"{own}block_count"]
    blocks = range(int(number.value))
    rows = {"feed_forward_length": ("ffn_gate", 1), "attention.head_count": ("attn_q", head)}
    rows |= {"attention.head_count_kv": ("attn_k", head)}
    for key, (tensor, size) in rows.items():
        names = [f"blk.{block}.{tensor}.weight" for block in blocks]
        missing = [name for name in names if name not in shapes]
        if missing:
            raise UnsupportedModel(f"the architecture {ARCHITECTURE} needs {missing[0]}, which the file lacks")
        found[f"{ARCHITECTURE}.{key}"] = Field([shapes[name][0] // size for name in names], _array(), number.type)
    widths = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    return {**{f"{ARCHITECTURE}.{key}": replace(number, value=head) for key in widths}, **found}


def _array() -> int:
    from gguf import GGUFValueType

    return int(GGUFValueType.ARRAY)


def same_in_llama_cpp(padded: Path, narrow: Path) -> bool:
    """Return whether llama.cpp computes the same logits from two files. Raises BadInput if it cannot load the first."""
    with_zeros = LlamaCpp(padded, context=_PROBE)
    try:
        tokens = torch.randint(with_zeros.vocabulary, (_PROBE,), generator=torch.Generator().manual_seed(0)).tolist()
        expected = with_zeros.logits(tokens)
    finally:
        with_zeros.close()
    try:
        without = LlamaCpp(narrow, context=_PROBE)
    except BadInput:
        return False
    try:
        found = without.logits(tokens)
    finally:
        without.close()
    if found.shape != expected.shape:
        return False
    expected = expected - expected.mean(dim=1, keepdim=True)
    found = found - found.mean(dim=1, keepdim=True)
    return bool((found - expected).norm() <= _ROUNDING * expected.norm())
