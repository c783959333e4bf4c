"""The command line: every field of a recipe is an option, old names work, and methods bring their own options."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from coprune.commands.command_table import COMMANDS, command_named
from coprune.pruning.methods import METHODS
from coprune.recipe.choice import METHOD_NAMES
from coprune.recipe.flags import flags_of
from coprune.recipe.parts import is_common
from coprune.recipe.presets import BARE, preset_settings, usual_preset
from coprune.recipe.recipe import DEFAULTS, make_recipe
from coprune.recipe.tree import DETAILS, FIELDS
from coprune.recipe.views import MEASURING
from support.commands import run_command
from support.pico_folder import listing, save_pico, write_words


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_pico(tmp_path / "model", num_hidden_layers=2)
    write_words(tmp_path / "words.txt")
    write_words(tmp_path / "test.txt", count=200, seed=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORTER = {"evaluate": "eval", "evaluate_dense": "eval-dense"}
"""Fields of the recipe whose option is spelled differently."""
SMALL = ["--dataset", "words.txt", "--nsamples", "4", "--seqlen", "32"]


def report_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_every_field_of_the_recipe_is_an_option() -> None:
    assert set(FIELDS) - {"options"} <= set(inspect.signature(command_named("prune")).parameters)


def test_help_shows_every_command_and_every_option(coprune: Callable[..., str]) -> None:
    overview = coprune("--help")
    assert overview == coprune()
    for name in COMMANDS:
        assert re.search(rf"^  {name} +{re.escape(COMMANDS[name])}$", overview, re.MULTILINE)  # on one line, uncut
        assert f"coprune {name} [OPTIONS]" in coprune(name, "--help")
    options = set(re.findall(r"--[\w-]+", coprune("prune", "--help-all")))
    for setting in {
        word for word in set(FIELDS) - {"model", "options"} if word not in DETAILS or is_common(FIELDS[word])
    }:
        assert "--" + SHORTER.get(setting, setting.replace("_", "-")) in options
    for setting in ("evaluate", "evaluate_dense", "layer_error", "check_memory", "stream"):  # on by default
        assert "--no-" + SHORTER.get(setting, setting.replace("_", "-")) in options


def test_help_shows_each_commands_defaults(coprune: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    said, _ = usual_preset({"model": "m"})
    taken = make_recipe(said).flat()
    told = " ".join(coprune("prune", "--help-all").split())
    for word in preset_settings(BARE):
        if word not in DETAILS:
            value = taken[word]
            first = value if isinstance(value, tuple) else ("on" if value is True else value,)
            assert f"[{' '.join(map(str, first))} by preset {BARE}, else " in told, word
    assert f"[{taken['method']} by preset {BARE}, else {DEFAULTS['method']}]" in coprune("prune", "--help")
    assert "by preset" not in coprune("sweep", "--help-all")  # which has no default preset


def test_the_short_help_shows_the_common_settings_on_one_screen(
    coprune: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    help_text = coprune("prune", "--help")
    short = help_text[help_text.index("\nOptions:") :]
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", short, re.MULTILINE)
    assert len(options) <= 30
    assert {"--preset", "--pattern", "--save-model", "--help-all"} <= set(options)
    common = {name for name, field in FIELDS.items() if is_common(field)}
    shown = {flags_of(name)[0].partition("/")[0] for name in common}
    assert set(options) - shown == {"--dry-run", "--quiet", "--recipe", "--preset", "--help", "--help-all"}
    assert "model <str>  Hub id, local folder, GGUF file, or smollm2-135m\n" in help_text
    assert "vocabulary=96k" in short
    train = coprune("finetune", "--help")
    assert {"--mode", "--teacher", "--minutes", "--tokens", "--learning-rate", "--train-only"} <= set(train.split())
    assert "--rank" not in train
    assert "--rank" in coprune("finetune", "--help-all")
    for name in COMMANDS:
        assert len(coprune(name, "--help").splitlines()) <= 50, name
    for name in ("eval", "compare"):
        said = coprune(name, "--help")
        assert "--num-fewshot" not in said
        assert "--num-fewshot" in coprune(name, "--help-all")
    assert coprune("estimate", "--help-all").count("--calibrate-on") == 1  # where it is not in the short one
    assert "--calibrate-on" not in coprune("estimate", "--help")


def test_every_command_has_its_own_file_and_more_help_than_the_table() -> None:
    for name, told in COMMANDS.items():
        command = command_named(name)
        assert command.__module__ == f"coprune.commands.{command.__name__}"
        assert len(command.__doc__ or "") >= len(told)


def test_a_command_is_imported_only_when_used() -> None:
    program = """
import sys
from coprune.commands.app import main
sys.argv = ["coprune", "--help"]
main()
print("LOADED", [name for name in sys.modules if name.startswith(("coprune.recipe.recipe", "coprune.commands.prune"))])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("prune nosuch/", "no model at"),
        ("prune x -m wandaa", "'wanda'"),
        (
            "fit x --runtime transformers --task examples/fit/choice.jsonl -o y",
            "what 60 can prove at best: accuracy>=dense-0.12",
        ),
        (
            "fit x --runtime transformers --task examples/fit/text.txt --require accuracy>=0.5 -o y",
            "applies to no task",
        ),
    ],
)
def test_typing_errors_are_reported_before_torch_is_imported(typed: str, said: str) -> None:
    program = f"""
import sys
from coprune.commands.app import main
sys.argv = ["coprune", *{typed.split()!r}]
try:
    main()
finally:
    print("LOADED", "torch" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines()[-1] == "LOADED False"
    assert said in ended.stderr


def test_methods_are_known_by_name_before_torch_is_imported() -> None:
    assert set(METHOD_NAMES) == set(METHODS)


def test_version_option_prints_the_installed_version(coprune: Callable[..., str]) -> None:
    assert coprune("--version").split() == ["coprune", version("coprune")]


def test_completion_scripts_are_generated(coprune: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = coprune("--show-completion", "bash")
    assert "_COPRUNE_COMPLETE=complete_bash" in script or "COMPLETE=complete_bash" in script


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("coprune pr", ["prune"]), ("coprune eval --eval-to", ["--eval-tokens"]), ("coprune xyz", [])],
)
def test_commands_and_options_are_completed(typed: str, completed: list[str]) -> None:
    asked = {"_COPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    program = "import sys; sys.argv = ['coprune']; from coprune.commands.app import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert ended.stdout.split() == completed


def test_measuring_commands_accept_short_names_and_the_recipes(coprune: Callable[..., str]) -> None:
    for command in ("eval", "compare"):
        options = set(re.findall(r"--[\w-]+", coprune(command, "--help-all")))
        for name, (word, _) in MEASURING.items():
            assert {f"--{name.replace('_', '-')}", f"--{word.replace('_', '-')}"} <= options


def test_a_command_of_the_wanda_repository_still_runs(coprune: Callable[..., str], place: Path) -> None:
    coprune(
        *("prune", "--model", "model", "--prune_method", "wanda", "--sparsity_ratio", "0.5", "--sparsity_type", "2:4"),
        *("--dataset", "words.txt", "--nsamples", "4", "--seed", "0", "--cache_dir", "cache", "--save", "out"),
        *("--save_model", "pruned", "--use_variant", "--seqlen", "32", "--eval-data", "test.txt"),
    )
    report = report_in(place / "out")
    assert report["recipe"]["method"] == "wanda_variant"
    assert report["sparsity"]["matrices"] == 0.5
    header, line = (place / "out" / "log_wanda_variant.txt").read_text().splitlines()
    assert header.split("\t") == ["method", "actual_sparsity", "ppl_test"]
    method, sparsity, perplexity = line.split("\t")
    assert (method, float(sparsity)) == ("wanda_variant", 0.5)
    assert float(perplexity) == pytest.approx(report["perplexity"][0]["pruned"], abs=1e-4)


def test_a_run_repeats_from_its_recipe(coprune: Callable[..., str], place: Path) -> None:
    coprune(
        "prune", "model", *SMALL, "-m", "sparsegpt", "--block-size=32", "-p", "2:4", "--save", "a", "--save-model", "x"
    )
    coprune("prune", "--recipe", "a/recipe.yaml", "--save", "b", "--save-model", "y")
    assert (place / "x" / "model.safetensors").read_bytes() == (place / "y" / "model.safetensors").read_bytes()
    first, second = (report_in(place / name) for name in "ab")
    assert first["recipe"]["method"] == {"name": "sparsegpt", "block_size": 32}
    strip = [[{k: v for k, v in m.items() if k != "seconds"} for m in r["matrices"]] for r in (first, second)]
    assert strip[0] == strip[1]


def test_typed_options_override_recipe_and_preset(coprune: Callable[..., str], place: Path) -> None:
    (place / "recipe.yaml").write_text("model: elsewhere\nnsamples: 7\nsparsity: 0.25\n")
    coprune("prune", "model", "--recipe", "recipe.yaml", "--preset", "fast", "--dataset", "words.txt", "--seqlen", "32",
            "--sparsity", "0.75", "--save", "out")  # fmt: skip
    recipe = report_in(place / "out")["recipe"]
    assert (recipe["model"], recipe["sparsity"]) == ("model", 0.75)
    assert (recipe["nsamples"], recipe["propagation"]) == (7, "sequential")


def test_the_default_run_folder_names_model_target_and_method(coprune: Callable[..., str], place: Path) -> None:
    coprune("prune", "model", *SMALL, "-p", "2:4", "--method", "magnitude")
    assert (place / "out" / "model" / "2-4" / "magnitude" / "report.json").is_file()
    assert not list(place.rglob("*.partial"))


def test_include_and_exclude_are_repeatable(coprune: Callable[..., str], place: Path) -> None:
    coprune("prune", "model", *SMALL, "-m", "wanda", "--include", "*.q_proj", "--include", "*.layers.0.*",
            "--exclude", "*.v_proj", "--save", "out")  # fmt: skip
    names = {matrix["name"] for matrix in report_in(place / "out")["matrices"]}
    assert "model.layers.1.self_attn.q_proj" in names
    assert "model.layers.1.self_attn.k_proj" not in names
    assert "model.layers.0.mlp.down_proj" in names
    assert "model.layers.0.self_attn.v_proj" not in names


def test_eval_agrees_with_prune(coprune: Callable[..., str], place: Path) -> None:
    coprune(
        "prune", "model", *SMALL, "-m", "wanda", "--eval-data", "test.txt", "--save", "out", "--save-model", "pruned"
    )
    figures = report_in(place / "out")["perplexity"][0]
    for model, value in (("model", figures["dense"]), ("pruned", figures["pruned"])):
        line = coprune("eval", model, "--data", "test.txt", "--seqlen", "32", "--quiet")
        assert float(line.split()[1]) == pytest.approx(value, rel=1e-4)
        assert "sequence length 32" in line


def test_inspect_shows_blocks_shapes_and_present_sparsity(coprune: Callable[..., str], place: Path) -> None:
    coprune("prune", "model", *SMALL, "-m", "wanda", "-p", "2:4", "--save", "out", "--save-model", "pruned")
    before = listing(place)
    lines = [line.split() for line in coprune("inspect", "pruned", "--matrices").splitlines()]
    assert " ".join(lines[0]) == "pruned: llama, 94,528 parameters, 2 blocks (model.layers.0 … model.layers.1)"
    matrices = report_in(place / "out")["matrices"]
    could_go = [line for line in lines if line[:2] == ["could", "go"]]
    assert could_go[0][2] == "vocabulary=0.5:"
    assert lines[1 : -2 - len(could_go)] == [
        ["prune", m["name"], str(m["shape"][0]), "×", str(m["shape"][1]), "to", "50.00", "%", "50.00", "%", "zero"]
        for m in matrices
    ]
    kinds = coprune("inspect", "model", "-p", "2:4", "--exclude", "*.q_proj").splitlines()
    assert kinds[1] == "  leave  model.layers.*.self_attn.q_proj  64 × 64  (2)  0.00 % zero"
    assert kinds[2] == "  prune  model.layers.*.self_attn.k_proj  32 × 64  (2)  0.00 % zero"
    told = "would prune 12 matrices with 53,248 weights (56.33 % of the model) to 50.00 % (2:4)"
    assert kinds[-2 - len(could_go)].startswith(told)
    assert listing(place) == before


def test_methods_lists_all_with_their_options(coprune: Callable[..., str]) -> None:
    lines = coprune("methods")
    for name in METHODS:
        assert re.search(rf"^{name}\b", lines, re.MULTILINE)
    assert "--block-size" in coprune("methods", "sparsegpt")


METHOD = '''
"""A method in a file of its own: random scores, tilted towards large weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coprune.pruning.methods.base import Pruned, apply_keep
from coprune.base.method_options import require_not_negative
from coprune.recipe.pattern import Target
from coprune.model.walk.statistics import Statistic


@dataclass(frozen=True)
class Lottery:
    """Prune at random; larger weights have better lots."""

    my_option: float = 1.0
    """How much the size of a weight counts."""
    draw: int = 0
    """Seed of the lots."""

    statistic: ClassVar[type[Statistic] | None] = None

    def __post_init__(self) -> None:
        require_not_negative(my_option=self.my_option)

    def prune(self, weight: Tensor, statistic: None, target: Target) -> Pruned:
        lots = torch.rand(weight.shape, generator=torch.Generator().manual_seed(self.draw))
        keep = target.keep(lots * weight.abs() ** self.my_option, "row")
        return Pruned(apply_keep(weight, keep), keep)
'''


def test_a_new_method_is_one_file_and_one_line(
    coprune: Callable[..., str], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(METHOD.strip().splitlines()) < 40
    (place / "lottery.py").write_text(textwrap.dedent(METHOD))
    monkeypatch.syspath_prepend(place)
    from lottery import Lottery  # type: ignore[import-not-found]

    monkeypatch.setitem(METHODS, "lottery", Lottery())  # the line in the table
    try:
        coprune("prune", "model", *SMALL, "-m", "lottery", "--my-option", "0.5", "-p", "2:4", "--save", "out",
                "--save-model", "pruned", "--propagation", "sequential", "--refine", "refit")  # fmt: skip
        report = report_in(place / "out")
        assert report["recipe"]["method"] == {"name": "lottery", "my_option": 0.5}
        assert report["sparsity"]["matrices"] == 0.5
        assert "--my-option" in coprune("methods", "lottery")
        ended = run_command(["prune", "model", "-q", *SMALL, "-m", "lottery", "--my-option", "-1"], monkeypatch, capsys)
        assert (ended.code, len(ended.err.splitlines())) == (2, 1)
        assert "my_option" in ended.err
    finally:
        sys.modules.pop("lottery", None)
