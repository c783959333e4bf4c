"""A new kind of edit works with journal, kill and resume, writer, verifier and report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from coprune.base.errors import BadInput, CopruneError, VerificationError
from coprune.base.progress import Reporter
from coprune.model.checkpoint import writer
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate
from coprune.model.checkpoint.names import EDITS_FILE
from coprune.model.edit import FillZeros
from coprune.model.edits import Edits, dump_edits, load_edits, pruned_names, source_of
from coprune.model.matrices import find_matrices
from coprune.model.verification import verify_saved
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.run.context import NOTHING, Run
from coprune.run.result import Result
from coprune.runner.run_recipe import run_recipe
from coprune.stages.opening import open_run
from support.drop_block import DropBlock, drop_blocks
from support.killing import count_lines, killed_at
from support.pico import pico_tokens
from support.pico_folder import listing, save_pico, write_words
from support.sample import sampled
from support.saved import load_clean, tensors_of

DROPPED = (0, 2)
BLOCKS = 4


@pytest.fixture(autouse=True)
def dropping(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked children lose thread pools
    drop_blocks(monkeypatch, *DROPPED)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_pico(folder / "llama", num_hidden_layers=BLOCKS)
    write_words(folder / "words.txt")
    return folder


def recipe_of(place: Path, out: Path, stream: bool) -> Recipe:
    return make_recipe(
        {
            "model": str(place / "llama"),
            "pattern": "2:4",
            "stream": stream,
            "dataset": str(place / "words.txt"),
            "evaluate": False,
            "nsamples": 4,
            "seqlen": 16,
            "save": str(out / "run"),
            "save_model": str(out / "pruned"),
        }
    )


def run(place: Path, out: Path, stream: bool) -> Result:
    return run_recipe(recipe_of(place, out, stream), reporter=Reporter(quiet=True))


@pytest.mark.parametrize("single", [True, False], ids=["single", "sharded"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "in memory"])
def test_dropped_blocks_are_removed_and_the_rest_is_unchanged(
    place: Path, tmp_path: Path, stream: bool, single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SINGLE_FILE_BYTES", 10**9 if single else 0)
    report = run(place, tmp_path, stream).report
    small = load_clean(tmp_path / "pruned")
    assert small.config.num_hidden_layers == BLOCKS - len(DROPPED)
    source = tensors_of(place / "llama")
    for new, old in ((0, 1), (1, 3)):
        for part in ("input_layernorm.weight", "self_attn.q_proj.weight"):
            found = small.state_dict()[f"model.layers.{new}.{part}"]
            expected = source[f"model.layers.{old}.{part}"]
            assert torch.equal(found, torch.where(found == 0, 0, expected))
    # The report describes the saved model.
    assert {m.name.split(".")[2] for m in report.matrices} == {"0", "1"}
    assert {m.name for m in report.matrices} == {m.name for m in find_matrices(small) if m.name != "lm_head"}
    assert [one.line() for one in report.edits] == [f"block model.layers.{index}" for index in DROPPED]
    assert pruned_names(tmp_path / "pruned") == {m.name for m in report.matrices}
    if not single:
        shards = sorted(file.name for file in (tmp_path / "pruned").glob("*.safetensors"))
        assert len(shards) == BLOCKS - len(DROPPED) + 1


def test_the_small_model_matches_the_big_one_with_idle_blocks(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path, stream=False)
    small, _ = load_model(locate(str(tmp_path / "pruned")), "auto")
    tokens = pico_tokens(2, 8)
    with torch.no_grad():
        big = result.model(tokens, use_cache=False).logits
        torch.testing.assert_close(small(tokens, use_cache=False).logits, big, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stream", sampled([True, False], quick=[True]), ids=["streamed", "in memory"])
def test_a_killed_run_resumes_with_the_edits_of_its_journal(place: Path, tmp_path: Path, stream: bool) -> None:
    _, lines = count_lines(lambda: run(place, tmp_path / "whole", stream), ("run/output",))
    assert killed_at(lambda: run(place, tmp_path / "killed", stream), lines * 9 // 10, ("run/output",))
    assert not (tmp_path / "killed" / "pruned").exists()
    notes = [json.loads(note.read_text()) for note in (tmp_path / "killed" / ".pruned.partial").glob("model-*.json")]
    kinds = {edit["kind"] for note in notes for edit in note["remember"].get("edits", [])}
    assert "drop_block" in kinds
    run(place, tmp_path / "killed", stream)
    whole, found = listing(tmp_path / "whole" / "pruned"), listing(tmp_path / "killed" / "pruned")
    card = "README.md"  # contains folder names
    assert whole.pop(card) is not None
    assert found.pop(card) is not None
    assert found == whole


def test_a_mask_missing_in_the_saved_model_is_detected(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path, stream=False)
    shutil.copytree(tmp_path / "pruned", tmp_path / "copy")
    masks = {m.name: "0" * 8 for m in result.report.matrices[:1]}
    from support.walking import prove

    small = load_clean(tmp_path / "copy")
    with pytest.raises(VerificationError, match=result.report.matrices[0].name):
        verify_saved(tmp_path / "copy", prove(small, pico_tokens(1)), Edits({"any": [FillZeros(masks=masks)]}))


def test_edits_round_trip_as_json() -> None:
    edits = [FillZeros(masks={"a": "00000000"}), DropBlock(index=3)]
    assert load_edits(json.loads(json.dumps(dump_edits(edits)))) == edits
    for damaged in ({"kind": "unheard of"}, {"kind": "drop_block"}, {"kind": "drop_block", "index": 1, "more": 2}):
        with pytest.raises(CopruneError, match=r"edit"):
            load_edits([damaged])


def test_a_damaged_file_of_edits_is_reported(tmp_path: Path) -> None:
    (tmp_path / EDITS_FILE).write_text("[]")
    with pytest.raises(CopruneError, match="damaged"):
        pruned_names(tmp_path)


def test_the_source_is_found_from_a_folder_behind_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("home/source", "disk/large/out/model"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "home/out").symlink_to(tmp_path / "disk/large/out")
    monkeypatch.chdir(tmp_path / "home")
    Edits().write(Path("out/model"), "source")
    assert source_of(Path("out/model")) == str(tmp_path / "home/source")
    assert str(tmp_path) not in Path("out/model", EDITS_FILE).read_text()


DAMAGED = {
    "no JSON": "[1",
    "a number of edits": '{"masks": {}, "source": "x", "before": 5}',
    "a list of blocks": '{"masks": {}, "edits": []}',
    "a source that is no name": json.dumps({"masks": {}, "source": "..\0"}),
    "a source without end": json.dumps({"masks": {}, "source": "x" * 100_000}),
    "a list of sources": json.dumps({"masks": {}, "source": [0]}),
    "objects in objects": '{"masks": ' + '{"a":' * 100_000 + "1" + "}" * 100_001,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_beside_the_source_is_refused_before_pruning(content: str, tmp_path: Path) -> None:
    save_pico(tmp_path / "llama")
    (tmp_path / "llama" / EDITS_FILE).write_text(content)
    recipe = make_recipe({"model": str(tmp_path / "llama"), "method": "magnitude", "layer_error": False})
    with pytest.raises(BadInput, match=r"coprune_edits.json is damaged"):
        open_run(Run(recipe, NOTHING, Reporter(quiet=True)))
