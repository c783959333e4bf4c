"""External methods: registered by a call, or provided by an installed package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
from support.commands import Ended, run_command
from support.page_code import first_code
from support.pico_folder import save_pico, write_words
from support.plugin import install_package
from support.problems import TARGETS, correlated_layer


@dataclass(frozen=True)
class Largest:
    """Keep the largest weights of every row."""

    share: float = 1.0
    """An unused option."""

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
    assert any("--share" in line and "An unused option." in line for line in lines)
    with pytest.raises(BadInput, match="did you mean 'largest'"):
        method_named("largst")


def test_a_method_class_is_used_with_its_defaults() -> None:
    coprune.register_method("largest", Largest)
    assert method_named("largest") == Largest()


@dataclass
class Thawed:
    """A method that is not frozen."""


NoPrune = make_dataclass("NoPrune", [], frozen=True, namespace={"statistic": None})
NoStatistic = make_dataclass("NoStatistic", [], frozen=True, namespace={"prune": Largest.prune})
Shadowing = make_dataclass(
    "Shadowing", [("seed", int, 0)], frozen=True, namespace={"prune": Largest.prune, "statistic": None}
)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("wanda", Largest(), "there already is a method 'wanda'"),
        ("", Largest(), "'' is not a valid name"),
        ("../x", Largest(), "is not a valid name"),
        (3, Largest(), "3 is not a valid name"),
        ("largest", 3, "int is not a frozen dataclass"),
        ("largest", lambda weight: weight, "function is not a frozen dataclass"),
        ("largest", Thawed, "Thawed is not a frozen dataclass"),
        ("largest", NoPrune, "NoPrune has no function prune"),
        ("largest", NoStatistic, "NoStatistic.statistic must be"),
        ("largest", Shadowing, "option 'seed', which every recipe has"),
    ],
)
def test_non_methods_and_taken_names_are_refused(name: Any, method: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        coprune.register_method(name, method)
    assert list(all_methods()) == list(METHODS)


def test_a_name_cannot_be_registered_twice() -> None:
    coprune.register_method("largest", Largest())
    with pytest.raises(BadInput, match="already"):
        coprune.register_method("largest", Largest())


Runs = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runs:
    """Return a function that runs `coprune` with a package installed."""
    monkeypatch.chdir(tmp_path)

    def typed(*words: str, site: Path) -> Ended:
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(site))
            brought_methods.cache_clear()
            return run_command(list(words), patch, capsys)

    return typed


SMALL = ("--dataset", "words.txt", "--nsamples", "4", "--seqlen", "32", "--no-eval", "-p", "2:4", "-q")


def test_a_method_from_another_package_is_listed_and_prunes(
    run: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = {"lottery": "lottery:Lottery", "wanda": "lottery:Lottery"}
    site = install_package(tmp_path, "coprune-lottery", "lottery", first_code("adding-a-method.md"), entries)
    save_pico(tmp_path / "model", num_hidden_layers=2)
    write_words(tmp_path / "words.txt")
    listed = run("methods", site=site)
    assert listed.code == 0, listed.err
    assert "lottery: Prune at random; larger weights have better lots." in listed.out
    assert "from coprune-lottery" in listed.out
    assert "--luck" in listed.out
    assert "How much the size of a weight counts." in listed.out
    # A built-in name is not replaced, which is reported once.
    assert "wanda: Prune the weights with the smallest |W| · n" in listed.out
    (told,) = caplog.messages
    assert "coprune-lottery" in told
    assert "'wanda'" in told

    save = ("--save", "out", "--save-model", "pruned")
    pruned = run("prune", "model", "-m", "lottery", "--luck", "0.5", *SMALL, *save, site=site)
    assert pruned.code == 0, pruned.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["method"] == {"name": "lottery", "luck": 0.5}
    assert report["sparsity"]["matrices"] == 0.5
    assert (tmp_path / "pruned" / "model.safetensors").is_file()

    refused = run("prune", "model", "-m", "lottery", "--luck", "much", *SMALL, site=site)
    assert refused.code == 2
    assert "option 'luck' of method 'lottery' cannot be 'much'" in refused.err.splitlines()[-1]
    gone = run("prune", "model", "-m", "lottery", *SMALL, site=tmp_path / "nowhere")
    assert gone.code == 2
    assert "unknown method 'lottery'" in gone.err


def test_a_broken_package_only_stops_its_own_method(
    run: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = install_package(
        tmp_path,
        "coprune-broken",
        "broken_lots",
        "raise ImportError('no module named nothing\\nat all')",
        {"broken": "broken_lots:Lottery"},
    )
    save_pico(tmp_path / "model", num_hidden_layers=2)
    write_words(tmp_path / "words.txt")
    listed = run("methods", site=site)
    assert listed.code == 0
    assert "wanda:" in listed.out
    assert "broken" not in listed.out
    (said,) = caplog.messages
    for told in ("coprune-broken", "'broken'", "no module named nothing at all"):
        assert told in said
    used = run("prune", "model", "-m", "broken", *SMALL, site=site)
    assert used.code == 2
    assert len(used.err.splitlines()) == 1
    assert "the method 'broken' cannot be used: the package coprune-broken" in used.err
    other = run("prune", "model", "-m", "magnitude", *SMALL, "--save", "out", site=site)
    assert other.code == 0, other.err
    assert "coprune-broken" not in other.err
    assert caplog.messages == [said]
