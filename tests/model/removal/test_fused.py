"""Heads where query, key and value are one matrix: which of its rows belong to a head is found, whatever their order."""

from __future__ import annotations

import pytest
import torch

from coprune.model.removal.find_parts import find_parts
from support.pico import pico_model, pico_tokens
from support.walking import prove

HEAD = 16
"""Width of a head of all of them; four query heads."""
ROWS = {
    # Of the first key-value head: starts and ends, in heads.
    "phi3": [(0, 2), (4, 5), (6, 7)],  # four queries, two keys, two values
    "gpt2": [(0, 1), (4, 5), (8, 9)],  # stored the other way round
    "gpt_neox": [(0, 3)],  # query, key and value head by head
    "bloom": [(0, 3)],
    "falcon": [(0, 4)],  # two queries with their key and value
}


@pytest.mark.parametrize("family", ROWS)
def test_the_rows_of_a_head_are_found(family: str) -> None:
    model = pico_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parts in dict(find_parts(prove(model, pico_tokens(1, 16)), ())).values():
        (part,) = (part for part in parts if part.kind == "heads")
        assert part.count == (2 if family in ("phi3", "falcon") else 4)
        masks = part.masks([torch.arange(part.count) == 0])
        (fused,) = (
            name for name in masks if ("qkv" in name or "query" in name or "c_attn" in name) and "bias" not in name
        )
        kept = masks[fused].T if family == "gpt2" else masks[fused]
        expected = torch.zeros(len(kept), dtype=torch.bool)
        for start, end in ROWS[family]:
            expected[start * HEAD : end * HEAD] = True
        assert torch.equal(kept, expected[:, None].expand_as(kept))
        if (bias := fused.replace("weight", "bias")) in before:
            assert torch.equal(masks[bias], expected)
        columns = masks[part.fold.consumers[0].parameter]
        assert int(columns.sum()) == columns.numel() // part.count
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
