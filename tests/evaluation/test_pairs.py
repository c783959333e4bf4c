"""Encoder-decoders: their calibration pairs, and the perplexity of targets against the model's own forwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

import coprune
from coprune.base.errors import BadInput, UnsupportedModel
from coprune.data.marks import Marks
from coprune.data.pairs import Pairs, from_text
from coprune.data.windows import Windows
from coprune.model.edit import DropBlock, KeepSlices
from coprune.model.edits import Edits
from support.pico_folder import write_words
from support.pico_pairs import save_pair_model
from support.pico_readers import FIRST, LAST, MASK, marking_tokenizer
from support.sample import sampled

START = 4
PRUNING: dict[str, Any] = dict(nsamples=6, seqlen=16, sparsity=0.6, quiet=True, layer_error=False)
REMOVING = {key: value for key, value in PRUNING.items() if key != "sparsity"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_words(folder / "words.txt", 600)
    words = (folder / "words.txt").read_text().split()
    rows = [{"input": " ".join(words[i : i + 9]), "output": " ".join(words[i : i + 4 + i % 3])} for i in range(30)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_pair_model(folder / "T5", "T5")
    return folder


@torch.no_grad()
def loss_of_targets(folder: Path, place: Path) -> float:
    """Return the mean loss per token of the targets, computed pair by pair."""
    model, tokenizer, total, count = AutoModelForSeq2SeqLM.from_pretrained(folder), marking_tokenizer(), 0.0, 0
    for line in (place / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        source, labels = (tokenizer(row[key], return_tensors="pt")["input_ids"] for key in ("input", "output"))
        logits: Tensor = model(input_ids=source, labels=labels).logits[0]
        total += float(functional.cross_entropy(logits, labels[0], reduction="sum"))
        count += labels.numel()
    return total / count


@pytest.mark.parametrize("stream", [pytest.param(True, marks=pytest.mark.slow), False])
def test_perplexity_is_that_of_forwards_before_and_after(stream: bool, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    settings = {"dataset": place / "pairs.jsonl", "eval_data": place / "pairs.jsonl", **PRUNING}
    (found,) = coprune.prune(place / "T5", "wanda", save_model=out, stream=stream, **settings).report.perplexity
    for folder, value in ((place / "T5", found.dense), (out, found.pruned)):
        assert value == pytest.approx(torch.tensor(loss_of_targets(folder, place)).exp().item(), rel=1e-5)
    (again,) = coprune.evaluate(out, place / "pairs.jsonl", quiet=True).perplexity
    assert (again.title, again.windows) == ("perplexity of targets", 30)
    assert again.value == pytest.approx(found.pruned, rel=1e-5)


def text_of(*rows: list[int]) -> Windows:
    return Windows(torch.tensor(rows), "", "text")


def test_plain_text_becomes_pairs_with_masked_hidden_or_unchanged_spans() -> None:
    ids = [FIRST, *range(10, 30), LAST]
    marks = Marks((FIRST,), (LAST,))
    masked = from_text(text_of(ids), marking_tokenizer(), marks, START).tokens
    assert isinstance(masked, Pairs)
    assert masked.written.tolist() == [[START, *ids]]
    (source,) = masked.source.tolist()
    assert (source[0], source[-1], source.count(MASK), len(source)) == (FIRST, LAST, 1, len(ids) - 2)
    bare = marking_tokenizer()
    bare.mask_token = None
    same = from_text(text_of(ids), bare, marks, START)
    assert (same.tokens.source.tolist(), same.tokens.written.tolist()) == ([ids], [[START, *ids]])
    assert same.source == "text (read and written as it is)"
    bare.add_tokens([f"<extra_id_{number}>" for number in range(2)])
    assert hidden_and_written(bare, ids, marks) == ids[1:-1]


def hidden_and_written(tokenizer: PreTrainedTokenizerFast, ids: list[int], marks: Marks) -> list[int]:
    """Reassemble a text from a source with sentinels and the target with their spans."""
    pairs = from_text(text_of(ids), tokenizer, marks, START).tokens
    assert isinstance(pairs, Pairs)
    (source,), (target,) = pairs.source.tolist(), pairs.written.tolist()
    first, second = (tokenizer.convert_tokens_to_ids(f"<extra_id_{number}>") for number in range(2))
    assert (target[0], target[1], target[-2], target[-1]) == (START, first, second, LAST)
    at = source.index(first)
    return [*source[1:at], *target[2:-2], *source[at + 1 : -1]]


def test_malformed_pairs_are_refused(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"source": "w5", "target": "w6"}\n{"source": "w5"}')
    with pytest.raises(BadInput, match=r"row 2 of .* is not a pair of texts"):
        coprune.prune(place / "T5", "wanda", dataset=file, **PRUNING)
    with pytest.raises(BadInput, match="has 27 pairs to calibrate on, fewer than 28"):
        coprune.prune(place / "T5", "wanda", dataset=place / "pairs.jsonl", **PRUNING | {"nsamples": 28})


def test_own_pairs_are_read_as_they_are_however_windows_of_text_begin(place: Path, tmp_path: Path) -> None:
    folder, tokenizer = save_pair_model(tmp_path / "T5", "T5"), marking_tokenizer()
    tokenizer.bos_token = "<s>"
    tokenizer.save_pretrained(folder)
    settings = {"dataset": place / "pairs.jsonl", "evaluate": False, **PRUNING}
    usual, begun = (coprune.prune(folder, "wanda", bos=bos, **settings).report for bos in ("auto", "every"))
    assert usual.calibration.fingerprint == begun.calibration.fingerprint


@pytest.mark.parametrize("stream", sampled([True, False], quick=[True]))
@pytest.mark.parametrize(
    ("family", "choice"), [("T5", ()), pytest.param("Marian", (), marks=pytest.mark.slow), ("Bart", ("*decoder.*",))]
)
def test_channels_are_removed_from_both_halves_or_only_the_decoder(
    family: str, choice: tuple[str, ...], stream: bool, place: Path, tmp_path: Path
) -> None:
    if not (place / family).exists():
        save_pair_model(place / family, family)
    settings = REMOVING | {"remove": "channels=0.5", "include": choice, "stream": stream}
    coprune.prune(place / family, save_model=tmp_path, overwrite=True, dataset=place / "words.txt", **settings)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    widths = {name: p.shape[0] for name, p in model.named_parameters() if name.endswith(("wi.weight", "fc1.weight"))}
    assert {width for name, width in widths.items() if "decoder" in name} == {32}
    assert {width for name, width in widths.items() if "encoder" in name} == {64 if choice else 32}


DEEP: dict[str, dict[str, int]] = {
    "T5": {"num_layers": 3, "num_decoder_layers": 3},
    "Bart": {"encoder_layers": 3, "decoder_layers": 3},
}


@torch.no_grad()
@pytest.mark.parametrize("stream", sampled([True, False], quick=[True]))
@pytest.mark.parametrize(
    ("family", "choice"), [pytest.param("T5", (), marks=pytest.mark.slow), ("Bart", ("*decoder.*",))]
)
def test_blocks_are_removed_from_both_halves_or_only_the_decoder(
    family: str, choice: tuple[str, ...], stream: bool, place: Path, tmp_path: Path
) -> None:
    """By whole forwards, the saved model is the dense one without these blocks."""
    counts = DEEP[family]
    source, small = save_pair_model(tmp_path / "deep", family, **counts), tmp_path / "small"
    if family == "Bart":  # which released models also state in their files
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    settings = REMOVING | {"remove": "blocks=0.34", "score": "kl", "include": choice, "stream": stream}
    coprune.prune(source, save_model=small, dataset=place / "words.txt", **settings)
    model = AutoModelForSeq2SeqLM.from_pretrained(small)
    assert [getattr(model.config, name) for name in counts] == [3 if choice else 2, 2]
    edits = [edit for edit in Edits.read(small).all() if isinstance(edit, DropBlock)]
    assert len(edits) == (1 if choice else 2)
    dense = AutoModelForSeq2SeqLM.from_pretrained(source)
    for edit in edits:
        path, _, number = edit.block.rpartition(".")
        assert (family, number) != ("T5", "0")  # later blocks use its position biases
        del dense.get_submodule(path)[int(number)]
    tokens = torch.arange(10, 22)[None]
    found, expected = (one(input_ids=tokens, decoder_input_ids=tokens + 5).logits for one in (model, dense))
    assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("stream", sampled([True, False], quick=[True]))
def test_heads_with_shared_position_biases_are_removed_alike(stream: bool, place: Path, tmp_path: Path) -> None:
    """Without a refit, the saved model is the dense one with the heads' outputs zeroed."""
    settings = REMOVING | {"remove": "heads=0.5", "score": "wanda_sp", "stream": stream}
    coprune.prune(place / "T5", save_model=tmp_path, overwrite=True, dataset=place / "words.txt", **settings)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert (model.config.num_heads, model.config.d_kv) == (2, 8)
    kept = {
        name: own
        for edit in Edits.read(tmp_path).all()
        if isinstance(edit, KeepSlices)
        for name, own in edit.kept.items()
    }
    dense = AutoModelForSeq2SeqLM.from_pretrained(place / "T5")
    for name, own in kept.items():
        if name.endswith("Attention.o.weight"):
            weight = dense.get_parameter(name)
            weight.copy_(own.uncut(own.cut(weight)))
    tokens = torch.arange(10, 22)[None]
    found, expected = (one(input_ids=tokens, decoder_input_ids=tokens + 5).logits for one in (model, dense))
    assert torch.allclose(found, expected, atol=1e-5)
    heads = {name: own.ranges for name, own in kept.items() if name.endswith("SelfAttention.o.weight")}
    for half in ("encoder", "decoder"):
        assert len({str(ranges) for name, ranges in heads.items() if name.startswith(half)}) == 1


def test_heads_of_a_configuration_without_their_width_are_refused(place: Path) -> None:
    if not (place / "Bart").exists():
        save_pair_model(place / "Bart", "Bart")
    with pytest.raises(
        UnsupportedModel, match=r"BartForConditionalGeneration has no head width.*try to remove channels or blocks"
    ):
        coprune.prune(place / "Bart", remove="heads=0.5", dataset=place / "words.txt", **REMOVING)


def test_a_block_needed_by_later_ones_is_not_removed(place: Path) -> None:
    with pytest.raises(BadInput, match="since 1 are excluded and later blocks read what 1 of them computes for them"):
        coprune.prune(
            place / "T5", remove="blocks=0.5", include="*coder.block.0.*", dataset=place / "words.txt", **REMOVING
        )


def test_computed_tables_are_not_saved(place: Path, tmp_path: Path) -> None:
    source = save_pair_model(tmp_path / "Marian", "Marian")
    settings = {"dataset": place / "words.txt", **PRUNING}
    found = [
        coprune.prune(source, "wanda", save_model=tmp_path / str(stream), stream=stream, **settings).report
        for stream in (True, False)
    ]
    assert found[0].perplexity[0].pruned == pytest.approx(found[1].perplexity[0].pruned, rel=1e-6)
