"""GPTQ and AWQ, which pack a matrix of inputs × outputs: read but not written.

Their libraries write them for their own kernels: GPTQ's columns may be in any order, AWQ's are interleaved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.model.checkpoint.formats.configuration import Quantization
from coprune.model.checkpoint.formats.find import Entries

_WORD = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each four bits of a word belong to."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class ByInput:
    """How a GPTQ or AWQ checkpoint stores its weights."""

    method: str
    bits: int
    added: int = 0
    """Added to a stored zero point to give the code of zero."""

    @property
    def label(self) -> str:
        """The format in a few words."""
        return f"{self.method.upper()} (INT{self.bits}); read, and written as plain weights"

    @property
    def _each(self) -> int:
        return _WORD // self.bits

    def shape(self, base: str, entries: Entries) -> tuple[int, int]:
        """Return out × in of a weight. base: prefix of its parts' names. Raises BadInput where these do not fit."""
        codes, scales, zeros = (self._part(entries, base, last) for last in ("qweight", "scales", "qzeros"))
        inputs, outputs = (
            (codes[0] * self._each, codes[1]) if self.method == "gptq" else (codes[0], codes[1] * self._each)
        )
        order = entries.get(f"{base}.g_idx")
        uneven = order is None and bool(scales[0]) and inputs % scales[0] != 0
        if not scales[0] or uneven or scales[1] != outputs or zeros != (scales[0], outputs // self._each):
            raise BadInput(
                f"{base}.scales and qzeros have the shapes {scales} and {zeros}, which do not fit {inputs} × {outputs}",
                fix="fetch the checkpoint again",
            )
        if order is not None and (tuple(order.shape) not in ((inputs,), (0,)) or order.dtype not in ("I32", "I64")):
            raise BadInput(f"{base}.g_idx is {order.dtype} of the shape {tuple(order.shape)} for {inputs} inputs")
        return outputs, inputs

    def _part(self, entries: Entries, base: str, last: str) -> tuple[int, ...]:
        found, types = entries.get(f"{base}.{last}"), ("F16", "BF16", "F32") if last == "scales" else ("I32",)
        if found is None or len(found.shape) != 2 or found.dtype not in types:
            said = "is not there" if found is None else f"is {found.dtype} of the shape {tuple(found.shape)}"
            raise BadInput(f"{base}.{last} {said}", fix="fetch the checkpoint again")
        return tuple(found.shape)

    def decode(self, parts: Mapping[str, Tensor], out: Tensor) -> Tensor:
        """Fill an out × in tensor with a weight. Raises BadInput for missing groups and for NaN or infinite values."""
        scales, inputs = parts["scales"].float(), out.shape[1]
        codes = self._unpacked(parts["qweight"].T).T if self.method == "gptq" else self._unpacked(parts["qweight"])
        zeros = self._unpacked(parts["qzeros"]) + self.added
        groups = parts.get("g_idx")
        if groups is None or not len(groups):
            groups = torch.arange(inputs) // (inputs // len(scales))
        if int(groups.min()) < 0 or int(groups.max()) >= len(scales):
            raise BadInput(f"g_idx names group {int(groups.max())}, but there are {len(scales)}")
        groups = groups.long()
        values = (codes - zeros[groups]).float() * scales[groups]
        if not bool(torch.isfinite(values).all()):
            raise BadInput("scales are NaN or infinite", fix="fetch the checkpoint again")
        return out.copy_(values.T)

    def _unpacked(self, words: Tensor) -> Tensor:
        """Unpack R rows of words into R × C codes."""
        shifts = torch.arange(0, _WORD, self.bits, dtype=torch.int32)
        codes = (words[..., None] >> shifts) & ((1 << self.bits) - 1)
        if self.method == "awq":
            codes = codes[..., torch.tensor(_AWQ_ORDER).argsort()]
        return codes.reshape(len(words), -1)


def by_input(quantization: Mapping[str, Any]) -> ByInput:
    """Return how a checkpoint of GPTQ or AWQ stores its weights. Raises BadInput if that is not supported."""
    said = Quantization.read(quantization)
    method, bits = str(said.quant_method), said.bits or said.w_bit or 4
    if bits not in ((4,) if method == "awq" else (2, 4, 8)):
        cause = f"the checkpoint is quantised by {method} in {bits} bits, which is not supported"
        raise BadInput(cause, fix="use the unquantised checkpoint")
    if method == "awq" and (said.version or "gemm").lower() != "gemm":
        cause = f"the checkpoint is quantised by awq for the kernel {said.version}, and only gemm is supported"
        raise BadInput(cause, fix="use the unquantised checkpoint")
    return ByInput(method, bits, 1 if method == "gptq" and said.checkpoint_format != "gptq_v2" else 0)


def bases_of(entries: Entries) -> list[str]:
    """Return the prefixes of the names of all weights' parts."""
    return [name.removesuffix(".qweight") for name in entries if name.endswith(".qweight")]
