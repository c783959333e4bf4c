"""The output folder of a run or a training: one process writes it, and an unused claim leaves nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from coprune.base.errors import BadInput
from coprune.recipe.recipe import make_recipe
from coprune.recipe.views import training_recipe
from coprune.report import run_folder
from coprune.report.output_folder import OutputFolder
from coprune.training import resume
from support.forking import ended, forked, wait_for


def folders(place: Path) -> list[OutputFolder]:
    run = run_folder.output_of(make_recipe({"model": "pico", "save": place / "out"}))
    training = resume.output_of(training_recipe({"model": "pico", "save": place / "out"}))
    return [run, training]


@pytest.mark.parametrize("which", [0, 1], ids=["run", "training"])
def test_two_processes_do_not_write_one_folder(which: int, tmp_path: Path) -> None:
    folder = folders(tmp_path)[which]

    def hold() -> None:
        with folder.claimed():
            (tmp_path / "held").touch()
            time.sleep(60)

    other = forked(hold)
    wait_for(tmp_path / "held")
    for second in folders(tmp_path):
        with pytest.raises(BadInput, match="another run is writing"), second.claimed():
            pass
    os.kill(other, signal.SIGKILL)
    assert ended(other) == -signal.SIGKILL
    folder.prepare()  # leftovers of a killed process do not block it
    with folder.claimed():
        pass
    assert not [*folder.run.iterdir()]


def test_a_claim_leaves_no_empty_folder_behind(tmp_path: Path) -> None:
    folder = folders(tmp_path / "a/b")[0]
    with pytest.raises(ZeroDivisionError), folder.claimed():
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    with folder.claimed():
        (folder.run / "kept").touch()
    assert [path.name for path in folder.run.iterdir()] == ["kept"]
