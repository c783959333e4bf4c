"""Registered steps in a fit: tried in every type, resumed, made again from the recipe, and noticed when files change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import coprune
from coprune.base.errors import BadInput
from coprune.fitting.fit_call import remake
from coprune.fitting.fit_notes import Asked
from coprune.fitting.fit_recipe import RECIPE_FILE
from coprune.fitting.made_model import digest_of
from coprune.gguf_files.llama_cpp import has_llama_cpp
from coprune.model.checkpoint.load import load_tokenizer, quiet_transformers
from coprune.model.checkpoint.locate import locate
from support.fits import how, tokens
from support.merge_step import Merge  # noqa: F401 (registers it)
from support.pico import pico_model
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.shorter_step import Shorter  # noqa: F401 (registers it)
from support.vocabularies import content_of

pytestmark = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")

MERGE, SHORTER = "merge:other=other,share=0.5", "shorter:by=1"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models that write their last token again, whatever is changed; the second is less sure of it."""
    monkeypatch.chdir(tmp_path)
    for name, scale in (("model", 20), ("other", 10)):
        model = pico_model("llama", vocab_size=tokens(), max_position_embeddings=1024, tie_word_embeddings=True)
        weight = distinct_norms(model).get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        weight.data.mul_(scale)
        file = write_pico_gguf(model, tmp_path / f"{name}.gguf", tokenizer=content_of("bytes"))
        with quiet_transformers():
            model.save_pretrained(tmp_path / name)
            load_tokenizer(locate(str(file))).save_pretrained(tmp_path / name)
    return tmp_path


def fit(place: Path, *steps: str, **more: Any) -> Any:
    settings = how(place, budget="24h", step=steps) | more
    if more.get("runtime") == "transformers":
        del settings["types"]
    return coprune.fit("model", place / "text.txt", "bits<=dense*2.5", output="small", **settings)


def test_stored_results_of_a_step_are_not_measured_again(place: Path, store: Path, folders: Path) -> None:
    asked = {"runtime": "transformers"}
    found = fit(place, MERGE, SHORTER, **asked)
    assert found.kept
    assert found.chosen.startswith(SHORTER)
    rows = {row.name: row.bytes for row in found.rows}
    assert found.bytes < rows["dense f16"] == rows[f"{MERGE} f16"]
    measured = {file: file.stat().st_mtime_ns for file in store.glob("fit-*.json")}
    again = fit(place, MERGE, SHORTER, **asked)
    assert {file: file.stat().st_mtime_ns for file in store.glob("fit-*.json")} == measured
    assert (again.chosen, again.rows) == (found.chosen, found.rows)
    made = remake(folders / "small" / RECIPE_FILE, folders / "out", quiet=True)
    assert digest_of(made) == digest_of(found.file)


def test_a_steps_model_is_tried_in_llama_cpps_types(place: Path, store: Path, folders: Path) -> None:
    found = fit(place, MERGE, like="model.gguf")
    rows = {row.name: row.bytes for row in found.rows}
    assert found.bytes < rows["q8_0"] == rows[f"{MERGE} q8_0"]


def test_stored_results_of_a_step_depend_on_the_bytes_that_it_read(folders: Path) -> None:
    before = Asked("model", (), step=(MERGE,)).digests_of_steps
    assert Asked("model", (), step=(MERGE,)).digests_of_steps == before
    (folders / "other" / "model.safetensors").write_bytes((folders / "model" / "model.safetensors").read_bytes())
    assert Asked("model", (), step=(MERGE,)).digests_of_steps != before


@pytest.mark.parametrize(
    ("step", "why"),
    [("merg:other=other", "merge"), ("merge", "other"), ("merge:other=missing", "missing"), ("shorter:by=0", "by")],
)
def test_a_fit_refuses_a_wrong_step_before_it_begins(step: str, why: str, place: Path, folders: Path) -> None:
    with pytest.raises(BadInput, match=why):
        fit(place, step, like="model.gguf")
    assert not (folders / "small").exists()
