"""Every format decodes its encoder's values, and stores zeros and values of its grid without changing other codes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from coprune.model.checkpoint.formats import Weight, find_weights
from coprune.model.kept_slices import KeptSlices
from support.quantised import FORMATS

LETTERS = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class Stored:
    dtype: str
    shape: tuple[int, ...]


def encoded(form: str) -> tuple[Weight, dict[str, Tensor], Tensor]:
    """Return a weight, its parts and the values that they encode."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 64, 40) if form == "mxfp4" else (40, 96)
    parts, values = FORMATS[form].encode(torch.randn(shape, generator=generator))
    place = "mlp.experts.down_proj" if form == "mxfp4" else "mlp.down_proj"
    stored = {f"{place}{end}": part for end, part in parts.items()}
    entries = {name: Stored(LETTERS[part.dtype], tuple(part.shape)) for name, part in stored.items()}
    (weight,) = find_weights(FORMATS[form].config, entries).values()
    assert set(weight.parts.values()) == set(stored)
    return weight, {role: stored[name] for role, name in weight.parts.items()}, values


@pytest.mark.parametrize("form", FORMATS)
def test_decoding_and_encoding_again_keeps_values_and_codes(form: str) -> None:
    weight, stored, values = encoded(form)
    assert torch.equal(weight.decode(stored, torch.empty(weight.shape)), values)
    again, rounding = weight.encode(values, stored)
    assert rounding.values == 0
    for role, part in stored.items():
        assert torch.equal(again[role].reshape(-1).view(torch.uint8), part.reshape(-1).view(torch.uint8)), role
    masked = torch.where(torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.5, 0.0, values)
    zeros, rounding = weight.encode(masked, stored)
    assert rounding.values == 0
    assert torch.equal(weight.decode(zeros, torch.empty(weight.shape)), masked)


@pytest.mark.parametrize("form", FORMATS)
def test_other_values_are_rounded_to_the_nearest_nonzero_grid_value(form: str) -> None:
    weight, stored, values = encoded(form)
    moved = values + 0.01 * torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    parts, rounding = weight.encode(moved, stored)
    found = weight.decode(parts, torch.empty(weight.shape))
    assert (
        values.numel() - 2 <= rounding.values <= values.numel()
    )  # a few may already be on the grid up to the last bits
    assert bool((found != 0).all())
    # At least as near as the previous value, unless that was zero.
    assert bool(((found - moved).abs() <= (values - moved).abs() + 1e-6)[values != 0].all())


@pytest.mark.parametrize("form", FORMATS)
def test_rows_are_sliced_by_bytes_in_whole_scale_blocks(form: str) -> None:
    weight, stored, values = encoded(form)
    kept = KeptSlices(dim=values.ndim - 1 if form == "mxfp4" else 0, size=40, ranges=[[(0, 16), (32, 40)]])
    cut = weight.cut(stored, kept)
    entries = {weight.parts[role]: Stored(LETTERS[part.dtype], tuple(part.shape)) for role, part in cut.items()}
    (smaller,) = find_weights(FORMATS[form].config, entries).values()
    assert torch.equal(smaller.decode(cut, torch.empty(smaller.shape)), kept.cut(values))
