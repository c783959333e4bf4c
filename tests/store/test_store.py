"""The store across processes: one does the work, the others wait and read, and a killed one blocks nobody."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from coprune.base.errors import BadInput
from coprune.store.claim import Claim, Taken
from coprune.store.store import Store, key_of
from support.forking import ended, forked, wait_for

KEY = key_of("measure", 1, model="digest of a model")


class Found(BaseModel):
    by: str


def begin(folder: Path, name: str, seconds: float) -> int:
    """Get the same entry in a child that takes some seconds to make it and records its start and result."""

    def measure() -> Found:
        (folder / f"{name}.begun").touch()
        time.sleep(seconds)
        return Found(by=name)

    def ask() -> None:
        found = Store(folder / "kept").get(KEY, Found, measure)
        (folder / f"{name}.got").write_text(found.by)

    return forked(ask)


def test_a_second_process_waits_for_the_first_and_reads_its_result(tmp_path: Path) -> None:
    first = begin(tmp_path, "first", 0.3)
    wait_for(tmp_path / "first.begun")
    second = begin(tmp_path, "second", 0.0)
    assert [ended(first), ended(second)] == [0, 0]
    assert (tmp_path / "second.got").read_text() == (tmp_path / "first.got").read_text() == "first"
    assert not (tmp_path / "second.begun").exists()
    # Another entry is not waited for, and a failure leaves nothing.
    store, other = Store(tmp_path / "kept"), key_of("measure", 1, model="another digest")
    assert store.find(other, Found) is None
    with pytest.raises(ZeroDivisionError):
        store.get(other, Found, lambda: Found(by=str(1 / 0)))
    assert store.get(other, Found, lambda: Found(by="me")).by == "me"
    assert Store(None).find(KEY, Found) is None


def test_a_killed_process_releases_its_claim(tmp_path: Path) -> None:
    first = begin(tmp_path, "first", 60)
    wait_for(tmp_path / "first.begun")
    second = begin(tmp_path, "second", 0.0)
    time.sleep(0.1)
    assert not (tmp_path / "second.begun").exists()
    os.kill(first, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL
    assert ended(second) == 0
    assert (tmp_path / "second.got").read_text() == "second"


def note_of(folder: Path) -> Path:
    (file,) = folder.glob("*.json")
    return file


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"me"', '"forged"'),
        lambda text: "",
        lambda text: "no checksum",
        lambda text: text.replace("\n", "\n ", 1),
    ],
    ids=["cut short", "forged", "empty", "garbage", "shifted"],
)
def test_a_damaged_record_is_made_again(tmp_path: Path, damage: Callable[[str], str]) -> None:
    store = Store(tmp_path)
    store.get(KEY, Found, lambda: Found(by="me"))
    note = note_of(tmp_path)
    note.write_text(damage(note.read_text()))
    assert store.find(KEY, Found) is None
    assert store.get(KEY, Found, lambda: Found(by="again")).by == "again"


def test_a_record_of_another_type_is_not_found(tmp_path: Path) -> None:
    class Other(BaseModel):
        number: int

    store = Store(tmp_path)
    store.complete(KEY, Other(number=1))
    assert store.find(KEY, Found) is None


def test_a_key_depends_on_everything_that_decides_a_result() -> None:
    same = key_of("measure", 1, model="a", text="b")
    assert same == key_of("measure", 1, text="b", model="a")
    others = [
        key_of("measure", 2, model="a", text="b"),
        key_of("answer", 1, model="a", text="b"),
        key_of("measure", 1, model="c", text="b"),
        key_of("measure", 1, model="a"),
    ]
    assert len({same, *others}) == 5


def test_the_seconds_of_the_work_are_stored(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def slowly() -> Found:
        time.sleep(0.02)
        return Found(by="me")

    store.get(KEY, Found, slowly)
    found = store.find(KEY, Found)
    assert found is not None
    assert 0.02 <= found.seconds < 5


def test_a_claim_of_another_process_is_refused_and_an_own_one_replaced(tmp_path: Path) -> None:
    file = tmp_path / "running.lock"

    def hold() -> None:
        held = Claim(file)
        (tmp_path / "held").touch()
        time.sleep(60)
        held.close()

    other = forked(hold)
    wait_for(tmp_path / "held")
    with pytest.raises(Taken):
        Claim(file)
    os.kill(other, signal.SIGKILL)
    assert ended(other) == -signal.SIGKILL
    first = Claim(file)
    second = Claim(file)
    first.close()  # it holds nothing any more
    child = forked(lambda: (tmp_path / "refused").touch() if refused(file) else None)
    assert ended(child) == 0
    assert (tmp_path / "refused").exists()
    second.close()
    Claim(file).close()


def refused(file: Path) -> bool:
    try:
        Claim(file)
    except Taken:
        return True
    return False


def test_a_cache_that_cannot_be_written_is_named_with_the_variable_that_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BadInput, match=r"the cache .* is below .*file, .*; set XDG_CACHE_HOME to a folder that"):
        Store.of_user()
