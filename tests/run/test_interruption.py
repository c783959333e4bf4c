"""Ctrl-C, kills and full disks with the whole command: nothing half-written has its final name, and a rerun completes."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from coprune.commands.app import main
from support.commands import run_command
from support.forking import forked
from support.pico_folder import save_pico, write_words

pytestmark = pytest.mark.usefixtures("one_thread")

# Many samples, so that the walk takes seconds and the signal arrives during it.
OPTIONS = ["--seqlen", "64", "--nsamples", "200", "--batch-size", "4", "-m", "sparsegpt", "--eval-data", "test.txt"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_pico(tmp_path / "model", num_hidden_layers=4)
    write_words(tmp_path / "words.txt")
    write_words(tmp_path / "test.txt", count=200, seed=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*more: Any) -> list[str]:
    return ["prune", "model", "--dataset", "words.txt", "--save", "run", "--save-model", "pruned", "--quiet", *more]


def interrupt(place: Path, sent: signal.Signals) -> tuple[int, str]:
    """Start the command in a fork and signal it after its first finished block; return exit code and standard error."""
    errors = place / "stderr"

    def work() -> None:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
        sys.argv = ["coprune", *command(*OPTIONS)]
        main()

    child = forked(work)
    try:
        deadline = time.monotonic() + 120
        while not list(place.glob(".pruned.partial/model-*.json")):
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(child, sent)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, errors.read_text()


# test_resume shows for kills at any moment, without starting a command, that they are survived.
@pytest.mark.parametrize(
    "sent",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_command_leaves_nothing_half_written_and_resumes(
    sent: signal.Signals, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = interrupt(place, sent)
    assert code == (-signal.SIGKILL if sent == signal.SIGKILL else 128 + sent)
    if sent != signal.SIGKILL:
        said = "coprune: stopped; nothing half-written was left under its final name. To resume, type: coprune "
        assert err.splitlines() == [said + shlex.join(command(*OPTIONS))]
    assert not (place / "pruned").exists()
    assert not (place / "run" / "report.json").exists()
    for part in place.glob(".pruned.partial/*.safetensors"):
        load_file(part)  # readable, since it has its final name
    ended = run_command(command(*OPTIONS), monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert (place / "run" / "report.json").is_file()
    assert (place / "pruned" / "model.safetensors").is_file()
    assert not list(place.glob(".pruned*"))


@pytest.mark.slow
def test_the_times_of_a_resumed_run_add_up_with_earlier_ones_separate(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Wide enough that choosing weights takes tenths of a second.
    save_pico(place / "model", num_hidden_layers=3, hidden_size=384, intermediate_size=1024)
    interrupt(place, signal.SIGKILL)
    began = time.monotonic()
    ended = run_command(command(*OPTIONS), monkeypatch, capsys)
    wall = time.monotonic() - began
    assert ended.code == 0, ended.err
    (line,) = (line.partition(" ")[2].strip() for line in ended.out.splitlines() if line.startswith("time "))
    here, _, before = line.partition("; before, until it was stopped: ")
    total, _, parts = here.partition(" s: ")
    seconds = [float(found) for found in re.findall(r"([\d.]+) s ", parts)]
    assert sum(seconds) == pytest.approx(float(total), abs=0.11)
    assert wall - 2 < float(total) < wall + 0.1
    chosen = {name: float(found) for found, name in re.findall(r"([\d.]+) s to (choose weights)", before)}
    report = json.loads((place / "run" / "report.json").read_text())
    of_all = sum(matrix["seconds"] for matrix in report["matrices"])
    now = sum(float(found) for found in re.findall(r"([\d.]+) s to choose weights", parts))
    assert chosen["choose weights"] + now == pytest.approx(of_all, abs=0.16)
    assert chosen["choose weights"] > 0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_walk_stops_the_run_without_a_model(
    sent: signal.Signals, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any, **settings: Any) -> None:
        signal.raise_signal(sent)

    monkeypatch.setattr("coprune.evaluation.tasks.text_task.draw_samples", stop)
    ended = run_command(command("--nsamples", "4", "--seqlen", "32"), monkeypatch, capsys)
    assert ended.code == 128 + sent
    assert "stopped; nothing half-written was left under its final name. To resume, type: coprune prune" in ended.err
    assert sorted(path.name for path in place.iterdir()) == ["model", "test.txt", "words.txt"]


def test_a_full_disk_while_copying_the_tokenizer_is_one_message(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    quick = command("--nsamples", "4", "--seqlen", "32", "--no-eval", "-m", "magnitude")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        ended = run_command(quick, monkeypatch, capsys)
        assert ended.code == 2
        assert len(ended.err.splitlines()) == 1
        assert "No space left on device" in ended.err
        assert not (place / "pruned").exists()
    assert run_command(quick, monkeypatch, capsys).code == 0


def test_too_little_disk_space_is_refused_before_computing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    ended = run_command(command("--nsamples", "4", "--seqlen", "32"), monkeypatch, capsys)
    assert ended.code == 2
    assert "1,000 free" in ended.err
    assert not (place / "pruned").exists()


def test_an_announced_run_whose_model_is_missing_is_not_finished(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's folder existed, empty, when the run was killed between announcing and renaming."""

    class Killed(BaseException):
        """Stands for SIGKILL: nothing in coprune catches it."""

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    (place / "pruned").mkdir()
    quick = command("--nsamples", "4", "--seqlen", "32", "--no-eval", "-m", "magnitude")
    with monkeypatch.context() as patch:
        patch.setattr("coprune.stages.run_stages._save", killed)
        with pytest.raises(Killed):
            run_command(quick, monkeypatch, capsys)
    assert (place / "run" / ".report.json").is_file()
    assert run_command(quick, monkeypatch, capsys).code == 0
    assert (place / "run" / "report.json").is_file()
    assert (place / "pruned" / "model.safetensors").is_file()


def test_a_complete_run_killed_before_its_rename_is_finished_and_pushed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Killed(BaseException):
        """Stands for SIGKILL: nothing in coprune catches it."""

    def killed(*_: Any) -> None:
        raise Killed

    pushed: list[str] = []

    def push(folder: Path, name: str, private: bool) -> str:
        pushed.append(name)
        return name

    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.setattr("coprune.runner.run_recipe.push", push)
    quick = command("--nsamples", "4", "--seqlen", "32", "--no-eval", "-m", "magnitude", "--push-to-hub", "me/half")
    with monkeypatch.context() as patch:
        patch.setattr("coprune.run.context.finish_run_folder", killed)
        with pytest.raises(Killed):
            run_command(quick, monkeypatch, capsys)
    assert (place / "pruned" / "model.safetensors").is_file()
    assert not pushed
    with monkeypatch.context() as patch:
        patch.setattr("coprune.stages.run_stages.open_run", killed)  # nothing may be repeated
        assert run_command([*quick, "--log-json", "log.jsonl"], monkeypatch, capsys).code == 0
    assert (place / "run" / "report.json").is_file()
    assert pushed == ["me/half"]
