"""Training of a quantised file's scales: what its numbers stand for, and whole files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

import coprune
from coprune.base.errors import BadInput
from coprune.gguf_files.llama_cpp import has_llama_cpp
from coprune.gguf_files.matrix_rows import Part
from coprune.model.checkpoint.mapped_gguf import decode
from coprune.steps.train_scales import NUMBERS, terms
from support.exported import distance, exportable
from support.pico import pico_model
from support.pico_folder import save
from support.pico_gguf import distinct_norms, write_pico_gguf

ROWS, WIDTH = 4, 512


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{3 + place * 7 % 250}" for place in range(9000)))
    return str(file)


@pytest.mark.parametrize("kind", NUMBERS)
def test_values_are_sums_of_terms_proportional_to_the_numbers(kind: str) -> None:
    type_ = GGMLQuantizationType[kind.upper()]
    size, bytes_ = GGML_QUANT_SIZES[type_]
    data = np.random.default_rng(0).integers(0, 256, (ROWS, WIDTH // size, bytes_), dtype=np.uint8)
    for place, at in enumerate(NUMBERS[kind]):
        data[..., at : at + 2] = np.array([0.5 + place], dtype=np.float16).view(np.uint8)
    every = torch.arange(ROWS)
    stored = SimpleNamespace(tensor_type=type_, data=data.reshape(ROWS, -1))
    part = Part(stored, every, every, torch.arange(WIDTH))
    found = terms(part)
    assert found.shape == (len(NUMBERS[kind]), ROWS, WIDTH // size, size)
    assert torch.allclose(found.sum(dim=0).flatten(1), part.read(), atol=1e-4)
    for place, at in enumerate(NUMBERS[kind]):
        data[..., at : at + 2] = np.array([2 * (0.5 + place)], dtype=np.float16).view(np.uint8)
    assert torch.allclose(part.read(), 2 * found.sum(dim=0).flatten(1), atol=1e-3)


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")
@pytest.mark.parametrize("kind", ["q4_0", "q2_k"])
def test_trained_scales_bring_a_file_nearer_to_its_model(kind: str, text: str, tmp_path: Path) -> None:
    dense, like = exportable(tmp_path)
    how: dict[str, Any] = {"like": like, "type": kind, "quiet": True, "dataset": text}
    plain = coprune.export(dense, tmp_path / "plain.gguf", **how)
    made = coprune.export(dense, tmp_path / "made.gguf", distill=10240, **how)
    assert made.bytes == plain.bytes
    assert distance(made.path, dense) < distance(plain.path, dense)


@pytest.mark.slow
def test_experts_stay_as_they_were_rounded(text: str, tmp_path: Path) -> None:
    model = distinct_norms(pico_model("qwen3_moe", num_hidden_layers=2, hidden_size=64))
    save(model, tmp_path / "dense")
    like = write_pico_gguf(model, tmp_path / "f32.gguf", arch="qwen3moe")
    how: dict[str, Any] = {"like": like, "type": "q4_0", "quiet": True, "dataset": text}
    plain = coprune.export(tmp_path / "dense", tmp_path / "plain.gguf", **how)
    made = coprune.export(tmp_path / "dense", tmp_path / "made.gguf", distill=5120, **how)
    before, after = ({one.name: decode(one) for one in GGUFReader(file.path).tensors} for file in (plain, made))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "blk.0.attn_q.weight" in changed
    assert not any("exps" in name or "gate_inp" in name for name in changed)


def test_a_type_without_scales_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no scales"):
        coprune.export(tmp_path, tmp_path / "out.gguf", type="f16", distill=512)
