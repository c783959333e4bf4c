"""Blocks padded with zeros to one width: a GGUF file omits the padding if llama.cpp computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import PreTrainedModel

import coprune
from coprune.base.errors import UnsupportedModel, VerificationError
from coprune.gguf_files import deci
from coprune.gguf_files.llama_cpp import LlamaCpp, has_llama_cpp
from coprune.gguf_files.metadata import Field, Plan, Planned, write_gguf
from coprune.gguf_files.verify import require_written
from coprune.model.edits import Edits
from coprune.steps import export
from coprune.steps.export import Gguf
from support.padded import pad_blocks
from support.pico import pico_model, pico_tokens
from support.pico_folder import save
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.saved import load_clean

TOKENS = pico_tokens(1, 16)
CHANNELS = {0: 64, 1: 32}
needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")


def made_of(model: PreTrainedModel, folder: Path, arch: str, pad: Any, **options: Any) -> tuple[Gguf, Tensor]:
    """Return a padded model's exported file, and the logits of its folder."""
    like = write_pico_gguf(distinct_norms(model), folder / "like.gguf", arch=arch)
    save(model, folder / "dense")
    save(pad(model), folder / "padded")
    Edits().write(folder / "padded", str(folder / "dense"))
    with torch.no_grad():
        expected = load_clean(folder / "padded")(TOKENS, use_cache=False).logits[0]
    return coprune.export(folder / "padded", folder / "out.gguf", like=like, quiet=True, **options), expected


def off(file: Path, expected: Tensor) -> float:
    found = LlamaCpp(file, context=32, threads=1).logits(TOKENS[0].tolist())
    return float((found - expected).norm() / expected.norm())


def said(file: Path, *keys: str) -> list[Any]:
    fields = GGUFReader(file).fields
    arch = fields["general.architecture"].contents()
    return [fields[f"{arch}.{key}"].contents() for key in keys]


def pad(model: PreTrainedModel) -> PreTrainedModel:
    return pad_blocks(model, CHANNELS, {1: [0]})


@needs_llama_cpp
@pytest.mark.parametrize(("kind", "most"), [("f32", 2e-3), ("q8_0", 5e-2), ("q4_k_m", 0.5)])
def test_every_block_is_stored_at_its_own_width(kind: str, most: float, tmp_path: Path) -> None:
    made, expected = made_of(pico_model("llama"), tmp_path, "llama", pad, type=kind)
    assert off(made.path, expected) < most
    assert made.architecture == "deci"
    assert [one.line() for one in made.removed] == [
        "zeros: key-value heads 2 → 1 to 2 of a block, channels 96 → 32 to 96 of a block"
    ]
    counts = said(made.path, "feed_forward_length", "attention.head_count", "attention.head_count_kv")
    assert counts == [[64, 32, 96], [4, 2, 4], [2, 1, 2]]
    assert {path.name for path in tmp_path.iterdir()} == {"like.gguf", "dense", "padded", "out.gguf"}


@needs_llama_cpp
def test_rotary_halves_of_a_head_are_interleaved(tmp_path: Path) -> None:
    model = pico_model("qwen2", use_sliding_window=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    made, expected = made_of(model, tmp_path, "qwen2", lambda whole: pad_blocks(whole, CHANNELS, {}), type="f32")
    assert made.architecture == "deci"
    assert off(made.path, expected) < 2e-3


@needs_llama_cpp
def test_an_unevenly_cut_model_is_stored_without_padding(tmp_path: Path) -> None:
    def uneven(model: PreTrainedModel) -> PreTrainedModel:
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(0.01)  # so that it hardly matters
        return model

    model = distinct_norms(uneven(pico_model("llama")))
    like = write_pico_gguf(model, tmp_path / "like.gguf")
    save(model, tmp_path / "dense")
    settings: dict[str, Any] = {"dataset": pico_tokens(4, 32), "align": 32, "evaluate": False, "quiet": True}
    small = tmp_path / "small"
    coprune.prune(tmp_path / "dense", remove="channels=0.33", allocation="error", save_model=small, **settings)
    made = coprune.export(small, tmp_path / "out.gguf", like=like, type="f32", quiet=True)
    assert made.architecture == "deci"
    (widths,) = said(made.path, "feed_forward_length")
    assert (widths[0], sum(widths)) == (32, 3 * 64)
    with torch.no_grad():
        assert off(made.path, load_clean(small)(TOKENS, use_cache=False).logits[0]) < 2e-3


@needs_llama_cpp
def test_padding_is_kept_on_request(tmp_path: Path) -> None:
    made, expected = made_of(pico_model("llama"), tmp_path, "llama", pad, type="f32", padded=True)
    assert (made.architecture, said(made.path, "feed_forward_length"), made.removed) == ("llama", [96], [])
    assert off(made.path, expected) < 2e-3


@needs_llama_cpp
def test_blocks_of_one_narrow_width_keep_the_architecture(tmp_path: Path) -> None:
    def alike(model: PreTrainedModel) -> PreTrainedModel:
        return pad_blocks(model, {0: 64, 1: 60, 2: 40}, {0: [0], 1: [1], 2: [0]})

    made, expected = made_of(pico_model("llama"), tmp_path, "llama", alike, type="f32")
    assert made.architecture == "llama"
    counts = said(made.path, "feed_forward_length", "attention.head_count", "attention.key_length")
    assert counts == [64, 2, 16]
    assert off(made.path, expected) < 2e-3


@needs_llama_cpp
def test_models_that_the_architecture_cannot_express_stay_padded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Granite scales its blocks' outputs, which the architecture with a width per block cannot express."""
    model = pico_model("granite", embedding_multiplier=3.0)
    made, expected = made_of(model, tmp_path, "granite", pad, type="f32")
    assert (made.architecture, said(made.path, "feed_forward_length")) == ("granite", [96])
    assert off(made.path, expected) < 2e-3
    (tmp_path / "out.gguf").unlink()
    coprune.export(tmp_path / "padded", tmp_path / "out.gguf", like=tmp_path / "like.gguf")
    assert "stay padded with zeros: the architecture deci does not read granite." in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize("here", [False, True])
def test_padding_stays_unless_llama_cpp_confirms_equal_outputs(
    here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "has_llama_cpp", lambda: here)
    monkeypatch.setattr(export, "same_in_llama_cpp", lambda padded, narrow: False)
    made, _ = made_of(pico_model("llama"), tmp_path, "llama", pad, type="q8_0")
    assert (made.architecture, said(made.path, "feed_forward_length")) == ("llama", [96])
    assert {path.name for path in tmp_path.iterdir()} == {"like.gguf", "dense", "padded", "out.gguf"}


@needs_llama_cpp
def test_another_model_is_not_the_same_in_llama_cpp(tmp_path: Path) -> None:
    files = [write_pico_gguf(pico_model("llama", seed=seed), tmp_path / f"{seed}.gguf") for seed in (0, 1)]
    assert deci.same_in_llama_cpp(files[0], files[0])
    assert not deci.same_in_llama_cpp(*files)
    (tmp_path / "none.gguf").write_bytes(b"GGUF")
    assert not deci.same_in_llama_cpp(files[0], tmp_path / "none.gguf")


def test_a_width_missing_in_the_metadata_is_refused() -> None:
    plan = Plan("x", {"x.block_count": Field(1, 4)}, "f32", {})
    with pytest.raises(UnsupportedModel, match="how wide an attention head is"):
        deci._head_width(plan)


def test_a_file_with_other_values_is_detected(tmp_path: Path) -> None:
    plan = Plan("x", {}, "f32", {"a": Planned("a", (2, 32), "f32")})
    write_gguf(tmp_path / "x.gguf", plan, lambda name: torch.ones(2, 32), lambda count: None)
    require_written(tmp_path / "x.gguf", plan, lambda name: torch.ones(2, 32))
    with pytest.raises(VerificationError, match="a has a relative error of"):
        require_written(tmp_path / "x.gguf", plan, lambda name: torch.arange(64.0).view(2, 32))
