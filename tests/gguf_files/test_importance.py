"""The importance matrix for llama.cpp's quantiser: measured, written, read, and useful."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

import coprune
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.gguf_files.importance import importance_of_head, measured, read_importance, write_importance
from coprune.gguf_files.llama_cpp import WATCHED, has_llama_cpp
from coprune.model.checkpoint.locate import locate
from coprune.model.checkpoint.mapped_gguf import decode
from support.pico import pico_model, pico_tokens
from support.pico_folder import save
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.saved import load_clean
from support.vocabularies import content_of

needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("importance")
    model = distinct_norms(pico_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1))
    save(model, folder / "dense")
    write_pico_gguf(model, folder / "f32.gguf")
    (folder / "text.txt").write_text(" ".join(f"w{3 + place * 7 % 250}" for place in range(3000)))
    return folder


def test_importance_is_the_mean_square_of_a_matrixs_inputs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coprune.gguf_files.importance.quickest_on_cpu", lambda: "float32")
    model, tokens, given = load_clean(place / "dense"), pico_tokens(3, 16), list[torch.Tensor]()
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    with torch.no_grad():
        model(tokens)
    found = measured(locate(place / "dense"), tokens, Reporter(quiet=True))["model.layers.0.mlp.down_proj.weight"]
    torch.testing.assert_close(found, given[0].square().mean(dim=(0, 1)).expand_as(found))


@needs_llama_cpp
def test_importance_of_the_head_is_the_mean_square_of_the_last_hidden_states(place: Path) -> None:
    tokens = pico_tokens(1, WATCHED + 10)
    with torch.no_grad():
        given = load_clean(place / "dense").model(tokens).last_hidden_state
    ((name, found),) = importance_of_head(place / "f32.gguf", tokens[0].tolist()).items()
    assert name == "output.weight"
    torch.testing.assert_close(found, given.square().mean(dim=1), rtol=0.01, atol=0)


@needs_llama_cpp
def test_importance_files_round_trip_and_lower_the_weighted_error(place: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"like": place / "f32.gguf", "type": "iq2_xs", "quiet": True}
    text = str(place / "text.txt")
    one = coprune.export(
        place / "dense", tmp_path / "1.gguf", imatrix="auto", dataset=text, save_imatrix=tmp_path / "i.gguf", **how
    )
    again = coprune.export(place / "dense", tmp_path / "2.gguf", imatrix=tmp_path / "i.gguf", **how)
    assert one.path.read_bytes() == again.path.read_bytes()
    importance = read_importance(tmp_path / "i.gguf")
    assert {name.split(".")[2] for name in importance} == {
        *("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    how["type"] = "q2_k"
    weighted = coprune.export(place / "dense", tmp_path / "3.gguf", imatrix=tmp_path / "i.gguf", **how)
    alike = coprune.export(place / "dense", tmp_path / "4.gguf", **how)
    name = "blk.0.ffn_down.weight"
    before, *after = (
        next(decode(one) for one in GGUFReader(file).tensors if one.name == name)
        for file in (place / "f32.gguf", weighted.path, alike.path)
    )
    errors = [float(((found - before).square() * importance[name]).sum()) for found in after]
    assert errors[0] < errors[1]


@needs_llama_cpp
def test_importance_of_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    for name, width in (("blk.0.ffn_down.weight", 768), ("blk.7.ffn_down.weight", 512)):
        write_importance(tmp_path / "other.gguf", {name: torch.ones(1, width)})
        with pytest.raises(BadInput, match="of another model"):
            coprune.export(
                place / "f32.gguf", tmp_path / "out.gguf", type="q2_k", imatrix=tmp_path / "other.gguf", quiet=True
            )


MEASURE = """
import sys
from pathlib import Path
from coprune.base.memory import resident_peak
from coprune.base.progress import Reporter
from coprune.gguf_files.importance import importance_of
from support.pico import pico_tokens
for file in sys.argv[1:]:
    importance_of(Path(file), pico_tokens(2, 64), Reporter(quiet=True))
    print(resident_peak()[1])
"""
"""Print the memory taken by each file; the first one includes the libraries."""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_only_a_part_of_the_model_is_in_memory(place: Path, tmp_path: Path) -> None:
    model = pico_model("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=16)
    for number, weight in enumerate(model.parameters()):
        weight.data *= 1 + number / 100  # otherwise all have the same norm, and each would be compared with all others
    big = write_pico_gguf(model, tmp_path / "big.gguf", tokenizer=content_of("bytes"))
    small = write_pico_gguf(pico_model("llama"), tmp_path / "small.gguf", tokenizer=content_of("bytes"))
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", MEASURE, str(small), str(big)]
    told = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, check=True
    )
    before, peak = map(int, told.stdout.split())
    assert peak - before < sum(parameter.nbytes for parameter in model.parameters()) / 2


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"type": "iq2_xs"}, "needs an importance matrix"),
        ({"type": "q8_0", "imatrix": "auto"}, "no effect"),
        ({"type": "q2_k", "imatrix": "missing.gguf"}, "is not a file"),
        ({"type": "q2_k", "save_imatrix": "i.gguf"}, "no importance matrix to save"),
    ],
)
@needs_llama_cpp
def test_an_export_refuses_bad_importance_settings(how: dict[str, str], said: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        coprune.export(place / "dense", tmp_path / "out.gguf", like=place / "f32.gguf", quiet=True, **how)  # type: ignore[arg-type]
