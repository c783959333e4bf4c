"""Statistics shared by a sweep's runs are gathered once and change no bit of the results."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from coprune.base.pool import do_job
from coprune.report.run_events import OfMatrix
from coprune.report.schema import Report
from coprune.run import context, kept_statistics
from coprune.steps import prune as steps_prune
from coprune.sweeps import job
from coprune.sweeps.expand import Run
from coprune.sweeps.file import SHARED_FOLDER, Sweep
from coprune.sweeps.finished import Ledger
from coprune.sweeps.job import RunJob
from support.pico_folder import save_pico
from support.pico_sweep import THREADS, alone, make_place, measured, pico_sweep
from support.sample import sampled
from support.walking import Propagation

SETTINGS: dict[str, Any] = {
    "pattern": ["unstructured", "2:4"],
    "batch_size": 2,
    "evaluate": False,
    "prompt": "",
    "save_model": "models",
}
# Calls of blocks for two batches and three blocks, which are idle while batches are recorded.
RECORDING, ONE_PASS, FIRST_BLOCK, NOT_LAST = 6, 6, 2, 4


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(make_place(tmp_path))
    monkeypatch.setattr(job, "_texts", {})
    return tmp_path


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of blocks during pruning, by run folder."""
    counted = Counter[str]()
    prune = steps_prune.prune_blocks

    def counting(run: context.Run, *others: Any) -> Any:
        def count(module: nn.Module, arguments: Any) -> None:
            counted[run.recipe.run_folder.as_posix()] += 1

        hooks = [block.module.register_forward_pre_hook(count) for block in run.model.blocks]
        try:
            return prune(run, *others)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(steps_prune, "prune_blocks", counting)
    return counted


def do_here(sweep: Sweep, runs: Sequence[Run]) -> dict[str, float]:
    """Execute runs in order in this process; return the seconds of gathering that each one saved."""
    ended = {run.name: do_job(RunJob(run, "run", sweep.folder, THREADS)) for run in runs}
    assert {one.cause for one in ended.values()} == {None}, ended
    return {name: one.value["statistics"] for name, one in ended.items()}


def assert_as_alone(run: Run, place: Path) -> None:
    known = place / "separate" / run.name / "report.json"
    separate = Report.read(known) if known.is_file() else alone(run, place / "separate")
    assert measured(Report.read(run.recipe.run_folder / "report.json")) == measured(separate)
    files = list(run.recipe.output.model.glob("*.safetensors"))
    assert files
    assert all(file.read_bytes() == (separate.saved_model / file.name).read_bytes() for file in files)


def kept(place: Path) -> list[Path]:
    return sorted((place / "out" / SHARED_FOLDER).glob("*.safetensors"))


@pytest.mark.parametrize("propagation", sampled(["dense", "block"], quick=["dense"]))
def test_every_method_has_the_numbers_of_separate_runs(
    propagation: Propagation, place: Path, forwards: Counter[str]
) -> None:
    sweep, runs = pico_sweep(method=["wanda", "sparsegpt", "magnitude"], propagation=propagation, **SETTINGS)
    saved = do_here(sweep, runs)
    times = {run.name: forwards[run.recipe.run_folder.as_posix()] for run in runs}
    for first, second in (("wanda/unstructured", "wanda/2-4"), ("sparsegpt/unstructured", "sparsegpt/2-4")):
        assert saved[first] == 0 < saved[second]
        if propagation == "dense":
            assert times[first] == RECORDING + ONE_PASS
            assert times[second] == 0
        else:
            # The first block only runs again with its pruned weights.
            assert times[first] == 2 * RECORDING + ONE_PASS + NOT_LAST
            assert times[second] == RECORDING + ONE_PASS + NOT_LAST - FIRST_BLOCK
    # One file per block and kind of statistic.
    assert len(kept(place)) == (9 if propagation == "dense" else 3)
    ledger = Ledger(wall=[1.0], saved={name: {"statistics": 1000 * seconds} for name, seconds in saved.items()})
    assert "s of gathering statistics" in ledger.line()
    for name in ("wanda/2-4", "sparsegpt/unstructured", "sparsegpt/2-4"):  # runs that reused or stored statistics
        assert_as_alone(next(run for run in runs if run.name == name), place)


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the first of two runs done, and the second one done separately."""
    folder = make_place(tmp_path_factory.mktemp("gathered"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sweep, runs = pico_sweep(method=["wanda"], propagation="dense", **SETTINGS)
        do_here(sweep, runs[:1])
        alone(runs[1], folder / "separate")
    return folder


@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "removed"])
def test_damaged_statistics_are_gathered_again(
    damage: str, gathered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: Counter[str]
) -> None:
    place = tmp_path / "place"
    shutil.copytree(gathered, place)
    monkeypatch.chdir(place)
    sweep, runs = pico_sweep(method=["wanda"], propagation="dense", **SETTINGS)
    file = kept(place)[1]
    before = content = file.read_bytes()
    if damage == "flipped bit":
        content = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    elif damage == "cut off":
        content = content[:-100]
    if damage == "removed":
        file.unlink()
    else:
        assert content != before
        file.write_bytes(content)
    saved = do_here(sweep, runs[1:])
    assert saved[runs[1].name] > 0, "the other files are good"
    assert 0 < forwards[runs[1].recipe.run_folder.as_posix()] <= RECORDING + ONE_PASS
    assert len(kept(place)) == 3
    assert_as_alone(runs[1], place)


def test_a_full_disk_stores_no_statistics(place: Path, forwards: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_statistics, "SPARE", 10**12)
    sweep, runs = pico_sweep(method=["sparsegpt"], propagation="dense", **SETTINGS)
    assert set(do_here(sweep, runs).values()) == {0}
    assert not kept(place)
    assert set(forwards.values()) == {RECORDING + ONE_PASS}


@pytest.mark.slow
def test_shared_statistics_cover_experts_with_few_tokens_and_the_head(place: Path, forwards: Counter[str]) -> None:
    """With few tokens, experts use their layer's average over all of them."""
    save_pico(place / "mixtral", "mixtral", tie_word_embeddings=False)
    settings = SETTINGS | {"nsamples": 2, "seqlen": 16, "batch_size": 1}
    sweep, runs = pico_sweep(
        model="mixtral", method=["sparsegpt"], propagation="dense", include=["*.layers.*", "lm_head"], **settings
    )
    saved = do_here(sweep, runs)
    assert saved[runs[1].name] > 0
    assert forwards[runs[1].recipe.run_folder.as_posix()] == 0
    assert_as_alone(runs[1], place)
    report = Report.read(runs[1].recipe.run_folder / "report.json")
    assert any(isinstance(one, OfMatrix) and one.event.kind == "few tokens" for one in report.events)
    assert report.matrices[-1].name == "lm_head"


def test_other_matrices_samples_or_batches_share_no_statistics(place: Path, forwards: Counter[str]) -> None:
    changes: list[dict[str, Any]] = [{}, {"seed": 1}, {"exclude": ["*.v_proj"]}, {"batch_size": 1}]
    for number, change in enumerate(changes):
        sweep, runs = pico_sweep(**{**SETTINGS, "pattern": "2:4", "propagation": "dense", "save_model": None, **change})
        run = runs[0]
        recipe = run.recipe.replaced(save=place / str(number))
        assert do_here(sweep, [type(run)(run.name, recipe)]) == {run.name: 0}, change
