"""The user's candidate files in a fit: measured like its own quants, and copied byte for byte if they win."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import coprune
from coprune.base.errors import BadInput
from coprune.fitting.fit_call import FACTS_FILE, remake
from coprune.fitting.fit_recipe import RECIPE_FILE
from coprune.fitting.require import Verdict
from coprune.fitting.search import Search
from coprune.gguf_files.llama_cpp import has_llama_cpp
from support.fits import WITHOUT, how, tokens
from support.pico import pico_model
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.vocabularies import content_of

pytestmark = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")

REQUIRED = "bits<=dense*1.1"


@pytest.fixture(scope="module")
def files(place: Path) -> Path:
    """Return files of the model in four and in eight bits, and one with other weights."""
    folder = place / "files"
    coprune.export(place / "model.gguf", folder / "small.gguf", type="q4_0")
    coprune.export(place / "model.gguf", folder / "large.gguf", type="q8_0")
    torch.manual_seed(7)
    other = pico_model("llama", vocab_size=tokens(), max_position_embeddings=1024, tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(0, 2)
    write_pico_gguf(other, folder / "other.gguf", "Q4_0", tokenizer=content_of("bytes"))
    return folder


def fitted(place: Path, output: Path, *candidates: Path, **more: Any) -> Any:
    settings = how(place, **{"types": "q8_0", "without": f"{WITHOUT},embedding", "budget": "24h"} | more)
    return coprune.fit(
        place / "model.gguf", place / "text.txt", REQUIRED, output=output, candidate=candidates, **settings
    )


def test_a_smaller_file_that_meets_all_conditions_wins(place: Path, files: Path, tmp_path: Path) -> None:
    found = fitted(place, tmp_path / "out", files / "small.gguf", files / "other.gguf")
    assert (found.kept, found.chosen, found.file.name) == (True, "small.gguf", "model-small.gguf")
    assert found.file.read_bytes() == (files / "small.gguf").read_bytes()
    page, shown = found.page.read_text(), str(found)
    assert all(name in page for name in ("small.gguf", "other.gguf", "q8_0"))
    assert str(files) not in page
    assert "this is small.gguf, which was given as a candidate, byte for byte" in shown
    assert "other.gguf: " in shown
    assert "not kept on the seen items" in shown
    assert [*json.loads((tmp_path / "out" / FACTS_FILE).read_text())["candidates"]] == ["small.gguf", "other.gguf"]
    recipe = tmp_path / "out" / RECIPE_FILE
    assert remake(recipe, tmp_path / "again", quiet=True).read_bytes() == found.file.read_bytes()
    moved = tmp_path / "moved.gguf"
    shutil.copyfile(files / "other.gguf", moved)
    recipe.write_text(recipe.read_text().replace(str(files / "small.gguf"), str(moved)))
    with pytest.raises(BadInput, match="other bytes than the file that the fit chose"):
        remake(recipe, tmp_path / "once more", quiet=True)


def test_a_larger_file_does_not_win_and_is_listed(place: Path, files: Path, tmp_path: Path) -> None:
    found = fitted(place, tmp_path / "out", files / "large.gguf", types="q8_0,q4_0")
    assert (found.kept, found.chosen) == (True, "q4_0")
    (row,) = (row for row in found.rows if row.foreign)
    assert (row.name, row.plain, row.verdict, row.part) == ("large.gguf", False, "kept", "unseen")
    assert any(note.startswith("large.gguf: ") and "kept on the unseen items" in note for note in found.notes)
    assert found.plain == "q4_0"


def test_a_foreign_file_wins_if_only_it_meets_the_conditions(
    place: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Search._verdict
    monkeypatch.setattr(
        Search, "_verdict", lambda self, one, places: Verdict.LOST if one.plain else judge(self, one, places)
    )
    found = fitted(place, tmp_path / "out", files / "large.gguf", types="q4_0")
    assert (found.kept, found.chosen, found.plain) == (True, "large.gguf", None)


def test_a_changed_file_is_measured_again(place: Path, files: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.gguf"
    for name, chosen in (("small", "given.gguf"), ("other", "q8_0")):
        shutil.copyfile(files / f"{name}.gguf", given)
        found = fitted(place, tmp_path / "out", given)
        assert (found.kept, found.chosen) == (True, chosen)
    assert [file.name for file in (tmp_path / "out").glob("*.gguf")] == ["model-q8_0.gguf"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing", r"there is no file .*smal\.gguf; did you mean .*small\.gguf\?"),
        ("empty", "is an empty file"),
        ("text", "is neither a GGUF file nor a folder"),
        ("cut off", "is cut off: it has"),
        ("part", "is one of 2 parts, and a candidate is one file"),
        ("vocabulary", "has another vocabulary: token 40 is"),
        ("tokens", "has 1,025 tokens, and the model 1,024"),
        ("architecture", "is a granite, and the model a llama"),
        ("itself", "is the model itself"),
        ("folder", "where the result goes"),
        ("transformers", "a GGUF file is measured in llama.cpp"),
    ],
)
def test_unusable_files_are_refused_before_measuring(
    what: str, said: str, place: Path, files: Path, tmp_path: Path
) -> None:
    given, more = tmp_path / "given.gguf", dict[str, Any]()
    content = (files / "small.gguf").read_bytes()
    given.write_bytes({"empty": b"", "cut off": content[:-100]}.get(what, content))
    vocabulary = json.loads(content_of("bytes"))
    if what == "nothing":
        given = files / "smal.gguf"
    elif what == "text":
        given = place / "text.txt"
    elif what == "part":
        given = tmp_path / "given-00001-of-00002.gguf"
        for number in (1, 2):
            shutil.copyfile(files / "small.gguf", tmp_path / f"given-0000{number}-of-00002.gguf")
    elif what in ("vocabulary", "tokens", "architecture"):
        ids = vocabulary["model"]["vocab"]
        if what == "vocabulary":
            ids["another"] = ids.pop(next(token for token, number in ids.items() if number == 40))
        if what == "tokens":
            ids["another"] = len(ids)
        arch = "granite" if what == "architecture" else "llama"
        model = pico_model(arch, vocab_size=len(ids), max_position_embeddings=1024, tie_word_embeddings=True)
        write_pico_gguf(distinct_norms(model), given, arch=arch, tokenizer=json.dumps(vocabulary))
    elif what == "itself":
        given = place / "model.gguf"
    elif what == "folder":
        (tmp_path / "out" / ".fit").mkdir(parents=True)
        given = Path(shutil.copyfile(given, tmp_path / "out" / "given.gguf"))
    elif what == "transformers":
        more["runtime"] = "transformers"
    settings = how(place, candidate=str(given), **more)
    if more:
        del settings["types"]
    with pytest.raises(BadInput, match=said) as refused:
        coprune.fit(place / "model.gguf", place / "text.txt", REQUIRED, output=tmp_path / "out", **settings)
    assert refused.value.field == ("output" if what == "folder" else "candidate")
    assert not [*tmp_path.glob("out/.fit/**/*.gguf")]
