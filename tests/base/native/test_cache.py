"""Compiled code is loaded only from folders that nobody else can write, and only if it is complete."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coprune.base import environment
from coprune.base.native import compilation
from coprune.base.native.cache import LIBRARY, library_in, only_ours
from coprune.base.native.compilation import load_kernels

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")


class Maker:
    """A stand-in for the compiler that counts its runs."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, path: Path) -> None:
        self.times += 1
        path.write_bytes(b"library")


def path_in(folder: Path, make: Callable[[Path], object]) -> Path:
    with library_in(folder, make) as path:
        assert path.read_bytes() == b"library"
        return path


def test_a_library_is_compiled_once_and_again_if_truncated(tmp_path: Path) -> None:
    make, folder = Maker(), tmp_path / "cache" / "kernels"
    assert path_in(folder, make) == path_in(folder, make) == folder / LIBRARY
    assert make.times == 1
    (folder / LIBRARY).write_bytes(b"libr")  # as after a crash before it was on the disk
    assert path_in(folder, make) == folder / LIBRARY
    (folder / "kernels.sha256").unlink()
    assert path_in(folder, make) == folder / LIBRARY
    assert make.times == 3


@pytest.mark.parametrize("which", [".", "kernels", "kernels/it", f"kernels/it/{LIBRARY}"])
def test_a_library_that_others_can_write_is_not_loaded(which: str, tmp_path: Path) -> None:
    make, folder = Maker(), tmp_path / "cache" / "kernels" / "it"
    path_in(folder, make)
    place = tmp_path / "cache" / which
    place.chmod(0o777)
    made = path_in(folder, make)
    assert make.times == 2
    if place.is_dir():
        assert not made.is_relative_to(tmp_path)
        assert not made.exists()  # only for this process
    else:
        assert only_ours(folder / LIBRARY)


def test_a_link_that_others_can_redirect_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "cache").symlink_to(tmp_path / "mine")
    assert only_ours(tmp_path / "open" / "cache")
    (tmp_path / "open").chmod(0o777)
    assert not only_ours(tmp_path / "open" / "cache")
    (tmp_path / "open").chmod(0o1777)  # sticky, as /tmp
    assert only_ours(tmp_path / "open" / "cache")


def test_an_unwritable_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not path_in(tmp_path / "file" / "kernels", Maker()).is_relative_to(tmp_path)


@needs_kernels
@pytest.mark.parametrize("planted", ["cut off", "another library"])
def test_kernels_are_loaded_in_spite_of_what_lies_there(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    load = ctypes.CDLL

    def spy(name: str, *more: Any, **options: Any) -> Any:
        loaded.append(Path(name))
        return load(name, *more, **options)

    whole = load_kernels()
    if whole is None or not Path(whole._name).exists():
        pytest.skip("this user's cache keeps no kernels")
    copy: Callable[..., object] = lambda compiler, units, library: shutil.copyfile(whole._name, library)  # noqa: E731
    monkeypatch.setattr(compilation, "_run_compiler", copy)
    monkeypatch.setattr(environment, "kernel_cache", lambda: tmp_path)
    assert load_kernels.__wrapped__() is not None
    (library,) = tmp_path.rglob(LIBRARY)
    if planted == "cut off":
        # A complete library would be mapped already, and a missing end would only show when it is used.
        library.unlink()
        library.write_bytes(Path(whole._name).read_bytes()[:5000])
    else:
        tmp_path.chmod(0o777)
    monkeypatch.setattr(ctypes, "CDLL", spy)
    assert load_kernels.__wrapped__() is not None
    assert any(path.is_relative_to(tmp_path) for path in loaded) == (planted == "cut off")
    if planted == "cut off":
        assert library.read_bytes() == Path(whole._name).read_bytes()
