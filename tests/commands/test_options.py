"""Options across commands: each has one meaning, old names are accepted, and help is grouped to the terminal's width."""

from __future__ import annotations

import inspect
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coprune.commands.command_table import COMMANDS, command_named
from coprune.recipe.flags import with_dashes
from coprune.recipe.views import MEASURING
from support.pico_folder import save_pico, write_words

# The Python functions behind the commands, replaced so that nothing is computed.
FUNCTIONS = {"bench": "coprune.sweeps.generation_speed.bench", "sweep": "coprune.sweeps.sweep_call.sweep",
             "compare": "coprune.sweeps.model_comparison.compare"}  # fmt: skip
SMALL = ["--dataset", "words.txt", "--nsamples", "4", "--seqlen", "32"]


def options_of(command: str) -> dict[str, tuple[str, str]]:
    """Return every flag of a command with its setting and the kind of its value."""
    found = {}
    for parameter in inspect.signature(command_named(command), eval_str=True).parameters.values():
        if not hasattr(parameter.annotation, "__metadata__"):
            continue  # typer's context
        kind, option = parameter.annotation.__origin__, parameter.annotation.__metadata__[0]
        names = [option.default, *(option.param_decls or ())]
        flags = [flag for name in names if isinstance(name, str) for flag in name.split("/") if flag.startswith("-")]
        setting = MEASURING[parameter.name].word if parameter.name in MEASURING else parameter.name
        for flag in flags or [f"--{parameter.name.replace('_', '-')}"]:
            if type(option).__name__ == "OptionInfo":
                found[flag] = setting.removesuffix("_option"), kind_of(kind)
    return found


def kind_of(annotation: Any) -> str:
    """Return the kind of a value; a choice of words is text."""
    words = set(re.findall(r"\w+", str(annotation)))
    return next((kind for kind in ("list", "bool", "int", "float", "Path") if kind in words), "str")


def test_a_flag_has_one_meaning_in_all_commands() -> None:
    meanings: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for command in COMMANDS:
        for flag, meaning in options_of(command).items():
            meanings[flag].add(meaning)
    assert len(meanings) > 120
    # --json is text in commands that also accept a word for standard output.
    assert {flag: found for flag, found in meanings.items() if len(found) > 1 and flag != "--json"} == {}
    assert {setting for setting, _ in meanings["--json"]} == {"json_file"}


def test_the_flags_of_the_wanda_repositorys_main_are_accepted() -> None:
    theirs = [
        "model",
        "seed",
        "nsamples",
        "sparsity_ratio",
        "sparsity_type",
        "prune_method",
        "cache_dir",
        "use_variant",
    ]
    theirs += ["save", "save_model", "eval_zero_shot"]
    assert set(with_dashes([f"--{name}" for name in theirs])) <= set(options_of("prune"))
    assert with_dashes(["prune", "a_b", "--save_model=x_y", "-p"]) == ["prune", "a_b", "--save-model=x_y", "-p"]


def test_help_is_grouped_and_as_wide_as_the_terminal(
    coprune: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = {}
    for columns in (80, 150):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = coprune("prune", "--help-all").splitlines()
        widths[columns] = max(map(len, lines))
        assert widths[columns] <= columns
        titles = [line.removesuffix(":") for line in lines if re.match(r"[A-Z].*:$", line)]
        assert titles[:3] == ["Arguments", "Options", "What is pruned, and how"]
        assert titles[-1] == "Where it goes"
        assert titles.count("Measuring") == 1
    assert widths[150] > 130
    text = "\n".join(lines)
    assert "--sparsity_ratio" not in text
    assert "--save-model" in text[text.index("Where it goes:") :]
    assert "Adapters (--mode lora or lora-distill):" in coprune("finetune", "--help-all")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_pico(tmp_path / "model", num_hidden_layers=2)
    write_words(tmp_path / "words.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_may_be_named_as_an_option(coprune: Callable[..., str], place: Path) -> None:
    found = coprune("inspect", "--model", "model", "--sparsity_ratio", "0.75", "--no-weights", "-q")
    assert found == coprune("inspect", "model", "-s", "0.75", "--no-weights", "-q")
    assert "to 75.00 %" in found


def test_estimate_prints_json_or_writes_it(coprune: Callable[..., str], place: Path) -> None:
    printed = json.loads(coprune("estimate", "--json", "model", *SMALL, "-q"))
    told = coprune("estimate", "model", *SMALL, "-q", "--json", "found.json")
    assert told.startswith("memory    at most ")
    assert json.loads((place / "found.json").read_text()).keys() == printed.keys()
