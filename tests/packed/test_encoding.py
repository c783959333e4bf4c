"""A run that writes packed in one pass gives what packing its dense folder would give."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import coprune
from coprune.base.errors import VerificationError
from coprune.model.checkpoint import writer
from coprune.packed.encoding import PackedEncoding
from coprune.packed.folder import is_packed_folder, pack, unpack
from coprune.packed.quantizer import load_packed
from coprune.run import context
from support.pico import pico_tokens
from support.pico_folder import save_pico, write_words
from support.sample import sampled
from support.saved import assert_same_tensors, load_clean, tensors_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for family in ("llama", "mixtral"):
        save_pico(folder / family, family)
    write_words(folder / "words.txt")
    return folder


def prune(place: Path, out: Path, family: str, **settings: Any) -> Path:
    common: dict[str, Any] = {"pattern": "2:4", "evaluate": False, "nsamples": 4, "seqlen": 16, "quiet": True}
    coprune.prune(place / family, "wanda", dataset=str(place / "words.txt"), save_model=out, **common, **settings)
    return out


@pytest.mark.parametrize(
    ("family", "stream", "single"),
    sampled(
        itertools.product(["llama", "mixtral"], [True, False], [True, False]),
        quick=[("llama", True, True), ("llama", False, False), ("mixtral", True, False)],
    ),
)
def test_a_run_writes_what_packing_its_dense_folder_gives(
    place: Path, tmp_path: Path, family: str, stream: bool, single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SINGLE_FILE_BYTES", 10**9 if single else 0)
    dense = prune(place, tmp_path / "dense", family, stream=stream)
    packed = prune(place, tmp_path / "packed", family, stream=stream, encoding="packed")
    assert is_packed_folder(packed)
    pack(dense, tmp_path / "afterwards")
    assert_same_tensors(tensors_of(packed), tensors_of(tmp_path / "afterwards"))
    unpack(packed, tmp_path / "unpacked")
    assert_same_tensors(tensors_of(tmp_path / "unpacked"), tensors_of(dense))
    load_clean(tmp_path / "unpacked")


def test_the_packed_model_loads_and_computes_what_the_dense_one_does(place: Path, tmp_path: Path) -> None:
    dense = load_clean(prune(place, tmp_path / "dense", "llama"))
    packed = load_packed(prune(place, tmp_path / "packed", "llama", encoding="packed"))
    tokens = pico_tokens(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(packed(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    card = (tmp_path / "packed" / "README.md").read_text(encoding="utf-8")
    assert "stored packed" in card
    assert "stored dense" not in card
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    of_unpacked = (tmp_path / "unpacked" / "README.md").read_text(encoding="utf-8")
    assert "stored dense" in of_unpacked
    assert not any(said in of_unpacked for said in ("stored packed", "import coprune"))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "coprune"


def test_a_packed_file_that_lost_a_value_is_not_given_its_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Losing(PackedEncoding):
        def write(self, file: Any, names: Any, tensors: Any) -> None:
            lost = ((name, tensor * 0 if name.endswith("q_proj.weight") else tensor) for name, tensor in tensors)
            super().write(file, names, lost)

    monkeypatch.setattr(context, "PackedEncoding", Losing)
    with pytest.raises(VerificationError, match="q_proj"):
        prune(place, tmp_path / "packed", "llama", encoding="packed")
    assert not (tmp_path / "packed").exists()
