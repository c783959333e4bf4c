"""Methods from outside the package: registered by a call, or brought by an installed package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import Tensor

import coprune
from coprune.base.errors import BadInput
from coprune.commands.methods import describe_methods
from coprune.pruning import methods
from coprune.pruning.methods import METHODS, Pruned, Target, all_methods, apply_keep, method_named
from coprune.pruning.methods.entry_points import brought_methods
from support.page_code import first_code
from support.pico_folder import save_pico, write_words
from support.plugin import install_package
from support.problems import TARGETS, correlated_layer


@dataclass(frozen=True)
class Largest:
    """Keep the largest weights of every row."""

    share: float = 1.0
    """Nothing in particular."""

    statistic: ClassVar[None] = None

    def prune(self, weight: Tensor, statistic: None, target: Target) -> Pruned:
        keep = target.keep(weight.abs() * self.share, "row")
        return Pruned(apply_keep(weight, keep), keep)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(methods, "_registered", {})
    brought_methods.cache_clear()
    yield
    brought_methods.cache_clear()


def test_a_registered_method_is_looked_up_like_any_other() -> None:
    coprune.register_method("largest", Largest(0.5))
    assert method_named("largest") == Largest(0.5)
    assert method_named("largest", {"share": 2.0}) == Largest(2.0)
    assert list(all_methods()) == [*METHODS, "largest"]
    weight, _, _ = correlated_layer()
    assert method_named("largest").prune(weight, None, TARGETS[0]).keep.any()
    lines = describe_methods("largest")
    assert lines[0].startswith("largest: Keep the largest weights of every row.")
    assert __name__ in lines[0]
    assert any("--share" in line and "Nothing in particular." in line for line in lines)
    with pytest.raises(BadInput, match="did you mean 'largest'"):
        method_named("largst")


def test_a_class_is_taken_with_its_defaults() -> None:
    coprune.register_method("largest", Largest)
    assert method_named("largest") == Largest()


@dataclass
class Thawed:
    """Not frozen."""


NoPrune = make_dataclass("NoPrune", [], frozen=True, namespace={"statistic": None})
NoStatistic = make_dataclass("NoStatistic", [], frozen=True, namespace={"prune": Largest.prune})
Shadowing = make_dataclass(
    "Shadowing", [("seed", int, 0)], frozen=True, namespace={"prune": Largest.prune, "statistic": None}
)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("wanda", Largest(), "there is a method 'wanda' already"),
        ("", Largest(), "cannot be called ''"),
        ("../x", Largest(), "cannot be called"),
        (3, Largest(), "cannot be called 3"),
        ("largest", 3, "int is not a frozen dataclass"),
        ("largest", lambda weight: weight, "function is not a frozen dataclass"),
        ("largest", Thawed, "Thawed is not a frozen dataclass"),
        ("largest", NoPrune, "NoPrune has no function prune"),
        ("largest", NoStatistic, "NoStatistic.statistic has to be"),
        ("largest", Shadowing, "option 'seed', which every recipe has"),
    ],
)
def test_what_is_no_method_or_has_a_taken_name_is_refused(name: Any, method: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        coprune.register_method(name, method)
    assert list(all_methods()) == list(METHODS)


def test_a_name_is_registered_once() -> None:
    coprune.register_method("largest", Largest())
    with pytest.raises(BadInput, match="already"):
        coprune.register_method("largest", Largest())


def run(place: Path, *arguments: str, site: list[Path]) -> subprocess.CompletedProcess[str]:
    """`python -m coprune` with packages on its path."""
    path = os.pathsep.join([*map(str, site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "coprune", *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


SMALL = ("--dataset", "words.txt", "--nsamples", "4", "--seqlen", "32", "--no-eval", "-p", "2:4", "-q")


def test_a_method_in_a_package_of_its_own_is_listed_and_prunes(tmp_path: Path) -> None:
    entries = {"lottery": "lottery:Lottery", "wanda": "lottery:Lottery"}
    site = install_package(tmp_path, "coprune-lottery", "lottery", first_code("adding-a-method.md"), entries)
    save_pico(tmp_path / "model", num_hidden_layers=2)
    write_words(tmp_path / "words.txt")
    listed = run(tmp_path, "methods", site=[site])
    assert listed.returncode == 0, listed.stderr
    assert "lottery: Prune at random; larger weights have better lots." in listed.stdout
    assert "from coprune-lottery" in listed.stdout
    assert "--luck" in listed.stdout
    assert "How much the size of a weight counts." in listed.stdout
    # Our own name stays ours, and that is told once.
    assert "wanda: Prune the weights with the smallest |W| · n" in listed.stdout
    assert [line for line in listed.stderr.splitlines() if "coprune-lottery" in line and "'wanda'" in line] == (
        listed.stderr.splitlines()
    )

    save = ("--save", "out", "--save-model", "pruned")
    pruned = run(tmp_path, "prune", "model", "-m", "lottery", "--luck", "0.5", *SMALL, *save, site=[site])
    assert pruned.returncode == 0, pruned.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["prune"]["method"] == {"name": "lottery", "luck": 0.5}
    assert report["sparsity"]["matrices"] == 0.5
    assert (tmp_path / "pruned" / "model.safetensors").is_file()

    refused = run(tmp_path, "prune", "model", "-m", "lottery", "--luck", "much", *SMALL, site=[site])
    assert refused.returncode == 2
    assert "option 'luck' of method 'lottery' cannot be 'much'" in refused.stderr.splitlines()[-1]
    gone = run(tmp_path, "prune", "model", "-m", "lottery", *SMALL, site=[])
    assert gone.returncode == 2
    assert "unknown method 'lottery'" in gone.stderr


@pytest.mark.slow
def test_a_package_that_is_broken_stops_only_its_own_method(tmp_path: Path) -> None:
    site = install_package(
        tmp_path,
        "coprune-broken",
        "broken_lots",
        "raise ImportError('no module named nothing\\nat all')",
        {"broken": "broken_lots:Lottery"},
    )
    save_pico(tmp_path / "model", num_hidden_layers=2)
    write_words(tmp_path / "words.txt")
    listed = run(tmp_path, "methods", site=[site])
    assert listed.returncode == 0
    assert "wanda:" in listed.stdout
    assert "broken" not in listed.stdout
    assert len(listed.stderr.splitlines()) == 1
    for told in ("coprune-broken", "'broken'", "no module named nothing at all"):
        assert told in listed.stderr
    used = run(tmp_path, "prune", "model", "-m", "broken", *SMALL, site=[site])
    assert used.returncode == 2
    assert len(used.stderr.splitlines()) == 1
    assert "the method 'broken' cannot be used: the package coprune-broken" in used.stderr
    other = run(tmp_path, "prune", "model", "-m", "magnitude", *SMALL, "--save", "out", site=[site])
    assert other.returncode == 0, other.stderr
    assert "coprune-broken" not in other.stderr
