"""A fit's stored results: measurements keyed by contents, a recipe for the same bytes, and no verdicts from a full disk."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import coprune
from coprune.base.errors import BadInput, CopruneError, LostProcess, OutOfMemory, VerificationError
from coprune.base.files import write_text
from coprune.base.progress import Reporter
from coprune.fitting.calibration import Passage, write_passages
from coprune.fitting.candidates import DENSE, EXACT, Candidate
from coprune.fitting.fit_call import remake
from coprune.fitting.fit_notes import Asked, Measured
from coprune.fitting.fit_recipe import RECIPE_FILE
from coprune.fitting.looking import WORK_FOLDER
from coprune.fitting.made_model import digest_of
from coprune.fitting.making import Making
from coprune.fitting.score import DenseAnswers
from coprune.fitting.tasks import read_tasks
from coprune.fitting.team import Team
from coprune.fitting.workshop import Workshop
from coprune.gguf_files.converter import SCRIPT
from coprune.gguf_files.llama_cpp import has_llama_cpp
from coprune.model.checkpoint.digest import source_digest
from coprune.model.checkpoint.load import load_tokenizer, quiet_transformers
from coprune.model.checkpoint.locate import locate
from coprune.store.notes import read_note
from support.disturbing import in_child
from support.fits import WITHOUT, WORDS, how, tokens, write
from support.pico import pico_model
from support.pico_gguf import distinct_norms

pytestmark = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")


@pytest.fixture
def moved(place: Path, found: Any, tmp_path: Path) -> Path:
    """Return a finished fit whose files moved to another folder."""
    shutil.copytree(place, tmp_path / "moved", ignore=shutil.ignore_patterns("in *", "long", "reader"))
    return tmp_path / "moved"


def again_in(folder: Path) -> Any:
    required, output = "bits<=dense*1.1", folder / "small"
    return coprune.fit(folder / "model.gguf", folder / "text.txt", required, output=output, **how(folder))


def other_bytes(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_replaced_model_file_is_noticed(found: Any, moved: Path) -> None:
    other_bytes(moved / "model.gguf")
    with pytest.raises(BadInput, match="holds a fit with another model;"):
        again_in(moved)


def test_a_fit_whose_files_moved_is_not_repeated(found: Any, moved: Path) -> None:
    again = again_in(moved)
    assert (again.chosen, again.lines, again.rows) == (found.chosen, found.lines, found.rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"\xff" * 10,
        lambda content: b"[" * 100_000,
        lambda content: b"null\nnull\n",
        lambda content: re.sub(rb'(": )\d+\.\d+', rb"\g<1>0.001", content),  # better figures with a stale checksum
    ],
    ids=["empty", "half", "binary", "deep", "null", "forged"],
)
def test_damaged_notes_are_measured_again(change: Any, found: Any, moved: Path, known_store: Path) -> None:
    notes, results = moved / "small" / WORK_FOLDER, known_store.glob("fit-*.json")
    sizes = {file: note.record.bytes for file in results if (note := read_note(file, Measured))}
    smallest = min((file for file in sizes if sizes[file]), key=sizes.__getitem__)
    for file in [smallest, *notes.glob("text/*.json"), *known_store.glob("fit-paces*"), *known_store.glob("fit-size*")]:
        file.write_bytes(change(file.read_bytes()))
    again = again_in(moved)
    assert again.chosen == found.chosen
    assert [(row.name, row.mean) for row in again.rows] == [(row.name, row.mean) for row in found.rows]


def test_replaced_calibration_text_is_noticed(place: Path, tmp_path: Path) -> None:
    (text := tmp_path / "more.txt").write_text("one")

    def opened() -> Workshop:
        asked = Asked(str(place / "model.gguf"), (), 0, str(text), str(place / "model.gguf"))
        return Workshop(tmp_path / "fit", asked, Reporter(quiet=True))

    opened()
    text.write_text("two")
    with pytest.raises(BadInput, match="holds a fit with another text;"):
        opened()


@pytest.mark.parametrize("type", [EXACT, "q8_0"])
def test_a_full_disk_is_not_a_verdict_on_a_candidate(
    type: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on file sizes simulates a full disk; with space, the same call continues."""
    (out := tmp_path / "out").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(out / "cache"))

    def opened(folder: Path) -> Workshop:
        return Workshop(folder / "fit", Asked(str(place / "model.gguf"), ()), Reporter(quiet=True))

    def measured(folder: Path) -> Measured:
        return opened(folder).measure(Candidate(DENSE, type), {})

    if type != EXACT:  # llama.cpp makes these from existing files
        write_passages(opened(out).making.text, [Passage(text="The sea is wide. " * 80, judging=False)])
        opened(out).bytes_of(Candidate(DENSE, type))
    assert in_child(measured, out, largest=50_000) == 3
    assert not [*out.glob("cache/coprune/store/fit-*.json")] or type != EXACT
    assert opened(out).known(Candidate(DENSE, type)) == Measured()
    found = measured(out)
    assert found.bytes > 50_000
    assert not found.refused


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (CopruneError("the disk is full"), None),
        (LostProcess("a worker is gone"), None),
        (KeyboardInterrupt(), None),
        (MemoryError(), None),
        (OutOfMemory("no memory is left"), ""),
        (BadInput("the run would not fit", field="check_memory"), ""),
        (BadInput("0.125 of 2 channels rounds to none"), "0.125 of 2 channels"),
    ],
)
def test_only_what_is_a_property_of_a_candidate_is_stored(
    error: BaseException, kept: str | None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> Workshop:
        return Workshop(tmp_path / "fit", Asked(str(place / "model.gguf"), ()), Reporter(quiet=True))

    def raises(self: Making, candidate: Candidate, until: float) -> Path:
        raise error

    candidate = Candidate(DENSE, "q8_0")
    monkeypatch.setattr(Making, "file", raises)
    workshop = opened()
    if kept is None:
        with pytest.raises(type(error)):
            workshop.measure(candidate, {})
    else:
        assert workshop.measure(candidate, {}).refused
    assert opened().known(candidate).refused.startswith(kept or "")
    assert bool(opened().known(candidate).refused) == bool(kept)


def test_a_failure_of_the_dense_model_is_not_a_verdict_on_a_candidate(
    place: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates are compared with the dense model's answers."""
    items = write(
        tmp_path / "prompts.jsonl", [{"prompt": f"{number} {word}"} for number, word in enumerate(WORDS[:20])]
    )
    (task,) = read_tasks([str(items)])
    workshop = Workshop(tmp_path / "fit", Asked(str(place / "model.gguf"), (task,)), Reporter(quiet=True))
    exact, candidate = workshop.making.file(Candidate(DENSE, EXACT)), Candidate(DENSE, "q8_0")

    def fails(*_: Any) -> None:
        raise BadInput("the dense model writes nothing")

    monkeypatch.setattr(Making, "file", lambda self, candidate, until=0.0: exact)
    with monkeypatch.context() as patch:
        patch.setattr(DenseAnswers, "add", fails)
        with pytest.raises(BadInput, match="the dense model writes nothing"):
            workshop.measure(candidate, {task.name: [0]})
    assert workshop.known(candidate) == Measured()
    assert not workshop.measure(candidate, {task.name: [0]}).missing(task, [0])


def test_a_second_fit_of_the_same_model_and_texts_measures_nothing_again(
    found: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder, with renamed files."""

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Workshop, "_measure", never)
    for name in ("model.gguf", "text.txt"):
        shutil.copy(place / name, tmp_path / name)
    again = again_in(tmp_path)
    assert (again.chosen, again.lines, again.rows) == (found.chosen, found.lines, found.rows)
    assert again.file.read_bytes() == found.file.read_bytes()


@pytest.mark.usefixtures("forked_workers")
def test_an_error_in_a_worker_arrives_with_its_cause(place: Path, tmp_path: Path, store: Path) -> None:
    asked, candidate = Asked(str(place / "model.gguf"), ()), Candidate(DENSE, "q8_0")
    workshop = Workshop(tmp_path / "fit", asked, Reporter(quiet=True))
    write_text(workshop.making.folder / "files" / f"{workshop.making.key('quant', candidate)}.gguf", "no model")
    workshop.making.exact(DENSE)
    team = Team(2, tmp_path / "workers.log")
    try:
        with pytest.raises(CopruneError, match=r"^q8_0 could not be measured: ") as told:
            team.measure(workshop, [candidate], {})
    finally:
        team.stop()
    assert ".gguf" in str(told.value)
    assert "Traceback" not in str(told.value)


def test_the_recipe_of_a_folder_works_without_the_fits_files(place: Path, tmp_path: Path, store: Path) -> None:
    """The template made by llama.cpp's converter is made again."""
    model = pico_model("llama", vocab_size=tokens(), max_position_embeddings=1024, tie_word_embeddings=True)
    with quiet_transformers():
        distinct_norms(model).save_pretrained(tmp_path / "model")
        load_tokenizer(locate(place / "model.gguf")).save_pretrained(tmp_path / "model")
    (converter := tmp_path / SCRIPT).write_text(
        f"import shutil, sys\nshutil.copy({str(place / 'model.gguf')!r}, sys.argv[sys.argv.index('--outfile') + 1])\n"
    )
    settings = how(place, types="q8_0", without=f"{WITHOUT},embedding", converter=converter)
    found = coprune.fit(tmp_path / "model", place / "text.txt", "bits<=dense*1.1", output=tmp_path / "out", **settings)
    for name in (RECIPE_FILE, "text.jsonl"):
        shutil.copy(tmp_path / "out" / name, tmp_path / name)
    content = found.file.read_bytes()
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(BadInput, match="converter"):
        remake(tmp_path / RECIPE_FILE, tmp_path / "again", quiet=True)
    assert not (tmp_path / "again").exists()
    made = remake(tmp_path / RECIPE_FILE, tmp_path / "again", quiet=True, converter=converter)
    assert made.read_bytes() == content
    assert [path.name for path in (tmp_path / "again").iterdir()] == [made.name]


def test_a_recipe_of_a_replaced_model_is_refused_before_anything_is_made(moved: Path, tmp_path: Path) -> None:
    recipe = moved / "small" / RECIPE_FILE
    content = yaml.safe_load(recipe.read_text()) | {"model": str(moved / "model.gguf")}
    recipe.write_text(yaml.safe_dump(content))
    other_bytes(moved / "model.gguf")
    with pytest.raises(BadInput, match="another model than the one"):
        remake(recipe, tmp_path / "again", quiet=True)
    assert not (tmp_path / "again").exists()


def test_a_remake_whose_check_fails_leaves_no_file(place: Path, found: Any, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "text.jsonl"):
        shutil.copy(place / "small" / name, tmp_path / name)
    recipe = tmp_path / RECIPE_FILE
    recipe.write_text(re.sub(r"sha256: \w+", f"sha256: {'a' * 64}", recipe.read_text()))
    with pytest.raises(VerificationError, match="was not kept"):
        remake(recipe, tmp_path / "again", quiet=True)
    assert not [*(tmp_path / "again").rglob("*.gguf")]


CUT = {"removed": [], "tokens": 0}


@pytest.mark.parametrize(
    "said",
    [
        {"type": "nope"},
        {"type": "../../x"},
        {"type": ["q8_0"]},
        {"embedding": "../q"},
        {"runtime": "nope"},
        {"cut": CUT | {"removed": [5]}},
        {"cut": CUT | {"removed": ["vocabulary=../x"]}},
        {"cut": CUT | {"tokens": 10**18}},
        {"cut": CUT | {"tokens": -1}},
        {"cut": []},
        {"text": "../../text.jsonl"},
        {"seed": "x"},
        {"seed": -1},
        {"sha256": 5},
        {"source": "0"},
        {"model": None},
        {"like": 5},
        {"more": 1},
        [],
        5,
        None,
    ],
)
def test_a_foreign_recipe_is_refused(said: Any, place: Path, found: Any, tmp_path: Path) -> None:
    content = yaml.safe_load((place / "small" / RECIPE_FILE).read_text())
    (recipe := tmp_path / RECIPE_FILE).write_text(yaml.safe_dump(content | said if isinstance(said, dict) else said))
    shutil.copy(place / "small" / "text.jsonl", tmp_path / "text.jsonl")
    with pytest.raises(BadInput, match="is not the recipe of a fit"):
        remake(recipe, tmp_path / "again", quiet=True)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("text", [b"", b"{", b"[]\n", b'{"text": 5, "judging": true}\n', b"\xff\xfe", b"[" * 100_000])
def test_garbage_beside_a_recipe_is_refused(text: bytes, place: Path, found: Any, tmp_path: Path) -> None:
    shutil.copy(place / "small" / RECIPE_FILE, tmp_path / RECIPE_FILE)
    (tmp_path / "text.jsonl").write_bytes(text)
    with pytest.raises(BadInput, match=r"text\.jsonl"):
        remake(tmp_path / RECIPE_FILE, tmp_path / "again", quiet=True)


def test_facts_name_what_was_measured(place: Path, found: Any) -> None:
    facts = json.loads((place / "small" / "fit.json").read_text())
    assert facts["digests"]["model"] == source_digest(locate(place / "model.gguf"))
    assert facts["digests"]["chosen"] == digest_of(found.file)
    assert {"version", "date", "machine", "units", "conditions"} <= facts.keys()
    assert facts["tasks"][0]["unseen items"] > 0


def test_the_recipe_rebuilds_the_same_bytes(place: Path, found: Any, tmp_path: Path) -> None:
    made = remake(place / "small" / RECIPE_FILE, tmp_path / "again", quiet=True)
    assert made.read_bytes() == found.file.read_bytes()
