"""Tables on a terminal, which may contain foreign text."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coprune.base.progress import Reporter
from coprune.base.words import Sheet, printable
from coprune.commands.terminal import print_sheet
from support.commands import run_command
from support.pico_folder import save_pico, write_words


def test_names_that_look_like_markup_are_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["out/[final]", "a[/b]", "[bold]c", "[link=x]d[/link]"]
    print_sheet(Sheet("", [[name, name] for name in names], ["model", "[red]size"]))
    shown = capsys.readouterr().out
    assert all(shown.count(name) == 2 for name in names), shown
    assert "[red]size" in shown


def test_foreign_text_cannot_control_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "x\x1b]0;title\x07\x9b31m"}))
    ended = run_command(["inspect", "model"], monkeypatch, capsys)
    assert ended.code == 2
    assert "x\\x1b]0;title\\x07\\x9b31m" in ended.err
    print_sheet(Sheet("", [["a\x1b[31m", "b\tc"]], ["model", "size"]))
    Reporter().say("Loading \x1b[31m")
    shown = capsys.readouterr()
    assert "a\\x1b[31m" in shown.out
    assert shown.err == "Loading \\x1b[31m\n"
    assert printable("one\ntwo\tthree \u2028 ä€😀") == "one\ntwo\tthree \u2028 ä€😀"


def test_figures_are_saved_before_they_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pico(Path("model"), num_hidden_layers=1)
    write_words(Path("words.txt"))

    for line, kept in (
        ("eval model --json eval.json", "eval.json"),
        ("compare model model --csv both.csv", "both.csv"),
    ):
        asked = [*line.split(), "--data", "words.txt", "--seqlen", "32", "--eval-tokens", "64", "--quiet"]
        with suppress(OSError), open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            ended = run_command(asked, patch, capsys)
        assert (ended.code, ended.err.count("No space left on device")) == (2, 1), ended.err
        assert Path(kept).is_file()
