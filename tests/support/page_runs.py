"""Run the commands and blocks of a page in its small world, with few samples, short windows and one step."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from coprune.commands.app import main
from coprune.commands.command_table import COMMANDS, Commands
from support.page_blocks import ROOT, Block, Line
from support.page_world import World

# Settings that replace the page's, in every command that has them.
SMALL: dict[str, int] = dict(nsamples=2, seqlen=32, max_steps=1, workers=1, threads=1) | dict(
    prompt_tokens=4, decode_tokens=2, repeats=1, limit=2
)
# Settings that replace the page's only if it names them.
SMALLER: dict[str, float | None] = dict(eval_tokens=64, tokens=64, finetune_minutes=0.001, minutes=None, epochs=None)
_TASKS = ("tasks", "eval_zero_shot", "zero_shot")
_TEXTS = ("dataset", "eval_data", "data", "generate", "domains", "prompts")
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
_EXTRAS = _PROJECT["project"]["optional-dependencies"]
_GROUPS = _PROJECT["dependency-groups"]


class Parsed(Exception):
    """Raised when a program's arguments were parsed, before it would start."""


def run_line(line: Line, world: World, patches: pytest.MonkeyPatch) -> None:
    """Run a page's command, as far as its program allows. Raises AssertionError if it fails, KeyError if it is unknown."""
    for variable in line.variables:
        if variable.partition("=")[0] != "TASK_DATA":  # its folder is provided
            patches.setenv(*variable.split("=", 1))
    RUNNERS[line.program](list(line.words[1:]), world, patches)


def run_coprune(words: list[str], world: World, patches: pytest.MonkeyPatch) -> None:
    """Run a command of coprune in this process."""
    typed = small(words, world) if words and words[0] in COMMANDS else words
    patches.setattr(sys, "argv", ["coprune", *typed])
    world.pages = words[0] == "report"
    code: object = 0
    try:
        main()
    except SystemExit as error:
        code = error.code
    assert not code, f"coprune {' '.join(typed)}"


def small(words: list[str], world: World) -> list[str]:
    """Return a command's words with small settings, and provide what it reads."""
    name, rest = words[0], list(words[1:])
    command: Any = Commands(name="coprune").commands[name]
    options = {param.name: param for param in command.params if param.param_type_name == "option"}
    flags = {flag: param for param in options.values() for flag in (*param.opts, *param.secondary_opts)}
    arguments, settings = _apart(rest, flags)
    world.provide(name, arguments)
    for model in (value for key in ("model_option", "teacher", "against") for value in settings.get(key, ())):
        world.model(model)
    for text in (value for key in _TEXTS for value in settings.get(key, ())):
        world.texts(text)
    changed: dict[str, Any] = {key: value for key, value in SMALL.items() if key in options}
    changed |= {key: value for key, value in SMALLER.items() if key in settings}
    if "generate" in settings:
        changed |= {"generate_prompts": 2, "generate_tokens": 8}
    if any(word.startswith("timm/") or word.endswith("deit") for word in arguments):
        changed.pop("seqlen", None)
    if not any(key in settings for key in _TASKS):
        changed.pop("limit", None)
    elif "include_path" not in settings:
        changed["include_path"] = "docs/tasks"
    kept = [word for index, word in enumerate(rest) if not _is_of(index, rest, flags, changed)]
    if any((world.folder / value).exists() for key in ("save", "save_model") for value in settings.get(key, ())):
        kept.append("--overwrite")  # pages start over at several places
    for key, value in changed.items():
        kept += [options[key].opts[0], str(value)] if value is not None else []
    # Groups must divide the inputs of all matrices in the small models.
    return [name, *(re.sub(r"length=\d+", "length=8", word).replace("group=64", "group=32") for word in kept)]


def _apart(words: list[str], flags: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Split words into arguments, and option values by setting."""
    arguments: list[str] = []
    settings: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, has_value, value = word.partition("=")
        if not flag.startswith("-"):
            arguments.append(word)
        elif flag in flags:
            param = flags[flag]
            values = settings.setdefault(param.name, [])
            if has_value or not param.is_flag:
                values.append(value if has_value else rest.pop(0))
        elif not has_value and rest:  # an option of the method
            rest.pop(0)
    return arguments, settings


def _is_of(index: int, words: list[str], flags: dict[str, Any], changed: dict[str, Any]) -> bool:
    """Return whether a word is a changed option or its value."""
    here, before = flags.get(words[index].partition("=")[0]), flags.get(words[index - 1]) if index else None
    if here is not None and here.name in changed:
        return True
    return before is not None and before.name in changed and not before.is_flag


def run_python(words: list[str], world: World, patches: pytest.MonkeyPatch) -> None:
    """Run `python -m coprune …`; of a script only parse the arguments, since it may take hours."""
    if words[:2] == ["-m", "coprune"]:
        run_coprune(words[2:], world, patches)
        return
    script = ROOT / words[0]
    assert script.is_file(), f"there is no {words[0]}"
    patches.setattr(sys, "argv", words)
    patches.syspath_prepend(str(script.parent))
    with pytest.MonkeyPatch.context() as reading:
        reading.setattr("argparse.ArgumentParser.parse_args", _read_arguments)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Parsed:
            return
        except SystemExit as error:
            raise AssertionError(f"{' '.join(words)}: its arguments are refused") from error
    raise AssertionError(f"{words[0]} reads no arguments")


def _read_arguments(self: Any, *arguments: Any) -> None:
    _, unknown = self.parse_known_args(*arguments)
    assert not unknown, f"unknown arguments: {unknown}"
    raise Parsed


def run_torchrun(words: list[str], world: World, patches: pytest.MonkeyPatch) -> None:
    """Parse torchrun's options and run its program in one process."""
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    assert options.module
    assert options.training_script == "coprune"
    run_coprune(options.training_script_args, world, patches)


def run_pip(words: list[str], world: World, patches: pytest.MonkeyPatch) -> None:
    """Require that installed items exist: extras and groups of this package, pinned packages, folders of the page."""
    assert words[0] == "install"
    wanted = [word for before, word in pairwise(words) if not word.startswith("-") and before != "--group"]
    groups = [word for before, word in pairwise(words) if before == "--group"]
    assert set(groups) <= set(_GROUPS), groups
    pinned = [*_GROUPS["demo"], "coprune"]
    for package in wanted:
        name, _, extras = package.rstrip("]").partition("[")
        assert name in (".", *pinned) or name.startswith("./coprune-"), package
        assert set(filter(None, extras.split(","))) <= set(_EXTRAS), package


def run_make(words: list[str], world: World, patches: pytest.MonkeyPatch) -> None:
    """Require that the targets exist."""
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in words:
        assert re.search(rf"^{re.escape(target)}:", rules, re.MULTILINE), target


RUNNERS: dict[str, Callable[[list[str], World, pytest.MonkeyPatch], None]] = {
    "coprune": run_coprune,
    "python": run_python,
    "torchrun": run_torchrun,
    "pip": run_pip,
    "make": run_make,
}


def run_python_block(block: Block, world: World, names: dict[str, Any]) -> None:
    """Run a Python block with few samples; its names stay defined for the page's next block."""
    for file in world.folder.glob("*.gguf"):
        file.unlink()  # made by an equivalent command before it
    text = re.sub(r"nsamples=\d+", "nsamples=2", re.sub(r"seqlen=\d+", "seqlen=32", block.text))
    for read in re.findall(r'\w\("(out/[^"]+)"', text):
        world.model(read)
    if "nsamples" not in text:
        text = re.sub(r"(coprune\.prune\(.*?)(dataset=)", r"\1nsamples=2, seqlen=32, \2", text)
    exec(compile(text, block.place, "exec", dont_inherit=True), names)


def run_yaml(block: Block, world: World, patches: pytest.MonkeyPatch) -> None:
    """Run a recipe or sweep, or a run with the allocation if the file names matrices."""
    named = re.match(r"# *([\w-]+\.yaml)", block.text)
    file = world.recipe(named[1] if named else "block.yaml", block.text)
    if not re.search("^model:", block.text, re.MULTILINE):
        run_coprune(["prune", "MODEL", "-p", "4:8", "--allocation", file.name], world, patches)
    elif named or "sweep:" in block.text:
        run_coprune(["sweep", file.name, "--dry-run"], world, patches)
    else:
        world.model(str(re.findall(r"^model: *(\S+)", block.text, re.MULTILINE)[0]))
        run_coprune(["prune", "--recipe", file.name], world, patches)


def is_excerpt(block: Block) -> bool:
    """Return whether all of a block's code is in one file of the package, which may have more comments."""
    begins = re.search(r"^(?:def|class) \w+|^[A-Z_]+: ", block.text, re.MULTILINE)
    files = [file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py")] if begins else []
    said = _code(block.text)
    return any(said <= _code(text) | _lines(text) for text in files if begins and begins[0] in text)


def _code(text: str) -> set[str]:
    """Return the lines of code without docstrings; of incomplete code, every line."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return _lines(text) - {"..."}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [one for one in node.body if not _explains(one)] or [ast.Pass()]
    return _lines(ast.unparse(tree))


def _lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines()} - {""}


def _explains(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
