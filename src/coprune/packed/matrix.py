"""A packed matrix in memory: in the layout that kernels multiply from, and unpacked."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.kernels.table import kernel
from coprune.base.native.product import NativeMatrix
from coprune.packed.format import aligned_bytes, assemble_packed, in_byte_order, keep_bits, pack_tensor
from coprune.packed.header import Header, read_header


def pack_matrix(weight: Tensor) -> Tensor | None:
    """Pack an O × I weight for multiplication (bitmask layout), or None where that would not be smaller.

    Negative zeros become zeros, which no product tells apart.
    """
    return pack_tensor(weight, "bitmask", drop_negative_zeros=True)


def for_kernels(blob: Tensor) -> Tensor:
    """The same matrix in the bitmask layout that the kernels read, at aligned bytes.

    blob: a packed tensor that check_packed accepts, with two dimensions (else BadInput).
    """
    header = read_header(blob)
    if len(header.shape) != 2:
        raise BadInput(f"a packed tensor of the shape {header.shape} is not a matrix")
    if header.layout == "bitmask":
        return aligned_bytes(blob)
    # Padding zeros of the N:M layout stay values: dropping them would need another pass for a few bytes.
    pattern = np.packbits(keep_bits(blob, header), bitorder="little")
    bitmask = Header("bitmask", header.dtype, header.shape, header.kept)
    stored = aligned_bytes(blob)[header.values_at : header.values_at + header.values_bytes]
    return assemble_packed(bitmask, pattern, in_byte_order(stored, header.dtype.itemsize))


def native_matrix(blob: Tensor, header: Header, bias: Tensor | None) -> NativeMatrix | None:
    """Prepare a packed matrix for the kernels; None where they do not serve its device or dtype or are missing."""
    if header.layout != "bitmask":
        return None
    found: NativeMatrix | None = kernel("packed_product", blob.device)(blob, header, bias)
    return found


def dense_matrix(blob: Tensor, header: Header) -> Tensor:
    """The dense weight of a packed matrix in the bitmask layout, on the blob's device. Only torch operations."""
    pattern = blob[header.pattern_at : header.pattern_at + header.pattern_bytes]
    shifts = torch.arange(8, dtype=torch.uint8, device=blob.device)
    keep = ((pattern[:, None] >> shifts) & 1).reshape(-1)[: header.numel].to(torch.bool)
    stored = blob[header.values_at : header.values_at + header.values_bytes]
    values = in_byte_order(stored, header.dtype.itemsize).view(header.dtype)
    dense = torch.zeros(header.numel, dtype=header.dtype, device=blob.device)
    return dense.masked_scatter_(keep, values).reshape(header.shape)
