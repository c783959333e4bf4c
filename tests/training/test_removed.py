"""Fine-tuning of models with removed parts, in every mode and in one run with the removal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from coprune.base.progress import Event, Reporter, Said
from coprune.model.edit import DropBlock
from coprune.model.edits import Edits, source_of
from coprune.model.removed import MappedBlocks
from coprune.recipe.recipe import make_recipe
from coprune.recipe.views import training_recipe
from coprune.report.run_page import run_page
from coprune.report.schema import Report
from coprune.report.wording import number
from coprune.runner.run_recipe import run_recipe
from coprune.training.finetune_report import FinetuneReport
from coprune.training.finetuning import run_finetuning
from coprune.training.masks import History, find_masks
from support.pico import pico_model
from support.pruned import save, settings_for, write_text
from support.saved import load_clean

QUIET = Reporter(quiet=True)
REMOVE = "channels=0.4,blocks=0.25"


def settings(home: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a removal."""
    data = {"dataset": str(home / "text.txt"), "seqlen": 16, "nsamples": 4, "device": "cpu", "evaluate": False}
    return {"model": str(home / "dense"), "remove": REMOVE, "align": 16, **data, **changes}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("removed")
    save(pico_model("llama", vocab_size=1002, num_hidden_layers=4), folder / "dense")
    write_text(folder / "text.txt", 700)
    run_recipe(make_recipe(settings(folder, save=folder / "run", save_model=folder / "small")), reporter=QUIET)
    return folder


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("lora", marks=pytest.mark.slow),
        "dense",
        pytest.param("distill", marks=pytest.mark.slow),
        "lora-distill",
    ],
)
def test_every_mode_trains_the_remaining_parts(home: Path, tmp_path: Path, mode: str) -> None:
    teacher = {"teacher": str(home / "dense")} if "distill" in mode else {}
    asked = settings_for(tmp_path / "run", home / "small", home / "text.txt", mode=mode, max_steps=3, **teacher)
    report = run_finetuning(training_recipe(asked), QUIET)
    before, after = load_clean(home / "small"), load_clean(tmp_path / "run" / "model")
    assert [p.shape for p in after.parameters()] == [p.shape for p in before.parameters()]
    linear = [name for name, module in before.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    assert len(linear) == 21
    assert all(not torch.equal(before.get_parameter(f"{n}.weight"), after.get_parameter(f"{n}.weight")) for n in linear)
    assert any("blocks 4 → 3" in one.line() for one in report.removed)
    assert (report.pruned_matrices, report.sparsity_after) == (0, 0.0)
    assert "blocks 4 → 3" in str(report)
    assert "blocks 4 → 3" in (tmp_path / "run" / "model" / "README.md").read_text()
    # Removals are recorded for later training and export.
    assert History.read(tmp_path / "run" / "model").removed == report.removed
    assert source_of(tmp_path / "run" / "model") == str(home / "dense")


@pytest.mark.parametrize("mode", [pytest.param("lora", marks=pytest.mark.slow), "dense"])
def test_padding_stays_zero_however_small(home: Path, tmp_path: Path, mode: str) -> None:
    asked = settings(home, save=tmp_path / "run", save_model=tmp_path / "small", remove="channels=0.04", align=4)
    run_recipe(make_recipe(asked | {"allocation": "error:tokens=0"}), reporter=QUIET)
    asked = settings_for(tmp_path / "tuned", tmp_path / "small", home / "text.txt", mode=mode, max_steps=2)
    run_finetuning(training_recipe(asked), QUIET)
    before, after = load_clean(tmp_path / "small"), load_clean(tmp_path / "tuned" / "model")
    names = [name for name, _ in before.named_parameters() if ".mlp." in name]
    silent = {name: before.get_parameter(name) == 0 for name in names}
    assert any(0 < float(zeros.float().mean()) < 0.05 for zeros in silent.values())
    assert all(bool((after.get_parameter(name)[zeros] == 0).all()) for name, zeros in silent.items())


def test_hidden_states_are_compared_with_the_corresponding_blocks() -> None:
    def without(*gone: int) -> Edits:
        return Edits({f"m.{i}": [DropBlock(block=f"m.{i}", entries=0)] for i in gone})

    assert History().counterparts(5, 5) == [1, 2, 3, 4, 5]
    # Blocks 0, 2 and 3 remain: the first one's output corresponds to that of the dense model's block 1.
    assert History([without(1, 4)]).counterparts(3, 5) == [2, 3, 5]
    assert History([without(4), without(), without(1)]).counterparts(3, 5) == [2, 3, 5]
    assert History([without(1, 4)]).counterparts(3, 3) == [1, 2, 3]  # a teacher with the same blocks removed
    assert History([without(1)]).counterparts(3, 5) is None
    halves = Edits({name: [DropBlock(block=name, entries=0)] for name in ("encoder.m.0", "decoder.m.2")})
    assert History([halves]).counterparts(3, 4, "decoder.m.") == [1, 3, 4]


def test_removal_and_distillation_in_one_run_report_the_final_model(home: Path, tmp_path: Path) -> None:
    lines: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Said):
            lines.append(event.text)

    reporter = Reporter(quiet=True)
    reporter.listeners.append(listen)
    both = {"finetune": "distill", "finetune_minutes": 0.02, "save": tmp_path / "run", "save_model": tmp_path / "small"}
    measured = {"evaluate": True, "eval_data": str(home / "text.txt"), "eval_tokens": 320}
    found = run_recipe(make_recipe(settings(home, **both, **measured)), reporter=reporter).report
    assert found == Report.read(tmp_path / "run" / "report.json")
    assert found.finetuned is not None
    ((name, value),) = found.finetuned.perplexity.items()
    assert value != found.perplexity[0].pruned
    # The training starts from the model with the map merged.
    assert any(isinstance(edit, MappedBlocks) for edit in found.edits)
    (trained,) = FinetuneReport.model_validate_json(
        next((tmp_path / "run").rglob("finetune.json")).read_text()
    ).perplexity
    assert trained.before == pytest.approx(found.perplexity[0].pruned, rel=1e-5)
    assert found.saved_model == tmp_path / "small"
    assert f"→ {value:.2f} after distill on {name}" in found.headline()
    assert f"fine-tuned {value:.2f}" in str(found)
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"| {value:.2f} |" in card
    assert "blocks 4 → 3" in card
    assert "then fine-tuned (distill" in card
    assert any(f"→ {value:.2f} on" in line for line in lines[-8:])
    assert found.left == load_clean(tmp_path / "small").num_parameters() < found.model.parameters
    page = run_page(found)
    assert f"→</span> {number(value)}" in page
    assert "<th>fine-tuned</th>" in page
    assert "zeros in the pruned matrices" not in page


def test_a_smaller_model_with_zeros_keeps_size_and_zeros(home: Path, tmp_path: Path) -> None:
    sparse = {"pattern": "2:4", "method": "magnitude", "save": tmp_path / "run", "save_model": tmp_path / "sparse"}
    pruning = {**settings(home), **sparse, "model": str(home / "small")}
    del pruning["remove"], pruning["align"]
    run_recipe(make_recipe(pruning), reporter=QUIET)
    asked = settings_for(tmp_path / "tuned", tmp_path / "sparse", home / "text.txt", mode="dense", max_steps=2)
    run_finetuning(training_recipe(asked), QUIET)
    assert find_masks(load_clean(tmp_path / "tuned" / "model")).patterns == {"2:4": 21}
