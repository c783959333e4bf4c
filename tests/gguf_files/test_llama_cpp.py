"""A GGUF file in llama.cpp, as far as measurements rely on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coprune.gguf_files.llama_cpp import LlamaCpp
from support.pico import pico_model, pico_tokens
from support.pico_gguf import write_pico_gguf


def test_llama_cpp_goes_on_where_it_was(tmp_path: Path) -> None:
    """Steps after a prompt give what the whole text gives."""
    pytest.importorskip("llama_cpp_py_sync")
    model, tokens = pico_model("llama"), pico_tokens(1, 12)[0].tolist()
    loaded = LlamaCpp(write_pico_gguf(model, tmp_path / "model.gguf"), context=32, threads=1)
    whole = loaded.logits(tokens)
    with torch.no_grad():
        torch.testing.assert_close(whole, model(torch.tensor([tokens])).logits[0], rtol=2e-2, atol=2e-2)
    loaded.forget()
    loaded.read(tokens[:10])
    loaded.read(tokens[10:11])
    loaded.read(tokens[11:], all_logits=True)
    torch.testing.assert_close(loaded.last_logits(1)[0], whole[-1], rtol=1e-2, atol=1e-2)
