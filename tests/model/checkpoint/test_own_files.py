"""Links in a model's folder: nothing from elsewhere on the machine is copied."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coprune.model.checkpoint.companions import copy_companions, is_own, own_files
from coprune.model.checkpoint.locate import ModelFolder
from support.pico_folder import save_pico


@pytest.fixture
def crafted(tmp_path: Path) -> Path:
    """Return a model whose folder has links to a secret file, to a folder, and in a circle."""
    secrets = tmp_path / "home"
    secrets.mkdir()
    (secrets / "key.txt").write_text("secret")
    folder = save_pico(tmp_path / "model", num_hidden_layers=1)
    (folder / "notes.txt").symlink_to(secrets / "key.txt")
    (folder / "NOTICE").symlink_to("../home/key.txt")
    (folder / "more").symlink_to(secrets)
    (folder / "round.txt").symlink_to("round.txt")
    (folder / "inside.txt").symlink_to("tokenizer.json")
    return folder


def test_links_out_of_a_folder_are_not_copied(crafted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    copy_companions(ModelFolder(crafted, "model"), out)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert not any(b"secret" in path.read_bytes() for path in files)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (out / "inside.txt").read_bytes() == (crafted / "tokenizer.json").read_bytes()
    assert "notes.txt is skipped" in caplog.text


def test_pipes_are_not_copied(crafted: Path, tmp_path: Path) -> None:
    os.mkfifo(crafted / "pipe.txt")  # reading it would block forever
    (tmp_path / "out").mkdir()
    copy_companions(ModelFolder(crafted, "model"), tmp_path / "out")
    assert not (tmp_path / "out" / "pipe.txt").exists()


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "ab12").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/ab12")
    (snapshot / "other.json").symlink_to("../../../elsewhere")
    assert own_files(snapshot) == [snapshot / "config.json"]
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "config.json").symlink_to(snapshot / "config.json")
    assert not is_own(linked / "config.json", linked)
    monkeypatch.setattr("coprune.model.checkpoint.companions.HF_HUB_CACHE", str(tmp_path))
    assert is_own(linked / "config.json", linked)
