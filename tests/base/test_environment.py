"""The environment is read in a single module, with sensible defaults even without a home."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import pytest

import coprune
from coprune.base import environment
from coprune.base.errors import BadInput
from coprune.base.processes import Processes, started_processes

SOURCES = Path(coprune.__file__).parent


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Simulate a user without a home; return the folder for temporary files."""

    def unknown(*path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("COPRUNE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.setattr(Path, "expanduser", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment._temporary_cache.cache_clear()
    return tmp_path


def test_no_other_module_reads_the_environment() -> None:
    look = re.compile(r"\benviron\b|\bgetenv\b|\bputenv\b|expanduser|Path\.home")
    found = {
        str(path.relative_to(SOURCES)): number
        for path in SOURCES.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if look.search(line) and path != SOURCES / "base" / "environment.py"
    }
    assert found == {}, "ask coprune.base.environment instead"


def test_rank_and_world_size_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert started_processes() == Processes(0, 1)
    assert environment.local_rank() == 0
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert started_processes() == Processes(2, 3)
    assert not started_processes().first
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(BadInput, match="RANK is 'two'"):
        started_processes()


def test_caches_are_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COPRUNE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert environment.user_cache() == environment.kernel_cache() == tmp_path / "home" / ".cache" / "coprune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert environment.user_cache() == environment.kernel_cache() == tmp_path / "xdg" / "coprune"
    monkeypatch.setenv("COPRUNE_CACHE", str(tmp_path / "own"))
    assert environment.kernel_cache() == tmp_path / "own"
    assert environment.user_cache() == tmp_path / "xdg" / "coprune"


def test_without_a_home_caches_are_in_a_private_folder(no_home: Path) -> None:
    folder = environment.user_cache()
    assert folder.parent == no_home
    assert folder.stat().st_mode & 0o077 == 0
    environment._temporary_cache.cache_clear()
    assert environment.user_cache() == folder  # also for the next process
    assert environment.expand_home("~/model") == Path("~/model")


def test_an_unwritable_home_falls_back_to_a_temporary_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for home in ("file", "file/below"):
        environment._temporary_cache.cache_clear()
        monkeypatch.setenv("HOME", str(tmp_path / home))
        assert environment.user_cache() == tmp_path / f"coprune-{os.getuid()}"


@pytest.mark.parametrize("planted", ["writable", "link"])
def test_a_cache_that_others_can_write_is_not_used(planted: str, no_home: Path) -> None:
    folder = environment.user_cache()
    environment._temporary_cache.cache_clear()
    if planted == "writable":
        folder.chmod(0o777)
    else:
        elsewhere = no_home / "elsewhere"
        folder.rename(elsewhere)
        folder.symlink_to(elsewhere)
    assert environment.user_cache() != folder
    assert environment.user_cache().stat().st_mode & 0o077 == 0


def test_visible_gpus_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment.visible_gpus() == []
    environment.see_only("3")
    assert environment.visible_gpus() == ["3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,1")
    assert environment.visible_gpus() == ["GPU-a", "1"]


def test_an_environment_variable_set_by_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    environment.quieten_libraries()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    environment.quieten_libraries()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
