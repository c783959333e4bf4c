"""Choose a type for each tensor of a GGUF file: least loss for a number of bytes, from rounding errors and sensitivities."""

from __future__ import annotations

import ctypes
import heapq
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coprune.base.progress import Reporter
from coprune.gguf_files.importance import Importance
from coprune.gguf_files.llama_cpp import NEED_IMPORTANCE, encoded_bytes, type_number
from coprune.gguf_files.sensitivity import Sensitivity
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.checkpoint.mapped_gguf import decode_into, ggml_library

_BY_32 = ("q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl")
_BY_256 = ("q6_k", "q5_k", "q4_k", "iq4_xs", "q3_k", "iq3_xxs", "q2_k", "iq2_xs")
TENSOR_TYPES = (*_BY_32, *_BY_256)
"""Types to choose from, for rows that are multiples of 32, and of 256."""
_PART, _LEAST = 64, 64
"""Share of rows (one in this many) rounded to measure errors, and their minimum number."""
_TIMED = (64, 1024)
"""Shape of the matrix on which types are timed."""

Losses = Mapping[str, Mapping[str, tuple[int, float]]]
"""By the tensor's name and the type: its bytes and its contribution to the loss."""


def losses_of(
    file: Path, importance: Importance, sensitivity: Mapping[str, Sequence[Sensitivity]], reporter: Reporter
) -> Losses:
    """Measure the loss of every type for every tensor, on some of its rows.

    Args:
        file: a 16-bit file.
        importance: used for quantising.
        sensitivity: by tensor; tensors without it are skipped.
        reporter: shows the progress.

    Returns:
        The losses, in nats of KL per token.
    """
    stored = [one for one in gguf_reader(file, field="model").tensors if one.name in sensitivity]
    found = dict[str, dict[str, tuple[int, float]]]()
    with reporter.bar("Errors of types", len(stored)) as advance:
        for tensor in stored:
            width, rows = (int(size) for size in tensor.shape[:2])
            kinds = () if width % 32 else _BY_32 if width % 256 else ("q8_0", *_BY_256)
            means = importance.get(tensor.name)
            own = {kind: 0.0 for kind in kinds if means is not None or kind not in NEED_IMPORTANCE}
            for one in sensitivity[tensor.name]:
                places, weights = _sampled(one.rows, max(_LEAST, rows // _PART))
                exact = torch.empty(len(places), width)
                decode_into(tensor, tensor.data[places.numpy()], exact)
                for kind in own:
                    errors = (rounded(exact, kind, means) - exact).square() @ one.columns
                    own[kind] += 0.5 * float(errors @ weights)
            if own:
                found[tensor.name] = {kind: (encoded_bytes((rows, width), kind)[0], loss) for kind, loss in own.items()}
            advance(1)
    return found


def expected_seconds(file: Path) -> float:
    """Return the expected seconds of `losses_of` for a 16-bit file."""
    shapes = [[int(size) for size in one.shape] for one in gguf_reader(file, field="model").tensors]
    weights = sum(shape[0] * max(_LEAST, shape[1] // _PART) for shape in shapes if len(shape) == 2)
    return weights * sum(map(seconds_to_round, TENSOR_TYPES))


@cache
def seconds_to_round(kind: str) -> float:
    """Return the seconds of one processor to quantise a weight to a type, measured on a few."""
    values = torch.randn(_TIMED, generator=torch.Generator().manual_seed(0))
    means = torch.ones(_TIMED[1])
    rounded(values, kind, means)  # the first call makes tables
    started = time.process_time()
    rounded(values, kind, means)
    return (time.process_time() - started) / values.numel()


def _sampled(sensitivity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sample rows: the most sensitive ones, and some of the others, weighted by the number that they represent."""
    if count >= len(sensitivity):
        return torch.arange(len(sensitivity)), sensitivity
    order = sensitivity.argsort(descending=True, stable=True)
    first, rest = order[: count // 2], order[count // 2 :]
    some = rest[:: -(-len(rest) // (count - len(first)))]
    return torch.cat([first, some]), torch.cat([sensitivity[first], sensitivity[some] * (len(rest) / len(some))])


def rounded(values: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """Return rows as llama.cpp's quantiser stores them in a type. importance: of the columns, 1 × columns."""
    from gguf import GGMLQuantizationType

    rows, width = values.shape
    values = values.contiguous()
    means = None if importance is None else importance.float().contiguous()
    stored = np.empty(encoded_bytes((rows, width), kind)[0], dtype=np.uint8)
    pointer = None if means is None else means.data_ptr()
    _quantiser()(type_number(kind), values.data_ptr(), stored.ctypes.data, 0, rows, width, pointer)
    out = torch.empty(rows, width)
    decode_into(
        SimpleNamespace(tensor_type=GGMLQuantizationType[kind.upper()], data=None), stored.reshape(rows, -1), out
    )
    return out


@cache
def _quantiser() -> Any:
    library = ggml_library()
    assert library is not None  # quantising requires it
    function = library.ggml_quantize_chunk
    addresses, sizes = [ctypes.c_void_p] * 2, [ctypes.c_int64] * 3
    function.argtypes, function.restype = [ctypes.c_int, *addresses, *sizes, ctypes.c_void_p], ctypes.c_size_t
    return function


def choose(losses: Losses, most: int) -> dict[str, str] | None:
    """Choose a type for each tensor so that the total loss is nearly minimal for a number of bytes.

    Starting from the smallest types, take the step that reduces the loss most per byte first. Steps follow the convex hull of
    each tensor's losses, so that stopping after any of them is the best choice for its bytes.

    Args:
        losses: of every tensor in each type.
        most: maximum bytes of all tensors together.

    Returns:
        Types by the tensor's name; None if even the smallest types take more.
    """
    hulls = {name: _hull(own) for name, own in losses.items()}
    left = most - sum(hull[0][0] for hull in hulls.values())
    if left < 0:
        return None
    at, steps = dict.fromkeys(hulls, 0), [_step(hull, 0, name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, more = heapq.heappop(steps)
        if more > left:  # smaller steps may still fit
            continue
        left -= more
        at[name] += 1
        if at[name] + 1 < len(hulls[name]):
            heapq.heappush(steps, _step(hulls[name], at[name], name))
    return {name: hulls[name][place][2] for name, place in at.items()}


_Hull = Sequence[tuple[int, float, str]]


def _step(hull: _Hull, place: int, name: str) -> tuple[float, str, int]:
    (bytes, loss, _), (more, less, _) = hull[place : place + 2]
    return (less - loss) / (more - bytes), name, more - bytes


def _hull(own: Mapping[str, tuple[int, float]]) -> _Hull:
    """Return the types on the lower convex hull of losses over bytes, up to the least loss."""
    found = list[tuple[int, float, str]]()
    for bytes, loss, kind in sorted((bytes, loss, kind) for kind, (bytes, loss) in own.items()):
        if found and (loss >= found[-1][1] or bytes == found[-1][0]):
            continue
        while len(found) > 1 and (loss - found[-1][1]) * (found[-1][0] - found[-2][0]) <= (
            found[-1][1] - found[-2][1]
        ) * (bytes - found[-1][0]):
            found.pop()
        found.append((bytes, loss, kind))
    return found
