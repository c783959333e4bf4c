"""The command stopped by SIGTERM at random moments: it only prints how to resume, and resumes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from coprune.commands import app
from coprune.commands.app import TERMINATED
from support.forking import forked
from support.pico_folder import save_pico, write_words


class Stopped:
    """A command, and its time if undisturbed."""

    def __init__(self, place: Path) -> None:
        self.place, self._said = place, place / "said.txt"
        save_pico(place / "model", num_hidden_layers=3)
        write_words(place / "words.txt")
        started = time.monotonic()
        assert self._run(None) == 0, self._said.read_text()
        self.seconds = time.monotonic() - started
        self._clear()

    def _run(self, stop_after: float | None) -> int:
        child = forked(self._command)
        if stop_after is not None:
            time.sleep(stop_after)
            os.kill(child, signal.SIGTERM)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _command(self) -> None:
        torch.set_num_threads(1)
        os.chdir(self.place)
        for descriptor in (1, 2):
            os.dup2(os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        words = "prune model --dataset words.txt --eval-data words.txt --eval-tokens 640 --seqlen 32 --nsamples 32 -m sparsegpt"
        sys.argv = ["coprune", *words.split(), "--save", "run", "--save-model", "made", "--quiet"]
        app.main()

    def _clear(self) -> None:
        for path in self.place.iterdir():
            if path.name not in ("model", "words.txt"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def stop(self, count: int, seed: int) -> tuple[dict[str, int], list[str]]:
        """Stop it `count` times, letting it finish each time; return counts of outcomes, and failures."""
        ends, wrong = Counter[str](), list[str]()
        for number in range(count):
            after = self.seconds * random.Random(f"{seed} stop {number}").random()
            code = self._run(after)
            ends[{0: "had ended", TERMINATED: "stopped", -signal.SIGTERM: "not begun"}.get(code, f"code {code}")] += 1
            said = self._said.read_text() if self._said.exists() else ""
            if code not in (0, TERMINATED, -signal.SIGTERM) or (code == TERMINATED and len(said.splitlines()) != 1):
                wrong.append(f"stopped after {after:.2f} s it ended with {code} and said {said[-1500:]}")
            if code != 0 and self._run(None) != 0:
                wrong.append(f"stopped after {after:.2f} s it did not go on: {self._said.read_text()[-1500:]}")
            if left := [path.name for path in self.place.iterdir() if path.name.startswith(".")]:
                wrong.append(f"stopped after {after:.2f} s it left {left}")
            self._clear()
        return dict(ends), wrong
