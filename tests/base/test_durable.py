"""Files that several processes write at once, or that a killed one left."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import torch
from safetensors.torch import save_file

from coprune.base.durable import write_durably, write_whole
from coprune.base.whole_folder import whole_folder


def test_two_processes_may_write_one_file_at_a_time(tmp_path: Path) -> None:
    """The second begins and ends while the first is writing."""
    file = tmp_path / "entry.json"

    def slowly(temporary: Path) -> None:
        temporary.write_text("first")
        write_durably(file, lambda other: other.write_text("second"))
        assert temporary.read_text() == "first"

    write_durably(file, slowly)
    assert file.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["entry.json"]


def test_what_a_killed_process_left_is_removed_when_nobody_is_at_it(tmp_path: Path) -> None:
    file = tmp_path / "entry.json"
    for name in ("entry.json.01234567.tmp", "entry.json.89abcdef.tmp", "other.json.01234567.tmp"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (0, 0))
    os.utime(tmp_path / "entry.json.89abcdef.tmp")
    write_durably(file, lambda temporary: temporary.write_text(""))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"entry.json", "entry.json.89abcdef.tmp", "other.json.01234567.tmp"}


def test_a_long_name_leaves_room_for_a_temporary_one(tmp_path: Path) -> None:
    file = tmp_path / ("n" * 255)
    write_durably(file, lambda temporary: temporary.write_text("whole"))
    assert file.read_text() == "whole"


def test_files_are_as_readable_as_the_user_wants_new_ones(tmp_path: Path) -> None:
    """safetensors makes its files private, beside others that are not."""
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "weights", lambda temporary: save_file({"w": torch.zeros(2)}, temporary))
        with whole_folder(tmp_path / "folder") as out:
            save_file({"w": torch.zeros(2)}, out / "weights")
    finally:
        os.umask(before)
    for file in (tmp_path / "weights", tmp_path / "folder" / "weights"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
