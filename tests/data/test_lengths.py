"""Samples of several lengths: padded in storage, of one length per batch, and never counted beyond their ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import coprune
from coprune.data.bos import windows_at_bos
from coprune.data.mixture import mixed
from coprune.data.text import NOTHING, a_longest, first_of_a_length
from coprune.data.windows import Windows
from coprune.evaluation.tasks.text_task import split_batches
from coprune.model.walk.recording import record_batches
from coprune.recipe.pattern import Target, parse_pattern
from coprune.recipe.recipe import make_recipe
from coprune.recipe.sources import Source
from coprune.removal.unit_scores import some_tokens
from support.pico import pico_model, pico_tokens
from support.pico_folder import pico_tokenizer, write_words
from support.walking import prove
from support.whole_forwards import prune_by_whole_forwards

CPU = torch.device("cpu")


def two_lengths(short: int, long: int) -> tuple[Windows, list[Tensor]]:
    """Return a mixture of samples of 8 and 24 tokens, and the samples separately."""
    parts = [pico_tokens(short, 8, seed=1), pico_tokens(long, 24, seed=2)]
    marks = torch.arange(24)[None].expand(long, -1) % 3 == 0
    found = [
        (Source("short", 0.5), Windows(parts[0], "a", "short")),
        (Source("long", 0.5), Windows(parts[1], "b", "long", generated=marks)),
    ]
    return mixed(found, 0), [*parts[0].split(1), *parts[1].split(1)]


def test_mixed_lengths_are_padded_and_padding_is_never_counted() -> None:
    windows, alone = two_lengths(5, 4)
    assert windows.tokens.shape == (9, 24)
    rows = [row[row != NOTHING].tolist() for row in windows.tokens]
    assert sorted(rows) == sorted(one[0].tolist() for one in alone)
    assert windows.generated is not None
    # In unmarked text every token counts; padding never does.
    for row, marks in zip(windows.tokens, windows.generated, strict=True):
        assert int(marks.sum()) == 8
        assert not bool((marks & (row == NOTHING)).any())
    assert [(part.nsamples, part.seqlen) for part in windows.parts] == [(5, 8), (4, 24)]
    assert a_longest(windows.tokens).min() >= 0
    first = first_of_a_length(windows.tokens)
    assert first.tolist() == [row for row in rows if len(row) == len(rows[0])]


@pytest.mark.parametrize("batch_size", [None, 3])
def test_every_batch_is_of_one_length_and_none_is_lost(batch_size: int | None) -> None:
    windows, alone = two_lengths(70, 25)
    recipe = make_recipe({"model": "m", "batch_size": batch_size})
    batches = split_batches(windows.tokens, recipe, CPU)
    assert sorted(tuple(row) for batch in batches for row in batch.tolist()) == sorted(
        tuple(one[0].tolist()) for one in alone
    )
    sizes = {8: 64, 24: 21} if batch_size is None else {8: 3, 24: 3}
    assert all(len(batch) <= sizes[batch.shape[1]] for batch in batches)
    assert len(batches) == sum(-(-count // sizes[length]) for length, count in ((8, 70), (24, 25)))
    assert [tuple(b.shape) for b in split_batches(windows.tokens, recipe, CPU, windows.generated)] == [
        tuple(batch.shape) for batch in batches
    ]
    # Sources are mixed, not one after the other.
    assert {batch.shape[1] for batch in batches[:3]} == {8, 24}
    even = pico_tokens(7, 24)
    parts = split_batches(even, recipe, CPU)
    assert all(torch.equal(one, other) for one, other in zip(parts, even.split(sizes[24]), strict=True))


def test_bos_takes_the_place_of_each_samples_own_last_token() -> None:
    windows, _ = two_lengths(2, 2)
    begun = windows_at_bos(windows, 1)
    assert begun.generated is not None
    for before, after, marks in zip(windows.tokens, begun.tokens, begun.generated, strict=True):
        text = before[before != NOTHING].tolist()
        assert after[after != NOTHING].tolist() == [1, *text[:-1]]
        assert not bool(marks[after == NOTHING].any())


def test_rows_kept_of_a_batch_follow_its_share_of_tokens() -> None:
    model = pico_model("llama")
    proven = prove(model, pico_tokens(1, 24))
    mixture = record_batches(proven, [pico_tokens(4, 100), pico_tokens(100, 19)])
    assert [rows.kept for rows in mixture.rows(1000)] == [-(-400_000 // 2300), -(-1_900_000 // 2300)]
    assert len(some_tokens(mixture.hidden[0], 2, mixture.uneven)) == -(-1024 * 400 // 2300)
    alike = record_batches(proven, [pico_tokens(4, 100), pico_tokens(1, 100)])
    assert alike.uneven is None
    assert {rows.kept for rows in alike.rows(1000)} == {None}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_words(Path("words.txt"))
    return tmp_path


def prune(dataset: Any, **settings: Any) -> coprune.Result:
    asked: dict[str, Any] = dict(method="wanda", nsamples=6, seqlen=24, evaluate=False, quiet=True) | settings
    return coprune.prune(pico_model("llama"), processor=pico_tokenizer("known"), dataset=dataset, **asked)


@pytest.mark.parametrize("settings", [{}, {"propagation": "sequential", "method": "sparsegpt", "reconstruct": 2}])
def test_each_source_has_its_own_sample_length(place: Path, settings: dict[str, Any]) -> None:
    ids = pico_tokens(3, 10)
    result = prune({"words.txt:seqlen=8": 0.5, "mine:seqlen=10": (ids, 0.5)}, **settings)
    calibration = result.report.calibration
    assert calibration is not None
    assert [(part.nsamples, part.seqlen) for part in calibration.sources] == [(3, 8), (3, 10)]
    assert (calibration.seqlen, calibration.length) == (10, "up to 10")
    assert "words.txt: 3 samples of 8 tokens, fingerprint" in calibration.details()
    assert {matrix.tokens for matrix in result.report.matrices} == {3 * 8 + 3 * 10}
    # Data passed by the caller keeps its length.
    again = prune({"words.txt:seqlen=8": 0.5, "mine": (ids, 0.5)}, **settings).report
    assert again.calibration.fingerprint == calibration.fingerprint
    assert [m.mask_checksum for m in again.matrices] == [m.mask_checksum for m in result.report.matrices]


def test_masks_are_those_of_the_samples_one_by_one(place: Path) -> None:
    short, long = pico_tokens(5, 6, seed=1), pico_tokens(3, 20, seed=2)
    data = {"short:seqlen=6": (short, 0.625), "long:seqlen=20": (long, 0.375)}
    model, expected = pico_model("llama"), pico_model("llama")
    coprune.prune(model, "wanda", dataset=data, nsamples=8, seqlen=16, pattern="2:4", evaluate=False, quiet=True)
    batches = [*short.split(1), *long.split(1)]
    kept = prune_by_whole_forwards(expected, batches, Target(parse_pattern("2:4"), 0.5), ())
    assert kept
    for name, mask in kept.items():
        assert torch.equal(model.get_parameter(f"{name}.weight") != 0, mask), name


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("words.txt:seqlen=200", "samples of words.txt have 200 tokens, and the model 128 positions"),
        ("words.txt=0.5,self:seqlen=129=0.5", "samples of self have 129 tokens, and the model 128 positions"),
    ],
)
def test_samples_longer_than_the_context_are_refused(place: Path, dataset: str, message: str) -> None:
    with pytest.raises(coprune.BadInput) as raised:
        prune(dataset)
    assert message in str(raised.value)
    assert raised.value.field == "dataset"
