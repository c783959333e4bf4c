"""The memory bound against measured peaks of whole processes, including Python, torch and their libraries."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import write_llama
from synthetic import write_words as write_numbered_words

from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate
from support.measured_peaks import Peak, measured_peaks
from support.pico_folder import save_pico, write_words

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")

ABOVE, BELOW = 1.5, 0.97
"""Maximum and minimum of the bound over the measured peak; libraries' own memory varies between runs."""
WAYS: dict[str, dict[str, Any]] = {
    "in memory": {"stream": False, "method": "wanda"},
    "streamed": {"stream": True, "method": "wanda"},
    "reconstruction": {"stream": True, "method": "wanda", "reconstruct": 2},
    "removal": {"stream": False, "remove": "channels=0.25"},
    "mapped blocks": {"stream": True, "remove": "blocks=0.5"},
    "target size": {"stream": True, "remove": "size=0.2"},
}
QUICK = {"in memory"}, {"streamed"}
"""Runs of a model of some size and of a tiny one; the slow tests run all ways, also in bfloat16, which many
CPUs compute slowly."""


def runs_of(model: Path, name: str, page: bool, **settings: Any) -> dict[str, dict[str, Any]]:
    """Return all ways to prune a model, each with separate folders. page: whether to write one, which should not matter.

    Answers are not estimated: a streamed model has to be loaded for them, and they are skipped if it does not fit.
    """
    out = model.parent / f"{name} out"
    saved = {way: {"save_model": str(out / way / "model")} for way in WAYS}
    if page:
        saved = {way: folders | {"save": str(out / way / "run")} for way, folders in saved.items()}
    return {
        f"{name}, {way}": {"model": str(model), "gate": False, **settings, **more, **saved[way]}
        for way, more in WAYS.items()
    }


def only(ways: set[str], runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: run for name, run in runs.items() if name.rpartition(", ")[2] in ways}


def sized(folder: Path, dtype: torch.dtype, page: bool = False) -> dict[str, dict[str, Any]]:
    """Return runs of a model of some size."""
    name = str(dtype).removeprefix("torch.")
    write_llama(folder / name, 2, 1024, dtype, vocabulary=4096)
    words = str(write_numbered_words(folder / "words.txt", 20_000, vocabulary=4096))
    given = {"dataset": words, "nsamples": 4, "seqlen": 128, "eval_data": words, "eval_tokens": 256}
    return runs_of(folder / name, name, page, **given)


def sizeless(folder: Path, page: bool) -> dict[str, dict[str, Any]]:
    words = str(write_words(folder / "pico.txt"))
    given = {"dataset": words, "nsamples": 8, "seqlen": 64, "eval_data": words, "eval_tokens": 256}
    return runs_of(save_pico(folder / f"pico {page}"), f"pico, page {page}", page, **given)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Peak]:
    folder = tmp_path_factory.mktemp("peaks")
    some, none = QUICK
    return measured_peaks(only(some, sized(folder, torch.float32)) | only(none, sizeless(folder, page=True)))


def check(found: dict[str, Peak]) -> None:
    off = {way: peak for way, peak in found.items() if not BELOW < peak.estimated / peak.measured < ABOVE}
    assert not off, "; ".join(f"{way}: {peak}" for way, peak in off.items())


@pytest.mark.slow
def test_no_run_takes_more_than_its_bound(found: dict[str, Peak]) -> None:
    """For a model larger than the interpreter, and for a tiny one."""
    check(found)


@pytest.mark.slow
def test_measured_peaks_stay_within_the_bound(tmp_path: Path) -> None:
    sizes = sized(tmp_path, torch.float32) | sized(tmp_path, torch.bfloat16, page=True)
    check(measured_peaks(sizes | sizeless(tmp_path, page=True) | sizeless(tmp_path, page=False)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measured_peaks_of_smollm2_stay_within_the_bound(dtype: str, smollm2_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(locate("smollm2-135m"), dtype)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = {"dataset": "embedded", "nsamples": 4, "seqlen": 512, "eval_tokens": 2048}
    check(measured_peaks(runs_of(tmp_path / "model", "smollm2", page=True, **given)))
