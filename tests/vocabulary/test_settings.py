"""Integers and names in a folder's JSON files: each is updated, known to be no id, or reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig

import coprune
from coprune.base.errors import UnsupportedModel, VerificationError
from coprune.base.progress import Reporter
from coprune.model.checkpoint.locate import ModelFolder
from coprune.vocabulary.choose import Kept, choose
from coprune.vocabulary.cut_sources import FolderSource
from coprune.vocabulary.folder_cut import cut_folder
from coprune.vocabulary.kinds import Vocabulary
from coprune.vocabulary.settings import Naming
from support.pico_pairs import pico_pair_model
from support.vocabularies import content_of, save_with_tokens

QUIET = Reporter(quiet=True)
SOUND = ["<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>", "<|0.00|>"]


def with_tokens(added: list[str], special: bool = True) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` with additional tokens at its end."""
    tokenizer = Tokenizer.from_str(content_of("bytes"))
    tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def kept_in(folder: Path, size: int = 704) -> Kept:
    """Return some kept tokens, including the required ones."""
    import numpy as np

    source = FolderSource(ModelFolder(folder, "pico"), None)
    essential = {number for number in source.vocabulary.essential() | source.named if number < source.rows}
    weights = np.random.default_rng(0).random(source.rows)
    weights[1024:] = 0
    return choose(size, weights, essential, source.vocabulary.parts)


def cut(folder: Path, target: Path) -> tuple[Path, Kept]:
    kept = kept_in(folder)
    return cut_folder(ModelFolder(folder, "pico"), target, kept, QUIET), kept


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps((read(file) if file.is_file() else {}) | values), encoding="utf-8")


@pytest.fixture
def reserved(tmp_path: Path) -> Path:
    """Return a model whose tokenizer has reserved tokens, each with a row."""
    content = with_tokens([f"<|reserved_special_token_{number}|>" for number in range(32)])
    folder = save_with_tokens(tmp_path / "dense", vocab_size=1056)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "named",
    [
        {"pad_token": "<|reserved_special_token_7|>"},
        {"pad_token": {"content": "<|reserved_special_token_7|>", "__type": "AddedToken", "special": True}},
        {"extra_special_tokens": ["<|reserved_special_token_7|>", "<unused1>"]},
        {"extra_special_tokens": {"image_token": "<|reserved_special_token_7|>"}},
        {"additional_special_tokens": ["<|reserved_special_token_7|>"]},
    ],
)
def test_a_reserved_token_that_the_tokenizers_settings_name_keeps_its_row(
    named: dict[str, Any], reserved: Path, tmp_path: Path
) -> None:
    change(reserved / "tokenizer_config.json", **named)
    small, kept = cut(reserved, tmp_path / "small")
    tokenizer = AutoTokenizer.from_pretrained(small)
    assert len(tokenizer) == read(small / "config.json")["vocab_size"] == len(kept.old) == 704
    assert kept.old[tokenizer.get_vocab()["<|reserved_special_token_7|>"]] == 1024 + 7
    assert "<|reserved_special_token_8|>" not in tokenizer.get_vocab()


def test_batches_can_be_padded_with_a_reserved_token(reserved: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    change(reserved / "tokenizer_config.json", pad_token="<|reserved_special_token_7|>")
    small, _ = cut(reserved, tmp_path / "small")
    batch = AutoTokenizer.from_pretrained(small)(["Hello", "Hello, how are you?"], padding=True, return_tensors="pt")
    AutoModelForCausalLM.from_pretrained(small)(batch["input_ids"], attention_mask=batch["attention_mask"])


def test_a_token_without_a_row_is_not_added_again(tmp_path: Path) -> None:
    """Such as the image token in text models of a family with larger vision models."""
    content = with_tokens(["<image_soft_token>"])
    folder = save_with_tokens(tmp_path / "dense", content=json.dumps(content), vocab_size=1024)
    change(
        folder / "tokenizer_config.json", image_token="<image_soft_token>", extra_special_tokens=["<image_soft_token>"]
    )
    change(folder / "special_tokens_map.json", image_token="<image_soft_token>")
    notes = FolderSource(ModelFolder(folder, "pico"), None).notes(kept_in(folder))
    small, _ = cut(folder, tmp_path / "small")
    assert len(AutoTokenizer.from_pretrained(small)) == 704
    assert any("<image_soft_token>" in note for note in notes)


def test_a_cut_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    folder = save_with_tokens(tmp_path / "dense")
    monkeypatch.setattr("coprune.vocabulary.settings.without_names", lambda found, _: found | {"pad_token": "<more>"})
    with pytest.raises(VerificationError, match=r"705 tokens for 704 rows: '<more>'"):
        cut(folder, tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.fixture
def whisper(tmp_path: Path) -> Path:
    """Return a speech model whose languages and tasks are tokens at the end of its vocabulary."""
    content = with_tokens(SOUND)
    ids = {token: 1024 + place for place, token in enumerate(SOUND)}
    model = pico_pair_model("Whisper", vocab_size=1032, decoder_start_token_id=1024)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        forced_decoder_ids=[[1, None], [2, ids["<|transcribe|>"]]],
        suppress_tokens=[7, 8, 1024],
        begin_suppress_tokens=[900, 2],
        no_timestamps_token_id=ids["<|notimestamps|>"],
        lang_to_id={token: ids[token] for token in SOUND[1:3]},
        task_to_id={"translate": ids["<|translate|>"], "transcribe": ids["<|transcribe|>"]},
        alignment_heads=[[1, 0], [1, 3]],
        is_multilingual=True,
        max_initial_timestamp_index=50,
        max_length=448,
    )
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    change(tmp_path / "dense" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>")
    change(tmp_path / "dense" / "preprocessor_config.json", feature_size=16, n_fft=400, hop_length=160, chunk_length=1)
    change(tmp_path / "dense" / "codes.json", en={"id": 1025, "content": "<|en|>"})
    return tmp_path / "dense"


def test_language_and_task_ids_are_updated_but_head_positions_are_not(whisper: Path, tmp_path: Path) -> None:
    before = read(whisper / "generation_config.json")
    small, kept = cut(whisper, tmp_path / "small")
    new, after = kept.new, read(small / "generation_config.json")
    assert {name for name in before if before[name] != after[name]} == {
        *("decoder_start_token_id", "forced_decoder_ids", "suppress_tokens", "begin_suppress_tokens"),
        *("no_timestamps_token_id", "lang_to_id", "task_to_id"),
    }
    tokenizer = AutoTokenizer.from_pretrained(small)
    assert after["lang_to_id"] == {token: tokenizer.convert_tokens_to_ids(token) for token in SOUND[1:3]}
    assert after["task_to_id"]["transcribe"] == tokenizer.convert_tokens_to_ids("<|transcribe|>")
    assert after["forced_decoder_ids"] == [[1, None], [2, after["task_to_id"]["transcribe"]]]
    assert after["suppress_tokens"] == [new[7], new[8], new[1024]]
    assert after["begin_suppress_tokens"] == [new[900], new[2]]
    assert (small / "preprocessor_config.json").read_text() == (whisper / "preprocessor_config.json").read_text()
    assert read(small / "codes.json")["en"]["id"] == new[1025]


def test_t5_sentinels_are_kept_and_their_number_is_not_an_id(tmp_path: Path) -> None:
    content = with_tokens([f"<extra_id_{number}>" for number in range(31, -1, -1)])
    pico_pair_model("T5", vocab_size=1056, pad_token_id=0, decoder_start_token_id=0).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    names = [f"<extra_id_{number}>" for number in range(32)]
    file = tmp_path / "dense" / "tokenizer_config.json"
    change(file, extra_ids=32, additional_special_tokens=names, tokenizer_class="PreTrainedTokenizerFast")
    small, kept = cut(tmp_path / "dense", tmp_path / "small")
    tokenizer = AutoTokenizer.from_pretrained(small)
    assert len(tokenizer) == 704
    ids = tokenizer.get_vocab()
    assert [kept.old[ids[name]] for name in names] == list(range(1055, 1023, -1))
    assert read(small / "tokenizer_config.json")["extra_ids"] == 32


NESTED: dict[str, Any] = {
    "model_type": "sees_and_hears",
    "image_token_id": 1024,
    "boi_token_index": 1025,
    "im_start_id": 1026,
    "eos_token_id": [2, 1027],
    "text_config": {"vocab_size": 1056, "vocab_size_per_layer_input": 1040, "pad_token_id": 1028, "hidden_size": 1024},
    "audio_config": {"vocab_size": 128, "vocab_offset": 1056, "pad_token_id": 100, "hidden_size": 1029},
    "vision_config": {"num_channels": 3, "image_size": 1024, "mm_tokens_per_image": 1025, "patch_id_of_nothing": -1},
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 1024},
}


def naming() -> tuple[Naming, Kept]:
    vocabulary = Vocabulary.of(with_tokens([f"<mark{number}>" for number in range(32)]))
    kept = Kept((*range(500), *range(1024, 1056)))
    return Naming(1056, vocabulary, sizes={1056, 1040}), kept


def test_ids_of_nested_configurations_are_updated_unless_of_another_vocabulary() -> None:
    by, kept = naming()
    after = by.cut(NESTED, kept)
    changed = {"image_token_id": 500, "boi_token_index": 501, "im_start_id": 502, "eos_token_id": [2, 503]}
    assert after == NESTED | changed | {"text_config": NESTED["text_config"] | {"pad_token_id": 504}}
    assert not by.doubtful(NESTED, kept)
    assert by.ids(NESTED) == {1024, 1025, 1026, 2, 1027, 1028}


def test_a_number_that_may_be_an_id_is_reported_with_its_place() -> None:
    by, kept = naming()
    content = {"reader": {"marks": [{"begins": 1030}], "layers": 1031, "zero": 0}}
    assert by.doubtful(content, kept) == ["reader.marks[0].begins = 1030"]
    assert by.cut(content, kept) == content


def test_a_sequence_bias_is_not_taken_for_a_token_id() -> None:
    by, kept = naming()
    assert by.cut({"sequence_bias": [[[1024, 3], 1030], [[4], -2.5]]}, kept)["sequence_bias"][0] == [[500, 3], 1030]
    assert by.cut({"bad_words_ids": [[1024], [3, 1025]]}, kept) == {"bad_words_ids": [[500], [3, 501]]}


def test_an_id_of_a_removed_token_is_refused_with_its_place() -> None:
    by, kept = naming()
    with pytest.raises(UnsupportedModel, match=r"text_config.pad_token_id names the token 700"):
        by.cut({"text_config": {"pad_token_id": 700}}, kept)


def test_a_run_reports_numbers_that_it_left_unchanged(tmp_path: Path) -> None:
    folder = save_with_tokens(tmp_path / "dense", content=json.dumps(with_tokens(SOUND)))
    change(folder / "processor_config.json", begins=1030)
    (tmp_path / "text.txt").write_text("Some words, and more of them.\n" * 200)
    text = str(tmp_path / "text.txt")
    asked: dict[str, Any] = {"vocabulary_text": text, "dataset": text, "evaluate": False, "quiet": True}
    facts = coprune.prune(folder, remove="vocabulary=704", save_model=tmp_path / "small", **asked).report.vocabulary
    assert any("processor_config.json: begins = 1030" in line for line in facts.lines())
