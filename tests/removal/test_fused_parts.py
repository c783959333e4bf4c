"""Heads in fused query-key-value matrices: the rows of a head are found in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coprune.removal.channels_and_heads import find_parts
from support.pico import pico_model, pico_tokens
from support.walking import prove

HEAD = 16
"""Width of a head in all models, which have four query heads."""
ROWS = {
    # Row ranges of the first key-value head, in heads.
    "phi3": [(0, 2), (4, 5), (6, 7)],  # four queries, two keys, two values
    "gpt2": [(0, 1), (4, 5), (8, 9)],  # stored transposed
    "gpt_neox": [(0, 3)],  # query, key and value head by head
    "bloom": [(0, 3)],
    "falcon": [(0, 4)],  # two queries with their key and value
}


@pytest.mark.parametrize("family", ROWS)
def test_the_rows_of_a_head_are_found(family: str) -> None:
    model = pico_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parts in dict(find_parts(prove(model, pico_tokens(1, 16)))).values():
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


APART = {
    # Numbers of rows of the first key-value head, by matrix.
    "qwen3_next": {"q_proj": 64, "k_proj": 16, "v_proj": 16},  # two queries, each followed by its output gate
    "qwen3_5_text": {"q_proj": 64, "k_proj": 16, "v_proj": 16},
    "afmoe": {"q_proj": 32, "k_proj": 16, "v_proj": 16, "gate_proj": 32},
    # The non-positional part of a key (16) and a value; queries also have the positional part (8).
    "deepseek_v3": {"q_b_proj": 24, "kv_b_proj": 32},
    "minicpm3": {"q_b_proj": 20, "kv_b_proj": 28},
    "deepseek_v2 without compressed queries": {"q_proj": 24, "kv_b_proj": 32},
}


@pytest.mark.parametrize("case", APART)
def test_the_rows_of_a_head_with_a_gate_or_compressed_keys_are_found(case: str) -> None:
    family, *more = case.split(" ", 1)
    changes: dict[str, Any] = {"q_lora_rank": None} if more else {}
    model = pico_model(family, **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = dict(find_parts(prove(model, pico_tokens(1, 16))))
    parts = [part for own in found.values() for part in own if part.kind == "heads"]
    assert len(parts) == sum(name.endswith("self_attn.o_proj.weight") for name in before) > 0
    for part in parts:
        masks = part.masks([torch.arange(part.count) == 0])
        columns = masks.pop(part.fold.consumers[0].parameter)
        assert part.name.endswith("o_proj")
        assert torch.equal(columns, (torch.arange(64) < 64 // part.count).expand_as(columns))
        kept = {name.split(".")[-2]: mask for name, mask in masks.items()}
        assert kept.keys() == APART[case].keys()
        for name, rows in APART[case].items():
            assert torch.equal(kept[name], (torch.arange(len(kept[name])) < rows)[:, None].expand_as(kept[name]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
