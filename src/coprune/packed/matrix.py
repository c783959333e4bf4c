"""A packed matrix in memory: in the layout that kernels multiply from, and unpacked."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coprune.base.devices import in_host_memory
from coprune.base.errors import BadInput
from coprune.base.kernels.table import kernel
from coprune.base.native.product import NativeMatrix, count_rows
from coprune.packed.format import aligned_bytes, assemble_packed, in_byte_order, keep_bits, pack_tensor
from coprune.packed.header import Header, read_header
from coprune.packed.two_of_four import fill_up


def pack_matrix(weight: Tensor) -> Tensor | None:
    """Pack an O × I weight for multiplication (bitmask layout), or None where that would not be smaller.

    Negative zeros become zeros, which no product tells apart.
    """
    return pack_tensor(weight, "bitmask", drop_negative_zeros=True)


def for_kernels(blob: Tensor) -> Tensor:
    """The same matrix in the bitmask layout that the kernels read, at aligned bytes; a 2:4 one may gain zeros (`fill_up`).

    blob: a packed tensor that check_packed accepts, with two dimensions (else BadInput).
    """
    header = read_header(blob)
    if len(header.shape) != 2:
        raise BadInput(f"a packed tensor of the shape {header.shape} is not a matrix")
    if header.layout == "bitmask":
        return fill_up(aligned_bytes(blob), header)
    # Padding zeros of the N:M layout stay values: dropping them would need another pass for a few bytes.
    pattern = np.packbits(keep_bits(blob, header), bitorder="little")
    bitmask = Header("bitmask", header.dtype, header.shape, header.kept)
    stored = aligned_bytes(blob)[header.values_at : header.values_at + header.values_bytes]
    return assemble_packed(bitmask, pattern, in_byte_order(stored, header.dtype.itemsize))


def row_starts(blob: Tensor, header: Header) -> Tensor:
    """How many values come before each row of a packed matrix in the bitmask layout.

    Args:
        blob: on any device.
        header: its header.

    Returns:
        O + 1 int64 on its device; the last is the number of all values.

    Raises:
        BadInput: the bitmask has another number of ones than there are values, which kernels would read past.
    """
    starts = count_rows(blob, header) if in_host_memory(blob.device) else None
    if starts is None:
        ones = _bits(blob, header).reshape(header.shape).sum(dim=1, dtype=torch.int64)
        starts = torch.cat([ones.new_zeros(1), ones.cumsum(0)])
    if int(starts[-1]) != header.kept:
        raise BadInput("damaged packed matrix: the bitmask and the number of values disagree")
    return starts


def native_matrix(blob: Tensor, starts: Tensor, header: Header, bias: Tensor | None) -> NativeMatrix | None:
    """Prepare a packed matrix for the kernels; None where they do not serve its device or dtype or are missing."""
    found: NativeMatrix | None = kernel("packed_product", blob.device)(blob, starts, header, bias)
    return found


def dense_matrix(blob: Tensor, header: Header) -> Tensor:
    """The dense weight of a packed matrix in the bitmask layout, on the blob's device. Only torch operations."""
    keep = _bits(blob, header).to(torch.bool)
    stored = blob[header.values_at : header.values_at + header.values_bytes]
    values = in_byte_order(stored, header.dtype.itemsize).view(header.dtype)
    dense = torch.zeros(header.numel, dtype=header.dtype, device=blob.device)
    return dense.masked_scatter_(keep, values).reshape(header.shape)


def _bits(blob: Tensor, header: Header) -> Tensor:
    """The bitmask, an uint8 for every weight."""
    pattern = blob[header.pattern_at : header.pattern_at + header.pattern_bytes]
    shifts = torch.arange(8, dtype=torch.uint8, device=blob.device)
    return ((pattern[:, None] >> shifts) & 1).reshape(-1)[: header.numel]
