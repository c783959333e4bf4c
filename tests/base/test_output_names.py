"""Impossible folder names are refused by every command before anything slow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.base.files import require_apart
from coprune.model.checkpoint.writer import join_files, refuse_occupied
from coprune.recipe.recipe import make_recipe
from coprune.recipe.views import training_recipe
from coprune.report.run_folder import prepare_folders
from coprune.training.resume import output_of

NAMES = ["n" * 250, "x/" + "m" * 300, "a\0b", "\ud800", "file/below", "link", "x" * 5000]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:12])
def test_an_impossible_name_is_refused_before_anything_is_done(name: str, place: Path) -> None:
    for field in ("save", "save_model"):
        places: dict[str, Any] = {"save": "run", field: name}
        with pytest.raises(BadInput) as caught:
            prepare_folders(make_recipe({"model": "pico", **places}))
        assert caught.value.field == field
        with pytest.raises(BadInput):
            output_of(training_recipe({"model": "pico", **places})).prepare()
    with pytest.raises(BadInput):
        refuse_occupied(Path(name))
    assert sorted(path.name for path in place.iterdir()) == ["file", "link"]


def test_a_link_to_a_folder_cannot_become_a_model(place: Path) -> None:
    (place / "real").mkdir()
    (place / "linked").symlink_to("real")
    with pytest.raises(BadInput, match="is a link"):
        refuse_occupied(place / "linked")
    prepare_folders(make_recipe({"model": "pico", "save": place / "linked"}))  # a run folder may be a link


def test_an_unwritable_folder_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(BadInput, match="not writable"):
        prepare_folders(make_recipe({"model": "pico", "save": "run"}))


def test_a_model_may_have_more_blocks_than_open_files_allowed(tmp_path: Path) -> None:
    """300 blocks with a limit of 256 descriptors."""
    import resource

    import torch
    from safetensors.torch import load_file, save_file

    files = [tmp_path / f"{number:03}" for number in range(300)]
    for number, file in enumerate(files):
        save_file({f"w{number:03}": torch.full((2,), float(number))}, file)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        join_files(files, tmp_path / "joined")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [float(tensor[0]) for _, tensor in sorted(load_file(tmp_path / "joined").items())] == list(range(300))


def test_the_same_folder_under_two_paths_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("link").symlink_to("out")
    for model in ("out/run", "out/../out/run", "link/run", "out/../out"):
        with pytest.raises(BadInput, match="which will be the model's"):
            require_apart(Path("out/run"), Path(model))
    require_apart(Path("out/run"), Path("link/model"))
