"""Expansion of a file or script to runs: every combination once, each with its own folder and command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from coprune.base.errors import BadInput
from coprune.recipe.choice import Choice
from coprune.recipe.recipe import make_recipe
from coprune.sweeps.expand import expand
from coprune.sweeps.file import Sweep
from coprune.sweeps.finished import sweep_command
from coprune.sweeps.sweep_call import SWEEPS, sweep_of_script
from support.commands import run_command
from support.expanded import PLAIN, names, runs_of

# The commands of the original `llama_7b.sh` and `ablate_weight_update.sh`, one line each.
LLAMA_7B = """
wanda     unstructured out/llama_7b/unstructured/wanda
wanda     2:4          out/llama_7b/2-4/wanda
wanda     4:8          out/llama_7b/4-8/wanda
sparsegpt unstructured out/llama_7b/unstructured/sparsegpt
sparsegpt 2:4          out/llama_7b/2-4/sparsegpt
sparsegpt 4:8          out/llama_7b/4-8/sparsegpt
magnitude unstructured out/llama_7b/unstructured/magnitude
magnitude 2:4          out/llama_7b/2-4/magnitude
magnitude 4:8          out/llama_7b/4-8/magnitude
"""
ABLATION = """
ablate_mag_seq    unstructured out/llama_7b_ablation/unstructured/ablate_mag_seq
ablate_wanda_seq  unstructured out/llama_7b_ablation/unstructured/ablate_wanda_seq
ablate_mag_iter   unstructured out/llama_7b_ablation/unstructured/ablate_mag_iter
ablate_wanda_iter unstructured out/llama_7b_ablation/unstructured/ablate_wanda_iter
ablate_mag_seq    4:8          out/llama_7b_ablation/4-8/ablate_mag_seq
ablate_wanda_seq  4:8          out/llama_7b_ablation/4-8/ablate_wanda_seq
ablate_mag_iter   4:8          out/llama_7b_ablation/4-8/ablate_mag_iter
ablate_wanda_iter 4:8          out/llama_7b_ablation/4-8/ablate_wanda_iter
ablate_mag_seq    2:4          out/llama_7b_ablation/2-4/ablate_mag_seq
ablate_wanda_seq  2:4          out/llama_7b_ablation/2-4/ablate_wanda_seq
ablate_mag_iter   2:4          out/llama_7b_ablation/2-4/ablate_mag_iter
ablate_wanda_iter 2:4          out/llama_7b_ablation/2-4/ablate_wanda_iter
"""


@pytest.mark.parametrize(("script", "listed"), [("llama-7b", LLAMA_7B), ("ablate-weight-update", ABLATION)])
def test_a_script_expands_to_the_original_runs(script: str, listed: str) -> None:
    expected = [
        make_recipe(
            {
                "model": "decapoda-research/llama-7b-hf",
                "method": method,
                "sparsity": 0.5,
                "pattern": pattern,
                "nsamples": 128,
                "save": folder,
            }
        )
        for method, pattern, folder in (line.split() for line in listed.strip().splitlines())
    ]
    assert [run.recipe for run in expand(sweep_of_script(script))] == expected


def test_every_script_expands_and_takes_another_model() -> None:
    counts = {name: len(expand(sweep_of_script(name))) for name in SWEEPS}
    assert counts.pop("opt") == 5 * 9
    assert counts.pop("ablate-weight-update") == 12
    assert set(counts.values()) == {9}
    models = {run.recipe.model.name for run in expand(sweep_of_script("opt").with_settings({"model": "mine"}))}
    assert models == {"mine"}


def test_the_first_list_is_outermost() -> None:
    assert names(method=["wanda", "magnitude"], seed=[0, 1]) == [
        "wanda/seed-0",
        "wanda/seed-1",
        "magnitude/seed-0",
        "magnitude/seed-1",
    ]


def test_zipped_lists_advance_together() -> None:
    runs = runs_of(
        nsamples=[8, 16], method=["wanda", "magnitude"], seqlen=[32, 64], sweep={"zip": ["nsamples", "seqlen"]}
    )
    found = [(run.recipe.calibrate.samples, run.recipe.calibrate.seqlen, run.recipe.prune.method.name) for run in runs]
    assert found == [(8, 32, "wanda"), (8, 32, "magnitude"), (16, 64, "wanda"), (16, 64, "magnitude")]


def test_runs_can_be_excluded_and_included() -> None:
    rules = {
        "exclude": [{"method": "magnitude", "pattern": ["2:4", "4:8"]}],
        "include": [{"method": "sparsegpt", "pattern": "2:4", "options": {"block_size": 64}}],
    }
    found = names(method=["wanda", "magnitude"], pattern=["unstructured", "2:4", "4:8"], sweep=rules)
    kept = ["wanda/unstructured", "wanda/2-4", "wanda/4-8", "magnitude/unstructured"]
    assert found == [*kept, "sparsegpt/2-4_block_size-64"]


def test_a_list_setting_takes_a_list_of_lists() -> None:
    runs = runs_of(refine=[[], ["refit"], ["swaps", "refit"]])
    assert [run.recipe.setting("refine") for run in runs] == [(), ("refit",), ("swaps", "refit")]
    assert [run.recipe.setting("refine") for run in runs_of(refine=["swaps", "refit"])] == [("swaps", "refit")]


def test_a_sweep_accepts_the_wanda_repositorys_names() -> None:
    own = {
        "nsamples": [32, 128],
        "method": ["wanda", "magnitude"],
        "seqlen": [64, 128],
        "sweep": {"zip": ["nsamples", "seqlen"], "exclude": [{"nsamples": 128, "method": "magnitude"}]},
    }
    theirs = {
        "nsamples": [32, 128],
        "prune_method": ["wanda", "magnitude"],
        "seqlen": [64, 128],
        "sweep": {"zip": ["nsamples", "seqlen"], "exclude": [{"nsamples": 128, "prune_method": {"name": "magnitude"}}]},
    }
    assert runs_of(**theirs) == runs_of(**own)
    assert len(runs_of(**own)) == 3


@pytest.mark.parametrize(
    "methods",
    [
        ["wanda", "sparsegpt:block_size=64", {"name": "sparsegpt", "block_size": 128}],
        ["wanda", {"name": "sparsegpt", "block_size": [64, 128]}],
    ],
)
def test_methods_are_listed_with_their_options(methods: list[dict[str, Any] | str]) -> None:
    runs = runs_of(method=methods, seed=[0, 1])
    assert [(run.recipe.prune.method.name, run.recipe.prune.method.options) for run in runs[::2]] == [
        ("wanda", {}),
        ("sparsegpt", {"block_size": 64}),
        ("sparsegpt", {"block_size": 128}),
    ]
    assert [run.name for run in runs[:3]] == [
        "wanda/default/seed-0",
        "wanda/default/seed-1",
        "sparsegpt/block_size-64/seed-0",
    ]
    typed = Sweep.make(PLAIN | {"method": methods}).with_settings({"method": "magnitude"})
    assert [run.recipe.prune.method for run in expand(typed)] == [Choice.of("magnitude")]


def test_an_option_of_the_method_may_have_a_list() -> None:
    runs = runs_of(method={"name": "sparsegpt", "block_size": [64, 128], "damping": 0.1})
    assert [run.recipe.prune.method.options["block_size"] for run in runs] == [64, 128]
    assert [run.recipe.prune.method.options["damping"] for run in runs] == [0.1, 0.1]


def test_a_method_from_the_command_line_drops_options_of_another() -> None:
    sweep = Sweep.make(PLAIN | {"method": "sparsegpt:block_size=64"})
    for typed, expected in (("wanda", "wanda"), ("sparsegpt", "sparsegpt:block_size=64"), ("admm:rho=2", "admm:rho=2")):
        assert [str(run.recipe.prune.method) for run in expand(sweep.with_settings({"method": typed}))] == [expected]
    shared = Sweep.make(PLAIN | {"method": ["sparsegpt", "admm"], "options": {"damping": 0.1}})
    assert [str(run.recipe.prune.method) for run in expand(shared.with_settings({"method": "admm"}))] == [
        "admm:damping=0.1"
    ]


def test_an_included_method_has_its_own_options() -> None:
    listed = ["sparsegpt:block_size=64", "sparsegpt:block_size=128"]
    found = runs_of(method=listed, sweep={"include": [{"method": "ablate_mag_seq"}]})
    assert [run.recipe.prune.method.options for run in found] == [{"block_size": 64}, {"block_size": 128}, {}]
    nested = {"method": {"name": "sparsegpt", "block_size": [64, 128]}}
    found = runs_of(method=["wanda", "magnitude"], sweep={"include": [nested]})
    assert [str(run.recipe.prune.method) for run in found[2:]] == [
        "sparsegpt:block_size=64",
        "sparsegpt:block_size=128",
    ]


def test_an_exclusion_may_name_a_list_that_is_one_value() -> None:
    lists = {"refine": [[], ["refit"], ["swaps"]]}
    assert names(**lists, sweep={"exclude": [{"refine": ["refit"]}]}) == ["refine-none", "refine-swaps"]
    assert names(**lists, sweep={"exclude": [{"refine": [["refit"], ["swaps"]]}]}) == ["refine-none"]


def test_an_exclusion_may_list_methods_with_their_options() -> None:
    lists = {"method": ["wanda", "sparsegpt:block_size=64", "sparsegpt:block_size=128"], "pattern": ["4:8", "2:4"]}
    out = {"pattern": "2:4", "method": ["wanda", {"name": "sparsegpt", "block_size": [64]}]}
    found = runs_of(**lists, sweep={"exclude": [out]})
    left = [("wanda", "4:8"), ("sparsegpt:block_size=64", "4:8")]
    left += [("sparsegpt:block_size=128", pattern) for pattern in ("4:8", "2:4")]
    assert [(str(run.recipe.prune.method), run.recipe.prune.pattern) for run in found] == left
    with pytest.raises(BadInput, match="matches no run"):
        runs_of(**lists, sweep={"exclude": [{"method": ["wanda", "sparsegpt:block_size=32"]}]})


def test_models_with_equal_names_get_separate_folders() -> None:
    models = ["out/wanda/model", "out/alps/model", "hub/other", "out/more/alps/model"]
    own = ["model", "alps-model", "other", "more-alps-model"]
    assert names(model=models) == own
    assert names(model=models, sweep={"folders": "{model}/{method}"}) == [f"{name}/wanda" for name in own]
    assert names(model=models[:1], sweep={"include": [{"model": models[1]}]}) == own[:2]


def test_logged_items_go_to_separate_folders() -> None:
    found = runs_of(seed=[0, 1], tasks="boolq", log_samples="out/items")
    assert [run.recipe.evaluate.tasks.log_samples for run in found] == [
        Path("out/items/seed-0"),
        Path("out/items/seed-1"),
    ]


def test_the_folder_may_be_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (run,) = runs_of(save="~/out", save_model="~/models")
    assert (run.recipe.run_folder, run.recipe.output.model) == (tmp_path / "out" / "wanda", tmp_path / "models")


def test_folders_may_use_settings_by_any_name() -> None:
    flat, placed = ({"folders": name} for name in ("{nsamples}/{method}", "{nsamples}/{prune_method}"))
    data = {"nsamples": [32, 128], "method": ["wanda", "magnitude"]}
    assert names(**data, sweep=flat) == names(**data, sweep=placed)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"metod": ["wanda"]}, "did you mean 'method'"),
        ({"method": []}, "empty list"),
        ({"nsampels": [1, 2]}, "did you mean 'nsamples'"),
        ({"method": ["wanda"], "prune_method": ["wanda"]}, "method is given twice"),
        ({"method": ["wanda:group=row", "wanda"], "options": {"group": "row"}}, "options are given twice"),
        ({"use_variant": True}, "name the method wanda_variant"),
        ({"sweep": {"zip": ["sead", "nsamples"]}}, "did you mean 'seed'"),
        ({"save": ["a", "b"]}, "the folder of the whole sweep"),
        ({"log_json": "x.jsonl"}, "for one run"),
        ({"sweep": {"zips": []}}, "did you mean 'zip'"),
        ({"sweep": ["zip"]}, "must be a mapping"),
        ({"sweep": {"include": {"method": "wanda"}}}, "sweep.include"),
        ({"sweep": {"include": [{"metod": "wanda"}]}}, "did you mean 'method'"),
        (
            {"seed": [0, 1], "nsamples": [1, 2, 3], "sweep": {"zip": ["seed", "nsamples"]}},
            "the same length: seed has 2",
        ),
        ({"seed": [0, 1], "sweep": {"zip": ["seed"]}}, "two or more"),
        ({"method": ["wanda"], "sweep": {"exclude": [{"method": "magnitude"}]}}, "matches no run"),
        ({"method": ["wanda"], "sweep": {"exclude": [{"method": "wanda"}]}}, "every run of the sweep is excluded"),
        ({"seed": [0, 1], "sweep": {"folders": "{method}"}}, "two different runs"),
        (
            {"seed": [0, 1], "nsamples": [4, 8], "sweep": {"zip": ["seed", "nsamples"], "include": [{"seed": [5]}]}},
            "length",
        ),
        ({"save": 2024}, "save is the folder of the whole sweep"),
        ({"sweep": {"include": [{"save_model": "out/other"}]}}, "save_model is the folder of the whole sweep"),
        ({"sweep": {"include": [{"push_to_hub": "me/it"}]}}, "push_to_hub is for one run"),
        ({"seed": [0, 1], "sweep": {"folders": "{metod}"}}, "not a pattern of recipe fields"),
        ({"seed": [0, 1], "sweep": {"folders": "../{seed}"}}, "not a folder within"),
        ({"pattern": ["2:4", "4:2"], "method": "wanda"}, "the run with pattern 4:2"),
        ({"save": None}, "has no folder"),
        ({"preset": ["balanced", "bset"]}, "the run with preset bset: unknown preset 'bset'; did you mean 'best'"),
        ({"preset": []}, "empty list"),
    ],
)
def test_invalid_sweeps_are_refused_with_the_reason(data: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        runs_of(**data)


def test_numpy_numbers_paths_and_other_sequences_are_accepted() -> None:
    told = {"model": Path("a"), "sparsity": list(np.linspace(0.5, 0.7, 3)), "seed": range(2), "nsamples": (4, 8)}
    plain = {"model": "a", "sparsity": [0.5, 0.6, 0.7], "seed": [0, 1], "nsamples": [4, 8]}
    sweep = Sweep.make(PLAIN | told).with_settings({"nsamples": np.int64(2), "save": Path("out/y")})
    again = Sweep.make(yaml.safe_load(sweep.to_yaml()))
    assert expand(again) == expand(sweep) == runs_of(**plain | {"nsamples": 2, "save": "out/y"})
    assert names(**told) == names(**plain)


def test_choices_survive_expansion_and_yaml() -> None:
    told = {"allocation": [Choice.of("owl:spread=0.1"), Choice.of("uniform")]}
    plain = {"allocation": ["owl:spread=0.1", "uniform"]}
    sweep = Sweep.make({**told, "model": "pico", "save": Path("out/x")})
    assert expand(Sweep.make(yaml.safe_load(sweep.to_yaml()))) == expand(sweep) == runs_of(**plain)
    typed = Sweep.make(PLAIN).with_settings({"refine": [Choice.of("refit:rounds=3")], "allocation": Choice.of("owl")})
    assert expand(Sweep.make(yaml.safe_load(typed.to_yaml()))) == expand(typed)


def test_a_sweep_round_trips_through_its_file(tmp_path: Path) -> None:
    sweep = Sweep.make(PLAIN | {"seed": [0, 1], "refine": ["refit"], "sweep": {"exclude": [{"seed": 1}]}})
    (tmp_path / "sweep.yaml").write_text(sweep.to_yaml(), encoding="utf-8")
    assert expand(Sweep.read(tmp_path / "sweep.yaml")) == expand(sweep)


def test_a_file_without_a_folder_gets_one_named_after_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: pico\n", encoding="utf-8")
    assert Sweep.read(tmp_path / "mine.yaml").folder == Path("out/mine")


def test_the_command_of_a_sweep_finds_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "of a title"
    folder.mkdir()
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"model": "pico", "method": ["wanda"]}), encoding="utf-8")
    words = shlex.split(sweep_command(folder))
    ended = run_command([*words[1:], "--dry-run"], monkeypatch, capsys)
    assert (ended.code, len(ended.out.splitlines())) == (0, 1), ended.err


def test_a_dry_run_lists_commands_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("table.yaml").write_text(yaml.safe_dump({"model": "pico", "method": ["wanda", "magnitude"]}), encoding="utf-8")
    ended = run_command(["sweep", "table.yaml", "--dry-run", "--nsamples", "4"], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == [
        "coprune prune pico --method wanda --nsamples 4 --save out/table/wanda",
        "coprune prune pico --method magnitude --nsamples 4 --save out/table/magnitude",
    ]
    assert ended.err.endswith("next      run them: coprune sweep table.yaml --nsamples 4\n")
    assert [path.name for path in tmp_path.iterdir()] == ["table.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "neither a file nor a script is named"),
        (["some.yaml", "--script", "llama-7b"], "a file (some.yaml) and a script (llama-7b) are named"),
        (["some.yaml", "--script", "best"], "to set a preset for its runs, add 'preset: best' to it"),
        (["--script", "llama-7bb", "--dry-run"], "did you mean 'llama-7b'"),
        (["missing.yaml", "--dry-run"], "cannot be read"),
        (["--script", "llama-7b", "--dry-run", "--method", "wnda"], "the run unstructured/wnda: unknown method"),
        (["--script", "llama-7b", "--dry-run", "--block-size=64"], "No such option"),
    ],
)
def test_invalid_sweep_commands_are_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run_command(["sweep", *words], monkeypatch, capsys)
    assert ended.code == 2
    assert message in ended.err
    assert not list(tmp_path.iterdir())
