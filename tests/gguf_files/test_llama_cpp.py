"""The properties of llama.cpp on which measurements rely."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from coprune.gguf_files import llama_cpp
from coprune.gguf_files.llama_cpp import LlamaCpp
from support.commands import run_command
from support.pico import pico_model, pico_tokens
from support.pico_gguf import write_pico_gguf


def test_llama_cpp_reads_a_text_step_by_step_like_the_whole(tmp_path: Path) -> None:
    """Steps after a prompt give the same logits as the whole text."""
    pytest.importorskip("llama_cpp_py_sync")
    model, tokens = pico_model("llama"), pico_tokens(1, 12)[0].tolist()
    loaded = LlamaCpp(write_pico_gguf(model, tmp_path / "model.gguf"), context=32, threads=1)
    whole = loaded.logits(tokens)
    with torch.no_grad():
        torch.testing.assert_close(whole, model(torch.tensor([tokens])).logits[0], rtol=2e-2, atol=2e-2)
    loaded.forget()
    loaded.read(tokens[:10])
    loaded.read(tokens[10:11])
    loaded.read(tokens[11:], all_logits=True)
    torch.testing.assert_close(loaded.last_logits(1)[0], whole[-1], rtol=1e-2, atol=1e-2)


class Always(dict[str, Any]):
    """A callback that passes every tensor of a computation to one function."""

    def get(self, name: str, default: Any = None) -> Any:
        return default if name is None else self["every"]


def test_an_error_inside_a_llama_cpp_callback_is_raised_after_the_call(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp_py_sync")

    def interrupted(values: Any) -> None:
        raise KeyboardInterrupt

    file = write_pico_gguf(pico_model("llama"), tmp_path / "model.gguf")
    loaded = LlamaCpp(file, context=32, threads=1, see=Always(every=interrupted))
    with pytest.raises(KeyboardInterrupt):
        loaded.read([1, 2, 3])


@pytest.mark.parametrize("at", [1, 8, 30])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_export_stops_at_a_signal_while_llama_cpp_quantises(
    tmp_path: Path,
    at: int,
    sent: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("llama_cpp_py_sync")

    class Log(list[str]):
        """llama.cpp's log of the quantisation, which sends the signal at one of its lines."""

        def append(self, line: str) -> None:
            super().append(line)
            if len(self) == at:
                os.kill(os.getppid(), sent)
                time.sleep(60)  # as a call in which no handler runs

    monkeypatch.setattr(llama_cpp, "list", Log, raising=False)
    file = write_pico_gguf(pico_model("llama"), tmp_path / "model.gguf")
    words = ["export", file, tmp_path / "small.gguf", "--type", "q4_k_m", "--quiet"]
    started = time.monotonic()
    ended = run_command([str(word) for word in words], monkeypatch, capsys)
    assert time.monotonic() - started < 30
    assert ended.code == code
    assert ended.err == "coprune: stopped; nothing half-written was left under its final name.\n"
    assert [left.name for left in tmp_path.iterdir()] == ["model.gguf"]
