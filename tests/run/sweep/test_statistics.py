"""Statistics that the runs of a sweep have in common are gathered once, and change nothing, to the last bit."""

from __future__ import annotations

from collections import Counter

import pytest

from coprune.report.schema import Report
from coprune.run import stages
from coprune.run.sweep import statistics_store, work
from coprune.run.sweep.events import Doing, Done
from coprune.run.sweep.ledger import Ledger
from coprune.run.sweep.sharing import SHARED_FOLDER
from coprune.run.sweep.work import Job, do_job
from support.pico_folder import save_pico
from support.pico_sweep import THREADS, alone, make_place, measured, pico_sweep

SETTINGS = {
    "pattern": ["unstructured", "2:4"],
    "batch_size": 2,
    "evaluate": False,
    "prompt": "",
    "save_model": "models",
}
# Calls of blocks: of two batches that cross three blocks, which are idle while they are recorded.
RECORDING, ONE_PASS, FIRST_BLOCK, NOT_LAST = 6, 6, 2, 4


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(make_place(tmp_path))
    monkeypatch.setattr(work, "_texts", {})
    return tmp_path


@pytest.fixture
def forwards(monkeypatch):
    """How often blocks were called while a run pruned, by the run's folder."""
    counted = Counter[str]()
    prune = stages.prune_blocks

    def counting(session, output):
        def count(module, arguments):
            counted[session.recipe.run_folder.as_posix()] += 1

        hooks = [block.module.register_forward_pre_hook(count) for block in session.blocks]
        try:
            return prune(session, output)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(stages, "prune_blocks", counting)
    return counted


def do_here(sweep, runs):
    """Do runs one after another in this process; the seconds of gathering that each took over."""
    events = []
    for run in runs:
        do_job(Job(run, "run", sweep.folder, THREADS), events.append)
    ended = {event.run: event for event in events if not isinstance(event, Doing)}
    assert {type(event) for event in ended.values()} == {Done}, ended
    return {name: event.saved["statistics"] for name, event in ended.items()}


def assert_as_alone(run, place):
    separate = alone(run, place / "separate")
    assert measured(Report.read(run.recipe.run_folder / "report.json")) == measured(separate)
    files = list(run.recipe.output.model.glob("*.safetensors"))
    assert files
    assert all(file.read_bytes() == (separate.saved_model / file.name).read_bytes() for file in files)


def kept(place):
    return sorted((place / "out" / SHARED_FOLDER).glob("*.safetensors"))


@pytest.mark.parametrize("propagation", ["dense", "block"])
def test_every_method_has_the_numbers_of_separate_runs(propagation, place, forwards):
    sweep, runs = pico_sweep(method=["wanda", "sparsegpt", "magnitude"], propagation=propagation, **SETTINGS)
    saved = do_here(sweep, runs)
    times = {run.name: forwards[run.recipe.run_folder.as_posix()] for run in runs}
    for first, second in (("wanda/unstructured", "wanda/2-4"), ("sparsegpt/unstructured", "sparsegpt/2-4")):
        assert saved[first] == 0 < saved[second]
        if propagation == "dense":
            assert times[first] == RECORDING + ONE_PASS
            assert times[second] == 0
        else:
            # The first block is only run again with its pruned weights.
            assert times[first] == 2 * RECORDING + ONE_PASS + NOT_LAST
            assert times[second] == RECORDING + ONE_PASS + NOT_LAST - FIRST_BLOCK
    # Of every kind of statistic one file per block.
    assert len(kept(place)) == (9 if propagation == "dense" else 3)
    ledger = Ledger(wall=[1.0], saved={name: {"statistics": 1000 * seconds} for name, seconds in saved.items()})
    assert "s of gathering statistics" in ledger.line()
    for run in runs:
        assert_as_alone(run, place)


@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "removed", "other header"])
def test_a_damaged_file_is_gathered_anew(damage, place, forwards):
    sweep, runs = pico_sweep(method=["wanda"], propagation="dense", **SETTINGS)
    do_here(sweep, runs[:1])
    file = kept(place)[1]
    before = content = file.read_bytes()
    if damage == "flipped bit":
        content = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    elif damage == "cut off":
        content = content[:-100]
    elif damage == "other header":
        content = content.replace(b'\\"tokens\\": 128', b'\\"tokens\\": 127')
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


def test_a_disk_without_room_keeps_nothing(place, forwards, monkeypatch):
    monkeypatch.setattr(statistics_store, "SPARE", 10**12)
    sweep, runs = pico_sweep(method=["sparsegpt"], propagation="dense", **SETTINGS)
    assert set(do_here(sweep, runs).values()) == {0}
    assert not kept(place)
    assert set(forwards.values()) == {RECORDING + ONE_PASS}


def test_experts_and_the_head(place, forwards):
    """So few tokens that experts lean on their layer's average, which comes of all of them."""
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
    assert any(event for event in report.events if "layer's average" in event)
    assert report.matrices[-1].name == "lm_head"


def test_other_matrices_samples_or_batches_are_gathered_for_themselves(place, forwards):
    for number, change in enumerate(({}, {"seed": 1}, {"exclude": ["*.v_proj"]}, {"batch_size": 1})):
        sweep, runs = pico_sweep(**{**SETTINGS, "pattern": "2:4", "propagation": "dense", "save_model": None, **change})
        run = runs[0]
        recipe = run.recipe.replaced(save=place / str(number))
        assert do_here(sweep, [type(run)(run.name, recipe)]) == {run.name: 0}, change
