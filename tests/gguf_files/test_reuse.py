"""Quants that copy tensors from earlier ones have the same bytes as without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coprune.gguf_files.copied_tensors import Quant, bytes_of_rows, quantize_beside
from coprune.gguf_files.llama_cpp import Quantisation, has_llama_cpp, quantize
from support.pico import pico_model
from support.pico_gguf import distinct_norms, write_pico_gguf


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")
def test_tensors_of_the_same_values_and_type_are_copied_to_the_same_bytes(tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = pico_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1, tie_word_embeddings=True)
    wanted = Quantisation("q4_k_m", embedding="q5_0")
    source = write_pico_gguf(distinct_norms(model), tmp_path / "f16.gguf", "F16")
    quantize(source, tmp_path / "alone.gguf", wanted)
    quantize(source, tmp_path / "earlier.gguf", Quantisation("q4_k_m"))
    earlier = Quant(tmp_path / "earlier.gguf", source)

    def beside(source: Path) -> bytes:
        quantize_beside([earlier], source, tmp_path / "beside.gguf", wanted)
        assert not [*tmp_path.glob("*.mixed")]
        return (tmp_path / "beside.gguf").read_bytes()

    alone = (tmp_path / "alone.gguf").read_bytes()
    assert beside(source) == alone
    table = next(one for one in GGUFReader(tmp_path / "alone.gguf").tensors if one.name == "token_embd.weight")
    rows = int(table.shape[1])
    assert bytes_of_rows(source, wanted, rows - 16) * rows == table.n_bytes * 16
    # Damage in the earlier file shows what is copied: only tensors with equal values in both sources.
    other = shutil.copyfile(source, tmp_path / "other.gguf")
    for file, name in ((earlier.file, "attn_q"), (earlier.file, "ffn_up"), (other, "ffn_up")):
        stored = next(one for one in GGUFReader(file, "r+").tensors if one.name == f"blk.0.{name}.weight")
        stored.data.reshape(-1)[0] += 1
    quantize(other, tmp_path / "alone.gguf", wanted)
    tensors = [{one.name: one.data.tobytes() for one in GGUFReader(tmp_path / "alone.gguf").tensors}]
    beside(other)
    tensors += [{one.name: one.data.tobytes() for one in GGUFReader(tmp_path / "beside.gguf").tensors}]
    assert {name for name, data in tensors[0].items() if data != tensors[1][name]} == {"blk.0.attn_q.weight"}
