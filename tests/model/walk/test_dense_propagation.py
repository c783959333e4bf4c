"""Dense propagation: every block's statistics are the dense model's, whatever was pruned before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coprune.base.progress import Reporter
from coprune.model.matrices import Matrix
from coprune.model.walk.block_events import MatricesReady
from coprune.model.walk.recording import Dense
from coprune.model.walk.statistics import Gram, InputMoments, InputNorm, Statistic
from coprune.model.walk.walk import Walk
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver
from coprune.recipe.pattern import NM, Target
from coprune.recipe.recipe import make_recipe
from coprune.report.schema import Report
from coprune.run.output import Output
from coprune.runner.run_recipe import run_recipe
from support.pico import pico_model, pico_tokens
from support.pico_folder import listing, save_pico, write_words
from support.walking import MOVES, Propagation, make_walk, prune_with_walk

TWO_OF_FOUR = Target(NM(2, 4), 0.5)
BATCHES = pico_tokens(6, 32).split(2)
EVERYTHING = {"include": ["*.layers.*", "lm_head"]}


def sums_of(walk: Walk, change: Callable[[Matrix], object] = lambda matrix: None) -> dict[str, Any]:
    """Return the walk's sums of every group, by the name of its first matrix."""
    found = {}
    for event in walk:
        if isinstance(event, MatricesReady):
            inputs = event.inputs
            seen = inputs.statistic.sums | {"sample": inputs.sample.inputs}
            found[event.matrices[0].name] = ({n: t.clone() for n, t in seen.items()}, inputs.statistic.count)
            for matrix in event.matrices:
                change(matrix)
    return found


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith("weight")}


@pytest.mark.parametrize(("family", "statistic"), [("llama", Gram), ("gpt2", InputNorm), ("mixtral", InputMoments)])
def test_statistics_are_those_of_the_dense_model_to_the_last_bit(family: str, statistic: type[Statistic]) -> None:
    choice = EVERYTHING if family == "llama" else {}
    untied: dict[str, Any] = {"tie_word_embeddings": False}
    looked = sums_of(make_walk(pico_model(family, **untied), BATCHES, statistic, Dense(), **choice))
    emptied = make_walk(pico_model(family, **untied), BATCHES, statistic, Dense(), **choice)
    found = sums_of(emptied, lambda matrix: matrix.write(torch.zeros(matrix.shape)))
    assert found.keys() == looked.keys()
    assert family != "llama" or "lm_head" in found
    for name, (sums, count) in looked.items():
        assert found[name][1] == count
        assert all(torch.equal(found[name][0][part], total) for part, total in sums.items()), name


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_pruning_of_earlier_blocks_does_not_change_statistics(method: str) -> None:
    found = {}
    for propagation in ("dense", "block"):
        for exclude in ([], ["model.layers.0.*"]):
            model = pico_model("llama")
            prune_with_walk(model, BATCHES, Solver(METHODS[method]), TWO_OF_FOUR, propagation, exclude=exclude)
            found[propagation, bool(exclude)] = weights_of(model)
    later = [name for name in found["dense", True] if name.startswith(("model.layers.1.", "model.layers.2."))]
    assert all(torch.equal(found["dense", False][name], found["dense", True][name]) for name in later)
    assert not all(torch.equal(found["block", False][name], found["block", True][name]) for name in later)
    # Nothing is pruned before the first block in any case.
    first = [name for name in found["dense", False] if name.startswith("model.layers.0.")]
    assert all(torch.equal(found["dense", False][name], found["block", False][name]) for name in first)


def test_each_block_runs_once() -> None:
    runs: list[tuple[Propagation, int]] = [("dense", 1), ("block", 2)]
    for propagation, times in runs:
        model, calls = pico_model("llama"), list[nn.Module]()
        walk = make_walk(model, BATCHES, InputNorm, MOVES[propagation])
        for block in walk.model.blocks:
            block.module.register_forward_pre_hook(lambda module, arguments, calls=calls: calls.append(module))
        sums_of(walk)
        # The last block's outputs are not needed.
        assert len(calls) == len(BATCHES) * (times * len(walk.model.blocks) - (times - 1))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_pico(folder / "llama", tie_word_embeddings=False)
    write_words(folder / "words.txt")
    return folder


def run(place: Path, out: Path, **changes: Any) -> Report:
    settings = {
        "model": str(place / "llama"),
        "method": "sparsegpt",
        "pattern": "2:4",
        "propagation": "dense",
        "dataset": str(place / "words.txt"),
        "nsamples": 6,
        "seqlen": 16,
        "batch_size": 2,
        "evaluate": False,
        "save": str(out / "run"),
        "save_model": str(out / "pruned"),
    }
    return run_recipe(make_recipe(settings | changes), reporter=Reporter(quiet=True)).report


def checkpoint(out: Path) -> dict[str, bytes | None]:
    return {name: content for name, content in listing(out / "pruned").items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("stream", [True, False])
def test_a_resumed_run_gives_the_same_result(
    stream: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    include = ["*.layers.*", "lm_head"]
    report = run(place, tmp_path / "whole", stream=stream, include=include)
    write = Output.write_block
    written: list[Any] = []

    def interrupted(self: Output, block: Any, outcome: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(block.name)
        write(self, block, outcome)

    monkeypatch.setattr(Output, "write_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "parts", stream=stream, include=include)
    monkeypatch.undo()
    resumed = run(place, tmp_path / "parts", stream=stream, include=include)
    assert len(written) == 2
    assert checkpoint(tmp_path / "parts") == checkpoint(tmp_path / "whole")
    assert [m.model_dump(exclude={"seconds"}) for m in resumed.matrices] == [
        m.model_dump(exclude={"seconds"}) for m in report.matrices
    ]


def test_streaming_gives_the_same_result_as_memory(place: Path, tmp_path: Path) -> None:
    for stream in (True, False):
        run(place, tmp_path / str(stream), stream=stream)
    assert checkpoint(tmp_path / "True") == checkpoint(tmp_path / "False")
