"""Files written by several processes at once, or left by a killed one."""

from __future__ import annotations

import errno
import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coprune.base.errors import CopruneError
from coprune.base.files import own_folder, remove_unfinished, whole_folder, write_durably, write_whole
from support.disturbing import in_child, left_in
from support.forking import forked


def test_two_processes_may_write_one_file_at_once(tmp_path: Path) -> None:
    """The second starts and finishes while the first is writing."""
    file = tmp_path / "entry.json"

    def slowly(temporary: Path) -> None:
        temporary.write_text("first")
        write_durably(file, lambda other: other.write_text("second"))
        assert temporary.read_text() == "first"

    write_durably(file, slowly)
    assert file.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["entry.json"]


def test_leftovers_of_killed_processes_are_removed_unless_in_use(tmp_path: Path) -> None:
    file = tmp_path / "entry.json"
    for name in (".entry.json.coprune-01234567", ".other.json.coprune-01234567"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpAbCdEf").write_text("of a library that was writing")
    with own_folder(file) as busy:
        write_durably(file, lambda temporary: temporary.write_text(""))
        assert {path.name for path in tmp_path.iterdir()} == {"entry.json", ".other.json.coprune-01234567", busy.name}
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"entry.json"}


def test_a_kill_while_safetensors_writes_leaves_no_temporary_file(tmp_path: Path) -> None:
    """It writes to its own temporary file beside the named one, and renames it."""

    def die(temporary: Path) -> None:
        (temporary.parent / ".tmpAbCdEf").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    _, status = os.waitpid(forked(lambda: write_whole(tmp_path / "weights", die)), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not list(tmp_path.glob(".tmp*"))
    write_whole(tmp_path / "weights", lambda temporary: save_file({"w": torch.zeros(2)}, temporary))
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("error", [OSError("4096 requested and 0 written"), OSError(errno.EFBIG, "too large")])
def test_a_full_disk_is_one_message_whatever_raises_it(error: OSError, tmp_path: Path) -> None:
    def fail(temporary: Path) -> None:
        raise error

    with pytest.raises(CopruneError, match="could not be written; free some space"):
        write_durably(tmp_path / "out.gguf", fail)
    assert not list(tmp_path.iterdir())


def test_a_long_name_leaves_room_for_a_temporary_one(tmp_path: Path) -> None:
    file = tmp_path / ("n" * 255)
    write_durably(file, lambda temporary: temporary.write_text("whole"))
    assert file.read_text() == "whole"


def test_files_have_the_users_default_permissions(tmp_path: Path) -> None:
    """safetensors makes its files private, unlike the others."""
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "weights", lambda temporary: save_file({"w": torch.zeros(2)}, temporary))
        with whole_folder(tmp_path / "folder") as out:
            save_file({"w": torch.zeros(2)}, out / "weights")
    finally:
        os.umask(before)
    for file in (tmp_path / "weights", tmp_path / "folder" / "weights"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_a_file_killed_at_any_system_call_is_old_or_new_without_leftovers(tmp_path: Path) -> None:
    def write(out: Path) -> None:
        write_durably(out / "file", lambda temporary: temporary.write_text("new"))

    out, at, ended = tmp_path / "out", 0, -signal.SIGKILL
    while ended != 0:
        at += 1
        out.mkdir(exist_ok=True)
        (out / "file").write_text("old")
        ended = in_child(write, out, kill_at=at)
        found = (out / "file").read_text()
        assert found == "new" or len(left_in(out, "file")) <= 2
        if found == "old":
            write(out)
        assert not left_in(out, "file"), at
    assert at > 8
