"""Runs that cut a vocabulary: alone, before other removal and pruning, by command and call, interrupted and repeated."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import coprune
from coprune.base.errors import BadInput, NumericalError
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.removed import Tokens
from coprune.store.notes import read_note
from coprune.vocabulary.choose import Kept
from coprune.vocabulary.cut import Tried
from coprune.vocabulary.cut_sources import saved
from coprune.vocabulary.measure import Judge
from coprune.vocabulary.samples import LANGUAGES
from support.commands import run_command
from support.killing import killed_when
from support.pico import pico_model
from support.pico_folder import listing
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.vocabularies import SIZE, TEXTS, content_of, save_with_tokens


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokens(tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    drawn = random.Random(0)
    words = [word for text in TEXTS for word in text.split(" ")]
    file.write_text("\n".join(" ".join(drawn.choices(words, k=60)) for _ in range(200)), encoding="utf-8")
    return file


def settings(words: Path, **more: Any) -> dict[str, Any]:
    return {"vocabulary_text": str(words), "dataset": str(words), "quiet": True, "eval_tokens": 256, **more}


def rows(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def test_cutting_a_vocabulary_saves_a_model_a_report_and_a_page(dense: Path, words: Path, tmp_path: Path) -> None:
    save, model = tmp_path / "run", tmp_path / "small"
    result = coprune.prune(dense, remove="vocabulary=704", save=save, save_model=model, **settings(words))
    facts = result.report.vocabulary
    assert facts is not None
    assert (facts.before, facts.after, rows(model)) == (SIZE, 704, 704)
    assert facts.texts[0].bits is not None
    assert len([one for one in facts.texts if one.bits is not None]) > 6
    assert "Vocabulary" in (save / "report.html").read_text()
    assert "Hindi" in (model / "README.md").read_text()
    assert result.held is not None
    assert result.tokenizer("Hello").input_ids
    again = coprune.Recipe.from_yaml(save / "recipe.yaml")
    assert again.remove.vocabulary == result.report.recipe.remove.vocabulary


def test_the_reported_bits_match_the_smaller_model(dense: Path, words: Path, tmp_path: Path) -> None:
    """The report's bits were measured with the dense model on the smaller tokenizer's tokens."""
    result = coprune.prune(dense, remove="vocabulary=704", save_model=tmp_path / "small", **settings(words))
    said = next(one for one in result.report.vocabulary.texts if one.text == "German")
    model, tokenizer = load_model(ModelFolder(tmp_path / "small", "small"))
    ids = tokenizer.encode(LANGUAGES["de"], add_special_tokens=False)
    nats, _ = Judge(model, tokenizer.bos_token_id).nats(ids, None)
    assert nats / said.bytes / torch.log(torch.tensor(2.0)).item() == pytest.approx((said.bits or (0, 0))[1], rel=1e-5)
    assert len(ids) == said.tokens[1]


def test_bits_of_a_damaged_model_are_refused_instead_of_reported(dense: Path) -> None:
    model, tokenizer = load_model(ModelFolder(dense, "pico"))
    for weight in model.get_input_embeddings().parameters():
        torch.nn.init.constant_(weight, math.nan)
    with pytest.raises(NumericalError, match="may be damaged"):
        Judge(model, tokenizer.bos_token_id).nats([5, 6], None)


def test_messages_of_cutting_a_model_in_memory_are_shown(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with saved(*load_model(ModelFolder(dense, "pico"))) as folder:
        print("what it loses", file=sys.stderr)
        assert rows(folder) == SIZE
    assert "what it loses" in capsys.readouterr().err


def test_cutting_leaves_the_model_in_memory_unchanged(dense: Path, words: Path) -> None:
    model, tokenizer = load_model(ModelFolder(dense, "pico"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = coprune.prune(model, processor=tokenizer, remove="vocabulary=0.4", **settings(words, evaluate=False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert result.model.config.vocab_size == len(result.tokenizer) == 576


def test_the_command_cuts_a_vocabulary_alike(
    dense: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = f"prune {dense} --remove vocabulary=704 --vocabulary-text {words} --dataset {words} --no-eval --quiet"
    places = ["--save", str(tmp_path / "run"), "--save-model", str(tmp_path / "typed")]
    ended = run_command([*asked.split(), *places], monkeypatch, capsys)
    assert (ended.code, "1,024 → 704 tokens" in ended.out) == (0, True)
    coprune.prune(dense, remove="vocabulary=704", save_model=tmp_path / "called", **settings(words, evaluate=False))
    for name in ("tokenizer.json", "coprune_vocabulary.json", "config.json"):
        assert (tmp_path / "typed" / name).read_bytes() == (tmp_path / "called" / name).read_bytes()


def test_channels_and_zeros_follow_a_vocabulary_cut(dense: Path, words: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "remove": "vocabulary=704,channels=0.34",
        "align": 32,
        "pattern": "2:4",
        "nsamples": 2,
        "seqlen": 32,
    }
    places: dict[str, Any] = {"save": tmp_path / "run", "save_model": tmp_path / "small"}
    report = coprune.prune(dense, **asked, **places, **settings(words, eval_data=str(words))).report
    assert report.vocabulary is not None
    assert report.edits[0].line() == "320 of 1,024 tokens of the vocabulary"
    assert len(report.edits) > 1
    assert report.has_zeros
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (config["vocab_size"], config["intermediate_size"]) == (704, 64)
    assert report.model.source == str(dense)


def test_a_gguf_file_is_cut_to_another_gguf_file(words: Path, tmp_path: Path) -> None:
    model = distinct_norms(pico_model("llama", vocab_size=SIZE))
    whole = write_pico_gguf(model, tmp_path / "whole.gguf", "Q8_0", tokenizer=content_of("bytes"))
    small = tmp_path / "small.gguf"
    report = coprune.prune(whole, remove="vocabulary=704", save_model=small, **settings(words)).report
    assert report.vocabulary.bytes_after < report.vocabulary.bytes_before
    assert small.stat().st_size < whole.stat().st_size
    assert report.vocabulary.texts[0].bits is not None


def test_a_size_is_searched_and_proven_for_an_allowed_loss(dense: Path, words: Path, tmp_path: Path) -> None:
    asked = settings(words, eval_tokens=2048)
    found = coprune.prune(dense, remove="vocabulary=loss:12%", save=tmp_path / "run", **asked).report.vocabulary
    assert found.proven is not None
    assert found.proven <= 0.12
    assert found.after < SIZE
    assert {size for size, rise in found.tries.items() if rise > 0.12} < {*found.tries}


def tries_in(run: Path) -> dict[int, float]:
    note = read_note(run / "vocabulary" / "tries.json", Tried)
    assert note is not None
    return note.record.tries


def test_a_killed_search_resumes(dense: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(words, eval_tokens=2048, save=tmp_path / "run", save_model=tmp_path / "small")
    count, rise = [0], Judge.rise

    def stops(self: Judge, cuts: Any, *more: Any) -> float:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return rise(self, cuts, *more)

    monkeypatch.setattr(Judge, "rise", stops)
    with pytest.raises(KeyboardInterrupt):
        coprune.prune(dense, remove="vocabulary=loss:12%", **asked)
    assert len(tries_in(tmp_path / "run")) == 2
    monkeypatch.setattr(Judge, "rise", rise)
    interrupted = coprune.prune(dense, remove="vocabulary=loss:12%", **asked).report.vocabulary
    other = settings(words, eval_tokens=2048)
    assert interrupted == coprune.prune(dense, remove="vocabulary=loss:12%", **other).report.vocabulary


@pytest.mark.slow
def test_a_replaced_model_is_noticed_after_its_cut_was_killed(words: Path, tmp_path: Path) -> None:
    """Killed after the cut and before the next step."""
    source = save_with_tokens(tmp_path / "dense")
    asked: dict[str, Any] = {"remove": "vocabulary=704", "sparsity": 0.5, "method": "magnitude"}
    asked |= settings(words, evaluate=False, seqlen=32, nsamples=2)

    def work(name: str) -> None:
        coprune.prune(source, save=tmp_path / name, save_model=tmp_path / f"{name}-model", **asked)

    cut = tmp_path / "run" / "trim" / "report.json"
    assert killed_when(lambda: work("run"), cut.exists, ("runner/",))
    save_with_tokens(source, seed=1)
    work("run")
    work("fresh")
    assert weights_in(tmp_path / "run-model") == weights_in(tmp_path / "fresh-model")


def weights_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def stopped(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_text_changed_after_the_choice_is_noticed(
    dense: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(words.read_bytes())
    asked = settings(text, evaluate=False, remove="vocabulary=704")
    with monkeypatch.context() as patch:
        patch.setattr("coprune.vocabulary.cut_sources.cut_folder", stopped)
        with pytest.raises(KeyboardInterrupt):
            coprune.prune(dense, save=tmp_path / "run", save_model=tmp_path / "small", **asked)
    text.write_text(LANGUAGES["ru"] * 40, encoding="utf-8")
    for name in ("run", "fresh"):
        coprune.prune(dense, save=tmp_path / name, save_model=tmp_path / f"{name}-model", **asked)
    same = [(tmp_path / f"{name}-model" / "tokenizer.json").read_bytes() for name in ("run", "fresh")]
    assert same[0] == same[1]


@pytest.mark.slow
def test_stored_losses_of_a_replaced_model_are_not_reused(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_with_tokens(tmp_path / "dense")
    asked = settings(words, eval_tokens=2048, remove="vocabulary=loss:12%")
    with monkeypatch.context() as patch:
        patch.setattr("coprune.vocabulary.cut.Cutting.facts", stopped)
        with pytest.raises(KeyboardInterrupt):
            coprune.prune(source, save=tmp_path / "run", **asked)
    save_with_tokens(source, seed=1)
    again, fresh = (coprune.prune(source, save=save, **asked).report for save in (tmp_path / "run", None))
    assert again.vocabulary.tries == fresh.vocabulary.tries


def test_a_model_replaced_before_the_report_was_written_is_noticed(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_with_tokens(tmp_path / "dense")
    asked = settings(words, evaluate=False, save=tmp_path / "run", save_model=tmp_path / "small")
    with monkeypatch.context() as patch:
        patch.setattr("coprune.run.context.Run.finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            coprune.prune(source, remove="vocabulary=704", **asked)
    save_with_tokens(source, seed=1)
    with pytest.raises(BadInput, match="already exists"):
        coprune.prune(source, remove="vocabulary=704", **asked)


def test_a_second_cut_records_both_in_its_history(dense: Path, words: Path, tmp_path: Path) -> None:
    from coprune.model.edits import history_of

    asked = settings(words, evaluate=False, vocabulary_force=True)
    coprune.prune(dense, remove="vocabulary=896", save_model=tmp_path / "first", **asked)
    coprune.prune(tmp_path / "first", remove="vocabulary=704", save_model=tmp_path / "second", **asked)
    source, done = history_of(tmp_path / "second")
    assert source == str(dense.resolve())
    assert [edits.removals() for edits in done] == [[Tokens(tokens=1024, left=896)], [Tokens(tokens=896, left=704)]]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too few": ({"remove": "vocabulary=64"}, "fewer than required"),
    "too many": ({"remove": "vocabulary=2048"}, "has only"),
    "no size": ({"remove": "vocabulary=some"}, "not a size of a vocabulary"),
    "no loss": ({"remove": "vocabulary=loss:200%"}, "not a size of a vocabulary"),
    "twice": ({"remove": "vocabulary=640,vocabulary=0.5"}, "given twice"),
    "unknown language": ({"remove": "vocabulary=640", "vocabulary_text": "xx"}, "unknown language 'xx'"),
    "bad share": ({"remove": "vocabulary=640", "vocabulary_text": "en=0"}, "positive number"),
    "no vocabulary": ({"sparsity": 0.5, "vocabulary_text": "en"}, "none is requested"),
    "its score": ({"sparsity": 0.5, "remove": "channels=0.5", "score": "counts"}, "none are removed"),
    "no text": ({"remove": "vocabulary=640", "vocabulary_text": "missing.txt"}, "missing.txt"),
    "useless": ({"remove": "vocabulary=1000", "evaluate": False}, "save only"),
    "unmeasured": ({"remove": "vocabulary=loss:1%", "evaluate": False}, "measurements with the model"),
    "no file": ({"remove": "vocabulary=640", "save_model": "small.gguf"}, "would be a GGUF file"),
    "trained": ({"remove": "vocabulary=640", "finetune": "dense"}, "cannot train as well"),
    "tasks": ({"remove": "vocabulary=640", "tasks": "boolq"}, "not measured by a run that only cuts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, dense: Path, words: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    asked, text = REFUSED[case]
    before = listing(tmp_path)
    with pytest.raises(BadInput, match=text) as caught:
        coprune.prune(dense, **{"dataset": str(words), "quiet": True, **asked})
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == before


def test_an_empty_text_is_refused(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(BadInput, match="no text"):
        coprune.prune(dense, remove="vocabulary=640", vocabulary_text=str(tmp_path / "empty.txt"), quiet=True)


def test_chat_prompts_keep_their_tokens(dense: Path, words: Path, tmp_path: Path) -> None:
    """Neither the template's text nor its special tokens occur in the counted text."""
    coprune.prune(dense, remove="vocabulary=576", save_model=tmp_path / "small", **settings(words, evaluate=False))
    old = json.loads((tmp_path / "small" / "coprune_vocabulary.json").read_text())["old_ids"]
    whole, small = (AutoTokenizer.from_pretrained(folder) for folder in (dense, tmp_path / "small"))
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]
    before, after = (one.apply_chat_template(said, return_dict=False) for one in (whole, small))
    assert [old[token] for token in after] == before


@pytest.mark.slow
def test_the_map_has_every_tokens_old_id(dense: Path, words: Path, tmp_path: Path) -> None:
    coprune.prune(dense, remove="vocabulary=704", save_model=tmp_path / "small", **settings(words, evaluate=False))
    old = json.loads((tmp_path / "small" / "coprune_vocabulary.json").read_text())["old_ids"]
    assert Kept(tuple(old)).below(SIZE) == 704
    assert old == sorted(old)


def test_a_run_killed_after_its_model_was_named_is_finished(
    dense: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(words, save=tmp_path / "run", save_model=tmp_path / "small", evaluate=False)

    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("coprune.vocabulary.cut_sources.cut_folder", stops)
        with pytest.raises(KeyboardInterrupt):
            coprune.prune(dense, remove="vocabulary=704", **asked)
    with monkeypatch.context() as patch:
        patch.setattr("coprune.vocabulary.cut.Cutting.__post_init__", lambda self: pytest.fail("all was known"))
        patch.setattr("coprune.run.context.Run.finish", stops)
        with pytest.raises(KeyboardInterrupt):
            coprune.prune(dense, remove="vocabulary=704", **asked)
    before = listing(tmp_path / "small")
    report = coprune.prune(dense, remove="vocabulary=704", **asked).report
    assert report.vocabulary is not None
    assert (tmp_path / "run" / "report.json").is_file()
    after = listing(tmp_path / "small")
    assert after.keys() - before.keys() == {"README.md"}  # written with the rest of the run folder
    assert after | before == after
