"""Runs killed at random moments, or on a disk that is full at a random byte, and begun again: the result is the same.

Everything runs in children of one process that has imported all there is to import, so that a kill costs no start.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coprune.base.errors import CopruneError
from coprune.base.progress import Reporter
from coprune.packed.folder import pack, unpack
from coprune.recipe.recipe import make_recipe
from coprune.report.folder import REPORT_FILE as PRUNED
from coprune.run.stages import run_recipe
from coprune.training.report import REPORT_FILE as FINETUNED
from coprune.training.run import run_finetuning
from coprune.training.settings import make_settings
from support.forking import forked
from support.pico_folder import save_pico, write_words
from support.pruned import pruned_model, save, settings_for, write_text

QUIET = Reporter(quiet=True)
Work = Callable[[Path], object]
"""What a run does, from the folder that it writes into."""
_SLOW = 300  # seconds after which a child is taken to hang


def make_place(place: Path) -> dict[str, Work]:
    """Models and texts in a folder, and what is done with them."""
    save_pico(place / "model", num_hidden_layers=3)
    write_words(place / "words.txt")
    save(pruned_model(num_hidden_layers=1), place / "pruned")
    write_text(place / "text.txt", 700)

    def prune(**settings: Any) -> Work:
        plain = {"model": str(place / "model"), "dataset": str(place / "words.txt"), "seqlen": 32, "nsamples": 6}
        plain |= {"eval_data": str(place / "words.txt"), "eval_tokens": 320, "device": "cpu", **settings}
        return lambda out: run_recipe(
            make_recipe({**plain, "save": out / "run", "save_model": out / "made"}), reporter=QUIET
        )

    def tune(out: Path, **changes: Any) -> object:
        made: dict[str, Any] = {"save_every": 1, "save_model": out / "made", **changes}
        settings = settings_for(out / "run", place / "pruned", place / "text.txt", **made)
        return run_finetuning(make_settings(settings), QUIET)

    pack(place / "pruned", place / "packed")
    return {
        "prune (wanda, streamed)": prune(method="wanda", stream=True),
        "prune (sparsegpt 2:4, sequential)": prune(method="sparsegpt", pattern="2:4", propagation="sequential"),
        "prune to a packed folder": prune(method="wanda", encoding="packed", stream=True),
        "pack": lambda out: pack(place / "pruned", out / "made"),
        "unpack": lambda out: unpack(place / "packed", out / "made"),
        "finetune (lora)": tune,
        "finetune (dense)": lambda out: tune(out, mode="dense"),
    }


def made_by(out: Path) -> dict[str, bytes]:
    """The files of the model that a run made; without the cards, which tell how long it took."""
    made = out / "made"
    return {p.name: p.read_bytes() for p in sorted(made.glob("*")) if p.is_file() and p.name != "README.md"}


def _is_finished(out: Path) -> bool:
    """Whether a run has done all: with a run folder, its report is the last thing that it writes."""
    run = out / "run"
    reported = any((run / name).exists() for name in (PRUNED, FINETUNED))
    return (out / "made").exists() and (reported or not run.exists())


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def in_child(work: Callable[[], object], kill_after: float | None = None, largest: int | None = None) -> int:
    """Do some work in a child; its exit code, negative if it was killed.

    kill_after: seconds after which it is killed; largest: bytes that no file may exceed, as on a full disk. A known
    error is 3, any other 1.
    """
    child = forked(lambda: _work(work, largest))
    started = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if passed > (kill_after if kill_after is not None else _SLOW):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)


def _work(work: Callable[[], object], largest: int | None) -> None:
    torch.set_num_threads(1)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        work()
    except CopruneError:
        sys.exit(3)


class Undisturbed:
    """What each run makes when it is left in peace, and how long it takes."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.works = make_place(place)
        self.expected: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        for name, work in self.works.items():
            out = place / "undisturbed"
            out.mkdir()
            started = time.monotonic()
            assert in_child(lambda work=work, out=out: work(out)) == 0, name  # type: ignore[misc]
            self.seconds[name] = time.monotonic() - started
            self.expected[name] = made_by(out)
            shutil.rmtree(out)

    def disturbed(self, name: str, chance: random.Random, full_disk: bool) -> tuple[int, list[str]]:
        """Disturb a run once or twice, and let it end; how often it was disturbed, and what was wrong then."""
        work, expected, out = self.works[name], self.expected[name], self.place / "disturbed"
        out.mkdir()
        wrong, disturbed, wanted = [], 0, 1 if full_disk else chance.choice([1, 1, 2])
        latest = self.seconds[name]
        while disturbed < wanted and not _is_finished(out):
            size = max(map(len, expected.values()))
            kill_after = None if full_disk else chance.uniform(0, latest)
            largest = int(size * chance.uniform(0.01, 1)) if full_disk else None
            code = in_child(lambda: work(out), kill_after, largest)
            disturbed += code not in (0, 1)
            wrong += ["a traceback"] if code == 1 else []
            if code != 0 and (out / "made").exists() and made_by(out) != expected:
                wrong.append("half a model under its name")
            if code == 0 and disturbed == 0:
                # It was through before: once more from the start, and sooner.
                _empty(out)
                latest = 0.9 * latest
        if not _is_finished(out) and in_child(lambda: work(out)) != 0:
            wrong.append("it could not be finished")
        if made_by(out) != expected:
            wrong.append("another result")
        left = [path.name for path in out.iterdir() if path.name not in ("made", "run")]
        wrong += [f"{left} was left"] if left else []
        shutil.rmtree(out)
        return disturbed, wrong
