"""Runs killed at random moments or chosen system calls, or on a full disk, and restarted: the result is the same.

Everything runs in forks of one process that has imported everything, so that restarts are quick.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import coprune
from coprune.base.environment import kernel_cache
from coprune.base.files import write_text as write_text_file
from coprune.base.native.compilation import load_kernels
from coprune.base.progress import Reporter
from coprune.recipe.recipe import make_recipe
from coprune.recipe.views import training_recipe
from coprune.report.run_folder import REPORT_FILE as PRUNED
from coprune.runner.run_recipe import run_recipe
from coprune.training.finetune_report import REPORT_FILE as FINETUNED
from coprune.training.finetuning import run_finetuning
from support.disturbing import Work, in_child, left_in
from support.pico import pico_model
from support.pico_folder import save_pico, write_words
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.pruned import pruned_model, save, settings_for, write_text

QUIET = Reporter(quiet=True)
KNOWN = ("run", "cache", "made", "made.txt", "made.gguf", "made.jsonl")
"""Files that runs may leave in their folder."""


def make_place(place: Path) -> dict[str, Work]:
    """Fill a folder with models and texts; return the runs on them."""
    save_pico(place / "model", num_hidden_layers=3)
    write_words(place / "words.txt")
    write_words(place / "test.txt", 400, seed=1)
    save(pruned_model(num_hidden_layers=1), place / "pruned")
    write_text(place / "text.txt", 700)
    gguf = distinct_norms(pico_model("llama"))
    write_pico_gguf(gguf, place / "f32.gguf")
    model = str(place / "model")

    def prune(**settings: Any) -> Work:
        plain = {"model": model, "dataset": str(place / "words.txt"), "seqlen": 32, "nsamples": 6}
        plain |= {"eval_data": str(place / "words.txt"), "eval_tokens": 320, "device": "cpu", **settings}
        return lambda out: run_recipe(
            make_recipe({**plain, "save": out / "run", "save_model": out / "made"}), reporter=QUIET
        )

    def tune(out: Path, **changes: Any) -> object:
        made: dict[str, Any] = {"save_every": 1, "save_model": out / "made", **changes}
        settings = settings_for(out / "run", place / "pruned", place / "text.txt", **made)
        return run_finetuning(training_recipe(settings), QUIET)

    def measure(out: Path) -> None:
        found = coprune.evaluate(model, str(place / "test.txt"), seqlen=32, device="cpu", quiet=True)
        write_text_file(out / "made.txt", str(found.perplexity))

    def compare(out: Path) -> None:
        found = coprune.compare([model, place / "pruned"], str(place / "test.txt"), seqlen=32, device="cpu", quiet=True)
        write_text_file(out / "made.txt", found.to_markdown())

    def write(out: Path) -> object:
        return coprune.generate(model, out / "made.jsonl", place / "ask.jsonl", seqlen=8, device="cpu", quiet=True)

    (place / "ask.jsonl").write_text('{"prompt": "w5 w6"}\n{"prompt": "w7"}\n')
    return {
        "prune (wanda, streamed)": prune(method="wanda", stream=True),
        "prune (sparsegpt 2:4, sequential)": prune(method="sparsegpt", pattern="2:4", propagation="sequential"),
        "prune --remove": prune(remove="channels=0.34,blocks=0.34", align=32),
        "finetune (lora)": tune,
        "finetune (dense)": lambda out: tune(out, mode="dense"),
        "export": lambda out: coprune.export(place / "f32.gguf", out / "made.gguf", type="q8_0", quiet=True),
        "generate": write,
        "eval": measure,
        "compare": compare,
    }


def made_by(out: Path) -> dict[str, bytes]:
    """Return the files that a run made, without the cards, which have times."""
    found = [path for top in sorted(out.glob("made*")) for path in (top.rglob("*") if top.is_dir() else [top])]
    return {str(p.relative_to(out)): p.read_bytes() for p in found if p.is_file() and p.name != "README.md"}


def _is_finished(out: Path) -> bool:
    """Return whether a run is finished; with a run folder, the report is written last."""
    run = out / "run"
    reported = any((run / name).exists() for name in (PRUNED, FINETUNED))
    return any(out.glob("made*")) and (reported or not run.exists())


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


class Undisturbed:
    """The results of each undisturbed run, with its time and number of system calls."""

    def __init__(self, place: Path) -> None:
        self.place = place
        os.environ["COPRUNE_CACHE"] = str(kernel_cache())  # so that kernels are not compiled again
        load_kernels()
        self.works = make_place(place)
        self.expected: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        for name, work in self.works.items():
            out = place / "there"  # all runs use the same path, which some files contain
            out.mkdir()
            started = time.monotonic()
            assert in_child(work, out) == 0, name
            self.seconds[name] = time.monotonic() - started
            self.calls[name] = json.loads((place / "calls.json").read_text())
            self.expected[name] = made_by(out)
            assert self.expected[name], name
            assert not left_in(out, *KNOWN), (name, left_in(out, *KNOWN))
            shutil.rmtree(out)

    def disturbed(self, name: str, chance: random.Random, how: str) -> tuple[int, list[str]]:
        """Disturb a run once or twice, and let it finish; return how often it was disturbed, and failures.

        how: `kills`, `kills at calls`, or `filled disks`.
        """
        work, expected, out = self.works[name], self.expected[name], self.place / "there"
        out.mkdir()
        wrong, disturbed, wanted = [], 0, 1 if how == "filled disks" else chance.choice([1, 1, 2])
        latest, when = 1.0, ""
        while disturbed < wanted and not _is_finished(out):
            share = latest * chance.random()
            limits: dict[str, Any] = {"kill_after": share * self.seconds[name]}
            if how == "kills at calls":
                limits = {"kill_at": 1 + int(share * self.calls[name])}
            elif how == "filled disks":
                limits = {"largest": int(max(map(len, expected.values())) * max(0.01, share))}
            code = in_child(work, out, **limits)
            when += f" {limits}"
            disturbed += code != 0
            wrong += ["a traceback"] if code == 1 else []
            if code != 0 and any(out.glob("made*")) and made_by(out) != expected:
                wrong.append("half of it under its name")
            if code == 0 and disturbed == 0:
                # It finished too early: try again from the start, disturbing sooner.
                _empty(out)
                latest = 0.9 * latest
        if not _is_finished(out) and (code := in_child(work, out)) != 0:
            wrong.append(f"it could not be finished ({code})")
        if made_by(out) != expected:
            wrong.append("another result")
        wrong += [f"{left} was left" for left in left_in(out, *KNOWN)]
        shutil.rmtree(out)
        return disturbed, [f"{one} ({when.strip()})" for one in wrong]
