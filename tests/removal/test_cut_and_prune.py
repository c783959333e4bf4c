"""Removal and pruning in one run give the same result as two runs, in one folder with one report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import coprune
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.model.edits import history_of
from coprune.recipe.recipe import make_recipe
from coprune.report.schema import Report
from coprune.runner.run_recipe import run_recipe
from coprune.stages.checks import prepare_solver
from support.pico import pico_model
from support.pico_folder import save_pico, write_words
from support.saved import load_clean

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    save_pico(folder / "llama")
    write_words(folder / "words.txt")
    return folder


def settings(home: Path, **more: Any) -> dict[str, Any]:
    words = str(home / "words.txt")
    data = {"dataset": words, "nsamples": 4, "seqlen": 16, "eval_data": words, "eval_tokens": 160, "device": "cpu"}
    return {"model": str(home / "llama"), **data, **more}


CUT: dict[str, Any] = {"remove": "channels=0.4,blocks=0.34", "align": 16}
ZEROS: dict[str, Any] = {"pattern": "2:4", "method": "sparsegpt"}


def test_removing_and_pruning_in_one_run_matches_two_runs(home: Path, tmp_path: Path) -> None:
    both = settings(home, **CUT, **ZEROS, save=tmp_path / "run", save_model=tmp_path / "model")
    found = run_recipe(make_recipe(both), reporter=QUIET).report
    cut = settings(home, **CUT, save=tmp_path / "cut", save_model=tmp_path / "small")
    first = run_recipe(make_recipe(cut), reporter=QUIET).report
    then = settings(
        home, **ZEROS, model=str(tmp_path / "small"), save=tmp_path / "zeros", save_model=tmp_path / "sparse"
    )
    second = run_recipe(make_recipe(then), reporter=QUIET).report
    tensors, expected = (load_clean(tmp_path / name).state_dict() for name in ("model", "sparse"))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert found == Report.read(tmp_path / "run" / "report.json")
    assert (found.sparsity, found.edits) == (second.sparsity, first.edits)
    assert [matrix.mask_checksum for matrix in found.matrices] == [matrix.mask_checksum for matrix in second.matrices]
    (text,) = found.perplexity
    assert (text.dense, text.pruned) == (first.perplexity[0].dense, second.perplexity[0].pruned)
    assert found.headline().startswith("llama: obs-map-sparsegpt channels=0.4,blocks=0.34, 2:4, 50.00 % zeros")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "blocks 3 → 2" in card
    assert "50.00 % of the weights in 14 matrices are zero" in card
    assert [edits.removals() for edits in history_of(tmp_path / "model")[1]] == [first.edits, []]
    with pytest.raises(BadInput, match="already holds a finished run"):
        run_recipe(make_recipe(both), reporter=QUIET)


class StoppedAt(Reporter):
    """A reporter that raises KeyboardInterrupt at a line."""

    def __init__(self, line: str) -> None:
        super().__init__(quiet=True)
        self._line = line

    def say(self, line: str) -> None:
        if line.startswith(self._line):
            raise KeyboardInterrupt


def test_removal_and_pruning_can_each_be_interrupted(home: Path, tmp_path: Path) -> None:
    both = settings(home, **CUT, **ZEROS, evaluate=False, save=tmp_path / "run", save_model=tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(make_recipe(both), reporter=StoppedAt("Reloading"))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(make_recipe(both), reporter=StoppedAt(f"Loading {tmp_path}"))
    before = (tmp_path / "run" / "remove" / "report.json").stat().st_mtime_ns
    # As advised when memory runs out.
    run_recipe(make_recipe(both | {"batch_size": 1}), reporter=QUIET)
    assert (tmp_path / "run" / "remove" / "report.json").stat().st_mtime_ns == before
    assert load_clean(tmp_path / "model").config.num_hidden_layers == 2


@pytest.mark.slow
def test_a_source_changed_between_removal_and_pruning_is_noticed(tmp_path: Path) -> None:
    save_pico(tmp_path / "llama")
    write_words(tmp_path / "words.txt")
    both = make_recipe(settings(tmp_path, **CUT, **ZEROS, save=tmp_path / "run", save_model=tmp_path / "model"))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(both, reporter=StoppedAt("Loading " + str(tmp_path / "run")))
    save_pico(tmp_path / "llama", seed=1)
    run_recipe(both, reporter=QUIET)
    run_recipe(both.replaced(save=tmp_path / "fresh", save_model=tmp_path / "fresh-model"), reporter=QUIET)
    tensors, expected = (load_clean(tmp_path / name).state_dict() for name in ("model", "fresh-model"))
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_removing_and_pruning_a_model_in_memory_needs_no_folder(tmp_path: Path) -> None:
    tokens = torch.randint(60, (8, 32), generator=torch.Generator().manual_seed(0))
    more = CUT | {"save_model": tmp_path / "model", "evaluate": False, "quiet": True}
    result = coprune.prune(pico_model("llama"), "magnitude", sparsity=0.5, dataset=tokens, **more)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "blocks 3 → 2" in card
    assert "50.00 % of the weights in 14 matrices are zero" in card
    assert result.model.config.num_hidden_layers == 2
    assert result.report.sparsity.matrices == pytest.approx(0.5, abs=1e-3)
    weight = result.model.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert weight.shape == (64, 64)
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-2)


def test_zero_shot_tasks_are_refused_with_advice_to_save_the_model(home: Path) -> None:
    with pytest.raises(BadInput, match="a run that removes parts and prunes cannot run zero-shot tasks"):
        make_recipe(settings(home, **CUT, **ZEROS, tasks="boolq"))


@pytest.mark.parametrize(
    ("remove", "more", "file", "named"),
    [
        ("blocks=0.34", {"exclude": "model.layers.2.*"}, None, "'model.layers.2.*' depends on numbers"),
        ("blocks=0.34", {"include": ["*.q_proj", "*.[02468].mlp.*"]}, None, "'*.[02468].mlp.*' depends on numbers"),
        ("experts=0.5", {"exclude": "*.experts.down_proj[3]"}, None, "'*.experts.down_proj[3]' depends on numbers"),
        ("channels=0.4,blocks=0.34", {}, "'*.w1': 0.4\n'*.layers.1?.*': 0.6\n", "'*.layers.1?.*' depends on numbers"),
        # These patterns do not depend on numbers, so only the missing model is refused.
        ("blocks=0.34", {"exclude": ["*.fc1.*", "*.?_proj", "*.w[12]"]}, "'*.layers.*.fc[12]': 0.4\n", "no model"),
        ("channels=0.4", {"exclude": "model.layers.2.*"}, "'*.layers.1.*': 0.4\n", "no model"),
        ("experts=0.5", {"exclude": "model.layers.2.*"}, None, "no model"),
    ],
)
def test_patterns_on_numbers_that_change_are_refused_before_the_model_is_opened(
    remove: str, more: dict[str, Any], file: str | None, named: str, home: Path, tmp_path: Path
) -> None:
    allocation = {}
    if file is not None:
        (tmp_path / "own.yaml").write_text(file)
        allocation = {"allocation": str(tmp_path / "own.yaml")}
    asked = settings(home, remove=remove, sparsity=0.5, save=tmp_path / "run", **allocation, **more)
    with pytest.raises(BadInput) as refused:
        run_recipe(make_recipe(asked | {"model": str(tmp_path / "nothing")}), reporter=QUIET)
    assert named in str(refused.value)
    assert not (tmp_path / "run").exists() or named == "no model"


@pytest.mark.parametrize(
    ("remove", "allocation", "of_units", "of_zeros"),
    [
        pytest.param("channels=0.4", "error:tokens=0", "error:tokens=0", "uniform", marks=pytest.mark.slow),
        pytest.param("blocks=0.34", "owl", "uniform", "owl", marks=pytest.mark.slow),
        ("channels=0.4", "owl:spread=0.1", "uniform", "owl:spread=0.1"),
    ],
)
def test_an_allocation_applies_to_units_or_to_zeros(
    remove: str, allocation: str, of_units: str, of_zeros: str, home: Path, tmp_path: Path
) -> None:
    more = {"allocation": allocation, "sparsity": 0.5, "evaluate": False, "align": 16, "stream": False}
    asked = make_recipe(settings(home, remove=remove, save=tmp_path / "run", **more))
    prepare_solver(asked)  # as in a sweep or an estimate
    run_recipe(asked, reporter=QUIET)
    said = [
        str(Report.read(tmp_path / "run" / half / "report.json").recipe.prune.allocation)
        for half in ("remove", "prune")
    ]
    assert said == [of_units, of_zeros]


def test_an_unknown_option_is_refused(home: Path) -> None:
    asked = settings(home, remove="channels=0.4", sparsity=0.5, allocation="error:luck=3")
    with pytest.raises(BadInput, match="unknown option of allocation 'error': 'luck'"):
        run_recipe(make_recipe(asked), reporter=QUIET)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"method": "wanda:block_size=4"}, "unknown option of method 'wanda': 'block_size'"),
        ({"refine": "refits"}, "unknown refinement 'refits'"),
    ],
)
def test_impossible_zeros_are_refused_before_parts_are_removed(
    more: dict[str, Any], named: str, home: Path, tmp_path: Path
) -> None:
    asked = make_recipe(settings(home, remove="channels=0.4", save=tmp_path / "run", **{"sparsity": 0.5, **more}))
    with pytest.raises(BadInput, match=named):
        run_recipe(asked, reporter=QUIET)
    assert not (tmp_path / "run").exists()
    # As in a sweep, before anything else.
    with pytest.raises(BadInput, match=named):
        prepare_solver(asked)
