"""From a file or preset to its runs: every combination once, each with a folder and a command of its own."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from coprune.base.errors import BadInput
from coprune.recipe.recipe import Recipe
from coprune.run.sweep.command_line import command_of
from coprune.run.sweep.expand import expand
from coprune.run.sweep.file import Sweep
from coprune.run.sweep.presets import SWEEPS, sweep_preset
from support.commands import run_command

PLAIN = {"model": "pico", "save": "out/x"}

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


def runs_of(**data):
    return expand(Sweep.make(PLAIN | data))


def names(**data):
    return [run.name for run in runs_of(**data)]


@pytest.mark.parametrize(("preset", "listed"), [("llama-7b", LLAMA_7B), ("ablate-weight-update", ABLATION)])
def test_a_preset_is_exactly_the_script(preset, listed):
    expected = [
        Recipe(
            model="decapoda-research/llama-7b-hf",
            method=method,
            sparsity=0.5,
            pattern=pattern,
            nsamples=128,
            save=Path(folder),
        )
        for method, pattern, folder in (line.split() for line in listed.strip().splitlines())
    ]
    assert [run.recipe for run in expand(sweep_preset(preset))] == expected


def test_every_preset_expands_and_takes_another_model():
    counts = {name: len(expand(sweep_preset(name))) for name in SWEEPS}
    assert counts.pop("opt") == 5 * 9
    assert counts.pop("ablate-weight-update") == 12
    assert set(counts.values()) == {9}
    models = {run.recipe.model.name for run in expand(sweep_preset("opt").with_settings({"model": "mine"}))}
    assert models == {"mine"}


def test_the_first_list_is_outermost():
    assert names(method=["wanda", "magnitude"], seed=[0, 1]) == [
        "wanda/seed-0",
        "wanda/seed-1",
        "magnitude/seed-0",
        "magnitude/seed-1",
    ]


def test_zipped_lists_go_in_step():
    runs = runs_of(
        nsamples=[8, 16], method=["wanda", "magnitude"], seqlen=[32, 64], sweep={"zip": ["nsamples", "seqlen"]}
    )
    found = [(run.recipe.calibration.samples, run.recipe.calibration.seqlen, run.recipe.method.name) for run in runs]
    assert found == [(8, 32, "wanda"), (8, 32, "magnitude"), (16, 64, "wanda"), (16, 64, "magnitude")]


def test_runs_are_left_out_and_added():
    rules = {
        "exclude": [{"method": "magnitude", "pattern": ["2:4", "4:8"]}],
        "include": [{"method": "sparsegpt", "pattern": "2:4", "options": {"block_size": 64}}],
    }
    found = names(method=["wanda", "magnitude"], pattern=["unstructured", "2:4", "4:8"], sweep=rules)
    kept = ["wanda/unstructured", "wanda/2-4", "wanda/4-8", "magnitude/unstructured"]
    assert found == [*kept, "sparsegpt/2-4_block_size-64"]


def test_a_field_that_is_a_list_itself_has_a_list_of_lists():
    runs = runs_of(refine=[[], ["refit"], ["swaps", "refit"]])
    assert [run.recipe.setting("refine") for run in runs] == [(), ("refit",), ("swaps", "refit")]
    assert [run.recipe.setting("refine") for run in runs_of(refine=["swaps", "refit"])] == [("swaps", "refit")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"metod": ["wanda"]}, "did you mean 'method'"),
        ({"method": []}, "empty list"),
        ({"save": ["a", "b"]}, "the folder of the whole sweep"),
        ({"log_json": "x.jsonl"}, "for one run"),
        ({"sweep": {"zips": []}}, "did you mean 'zip'"),
        ({"sweep": ["zip"]}, "must hold"),
        ({"sweep": {"include": {"method": "wanda"}}}, "sweep.include"),
        ({"sweep": {"include": [{"metod": "wanda"}]}}, "did you mean 'method'"),
        ({"seed": [0, 1], "nsamples": [1, 2, 3], "sweep": {"zip": ["seed", "nsamples"]}}, "of one length: seed has 2"),
        ({"seed": [0, 1], "sweep": {"zip": ["seed"]}}, "two or more"),
        ({"method": ["wanda"], "sweep": {"exclude": [{"method": "magnitude"}]}}, "matches no run"),
        ({"method": ["wanda"], "sweep": {"exclude": [{"method": "wanda"}]}}, "every run of the sweep is excluded"),
        ({"seed": [0, 1], "sweep": {"folders": "{method}"}}, "two different runs"),
        ({"seed": [0, 1], "sweep": {"folders": "{metod}"}}, "no pattern of recipe fields"),
        ({"seed": [0, 1], "sweep": {"folders": "../{seed}"}}, "no folder within"),
        ({"pattern": ["2:4", "4:2"], "method": "wanda"}, "the run with pattern 4:2"),
        ({"save": None}, "has no folder"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(data, message):
    with pytest.raises(BadInput, match=message):
        runs_of(**data)


def test_a_sweep_is_what_its_file_says(tmp_path):
    sweep = Sweep.make(PLAIN | {"seed": [0, 1], "refine": ["refit"], "sweep": {"exclude": [{"seed": 1}]}})
    (tmp_path / "sweep.yaml").write_text(sweep.to_yaml(), encoding="utf-8")
    assert expand(Sweep.read(tmp_path / "sweep.yaml")) == expand(sweep)


def test_a_file_without_a_folder_gets_one_of_its_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: pico\n", encoding="utf-8")
    assert Sweep.read(tmp_path / "mine.yaml").folder == Path("out/mine")


def test_the_command_of_a_run_makes_that_run(monkeypatch, capsys):
    recipe = runs_of(method="sparsegpt", options={"block_size": 64}, refine=["refit"], evaluate=False, seqlen=64)[
        0
    ].recipe
    words = shlex.split(command_of(recipe))
    understood: list[Recipe] = []

    def stop(recipe, **others):
        understood.append(recipe)
        raise BadInput("understood")

    monkeypatch.setattr("coprune.run.stages.run_recipe", stop)
    assert run_command(words[1:], monkeypatch, capsys).code == 2
    assert understood == [recipe]


def test_a_dry_run_lists_commands_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("table.yaml").write_text(yaml.safe_dump({"model": "pico", "method": ["wanda", "magnitude"]}), encoding="utf-8")
    ended = run_command(["sweep", "table.yaml", "--dry-run", "--nsamples", "4"], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == [
        "coprune prune pico --nsamples 4 --save out/table/wanda",
        "coprune prune pico --method magnitude --nsamples 4 --save out/table/magnitude",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["table.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a file or a preset"),
        (["some.yaml", "--preset", "llama-7b"], "either a file (some.yaml) or a preset"),
        (["--preset", "llama-7bb", "--dry-run"], "did you mean 'llama-7b'"),
        (["missing.yaml", "--dry-run"], "cannot be read"),
        (["--preset", "llama-7b", "--dry-run", "--method", "wnda"], "the run unstructured/wnda: unknown method"),
        (["--preset", "llama-7b", "--dry-run", "--block-size=64"], "No such option"),
    ],
)
def test_a_command_that_cannot_be_is_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ended = run_command(["sweep", *words], monkeypatch, capsys)
    assert ended.code == 2
    assert message in ended.err
    assert not list(tmp_path.iterdir())
