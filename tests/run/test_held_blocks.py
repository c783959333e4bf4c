"""Blocks that a window holds when a run is killed are found again, as they were; where they are damaged they are done again."""

from __future__ import annotations

from pathlib import Path

import pytest

from coprune.base.progress import Reporter
from coprune.recipe.recipe import make_recipe
from coprune.run.stages import run_recipe
from support.killing import killed_when
from support.pico_folder import listing, save_pico, write_words

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_pico(folder / "model", num_hidden_layers=5)
    write_words(folder / "words.txt")
    return folder


def run(place: Path, out: Path) -> None:
    words = str(place / "words.txt")
    settings = {"dataset": words, "nsamples": 6, "seqlen": 16, "batch_size": 2, "evaluate": False}
    trained = {"propagation": "sequential", "reconstruct": 3, "reconstruct_window": 2}
    folders = {"save": str(out / "run"), "save_model": str(out / "pruned")}
    recipe = make_recipe({"model": str(place / "model"), "method": "wanda", **settings, **trained, **folders})
    run_recipe(recipe, reporter=Reporter(quiet=True))


def checkpoint(out: Path) -> dict[str, bytes | None]:
    """The saved model's files; the card, which tells times, is left out."""
    return {name: content for name, content in listing(out / "pruned").items() if name != "README.md"}


@pytest.fixture(scope="module")
def expected(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | None]:
    """What a run leaves that nobody kills."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(place, out)
    return checkpoint(out)


@pytest.mark.parametrize("where", ["journal", "walk"])
@pytest.mark.parametrize(("block", "damaged"), [(0, False), (2, False), (2, True)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    block: int, damaged: bool, where: str, place: Path, expected: dict[str, bytes | None], tmp_path: Path
) -> None:
    """Killed as soon as a block's successor is kept: before the block itself is written, or when the walk has gone on."""
    held = tmp_path / ".pruned.partial" / f"held-{block:05d}.safetensors"
    assert killed_when(lambda: run(place, tmp_path), held.exists, (where,))
    if damaged:
        content = bytearray(held.read_bytes())
        content[-3] ^= 16
        held.write_bytes(content)
    run(place, tmp_path)
    assert checkpoint(tmp_path) == expected
    assert not list((tmp_path / "pruned").glob("held-*"))
