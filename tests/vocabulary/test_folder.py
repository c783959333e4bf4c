"""A folder with fewer tokens: logits of kept tokens equal the dense model's bit by bit, in every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from coprune.base.errors import UnsupportedModel
from coprune.base.progress import Reporter
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.edits import Edits
from coprune.model.removed import Tokens
from coprune.vocabulary.choose import Kept
from coprune.vocabulary.folder_cut import cut_folder
from coprune.vocabulary.settings import MAP_FILE
from support.pico import pico_model
from support.pico_folder import listing
from support.pico_hybrids import COMMON
from support.sample import of_ten
from support.tiny import tiny_model
from support.vocabularies import SIZE, content_of, kept_of, save_with_tokens

FAMILIES = ("llama", "opt", "gpt2", "qwen3", "gemma2", "gemma3_text", "bloom", "cohere", "granite", "gpt_neox", "olmo2")
GEMMA4: dict[str, Any] = dict(COMMON, vocab_size=SIZE, num_hidden_layers=2, hidden_size_per_layer_input=16)
GEMMA4 |= dict(
    num_kv_shared_layers=0,
    head_dim=16,
    global_head_dim=16,
    layer_types=["sliding_attention", "full_attention"],
    sliding_window=8,
)
QUIET = Reporter(quiet=True)


def cut(source: Path, target: Path, kept: Kept) -> Path:
    return cut_folder(ModelFolder(source, "pico"), target, kept, QUIET, str(source))


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model, _ = load_model(ModelFolder(folder, str(folder)), "float32", processed=False)
    with torch.inference_mode():
        return model(tokens).logits


@pytest.mark.parametrize("family", of_ten(FAMILIES))
def test_logits_of_kept_tokens_are_equal_bit_by_bit(family: str, tmp_path: Path) -> None:
    source = save_with_tokens(tmp_path / "dense", family)
    kept = kept_of(json.loads(content_of("bytes")), 640)
    small = cut(source, tmp_path / "small", kept)
    new = torch.randint(0, 640, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = logits(source, torch.from_numpy(kept.rows)[new])[..., torch.from_numpy(kept.rows)]
    assert torch.equal(logits(small, new), expected)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
def test_tied_and_untied_heads_are_cut(changes: dict[str, Any], tmp_path: Path) -> None:
    source = save_with_tokens(tmp_path / "dense", "llama", **changes)
    kept = kept_of(json.loads(content_of("bytes")), 640)
    small = cut(source, tmp_path / "small", kept)
    new = torch.arange(32)[None]
    rows = torch.from_numpy(kept.rows)
    assert torch.equal(logits(small, new), logits(source, rows[new])[..., rows])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi", {}),  # a bias in the head
        ("gemma4_text", {"vocab_size_per_layer_input": SIZE}),
        ("gemma4_text", {"vocab_size_per_layer_input": SIZE - 64}),  # fewer than in the embedding
        ("mamba", {}),
        ("falcon", {}),
        ("qwen3_next", {}),
    ],
)
def test_per_layer_embedding_tables_are_cut_too(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    made = pico_model(family, **GEMMA4, **changes) if changes else tiny_model(family, vocab_size=SIZE)
    made.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text(content_of("bytes"), encoding="utf-8")
    kept = kept_of(json.loads(content_of("bytes")), 640)
    small = cut(tmp_path / "dense", tmp_path / "small", kept)
    rows = torch.from_numpy(kept.rows)
    if size := changes.get("vocab_size_per_layer_input"):
        assert json.loads((small / "config.json").read_text())["vocab_size_per_layer_input"] == kept.below(size)
    new = torch.randint(0, min(640, kept.below(changes.get("vocab_size_per_layer_input", SIZE))), (1, 24))
    assert torch.equal(logits(small, new), logits(tmp_path / "dense", rows[new])[..., rows])


def test_token_settings_are_updated_and_old_tokenizer_files_dropped(tmp_path: Path) -> None:
    source = save_with_tokens(tmp_path / "dense")
    (source / "tokenizer.model").write_bytes(b"old")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 6], "suppress_tokens": [3]}))
    kept = kept_of(json.loads(content_of("bytes")), 640)
    small = cut_folder(ModelFolder(source, "pico"), tmp_path / "small", kept, QUIET)
    assert not (small / "tokenizer.model").exists()
    generation = json.loads((small / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [kept.new[2], kept.new[6]], "suppress_tokens": [kept.new[3]]}
    assert json.loads((small / MAP_FILE).read_text())["old_ids"] == list(kept.old)
    assert Edits.read(small).removals() == [Tokens(tokens=SIZE, left=640)]
    begins = Tokenizer.from_file(str(small / "tokenizer.json")).encode("Hello").ids[0]
    assert kept.old[begins] == Tokenizer.from_str(content_of("bytes")).token_to_id("<s>")


def test_a_refused_folder_leaves_nothing(tmp_path: Path) -> None:
    source = save_with_tokens(tmp_path / "dense")
    (source / "tokenizer.json").unlink()
    (source / "tekken.json").write_text("{}")
    before = listing(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"only tekken.json"):
        cut(source, tmp_path / "small", Kept(tuple(range(640))))
    assert listing(tmp_path) == before


def test_rows_in_several_shards_equal_the_sources(tmp_path: Path) -> None:
    from coprune.model.checkpoint.shards import read_tensor, stored_entries

    source = save_with_tokens(tmp_path / "dense", tie_word_embeddings=False)
    kept = kept_of(json.loads(content_of("bytes")), 640)
    small = cut(source, tmp_path / "small", kept)
    before, after = stored_entries(source), stored_entries(small)
    assert len({entry.file for entry in after.values()}) > 1
    for name, entry in after.items():
        whole = read_tensor(before[name]).numpy()
        assert np.array_equal(read_tensor(entry).numpy(), whole[kept.rows] if whole.shape[0] == SIZE else whole)
