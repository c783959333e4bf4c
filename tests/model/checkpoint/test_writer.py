from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from coprune.base.errors import BadInput, CopruneError
from coprune.base.files import write_text
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint import writer as writer_module
from coprune.model.checkpoint.companions import save_companions
from coprune.model.checkpoint.encoding import Place
from coprune.model.checkpoint.locate import locate
from coprune.model.checkpoint.names import EDITS_FILE
from coprune.model.checkpoint.older_keys import add_older_keys
from coprune.model.checkpoint.shards import INDEX_FILE, SINGLE_FILE
from coprune.model.checkpoint.weights import InMemory
from coprune.model.checkpoint.writer import REST, CheckpointWriter, join_files
from support.disturbing import in_child, left_in
from support.forking import forked
from support.sample import crossed
from support.saved import (
    MODELS,
    assert_same_tensors,
    load_clean,
    random_model,
    save_model,
    stream,
    tensors_of,
    write_blocks,
)


@pytest.mark.parametrize(("name", "single"), crossed([*MODELS], [True, False]))
def test_a_streamed_copy_equals_the_original(
    name: str, single: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SINGLE_FILE_BYTES", 10**9 if single else 0)
    save_model(name, tmp_path / "source", torch.bfloat16)
    copy = stream(tmp_path / "source", tmp_path / "copy")
    assert_same_tensors(tensors_of(copy), tensors_of(tmp_path / "source"))
    model = load_clean(copy)
    assert_same_tensors(model.state_dict(), load_clean(tmp_path / "source").state_dict())
    assert json.loads((copy / "config.json").read_text()) == json.loads(
        (tmp_path / "source" / "config.json").read_text()
    )
    locate(copy)
    weights = {SINGLE_FILE} if single else {f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)} | {INDEX_FILE}
    assert {path.name for path in copy.iterdir()} == weights | {"config.json", "generation_config.json"}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["copy", "source"]


def test_tied_embeddings_stored_twice_are_written_twice(tmp_path: Path) -> None:
    save_model("llama_tied", tmp_path / "source", shards="1GB")
    tensors = tensors_of(tmp_path / "source")
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    assert len(twice) > len(tensors)
    save_file(twice, tmp_path / "source" / SINGLE_FILE, metadata={"format": "pt"})
    assert_same_tensors(tensors_of(stream(tmp_path / "source", tmp_path / "copy")), twice)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_memory_is_written_as_save_pretrained_writes_it(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path / "expected", shards="1GB")
    weights = InMemory(model)
    blocks = [block.name for block in find_blocks(model)]
    writer = CheckpointWriter(tmp_path / "found", [*blocks, REST], weights.total_bytes)
    write_blocks(weights, writer, blocks)
    writer.write(REST, weights.rest_tensors(blocks))
    save_companions(model, None, writer.partial)
    found = writer.finish()
    add_older_keys(config := json.loads((tmp_path / "expected" / "config.json").read_text()))
    assert json.loads((found / "config.json").read_text()) == config
    for file in (tmp_path / "expected").iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes() or file.name == "config.json", file.name
    assert len(list(found.iterdir())) == len(list((tmp_path / "expected").iterdir()))


def test_another_dtype_is_written_and_declared(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "source", torch.float32)
    copy = stream(tmp_path / "source", tmp_path / "copy", "bfloat16")
    expected = {name: tensor.bfloat16() for name, tensor in tensors_of(tmp_path / "source").items()}
    assert_same_tensors(tensors_of(copy), expected)
    assert load_clean(copy).dtype == torch.bfloat16


def test_joined_files_equal_those_of_the_library(tmp_path: Path) -> None:
    """Also for parts of odd lengths, which would leave wider tensors unaligned."""
    parts = [
        {"b": torch.arange(3, dtype=torch.uint8), "ü": torch.randn(3, 5)},
        {"a": torch.randn(7).bfloat16()},
        {"c": torch.randn(5, dtype=torch.float64), "scalar": torch.tensor(1.5)},
    ]
    files = [tmp_path / f"{i}.safetensors" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        save_file(part, file, metadata={"format": "pt"})
    join_files(files, tmp_path / "joined")
    together = {name: tensor for part in parts for name, tensor in part.items()}
    save_file(together, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "expected").read_bytes()


def part_writer(tmp_path: Path, parts: Sequence[str] = ("one", "two")) -> CheckpointWriter:
    return CheckpointWriter(tmp_path / "model", parts, 1000)


def test_a_later_writer_reuses_complete_parts(tmp_path: Path) -> None:
    writer = part_writer(tmp_path)
    writer.write("one", {"a": torch.ones(3)}, {"error": 0.1 + 0.2})
    writer.settle()
    later = part_writer(tmp_path)
    assert later.recall("one") == {"error": 0.1 + 0.2}
    assert later.recall("one") is not None
    assert later.recall("two") is None
    with pytest.raises(ValueError, match="two"):
        later.finish()


def test_the_callers_own_files_go_last_and_an_interrupted_join_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(files: Sequence[Path], joined: Path, place: Place) -> None:
        joined.write_bytes(b"half")
        raise KeyboardInterrupt

    writer = part_writer(tmp_path)
    for part in ("one", "two"):
        writer.write(part, {part: torch.ones(3)})
    (writer.partial / "journal.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr("coprune.model.checkpoint.writer.join_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.finish(scaffolding=["journal.json"])
    again = part_writer(tmp_path)
    assert again.recall("one") is not None
    assert again.recall("two") is not None
    assert (again.partial / "journal.json").is_file()
    assert [path.name for path in again.finish(scaffolding=["journal.json"]).iterdir()] == [SINGLE_FILE]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "note cut", "note gone", "note of another"])
def test_a_damaged_part_is_noticed_and_rewritten(damage: str, tmp_path: Path) -> None:
    writer = part_writer(tmp_path)
    tensors = {"a": torch.randn(64)}
    writer.write("one", tensors)
    writer.write("two", {"b": torch.zeros(3)})
    writer.settle()
    file = writer.file("one")
    note = file.with_suffix(".json")
    content = file.read_bytes()
    match damage:
        case "flip":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "cut":
            file.write_bytes(content[:-1])
        case "gone":
            file.unlink()
        case "note cut":
            note.write_text(note.read_text()[:-4])
        case "note gone":
            note.unlink()
        case "note of another":
            note.write_text(writer.file("two").with_suffix(".json").read_text())
    again = part_writer(tmp_path)
    assert again.recall("one") is None
    assert again.recall("two") is not None
    again.write("one", tensors)
    assert again.recall("one") is not None
    assert_same_tensors(tensors_of(again.finish()), {**tensors, "b": torch.zeros(3)})


def test_a_nonempty_folder_is_never_touched(tmp_path: Path) -> None:
    occupied = tmp_path / "model"
    occupied.mkdir()
    writer = part_writer(tmp_path, ["one"])  # an empty folder is accepted
    writer.write("one", {"a": torch.ones(1)})
    (occupied / "precious").write_text("mine")
    with pytest.raises(BadInput, match="already exists"):
        writer.finish()
    with pytest.raises(BadInput, match="already exists"):
        part_writer(tmp_path)
    assert [path.name for path in occupied.iterdir()] == ["precious"]
    (occupied / "precious").unlink()
    assert tensors_of(writer.finish()).keys() == {"a"}


def test_the_unfinished_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    writer = part_writer(tmp_path)
    writer.write("one", {"a": torch.ones(1)})
    writer.settle()
    with pytest.raises(BadInput, match="unfinished checkpoint of another model"):
        part_writer(tmp_path, ["one", "two", "three"])
    writer.discard()
    part_writer(tmp_path, ["one", "two", "three"])


def test_two_processes_do_not_write_one_folder(tmp_path: Path, one_thread: None) -> None:
    read, write = os.pipe()

    def hold() -> None:
        held = part_writer(tmp_path)
        os.write(write, b"1")
        signal.pause()
        held.discard()

    other = forked(hold)
    assert os.read(read, 1) == b"1"
    with pytest.raises(BadInput, match="another run is writing"):
        part_writer(tmp_path)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    writer = part_writer(tmp_path)
    for part in ("one", "two"):
        writer.write(part, {part: torch.ones(1)})
    assert {path.name for path in writer.finish().iterdir()} == {SINGLE_FILE}


def test_too_little_space_is_reported_before_writing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"takes 1,000,000,000,000,000,000 bytes, but its disk has [\d,]+ free"):
        CheckpointWriter(tmp_path / "new" / "model", ["one"], 10**18)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_foreign_content_under_the_unfinished_name_is_left_alone(kind: str, tmp_path: Path) -> None:
    there = tmp_path / ".model.partial"
    mine = there if kind == "folder" else tmp_path / "mine"
    if kind == "file":
        there.write_text("thesis")
    else:
        mine.mkdir()
        (mine / "thesis.txt").write_text("thesis")
    if kind == "link":
        there.symlink_to(mine)
    with pytest.raises(BadInput, match=r"\.model\.partial is in the way: it is not the unfinished checkpoint"):
        part_writer(tmp_path)
    assert there.read_text() == "thesis" if kind == "file" else [p.name for p in mine.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "left", [[], ["running.lock"], [".parts.json.coprune-01234567"], ["coprune_edits.json", "config.json"]]
)
def test_leftovers_of_a_runs_first_and_last_moments_are_reused(left: list[str], tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    for name in left:
        (tmp_path / ".model.partial" / name).mkdir() if "-" in name else (tmp_path / ".model.partial" / name).touch()
    writer = part_writer(tmp_path)
    assert {path.name for path in writer.partial.iterdir()} == {"parts.json", "running.lock"}


def test_a_writer_killed_at_any_system_call_ends_with_the_same_files(tmp_path: Path, one_thread: None) -> None:
    def write(out: Path) -> None:
        if (out / "model").exists():
            return
        writer = CheckpointWriter(out / "model", ["one", "two"], 1000)
        for part in ("one", "two"):
            if writer.recall(part) is None:
                writer.write(part, {part: torch.ones(3)})
        write_text(writer.partial / EDITS_FILE, "{}")
        writer.finish()

    out, at = tmp_path / "out", -2
    expected: dict[str, bytes | None] = {EDITS_FILE: None, SINGLE_FILE: None}
    while True:
        at += 3
        out.mkdir()
        ended = in_child(write, out, kill_at=at)
        assert ended in (0, -signal.SIGKILL)
        write(out)
        found = {path.name: path.read_bytes() for path in (out / "model").iterdir()}
        assert found.keys() == expected.keys()
        assert expected[SINGLE_FILE] in (None, found[SINGLE_FILE])
        expected = dict(found)
        assert not left_in(out, "model"), at
        shutil.rmtree(out)
        if ended == 0:
            break
    assert at > 40


def test_a_full_disk_loses_no_finished_part(tmp_path: Path, one_thread: None) -> None:
    """A limit on file sizes simulates the full disk: the write fails half-way, inside the library."""

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = part_writer(tmp_path)
        writer.write("one", {"a": torch.ones(3)})
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(CopruneError, match="the file size limit is exceeded"):
            writer.write("two", {"b": torch.ones(100_000)})

    _, status = os.waitpid(forked(fill), 0)
    assert status == 0
    again = part_writer(tmp_path)
    assert again.recall("one") is not None
    assert again.recall("two") is None
    assert not list(again.partial.glob(".*.coprune-*"))


def test_a_part_counts_only_once_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, may_go = threading.Event(), threading.Event()

    def slow_disk(path: Path) -> None:
        waiting.set()
        may_go.wait()

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "sync", slow_disk)
        writer = part_writer(tmp_path)
        writer.write("one", {"a": torch.ones(3)})
        waiting.wait()
        assert tensors_of(writer.file("one").parent)["a"].tolist() == [1, 1, 1]
        assert not writer.file("one").with_suffix(".json").exists()
        may_go.set()
        writer.settle()
    assert writer.recall("one") is not None


def test_a_failed_background_write_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = part_writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "sync", full)
        writer.write("one", {"a": torch.ones(3)})
        with pytest.raises(CopruneError, match="the disk is full"):
            writer.write("two", {"b": torch.ones(3)})
    assert writer.recall("one") is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    from coprune.base.files import write_durably

    def fill(temporary: Path) -> None:
        with open("/dev/full", "w", buffering=1) as full:
            full.write("x\n")

    with pytest.raises(CopruneError, match="the disk is full"):
        write_durably(tmp_path / "file", fill)
    assert not list(tmp_path.iterdir())


def test_a_kill_between_blocks_leaves_no_folder_of_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    save_model("mixtral", tmp_path / "source")
    whole = CheckpointWriter.write
    calls: list[Any] = []

    def write_twice(self: CheckpointWriter, *given: Any) -> None:
        if len(calls) == 2:
            self.settle()
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(given)
        whole(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", write_twice)
        _, status = os.waitpid(forked(lambda: stream(tmp_path / "source", tmp_path / "copy")), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "copy").exists()
    writer = CheckpointWriter(tmp_path / "copy", [REST, *(f"model.layers.{i}" for i in range(3))], 10**6)
    assert [writer.recall(part) is not None for part in (REST, "model.layers.0", "model.layers.1")] == [
        True,
        True,
        False,
    ]
    copy = stream(tmp_path / "source", tmp_path / "copy")
    assert_same_tensors(tensors_of(copy), tensors_of(tmp_path / "source"))


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    model = random_model("mixtral")
    model.set_experts_implementation("eager")
    before = model.config.to_dict()
    save_companions(model, None, tmp_path)
    assert model.config.to_dict() == before
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()


def test_background_writes_wait_for_copies_from_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caller, waited = threading.get_ident(), []

    def on_its_way(tensor: Tensor) -> Callable[[], Tensor]:
        copy = tensor.clone()  # a device copies the values at the time of the call

        def arrive() -> Tensor:
            waited.append(threading.get_ident() != caller)
            return copy

        return arrive

    monkeypatch.setattr(writer_module, "on_its_way", on_its_way)
    writer = CheckpointWriter(tmp_path / "out", ["a", "b"], 0)
    weight = torch.arange(6.0).reshape(2, 3).T
    writer.write("a", {"x": weight}, beside=True)
    weight.zero_()
    writer.settle()
    assert waited == [True]
    assert torch.equal(tensors_of(writer.file("a").parent)["x"], torch.arange(6.0).reshape(2, 3).T)
    writer.write("b", {"y": torch.ones(2)})
    assert len(waited) == 1  # an immediate write waits for the copy as usual
    writer.discard()


def test_a_shard_written_in_the_background_is_complete_after_settling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller continues meanwhile; an error is raised before the next part."""
    may_go_on, full = threading.Event(), False

    def slow(*arguments: object, **options: object) -> None:
        assert may_go_on.wait(60)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(writer_module, "save_file", slow)
    writer = CheckpointWriter(tmp_path / "out", ["a", "b"], 0)
    writer.write("a", {"x": torch.arange(4.0)}, {"n": 1}, beside=True)
    assert not writer.file("a").exists()
    may_go_on.set()
    assert writer.recall("a") == {"n": 1}
    assert tensors_of(writer.file("a").parent)["x"].tolist() == [0, 1, 2, 3]
    full = True
    writer.write("b", {"y": torch.ones(2)}, beside=True)
    with pytest.raises(CopruneError, match="disk is full"):
        writer.settle()
    assert writer.recall("b") is None
    writer.discard()
