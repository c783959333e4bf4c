"""The README's commands in order, with the real model and outside the checkout, and the page they make."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coprune.base.data_packages import CARRIERS
from coprune.report.schema import Report

pytestmark = [
    pytest.mark.timeout(1800),  # its commands take minutes on one core
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, CARRIERS)), reason="the demo's packages are not installed"
    ),
]

Works = Callable[[str], str]
SMALL = "--dataset embedded --seqlen 128 --nsamples 4 --eval-tokens 1024"


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Works:
    """Return a function that types a line in an initially empty folder, which has to succeed, and returns its output."""
    place = tmp_path_factory.mktemp("hour")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COPRUNE")}
    environment |= {"XDG_CACHE_HOME": str(place / "cache"), "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}

    def typed(line: str) -> str:
        name, *arguments = shlex.split(line)
        command = [sys.executable, "-m", name, *arguments]
        ended = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
        assert "Traceback" not in ended.stderr
        return ended.stdout

    typed.place = place  # type: ignore[attr-defined]
    return typed


@pytest.fixture(scope="module")
def place(works: Works) -> Path:
    found: Path = works.place  # type: ignore[attr-defined]
    return found


def test_an_ordinary_checkpoint_is_pruned_and_generates_text(works: Works, place: Path) -> None:
    # An ordinary folder: magnitude pruning at 0 % writes the model unchanged.
    works(
        f"coprune prune smollm2-135m -m magnitude -s 0 {SMALL} --no-eval --no-gate --save out/as-is --save-model dense"
    )
    said = works(f"coprune prune dense -p 2:4 {SMALL} --save out/run --save-model out/pruned")
    report = Report.read(place / "out/run/report.json")
    assert report.answers is not None
    assert report.answers.greedy.dense is not None
    assert f"answers   {report.answers.verdict()}" in said
    verdict, following = said.splitlines()[-2:]
    assert verdict.startswith("verdict   it writes ")
    assert following.startswith("next      ")
    assert [phase.name for phase in report.phases][-1] == "save, reload and compare"
    page = (place / "out/run/report.html").read_text(encoding="utf-8")
    assert "dense, greedy" in page
    assert "fine-tuned, greedy" in page
    assert page.count('class="asked"') == len(report.answers.samples)
    card = (place / "out/pruned/README.md").read_text(encoding="utf-8")
    assert report.answers.verdict() in card
    assert "timm" not in card
    recipe = card.split("```yaml\n")[1].split("```")[0]
    assert len(recipe.splitlines()) < 35  # the default preset's settings, without other defaults
    (place / "card.yaml").write_text(recipe, encoding="utf-8")
    works("coprune estimate --recipe card.yaml")


def test_a_saved_model_can_be_measured_stored_and_exported(works: Works, place: Path) -> None:
    assert "perplexity" in works("coprune eval out/pruned --data embedded --seqlen 128 --eval-tokens 1024")
    assert "KL" in works("coprune compare dense out/run --data embedded --seqlen 128 --eval-tokens 1024")
    works(
        f"coprune prune smollm2-135m --remove channels=0.33 {SMALL} --no-eval --no-gate --save out/less --save-model out/smaller"
    )
    works("coprune export out/smaller smaller.gguf --type q8_0")
    assert (place / "smaller.gguf").stat().st_size < 120e6
    load = "from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('out/pruned').num_parameters())"
    ended = subprocess.run([sys.executable, "-c", load], cwd=place, capture_output=True, text=True, check=True)
    assert int(ended.stdout) == 134_515_008


def test_figures_are_machine_readable(works: Works) -> None:
    found = json.loads(works("coprune estimate dense -p 2:4 --dataset embedded --nsamples 4 --seqlen 128 -q --json"))
    assert found["peak_bytes"] > 0


def test_the_first_command_shows_what_pruning_does(works: Works) -> None:
    said = works("coprune demo --nsamples 1")
    assert "dense:  The city of Paris is" in said
    assert "pruned: The city of Paris is" in said
