"""Every allocation in a run: exact for any method; files, options, and refusals."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

import coprune
from coprune.base.errors import BadInput
from coprune.pruning.allocation import ALLOCATIONS, allocation_named
from coprune.pruning.allocation.allocation_plan import plan_targets
from coprune.pruning.allocation.owl import OWL
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver, prune_walk
from coprune.recipe.pattern import NM, Target, Unstructured
from coprune.recipe.recipe import make_recipe
from coprune.report.schema import Report
from support.commands import run_command
from support.pico import pico_model, pico_tokens
from support.pico_folder import pico_tokenizer, save_pico, write_words
from support.sample import sampled
from support.walking import make_walk

BATCHES = pico_tokens(16, 32).split(8)
PERCENT = r"([\d.]+) %"
TARGETS = [Target(Unstructured(), 0.5), Target(Unstructured(), 0.7), Target(NM(4, 8), 0.5)]


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def plans(request: pytest.FixtureRequest) -> tuple[str, dict[tuple[str, str, float], dict[str, Target]]]:
    """Return every allocation's plan for a model, by allocation and target."""
    model = pico_model(request.param, num_hidden_layers=2)
    found = {}
    for name in ALLOCATIONS:
        for target in TARGETS:
            walk = make_walk(model, BATCHES)
            targets = plan_targets(allocation_named(name), walk.model, walk.recording, target)
            found[name, str(target.pattern), target.sparsity] = targets
    return request.param, found


@pytest.mark.parametrize(
    ("name", "method", "target"),
    sampled(
        itertools.product(ALLOCATIONS, ["wanda", "magnitude", "alps"], TARGETS),
        quick=[(name, method, TARGETS[0]) for name in ALLOCATIONS for method in ("wanda", "alps")]
        + [(name, "magnitude", target) for name in ALLOCATIONS for target in TARGETS[1:]],
    ),
    ids=str,
)
def test_the_achieved_sparsity_is_the_requested_one(
    plans: tuple[str, dict[tuple[str, str, float], dict[str, Target]]], name: str, method: str, target: Target
) -> None:
    family, found = plans
    targets = found[name, str(target.pattern), target.sparsity]
    model = pico_model(family, num_hidden_layers=2)
    solver = Solver(METHODS[method])
    walk = make_walk(model, BATCHES, solver.statistic)
    results = prune_walk(walk, solver, lambda matrix: targets[matrix.name], layer_error=False)
    sizes = [result.shape[0] * result.shape[1] for result in results]
    sparsity = sum(r.sparsity * size for r, size in zip(results, sizes, strict=True)) / sum(sizes)
    rows = min(result.shape[0] for result in results)
    # In pico matrices half a row's step can exceed the 0.01 % required of a real model.
    if isinstance(target.pattern, NM):
        assert abs(sparsity - 0.5) <= 1e-4
    elif name != "uniform":
        assert abs(sparsity - target.sparsity) <= max(1e-4, rows / 2 / sum(sizes))
    for result in results:
        asked = targets[result.name].sparsity
        if name == "uniform":  # one sparsity for all, rounded down to whole weights per row
            assert asked == target.sparsity
            assert 0 <= asked - result.sparsity < 1 / result.shape[1]
        else:
            assert result.sparsity == pytest.approx(asked, abs=1e-9)


def test_on_a_real_models_shapes_the_sparsity_is_exact_to_a_hundredth_of_a_per_cent() -> None:
    from coprune.pruning.allocation.allocation import Unit, wish, within_budget

    shapes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)} | {
        "gate": (1536, 576),
        "up": (1536, 576),
        "down": (576, 1536),
    }
    units = [Unit(f"{b}.{k}", f"{b}", *shape, (f"{b}.{k}",)) for b in range(30) for k, shape in shapes.items()]
    for target in (Target(Unstructured(), 0.6180339), Target(Unstructured(), 0.7), Target(NM(3, 8), 0.625)):
        curves = [wish(target.sparsity + 0.1 * ((7 * i) % 13 / 13 - 0.5), unit) for i, unit in enumerate(units)]
        targets = within_budget(units, curves, target)
        total = sum(unit.weights for unit in units)
        reached = sum(unit.weights * t.sparsity for unit, t in zip(units, targets, strict=True)) / total
        assert abs(reached - target.sparsity) <= (1e-4 if isinstance(target.pattern, Unstructured) else 1e-9)


def run(tmp_path: Path, allocation: str, **settings: Any) -> Report:
    words = write_words(tmp_path / "words.txt")
    return coprune.prune(
        pico_model("llama"),
        settings.pop("method", "wanda"),
        processor=pico_tokenizer(),
        dataset=str(words),
        nsamples=8,
        seqlen=32,
        evaluate=False,
        allocation=allocation,
        quiet=True,
        **settings,
    ).report


def test_data_is_read_for_the_allocation_even_if_the_method_needs_none(tmp_path: Path) -> None:
    report = run(tmp_path, "owl", method="magnitude", sparsity=0.7, layer_error=False)
    assert report.sparsity.matrices == pytest.approx(0.7, abs=2e-4)
    assert len({m.sparsity for m in report.matrices}) > 1


def test_n_of_m_is_allocated_per_matrix_for_any_m(tmp_path: Path) -> None:
    report = run(tmp_path, "fisher", pattern="2:4")
    assert report.sparsity.matrices == pytest.approx(0.5, abs=1e-9)
    assert {m.sparsity for m in report.matrices} == {0.25, 0.5, 0.75}


def test_sparsities_of_a_file_are_exact_and_the_rest_meets_the_target(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text('"*.0.*": 0.5\n"*.v_proj": 0.25\n"*.gate_proj": 0.75\n')
    report = run(tmp_path, str(file), sparsity=0.6)
    found = {m.name: m.sparsity for m in report.matrices}
    assert found["model.layers.0.mlp.gate_proj"] == 0.5
    assert found["model.layers.1.self_attn.v_proj"] == 0.25
    assert found["model.layers.2.mlp.gate_proj"] == 0.75
    rest = [s for name, s in found.items() if ".0." not in name and not name.endswith(("v_proj", "gate_proj"))]
    assert max(rest) - min(rest) <= 2 / 64
    assert report.sparsity.matrices == pytest.approx(0.6, abs=2e-4)


def test_a_file_may_name_n_of_m(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text('"*.v_proj": "6:8"\n')
    found = {m.name: m.sparsity for m in run(tmp_path, str(file), pattern="4:8").matrices}
    assert found["model.layers.1.self_attn.v_proj"] == 0.25


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ('"*": 0.6\n', {"sparsity": 0.5}, "gives a sparsity of 0.60"),
        ('"*.query": 0.6\n', {"sparsity": 0.5}, "'\\*.query' matches none"),
        ('"*.mlp.*": 0.9\n', {"sparsity": 0.5}, "leaves a sparsity of -"),
        ('"*.v_proj": 1.0\n', {}, "must be 0 ≤ s < 1"),
        ('"*.v_proj": true\n', {}, "must be 0 ≤ s < 1"),
        ('"*.v_proj": "2:4"\n', {}, "does not fit the pattern unstructured"),
        ('"*.v_proj": 0.0\n', {"pattern": "2:4"}, "leaves a matrix whole, but 2:4 takes at least one of every 4"),
        ('"*.v_proj": "2:4"\n', {"pattern": "4:8"}, "does not fit the pattern 4:8"),
        ("- a\n", {}, "is not a mapping"),
        ("{", {}, "not valid YAML"),
        (None, {}, "cannot be read"),
    ],
)
def test_invalid_allocation_files_are_refused(
    tmp_path: Path, text: str | None, settings: dict[str, Any], message: str
) -> None:
    file = tmp_path / "plan.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadInput, match=message):
        run(tmp_path, str(file), **settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("owll", "did you mean 'owl'"),
        ("owl:spred=0.1", "did you mean 'spread'"),
        ("owl:spread=wide", "cannot be 'wide'"),
        ("owl:spread", "write owl:spread=VALUE"),
        ("owl:spread=-1", "negative"),
        ("fisher:points=1", "at least 2"),
        ("error:points=3", "unknown allocation 'error'"),
        ("uniform:spread=0.1", "no options"),
    ],
)
def test_bad_allocations_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        allocation_named(text)


def test_allocation_options_are_parsed() -> None:
    assert allocation_named("owl:spread=0.1,threshold=7") == OWL(threshold=7, spread=0.1)


@pytest.mark.parametrize("name", sampled(["owl", "fisher"], quick=["fisher"]))
def test_an_allocations_token_limit_is_met_by_whole_samples(tmp_path: Path, name: str) -> None:
    """The first 64 tokens are two samples of 32, in a run and in an inspection."""
    save_pico(tmp_path / "model")
    data: dict[str, Any] = {"dataset": str(write_words(tmp_path / "words.txt")), "seqlen": 32, "batch_size": 1}
    asked: dict[str, Any] = data | {"sparsity": 0.7, "quiet": True, "stream": False}

    def planned(first: int, nsamples: int) -> list[float]:
        shown = coprune.inspect(tmp_path / "model", allocation=f"{name}:first={first}", nsamples=nsamples, **asked)
        return [matrix.target.sparsity for matrix in shown.matrices if matrix.target]

    assert planned(64, 8) == planned(0, 2)
    assert planned(64, 8) != planned(0, 8)
    report = coprune.prune(
        tmp_path / "model", allocation=f"{name}:first=64", nsamples=8, evaluate=False, prompt="", gate=False, **asked
    ).report
    assert [matrix.sparsity for matrix in report.matrices] == pytest.approx(planned(64, 8), abs=1e-3)


def test_permute_requires_an_nm_pattern_and_memory() -> None:
    with pytest.raises(BadInput, match="2:4"):
        make_recipe({"model": "m", "permute": True})
    with pytest.raises(BadInput, match="memory"):
        make_recipe({"model": "m", "permute": True, "pattern": "2:4", "stream": True})


@pytest.mark.parametrize("name", ["owl", "fisher"])
def test_inspect_shows_what_an_allocation_would_do(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pico(tmp_path / "model")
    write_words(tmp_path / "words.txt")
    arguments = [
        "inspect",
        "model",
        "--allocation",
        name,
        "-s",
        "0.7",
        "--dataset",
        "words.txt",
        "--seqlen",
        "32",
        "-q",
    ]
    monkeypatch.chdir(tmp_path)
    ended = run_command(arguments, monkeypatch, capsys)
    assert ended.code == 0, ended.err
    found = re.findall(
        rf"^allocation {name}: matrices from {PERCENT} to {PERCENT} sparse, 70\.00 % in all", ended.out, re.M
    )
    ((least, most),) = [tuple(map(float, figures)) for figures in found]
    found = re.findall(rf"^  model\.layers\.\d  {PERCENT}  \({PERCENT} … {PERCENT}\)$", ended.out, re.M)
    blocks = [tuple(map(float, figures)) for figures in found]
    assert len(blocks) == 3
    assert all(low <= mean <= high for mean, low, high in blocks)
    assert (min(low for _, low, _ in blocks), max(high for _, _, high in blocks)) == (least, most)
    assert least < 70 < most
    assert sum(mean for mean, _, _ in blocks) / 3 == pytest.approx(70, abs=0.05)  # blocks have equal sizes
