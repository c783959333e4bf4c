"""A folder gets its name once it is complete and on the disk; only leftovers of killed processes are removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coprune.base import files
from coprune.base.files import whole_folder
from support.killing import count_lines, killed_at


def fill(target: Path) -> None:
    with whole_folder(target) as out:
        (out / "below").mkdir()
        (out / "below" / "file").write_text("content")


def test_everything_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    def synced(path: Path) -> None:
        happened.append(path.name)

    def renamed(path: Path, target: Path) -> Path:
        happened.append("renamed")
        os.replace(path, target)
        return target

    monkeypatch.setattr(files, "sync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    fill(tmp_path / "target")
    before, after = happened[: happened.index("renamed")], happened[happened.index("renamed") + 1 :]
    assert {"below", "file"} < set(before)
    assert after == [tmp_path.name]
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["below"]


def test_leftovers_of_a_killed_process_are_removed_by_the_next(tmp_path: Path) -> None:
    lines, _ = count_lines(lambda: fill(tmp_path / "other"), ())
    left = 0
    for tenth in (2, 3, 4, 5, 6, 7, 8):
        assert killed_at(lambda: fill(tmp_path / "target"), lines * tenth // 10)
        assert not (tmp_path / "target").exists()
        left += len(list(tmp_path.glob(".target.*"))) == 1
    assert left > 3
    fill(tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == {"other", "target"}


def test_unfinished_folders_of_other_processes_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / ".target.deadbeef"
    foreign.mkdir()
    (foreign / "mine").write_text("")
    with whole_folder(tmp_path / "target") as slow:
        fill(tmp_path / "target")
        assert slow.is_dir()
        with pytest.raises(ValueError, match="own"), whole_folder(tmp_path / "other") as out:
            raise ValueError("own")
        assert not out.exists()
        (tmp_path / "target" / "below" / "file").unlink()
        (tmp_path / "target" / "below").rmdir()
    assert {path.name for path in tmp_path.iterdir()} == {"target", ".target.deadbeef"}
