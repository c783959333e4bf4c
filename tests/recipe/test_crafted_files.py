"""Malicious or unreadable recipes, sweeps and allocations give one message each."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.pruning.allocation.by_file import ByFile
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.stages.checks import prepare_solver
from coprune.sweeps.expand import expand
from coprune.sweeps.file import Sweep
from support.sample import crossed

READERS: dict[str, Callable[[Path], Any]] = {"recipe": Recipe.from_yaml, "sweep": Sweep.read, "allocation": ByFile.read}
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
TEXTS: dict[str, str | bytes] = {
    "aliases of aliases": LAUGHS,
    "merges of merges": MERGED,
    "one long text many times": f"a: &a {'x' * 50_000}\nb: [{', '.join(['*a'] * 500)}]\n",
    "a list that holds itself": "model: &a [*a]\n",
    "lists in lists": "model: " + "[" * 100_000,
    "lists in lists on a line": "model:\n " + "- " * 100_000,
    "another encoding": "model: Müller\n".encode("latin-1"),
    "UTF-16": "model: pico\n".encode("utf-16"),
    "a date that is none": "model: 2024-13-45\n",
    "a time that is none": "model: 2024-01-01 25:61:61\n",
    "a number of many digits": "model: " + "1" * 10_000,
    "an object": "model: !!python/object/apply:os.system ['true']\n",
    "a zero byte": "model: a\0b\n",
    "a megabyte": "model: pico\n" + "#" * 1_100_000,
}


@pytest.mark.parametrize(("what", "reader"), crossed([*TEXTS], [*READERS]))
def test_a_crafted_file_is_one_short_message(what: str, reader: str, tmp_path: Path) -> None:
    content = TEXTS[what]
    file = tmp_path / "file.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    tracemalloc.start()
    with pytest.raises(BadInput) as caught:
        READERS[reader](file)
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(file))
    assert "\n" not in str(caught.value)


def test_an_unreadable_recipe_is_one_message(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match="cannot be read"):
            Recipe.from_yaml(path)


def test_yaml_anchors_may_be_reused(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "model: pico\nsparsity: &two [0.5, 0.6]\nseed: [0, 1]\nsweep: {exclude: [{sparsity: *two, seed: 1}]}\n"
    )
    assert len(expand(Sweep.read(file))) == 2


PLAIN: dict[str, Any] = {"model": "pico", "save": "out/x"}


@pytest.mark.parametrize(
    "folders",
    ["{method:>1000000000}", "{method:{seed}}", "{method!r:>99999999}", "{seed:1000000000}", "{method!s}"],
)
def test_sweep_folders_may_only_use_settings(folders: str) -> None:
    with pytest.raises(BadInput, match="not a pattern of recipe fields"):
        expand(Sweep.make(PLAIN | {"seed": [0, 1], "sweep": {"folders": folders}}))


def test_a_sweep_with_too_many_runs_is_refused() -> None:
    many = list(range(60))
    axes = dict.fromkeys(("seed", "nsamples", "seqlen", "batch_size", "eval_tokens"), many)
    tracemalloc.start()
    with pytest.raises(BadInput, match="777,600,000 runs"):
        expand(Sweep.make(PLAIN | axes))
    with pytest.raises(BadInput, match="runs, and a sweep"):
        Sweep.make(
            PLAIN | {"method": {"name": "sparsegpt", "options": {"block_size": many, "damping": many, "x": many}}}
        )
    with pytest.raises(BadInput, match="runs, and a sweep"):
        expand(Sweep.make(PLAIN | {"sweep": {"include": [{"seed": many, "nsamples": many}] * 4}}))
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()


@pytest.mark.parametrize("value", ["[", "{", "!!", "&a", "*a", "2024-13-45", "'", '"', "nan", "1e999", "\ud800"])
def test_an_option_that_is_not_a_number_is_one_message(value: str) -> None:
    with pytest.raises(BadInput, match="rounds"):
        prepare_solver(make_recipe({"model": "pico", "refine": [f"refit:rounds={value}"]}))
