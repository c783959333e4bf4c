"""A search over sparsities: the budget is kept, a run does what was tried, and one that was stopped goes on to the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import coprune
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.pruning import pruner
from coprune.pruning.allocation import LevelSearch, spread_named
from coprune.pruning.allocation.base import Unit
from coprune.pruning.allocation.search import ALLOCATION_FILE, as_levels, exchanges_of, targets_of
from coprune.recipe.pattern import NM, Target, Unstructured
from coprune.recipe.recipe import make_recipe
from coprune.report.schema import Report
from coprune.run.result import Result
from coprune.run.search import prepared, tries
from coprune.run.stages import run_recipe
from support.pico import pico_model
from support.pico_folder import listing, save_pico, write_words
from support.saved import tensors_of

IDS = torch.randint(60, (8, 32), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"dataset": IDS, "evaluate": False, "quiet": True}


def divergence(dense: Any, pruned: Any) -> float:
    with torch.no_grad():
        log_p, log_q = (model(IDS, use_cache=False).logits.log_softmax(dim=-1) for model in (dense, pruned))
    return float((log_p.exp() * (log_p - log_q)).sum() / IDS.numel())


def settings_of(home: Path, out: str, **changes: Any) -> dict[str, Any]:
    what = {"allocation": "search:rounds=7", "method": "magnitude", "pattern": "4:8", "nsamples": 4, "seqlen": 16}
    places = {"save": str(home / out / "run"), "save_model": str(home / out / "model")}
    data = {"model": str(home / "llama"), "dataset": str(home / "words.txt"), "evaluate": False}
    return what | places | data | changes


def run(home: Path, out: str, **changes: Any) -> Result:
    return run_recipe(make_recipe(settings_of(home, out, **changes)), reporter=Reporter(quiet=True))


def without_card(folder: Path) -> dict[str, Any]:
    found = listing(folder)
    assert found.pop("README.md") is not None  # names the folders
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_pico(tmp_path / "llama", num_hidden_layers=2)
    write_words(tmp_path / "words.txt")
    return tmp_path


@pytest.mark.parametrize(
    ("family", "settings", "levels"),
    [
        ("llama", {"sparsity": 0.6, "method": "sparsegpt", "propagation": "sequential"}, 5),
        ("mixtral", {"pattern": "2:4", "method": "wanda"}, 3),
        ("llama", {"pattern": "4:8", "method": "wanda", "include": ["*.q_proj", "*.down_proj", "lm_head"]}, 5),
        ("llama", {"sparsity": 0.5, "method": "magnitude", "remove": "channels=0.33", "align": 16}, 5),
    ],
)
def test_the_budget_is_kept_and_other_levels_than_the_overall_one_are_found(
    family: str, settings: dict[str, Any], levels: int
) -> None:
    report = coprune.prune(pico_model(family), allocation="search:rounds=8", **settings, **SETTINGS).report
    sparsities = {matrix.sparsity for matrix in report.matrices}
    target = Target(NM(1, 2), 0.5) if "pattern" in settings else Target(Unstructured(), settings["sparsity"])
    assert report.sparsity.matrices == pytest.approx(target.sparsity, abs=2e-3)
    assert len(sparsities) > 1
    assert levels in (3, 5)
    if levels == 3:
        assert sparsities <= {0.25, 0.5, 0.75}


def test_a_run_does_what_its_search_tried_and_the_file_does_so_again(home: Path) -> None:
    found = run(home, "found", dataset=str(home / "words.txt"))
    finds = json.loads((home / "found" / "run" / "search.json").read_text())
    assert len(finds["tried"]) == 7
    assert not (home / "found" / "run" / "levels").exists()
    again = run(home, "again", allocation=str(home / "found" / "run" / ALLOCATION_FILE))
    assert [m.sparsity for m in again.report.matrices] == [m.sparsity for m in found.report.matrices]
    for name, tensor in tensors_of(home / "found" / "model").items():
        assert torch.equal(tensor, tensors_of(home / "again" / "model")[name])


def test_outputs_count_at_every_level_and_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = pruner.prune_matrix, list[Tensor | None]()

    def seeing(matrix: Any, inputs: Any, solver: Any, target: Target, **named: Any) -> Any:
        seen.append(target.outputs)
        return original(matrix, inputs, solver, target, **named)

    monkeypatch.setattr(prepared, "prune_matrix", seeing)
    models: list[Any] = [pico_model("llama") for _ in range(2)]
    how: dict[str, Any] = {"method": "sparsegpt", "sparsity": 0.6}
    for model, told in zip(models, ["search:rounds=2", "search:rounds=2,outputs=0"], strict=True):
        report = coprune.prune(model, allocation=told, **how, **SETTINGS).report
        assert len(seen) == 5 * len(report.matrices)
        assert {own is None for own in seen} == {told.endswith("outputs=0")}
        seen.clear()
    kept = [(model.model.layers[0].mlp.gate_proj.weight != 0).sum(dim=1) for model in models]
    assert int(kept[0].max() - kept[0].min()) > int(kept[1].max() - kept[1].min())


def test_what_the_best_try_cost_is_what_the_pruned_model_is_away_from_the_dense_one(tmp_path: Path) -> None:
    def pruned(allocation: str) -> tuple[float, Report]:
        model = pico_model("llama")
        report = coprune.prune(
            model, "magnitude", allocation=allocation, pattern="4:8", save=tmp_path / allocation[:6], **SETTINGS
        ).report
        return divergence(pico_model("llama"), model), report

    (even, _), (found, report) = pruned("uniform"), pruned("search:rounds=30")
    tried = json.loads((tmp_path / "search" / "search.json").read_text())["tried"]
    assert found == pytest.approx(min(cost for _, cost in tried), rel=1e-4)
    assert tried[0][1] == pytest.approx(even, rel=1e-4)
    assert found < even
    assert report.sparsity.matrices == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("place", ["preparing", "trying"])
def test_a_search_that_was_stopped_leaves_the_model_dense_and_goes_on_to_the_same_bytes(
    place: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(home, "whole")
    module, name, after = (prepared, "prune_matrix", 40) if place == "preparing" else (tries, "next_tries", 3)
    original, calls = getattr(module, name), [0]

    def stopped(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, stopped)
        with pytest.raises(KeyboardInterrupt):
            run(home, "stopped")
    levels = list((home / "stopped" / "run" / "levels").glob("*.safetensors"))
    assert len(levels) == (8 if place == "preparing" else 14)
    counted, seen = pruner.prune_matrix, [0]

    def counting(*arguments: Any, **named: Any) -> Any:
        seen[0] += 1
        return counted(*arguments, **named)

    monkeypatch.setattr(prepared, "prune_matrix", counting)
    run(home, "stopped")
    assert seen[0] == (30 if place == "preparing" else 0)  # eight of fourteen matrices are taken over, at five levels
    assert without_card(home / "stopped" / "model") == without_card(home / "whole" / "model")
    finds = [json.loads((home / out / "run" / "search.json").read_text())["tried"] for out in ("whole", "stopped")]
    assert finds[0] == finds[1]


def test_a_damaged_file_of_tries_is_begun_anew(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tries, "next_tries", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(home, "damaged")
    file = home / "damaged" / "run" / "search.json"
    assert len(json.loads(file.read_text())["tried"]) == 2
    file.write_text("[1]")
    run(home, "damaged")
    assert len(json.loads(file.read_text())["tried"]) > 2


@pytest.mark.parametrize(("module", "name"), [(prepared, "prune_matrix"), (tries, "next_tries")])
def test_a_model_in_memory_is_dense_after_a_stop(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, original, calls = pico_model("llama"), getattr(module, name), [0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def stopped(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > 12:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(module, name, stopped)
    with pytest.raises(KeyboardInterrupt):
        coprune.prune(model, "sparsegpt", propagation="sequential", allocation="search:rounds=60", **SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def unit(number: int, rows: int) -> Unit:
    return Unit(f"blocks.{number // 3}.m{number % 3}", f"blocks.{number // 3}", rows, 64, (f"m{number}",))


def test_levels_near_what_is_wanted_keep_the_mean() -> None:
    units, target = [unit(at, rows) for at, rows in enumerate([8, 24, 64] * 4)], Target(Unstructured(), 0.6)
    grid = LevelSearch(rounds=1).targets(target)
    assert [one.sparsity for one in grid] == [0.4, 0.5, 0.6, 0.7, 0.8]
    wanted = [target.with_sparsity(0.4 + 0.04 * at) for at in range(12)]
    steps = as_levels(units, wanted, grid, target)
    assert sum(own.weights * at for own, at in zip(units, steps, strict=True)) == 3 * sum(u.weights for u in units)
    assert steps[0] < steps[-1]
    found = targets_of(units, steps, grid, target)
    mean = sum(u.weights * t.sparsity for u, t in zip(units, found, strict=True)) / sum(u.weights for u in units)
    assert mean == pytest.approx(0.6, abs=1e-4)
    for one, at in zip(found, steps, strict=True):
        assert one.sparsity == pytest.approx(grid[at - 1].sparsity, abs=1.5 / 64)
    assert [len(group) for group in exchanges_of(units, 5).groups] == [12, 4, 3]


@pytest.mark.parametrize(
    ("sparsity", "options", "found"),
    [
        (0.9, {}, [0.8, 0.85, 0.9, 0.95]),
        (0.1, {}, [0.0, 0.05, 0.1, 0.15, 0.2]),
        (0.7, {"levels": 3}, [0.6, 0.7, 0.8]),
        (0.7, {"step": 0.2}, [0.3, 0.5, 0.7, 0.9]),
    ],
)
def test_levels_fit_between_no_zeros_and_nothing_else(
    sparsity: float, options: dict[str, Any], found: list[float]
) -> None:
    search, target = LevelSearch(rounds=1, **options), Target(Unstructured(), sparsity)
    assert [one.sparsity for one in search.targets(target)] == found
    asked = [one.sparsity for one in search.by_slopes(target).grid(target)]
    assert asked[0] == pytest.approx(found[0])
    assert found[-1] <= asked[-1] + 1e-9 <= 1.0 + 2e-9


@pytest.mark.parametrize(
    ("pattern", "options", "found"),
    [
        (NM(2, 4), {}, ["3:4", "2:4", "1:4"]),
        (NM(8, 16), {}, ["12:16", "10:16", "8:16", "6:16", "4:16"]),
        (NM(8, 16), {"step": 0.05}, ["10:16", "9:16", "8:16", "7:16", "6:16"]),
        (NM(8, 16), {"step": 0.125, "levels": 3}, ["10:16", "8:16", "6:16"]),
        (NM(1, 4), {}, None),
        (NM(1, 2), {}, None),
    ],
)
def test_levels_of_groups_are_whole_numbers_of_them(
    pattern: NM, options: dict[str, Any], found: list[str] | None
) -> None:
    search, target = LevelSearch(rounds=1, **options), Target(pattern, pattern.sparsity)
    if found is None:
        with pytest.raises(BadInput, match="needs sparsities below and above"):
            search.targets(target)
        return
    assert [str(one.pattern) for one in search.targets(target)] == found


@pytest.mark.parametrize(
    ("allocation", "settings", "message"),
    [
        ("search", {}, "for some minutes or for some rounds"),
        ("search:rounds=2,levels=4", {}, "odd and at least 3"),
        ("search:rounds=2,step=0", {}, "must be a positive number"),
        ("search:rounds=2", {"sparsity": 0.0}, "needs sparsities below and above"),
        ("search:rounds=2,step=0.7", {}, "needs sparsities below and above"),
        ("search:rounds=2,levels=3", {"remove": "channels=0.33"}, "unknown option of allocation 'search'"),
        ("search:rounds=2,levels=4", {"remove": "channels=0.33", "sparsity": 0.5}, "odd and at least 3"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_starts(
    allocation: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        coprune.prune(pico_model("llama"), allocation=allocation, **settings, **SETTINGS)


def test_a_search_is_not_inspected_and_needs_the_model_in_memory() -> None:
    assert isinstance(spread_named("search:rounds=3"), LevelSearch)
    with pytest.raises(BadInput, match="only a run can search"):
        coprune.inspect(pico_model("llama"), allocation="search:rounds=3", quiet=True)
    with pytest.raises(BadInput, match="without what low_rank adds"):
        make_recipe({"model": "x", "allocation": "search:rounds=3", "low_rank": 4})
    with pytest.raises(BadInput, match="has to be in memory"):
        make_recipe({"model": "x", "allocation": "search:rounds=3", "stream": True})


def test_a_disk_without_room_is_said_before_anything_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(BadInput, match="GiB more in"):
        coprune.prune(pico_model("llama"), allocation="search:rounds=3", **SETTINGS)


def test_a_prepared_matrix_comes_back_as_it_was() -> None:
    stored = torch.randn(5, 16).to(torch.bfloat16)
    stored[stored.abs() < 0.5] = 0.0
    kept: dict[str, Tensor] = prepared._packed(3, stored)
    assert int(kept["kept 3"].numel()) == 10
    assert torch.equal(kept["values 3"], stored[stored != 0])
