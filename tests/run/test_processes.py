"""Several processes give the result of one: the same masks, up to scores decided by rounding, and the same report."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coprune.base import processes as processes_module
from coprune.base.processes import joined_processes
from coprune.base.progress import Reporter
from coprune.model.matrices import Matrix
from coprune.pruning.pruner import share_out
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.report.schema import Report
from coprune.runner.run_recipe import run_recipe
from support.pico_folder import save_pico, words_of, write_words
from support.pico_pairs import save_pair_model
from support.together import together
from support.torchrun import ENVIRONMENT, run_together, torchrun

pytestmark = pytest.mark.usefixtures("one_thread")

CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "sparsegpt": ("llama", "sparsegpt", "block", {"include": ["*.q_proj", "*.down_proj", "lm_head"]}),
    # Few tokens, so that some experts see none, or only those of one process.
    "few tokens": ("mixtral", "sparsegpt", "sequential", {"seqlen": 2, "nsamples": 5, "evaluate": False}),
    "parts": (
        "llama",
        "wanda",
        "block",
        {
            "remove": "channels=0.33,heads=0.5,blocks=0.5",
            "align": 16,
            "score": "influence",
            "allocation": "error",
            "evaluate": False,
        },
    ),
    # Pairs of several lengths, some for each process.
    "halves": ("T5", "wanda", "sequential", {"dataset": "{pairs}", "eval_data": None}),
    # Samples of two lengths, both for each process.
    "two lengths": ("llama", "wanda", "sequential", {"dataset": "{words}:seqlen=16=0.5,{own}=0.5", "evaluate": False}),
}
MORE: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "fisher": ("mixtral", "wanda", "block", {"allocation": "fisher", "sparsity": 0.6}),
    "permuted": ("llama", "wanda", "block", {"permute": True, "pattern": "2:4", "evaluate": False}),
    "halves, sparsegpt": ("T5", "sparsegpt", "block", {"dataset": "{pairs}", "pattern": "2:4", "eval_data": None}),
    "halves, dense": ("T5", "wanda", "dense", {"dataset": "{words}", "seqlen": 24, "evaluate": False}),
    # Two of four layers share the keys and values of others.
    "shared keys": ("gemma4_text", "wanda", "sequential", {}),
    "shared weights": ("zamba2", "sparsegpt", "block", {}),
    "shared weights in memory": ("zamba2", "wanda", "dense", {"stream": False}),
    "channels of halves": ("T5", "wanda", "block", {"dataset": "{pairs}", "remove": "channels=0.5", "eval_data": None}),
    "heads and blocks of halves": (
        *("T5", "wanda", "block"),
        {"dataset": "{pairs}", "remove": "heads=0.5,blocks=0.34", "eval_data": None},
    ),
    "every matrix": ("llama", "sparsegpt", "block", {}),
    "in memory": ("llama", "wanda", "sequential", {"pattern": "2:4", "stream": False}),
    # Samples without ties between scores, after which a router may choose another expert.
    "mixture": ("mixtral", "sparsegpt", "sequential", {"seed": 1}),
    "mixture, wanda": ("mixtral", "wanda", "block", {}),
    "odd number": ("llama", "magnitude", "block", {"nsamples": 7}),
    "owl": ("llama", "wanda", "block", {"allocation": "owl", "sparsity": 0.6}),
    "rotated": ("llama", "wanda", "block", {"rotate": True}),
    "dense": ("llama", "sparsegpt", "dense", {"include": ["*.q_proj", "*.down_proj", "lm_head"]}),
    "parts by weights": (
        *("llama", "magnitude", "block"),
        {"remove": "channels=0.33,heads=0.5", "align": 16, "allocation": "error", "pattern": "2:4"},
    ),
    "a size": ("llama", "wanda", "block", {"remove": "size=0.2", "align": 16}),
    # Half of the samples have no counted token.
    "generated": ("mixtral", "sparsegpt", "sequential", {"calibrate_on": "generated", "evaluate": False}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "mixtral"):
        save_pico(folder / family, family, tie_word_embeddings=False, num_hidden_layers=2)
    write_words(folder / "words.txt")
    save_pair_model(folder / "T5", "T5")
    save_pico(folder / "gemma4_text", "gemma4_text")
    save_pico(folder / "zamba2", "zamba2")
    texts = [(words_of(9 + n % 3, n), words_of(4 + n % 2, n)) for n in range(20)]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({"source": a, "target": b}) for a, b in texts))
    ids = torch.randint(4, 250, (10, 48), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [(row, []) if number < 5 else (row[:9], row[9:]) for number, row in enumerate(ids)]
    rows = [json.dumps({"prompt_ids": prompt, "answer_ids": answer}) for prompt, answer in pairs]
    (folder / "own.jsonl").write_text("\n".join(rows))
    return folder


def recipe_of(models: Path, out: Path, name: str, **changes: Any) -> Recipe:
    family, method, propagation, more = (CASES | MORE)[name]
    settings: dict[str, Any] = dict(
        model=str(models / family),
        method=method,
        propagation=propagation,
        eval_data=str(models / "words.txt"),
        eval_tokens=192,
        nsamples=10,
        seqlen=48,
        batch_size=2,
        device="cpu",
        save=out / f"{name}-run",
        save_model=out / f"{name}-model",
    )
    named = more.get("dataset", "{own}" if "calibrate_on" in more else "{words}")
    data = named.format(words=models / "words.txt", own=models / "own.jsonl", pairs=models / "pairs.jsonl")
    return make_recipe(settings | more | {"dataset": data} | changes)


@pytest.mark.parametrize(
    ("processes", "names"),
    [
        (2, tuple(CASES)),
        pytest.param(2, tuple(MORE), marks=pytest.mark.slow),
        pytest.param(4, (*CASES, *MORE), marks=pytest.mark.slow),
    ],
    ids=["two", "two-more", "four"],
)
def test_several_processes_give_the_masks_and_report_of_one(
    processes: int, names: tuple[str, ...], models: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    for name in names:
        run_recipe(recipe_of(models, alone, name), reporter=Reporter(quiet=True))

    def prune() -> None:
        with joined_processes() as all_of_them:
            for name in names:
                run_recipe(recipe_of(models, tmp_path, name), reporter=Reporter(quiet=True), processes=all_of_them)

    together(processes, prune)
    for name in names:
        differing, entries = compare_masks(alone / f"{name}-model", tmp_path / f"{name}-model")
        # Sums have another order, so only entries whose scores are equal up to rounding may differ.
        assert differing <= entries / 10_000, (name, differing)
        compare_reports(alone / f"{name}-run", tmp_path / f"{name}-run", exact=differing == 0)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def compare_masks(one: Path, other: Path) -> tuple[int, int]:
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    return sum(int(((a[n] != 0) != (b[n] != 0)).sum()) for n in a), sum(tensor.numel() for tensor in a.values())


def compare_reports(one: Path, other: Path, exact: bool) -> None:
    a, b = Report.read(one / "report.json"), Report.read(other / "report.json")
    assert [m.name for m in a.matrices] == [m.name for m in b.matrices]
    assert [m.tokens for m in a.matrices] == [m.tokens for m in b.matrices]
    assert [m.events for m in a.matrices] == [m.events for m in b.matrices]
    assert a.sparsity == b.sparsity
    for ours, theirs in zip(a.matrices, b.matrices, strict=True):
        # Wanda's and magnitude's errors are measured on a few tokens, which differ.
        if exact and a.recipe.prune.method.name == "sparsegpt":
            assert ours.relative_layer_error == pytest.approx(theirs.relative_layer_error, rel=1e-3)
    for one_text, other_text in zip(a.perplexity, b.perplexity, strict=True):
        assert one_text.windows == other_text.windows
        assert one_text.dense == pytest.approx(other_text.dense, rel=1e-5)
        assert one_text.pruned == pytest.approx(other_text.pruned, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparsegpt", "halves"])
def test_a_killed_process_ends_the_run_which_then_resumes(name: str, models: Path, tmp_path: Path) -> None:
    if name == "halves":
        save_pair_model(tmp_path / "deep", "T5", num_layers=8, num_decoder_layers=16)
    else:
        save_pico(tmp_path / "deep", "llama", num_hidden_layers=24)
    settings = dict(model=str(tmp_path / "deep"), method="alps", propagation="block", evaluate=False)

    def command(out: Path) -> list[str]:
        path = tmp_path / f"{out.name}.yaml"
        path.write_text(recipe_of(models, out, name, **settings).to_yaml())
        return torchrun(2, "-m", "coprune", "prune", "--recipe", str(path))

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with subprocess.Popen(command(killed), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        journal = killed / f".{name}-model.partial"
        while not list(journal.glob("model-00003*.json")):
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.005)
        os.kill(process_of_rank(1, running.pid), signal.SIGKILL)
        _, told = running.communicate(timeout=60)
    assert running.returncode != 0
    assert re.search(r"^coprune: (process 0 was told to stop|another process of this run ended)", told, re.MULTILINE)
    assert not (killed / f"{name}-model").exists()

    assert "blocks were finished by an earlier run" in run_together(command(killed))
    assert not journal.exists()
    run_together(command(whole))
    resumed, uninterrupted = (weights_of(out / f"{name}-model") for out in (killed, whole))
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


def process_of_rank(rank: int, launcher: int) -> int:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"torchrun has no process of rank {rank}")


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_matrices_are_divided_evenly_among_processes(processes: int, gram: bool) -> None:
    module = torch.nn.Linear(1, 1)

    def matrix(name: str, rows: int, width: int) -> Matrix:
        module.register_parameter(name, torch.nn.Parameter(torch.empty(rows, width, device="meta")))
        return Matrix(name, module, name, input_dim=1)

    groups = [
        [matrix("q", 64, 64), matrix("k", 16, 64), matrix("v", 16, 64)],
        [matrix("o", 64, 64)],
        [matrix("gate", 170, 64), matrix("up", 170, 64)],
        [matrix("down", 64, 170)],
    ]
    owners = share_out(groups, processes, gram)
    sizes = {m.name: m.shape[0] * m.shape[1] ** (2 if gram else 1) for m in itertools.chain(*groups)}
    loads = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(processes)]
    assert owners.keys() == sizes.keys()
    # Scheduling the costliest first is within 4/3 of the optimum (Graham 1969), which these bound from below.
    extra = 64**3 * 2 + 170**3 if gram else 0
    assert max(loads) <= 4 / 3 * max(sum(sizes.values()) / processes, *sizes.values()) + extra


def test_waiting_processes_report_a_stopped_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("coprune.base.processes._TELL_AFTER_SECONDS", 0.02)
    with processes_module._heard():
        time.sleep(0.09)
    assert "has waited 0 seconds for another one, which may be slow or stopped" in caplog.text
    assert len(caplog.records) >= 2
    caplog.clear()
    with processes_module._heard():
        pass
    time.sleep(0.05)
    assert not caplog.records
